//! Why a request is blocked ("Fault Reason Encodings"), and records of that.

/// A reason's number, as a fault record has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reason(pub u8);

impl Reason {
    /// The root entry is not present.
    pub const ROOT_ABSENT: Self = Self(0x01);
    /// The context entry is not present.
    pub const CONTEXT_ABSENT: Self = Self(0x02);
    /// The context entry says something that this unit does not do.
    pub const CONTEXT_INVALID: Self = Self(0x03);
    /// The address is beyond the width of the tables.
    pub const BEYOND_WIDTH: Self = Self(0x04);
    /// A write, which is not allowed.
    pub const WRITE: Self = Self(0x05);
    /// A read, which is not allowed.
    pub const READ: Self = Self(0x06);
    /// A paging entry cannot be read.
    pub const PAGING_UNREADABLE: Self = Self(0x07);
    /// The root table cannot be read.
    pub const ROOT_UNREADABLE: Self = Self(0x08);
    /// The context table cannot be read.
    pub const CONTEXT_UNREADABLE: Self = Self(0x09);
    /// Reserved bits in a root entry.
    pub const ROOT_RESERVED: Self = Self(0x0a);
    /// Reserved bits in a context entry.
    pub const CONTEXT_RESERVED: Self = Self(0x0b);
    /// Reserved bits in a paging entry.
    pub const PAGING_RESERVED: Self = Self(0x0c);
    /// The root table's mode is one that this unit does not have.
    pub const ROOT_MODE: Self = Self(0x30);
}

/// Word 1 of a fault record: the request was a read.
pub const RECORD_READ: u64 = 1 << 62;
/// Word 1 of a fault record: it is pending. Written as one, it is not any more.
pub const RECORD_PENDING: u64 = 1 << 63;
/// Word 1 of a fault record: there is a PASID.
pub const RECORD_HAS_PASID: u64 = 1 << 31;
/// Where the PASID begins in word 1, 20 bits.
pub const RECORD_PASID: u32 = 40;
/// Where the reason begins in word 1, 8 bits.
pub const RECORD_REASON: u32 = 32;
