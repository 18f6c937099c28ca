//! Dirty pages: which were written since they were last asked for.

use std::collections::BTreeSet;

use viommu::Access;

use super::container::{Container, Release};
use crate::errno::Errno;

/// Pages that one dirty bitmap can have at most.
pub const MAX_DIRTY_BITMAP_PAGES: u64 = i32::MAX as u64;
/// The largest dirty bitmap, in bytes: 256 MiB.
pub const MAX_DIRTY_BITMAP_BYTES: u64 = MAX_DIRTY_BITMAP_PAGES.div_ceil(64) * 8;

/// Which pages are reported dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DirtyScope {
    /// All pages of every mapping, each time: an ordinary device, which cannot tell.
    #[default]
    AllPages,
    /// Those told to [`Container::device_wrote`] and no others: devices that pin what they use (mediated ones).
    Written,
}

/// The pages of one mapping that were written, by number from its first one.
#[derive(Clone, Debug, Default)]
pub(super) struct Tracked(BTreeSet<u64>);

/// The caller's dirty bitmap: page n of the range is bit n % 64 of word n / 64.
///
/// As the kernel does, the words that a mapping in the range touches are written (bits of earlier pages kept), and no
/// others: zero them first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Bytes a bit; only the container's smallest page is taken.
    pub pgsize: u64,
    /// The bits.
    pub words: Vec<u64>,
}

impl Bitmap {
    /// Zeros, a bit for each page of `pgsize` bytes (a power of two) in `size` bytes.
    ///
    /// # Errors
    /// EINVAL for no page, more than [`MAX_DIRTY_BITMAP_PAGES`], or a page size that is no power of two.
    pub fn new(pgsize: u64, size: u64) -> Result<Self, Errno> {
        if !pgsize.is_power_of_two() {
            return Err(Errno::EINVAL);
        }
        let pages = size / pgsize;
        if pages == 0 || pages > MAX_DIRTY_BITMAP_PAGES {
            return Err(Errno::EINVAL);
        }
        let words = usize::try_from(pages.div_ceil(64)).map_err(|_| Errno::EINVAL)?;
        Ok(Self { pgsize, words: vec![0; words] })
    }

    /// Whether the bit of page `page` is set; pages past the end are clean.
    #[must_use]
    pub fn is_dirty(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok().and_then(|n| self.words.get(n));
        word.is_some_and(|w| w >> (page % 64) & 1 != 0)
    }

    /// The numbers of the dirty pages, ascending.
    pub fn dirty(&self) -> impl Iterator<Item = u64> + '_ {
        let bits = |(n, &word): (usize, &u64)| {
            let set = (0..64).filter(move |bit| word >> bit & 1 != 0);
            set.map(move |bit| n as u64 * 64 + bit)
        };
        self.words.iter().enumerate().flat_map(bits)
    }

    /// Whether it has a bit for each page of `size` bytes, and not too many.
    pub(super) fn holds(&self, size: u64) -> bool {
        let words = self.words.len() as u64;
        let pages = size.checked_shr(self.pgsize.trailing_zeros()).unwrap_or(0);
        let fits = words <= MAX_DIRTY_BITMAP_BYTES / 8 && pages.div_ceil(64) <= words;
        self.pgsize.is_power_of_two() && pages != 0 && fits
    }

    /// Sets the bits of `pages` pages from `first` on where `dirty` says so, and clears the rest of the last word.
    fn put(&mut self, first: u64, pages: u64, dirty: impl Fn(u64) -> bool) {
        let index = |page: u64| usize::try_from(page / 64).unwrap_or(usize::MAX);
        let (Some(end), true) = (first.checked_add(pages), pages != 0) else { return };
        let (from, to) = (index(first), index(end - 1));
        let Some(words) = self.words.get_mut(from..=to) else { return };
        for (n, word) in words.iter_mut().enumerate() {
            let base = first / 64 * 64 + n as u64 * 64;
            if n == 0 {
                *word &= (1 << (first % 64)) - 1;
            } else {
                *word = 0;
            }
            for bit in 0..64 {
                let page = base + bit;
                if (first..end).contains(&page) && dirty(page - first) {
                    *word |= 1 << bit;
                }
            }
        }
    }
}

impl Container {
    /// `DIRTY_PAGES` with START. Once more changes nothing.
    ///
    /// # Errors
    /// EBADFD detached; EINVAL where a mapping has more pages than a bitmap can have.
    pub fn dirty_start(&mut self) -> Result<(), Errno> {
        self.attached()?;
        if !self.entries.values().all(|e| self.fits_a_bitmap(e.size)) {
            return Err(Errno::EINVAL);
        }
        self.tracking = true;
        Ok(())
    }

    /// `DIRTY_PAGES` with STOP: forgets what is dirty.
    ///
    /// # Errors
    /// EBADFD detached.
    pub fn dirty_stop(&mut self) -> Result<(), Errno> {
        self.attached()?;
        self.tracking = false;
        self.entries.values_mut().for_each(|e| e.written.0.clear());
        Ok(())
    }

    /// `DIRTY_PAGES` with GET_BITMAP: the dirty pages of the mappings in `size` bytes from `iova` on, which are clean
    /// afterwards.
    ///
    /// # Errors
    /// EBADFD detached; EINVAL tracking off, alignment, size 0 or a range that ends past 2^64-2, a bitmap that does not
    /// fit, another page size than the smallest, a mapping that sticks out of the range.
    pub fn dirty_bitmap(&mut self, iova: u64, size: u64, bitmap: &mut Bitmap) -> Result<(), Errno> {
        self.attached()?;
        self.check_wrap(iova, size)?;
        let last = self.checked_last(iova, size)?;
        let ends = self.config().release != Release::Linux6_12 || iova.checked_add(size).is_some();
        let fits = ends && bitmap.holds(size) && bitmap.pgsize == self.pgsize();
        if !fits || !self.tracking || self.cuts(iova, last) {
            return Err(Errno::EINVAL);
        }
        self.report(iova, last, bitmap);
        self.entries.range_mut(iova..=last).for_each(|(_, e)| e.written.0.clear());
        Ok(())
    }

    /// Whether dirty pages are tracked.
    #[must_use]
    pub fn is_tracking(&self) -> bool {
        self.tracking
    }

    /// The device has written `bytes` bytes at `iova`. Says whether it could: all of it mapped and writable. Pages up
    /// to the first that is not are dirty in either case.
    pub fn device_wrote(&mut self, iova: u64, bytes: u64) -> bool {
        let (page, tracking) = (self.pgsize(), self.tracking);
        let Some(last) = bytes.checked_sub(1).and_then(|more| iova.checked_add(more)) else {
            return bytes == 0;
        };
        let mut at = iova;
        loop {
            let entry = self.entries.range_mut(..=at).next_back().filter(|(s, e)| at <= e.last(**s));
            let Some((start, entry)) = entry.filter(|(_, e)| e.access.contains(Access::WRITE)) else {
                return false;
            };
            let end = entry.last(*start).min(last);
            if tracking {
                entry.written.0.extend((at - start) / page..=(end - start) / page);
            }
            match end.checked_add(1) {
                Some(next) if end < last => at = next,
                _ => return true,
            }
        }
    }

    pub(super) fn fits_a_bitmap(&self, size: u64) -> bool {
        size / self.pgsize() <= MAX_DIRTY_BITMAP_PAGES
    }

    /// Fills in the dirty pages of the mappings between `start` and `last`; none sticks out.
    pub(super) fn report(&self, start: u64, last: u64, bitmap: &mut Bitmap) {
        let page = self.pgsize();
        let all = self.config().dirty == DirtyScope::AllPages;
        for (&at, entry) in self.entries.range(start..=last) {
            let (first, pages) = ((at - start) / page, entry.size / page);
            bitmap.put(first, pages, |n| all || entry.written.0.contains(&n));
        }
    }
}
