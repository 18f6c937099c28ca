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

/// A context entry of scalable mode, 32 bytes. A root entry's first word has the table of the devices 0 to 15 of a bus, its
/// second that of the others: 128 entries each.
pub mod scalable_context {
    /// Bytes.
    pub const SIZE: u64 = 32;
    /// Entries of a table.
    pub const ENTRIES: u64 = 128;
    /// Word 0.
    pub const PRESENT: u64 = 1;
    /// Word 0: faults are not recorded.
    pub const FAULTS_DISABLED: u64 = 1 << 1;
    /// Word 0: the device may have a TLB. Reserved where there are none.
    pub const DEVICE_TLB: u64 = 1 << 2;
    /// Word 0: requests may have a PASID.
    pub const PASID_ENABLE: u64 = 1 << 3;
    /// Where the directory's size begins in word 0, 3 bits: 2^(this + 7) entries.
    pub const DIRECTORY_SIZE: u32 = 9;
    /// Word 0: reserved bits besides the address's. Bit 4 is for page requests.
    pub const RESERVED_0: u64 = 0x1f0;
    /// Word 1: the PASID of requests that have none.
    pub const RID_PASID: u64 = 0xf_ffff;
    /// Word 1: reserved bits. Bit 20, requests of supervisors, is one where there are none.
    pub const RESERVED_1: u64 = 0xffff_ffff_fff0_0000;
}

/// An entry of a PASID directory, 8 bytes: it has a table of 64 PASID entries.
pub mod directory {
    /// Bytes.
    pub const SIZE: u64 = 8;
    /// There is a table.
    pub const PRESENT: u64 = 1;
    /// Faults are not recorded.
    pub const FAULTS_DISABLED: u64 = 1 << 1;
    /// Bits that are reserved besides the address's.
    pub const RESERVED: u64 = 0xffc;
    /// Bits of a PASID that the table resolves.
    pub const TABLE_BITS: u32 = 6;
}

/// A PASID entry, 64 bytes.
pub mod pasid {
    /// Bytes.
    pub const SIZE: u64 = 64;
    /// Word 0.
    pub const PRESENT: u64 = 1;
    /// Word 0: faults are not recorded.
    pub const FAULTS_DISABLED: u64 = 1 << 1;
    /// Where the second stage's address width begins in word 0, 3 bits: levels less two.
    pub const WIDTH: u32 = 2;
    /// Where the translation type begins in word 0, 3 bits.
    pub const TYPE: u32 = 6;
    /// Word 0: reserved bits besides the address's: second-stage execute (5), accessed and dirty bits of the second
    /// stage (9), which this unit has not, and 11 to 10.
    pub const RESERVED_0: u64 = 0xe20;
    /// Word 1: the domain id.
    pub const DOMAIN: u64 = 0xffff;
    /// Word 1: reserved bits.
    pub const RESERVED_1: u64 = 0x007f_0000;
    /// Where the first stage's paging mode begins in word 2, 2 bits: levels less four.
    pub const MODE: u32 = 2;
    /// Word 2: reserved bits besides the address's. Those below say what supervisors' requests and instruction fetches
    /// may; this unit has neither.
    pub const RESERVED_2: u64 = 0xf00;
    /// The translation type: the first stage alone.
    pub const FIRST: u64 = 1;
    /// The translation type: the second stage alone.
    pub const SECOND: u64 = 2;
    /// The translation type: requests pass.
    pub const PASS: u64 = 4;
}

/// A first-stage paging entry, 8 bytes, as processors have it.
pub mod first {
    /// It is present.
    pub const PRESENT: u64 = 1 << 0;
    /// Writes are allowed.
    pub const WRITE: u64 = 1 << 1;
    /// Requests of users are allowed: all are.
    pub const USER: u64 = 1 << 2;
    /// It has been used.
    pub const ACCESSED: u64 = 1 << 5;
    /// The page may have been written (leaf).
    pub const DIRTY: u64 = 1 << 6;
    /// It is a large page's.
    pub const LARGE: u64 = 1 << 7;
    /// A large page's address has one bit less: it says which kind of memory.
    pub const LARGE_KIND: u64 = 1 << 12;
}
