//! What the device has done, to be read at any time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::spec::request::{self, Status};

/// Requests that are counted apart: five kinds, and what is none of them.
const KINDS: usize = 6;
/// Statuses that the device gives.
const STATUSES: usize = 9;
/// Classes of time: less than 2^n nanoseconds, the last one open.
const CLASSES: usize = 32;

/// Counters, shared by all queues.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    requests: [[AtomicU64; STATUSES]; KINDS],
    malformed: AtomicU64,
    request_times: Times,
    unmap_times: Times,
    pub(crate) faults: [AtomicU64; 3],
    pub(crate) events_sent: AtomicU64,
    pub(crate) events_full: AtomicU64,
    pub(crate) events_limited: AtomicU64,
    pub(crate) small_buffers: AtomicU64,
}

/// How many took how long.
#[derive(Debug, Default)]
struct Times {
    classes: [AtomicU64; CLASSES],
    longest: AtomicU64,
}

impl Times {
    fn add(&self, count: u64, nanos: u64) {
        let class = usize::try_from(u64::BITS.saturating_sub(nanos.leading_zeros())).unwrap_or(CLASSES);
        if let Some(counter) = self.classes.get(class).or_else(|| self.classes.last()) {
            counter.fetch_add(count, Ordering::Relaxed);
        }
        // Looked at first: the line is written only by a new one.
        if nanos > self.longest.load(Ordering::Relaxed) {
            self.longest.fetch_max(nanos, Ordering::Relaxed);
        }
    }

    fn classes(&self) -> [u64; CLASSES] {
        self.classes.each_ref().map(|counter| counter.load(Ordering::Relaxed))
    }

    fn longest(&self) -> Duration {
        Duration::from_nanos(self.longest.load(Ordering::Relaxed))
    }
}

pub(crate) fn bump(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn answered(&self, kind: u8, status: Status) {
        let row = self.requests.get(usize::from(kind)).or_else(|| self.requests.first());
        if let Some(counter) = row.and_then(|row| row.get(usize::from(status.0))) {
            bump(counter);
        }
    }

    pub(crate) fn malformed(&self) {
        bump(&self.malformed);
    }

    /// So many requests, of which `unmaps` were UNMAPs, took `time`: from when the first of them was taken to when the
    /// driver could see their answers.
    pub(crate) fn gave_back(&self, requests: u64, unmaps: u64, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.request_times.add(requests, nanos);
        if unmaps > 0 {
            self.unmap_times.add(unmaps, nanos);
        }
    }

    pub(crate) fn snapshot(&self, events_pending: usize) -> Metrics {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let [unknown, domain, mapping] = &self.faults;
        Metrics {
            requests: self.requests.each_ref().map(|row| row.each_ref().map(load)),
            malformed: load(&self.malformed),
            request_times: self.request_times.classes(),
            request_longest: self.request_times.longest(),
            unmap_times: self.unmap_times.classes(),
            unmap_longest: self.unmap_times.longest(),
            faults_unknown: load(unknown),
            faults_domain: load(domain),
            faults_mapping: load(mapping),
            events_pending,
            events_sent: load(&self.events_sent),
            events_dropped_full: load(&self.events_full),
            events_dropped_rate: load(&self.events_limited),
            event_buffers_too_small: load(&self.small_buffers),
        }
    }
}

/// What the device has done since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metrics {
    /// Answers by number of request (0: a PROBE or another request of no known kind) and status. See [`Self::answers`].
    pub requests: [[u64; STATUSES]; KINDS],
    /// Requests that could not be read or answered: used length 0.
    pub malformed: u64,
    /// Requests by the time in which they were answered: from when [`RequestQueue::process`] began to take their batch
    /// to when the driver could see their answers. Class n is below 2^n nanoseconds, and the last one is open.
    ///
    /// [`RequestQueue::process`]: crate::RequestQueue::process
    pub request_times: [u64; CLASSES],
    /// The longest such time.
    pub request_longest: Duration,
    /// UNMAPs by the time until their answer: class n is below 2^n nanoseconds.
    pub unmap_times: [u64; CLASSES],
    /// The longest such time.
    pub unmap_longest: Duration,
    /// Accesses that faulted for a reason of the host's: no memory there, or a device that was cut off.
    pub faults_unknown: u64,
    /// Accesses of endpoints that are attached to nothing.
    pub faults_domain: u64,
    /// Accesses to what is not mapped so.
    pub faults_mapping: u64,
    /// Fault reports that wait for a buffer.
    pub events_pending: usize,
    /// Fault reports given to the driver.
    pub events_sent: u64,
    /// Fault reports lost since too many waited already.
    pub events_dropped_full: u64,
    /// Fault reports lost since the endpoint faults too often.
    pub events_dropped_rate: u64,
    /// Buffers of the event queue that were too small for a report.
    pub event_buffers_too_small: u64,
}

impl Metrics {
    /// Answers to requests of that number with that status.
    #[must_use]
    pub fn answers(&self, kind: u8, status: Status) -> u64 {
        let row = self.requests.get(usize::from(kind));
        row.and_then(|row| row.get(usize::from(status.0))).copied().unwrap_or(0)
    }

    /// UNMAPs answered.
    #[must_use]
    pub fn unmaps(&self) -> u64 {
        self.requests.get(usize::from(request::UNMAP)).map_or(0, |row| row.iter().sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gave_back_when_times_differ_counts_each_in_its_class() {
        let counters = Counters::default();
        counters.gave_back(7, 2, Duration::ZERO);
        counters.gave_back(1, 1, Duration::from_nanos(1023));
        counters.gave_back(1, 1, Duration::from_nanos(1024));
        counters.gave_back(1, 1, Duration::from_secs(100));
        let metrics = counters.snapshot(0);
        assert_eq!(metrics.unmap_times.iter().sum::<u64>(), 5);
        assert_eq!((metrics.unmap_times[0], metrics.unmap_times[10], metrics.unmap_times[11]), (2, 1, 1));
        assert_eq!(metrics.unmap_times[31], 1);
        assert_eq!((metrics.request_times[0], metrics.request_times.iter().sum::<u64>()), (7, 10));
        assert_eq!(metrics.unmap_longest, Duration::from_secs(100));
        counters.gave_back(1, 0, Duration::from_secs(101));
        let metrics = counters.snapshot(0);
        assert_eq!((metrics.unmap_longest.as_secs(), metrics.request_longest.as_secs()), (100, 101));
    }

    #[test]
    fn answered_when_numbers_are_unknown_counts_nothing_elsewhere() {
        let counters = Counters::default();
        counters.answered(request::MAP, Status::NOMEM);
        counters.answered(request::MAP, Status(77));
        let metrics = counters.snapshot(0);
        assert_eq!(metrics.answers(request::MAP, Status::NOMEM), 1);
        assert_eq!(metrics.requests.iter().flatten().sum::<u64>(), 1);
    }
}
