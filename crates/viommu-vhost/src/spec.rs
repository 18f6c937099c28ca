//! What lies in memory: the layouts and numbers of `<linux/vhost.h>` and `<linux/vhost_types.h>` that the device IOTLB
//! needs, and no behaviour. Every bit pattern is a value. Integers are in the byte order of the host.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// VIRTIO_F_ACCESS_PLATFORM, a bit of the features of VHOST_GET_FEATURES: the device's addresses are translated.
pub const VIRTIO_F_ACCESS_PLATFORM: u64 = 1 << 33;

/// Bits of VHOST_GET_BACKEND_FEATURES and VHOST_SET_BACKEND_FEATURES, as masks.
pub mod backend {
    /// Messages of the second version, which have an address space in them.
    pub const IOTLB_MSG_V2: u64 = 1 << 1;
    /// BATCH_BEGIN and BATCH_END are taken.
    pub const IOTLB_BATCH: u64 = 1 << 2;
    /// The address space in a message is looked at; needs [`IOTLB_MSG_V2`].
    pub const IOTLB_ASID: u64 = 1 << 3;
    /// The device can be suspended.
    pub const SUSPEND: u64 = 1 << 4;
    /// A suspended device can be resumed.
    pub const RESUME: u64 = 1 << 5;
    /// Rings may be enabled after DRIVER_OK.
    pub const ENABLE_AFTER_DRIVER_OK: u64 = 1 << 6;
    /// Rings may lie in another address space than what they point to; needs [`IOTLB_ASID`].
    pub const DESC_ASID: u64 = 1 << 7;
    /// What is mapped stays when the device is reset.
    pub const IOTLB_PERSIST: u64 = 1 << 8;
}

/// What a device may do, in [`IotlbMsg::perm`].
pub mod perm {
    /// Read (VHOST_ACCESS_RO).
    pub const READ: u8 = 1;
    /// Write (VHOST_ACCESS_WO).
    pub const WRITE: u8 = 2;
    /// Both (VHOST_ACCESS_RW).
    pub const READ_WRITE: u8 = 3;
}

/// What a message is, in [`IotlbMsg::kind`].
pub mod kind {
    /// From the back-end: the device wants to reach an address that has no entry.
    pub const MISS: u8 = 1;
    /// To the back-end: one more entry.
    pub const UPDATE: u8 = 2;
    /// To the back-end: every entry that touches a range goes, wholly.
    pub const INVALIDATE: u8 = 3;
    /// From the back-end: the device wanted to reach what its entry forbids.
    pub const ACCESS_FAIL: u8 = 4;
    /// To the back-end: messages follow that may take effect together.
    pub const BATCH_BEGIN: u8 = 5;
    /// To the back-end: they are all there.
    pub const BATCH_END: u8 = 6;
}

/// [`Message::version`] of the first version (VHOST_IOTLB_MSG).
pub const VERSION_1: u32 = 1;
/// [`Message::version`] of the second version (VHOST_IOTLB_MSG_V2).
pub const VERSION_2: u32 = 2;

/// `struct vhost_iotlb_msg`. Also the payload of vhost-user's IOTLB messages.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IotlbMsg {
    /// The device's address.
    pub iova: u64,
    /// Bytes; 2^64 cannot be said.
    pub size: u64,
    /// UPDATE: the address in this process.
    pub uaddr: u64,
    /// See [`perm`].
    pub perm: u8,
    /// See [`kind`].
    pub kind: u8,
    /// Nothing.
    pub padding: [u8; 6],
}

/// `struct vhost_msg` and `struct vhost_msg_v2`, which differ in one word: one read or write of the vhost descriptor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Message {
    /// [`VERSION_1`] or [`VERSION_2`].
    pub version: u32,
    /// The address space; a hole in the first version.
    pub asid: u32,
    /// What it says.
    pub iotlb: IotlbMsg,
    /// Nothing.
    pub padding: [u8; 32],
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<IotlbMsg>() == 32 && offset_of!(IotlbMsg, uaddr) == 16);
    assert!(offset_of!(IotlbMsg, perm) == 24 && offset_of!(IotlbMsg, kind) == 25);
    assert!(size_of::<Message>() == 72 && offset_of!(Message, asid) == 4 && offset_of!(Message, iotlb) == 8);
};
