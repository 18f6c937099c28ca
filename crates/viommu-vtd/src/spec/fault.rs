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
    /// The target is where writes are interrupts.
    pub const TARGET_INTERRUPTS: Self = Self(0x0e);
    /// The root table's mode is one that this unit does not have.
    pub const ROOT_MODE: Self = Self(0x30);
    /// A request with a PASID, in legacy mode.
    pub const LEGACY_PASID: Self = Self(0x31);
}

/// Reasons of scalable mode, in which there is no more of the others than [`Reason::ROOT_MODE`].
impl Reason {
    /// The root entry cannot be read.
    pub const SCALABLE_ROOT_UNREADABLE: Self = Self(0x38);
    /// The half of the root entry is not present.
    pub const SCALABLE_ROOT_ABSENT: Self = Self(0x39);
    /// Reserved bits in the half of the root entry.
    pub const SCALABLE_ROOT_RESERVED: Self = Self(0x3a);
    /// The context entry cannot be read.
    pub const SCALABLE_CONTEXT_UNREADABLE: Self = Self(0x40);
    /// The context entry is not present.
    pub const SCALABLE_CONTEXT_ABSENT: Self = Self(0x41);
    /// Reserved bits in a context entry.
    pub const SCALABLE_CONTEXT_RESERVED: Self = Self(0x42);
    /// The context entry says something that this unit does not do: a RID_PASID beyond the directory, say.
    pub const SCALABLE_CONTEXT_INVALID: Self = Self(0x43);
    /// A request with a PASID, which the context entry does not allow.
    pub const PASID_DISABLED: Self = Self(0x45);
    /// A request's PASID is beyond the directory.
    pub const PASID_BEYOND: Self = Self(0x46);
    /// The PASID directory's entry cannot be read.
    pub const DIRECTORY_UNREADABLE: Self = Self(0x50);
    /// The PASID directory's entry is not present.
    pub const DIRECTORY_ABSENT: Self = Self(0x51);
    /// Reserved bits in a PASID directory's entry.
    pub const DIRECTORY_RESERVED: Self = Self(0x52);
    /// The PASID entry cannot be read.
    pub const PASID_UNREADABLE: Self = Self(0x58);
    /// The PASID entry is not present.
    pub const PASID_ABSENT: Self = Self(0x59);
    /// Reserved bits in a PASID entry.
    pub const PASID_RESERVED: Self = Self(0x5a);
    /// The PASID entry says something that this unit does not do.
    pub const PASID_INVALID: Self = Self(0x5b);
    /// A first-stage entry, but of the first table, cannot be read.
    pub const FIRST_UNREADABLE: Self = Self(0x70);
    /// A first-stage entry is not present.
    pub const FIRST_ABSENT: Self = Self(0x71);
    /// Reserved bits in a first-stage entry.
    pub const FIRST_RESERVED: Self = Self(0x72);
    /// The first table of the first stage cannot be read.
    pub const FIRST_ROOT_UNREADABLE: Self = Self(0x73);
    /// A second-stage entry, but of the first table, cannot be read.
    pub const SECOND_UNREADABLE: Self = Self(0x78);
    /// A second-stage entry allows nothing.
    pub const SECOND_ABSENT: Self = Self(0x79);
    /// Reserved bits in a second-stage entry.
    pub const SECOND_RESERVED: Self = Self(0x7a);
    /// The first table of the second stage cannot be read.
    pub const SECOND_ROOT_UNREADABLE: Self = Self(0x7b);
    /// An address for the first stage is not canonical.
    pub const NOT_CANONICAL: Self = Self(0x80);
    /// A first-stage entry is for supervisors alone.
    pub const SUPERVISOR: Self = Self(0x81);
    /// An address for the second stage is beyond its width.
    pub const SCALABLE_BEYOND_WIDTH: Self = Self(0x84);
    /// A write, which is not allowed.
    pub const SCALABLE_WRITE: Self = Self(0x85);
    /// A read, which is not allowed.
    pub const SCALABLE_READ: Self = Self(0x86);
    /// The target is where writes are interrupts.
    pub const SCALABLE_TARGET_INTERRUPTS: Self = Self(0x87);
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
