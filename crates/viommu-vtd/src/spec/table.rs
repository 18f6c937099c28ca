//! Entries of the tables in memory ("Translation Structure Formats"): words and their bits.

/// Any entry's address, before what a host's width leaves of it.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A root entry, 16 bytes.
pub mod root {
    /// Bytes.
    pub const SIZE: u64 = 16;
    /// Word 0 (and word 1 in scalable mode): there is a context table.
    pub const PRESENT: u64 = 1;
    /// Bits that are reserved besides the address's.
    pub const RESERVED: u64 = 0xffe;
}

/// A context entry of legacy mode, 16 bytes.
pub mod context {
    /// Bytes.
    pub const SIZE: u64 = 16;
    /// Word 0.
    pub const PRESENT: u64 = 1;
    /// Word 0: faults are not recorded.
    pub const FAULTS_DISABLED: u64 = 1 << 1;
    /// Where the translation type begins in word 0, 2 bits.
    pub const TYPE: u32 = 2;
    /// Word 0: reserved bits besides the address's.
    pub const RESERVED_0: u64 = 0xff0;
    /// Word 1: reserved bits.
    pub const RESERVED_1: u64 = 0xffff_ffff_ff00_0080;
    /// Word 1: the address width, levels less two.
    pub const WIDTH: u64 = 7;
    /// Where the domain id begins in word 1, 16 bits.
    pub const DOMAIN: u32 = 8;
    /// The translation type: requests are translated.
    pub const TRANSLATE: u64 = 0;
    /// As the first, and the device may have a TLB.
    pub const TRANSLATE_DEVICE_TLB: u64 = 1;
    /// The translation type: requests pass.
    pub const PASS: u64 = 2;
}

/// A second-stage paging entry, 8 bytes.
pub mod second {
    /// Reads are allowed.
    pub const READ: u64 = 1 << 0;
    /// Writes are allowed.
    pub const WRITE: u64 = 1 << 1;
    /// It is a large page's.
    pub const LARGE: u64 = 1 << 7;
    /// Accesses snoop (leaf); reserved elsewhere.
    pub const SNOOP: u64 = 1 << 11;
    /// Transient mapping: a leaf's, where there are device TLBs; reserved elsewhere.
    pub const TRANSIENT: u64 = 1 << 62;
}
