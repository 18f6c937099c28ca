//! What every structure can do, so that one loop measures them all.

use std::time::Duration;

/// A table of mappings from IOVA to guest physical addresses, read and write allowed.
pub(crate) trait Table: Sized {
    /// An empty one.
    ///
    /// # Errors
    /// What it needs is not on this machine.
    fn new() -> anyhow::Result<Self>;

    /// Maps `bytes` at `iova` to `gpa`; false when something is there.
    fn map(&mut self, iova: u64, bytes: u64, gpa: u64) -> bool;

    /// Removes what is mapped there, complete when it returns.
    fn unmap(&mut self, iova: u64, bytes: u64);

    /// Translates for a read; `None` where nothing is mapped.
    fn translate(&mut self, iova: u64) -> Option<u64>;

    /// Translates `count` addresses as a device's worker does; the number of those that are not mapped.
    fn lookups(&mut self, count: u64, mut next: impl FnMut() -> u64) -> u64 {
        let mut misses = 0;
        for _ in 0..count {
            misses += u64::from(std::hint::black_box(self.translate(next())).is_none());
        }
        misses
    }

    /// Tells a new consumer of every mapping: the CPU time and the mappings told. `None`: it has no way to.
    fn replay(&mut self) -> Option<(Duration, u64)>;
}
