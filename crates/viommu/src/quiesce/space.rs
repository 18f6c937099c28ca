//! Who may be inside one address space.

use crate::addr::IovaRange;
use crate::quiesce::lease::Leases;
use crate::quiesce::slot::{Grace, Slot, Stay};
use crate::sync::{Arc, AtomicUsize, Mutex, Ordering, fence, lock};

/// The readers of one address space, those included that have left for another one in the middle of a stay, and
/// the leases on it.
#[derive(Default)]
pub(crate) struct Space {
    members: Mutex<Vec<Member>>,
    pub(crate) leases: Leases,
    /// Completions that have not resolved.
    pub(crate) outstanding: AtomicUsize,
}

/// An address space in which a device that could not be cut off may still reach what was mapped. Dropped, it stays so
/// for good.
#[must_use = "it does not end by itself"]
pub(crate) struct Hold {
    pub(crate) space: Arc<Space>,
    id: u64,
}

impl Hold {
    /// `endpoint`: whose leaving is held up too.
    pub(crate) fn new(space: &Arc<Space>, endpoint: u64, label: &str) -> Self {
        Self { space: space.clone(), id: space.leases.hold(endpoint, label) }
    }

    /// The device has been cut off.
    pub(crate) fn end(self) {
        self.space.leases.end(self.id);
    }
}

struct Member {
    slot: Arc<Slot>,
    /// The stay during which the reader's endpoint left: it may still use what it translated here.
    departed: Option<Stay>,
}

impl Member {
    /// The stay that may still use translations of this space.
    #[inline(always)]
    fn stay(&self) -> Option<Stay> {
        let now = self.slot.stay();
        if self.departed.is_none() || now == self.departed { now } else { None }
    }

    /// Whether it can never read here again.
    fn is_gone(&self) -> bool {
        self.slot.is_closed() || self.departed.is_some_and(|stay| self.slot.is_over(stay))
    }
}

impl Space {
    /// A reader's endpoint comes here. To be called before its view is published.
    pub(crate) fn join(&self, slot: &Arc<Slot>) {
        let mut members = lock(&self.members);
        members.retain(|m| !m.is_gone());
        members.push(Member { slot: slot.clone(), departed: None });
    }

    /// A reader's endpoint has left. To be called after its new view has been published.
    pub(crate) fn depart(&self, slot: &Arc<Slot>) {
        fence(Ordering::SeqCst);
        let mut members = lock(&self.members);
        if let Some(at) = members.iter().position(|m| m.departed.is_none() && Arc::ptr_eq(&m.slot, slot)) {
            match slot.stay() {
                Some(stay) => members[at].departed = Some(stay),
                None => drop(members.swap_remove(at)),
            }
        }
    }

    /// Reads every slot (or those of one endpoint) once: the grace is over when all stays found have ended.
    pub(crate) fn grace_of(&self, endpoint: Option<u64>) -> Grace {
        let mut members = lock(&self.members);
        members.retain(|m| !m.is_gone());
        let mut grace = Grace::default();
        fence(Ordering::SeqCst);
        for member in members.iter().filter(|m| endpoint.is_none_or(|e| e == m.slot.endpoint)) {
            if let Some(stay) = member.stay() {
                grace.pending.push((member.slot.clone(), stay));
            }
        }
        grace
    }

    /// [`Space::grace_of`] everybody.
    pub(crate) fn grace(&self) -> Grace {
        self.grace_of(None)
    }

    /// Whether nobody is inside now: what has been published is seen by all who come.
    #[inline]
    fn is_quiet(&self) -> bool {
        let members = lock(&self.members);
        fence(Ordering::SeqCst);
        members.iter().all(|m| m.stay().is_none())
    }

    /// Whether nothing of `ranges`, which are gone from the record, is in use.
    ///
    /// The readers are looked at first: a lease is taken inside, so who is out has its lease in the set. The other way
    /// round a reader could take a lease and leave between the two looks.
    #[inline]
    pub(crate) fn is_unused(&self, ranges: &[IovaRange]) -> bool {
        self.is_quiet() && self.leases.meeting(ranges, None).is_empty()
    }

    /// Who is inside now, by name.
    pub(crate) fn inside(&self) -> Vec<Arc<Slot>> {
        self.grace().pending.into_iter().map(|(slot, _)| slot).collect()
    }
}
