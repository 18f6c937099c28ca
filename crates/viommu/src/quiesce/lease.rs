//! Leases: uses of a translation that outlive a batch (io_uring, posted receive buffers).

use core::task::Waker;
use std::collections::BTreeMap;

use crate::addr::IovaRange;
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering, lock};

/// The leases of one address space.
#[derive(Default)]
pub(crate) struct Leases {
    /// Read by every removal: no lock where there is no lease.
    count: AtomicUsize,
    set: Mutex<Set>,
}

#[derive(Default)]
struct Set {
    next: u64,
    live: BTreeMap<u64, Arc<Lent>>,
}

/// One lease.
pub(crate) struct Lent {
    pub(crate) range: IovaRange,
    pub(crate) endpoint: u64,
    pub(crate) label: Box<str>,
    /// No lease: who could not be cut off.
    pub(crate) is_hold: bool,
    state: Mutex<State>,
}

struct State {
    ended: bool,
    revoke: Option<Box<dyn FnOnce() + Send>>,
    waiters: Vec<Waker>,
}

impl Leases {
    /// To be called under a guard that began before the translation used.
    pub(crate) fn lend(
        &self,
        range: IovaRange,
        endpoint: u64,
        label: &str,
        revoke: Box<dyn FnOnce() + Send>,
    ) -> u64 {
        let state = State { ended: false, revoke: Some(revoke), waiters: Vec::new() };
        self.insert(Lent { range, endpoint, label: label.into(), is_hold: false, state: Mutex::new(state) })
    }

    /// As a lease of everything that is not given back on request: whatever is removed from now on is in use until
    /// [`Leases::end`].
    pub(crate) fn hold(&self, endpoint: u64, label: &str) -> u64 {
        let state = State { ended: false, revoke: None, waiters: Vec::new() };
        let (range, state) = (IovaRange::ALL, Mutex::new(state));
        self.insert(Lent { range, endpoint, label: label.into(), is_hold: true, state })
    }

    fn insert(&self, lent: Lent) -> u64 {
        let lent = Arc::new(lent);
        let mut set = lock(&self.set);
        let id = set.next;
        set.next = id.wrapping_add(1);
        set.live.insert(id, lent);
        self.count.store(set.live.len(), Ordering::Release);
        id
    }

    /// The holder gives it back.
    pub(crate) fn end(&self, id: u64) {
        let lent = {
            let mut set = lock(&self.set);
            let lent = set.live.remove(&id);
            self.count.store(set.live.len(), Ordering::Release);
            lent
        };
        if let Some(lent) = lent {
            lent.end();
        }
    }

    /// The leases that now meet any of `ranges`, of one endpoint or of all.
    pub(crate) fn meeting(&self, ranges: &[IovaRange], endpoint: Option<u64>) -> Vec<Arc<Lent>> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let set = lock(&self.set);
        let meets = |lent: &&Arc<Lent>| {
            endpoint.is_none_or(|e| e == lent.endpoint) && ranges.iter().any(|r| r.overlaps(lent.range))
        };
        set.live.values().filter(meets).cloned().collect()
    }

    /// Whether anybody could not be cut off.
    pub(crate) fn are_held(&self) -> bool {
        self.meeting(&[IovaRange::ALL], None).iter().any(|lent| lent.is_hold)
    }
}

impl Lent {
    fn end(&self) {
        let waiters = {
            let mut state = lock(&self.state);
            state.ended = true;
            state.revoke = None;
            core::mem::take(&mut state.waiters)
        };
        waiters.into_iter().for_each(Waker::wake); // outside the lock
    }

    /// Asks for it back, once.
    pub(crate) fn revoke(&self) {
        let revoke = lock(&self.state).revoke.take();
        if let Some(revoke) = revoke {
            revoke(); // outside the lock: it may end the lease at once
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        lock(&self.state).ended
    }

    /// Whether it has ended; if not, `waker` is woken when it does.
    pub(crate) fn poll(&self, waker: &Waker) -> bool {
        let mut state = lock(&self.state);
        if !state.ended && !state.waiters.iter().any(|w| w.will_wake(waker)) {
            state.waiters.push(waker.clone());
        }
        state.ended
    }
}
