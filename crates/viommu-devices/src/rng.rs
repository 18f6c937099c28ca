//! virtio-rng: the system's random bytes.

use core::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;

use crate::chain::{Layout, Places};
use crate::ring::{self, Processed, QueueError, Verdict};

/// Bytes that one request gets at most; a driver asks again for more.
const REQUEST_BYTES: u64 = 4096;

/// What a device has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RngMetrics {
    /// Requests that got random bytes.
    pub requests: u64,
    /// The bytes.
    pub bytes: u64,
    /// Requests given back with none: they are no chain, or have no memory that can be written.
    pub unanswered: u64,
    /// Times that the system had no random bytes.
    pub errors: u64,
}

/// An entropy device, with one queue. It has no feature bits and no configuration space.
#[derive(Debug, Default)]
pub struct Rng {
    requests: AtomicU64,
    bytes: AtomicU64,
    unanswered: AtomicU64,
    errors: AtomicU64,
}

struct Job {
    head: u16,
    layout: Layout,
    data: Range<usize>,
}

impl Rng {
    /// The type number of the entropy device.
    pub const DEVICE_TYPE: u16 = 4;

    /// A device that has done nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Queues.
    #[must_use]
    pub fn queues(&self) -> u16 {
        1
    }

    /// The device's feature bits: none.
    #[must_use]
    pub fn features(&self) -> u64 {
        0
    }

    /// The configuration space: empty.
    #[must_use]
    pub fn config(&self) -> &[u8] {
        &[]
    }

    /// Takes buffers from the ring, at most 64, and gives them back with random bytes: 4096 at most in each. A guard on
    /// `memory` is held twice, to take and to answer, and not in between.
    ///
    /// # Errors
    /// See [`QueueError`]. Some buffers may not be given back.
    pub fn process<S: GuestAddressSpace>(
        &self,
        queue: &mut Queue,
        memory: &S,
    ) -> Result<Processed, QueueError> {
        let (mut places, mut jobs, mut used) = (Places::default(), Vec::new(), 0_usize);
        let more = {
            let guard = memory.memory();
            let memory = &*guard;
            ring::begin(queue, memory)?;
            let longest = usize::from(queue.size());
            ring::take(queue, memory, |chain| {
                let head = chain.head_index();
                let layout = places.take(chain, longest).unwrap_or_default();
                let bytes = usize::try_from(layout.writable_bytes.min(REQUEST_BYTES)).unwrap_or(0);
                let data = used..used.saturating_add(bytes);
                used = data.end;
                jobs.push(Job { head, layout, data });
                if places.looked_at() >= ring::DESCRIPTORS { Verdict::Last } else { Verdict::Taken }
            })?
        };
        let mut data = vec![0; used];
        let filled = getrandom::fill(&mut data).is_ok();
        if !filled {
            self.errors.fetch_add(1, Ordering::Relaxed);
        }
        let guard = memory.memory();
        let memory = &*guard;
        let answers = jobs.iter().map(|job| {
            let bytes = data.get(job.data.clone()).unwrap_or_default();
            let written = filled && !bytes.is_empty() && places.write(memory, &job.layout.writable, 0, bytes);
            if !written {
                self.unanswered.fetch_add(1, Ordering::Relaxed);
                return (job.head, 0);
            }
            self.requests.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(u64::try_from(bytes.len()).unwrap_or(0), Ordering::Relaxed);
            (job.head, u32::try_from(bytes.len()).unwrap_or(0))
        });
        ring::give(queue, memory, answers, more)
    }

    /// What the device has done.
    #[must_use]
    pub fn metrics(&self) -> RngMetrics {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RngMetrics {
            requests: load(&self.requests),
            bytes: load(&self.bytes),
            unanswered: load(&self.unanswered),
            errors: load(&self.errors),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{AVAIL, Driver, PAGE, Piece};

    fn rig() -> (Rng, Driver) {
        (Rng::new(), Driver::new(1 << 20, 16))
    }

    #[test]
    fn buffer_when_it_can_be_written_is_filled() {
        let (rng, mut driver) = rig();
        let request = driver.request(&[], 300, &[1, 100], false);
        let again = driver.request(&[], 300, &[], true);
        let processed = rng.process(&mut driver.queue, &driver.space).unwrap();
        assert_eq!((processed.requests, processed.interrupt, processed.more), (2, true, false));
        assert_eq!(driver.used(), [(u32::from(request.head), 300), (u32::from(again.head), 300)]);
        let (first, second) = (driver.answer(&request), driver.answer(&again));
        // Both repeat with 2^-2400, and 300 bytes have one value each with less.
        assert_ne!(first, second);
        assert!(first.iter().any(|byte| *byte != first[0]));
        assert_eq!(rng.metrics(), RngMetrics { requests: 2, bytes: 600, ..RngMetrics::default() });
    }

    #[test]
    fn buffer_when_it_is_large_is_filled_in_part() {
        let (rng, mut driver) = rig();
        let request = driver.request(&[], 8192, &[], false);
        rng.process(&mut driver.queue, &driver.space).unwrap();
        assert_eq!(driver.used()[0].1, 4096);
        assert_eq!(driver.answer(&request)[4096..], [0xaa; 4096]);
    }

    #[test]
    fn buffer_when_it_cannot_be_written_is_given_back_empty() {
        let (rng, mut driver) = rig();
        let vanishing = driver.room(64, PAGE);
        for piece in [
            Piece { at: driver.room(16, 1), len: 16, write: false },
            Piece { at: driver.room(16, 1), len: 0, write: true },
            Piece { at: 1 << 30, len: 16, write: true },
            Piece { at: u64::MAX - 4, len: 16, write: true },
            Piece { at: vanishing, len: 64, write: true },
        ] {
            driver.offer(&[piece]);
        }
        driver.space.vanish(vanishing, 1);
        rng.process(&mut driver.queue, &driver.space).unwrap();
        assert_eq!(driver.used().iter().map(|used| used.1).collect::<Vec<_>>(), [0; 5]);
        assert_eq!(rng.metrics(), RngMetrics { unanswered: 5, ..RngMetrics::default() });
    }

    #[test]
    fn ring_when_it_is_broken_is_an_error() {
        let (rng, mut driver) = rig();
        driver.write(AVAIL + 2, &17_u16.to_le_bytes());
        assert!(rng.process(&mut driver.queue, &driver.space).is_err());
    }
}
