//! Dirty tracking: from bits by IOVA to guest physical addresses, those of mappings that are gone included.

use std::collections::BTreeMap;

use crate::addr::{Gpa, GpaRange, Iova, IovaRange};
use crate::mapping::{Access, Mapping};
use crate::subscribe::DirtyBitmap;

/// A set of guest physical addresses, as disjoint ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GpaSet(BTreeMap<u64, u64>);

impl GpaSet {
    pub(crate) fn insert(&mut self, range: GpaRange) {
        let (mut start, mut last) = (range.start().0, range.last().0);
        // Neighbours join, so that the set stays as small as memory is fragmented.
        while let Some((&s, &l)) = self.0.range(..=last.saturating_add(1)).next_back() {
            if l.saturating_add(1) < start {
                break;
            }
            (start, last) = (start.min(s), last.max(l));
            self.0.remove(&s);
        }
        self.0.insert(start, last);
    }

    pub(crate) fn ranges(&self) -> Vec<GpaRange> {
        self.0.iter().filter_map(|(s, l)| GpaRange::new(Gpa(*s), Gpa(*l))).collect()
    }
}

/// What devices wrote through mappings that have been removed since tracking began.
#[derive(Debug, Default)]
pub(crate) struct DirtyLog(pub(crate) GpaSet);

/// Notes what an unmap of `extents` (a subscriber's addresses) reported. Gives the pages reported.
///
/// Without a bitmap every writable extent counts as written: the host could not say that it was not.
pub(crate) fn note_dirty(
    log: &mut Option<DirtyLog>,
    extents: &[Mapping],
    bitmap: Option<&DirtyBitmap>,
) -> u64 {
    let Some(log) = log else { return 0 };
    let mut pages = 0;
    for extent in extents.iter().filter(|e| e.access.contains(Access::WRITE)) {
        match bitmap {
            Some(bitmap) => pages += mark(bitmap, extent, &mut log.0),
            None => {
                if let Some(range) = GpaRange::new(extent.gpa, extent.gpa_last()) {
                    log.0.insert(range);
                }
            }
        }
    }
    pages
}

/// Adds what `bitmap` says of `mapping` (both in the same addresses) to `set`. Gives the pages marked.
pub(crate) fn mark(bitmap: &DirtyBitmap, mapping: &Mapping, set: &mut GpaSet) -> u64 {
    let mut pages = 0;
    let page = u128::from(bitmap.page_size.max(1));
    for (at, word) in bitmap.words.iter().enumerate() {
        let mut word = *word;
        while word != 0 {
            let bit = word.trailing_zeros();
            word &= word.wrapping_sub(1);
            let start = u128::from(bitmap.start.0) + (at as u128 * 64 + u128::from(bit)) * page;
            let Ok(start) = u64::try_from(start) else { return pages };
            let Some(range) = IovaRange::from_len(Iova(start), bitmap.page_size) else { continue };
            let written = mapping.clip(range).and_then(|m| GpaRange::new(m.gpa, m.gpa_last()));
            if let Some(written) = written {
                set.insert(written);
                pages += 1;
            }
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpa(start: u64, last: u64) -> GpaRange {
        GpaRange::new(Gpa(start), Gpa(last)).unwrap()
    }

    #[test]
    fn insert_joins_neighbours_and_overlaps() {
        let mut set = GpaSet::default();
        for range in [gpa(0x1000, 0x1fff), gpa(0x3000, 0x3fff), gpa(0x2000, 0x2fff), gpa(0x3800, 0x4fff)] {
            set.insert(range);
        }
        assert_eq!(set.ranges(), [gpa(0x1000, 0x4fff)]);
        set.insert(gpa(0, u64::MAX));
        assert_eq!(set.ranges(), [GpaRange::ALL]);
    }

    #[test]
    fn mark_translates_each_bit_inside_the_mapping() {
        let mapping = Mapping::new(Iova(0x2000), 0x2000, Gpa(0x9000), Access::RW).unwrap();
        let bitmap = DirtyBitmap { start: Iova(0x1000), page_size: 0x1000, words: vec![0b1101] };
        let mut set = GpaSet::default();
        assert_eq!(mark(&bitmap, &mapping, &mut set), 1);
        assert_eq!(set.ranges(), [gpa(0xa000, 0xafff)]);
    }
}
