//! Offsets in the register page ("Register Descriptions"), and the bits in them.

use bitflags::bitflags;

/// Bytes of the register page.
pub const PAGE: u64 = 4096;

/// Version, 32 bits.
pub const VERSION: u64 = 0x00;
/// Capabilities, 64 bits.
pub const CAPABILITY: u64 = 0x08;
/// Extended capabilities, 64 bits.
pub const EXTENDED_CAPABILITY: u64 = 0x10;
/// Global command, 32 bits, written only: [`Global`].
pub const GLOBAL_COMMAND: u64 = 0x18;
/// Global status, 32 bits: [`Global`].
pub const GLOBAL_STATUS: u64 = 0x1c;
/// Root table address, 64 bits.
pub const ROOT_TABLE: u64 = 0x20;
/// Context command, 64 bits: [`context_command`].
pub const CONTEXT_COMMAND: u64 = 0x28;
/// Fault status, 32 bits: [`FaultStatus`].
pub const FAULT_STATUS: u64 = 0x34;
/// Fault event control, 32 bits: [`EventControl`]. Data, address and upper address follow, 32 bits each.
pub const FAULT_CONTROL: u64 = 0x38;
/// Fault event data.
pub const FAULT_DATA: u64 = 0x3c;
/// Fault event address.
pub const FAULT_ADDRESS: u64 = 0x40;
/// Fault event upper address.
pub const FAULT_UPPER: u64 = 0x44;
/// Invalidation queue head, 64 bits: bytes from the queue's base.
pub const QUEUE_HEAD: u64 = 0x80;
/// Invalidation queue tail, likewise.
pub const QUEUE_TAIL: u64 = 0x88;
/// Invalidation queue address, 64 bits: [`queue_address`].
pub const QUEUE_ADDRESS: u64 = 0x90;
/// Invalidation completion status, 32 bits: bit 0 is set by a wait descriptor.
pub const WAIT_STATUS: u64 = 0x9c;
/// Invalidation event control, 32 bits: [`EventControl`]. Data, address and upper address follow.
pub const WAIT_CONTROL: u64 = 0xa0;
/// Invalidation event data.
pub const WAIT_DATA: u64 = 0xa4;
/// Invalidation event address.
pub const WAIT_ADDRESS: u64 = 0xa8;
/// Invalidation event upper address.
pub const WAIT_UPPER: u64 = 0xac;
/// Where this unit has the register IVA; IOTLB is behind it (ECAP.IRO names the place).
pub const INVALIDATE_ADDRESS: u64 = 0xf0;
/// The register IOTLB: [`iotlb_command`].
pub const IOTLB_COMMAND: u64 = 0xf8;
/// Where this unit has its fault records, 16 bytes each (CAP.FRO names the place).
pub const FAULT_RECORDS: u64 = 0x220;

bitflags! {
    /// Bits of the global command and status registers.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Global: u32 {
        /// Queued invalidation.
        const QUEUE = 1 << 26;
        /// Write buffer flush: one-shot.
        const WRITE_BUFFER = 1 << 27;
        /// Set root table pointer: one-shot.
        const ROOT_TABLE = 1 << 30;
        /// DMA remapping.
        const TRANSLATION = 1 << 31;
    }
}

bitflags! {
    /// Bits of the fault status register. Bits 15 to 8 are the index of the first fault record that is pending.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct FaultStatus: u32 {
        /// A fault was lost, since no record was free.
        const OVERFLOW = 1 << 0;
        /// A fault record is pending; read only.
        const PENDING = 1 << 1;
        /// A descriptor of the invalidation queue could not be fetched, or is none.
        const QUEUE_ERROR = 1 << 4;
        /// A device's answer to a device-TLB invalidation was wrong.
        const COMPLETION_ERROR = 1 << 5;
        /// A device did not answer one.
        const TIMEOUT_ERROR = 1 << 6;
    }
}

bitflags! {
    /// Bits of an event control register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct EventControl: u32 {
        /// An event is held back; read only.
        const PENDING = 1 << 30;
        /// Events are held back.
        const MASKED = 1 << 31;
    }
}

/// CAP, "Capability Register": where its fields begin, and single bits.
pub mod capability {
    /// Number of domains: 6 is 2^16.
    pub const DOMAINS: u32 = 0;
    /// Caching mode.
    pub const CACHING_MODE: u64 = 1 << 7;
    /// Supported adjusted guest address widths: bit 1 is 39 bits, 2 is 48, 3 is 57.
    pub const WIDTHS: u32 = 8;
    /// Maximum guest address width, less one.
    pub const MAX_WIDTH: u32 = 16;
    /// Fault recording register offset, in 16 bytes.
    pub const FAULT_OFFSET: u32 = 24;
    /// Second-stage large pages: bit 0 is 2 MiB, bit 1 is 1 GiB.
    pub const LARGE_PAGES: u32 = 34;
    /// Page-selective invalidation.
    pub const PAGE_SELECTIVE: u64 = 1 << 39;
    /// Fault recording registers, less one.
    pub const FAULT_RECORDS: u32 = 40;
    /// Maximum address mask value.
    pub const MAX_MASK: u32 = 48;
    /// Drains writes.
    pub const WRITE_DRAIN: u64 = 1 << 54;
    /// Drains reads.
    pub const READ_DRAIN: u64 = 1 << 55;
    /// First-stage 1 GiB pages.
    pub const FIRST_STAGE_1G: u64 = 1 << 56;
    /// First-stage with 5 levels.
    pub const FIVE_LEVELS: u64 = 1 << 60;
}

/// ECAP, "Extended Capability Register": likewise.
pub mod extended {
    /// Walks are coherent with the caches of processors.
    pub const COHERENT: u64 = 1 << 0;
    /// Queued invalidation.
    pub const QUEUE: u64 = 1 << 1;
    /// Device TLBs.
    pub const DEVICE_TLB: u64 = 1 << 2;
    /// Pass-through.
    pub const PASS_THROUGH: u64 = 1 << 6;
    /// Snoop control.
    pub const SNOOP_CONTROL: u64 = 1 << 7;
    /// IOTLB register offset, in 16 bytes.
    pub const IOTLB_OFFSET: u32 = 8;
    /// PASID size supported, less one.
    pub const PASID_BITS: u32 = 35;
    /// Process address spaces.
    pub const PASID: u64 = 1 << 40;
    /// Scalable mode.
    pub const SCALABLE: u64 = 1 << 43;
    /// Second stage, in scalable mode.
    pub const SECOND_STAGE: u64 = 1 << 46;
    /// First stage, in scalable mode.
    pub const FIRST_STAGE: u64 = 1 << 47;
    /// Walks of scalable-mode structures are coherent.
    pub const SCALABLE_COHERENT: u64 = 1 << 48;
    /// Context entries say which PASID requests without one have.
    pub const RID_PASID: u64 = 1 << 49;
}

/// RTADDR, "Root Table Address Register".
pub mod root {
    /// Where the translation table mode begins, 2 bits.
    pub const MODE: u32 = 10;
    /// Legacy mode.
    pub const LEGACY: u64 = 0;
    /// Scalable mode.
    pub const SCALABLE: u64 = 1;
}

/// CCMD, "Context Command Register".
pub mod context_command {
    /// Invalidate; reads one until it is done.
    pub const INVALIDATE: u64 = 1 << 63;
    /// Where the requested granularity begins, 2 bits: as in a descriptor.
    pub const REQUESTED: u32 = 61;
    /// Where the performed granularity begins, 2 bits.
    pub const PERFORMED: u32 = 59;
    /// Where the function mask begins, 2 bits.
    pub const FUNCTION_MASK: u32 = 32;
    /// Where the source id begins, 16 bits.
    pub const SOURCE: u32 = 16;
}

/// IOTLB, "IOTLB Invalidate Register".
pub mod iotlb_command {
    /// Invalidate; reads one until it is done.
    pub const INVALIDATE: u64 = 1 << 63;
    /// Where the requested granularity begins, 2 bits: as in a descriptor.
    pub const REQUESTED: u32 = 60;
    /// Where the performed granularity begins, 2 bits.
    pub const PERFORMED: u32 = 57;
    /// Where the domain id begins, 16 bits.
    pub const DOMAIN: u32 = 32;
    /// Bits of IVA that are the address mask.
    pub const ADDRESS_MASK: u64 = 0x3f;
}

/// IQA, "Invalidation Queue Address Register".
pub mod queue_address {
    /// Descriptors of 32 bytes.
    pub const WIDE: u64 = 1 << 11;
    /// The queue has 2^(this) pages.
    pub const SIZE: u64 = 7;
}
