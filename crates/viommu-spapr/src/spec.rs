//! Numbers of the interface between guest and hypervisor, and no behaviour.

use viommu::{Access, Gpa};

/// H_GET_TCE: LIOBN, I/O bus address.
pub const H_GET_TCE: u64 = 0x1c;
/// H_PUT_TCE: LIOBN, I/O bus address, TCE.
pub const H_PUT_TCE: u64 = 0x20;
/// H_STUFF_TCE: LIOBN, I/O bus address, value, number of entries.
pub const H_STUFF_TCE: u64 = 0x138;
/// H_PUT_TCE_INDIRECT: LIOBN, I/O bus address, guest address of a list of TCEs, number of entries.
pub const H_PUT_TCE_INDIRECT: u64 = 0x13c;

/// The most entries of one H_PUT_TCE_INDIRECT: a page of them.
pub const LIST_ENTRIES: u64 = 512;
/// Bytes: what the list of H_PUT_TCE_INDIRECT is aligned to.
pub const LIST_ALIGN: u64 = 4096;

/// A TCE's bit for reads by the device.
pub const TCE_READ: u64 = 1;
/// A TCE's bit for writes by the device.
pub const TCE_WRITE: u64 = 2;

/// What a hypercall returns in r3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i64)]
pub enum Code {
    /// Done.
    Success = 0,
    /// The hypervisor failed.
    Hardware = -1,
    /// An argument is wrong. Nothing has changed.
    Parameter = -4,
    /// There is no room, here or at one who holds a copy.
    Resource = -16,
}

impl Code {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Success, Self::Hardware, Self::Parameter, Self::Resource];

    /// The value of r3.
    #[must_use]
    pub const fn r3(self) -> i64 {
        match self {
            Self::Success => 0,
            Self::Hardware => -1,
            Self::Parameter => -4,
            Self::Resource => -16,
        }
    }
}

/// The first return value of an RTAS call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum RtasError {
    /// There is no room for the window.
    Hardware = -1,
    /// An argument is wrong.
    Parameter = -3,
}

bitflags::bitflags! {
    /// Page sizes, as `ibm,query-pe-dma-window` tells them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct PageSizes: u32 {
        /// 4 KiB.
        const K4 = 0x1;
        /// 64 KiB.
        const K64 = 0x2;
        /// 16 MiB.
        const M16 = 0x4;
        /// 2 MiB.
        const M2 = 0x100;
    }
}

impl PageSizes {
    /// The size of pages of `1 << shift` bytes.
    #[must_use]
    pub fn of_shift(shift: u32) -> Option<Self> {
        match shift {
            12 => Some(Self::K4),
            16 => Some(Self::K64),
            21 => Some(Self::M2),
            24 => Some(Self::M16),
            _ => None,
        }
    }
}

/// What a TCE says, for pages of `1 << page_shift` bytes: `Ok(None)` is an entry without access, whatever its other bits.
///
/// # Errors
/// Access is allowed and a bit between the permissions and the page's address is set.
pub(crate) fn decode(tce: u64, page_shift: u32) -> Result<Option<(Gpa, Access)>, Code> {
    let mut access = Access::empty();
    access.set(Access::READ, tce & TCE_READ != 0);
    access.set(Access::WRITE, tce & TCE_WRITE != 0);
    if access.is_empty() {
        return Ok(None);
    }
    let gpa = tce & !(TCE_READ | TCE_WRITE);
    let inside = 1_u64.checked_shl(page_shift).unwrap_or(0).wrapping_sub(1);
    if gpa & inside == 0 { Ok(Some((Gpa(gpa), access))) } else { Err(Code::Parameter) }
}

/// The TCE for pages that translate to `gpa`.
#[must_use]
pub fn encode(gpa: Gpa, access: Access) -> u64 {
    let read = if access.contains(Access::READ) { TCE_READ } else { 0 };
    let write = if access.contains(Access::WRITE) { TCE_WRITE } else { 0 };
    gpa.0 | read | write
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_when_no_permission_is_set_is_not_mapped_whatever_the_rest() {
        for poison in [0, 0x7ff0, !3, 0xc00] {
            assert_eq!(decode(poison, 12), Ok(None));
        }
    }

    #[test]
    fn decode_when_a_bit_below_the_page_is_set_is_refused() {
        for bit in 2..16 {
            let refused = decode(0x12_0000 | 1 << bit | TCE_READ, 16);
            assert_eq!(refused, Err(Code::Parameter), "bit {bit}");
        }
        assert_eq!(decode(0x12_0002, 16), Ok(Some((Gpa(0x12_0000), Access::WRITE))));
    }

    #[test]
    fn encode_gives_what_was_decoded() {
        for tce in [0x1000_0001, 0x1000_0002, 0xffff_ffff_ff00_0003] {
            let (gpa, access) = decode(tce, 24).unwrap().unwrap();
            assert_eq!(encode(gpa, access), tce);
        }
    }

    #[test]
    fn codes_are_those_of_the_interface() {
        assert_eq!(Code::ALL.map(Code::r3), [0, -1, -4, -16]);
        assert_eq!(PageSizes::of_shift(21), Some(PageSizes::M2));
        assert_eq!(PageSizes::of_shift(25), None);
    }
}
