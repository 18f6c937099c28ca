//! Requests: what the driver writes, and the tail that the device answers with ("Device operations").

use bitflags::bitflags;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Number of the request ATTACH.
pub const ATTACH: u8 = 1;
/// Number of the request DETACH.
pub const DETACH: u8 = 2;
/// Number of the request MAP.
pub const MAP: u8 = 3;
/// Number of the request UNMAP.
pub const UNMAP: u8 = 4;
/// Number of the request PROBE.
pub const PROBE: u8 = 5;

/// Begins every request.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Head {
    /// Which request.
    pub kind: u8,
    /// The device ignores it.
    pub reserved: [u8; 3],
}

/// Ends every request: all that the device writes, but for PROBE.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Tail {
    /// A [`Status`].
    pub status: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// Attach an endpoint to a domain ("ATTACH request"): what the driver writes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Attach {
    /// [`ATTACH`].
    pub head: Head,
    /// The domain.
    pub domain: U32,
    /// The endpoint.
    pub endpoint: U32,
    /// [`AttachFlags`].
    pub flags: U32,
    /// Must be zero.
    pub reserved: [u8; 4],
}

/// Detach an endpoint ("DETACH request"): what the driver writes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Detach {
    /// [`DETACH`].
    pub head: Head,
    /// The domain.
    pub domain: U32,
    /// The endpoint.
    pub endpoint: U32,
    /// The device ignores it.
    pub reserved: [u8; 8],
}

/// Make a mapping ("MAP request"): what the driver writes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Map {
    /// [`MAP`].
    pub head: Head,
    /// The domain.
    pub domain: U32,
    /// The first address.
    pub virt_start: U64,
    /// The last one.
    pub virt_end: U64,
    /// Where the first one goes: a guest physical address.
    pub phys_start: U64,
    /// [`MapFlags`].
    pub flags: U32,
}

/// Remove mappings ("UNMAP request"): what the driver writes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Unmap {
    /// [`UNMAP`].
    pub head: Head,
    /// The domain.
    pub domain: U32,
    /// The first address.
    pub virt_start: U64,
    /// The last one.
    pub virt_end: U64,
    /// The device may refuse another value than zero; this one ignores it.
    pub reserved: [u8; 4],
}

/// Ask for an endpoint's properties ("PROBE request"): what the driver writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Probe {
    /// [`PROBE`].
    pub head: Head,
    /// The endpoint.
    pub endpoint: U32,
    /// The device ignores it.
    pub reserved: [u8; 64],
}

impl Default for Probe {
    fn default() -> Self {
        Self { head: Head::default(), endpoint: U32::ZERO, reserved: [0; 64] }
    }
}

const _: () = assert!(size_of::<Head>() == 4 && size_of::<Tail>() == 4);
const _: () = assert!(size_of::<Attach>() == 20 && size_of::<Detach>() == 20);
const _: () = assert!(size_of::<Map>() == 36 && size_of::<Unmap>() == 28 && size_of::<Probe>() == 72);
const _: () = assert!(core::mem::offset_of!(Attach, flags) == 12);
const _: () = assert!(core::mem::offset_of!(Detach, reserved) == 12);
const _: () =
    assert!(core::mem::offset_of!(Map, phys_start) == 24 && core::mem::offset_of!(Map, flags) == 32);
const _: () = assert!(core::mem::offset_of!(Unmap, virt_end) == 16);
const _: () = assert!(core::mem::offset_of!(Probe, reserved) == 8);

bitflags! {
    /// Flags of ATTACH.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct AttachFlags: u32 {
        /// The domain is guest physical memory itself.
        const BYPASS = 1 << 0;

        const _ = !0;
    }
}

bitflags! {
    /// Flags of MAP.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct MapFlags: u32 {
        /// Reads are allowed.
        const READ = 1 << 0;
        /// Writes are allowed.
        const WRITE = 1 << 1;
        /// The target is a device's memory.
        const MMIO = 1 << 2;

        const _ = !0;
    }
}

/// How a request ended: the number in [`Tail::status`]. Other numbers keep their value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Status(pub u8);

impl Status {
    /// Done.
    pub const OK: Self = Self(0);
    /// The transport failed.
    pub const IOERR: Self = Self(1);
    /// The device cannot do this.
    pub const UNSUPP: Self = Self(2);
    /// The device has failed.
    pub const DEVERR: Self = Self(3);
    /// A parameter is not valid.
    pub const INVAL: Self = Self(4);
    /// A parameter is outside its limits, or an UNMAP would split a mapping.
    pub const RANGE: Self = Self(5);
    /// There is no such endpoint or domain.
    pub const NOENT: Self = Self(6);
    /// An address is bad.
    pub const FAULT: Self = Self(7);
    /// Out of resources.
    pub const NOMEM: Self = Self(8);
}
