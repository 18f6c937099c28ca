//! What lies in memory and in the configuration space (VIRTIO 1.4, "Block Device").

use virtio_bindings::bindings::virtio_blk as raw;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a sector, in which the protocol counts whatever the block size is.
pub(super) const SECTOR: u64 = 512;
/// Bytes of the answer to GET_ID.
pub(super) const ID_BYTES: usize = 20;
/// Bytes of a [`Header`].
pub(super) const HEADER_BYTES: usize = size_of::<Header>();
/// Bytes of a [`Segment`].
pub(super) const SEGMENT_BYTES: usize = size_of::<Segment>();

/// Feature bits.
pub(super) mod feature {
    use super::raw;

    pub(in crate::blk) const SIZE_MAX: u64 = 1 << raw::VIRTIO_BLK_F_SIZE_MAX;
    pub(in crate::blk) const SEG_MAX: u64 = 1 << raw::VIRTIO_BLK_F_SEG_MAX;
    pub(in crate::blk) const RO: u64 = 1 << raw::VIRTIO_BLK_F_RO;
    pub(in crate::blk) const BLK_SIZE: u64 = 1 << raw::VIRTIO_BLK_F_BLK_SIZE;
    pub(in crate::blk) const FLUSH: u64 = 1 << raw::VIRTIO_BLK_F_FLUSH;
    pub(in crate::blk) const TOPOLOGY: u64 = 1 << raw::VIRTIO_BLK_F_TOPOLOGY;
    pub(in crate::blk) const MQ: u64 = 1 << raw::VIRTIO_BLK_F_MQ;
    pub(in crate::blk) const DISCARD: u64 = 1 << raw::VIRTIO_BLK_F_DISCARD;
    pub(in crate::blk) const WRITE_ZEROES: u64 = 1 << raw::VIRTIO_BLK_F_WRITE_ZEROES;
}

/// Kinds of requests.
pub(super) mod kind {
    use super::raw;

    pub(in crate::blk) const IN: u32 = raw::VIRTIO_BLK_T_IN;
    pub(in crate::blk) const OUT: u32 = raw::VIRTIO_BLK_T_OUT;
    pub(in crate::blk) const FLUSH: u32 = raw::VIRTIO_BLK_T_FLUSH;
    pub(in crate::blk) const GET_ID: u32 = raw::VIRTIO_BLK_T_GET_ID;
    pub(in crate::blk) const DISCARD: u32 = raw::VIRTIO_BLK_T_DISCARD;
    pub(in crate::blk) const WRITE_ZEROES: u32 = raw::VIRTIO_BLK_T_WRITE_ZEROES;
}

/// The one flag of a [`Segment`]: zeroes may be a hole.
pub(super) const UNMAP: u32 = raw::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

/// The last byte of every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    IoErr,
    Unsupp,
}

impl Status {
    pub(super) fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::IoErr => 1,
            Self::Unsupp => 2,
        }
    }
}

/// Begins every request.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    pub(super) kind: U32,
    pub(super) reserved: U32,
    pub(super) sector: U64,
}

/// One range of DISCARD and WRITE_ZEROES.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Segment {
    pub(super) sector: U64,
    pub(super) sectors: U32,
    pub(super) flags: U32,
}

/// The configuration space, as far as it goes for the features that are offered.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Config {
    pub(super) capacity: U64,
    pub(super) size_max: U32,
    pub(super) seg_max: U32,
    pub(super) geometry: [u8; 4],
    pub(super) blk_size: U32,
    pub(super) physical_block_exp: u8,
    pub(super) alignment_offset: u8,
    pub(super) min_io_size: U16,
    pub(super) opt_io_size: U32,
    pub(super) writeback: u8,
    pub(super) unused0: u8,
    pub(super) num_queues: U16,
    pub(super) max_discard_sectors: U32,
    pub(super) max_discard_seg: U32,
    pub(super) discard_sector_alignment: U32,
    pub(super) max_write_zeroes_sectors: U32,
    pub(super) max_write_zeroes_seg: U32,
    pub(super) write_zeroes_may_unmap: u8,
    pub(super) unused1: [u8; 3],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_those_of_the_headers_of_linux() {
        assert_eq!(HEADER_BYTES, size_of::<raw::virtio_blk_outhdr>());
        assert_eq!(SEGMENT_BYTES, size_of::<raw::virtio_blk_discard_write_zeroes>());
        assert_eq!(ID_BYTES, raw::VIRTIO_BLK_ID_BYTES as usize);
        assert_eq!(
            core::mem::offset_of!(Config, num_queues),
            core::mem::offset_of!(raw::virtio_blk_config, num_queues)
        );
        assert_eq!(
            core::mem::offset_of!(Config, max_discard_sectors),
            core::mem::offset_of!(raw::virtio_blk_config, max_discard_sectors)
        );
        assert_eq!(
            core::mem::offset_of!(Config, write_zeroes_may_unmap),
            core::mem::offset_of!(raw::virtio_blk_config, write_zeroes_may_unmap)
        );
        assert_eq!(u32::from(Status::Unsupp.byte()), raw::VIRTIO_BLK_S_UNSUPP);
        assert_eq!(u32::from(Status::IoErr.byte()), raw::VIRTIO_BLK_S_IOERR);
    }
}
