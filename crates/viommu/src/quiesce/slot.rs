//! Reader slots: who is inside, told apart by a sequence number.
//!
//! One word a reader: sequence, WAIT, INSIDE. Both ends of a guard are one read-modify-write. It is a Dekker pair:
//! the reader says "inside" and then reads the table; the writer changes the table and then reads the slots.

use core::marker::PhantomData;
use core::task::Waker;
use std::cell::Cell;

#[cfg(not(all(target_arch = "x86_64", not(loom))))]
use crate::sync::fence;
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering, lock, thread_counter};

const INSIDE: u64 = 1;
/// Set by a waiter, only on a word that is INSIDE; the leaver sees it in its swap.
const WAIT: u64 = 2;
const STEP: u64 = 4;

// Guards that this thread holds, of any endpoint.
thread_counter!(HELD);

/// Whether this thread holds a guard of any endpoint.
pub(crate) fn thread_holds_a_guard() -> bool {
    HELD.with(Cell::get) != 0
}

/// The count of one guard, for a guard that takes its entry along when it goes. Not `Send`.
pub(crate) struct Counted(PhantomData<*const ()>);

impl Counted {
    /// Takes over what [`Entry::enter`] has counted.
    pub(crate) fn from_enter() -> Self {
        Self(PhantomData)
    }
}

impl Drop for Counted {
    #[inline(always)]
    fn drop(&mut self) {
        HELD.with(|held| held.set(held.get().wrapping_sub(1)));
    }
}

/// The word of one reader. On a line of its own: the reader writes it at every batch.
#[repr(align(128))]
pub(crate) struct Slot {
    state: AtomicU64,
    waiters: Mutex<Vec<Waker>>,
    /// Who reads, for reports of what blocks a completion.
    pub(crate) label: Box<str>,
    /// The endpoint's key.
    pub(crate) endpoint: u64,
    /// The reader is gone.
    closed: AtomicBool,
}

/// The owner's end of a slot. `enter` takes `&mut`, so guards of one reader never nest.
pub(crate) struct Entry {
    slot: Arc<Slot>,
    seq: u64,
}

impl Entry {
    pub(crate) fn new(label: &str, endpoint: u64) -> Self {
        let slot = Slot {
            state: AtomicU64::new(0),
            waiters: Mutex::new(Vec::new()),
            label: label.into(),
            endpoint,
            closed: AtomicBool::new(false),
        };
        Self { slot: Arc::new(slot), seq: 0 }
    }

    pub(crate) fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }

    /// Goes inside. Every word of the table read until [`Entry::leave`] is protected.
    #[inline(always)]
    pub(crate) fn enter(&mut self) {
        self.seq = self.seq.wrapping_add(STEP);
        // A swap, not a store: a guard that was leaked may have left INSIDE|WAIT behind.
        #[cfg(all(target_arch = "x86_64", not(loom)))]
        let old = {
            // The locked swap is a full barrier, and cheaper than a fence behind a relaxed one.
            let old = self.slot.state.swap(self.seq | INSIDE, Ordering::SeqCst);
            std::sync::atomic::compiler_fence(Ordering::SeqCst);
            old
        };
        #[cfg(not(all(target_arch = "x86_64", not(loom))))]
        let old = {
            // Release: the accesses of a leaked guard, which this stay ends, come before whoever sees it.
            let old = self.slot.state.swap(self.seq | INSIDE, Ordering::Release);
            fence(Ordering::SeqCst);
            old
        };
        if old & WAIT != 0 {
            self.slot.wake();
        }
        HELD.with(|held| held.set(held.get().wrapping_add(1)));
    }

    /// Leaves; wakes who waits for this stay.
    #[inline(always)]
    pub(crate) fn leave(&mut self) {
        drop(Counted::from_enter());
        self.step_out();
    }

    /// [`Entry::leave`] without the thread's count.
    #[inline(always)]
    pub(crate) fn step_out(&mut self) {
        // Release: my accesses come before whoever sees me gone. Acquire: pairs with a waiter's registration.
        if self.slot.state.swap(self.seq, Ordering::AcqRel) & WAIT != 0 {
            self.slot.wake();
        }
    }
}

impl Drop for Entry {
    /// A leaked guard may have left INSIDE behind: it borrowed nothing that outlives this.
    fn drop(&mut self) {
        self.seq = self.seq.wrapping_add(STEP);
        if self.slot.state.swap(self.seq, Ordering::AcqRel) & WAIT != 0 {
            self.slot.wake();
        }
        self.slot.closed.store(true, Ordering::Release);
    }
}

impl Slot {
    /// How often the reader has gone inside. A reader that is gone has taken one step more.
    pub(crate) fn stays(&self) -> u64 {
        let closed = self.is_closed();
        (self.state.load(Ordering::Relaxed) / STEP).saturating_sub(u64::from(closed))
    }

    #[cold]
    fn wake(&self) {
        let waiting = core::mem::take(&mut *lock(&self.waiters));
        waiting.into_iter().for_each(Waker::wake); // outside the lock
    }

    /// The stay that is going on now, if any.
    #[inline(always)]
    pub(crate) fn stay(&self) -> Option<Stay> {
        let word = self.state.load(Ordering::Acquire) & !WAIT;
        (word & INSIDE != 0).then_some(Stay(word))
    }

    /// Whether the reader is gone for good.
    #[inline(always)]
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Whether `stay` has ended.
    #[inline(always)]
    pub(crate) fn is_over(&self, stay: Stay) -> bool {
        self.state.load(Ordering::Acquire) & !WAIT != stay.0
    }

    /// Asks to be woken when `stay` ends; `false` when it has ended already (nothing is registered then).
    pub(crate) fn wake_after(&self, stay: Stay, waker: &Waker) -> bool {
        let mut waiters = lock(&self.waiters); // held over the exchange: the leaver's wake comes after the push
        let mut word = stay.0;
        loop {
            match self.state.compare_exchange(word, stay.0 | WAIT, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break,
                Err(now) if now & !WAIT != stay.0 => return false,
                Err(now) => word = now,
            }
        }
        if !waiters.iter().any(|w| w.will_wake(waker)) {
            waiters.push(waker.clone());
        }
        true
    }
}

/// One stay of one reader inside its slot. A reader that enters again makes another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stay(u64);

/// The stays that were going on when the slots were read.
#[derive(Default)]
pub(crate) struct Grace {
    pub(crate) pending: Vec<(Arc<Slot>, Stay)>,
}

impl Grace {
    /// Whether all of them have ended.
    #[inline]
    pub(crate) fn is_over(&mut self) -> bool {
        self.pending.retain(|(slot, stay)| !slot.is_over(*stay));
        self.pending.is_empty()
    }

    /// Whether all of them have ended; if not, `waker` is woken when one has that is still awaited.
    pub(crate) fn poll(&mut self, waker: &Waker) -> bool {
        while let Some((slot, stay)) = self.pending.last() {
            if slot.wake_after(*stay, waker) {
                return false;
            }
            self.pending.pop();
        }
        true
    }
}
