//! Addresses and ranges of them.
//!
//! A range is inclusive at both ends and never empty, so that `[0, 2^64-1]` is a range like any other and no
//! length can wrap. Lengths are `u128` bytes for the same reason.

use core::fmt;

/// An address that a [`Span`] can be made of.
pub trait Address: Copy + Ord + fmt::LowerHex + private::Sealed {
    /// The address of byte `raw`.
    fn new(raw: u64) -> Self;
    /// The byte that this address names.
    fn raw(self) -> u64;
}

mod private {
    pub trait Sealed {}
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(transparent))]
        pub struct $name(pub u64);

        impl private::Sealed for $name {}

        impl Address for $name {
            #[inline]
            fn new(raw: u64) -> Self {
                Self(raw)
            }
            #[inline]
            fn raw(self) -> u64 {
                self.0
            }
        }

        impl $name {
            /// The address `bytes` further on; `None` past 2^64-1.
            #[inline]
            #[must_use]
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }
        }

        impl From<u64> for $name {
            fn from(raw: u64) -> Self {
                Self(raw)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

address! {
    /// I/O virtual address: what a device puts on the bus.
    Iova
}
address! {
    /// Guest physical address: what an IOVA translates to.
    Gpa
}

/// An inclusive, never empty range of addresses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "serde",
    serde(
        try_from = "(A, A)",
        into = "(A, A)",
        bound(
            serialize = "A: Address + serde::Serialize",
            deserialize = "A: Address + serde::Deserialize<'de>"
        )
    )
)]
pub struct Span<A: Address> {
    start: A,
    last: A,
}

/// A range of I/O virtual addresses.
pub type IovaRange = Span<Iova>;
/// A range of guest physical addresses.
pub type GpaRange = Span<Gpa>;

impl IovaRange {
    /// Every I/O virtual address: `[0, 2^64-1]`.
    pub const ALL: Self = Self { start: Iova(0), last: Iova(u64::MAX) };
}

impl GpaRange {
    /// Every guest physical address: `[0, 2^64-1]`.
    pub const ALL: Self = Self { start: Gpa(0), last: Gpa(u64::MAX) };
}

/// A range whose last address is below its first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a range ends at {last:#x}, below its start {start:#x}")]
pub struct EmptyRange {
    /// The first address asked for.
    pub start: u64,
    /// The last address asked for.
    pub last: u64,
}

impl<A: Address> Span<A> {
    /// `[start, last]`, both inclusive; `None` when `last` is below `start`.
    #[inline]
    #[must_use]
    pub fn new(start: A, last: A) -> Option<Self> {
        (start <= last).then_some(Self { start, last })
    }

    /// `bytes` bytes from `start` on; `None` for no bytes, or past 2^64-1.
    #[inline]
    #[must_use]
    pub fn from_len(start: A, bytes: u64) -> Option<Self> {
        let last = start.raw().checked_add(bytes.checked_sub(1)?)?;
        Some(Self { start, last: A::new(last) })
    }

    /// The first address.
    #[inline]
    #[must_use]
    pub fn start(self) -> A {
        self.start
    }

    /// The last address, inclusive.
    #[inline]
    #[must_use]
    pub fn last(self) -> A {
        self.last
    }

    /// Length in bytes: at least 1, at most 2^64.
    #[inline]
    #[must_use]
    pub fn bytes(self) -> u128 {
        u128::from(self.last.raw() - self.start.raw()) + 1
    }

    /// The first address behind the range; `None` when it ends at 2^64-1.
    #[inline]
    #[must_use]
    pub fn next(self) -> Option<A> {
        self.last.raw().checked_add(1).map(A::new)
    }

    /// Whether `addr` lies inside.
    #[inline]
    #[must_use]
    pub fn contains(self, addr: A) -> bool {
        self.start <= addr && addr <= self.last
    }

    /// Whether all of `other` lies inside.
    #[inline]
    #[must_use]
    pub fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.last <= self.last
    }

    /// Whether the two share an address.
    #[inline]
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }

    /// What the two share.
    #[inline]
    #[must_use]
    pub fn intersect(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.last.min(other.last))
    }

    /// The smallest range that covers both.
    #[inline]
    #[must_use]
    pub fn hull(self, other: Self) -> Self {
        Self { start: self.start.min(other.start), last: self.last.max(other.last) }
    }

    /// Whether start and end lie on multiples of `page` bytes (a power of two).
    #[inline]
    #[must_use]
    pub fn is_aligned(self, page: u64) -> bool {
        let mask = page.wrapping_sub(1);
        self.start.raw() & mask == 0 && self.last.raw().wrapping_add(1) & mask == 0
    }
}

impl<A: Address> From<Span<A>> for (A, A) {
    fn from(range: Span<A>) -> Self {
        (range.start, range.last)
    }
}

impl<A: Address> TryFrom<(A, A)> for Span<A> {
    type Error = EmptyRange;

    fn try_from((start, last): (A, A)) -> Result<Self, EmptyRange> {
        Self::new(start, last).ok_or_else(|| EmptyRange { start: start.raw(), last: last.raw() })
    }
}

impl<A: Address> fmt::Debug for Span<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x}]", self.start, self.last)
    }
}

impl<A: Address> fmt::Display for Span<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x}]", self.start, self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_are_an_ordinary_range() {
        let all = IovaRange::ALL;
        assert_eq!(all.bytes(), 1 << 64);
        assert_eq!(all.next(), None);
        assert!(all.is_aligned(4096));
        assert!(all.covers(IovaRange::new(Iova(u64::MAX), Iova(u64::MAX)).unwrap()));
    }

    #[test]
    fn empty_or_wrapping_ranges_cannot_be_made() {
        assert_eq!(IovaRange::new(Iova(1), Iova(0)), None);
        assert_eq!(IovaRange::from_len(Iova(5), 0), None);
        assert_eq!(IovaRange::from_len(Iova(u64::MAX), 2), None);
        assert_eq!(IovaRange::from_len(Iova(u64::MAX), 1).unwrap().bytes(), 1);
    }

    #[test]
    fn intersect_of_neighbours_is_none() {
        let a = IovaRange::new(Iova(0), Iova(9)).unwrap();
        let b = IovaRange::new(Iova(10), Iova(19)).unwrap();
        assert!(!a.overlaps(b));
        assert_eq!(a.intersect(b), None);
        assert_eq!(a.hull(b), IovaRange::new(Iova(0), Iova(19)).unwrap());
    }
}
