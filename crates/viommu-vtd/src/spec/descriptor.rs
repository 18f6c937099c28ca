//! Descriptors of the invalidation queue ("Queued Invalidation Interface"). Each is two 64-bit words, or four where
//! the queue has wide ones; fields are named by the word they are in.

/// Where the rest of the type begins, in word 0: bits 11 to 9 are its bits 6 to 4.
pub const TYPE_HIGH: u32 = 9;
/// Invalidate context entries.
pub const CONTEXT: u8 = 1;
/// Invalidate translations.
pub const IOTLB: u8 = 2;
/// Invalidate a device's TLB.
pub const DEVICE_TLB: u8 = 3;
/// Invalidate interrupt entries.
pub const INTERRUPT: u8 = 4;
/// Wait for what is in front.
pub const WAIT: u8 = 5;
/// Invalidate translations of a PASID.
pub const PASID_IOTLB: u8 = 6;
/// Invalidate PASID entries.
pub const PASID: u8 = 7;
/// Invalidate a device's TLB for a PASID.
pub const PASID_DEVICE_TLB: u8 = 8;

/// Where the granularity begins, 2 bits of word 0: those of [`CONTEXT`], [`IOTLB`], [`PASID_IOTLB`], [`PASID`].
pub const GRANULARITY: u32 = 4;
/// Everything ([`CONTEXT`], [`IOTLB`]).
pub const GLOBAL: u8 = 1;
/// One domain id ([`CONTEXT`], [`IOTLB`]).
pub const DOMAIN: u8 = 2;
/// One source id and its masked neighbours ([`CONTEXT`]); some pages of a domain id ([`IOTLB`]).
pub const SELECTIVE: u8 = 3;

/// Where the domain id begins, 16 bits of word 0.
pub const DOMAIN_ID: u32 = 16;
/// Where the source id begins, 16 bits of word 0.
pub const SOURCE: u32 = 32;
/// Where the function mask begins, 2 bits of word 0.
pub const FUNCTION_MASK: u32 = 48;
/// Where the PASID begins, 20 bits of word 0 ([`PASID_IOTLB`], [`PASID`]).
pub const PASID_FIELD: u32 = 32;
/// The address mask of pages: bits of word 1 ([`IOTLB`], [`PASID_IOTLB`]).
pub const ADDRESS_MASK: u64 = 0x3f;

/// Word 0 of [`CONTEXT`]: reserved.
pub const CONTEXT_RESERVED: u64 = 0xfffc_0000_0000_f1c0;
/// Word 0 of [`IOTLB`]: reserved.
pub const IOTLB_RESERVED: [u64; 2] = [0xffff_ffff_0000_f100, 0xf80];
/// Word 0 and 1 of [`DEVICE_TLB`]: reserved.
pub const DEVICE_TLB_RESERVED: [u64; 2] = [0x0000_0000_ffe0_f1f0, 0xffe];
/// Bit of word 1 of [`DEVICE_TLB`]: the address says how many pages.
pub const SIZED: u64 = 1;

/// Word 0 of [`WAIT`]: an interrupt is wanted.
pub const WAIT_INTERRUPT: u64 = 1 << 4;
/// Word 0 of [`WAIT`]: a status is to be written.
pub const WAIT_STATUS: u64 = 1 << 5;
/// Where the status begins, 32 bits of word 0.
pub const WAIT_DATA: u32 = 32;
/// Word 0 and 1 of [`WAIT`]: reserved. Bits 6 (fence) and 7 (page request drain) are not.
pub const WAIT_RESERVED: [u64; 2] = [0xffff_f100, 3];

/// Word 0 and 1 of [`PASID_IOTLB`]: reserved.
pub const PASID_IOTLB_RESERVED: [u64; 2] = [0xfff0_0000_0000_f1c0, 0xf80];
/// Word 0 of [`PASID`]: reserved.
pub const PASID_RESERVED: u64 = 0xfff0_0000_0000_f1c0;
/// Where the source id begins, 16 bits of word 0 of [`PASID_DEVICE_TLB`].
pub const PASID_SOURCE: u32 = 16;
/// Bit of word 1 of [`PASID_DEVICE_TLB`]: every PASID is meant.
pub const EVERY_PASID: u64 = 1;
/// Bit of word 1 of [`PASID_DEVICE_TLB`]: the address says how many pages.
pub const PASID_SIZED: u64 = 1 << 11;
/// Word 1 of [`PASID_DEVICE_TLB`]: reserved.
pub const PASID_DEVICE_TLB_RESERVED: u64 = 0x7fe;

/// Granularities of [`PASID_IOTLB`].
pub mod pasid_iotlb {
    /// All of a PASID.
    pub const ALL: u8 = 2;
    /// Some pages.
    pub const PAGES: u8 = 3;
}

/// Granularities of [`PASID`].
pub mod pasid {
    /// One domain id.
    pub const DOMAIN: u8 = 0;
    /// One PASID of a domain id.
    pub const SELECTIVE: u8 = 1;
    /// Everything.
    pub const GLOBAL: u8 = 3;
}
