//! How long things took: a histogram that any thread may read.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::snapshot::Histogram;

/// Classes: class n is below 2^n nanoseconds, the last one has all the rest.
const CLASSES: usize = 40;

/// Durations, counted by class.
#[derive(Debug)]
pub(crate) struct Times {
    classes: [AtomicU64; CLASSES],
    longest: AtomicU64,
}

impl Default for Times {
    fn default() -> Self {
        let classes = core::array::from_fn(|_| AtomicU64::new(0));
        Self { classes, longest: AtomicU64::new(0) }
    }
}

impl Times {
    /// Counts one.
    pub(crate) fn add(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let class = usize::try_from(u64::BITS.saturating_sub(nanoseconds.leading_zeros())).unwrap_or(CLASSES);
        if let Some(count) = self.classes.get(class.min(CLASSES.saturating_sub(1))) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        self.longest.fetch_max(nanoseconds, Ordering::Relaxed);
    }

    /// All so far.
    pub(crate) fn histogram(&self) -> Histogram {
        let classes = self.classes.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        Histogram { classes, longest_ns: self.longest.load(Ordering::Relaxed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_when_added_are_counted_in_their_classes() {
        let times = Times::default();
        for nanoseconds in [0, 1, 1023, 1024, u64::MAX] {
            times.add(Duration::from_nanos(nanoseconds));
        }
        let Histogram { classes, longest_ns } = times.histogram();
        assert_eq!((classes[0], classes[1], classes[10], classes[11], classes[39]), (1, 1, 1, 1, 1));
        assert_eq!(longest_ns, u64::MAX);
    }
}
