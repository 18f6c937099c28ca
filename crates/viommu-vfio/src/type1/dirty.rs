//! Dirty pages of what is held, by guest physical address.

use viommu::{Access, Gpa, GpaRange, Mapping};

use crate::errno::Errno;
use crate::software::Bitmap;
use crate::type1::host::Piece;
use crate::type1::state::{Closed, State, pages_of};

impl State {
    pub(crate) fn track(&mut self, on: bool) -> Result<(), Errno> {
        let kernel = self.kernel.as_mut().map_err(|Closed| Errno::EBADF)?;
        if on && self.info.dirty.is_none() {
            return Err(Errno::EOPNOTSUPP);
        }
        kernel.track(on)?;
        self.tracking = on;
        if !on {
            self.untold.clear();
        }
        Ok(())
    }

    /// What was written since the last call, in ranges that ascend and do not touch.
    pub(crate) fn dirty(&mut self) -> Result<Vec<GpaRange>, Errno> {
        let State { kernel, held, untold, info, tracking, .. } = self;
        let kernel = kernel.as_mut().map_err(|Closed| Errno::EBADF)?;
        let page = info.dirty.filter(|_| *tracking).ok_or(Errno::EINVAL)?.page_size;
        for held in held.values().filter(|held| held.mapping.access.contains(Access::WRITE)) {
            for piece in held.pieces() {
                let size = u64::try_from(piece.range.bytes()).map_err(|_| Errno::EINVAL)?;
                let mut bitmap = Bitmap::new(page, size)?;
                kernel.dirty(piece.range.start().0, size, &mut bitmap)?;
                untold.extend(written(&held.mapping, piece, pages_of(&bitmap, size), page));
                // Those read are clean now: they must not be lost if a later call fails. Kept small.
                if untold.len() > MERGE_AT {
                    merge(untold);
                }
            }
        }
        merge(untold);
        Ok(core::mem::take(untold))
    }
}

/// Ranges that are kept before they are merged.
const MERGE_AT: usize = 1 << 16;

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
