//! What has been done, to be read at any time.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::spec::{self, Code};

/// The hypercalls, in the order in which [`Metrics::calls`] counts them.
pub(crate) const CALLS: [u64; 4] =
    [spec::H_GET_TCE, spec::H_PUT_TCE, spec::H_STUFF_TCE, spec::H_PUT_TCE_INDIRECT];

/// Counters, shared by all buses.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    calls: [[AtomicU64; Code::ALL.len()]; CALLS.len()],
    pub(crate) mapped: AtomicU64,
    pub(crate) replaced: AtomicU64,
    pub(crate) cleared: AtomicU64,
    pub(crate) unchanged: AtomicU64,
    pub(crate) lost: AtomicU64,
    pub(crate) resets: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(u64::try_from(count).unwrap_or(u64::MAX), Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn answered(&self, number: u64, code: Code) {
        let row = CALLS.iter().position(|call| *call == number).and_then(|at| self.calls.get(at));
        let column = Code::ALL.iter().position(|known| *known == code);
        if let Some(counter) = row.zip(column).and_then(|(row, column)| row.get(column)) {
            add(counter, 1);
        }
    }

    pub(crate) fn snapshot(&self) -> Metrics {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Metrics {
            calls: self.calls.each_ref().map(|row| row.each_ref().map(load)),
            mapped: load(&self.mapped),
            replaced: load(&self.replaced),
            cleared: load(&self.cleared),
            unchanged: load(&self.unchanged),
            lost: load(&self.lost),
            resets: load(&self.resets),
        }
    }
}

/// What has been done since the model was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metrics {
    /// Answers by hypercall and code: see [`Metrics::answers`].
    pub calls: [[u64; Code::ALL.len()]; CALLS.len()],
    /// Entries that came where none was.
    pub mapped: u64,
    /// Live entries that were changed in place.
    pub replaced: u64,
    /// Live entries that went as their guest asked, one or many at a time.
    pub cleared: u64,
    /// Live entries written again as they were.
    pub unchanged: u64,
    /// Entries, changed in place or new, that their call left empty since somebody refused the new ones.
    pub lost: u64,
    /// Resets of a bus.
    pub resets: u64,
}

impl Metrics {
    /// Answers to the hypercall of that number with that code.
    #[must_use]
    pub fn answers(&self, number: u64, code: Code) -> u64 {
        let row = CALLS.iter().position(|call| *call == number).and_then(|at| self.calls.get(at));
        let column = Code::ALL.iter().position(|known| *known == code);
        row.zip(column).and_then(|(row, column)| row.get(column)).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answered_when_the_call_is_known_counts_it_alone() {
        let counters = Counters::default();
        counters.answered(spec::H_PUT_TCE, Code::Resource);
        counters.answered(0x999, Code::Success);
        let metrics = counters.snapshot();
        assert_eq!(metrics.answers(spec::H_PUT_TCE, Code::Resource), 1);
        assert_eq!(metrics.calls.iter().flatten().sum::<u64>(), 1);
    }
}
