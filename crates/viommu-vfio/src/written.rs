//! Dirty pages of what a mirror holds, as guest physical addresses.

use viommu::{Gpa, GpaRange, Mapping};
use viommu_memory::mirror::Piece;

use crate::software::Bitmap;

/// Ranges that are kept before they are merged.
const MERGE_AT: usize = 1 << 16;

/// What was read, until it is told.
#[derive(Debug, Default)]
pub(crate) struct Written(Vec<GpaRange>);

impl Written {
    /// Adds the dirty pages of a piece, numbered from its first one. Those read are clean now: they must not be lost if a
    /// later call fails.
    pub(crate) fn add(
        &mut self,
        mapping: &Mapping,
        piece: Piece,
        dirty: impl Iterator<Item = u64>,
        page_size: u64,
    ) {
        self.0.extend(written(mapping, piece, dirty, page_size));
        if self.0.len() > MERGE_AT {
            merge(&mut self.0);
        }
    }

    /// Adds all of an extent.
    #[cfg(feature = "iommufd")]
    pub(crate) fn add_all(&mut self, mapping: &Mapping) {
        self.0.extend(GpaRange::new(mapping.gpa, mapping.gpa_last()));
    }

    /// Adds what another has read, which has nothing then.
    #[cfg(feature = "iommufd")]
    pub(crate) fn join(&mut self, other: &mut Self) {
        self.0.append(&mut other.0);
    }

    /// Forgets.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// All of it, in ranges that ascend and do not touch; nothing is left.
    pub(crate) fn take(&mut self) -> Vec<GpaRange> {
        merge(&mut self.0);
        core::mem::take(&mut self.0)
    }
}

/// The dirty pages of a mapping of `size` bytes. Linux leaves rubbish in the rest of the last word.
pub(crate) fn pages_of(bitmap: &Bitmap, size: u64) -> impl Iterator<Item = u64> + '_ {
    let pages = size / bitmap.pgsize;
    bitmap.dirty().take_while(move |page| *page < pages)
}

/// What the dirty pages of a piece are, in guest physical addresses: a range for each run of pages.
fn written(
    mapping: &Mapping,
    piece: Piece,
    dirty: impl Iterator<Item = u64>,
    page_size: u64,
) -> Vec<GpaRange> {
    let first = mapping.translate(piece.range.start());
    let mut runs: Vec<GpaRange> = Vec::new();
    for page in dirty {
        let start = Gpa(first.0.wrapping_add(page.wrapping_mul(page_size)));
        let Some(range) = GpaRange::from_len(start, page_size) else { continue };
        match runs.last_mut().filter(|run| run.next() == Some(start)) {
            Some(run) => *run = run.hull(range),
            None => runs.push(range),
        }
    }
    runs
}

/// Sorts, and joins what overlaps or touches.
fn merge(ranges: &mut Vec<GpaRange>) {
    ranges.sort_unstable();
    ranges.dedup_by(|next, before| {
        let joins = before.next().is_none_or(|end| next.start() <= end);
        if joins {
            *before = before.hull(*next);
        }
        joins
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merge_joins_what_overlaps_or_touches() {
        let range = |start, last| GpaRange::new(Gpa(start), Gpa(last)).unwrap();
        let mut ranges =
            vec![range(0x3000, 0x3fff), range(0, 0xfff), range(0x1000, 0x1fff), range(0, 0x17ff)];
        merge(&mut ranges);
        assert_eq!(ranges, [range(0, 0x1fff), range(0x3000, 0x3fff)]);
        let mut ranges = vec![range(0x1000, u64::MAX), range(u64::MAX - 7, u64::MAX), range(0, 0xfff)];
        merge(&mut ranges);
        assert_eq!(ranges, [GpaRange::ALL]);
    }
}
