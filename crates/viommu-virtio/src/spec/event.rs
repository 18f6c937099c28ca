//! Reports on the event queue ("Fault reporting").

use bitflags::bitflags;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The device says no more.
pub const UNKNOWN: u8 = 0;
/// The endpoint is attached to nothing and does not bypass.
pub const DOMAIN: u8 = 1;
/// The address is not mapped, or not for this kind of access.
pub const MAPPING: u8 = 2;

/// One fault, 24 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Fault {
    /// [`UNKNOWN`], [`DOMAIN`] or [`MAPPING`]; another one means the first.
    pub reason: u8,
    /// Zero, or the driver ignores the report.
    pub reserved: [u8; 3],
    /// [`FaultFlags`].
    pub flags: U32,
    /// Whose access it was.
    pub endpoint: U32,
    /// Zero.
    pub reserved1: U32,
    /// Where, if [`FaultFlags::ADDRESS`] says so.
    pub address: U64,
}

/// Bytes of a [`Fault`].
pub const SIZE: usize = 24;

const _: () = assert!(size_of::<Fault>() == SIZE);
const _: () =
    assert!(core::mem::offset_of!(Fault, flags) == 4 && core::mem::offset_of!(Fault, endpoint) == 8);
const _: () = assert!(core::mem::offset_of!(Fault, address) == 16);

bitflags! {
    /// Flags of a [`Fault`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FaultFlags: u32 {
        /// It was a read.
        const READ = 1 << 0;
        /// It was a write.
        const WRITE = 1 << 1;
        /// The address is valid.
        const ADDRESS = 1 << 8;

        const _ = !0;
    }
}
