//! viommu's own format: compact, versioned, streamed. `docs/history-format.md` has it byte by byte.
//!
//! A file is a header, blocks, and an end block. Each block carries its length and a CRC-32, so that damage and a
//! cut-off end are found at their place; differences start anew in each block. Kinds of blocks and records that a
//! newer minor version adds carry their length and are passed over.

mod reader;
mod record;
mod writer;

pub(crate) use reader::OwnReader;
pub use writer::Writer;

/// What a file begins with.
pub(crate) const MAGIC: &[u8] = b"viommu\0";
/// Magic, major, minor and flags.
pub(crate) const HEADER: usize = MAGIC.len() + 3;
/// A file of another major version cannot be read.
pub(crate) const MAJOR: u8 = 1;
/// A file of a newer minor version can be read but for its additions.
pub(crate) const MINOR: u8 = 0;

/// Header flag: records tell the line of the source that they were made from.
pub(crate) const HAS_LINES: u8 = 1;

/// Kind, length (u32), CRC-32 (u32).
pub(crate) const BLOCK_HEADER: usize = 9;
/// A block of records.
pub(crate) const RECORDS: u8 = 1;
/// The last block: the number of records as a varint.
pub(crate) const END: u8 = 0xff;
/// The longest payload of a block that a reader takes.
pub(crate) const MAX_BLOCK: usize = 1 << 20;
/// The payload at which a writer ends a block.
pub(crate) const BLOCK: usize = 16 * 1024;

/// The CRC-32 (IEEE) of a block: over kind, length and payload.
pub(crate) fn checksum(kind: u8, payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&[kind]);
    crc.update(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    crc.update(payload);
    crc.finalize()
}
