//! Properties that a PROBE gives ("PROBE request", "Property RESV_MEM").

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The type that ends the list.
pub const NONE: u16 = 0;
/// The type of [`ResvMem`].
pub const RESV_MEM: u16 = 1;
/// The bits of [`PropertyHead::kind`] that are the type; the others are reserved.
pub const KIND_MASK: u16 = 0xfff;

/// No mapping can be made there, and accesses reach nothing.
pub const RESV_RESERVED: u8 = 0;
/// The same, but writes by the endpoint are interrupts.
pub const RESV_MSI: u8 = 1;

/// Begins every property.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct PropertyHead {
    /// The type, in the bits of [`KIND_MASK`].
    pub kind: U16,
    /// Bytes behind this head; the next property is there.
    pub length: U16,
}

/// A range of the endpoint's addresses that is not for mappings.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ResvMem {
    /// [`RESV_MEM`], and a length of 20.
    pub head: PropertyHead,
    /// [`RESV_RESERVED`] or [`RESV_MSI`]; another one means the first.
    pub subtype: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// The first address.
    pub start: U64,
    /// The last one.
    pub end: U64,
}

/// Bytes of a [`ResvMem`] with its head.
pub const RESV_MEM_SIZE: usize = 24;

const _: () = assert!(size_of::<PropertyHead>() == 4 && size_of::<ResvMem>() == RESV_MEM_SIZE);
const _: () =
    assert!(core::mem::offset_of!(ResvMem, start) == 8 && core::mem::offset_of!(ResvMem, end) == 16);
