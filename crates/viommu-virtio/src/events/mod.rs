//! Fault reports: from the accesses that fault to the driver's event queue.

mod queue;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use viommu::reader::FaultSink;
use viommu::{Access, EndpointId, FaultReason};
use zerocopy::little_endian::{U32, U64};

use crate::metrics::{Counters, bump};
use crate::spec::event::{self, FaultFlags};
use crate::sync::{self, Mutex};
use viommu::rate::Bucket;

pub use queue::EventQueue;

/// How many fault reports are kept and made. A guest's device can fault as often as it likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventLimits {
    /// Reports that wait for buffers of the driver, at most. What comes later is counted and lost.
    pub pending: usize,
    /// Of these, at most so many by one endpoint, so that one that faults all the time leaves room for the others.
    pub per_endpoint: usize,
    /// Reports that one endpoint may cause in a second, in the long run.
    pub per_second: u32,
}

impl Default for EventLimits {
    fn default() -> Self {
        Self { pending: 256, per_endpoint: 64, per_second: 1000 }
    }
}

/// Faults that are remembered.
const RECENT: usize = 16;

/// A fault, and when it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecentFault {
    /// When.
    pub at: Instant,
    /// What.
    pub fault: viommu::Fault,
}

type Notifier = Arc<dyn Fn() + Send + Sync>;

/// Collects faults on the threads of the devices; takes no lock but its own.
pub(crate) struct Faults {
    limits: EventLimits,
    counters: Arc<Counters>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    pending: VecDeque<event::Fault>,
    /// By endpoint: how many of `pending`, and how many more it may cause. Endpoints that are there, only.
    endpoints: BTreeMap<u32, (usize, Bucket)>,
    notifier: Option<Notifier>,
    /// The last ones, oldest first, whether they are reported or not.
    recent: VecDeque<RecentFault>,
}

impl Faults {
    pub(crate) fn new(limits: EventLimits, counters: Arc<Counters>) -> Self {
        Self { limits, counters, state: Mutex::default() }
    }

    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut sync::lock(&self.state))
    }

    pub(crate) fn add_endpoint(&self, id: u32) {
        let burst = u32::try_from(self.limits.per_endpoint).unwrap_or(u32::MAX);
        let bucket = Bucket::new(self.limits.per_second, burst);
        self.with(|state| state.endpoints.insert(id, (0, bucket)));
    }

    /// Its reports that wait are lost: the driver is to hear of endpoints that exist (the specification's "valid
    /// endpoint").
    pub(crate) fn remove_endpoint(&self, id: u32) {
        self.with(|state| {
            state.endpoints.remove(&id);
            state.pending.retain(|fault| fault.endpoint.get() != id);
        });
    }

    /// Who is told, on a device's thread, that there is something to report now.
    pub(crate) fn notify(&self, notifier: Notifier) {
        self.with(|state| state.notifier = Some(notifier));
    }

    pub(crate) fn len(&self) -> usize {
        self.with(|state| state.pending.len())
    }

    pub(crate) fn clear(&self) {
        self.with(|state| {
            state.pending.clear();
            state.endpoints.values_mut().for_each(|(waiting, _)| *waiting = 0);
        });
    }

    /// Takes the first report, for the driver.
    fn take(&self) -> Option<event::Fault> {
        self.with(|state| {
            let fault = state.pending.pop_front()?;
            if let Some((waiting, _)) = state.endpoints.get_mut(&fault.endpoint.get()) {
                *waiting = waiting.saturating_sub(1);
            }
            Some(fault)
        })
    }

    /// The driver had no buffer for it: it is the first again, unless its endpoint has gone meanwhile.
    fn put_back(&self, fault: event::Fault) {
        self.with(|state| {
            if let Some((waiting, _)) = state.endpoints.get_mut(&fault.endpoint.get()) {
                *waiting = waiting.saturating_add(1);
                state.pending.push_front(fault);
            }
        });
    }

    pub(crate) fn save(&self) -> Vec<event::Fault> {
        self.with(|state| state.pending.iter().copied().collect())
    }

    /// Keeps what fits of saved reports.
    pub(crate) fn restore(&self, saved: impl IntoIterator<Item = event::Fault>) {
        saved.into_iter().for_each(|fault| self.push(fault));
    }

    fn push(&self, fault: event::Fault) {
        let notifier = self.with(|state| {
            let full = state.pending.len() >= self.limits.pending;
            let (waiting, _) = state.endpoints.get_mut(&fault.endpoint.get())?;
            if full || *waiting >= self.limits.per_endpoint {
                bump(&self.counters.events_full);
                return None;
            }
            *waiting = waiting.saturating_add(1);
            let was_empty = state.pending.is_empty();
            state.pending.push_back(fault);
            state.notifier.clone().filter(|_| was_empty)
        });
        // Without the lock: it may take the fault at once.
        if let Some(notifier) = notifier {
            notifier();
        }
    }

    /// Remembers a fault; gives whether its endpoint may have it reported.
    fn note(&self, fault: &viommu::Fault) -> bool {
        let at = Instant::now();
        self.with(|state| {
            if state.recent.len() >= RECENT {
                state.recent.pop_front();
            }
            state.recent.push_back(RecentFault { at, fault: *fault });
            let endpoint = fault.endpoint.and_then(|id| state.endpoints.get_mut(&id.requester));
            endpoint.is_some_and(|(_, bucket)| bucket.take(at))
        })
    }

    pub(crate) fn recent(&self) -> Vec<RecentFault> {
        self.with(|state| state.recent.iter().copied().collect())
    }
}

impl FaultSink for Faults {
    fn fault(&self, fault: &viommu::Fault) {
        let reason = match fault.reason {
            FaultReason::Blocked => event::DOMAIN,
            FaultReason::Unmapped | FaultReason::Permission | FaultReason::Reserved => event::MAPPING,
            _ => event::UNKNOWN,
        };
        if let Some(counter) = self.counters.faults.get(usize::from(reason)) {
            bump(counter);
        }
        let may_report = self.note(fault);
        let Some(EndpointId { requester, .. }) = fault.endpoint else { return };
        if !may_report {
            bump(&self.counters.events_limited);
            return;
        }
        let mut flags = FaultFlags::ADDRESS;
        flags.set(FaultFlags::READ, fault.access.contains(Access::READ));
        flags.set(FaultFlags::WRITE, fault.access.contains(Access::WRITE));
        crate::log::fault(fault);
        self.push(event::Fault {
            reason,
            flags: U32::new(flags.bits()),
            endpoint: U32::new(requester),
            address: U64::new(fault.iova.0),
            ..event::Fault::default()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use viommu::Iova;

    fn faults(limits: EventLimits) -> (Faults, Arc<Counters>) {
        let counters = Arc::new(Counters::default());
        let faults = Faults::new(limits, counters.clone());
        faults.add_endpoint(8);
        faults.add_endpoint(9);
        (faults, counters)
    }

    fn fault(endpoint: u32, iova: u64, reason: FaultReason) -> viommu::Fault {
        viommu::Fault {
            endpoint: Some(EndpointId::new(endpoint)),
            iova: Iova(iova),
            access: Access::WRITE,
            reason,
        }
    }

    #[test]
    fn fault_when_one_endpoint_floods_leaves_room_for_another() {
        let limits = EventLimits { pending: 4, per_endpoint: 3, per_second: 0 };
        let (faults, counters) = faults(limits);
        for at in 0..10 {
            faults.fault(&fault(8, at, FaultReason::Unmapped));
        }
        faults.fault(&fault(9, 77, FaultReason::Blocked));
        let kept = faults.save();
        assert_eq!(kept.len(), 4);
        assert_eq!((kept[3].endpoint.get(), kept[3].address.get(), kept[3].reason), (9, 77, event::DOMAIN));
        let metrics = counters.snapshot(faults.len());
        assert_eq!((metrics.faults_mapping, metrics.faults_domain, metrics.events_dropped_rate), (10, 1, 7));
    }

    #[test]
    fn fault_when_nobody_takes_reports_is_bounded_and_counted() {
        let limits = EventLimits { pending: 2, per_endpoint: 64, per_second: 1000 };
        let (faults, counters) = faults(limits);
        (0..5).for_each(|at| faults.fault(&fault(8, at, FaultReason::Permission)));
        assert_eq!(faults.len(), 2);
        assert_eq!(counters.snapshot(2).events_dropped_full, 3);
    }

    #[test]
    fn fault_when_the_queue_was_empty_notifies_once() {
        let (faults, _) = faults(EventLimits::default());
        let told = Arc::new(AtomicUsize::new(0));
        let count = told.clone();
        faults.notify(Arc::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        (0..3).for_each(|at| faults.fault(&fault(8, at, FaultReason::Unmapped)));
        assert_eq!(told.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn recent_when_there_are_many_has_the_last_ones_reported_or_not() {
        let (faults, counters) =
            faults(EventLimits { per_second: 0, per_endpoint: 1, ..EventLimits::default() });
        assert!(faults.recent().is_empty());
        (0..20).for_each(|at| faults.fault(&fault(8, at, FaultReason::Unmapped)));
        let recent = faults.recent();
        assert!(recent.is_sorted_by_key(|fault| fault.at));
        let iovas: Vec<u64> = recent.iter().map(|fault| fault.fault.iova.0).collect();
        assert_eq!(iovas, (4..20).collect::<Vec<_>>());
        assert_eq!(counters.snapshot(0).events_dropped_rate, 19);
    }

    #[test]
    fn remove_endpoint_when_it_has_reports_forgets_them() {
        let (faults, _) = faults(EventLimits::default());
        faults.fault(&fault(8, 1, FaultReason::Unmapped));
        faults.fault(&fault(9, 2, FaultReason::Unmapped));
        faults.remove_endpoint(8);
        faults.fault(&fault(8, 3, FaultReason::Unmapped));
        assert_eq!(faults.save().iter().map(|f| f.endpoint.get()).collect::<Vec<_>>(), [9]);
    }
}
