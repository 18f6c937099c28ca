//! What lies on the socket: layouts and numbers, and no behaviour. Every bit pattern is a value.
//!
//! The byte order is the machine's own, as both ends are on one machine. Sections are those of the vfio-user protocol
//! specification, version 0.1.

use bitflags::bitflags;
use zerocopy::native_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Before every message ("Header").
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Chosen by the sender of a command, and repeated in its reply.
    pub id: U16,
    /// See [`Command`].
    pub command: U16,
    /// Bytes of the whole message, this header included.
    pub size: U32,
    /// See [`MessageFlags`]; the low four bits are the type.
    pub flags: U32,
    /// An errno, in a reply with [`MessageFlags::ERROR`].
    pub error: U32,
}

/// Bytes of a [`Header`].
pub const HEADER: usize = size_of::<Header>();
const _: () = assert!(HEADER == 16);

bitflags! {
    /// The flags of a [`Header`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct MessageFlags: u32 {
        /// An answer; otherwise a command.
        const REPLY = 1;
        /// The sender wants no answer.
        const NO_REPLY = 1 << 4;
        /// The command failed, and `error` says why.
        const ERROR = 1 << 5;
        const _ = !0;
    }
}

/// What a message asks for ("Commands").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command(pub u16);

#[expect(missing_docs, reason = "the specification's own names")]
impl Command {
    pub const VERSION: Self = Self(1);
    pub const DMA_MAP: Self = Self(2);
    pub const DMA_UNMAP: Self = Self(3);
    pub const DEVICE_GET_INFO: Self = Self(4);
    pub const DEVICE_GET_REGION_INFO: Self = Self(5);
    pub const DEVICE_GET_REGION_IO_FDS: Self = Self(6);
    pub const DEVICE_GET_IRQ_INFO: Self = Self(7);
    pub const DEVICE_SET_IRQS: Self = Self(8);
    pub const REGION_READ: Self = Self(9);
    pub const REGION_WRITE: Self = Self(10);
    pub const DMA_READ: Self = Self(11);
    pub const DMA_WRITE: Self = Self(12);
    pub const DEVICE_RESET: Self = Self(13);
    pub const REGION_WRITE_MULTI: Self = Self(15);
}

/// The fixed part of VERSION, both ways. JSON text that ends in a zero byte follows.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Version {
    /// Must be equal.
    pub major: U16,
    /// The server's is the client's at most.
    pub minor: U16,
}

/// DMA_MAP.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DmaMap {
    /// Bytes of this payload.
    pub argsz: U32,
    /// See [`DmaFlags`].
    pub flags: U32,
    /// Where the window starts in the file.
    pub offset: U64,
    /// Where the device sees it.
    pub address: U64,
    /// Its bytes.
    pub size: U64,
}

/// DMA_UNMAP, and its reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DmaUnmap {
    /// Bytes of the greatest reply that is accepted.
    pub argsz: U32,
    /// Bit 1: all windows (see [`UNMAP_ALL`]).
    pub flags: U32,
    /// The window's start, as it was mapped.
    pub address: U64,
    /// Its bytes, as it was mapped.
    pub size: U64,
}

/// A DMA_UNMAP of everything, with address and size zero. Not in the document; QEMU and libvfio-user have it.
pub const UNMAP_ALL: u32 = 1 << 1;

bitflags! {
    /// What a window allows.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DmaFlags: u32 {
        /// The device may read.
        const READ = 1;
        /// The device may write.
        const WRITE = 1 << 1;
        /// The descriptor is to be mapped into memory.
        const MMAP = 1 << 2;
        /// The descriptor is to be read and written.
        const FILE_IO = 1 << 3;
        const _ = !0;
    }
}

/// The reply of DEVICE_GET_INFO; the request has `argsz` first, too.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DeviceInfo {
    /// Bytes of this payload.
    pub argsz: U32,
    /// Bit 0: can be reset. Bit 1: a PCI function.
    pub flags: U32,
    /// Regions.
    pub regions: U32,
    /// Kinds of interrupts.
    pub irqs: U32,
}

/// DEVICE_GET_REGION_INFO, both ways.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RegionInfo {
    /// Bytes of this payload.
    pub argsz: U32,
    /// See [`RegionFlags`].
    pub flags: U32,
    /// Which region.
    pub index: U32,
    /// Where capabilities start; 0 for none.
    pub cap_offset: U32,
    /// Bytes of the region.
    pub size: U64,
    /// Where it begins in its file, for mmap.
    pub offset: U64,
}

bitflags! {
    /// What a region allows.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RegionFlags: u32 {
        /// REGION_READ.
        const READ = 1;
        /// REGION_WRITE.
        const WRITE = 1 << 1;
        /// Its file, or areas of it, can be mapped.
        const MMAP = 1 << 2;
        /// Capabilities follow.
        const CAPS = 1 << 3;
    }
}

/// Before each capability of a [`RegionInfo`], as VFIO has them.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CapHeader {
    /// Which capability: see [`CAP_SPARSE_MMAP`].
    pub id: U16,
    /// Its version.
    pub version: U16,
    /// Where the next one starts in the payload; 0 for none.
    pub next: U32,
}

/// The capability that names the areas of a region that can be mapped.
pub const CAP_SPARSE_MMAP: u16 = 1;

/// Behind the header of [`CAP_SPARSE_MMAP`]; so many [`SparseArea`]s follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SparseMmap {
    /// How many.
    pub areas: U32,
    /// Zero.
    pub reserved: U32,
}

/// An area of a region that can be mapped.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SparseArea {
    /// Where in the region.
    pub offset: U64,
    /// Bytes.
    pub size: U64,
}

/// DEVICE_GET_REGION_IO_FDS, both ways; the reply has [`IoFd`]s behind it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IoFds {
    /// Bytes of the payload: of the greatest reply accepted, or of the whole reply.
    pub argsz: U32,
    /// None is defined.
    pub flags: U32,
    /// Which region.
    pub index: U32,
    /// Entries.
    pub count: U32,
}

/// A piece of a region whose writes may come as a descriptor's event.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IoFd {
    /// Where in the region.
    pub offset: U64,
    /// Bytes.
    pub size: U64,
    /// Which descriptor of the message.
    pub fd_index: U32,
    /// 0: an ioeventfd.
    pub kind: U32,
    /// Bit 0: only where the value written is `datamatch`.
    pub flags: U32,
    /// Zero.
    pub padding: U32,
    /// See `flags`.
    pub datamatch: U64,
}

/// DEVICE_GET_IRQ_INFO, both ways.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IrqInfo {
    /// Bytes of this payload.
    pub argsz: U32,
    /// See [`IrqFlags`].
    pub flags: U32,
    /// Which kind of interrupt.
    pub index: U32,
    /// How many there are.
    pub count: U32,
}

bitflags! {
    /// What an interrupt can.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IrqFlags: u32 {
        /// It is told by a descriptor.
        const EVENTFD = 1;
        /// It can be masked.
        const MASKABLE = 1 << 1;
        /// It masks itself when it is raised.
        const AUTOMASKED = 1 << 2;
    }
}

/// DEVICE_SET_IRQS. Bytes may follow, and descriptors come with it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IrqSet {
    /// Bytes of the whole payload.
    pub argsz: U32,
    /// See [`IrqAction`].
    pub flags: U32,
    /// Which kind of interrupt.
    pub index: U32,
    /// The first of them.
    pub start: U32,
    /// How many.
    pub count: U32,
}

bitflags! {
    /// What is to be done with interrupts: one kind of data, one action.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IrqAction: u32 {
        /// No data: all of the range.
        const DATA_NONE = 1;
        /// A byte each: those that are not zero.
        const DATA_BOOL = 1 << 1;
        /// A descriptor each.
        const DATA_EVENTFD = 1 << 2;
        /// Mask.
        const MASK = 1 << 3;
        /// Unmask.
        const UNMASK = 1 << 4;
        /// Raise, or say what raises.
        const TRIGGER = 1 << 5;
        const _ = !0;
    }
}

/// REGION_READ, REGION_WRITE and their replies; the data follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RegionAccess {
    /// Where in the region.
    pub offset: U64,
    /// Which region.
    pub region: U32,
    /// Bytes.
    pub count: U32,
}

/// One write of REGION_WRITE_MULTI; a count of them, in eight bytes, comes first.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct MultiWrite {
    /// Where in the region.
    pub offset: U64,
    /// Which region.
    pub region: U32,
    /// Bytes, eight at most.
    pub count: U32,
    /// The first `count` of them are meant.
    pub data: [u8; 8],
}

/// DMA_READ and DMA_WRITE; the data follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DmaAccess {
    /// Where in the client's memory.
    pub address: U64,
    /// Bytes.
    pub count: U64,
}

/// Regions of a PCI function, in VFIO's numbering.
pub mod region {
    /// The BARs are 0 to 5.
    pub const BARS: u32 = 6;
    /// The expansion ROM.
    pub const ROM: u32 = 6;
    /// Configuration space.
    pub const CONFIG: u32 = 7;
    /// How many there are.
    pub const COUNT: u32 = 9;
}

/// Kinds of interrupts of a PCI function, in VFIO's numbering.
pub mod irq {
    /// The pin.
    pub const INTX: u32 = 0;
    /// MSI.
    pub const MSI: u32 = 1;
    /// MSI-X.
    pub const MSIX: u32 = 2;
    /// How many there are.
    pub const COUNT: u32 = 5;
}

const _: () = {
    assert!(size_of::<Version>() == 4);
    assert!(size_of::<DmaMap>() == 32);
    assert!(size_of::<DmaUnmap>() == 24);
    assert!(size_of::<DeviceInfo>() == 16);
    assert!(size_of::<RegionInfo>() == 32);
    assert!(size_of::<CapHeader>() == 8);
    assert!(size_of::<SparseMmap>() == 8);
    assert!(size_of::<SparseArea>() == 16);
    assert!(size_of::<IoFds>() == 16);
    assert!(size_of::<IoFd>() == 40);
    assert!(size_of::<IrqInfo>() == 16);
    assert!(size_of::<IrqSet>() == 20);
    assert!(size_of::<RegionAccess>() == 16);
    assert!(size_of::<MultiWrite>() == 24);
    assert!(size_of::<DmaAccess>() == 16);
};
