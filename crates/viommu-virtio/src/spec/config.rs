//! The configuration space ("Device configuration layout").

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The fields, 40 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Config {
    /// Page sizes, one a bit; the lowest is the granule of mappings, the others say what is efficient.
    pub page_size_mask: U64,
    /// The first address that can be mapped.
    pub input_start: U64,
    /// The last one.
    pub input_end: U64,
    /// The least number of a domain.
    pub domain_start: U32,
    /// The greatest one.
    pub domain_end: U32,
    /// Bytes of the properties that a PROBE asks for.
    pub probe_size: U32,
    /// 1: endpoints that are attached to nothing bypass. The one field that the driver may write.
    pub bypass: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// Bytes of [`Config`].
pub const SIZE: usize = 40;
/// Where [`Config::bypass`] lies.
pub const BYPASS_OFFSET: usize = 36;

const _: () = assert!(size_of::<Config>() == SIZE);
const _: () = assert!(core::mem::offset_of!(Config, input_start) == 8);
const _: () = assert!(core::mem::offset_of!(Config, domain_start) == 24);
const _: () = assert!(core::mem::offset_of!(Config, probe_size) == 32);
const _: () = assert!(core::mem::offset_of!(Config, bypass) == BYPASS_OFFSET);
