//! The crate rangemap, without a lock: for one thread.

use std::time::Duration;

use rangemap::RangeMap;

use crate::peers::walk;
use crate::table::Table;

/// What is added to an address to translate it, by range.
pub(crate) struct Ranges(RangeMap<u64, u64>);

impl Table for Ranges {
    fn new() -> anyhow::Result<Self> {
        Ok(Self(RangeMap::new()))
    }

    fn map(&mut self, iova: u64, bytes: u64, gpa: u64) -> bool {
        let range = iova..iova + bytes;
        if self.0.overlaps(&range) {
            return false;
        }
        self.0.insert(range, gpa.wrapping_sub(iova));
        true
    }

    fn unmap(&mut self, iova: u64, bytes: u64) {
        self.0.remove(iova..iova + bytes);
    }

    #[inline]
    fn translate(&mut self, iova: u64) -> Option<u64> {
        self.0.get(&iova).map(|delta| iova.wrapping_add(*delta))
    }

    fn replay(&mut self) -> Option<(Duration, u64)> {
        Some(walk(|see| {
            for (range, delta) in self.0.iter() {
                see(range.start, range.end - range.start, range.start.wrapping_add(*delta));
            }
        }))
    }
}
