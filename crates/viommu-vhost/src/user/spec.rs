//! What lies on a vhost-user socket, as far as an IOTLB has to do with it: layouts and numbers, and no behaviour.
//! Sections are those of QEMU's document `docs/interop/vhost-user.rst`. Integers are in the byte order of the host, and
//! every bit pattern is a value. The payload of an IOTLB message is [`crate::spec::IotlbMsg`].

use zerocopy::native_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Before every message ("Header").
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// See [`request`] and [`backend_request`].
    pub request: U32,
    /// See [`flag`].
    pub flags: U32,
    /// Bytes of the payload.
    pub size: U32,
}

/// Bytes of a [`Header`].
pub const HEADER: usize = size_of::<Header>();
const _: () = assert!(HEADER == 12);

/// Bits of [`Header::flags`].
pub mod flag {
    /// The bits of the version.
    pub const VERSION_MASK: u32 = 3;
    /// The only version.
    pub const VERSION: u32 = 1;
    /// An answer.
    pub const REPLY: u32 = 1 << 2;
    /// The sender wants an answer where there would be none; needs [`super::protocol::REPLY_ACK`].
    pub const NEED_REPLY: u32 = 1 << 3;
}

/// Messages of a front end ("Front-end message types").
#[expect(missing_docs, reason = "the document's own names")]
pub mod request {
    pub const SET_FEATURES: u32 = 2;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const IOTLB_MSG: u32 = 22;
    pub const RESET_DEVICE: u32 = 34;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// Messages of a back end, on its own channel ("Back-end message types").
pub mod backend_request {
    /// A MISS or an ACCESS_FAIL.
    pub const IOTLB_MSG: u32 = 1;
}

/// Bits of SET_PROTOCOL_FEATURES ("Protocol features"), as masks.
pub mod protocol {
    /// A message can ask for an answer.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// There is a channel for the back end's own messages.
    pub const BACKEND_REQ: u64 = 1 << 5;
}

/// The start of SET_MEM_TABLE; [`MemoryRegion`]s follow.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MemoryTable {
    /// Regions that follow; a descriptor comes with each.
    pub regions: U32,
    /// Nothing.
    pub padding: U32,
}

/// The start of ADD_MEM_REG and REM_MEM_REG; one [`MemoryRegion`] follows.
pub type SingleRegion = U64;

/// A region of the guest's memory ("Memory region description").
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct MemoryRegion {
    /// The guest physical address of its first byte.
    pub guest: U64,
    /// Bytes.
    pub size: U64,
    /// The front end's own address of its first byte.
    pub user: U64,
    /// Where it starts in its file.
    pub offset: U64,
}

const _: () = assert!(size_of::<MemoryTable>() == 8 && size_of::<MemoryRegion>() == 32);
