//! A mirror that says "done" when it is told to.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use viommu::ack::Resolver;
use viommu::subscribe::{FenceFailed, Mirror, Reach, Refused, Unmapped};
use viommu::{Ack, IovaRange, Mapping};

use super::failing::Call;
use super::lock;

/// Which calls are acknowledged later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Later {
    /// `map` and `replace`.
    pub map: bool,
    /// `unmap`.
    pub unmap: bool,
    /// `commit`.
    pub commit: bool,
}

impl Later {
    /// Every call.
    pub const ALL: Self = Self { map: true, unmap: true, commit: true };
    /// Removals only.
    pub const UNMAP: Self = Self { map: false, unmap: true, commit: false };
}

/// The acks that a [`Deferred`] mirror owes, oldest first: the handle that stays with the test. May be resolved from
/// any thread, also while a step runs.
#[derive(Clone, Debug, Default)]
pub struct Acks(Arc<Mutex<VecDeque<(Call, Resolver)>>>);

impl Acks {
    /// The calls that wait, oldest first.
    #[must_use]
    pub fn waiting(&self) -> Vec<Call> {
        lock(&self.0).iter().map(|(call, _)| *call).collect()
    }

    /// Acknowledges the oldest; `None` when nothing waits.
    pub fn done(&self) -> Option<Call> {
        self.take(0).map(|(call, resolver)| {
            resolver.done();
            call
        })
    }

    /// Acknowledges the `n`-th oldest (from 0), out of turn; `None` when fewer wait.
    pub fn done_at(&self, n: usize) -> Option<Call> {
        self.take(n).map(|(call, resolver)| {
            resolver.done();
            call
        })
    }

    /// Acknowledges all that wait now; how many.
    pub fn all_done(&self) -> usize {
        let all = core::mem::take(&mut *lock(&self.0));
        let count = all.len();
        all.into_iter().for_each(|(_, resolver)| resolver.done());
        count
    }

    /// Answers the oldest with a failure; `None` when nothing waits.
    pub fn failed(&self) -> Option<Call> {
        self.take(0).map(|(call, resolver)| {
            resolver.failed();
            call
        })
    }

    /// Out of the lock, since resolving wakes whoever waits.
    fn take(&self, n: usize) -> Option<(Call, Resolver)> {
        lock(&self.0).remove(n)
    }

    fn owe(&self, call: Call, inner: Ack) -> Ack {
        let (ack, resolver) = Ack::pending();
        lock(&self.0).push_back((call, resolver));
        inner.and(ack)
    }
}

/// A mirror whose calls take effect at once on another, but are acknowledged through [`Acks`].
///
/// The worst case of a slow host (the device uses a removed translation until the ack) does not show in the other
/// mirror: what the record may do before the ack does.
#[derive(Debug)]
pub struct Deferred<M> {
    inner: M,
    later: Later,
    acks: Acks,
}

impl<M: Mirror> Deferred<M> {
    /// Over `inner`, and the handle.
    pub fn new(inner: M, later: Later) -> (Self, Acks) {
        let acks = Acks::default();
        (Self { inner, later, acks: acks.clone() }, acks)
    }

    /// The mirror that the calls are passed on to.
    pub fn inner(&self) -> &M {
        &self.inner
    }

    fn answer(&self, later: bool, call: Call, ack: Ack) -> Ack {
        if later { self.acks.owe(call, ack) } else { ack }
    }
}

impl<M: Mirror> Mirror for Deferred<M> {
    fn reach(&self) -> Reach {
        self.inner.reach()
    }

    fn begin(&mut self) {
        self.inner.begin();
    }

    fn commit(&mut self) -> Ack {
        let ack = self.inner.commit();
        self.answer(self.later.commit, Call::Commit, ack)
    }

    fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        let ack = self.inner.map(extent)?;
        Ok(self.answer(self.later.map, Call::Map(*extent), ack))
    }

    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        let unmapped = self.inner.unmap(range)?;
        let ack = self.answer(self.later.unmap, Call::Unmap(range), unmapped.ack);
        Ok(Unmapped { ack, ..unmapped })
    }

    fn replace(&mut self, old: &Mapping, new: &Mapping) -> Result<Ack, Refused> {
        let ack = self.inner.replace(old, new)?;
        Ok(self.answer(self.later.map, Call::Replace { old: *old, new: *new }, ack))
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        self.inner.fence()
    }

    fn held(&self) -> Vec<Mapping> {
        self.inner.held()
    }
}

#[cfg(test)]
#[path = "deferred_tests.rs"]
mod tests;
