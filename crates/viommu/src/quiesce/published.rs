//! What the readers of one endpoint see, published as a whole: the order of a move between address spaces.

use crate::quiesce::slot::Slot;
use crate::quiesce::space::Space;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering, lock};

/// What can be published.
pub(crate) trait Outlook {
    /// The address space that is seen, if one is.
    fn space(&self) -> Option<&Arc<Space>>;
}

/// The current outlook of one endpoint's readers.
pub(crate) struct Published<O> {
    generation: Line<AtomicU64>,
    current: Mutex<Arc<O>>,
    /// One change at a time.
    publishing: Mutex<()>,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    there: Vec<Arc<Slot>>,
    /// Stays of those that are not there any more.
    past: u64,
}

impl Slots {
    fn drop_closed(&mut self) {
        let Self { there, past } = self;
        there.retain(|slot| {
            let closed = slot.is_closed();
            if closed {
                *past = past.wrapping_add(slot.stays());
            }
            !closed
        });
    }
}

/// On a line of its own: read at every translation, written by an attach.
#[repr(align(128))]
struct Line<T>(T);

impl<O: Outlook> Published<O> {
    pub(crate) fn new(outlook: O) -> Self {
        Self {
            generation: Line(AtomicU64::new(1)),
            current: Mutex::new(Arc::new(outlook)),
            publishing: Mutex::new(()),
            slots: Mutex::new(Slots::default()),
        }
    }

    #[inline(always)]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.0.load(Ordering::Acquire)
    }

    /// The outlook and a generation that is not newer than it.
    pub(crate) fn current(&self) -> (u64, Arc<O>) {
        let generation = self.generation();
        (generation, lock(&self.current).clone())
    }

    /// The readers, those that are gone left out.
    fn slots(&self) -> Vec<Arc<Slot>> {
        let mut slots = lock(&self.slots);
        slots.drop_closed();
        slots.there.clone()
    }

    /// How often all readers there have been have gone inside.
    pub(crate) fn stays(&self) -> u64 {
        let mut slots = lock(&self.slots);
        slots.drop_closed();
        slots.there.iter().fold(slots.past, |sum, slot| sum.wrapping_add(slot.stays()))
    }

    /// A new reader.
    pub(crate) fn add_slot(&self, slot: &Arc<Slot>) {
        let _one = lock(&self.publishing);
        let current = lock(&self.current).clone();
        if let Some(space) = current.space() {
            space.join(slot);
        }
        lock(&self.slots).there.push(slot.clone());
    }

    /// Publishes a new outlook: readers join the new address space before they can see it, and leave the old one after
    /// they cannot come back.
    pub(crate) fn publish(&self, change: impl FnOnce(&O) -> O) {
        let _one = lock(&self.publishing);
        let slots = self.slots();
        let old = lock(&self.current).clone();
        let new = Arc::new(change(&old));
        let moved = match (old.space(), new.space()) {
            (None, None) => false,
            (Some(old), Some(new)) => !Arc::ptr_eq(old, new),
            _ => true,
        };
        if let Some(space) = new.space().filter(|_| moved) {
            slots.iter().for_each(|slot| space.join(slot));
        }
        *lock(&self.current) = new;
        self.generation.0.fetch_add(1, Ordering::Release);
        if let Some(space) = old.space().filter(|_| moved) {
            slots.iter().for_each(|slot| space.depart(slot));
        }
    }
}
