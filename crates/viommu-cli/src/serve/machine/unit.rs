//! The record, and what guest memory all clients together have given.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use viommu::{Completion, Extent, Gpa, GpaRange, Iommu, Medium};
use viommu_vfio_user::memory::Window;
use viommu_virtio::viot::Bdf;

/// The record's backing as the clients' windows make it: there is memory where any of them gave some. What a device
/// reaches of it, is what came over its own socket. A handle.
#[derive(Clone)]
pub(crate) struct Unit {
    iommu: Iommu,
    books: Arc<Mutex<BTreeMap<(Bdf, u64), GpaRange>>>,
}

impl Unit {
    pub(crate) fn new(iommu: Iommu) -> Self {
        Self { iommu, books: Arc::default() }
    }

    pub(crate) fn iommu(&self) -> &Iommu {
        &self.iommu
    }

    /// The function at `of` has a window more: where nothing was, there is memory now.
    pub(crate) fn add(&self, of: Bdf, window: Window) {
        let Some(range) = range_of(window) else { return };
        let mut books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
        books.insert((of, window.address), range);
        let there: Vec<_> = self.iommu.backing().iter().map(|extent| extent.range).collect();
        let medium = if window.read_only { Medium::Rom } else { Medium::Ram };
        for gap in less(range, &there) {
            self.insert(gap, medium);
        }
    }

    /// The function at `of` has a window less: where nobody has one any more, the memory goes. Returns when nothing uses
    /// it. An extent that others have in part is away for a moment.
    pub(crate) fn remove(&self, of: Bdf, window: Window) {
        let mut done = Completion::ready();
        {
            let mut books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(range) = books.remove(&(of, window.address)) else { return };
            let held: Vec<_> = books.values().copied().collect();
            for Extent { range: extent, medium } in self.iommu.backing() {
                let lost = extent.overlaps(range) && !less(extent, &held).is_empty();
                if !lost {
                    continue;
                }
                match self.iommu.remove_backing(extent) {
                    Ok(completion) => done.merge(completion),
                    Err(error) => {
                        tracing::error!("memory at {extent} stays in the record: {error}");
                        done.merge(error.completion);
                    }
                }
                let gone = less(extent, &held);
                for kept in less(extent, &gone) {
                    self.insert(kept, medium);
                }
            }
        }
        wait(done, "memory that a client takes back");
    }

    fn insert(&self, range: GpaRange, medium: Medium) {
        match self.iommu.add_backing(Extent { range, medium }) {
            // A mirror that is to have it answers within the call.
            Ok(completion) => drop(completion),
            Err(error) => tracing::error!("no memory at {range}: {error}"),
        }
    }
}

/// Waits for what only devices in this process can hold up, each for the time of one batch: mirrors answer within their
/// calls.
pub(crate) fn wait(mut done: Completion, what: &str) {
    while let Err(error) = done.wait_timeout(std::time::Duration::from_secs(1)) {
        match error {
            viommu::WaitError::TimedOut(blockers) => {
                tracing::warn!("{what} is held up: {blockers:?}");
            }
            other => {
                tracing::error!("{what}: {other}");
                return;
            }
        }
    }
}

fn range_of(window: Window) -> Option<GpaRange> {
    GpaRange::from_len(Gpa(window.address), window.size).filter(|_| window.memory)
}

/// What of `range` none of `others` has: ascending.
fn less(range: GpaRange, others: &[GpaRange]) -> Vec<GpaRange> {
    let mut met: Vec<_> = others.iter().filter(|other| other.overlaps(range)).collect();
    met.sort_by_key(|other| other.start());
    let mut rest = Vec::new();
    let mut from = range.start();
    for other in met {
        if let Some(before) = other.start().0.checked_sub(1) {
            rest.extend(GpaRange::new(from, Gpa(before)));
        }
        match other.last().0.checked_add(1) {
            Some(next) => from = from.max(Gpa(next)),
            None => return rest,
        }
    }
    rest.extend(GpaRange::new(from, range.last()));
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> GpaRange {
        GpaRange::new(Gpa(start), Gpa(last)).unwrap()
    }

    fn window(address: u64, size: u64) -> Window {
        Window { address, size, memory: true, read_only: false }
    }

    fn unit() -> Unit {
        Unit::new(Iommu::builder().build().unwrap())
    }

    fn there(unit: &Unit) -> Vec<GpaRange> {
        unit.iommu().backing().iter().map(|extent| extent.range).collect()
    }

    const A: Bdf = Bdf(8);
    const B: Bdf = Bdf(16);

    #[test]
    fn less_when_others_overlap_gives_the_gaps() {
        let gaps =
            less(range(0x1000, 0x8fff), &[range(0x4000, 0x4fff), range(0, 0x1fff), range(0x8000, 0x9fff)]);
        assert_eq!(gaps, [range(0x2000, 0x3fff), range(0x5000, 0x7fff)]);
        assert_eq!(less(range(0, 5), &[range(0, u64::MAX)]), []);
        assert_eq!(less(range(3, u64::MAX), &[]), [range(3, u64::MAX)]);
    }

    #[test]
    fn memory_of_two_clients_is_there_until_both_have_taken_it_back() {
        let unit = unit();
        unit.add(A, window(0, 0x4000));
        unit.add(B, window(0, 0x4000));
        assert_eq!(there(&unit), [range(0, 0x3fff)]);
        unit.remove(A, window(0, 0x4000));
        assert_eq!(there(&unit), [range(0, 0x3fff)]);
        unit.remove(B, window(0, 0x4000));
        assert_eq!(there(&unit), []);
    }

    #[test]
    fn windows_that_differ_leave_what_the_other_has() {
        let unit = unit();
        unit.add(A, window(0, 0x4000));
        unit.add(B, window(0x2000, 0x4000));
        assert_eq!(there(&unit), [range(0, 0x3fff), range(0x4000, 0x5fff)]);
        unit.remove(A, window(0, 0x4000));
        assert_eq!(there(&unit), [range(0x2000, 0x3fff), range(0x4000, 0x5fff)]);
        unit.remove(B, window(0x2000, 0x4000));
        assert_eq!(there(&unit), []);
    }

    #[test]
    fn windows_that_may_only_be_read_are_read_only_memory() {
        let unit = unit();
        let rom = Window { read_only: true, ..window(0, 0x4000) };
        unit.add(A, rom);
        unit.add(B, window(0x2000, 0x4000));
        let media =
            |unit: &Unit| -> Vec<_> { unit.iommu().backing().iter().map(|e| (e.range, e.medium)).collect() };
        let ram = (range(0x4000, 0x5fff), Medium::Ram);
        assert_eq!(media(&unit), [(range(0, 0x3fff), Medium::Rom), ram]);
        unit.remove(A, rom);
        assert_eq!(media(&unit), [(range(0x2000, 0x3fff), Medium::Rom), ram]);
    }

    #[test]
    fn windows_without_memory_are_none() {
        let unit = unit();
        let rom = Window { memory: false, ..window(0, 0x1000) };
        unit.add(A, rom);
        assert_eq!(there(&unit), []);
        unit.remove(A, rom);
    }
}
