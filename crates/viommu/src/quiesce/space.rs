//! Who may be inside one address space.

use crate::quiesce::slot::{Grace, Slot, Stay};
use crate::sync::{Arc, Mutex, Ordering, fence, lock};

/// The readers of one address space, those included that have left for another one in the middle of a stay.
#[derive(Default)]
pub(crate) struct Space {
    members: Mutex<Vec<Member>>,
}

struct Member {
    slot: Arc<Slot>,
    /// The stay during which the reader's endpoint left: it may still use what it translated here.
    departed: Option<Stay>,
}

impl Space {
    /// A reader's endpoint comes here. To be called before its view is published.
    pub(crate) fn join(&self, slot: &Arc<Slot>) {
        lock(&self.members).push(Member { slot: slot.clone(), departed: None });
    }

    /// A reader's endpoint has left. To be called after its new view has been published.
    pub(crate) fn depart(&self, slot: &Arc<Slot>) {
        fence(Ordering::SeqCst);
        let mut members = lock(&self.members);
        let stay = slot.stay();
        let Some(at) = members.iter().position(|m| m.departed.is_none() && Arc::ptr_eq(&m.slot, slot)) else {
            return;
        };
        match stay {
            Some(_) => members[at].departed = stay,
            None => drop(members.swap_remove(at)),
        }
    }

    /// Reads every slot once: the grace is over when all stays found have ended.
    #[inline]
    pub(crate) fn grace(&self) -> Grace {
        let mut members = lock(&self.members);
        let mut grace = Grace::default();
        let mut stale = false;
        fence(Ordering::SeqCst);
        for member in members.iter() {
            match (member.departed, member.slot.stay()) {
                (None, Some(stay)) => grace.pending.push((member.slot.clone(), stay)),
                (Some(then), Some(now)) if then == now => grace.pending.push((member.slot.clone(), then)),
                (Some(_), _) => stale = true,
                (None, None) => {}
            }
        }
        if stale {
            members.retain(|m| m.departed.is_none_or(|stay| !m.slot.is_over(stay)));
        }
        grace
    }
}
