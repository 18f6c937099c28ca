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
    pub(crate) fn is_quiet(&self) -> bool {
        let members = lock(&self.members);
        fence(Ordering::SeqCst);
        members.iter().all(|m| m.stay().is_none())
    }

    /// Whether nobody is inside and no lease is out.
    pub(crate) fn is_unused(&self) -> bool {
        self.is_quiet() && self.leases.meeting(&[IovaRange::ALL], None).is_empty()
    }

    /// Who is inside now, by name.
    pub(crate) fn inside(&self) -> Vec<Arc<Slot>> {
        self.grace().pending.into_iter().map(|(slot, _)| slot).collect()
    }
}
