//! A consumer's word that it is done, now or later.

use core::task::Waker;
use std::sync::{Arc, Mutex};

use crate::sync::lock_std as lock;

/// When a consumer's call has taken effect.
#[derive(Debug)]
#[must_use]
pub enum Ack {
    /// It has.
    Done,
    /// It will: see [`Ack::pending`].
    Pending(Waiting),
}

/// The core's end of a pending ack.
#[derive(Debug)]
#[must_use]
pub struct Waiting(Vec<Arc<State>>);

/// The consumer's end of a pending ack. May be resolved from any thread. Dropped unresolved, it counts as a failure:
/// the consumer is fenced.
#[derive(Debug)]
pub struct Resolver(Option<Arc<State>>);

#[derive(Debug, Default)]
struct State(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    outcome: Option<bool>,
    wakers: Vec<Waker>,
}

impl Ack {
    /// An ack that comes later, and what resolves it.
    pub fn pending() -> (Self, Resolver) {
        let state = Arc::new(State::default());
        (Self::Pending(Waiting(vec![state.clone()])), Resolver(Some(state)))
    }

    /// Done when both are.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Done, ack) | (ack, Self::Done) => ack,
            (Self::Pending(mut a), Self::Pending(b)) => {
                a.0.extend(b.0);
                Self::Pending(a)
            }
        }
    }
}

impl Waiting {
    /// `None` while it is awaited; `Some(false)` when the consumer failed. Wakes `waker` on a change.
    pub(crate) fn poll(&mut self, waker: Option<&Waker>) -> Option<bool> {
        while let Some(state) = self.0.last() {
            let mut inner = lock(&state.0);
            match inner.outcome {
                Some(true) => {}
                Some(false) => return Some(false),
                None => {
                    if let Some(waker) = waker
                        && !inner.wakers.iter().any(|w| w.will_wake(waker))
                    {
                        inner.wakers.push(waker.clone());
                    }
                    return None;
                }
            }
            drop(inner);
            self.0.pop();
        }
        Some(true)
    }
}

impl Resolver {
    /// The call has taken effect.
    pub fn done(mut self) {
        self.resolve(true);
    }

    /// The call has failed: the consumer will be fenced.
    pub fn failed(mut self) {
        self.resolve(false);
    }

    fn resolve(&mut self, outcome: bool) {
        let Some(state) = self.0.take() else { return };
        let wakers = {
            let mut inner = lock(&state.0);
            inner.outcome = Some(outcome);
            core::mem::take(&mut inner.wakers)
        };
        wakers.into_iter().for_each(Waker::wake); // outside the lock
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.resolve(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(ack: Ack) -> Waiting {
        match ack {
            Ack::Pending(w) => w,
            Ack::Done => panic!("not pending"),
        }
    }

    #[test]
    fn ack_of_two_is_done_when_both_are() {
        let (a, first) = Ack::pending();
        let (b, second) = Ack::pending();
        let mut both = waiting(a.and(Ack::Done).and(b));
        assert_eq!(both.poll(None), None);
        second.done();
        assert_eq!(both.poll(None), None);
        first.done();
        assert_eq!(both.poll(None), Some(true));
    }

    #[test]
    fn dropped_resolver_is_a_failure() {
        let (ack, resolver) = Ack::pending();
        drop(resolver);
        assert_eq!(waiting(ack).poll(None), Some(false));
    }
}
