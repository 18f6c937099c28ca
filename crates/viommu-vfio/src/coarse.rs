//! The dirty bitmap that one unmap of several mappings answers with.

use viommu::subscribe::DirtyBitmap;
use viommu::{Iova, IovaRange};

/// Bits of it; past that, a bit stands for more than one page.
const MAX_BITS: u64 = 1 << 24;

/// A dirty bitmap of bounded size over any range: where the range is wide, a bit stands for several pages.
pub(crate) struct Coarse(pub(crate) DirtyBitmap);

impl Coarse {
    /// Clean, over `hull`, for pages of `page` bytes.
    pub(crate) fn new(hull: IovaRange, page: u64) -> Self {
        let mut page_size = page;
        let bits = |page_size: u64| (hull.last().0 / page_size) - (hull.start().0 / page_size) + 1;
        while bits(page_size) > MAX_BITS {
            page_size <<= 1; // ends below 2^63: 24 bits are left above it
        }
        let start = Iova(hull.start().0 & !(page_size - 1));
        let words = usize::try_from(bits(page_size).div_ceil(64)).unwrap_or(0);
        Self(DirtyBitmap { start, page_size, words: vec![0; words] })
    }

    /// Marks the page at `iova`.
    pub(crate) fn set(&mut self, iova: u64) {
        let bit = iova.saturating_sub(self.0.start.0) / self.0.page_size;
        if let Some(word) = usize::try_from(bit / 64).ok().and_then(|n| self.0.words.get_mut(n)) {
            *word |= 1 << (bit % 64);
        }
    }
}
