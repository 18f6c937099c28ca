//! One DMA window: a linear array of entries, one a page.

use viommu::{Gpa, GpaRange, Iova, IovaRange, Mapping};

/// The smallest and the largest page, as shifts.
const SHIFTS: core::ops::RangeInclusive<u32> = 12..=34;

/// A DMA window of a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Window {
    /// The number by which hypercalls name it.
    pub liobn: u32,
    /// The bus addresses that it translates, inclusive: whole pages.
    pub range: IovaRange,
    /// A page has `1 << page_shift` bytes.
    pub page_shift: u32,
}

impl Window {
    /// A window of `1 << window_shift` bytes from `start` on; `None` where it would pass 2^64-1.
    #[must_use]
    pub fn new(liobn: u32, start: u64, window_shift: u32, page_shift: u32) -> Option<Self> {
        let less_one = u64::MAX.checked_shr(64_u32.checked_sub(window_shift)?).unwrap_or(0);
        let range = IovaRange::new(Iova(start), Iova(start.checked_add(less_one)?))?;
        let window = Self { liobn, range, page_shift };
        window.is_sound().then_some(window)
    }

    /// Whether it is made of whole pages of a size that there is.
    pub(crate) fn is_sound(&self) -> bool {
        SHIFTS.contains(&self.page_shift) && self.range.is_aligned(self.page())
    }

    /// Bytes a page.
    pub(crate) fn page(&self) -> u64 {
        1_u64.checked_shl(self.page_shift).unwrap_or(1)
    }

    /// The pages of `count` entries from the one that holds `ioba` on; `None` where there are none, or not all are in the
    /// window.
    pub(crate) fn entries(&self, ioba: u64, count: u64) -> Option<IovaRange> {
        let inside = self.page().wrapping_sub(1);
        let start = ioba & !inside;
        let less_one = count.checked_sub(1)?.checked_mul(self.page())?.checked_add(inside)?;
        let range = IovaRange::new(Iova(start), Iova(start.checked_add(less_one)?))?;
        self.range.covers(range).then_some(range)
    }

    /// The page at `start`, as a mapping to `gpa`.
    pub(crate) fn target(&self, gpa: Gpa) -> Option<GpaRange> {
        GpaRange::from_len(gpa, self.page())
    }

    /// Whether a mapping is one that hypercalls could have made in this window.
    pub(crate) fn could_hold(&self, mapping: &Mapping) -> bool {
        self.range.covers(mapping.range)
            && mapping.range.is_aligned(self.page())
            && mapping.gpa.0 & self.page().wrapping_sub(1) == 0
            && !mapping.access.is_empty()
            && mapping.target == viommu::Target::Ram
            && Mapping::over(mapping.range, mapping.gpa, mapping.access).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> Option<IovaRange> {
        IovaRange::new(Iova(start), Iova(last))
    }

    #[test]
    fn entries_when_they_pass_the_window_are_none() {
        let window = Window::new(1, 0x10_0000, 20, 16).unwrap();
        assert_eq!(window.entries(0x10_0000, 16), range(0x10_0000, 0x1f_ffff));
        assert_eq!(window.entries(0x12_ffff, 1), range(0x12_0000, 0x12_ffff));
        for (ioba, count) in
            [(0xf_ffff, 1), (0x10_0000, 17), (0x20_0000, 1), (0x10_0000, 0), (0x10_0000, u64::MAX)]
        {
            assert_eq!(window.entries(ioba, count), None, "{ioba:#x}, {count}");
        }
        assert_eq!(window.entries(u64::MAX, 1), None);
        assert_eq!(window.entries(0x1f_0000, 1 << 48), None);
    }

    #[test]
    fn a_window_of_all_addresses_is_a_window() {
        let window = Window::new(1, 0, 64, 12).unwrap();
        assert_eq!(window.range, IovaRange::ALL);
        assert_eq!(window.entries(0, 1 << 52), Some(IovaRange::ALL));
        assert_eq!(window.entries(u64::MAX, 1), range(u64::MAX - 0xfff, u64::MAX));
        assert_eq!(window.entries(u64::MAX, 2), None);
    }

    #[test]
    fn new_when_the_window_wraps_or_is_no_whole_pages_is_none() {
        assert_eq!(Window::new(1, 0x1000, 64, 12), None);
        assert_eq!(Window::new(1, 1 << 63, 64, 12), None);
        assert!(Window::new(1, 1 << 63, 63, 12).is_some());
        assert_eq!(Window::new(1, 0x1000, 16, 16), None);
        assert_eq!(Window::new(1, 0, 12, 16), None);
        assert_eq!(Window::new(1, 0, 65, 12), None);
        assert_eq!(Window::new(1, 0, 20, 11), None);
    }
}
