//! A mirror that refuses as it is told to.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};

use viommu::subscribe::{FenceFailed, Mirror, Reach, RefusalKind, Refused, Unmapped};
use viommu::{Ack, IovaRange, Mapping};

use super::lock;

/// Refusals that a [`Faults`] keeps until they are taken; older ones are only counted.
pub const MAX_KEPT_FAULTS: usize = 4096;

/// Which calls fail, of one kind of call; the first call is number 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum When {
    /// None.
    #[default]
    Never,
    /// Each whose number is a multiple of this.
    Every(NonZeroU64),
    /// The one of this number.
    At(u64),
    /// The one of this number and all after it.
    From(u64),
}

impl When {
    /// Every `n`-th; never for 0.
    #[must_use]
    pub fn every(n: u64) -> Self {
        NonZeroU64::new(n).map_or(Self::Never, Self::Every)
    }

    fn hits(self, number: u64) -> bool {
        match self {
            Self::Never => false,
            Self::Every(n) => number % n == 0,
            Self::At(n) => number == n,
            Self::From(n) => number >= n,
        }
    }
}

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Plan {
    /// Calls of `map` and `replace`: refused for lack of resources, and nothing of them done.
    pub map: When,
    /// Calls of `unmap`: the extents stay, and the device still reaches them.
    pub unmap: When,
    /// Whether the fence does not hold.
    pub fence_fails: bool,
}

/// A call of a mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// [`Mirror::map`].
    Map(Mapping),
    /// [`Mirror::unmap`].
    Unmap(IovaRange),
    /// [`Mirror::replace`].
    Replace {
        /// What stays where it was refused.
        old: Mapping,
        /// What was to take its place.
        new: Mapping,
    },
    /// [`Mirror::commit`].
    Commit,
}

impl Call {
    /// The range that it is about; `None` for a commit.
    #[must_use]
    pub fn range(&self) -> Option<IovaRange> {
        match self {
            Self::Map(extent) | Self::Replace { new: extent, .. } => Some(extent.range),
            Self::Unmap(range) => Some(*range),
            Self::Commit => None,
        }
    }
}

/// A call that was refused as planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What was asked.
    pub call: Call,
    /// Its number among the counted calls of its kind.
    pub number: u64,
}

/// Calls so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Counts {
    /// Calls of `map` and `replace` that were counted, refused ones included.
    pub maps: u64,
    /// Calls of `unmap` that were counted, failed ones included.
    pub unmaps: u64,
    /// Calls of `map` and `replace` that were refused.
    pub refused_maps: u64,
    /// Calls of `unmap` that failed.
    pub failed_unmaps: u64,
}

/// The handle to a [`Failing`] mirror that stays with the test.
#[derive(Clone, Debug)]
pub struct Faults(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    plan: Plan,
    armed: bool,
    counts: Counts,
    kept: VecDeque<Fault>,
    /// Set by a refusal until the step ends: what comes is the record taking back what it did.
    undoing: bool,
}

impl Faults {
    /// Changes the plan; the counts go on.
    pub fn plan(&self, plan: Plan) {
        lock(&self.0).plan = plan;
    }

    /// Whether calls are counted and refused from now on (as it is at first), or just passed on: a replay to a new
    /// subscriber, say, which no guest asked for.
    pub fn arm(&self, armed: bool) {
        lock(&self.0).armed = armed;
    }

    /// Calls so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        lock(&self.0).counts
    }

    /// The refusals since this was last called, oldest first; at most the last [`MAX_KEPT_FAULTS`].
    #[must_use]
    pub fn take(&self) -> Vec<Fault> {
        lock(&self.0).kept.drain(..).collect()
    }
}

impl State {
    /// Counts a call; whether it is to be refused.
    fn refuses(&mut self, call: Call) -> bool {
        if !self.armed || self.undoing {
            return false;
        }
        let Counts { maps, unmaps, refused_maps, failed_unmaps } = &mut self.counts;
        let (when, number, refused) = match call {
            Call::Map(_) | Call::Replace { .. } => (self.plan.map, maps, refused_maps),
            Call::Unmap(_) => (self.plan.unmap, unmaps, failed_unmaps),
            Call::Commit => return false,
        };
        *number += 1;
        if !when.hits(*number) {
            return false;
        }
        *refused += 1;
        if self.kept.len() == MAX_KEPT_FAULTS {
            self.kept.pop_front();
        }
        self.kept.push_back(Fault { call, number: *number });
        self.undoing = true;
        true
    }
}

/// A mirror that refuses calls of another as a [`Plan`] says.
///
/// Only what a step asks for is counted and refused: once a call of a step is refused, the rest of that step (up to
/// the commit, or the begin of the next) is the record taking back what it did, and is passed on. A test that makes
/// the calls itself begins each step as the record does.
#[derive(Debug)]
pub struct Failing<M> {
    inner: M,
    faults: Faults,
}

impl<M: Mirror> Failing<M> {
    /// Over `inner`, and the handle.
    pub fn new(inner: M, plan: Plan) -> (Self, Faults) {
        let (counts, kept) = (Counts::default(), VecDeque::new());
        let faults = Faults(Arc::new(Mutex::new(State { plan, armed: true, counts, kept, undoing: false })));
        (Self { inner, faults: faults.clone() }, faults)
    }

    /// Over `inner`, with the plan and the counts of another: its successor after a fence.
    pub fn succeeding(inner: M, faults: &Faults) -> Self {
        lock(&faults.0).undoing = false;
        Self { inner, faults: faults.clone() }
    }

    /// The mirror that the calls are passed on to.
    pub fn inner(&self) -> &M {
        &self.inner
    }

    fn ask(&self, call: Call) -> Result<(), Refused> {
        let refused = lock(&self.faults.0).refuses(call);
        match call {
            _ if !refused => Ok(()),
            Call::Unmap(_) => Err(Refused::new(RefusalKind::Device, "failed as planned")),
            Call::Map(_) | Call::Replace { .. } | Call::Commit => {
                Err(Refused::new(RefusalKind::Resources, "refused as planned"))
            }
        }
    }
}

impl<M: Mirror> Mirror for Failing<M> {
    fn reach(&self) -> Reach {
        // The ends of steps tell a call of the guest's from the undo behind a refusal.
        Reach { batches: true, ..self.inner.reach() }
    }

    fn begin(&mut self) {
        lock(&self.faults.0).undoing = false;
        self.inner.begin();
    }

    fn commit(&mut self) -> Ack {
        lock(&self.faults.0).undoing = false;
        self.inner.commit()
    }

    fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        self.ask(Call::Map(*extent))?;
        self.inner.map(extent)
    }

    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        self.ask(Call::Unmap(range))?;
        self.inner.unmap(range)
    }

    fn replace(&mut self, old: &Mapping, new: &Mapping) -> Result<Ack, Refused> {
        self.ask(Call::Replace { old: *old, new: *new })?;
        self.inner.replace(old, new)
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        if lock(&self.faults.0).plan.fence_fails {
            return Err(FenceFailed("fails as planned".into()));
        }
        self.inner.fence()
    }

    fn held(&self) -> Vec<Mapping> {
        self.inner.held()
    }
}

#[cfg(test)]
#[path = "failing_tests.rs"]
mod tests;
