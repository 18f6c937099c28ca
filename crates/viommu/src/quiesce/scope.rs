//! What a thread is in the middle of: a step, or a subscriber's callback inside one.
//!
//! Inside a callback steps, fills and waiting are refused; subscribing and leaving are put off until the step is over.

use std::cell::{Cell, RefCell};

use crate::sync::{thread_counter, thread_local};

type Later = Box<dyn FnOnce()>;

thread_counter!(STEPS);
thread_counter!(CALLBACKS);
thread_counter!(BURSTS);
thread_counter!(PUT_OFF);
thread_local! {
    static LATER: RefCell<Vec<Later>> = const { RefCell::new(Vec::new()) };
}

/// The call was made inside a subscriber's callback, or while this thread holds a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("called inside a subscriber's callback or a burst")]
pub(crate) struct InCallback;

/// A step on this thread. Made before any lock is taken, so that it ends after all are released.
pub(crate) struct StepScope(());

impl StepScope {
    #[inline]
    pub(crate) fn enter() -> Result<Self, InCallback> {
        if in_callback() || BURSTS.with(Cell::get) != 0 {
            return Err(InCallback);
        }
        STEPS.with(|steps| steps.set(steps.get().wrapping_add(1)));
        Ok(Self(()))
    }
}

impl Drop for StepScope {
    #[inline]
    fn drop(&mut self) {
        let left = STEPS.with(|steps| {
            steps.set(steps.get().wrapping_sub(1));
            steps.get()
        });
        if left == 0 && PUT_OFF.with(Cell::get) != 0 {
            run_later();
        }
    }
}

#[cold]
fn run_later() {
    PUT_OFF.with(|n| n.set(0));
    for later in LATER.with(RefCell::take) {
        later();
    }
}

/// A subscriber's callback on this thread.
pub(crate) struct CallbackScope(());

impl CallbackScope {
    #[inline]
    pub(crate) fn enter() -> Self {
        CALLBACKS.with(|calls| calls.set(calls.get().wrapping_add(1)));
        Self(())
    }
}

impl Drop for CallbackScope {
    #[inline]
    fn drop(&mut self) {
        CALLBACKS.with(|calls| calls.set(calls.get().wrapping_sub(1)));
    }
}

/// Several steps under one lock on this thread: no other step can begin here.
pub(crate) struct BurstScope(());

impl BurstScope {
    pub(crate) fn enter() -> Self {
        BURSTS.with(|bursts| bursts.set(bursts.get().wrapping_add(1)));
        Self(())
    }
}

impl Drop for BurstScope {
    fn drop(&mut self) {
        BURSTS.with(|bursts| bursts.set(bursts.get().wrapping_sub(1)));
    }
}

/// Whether this thread is in the middle of a step, and so may hold the unit's or a domain's lock.
#[inline]
pub(crate) fn in_step() -> bool {
    STEPS.with(Cell::get) != 0 || in_callback()
}

/// Whether this thread is inside a subscriber's callback.
#[inline]
pub(crate) fn in_callback() -> bool {
    CALLBACKS.with(Cell::get) != 0
}

/// Puts `f` off until the step that this callback belongs to is over.
pub(crate) fn after_the_step(f: impl FnOnce() + 'static) {
    PUT_OFF.with(|n| n.set(n.get().wrapping_add(1)));
    LATER.with(|later| later.borrow_mut().push(Box::new(f)));
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use std::rc::Rc;

    #[test]
    fn steps_are_refused_inside_a_callback_and_later_work_runs_after_the_outermost_step() {
        let ran = Rc::new(Cell::new(false));
        let outer = StepScope::enter().unwrap();
        let inner = StepScope::enter().unwrap();
        {
            let _callback = CallbackScope::enter();
            assert!(StepScope::enter().is_err());
            let ran = ran.clone();
            after_the_step(move || ran.set(true));
        }
        drop(inner);
        assert!(!ran.get());
        drop(outer);
        assert!(ran.get());
    }
}
