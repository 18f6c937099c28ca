//! Completions: the answer to "is it over?".

use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use std::sync::atomic::AtomicU64 as StdAtomicU64;
use std::task::Wake;
use std::time::{Duration, Instant};

use crate::ack::Waiting;
use crate::addr::IovaRange;
use crate::deliver::{Seats, Sub};
use crate::endpoint::EndpointId;
use crate::iommu::unit::Totals;
use crate::quiesce::lease::Lent;
use crate::quiesce::scope::{CallbackScope, StepScope, after_the_step, in_step};
use crate::quiesce::slot::{Grace, thread_holds_a_guard};
use crate::quiesce::space::Space;
use crate::sync::{
    Arc, Ordering, StdArc, StdMutex, Thread, current, lock_std, park, park_timeout, spin_loop,
};

/// Ranges remembered one by one; beyond that their hull, which only ever waits for more.
pub(crate) const RANGES: usize = 32;

/// Polls before a wait parks. A model checker is to see the parking.
const SPINS: u32 = if cfg!(shuttle) { 1 } else { 100 };

/// Resolves when no access uses any more what its step took away.
///
/// That is: every consumer has acknowledged, and every guard, and every lease that meets what was removed, has ended
/// that began before the last of them did. A model answers its guest only then. It can be polled
/// ([`Completion::is_complete`]), waited on ([`Completion::wait`]) or awaited (it is a [`Future`]); several merge
/// into one. One that is dropped while pending is counted (see [`Iommu::dropped`](crate::Iommu::dropped)), and the
/// step has happened all the same; a consumer that fails later is still fenced.
#[must_use = "the guest may be answered only when this has resolved"]
pub struct Completion(Option<Box<Work>>);

struct Work {
    acks: Vec<Awaited>,
    /// The units whose subscribers are awaited: each counts this completion as outstanding.
    units: Vec<Arc<Totals>>,
    places: Vec<Place>,
    phase: Phase,
    /// Those that have left and have not acknowledged all: still there to be fenced.
    leaving: StdMutex<Seats>,
    /// When it was first found pending.
    since: Option<Instant>,
}

/// A consumer's answer.
struct Awaited {
    sub: Arc<Sub>,
    waiting: Waiting,
    /// Where the call was made: what it was to take away there may be in use if it fails.
    spaces: Vec<Arc<Space>>,
}

enum Phase {
    /// Waiting for consumers; the guards have not been read.
    Acks,
    /// Waiting for the guards that were inside at the reading.
    Guards(Grace),
    /// Waiting for leases, and for whoever could not be cut off.
    Leases(Vec<Arc<Lent>>),
}

/// What was taken away where.
struct Place {
    space: Arc<Space>,
    /// Only this endpoint has lost it; `None`: everybody.
    endpoint: Option<u64>,
    ranges: Vec<IovaRange>,
}

/// What keeps a [`Completion`] from resolving.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// Whose it is; `None` for a consumer that serves several.
    pub endpoint: Option<EndpointId>,
    /// The reader's or the lease's label, or the subscription's number.
    pub label: String,
    /// What it is.
    pub kind: BlockerKind,
    /// How long the completion has been waiting, from its first poll on.
    pub age: Duration,
}

/// Kinds of [`Blocker`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockerKind {
    /// A consumer has not acknowledged.
    Ack,
    /// A guard is still held.
    Guard,
    /// A lease has not been given back.
    Lease,
    /// A device could not be fenced: the virtual machine must be stopped.
    FenceFailed,
}

/// Why a wait ended without the completion.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// This thread holds a guard: it would wait for itself.
    #[error("waiting while this thread holds a guard")]
    HoldingGuard,
    /// This thread is inside a subscriber's callback, or holds a burst.
    #[error("waiting inside a subscriber's callback or a burst")]
    InCallback,
    /// Time is up. The embedder chooses: wait on, reset the device, stop the virtual machine.
    #[error("not complete in time: {} blockers", .0.len())]
    TimedOut(Vec<Blocker>),
    /// A device could not be fenced: the virtual machine must be stopped. This resolves only if the device is cut off
    /// after all.
    #[error("a device could not be fenced")]
    FenceFailed,
}

impl Completion {
    /// One that is over.
    pub const fn ready() -> Self {
        Self(None)
    }

    /// Whether nothing is awaited at all.
    #[inline]
    pub(crate) fn is_ready(&self) -> bool {
        self.0.is_none()
    }

    fn work(&mut self) -> &mut Work {
        self.0.get_or_insert_with(|| {
            let phase = Phase::Acks;
            let leaving = StdMutex::default();
            let (acks, places, units) = (Vec::new(), Vec::new(), Vec::new());
            Box::new(Work { acks, places, units, phase, leaving, since: None })
        })
    }

    /// Something was taken away in `space`; `endpoint`: by this one leaving. To be called before the first poll.
    pub(crate) fn add_removal(&mut self, space: &Arc<Space>, endpoint: Option<u64>, ranges: &[IovaRange]) {
        self.work().add(space, endpoint, ranges);
    }

    /// `sub` will answer to a call that was made in `spaces`.
    pub(crate) fn add_ack(&mut self, sub: &Arc<Sub>, waiting: Waiting, spaces: Vec<Arc<Space>>) {
        let work = self.work();
        if !work.units.iter().any(|unit| Arc::ptr_eq(unit, &sub.totals)) {
            sub.totals.outstanding.fetch_add(1, Ordering::Relaxed);
            work.units.push(sub.totals.clone());
        }
        work.acks.push(Awaited { sub: sub.clone(), waiting, spaces });
    }

    /// Lets go of those that have left: at once, or when they have acknowledged all that is awaited of them. Whoever
    /// could not be cut off is tried once more before.
    pub(crate) fn let_go(&mut self, mut seats: Seats) {
        seats.fence_again(self);
        let acks = self.0.as_ref().map_or(&[][..], |work| &work.acks);
        let owes = |sub: &Sub| !sub.is_fenced() && acks.iter().any(|ack| ack.sub.id() == sub.id());
        let owing = seats.take_if(owes);
        if !owing.is_empty() {
            lock_std(&self.work().leaving).append(owing);
        }
        let _callback = CallbackScope::enter();
        drop(seats);
    }

    /// Both as one. The guards are read once for the two, at the next poll.
    pub fn merge(&mut self, mut other: Self) {
        let Some(theirs) = other.0.as_deref_mut() else { return };
        let ours = self.work();
        // What was read before stays valid; reading again later only ever waits for more.
        ours.phase = Phase::Acks;
        ours.acks.append(&mut theirs.acks);
        for place in core::mem::take(&mut theirs.places) {
            ours.add(&place.space, place.endpoint, &place.ranges);
            place.space.outstanding.fetch_sub(1, Ordering::Relaxed);
        }
        for unit in core::mem::take(&mut theirs.units) {
            if ours.units.iter().any(|other| Arc::ptr_eq(other, &unit)) {
                unit.outstanding.fetch_sub(1, Ordering::Relaxed);
            } else {
                ours.units.push(unit);
            }
        }
        ours.since = [ours.since, theirs.since].into_iter().flatten().min();
        lock_std(&ours.leaving).append(core::mem::take(&mut lock_std(&theirs.leaving)));
        other.0 = None;
    }

    /// Whether it is over. Never blocks.
    pub fn is_complete(&mut self) -> bool {
        self.advance(None)
    }

    /// Whether it cannot resolve since a device could not be fenced that may still reach what was taken away. Should the
    /// device be cut off after all ([`Iommu::reset`](crate::Iommu::reset),
    /// [`Subscription::leave`](crate::Subscription::leave)), it goes on.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.0.as_ref().is_some_and(|work| !work.holds().is_empty())
    }

    fn advance(&mut self, waker: Option<&Waker>) -> bool {
        let Some(work) = self.0.as_mut() else { return true };
        // Fencing takes locks that this thread may hold now.
        let may_fence = !in_step();
        // Callbacks may follow, of leases: what they put off is done when this is over.
        let _scope = StepScope::enter();
        if work.advance(waker, may_fence) {
            self.0 = None;
            return true;
        }
        work.since.get_or_insert_with(Instant::now);
        false
    }

    /// Nobody will poll any more. Guards and leases end by themselves; consumers are followed.
    fn abandon(&mut self) {
        let Some(work) = self.0.as_mut().filter(|work| !work.acks.is_empty()) else { return };
        work.forget_places();
        let rest = Rest { acks: Some(Self(self.0.take())), again: false };
        StdArc::new(Orphan(StdMutex::new(rest))).settle();
    }

    /// What it waits for now.
    #[must_use]
    pub fn blockers(&self) -> Vec<Blocker> {
        self.0.as_ref().map_or_else(Vec::new, |work| work.blockers())
    }

    /// Blocks until it is over.
    ///
    /// # Errors
    /// [`WaitError::HoldingGuard`], [`WaitError::InCallback`]: at once, nothing has been waited for.
    /// [`WaitError::FenceFailed`]: nothing but a fence that holds after all would end it.
    pub fn wait(mut self) -> Result<(), WaitError> {
        self.wait_until(None)
    }

    /// Blocks until it is over, or for `limit`; it can be waited on again.
    ///
    /// # Errors
    /// As [`Completion::wait`], and [`WaitError::TimedOut`] with what it still waits for.
    pub fn wait_timeout(&mut self, limit: Duration) -> Result<(), WaitError> {
        self.wait_until(Some(limit))
    }

    fn wait_until(&mut self, limit: Option<Duration>) -> Result<(), WaitError> {
        if self.0.is_none() {
            return Ok(());
        }
        if in_step() {
            return Err(WaitError::InCallback);
        }
        if thread_holds_a_guard() {
            return Err(WaitError::HoldingGuard);
        }
        // Guards are short: most waits end here, without a system call.
        for _ in 0..SPINS {
            if self.is_complete() {
                return Ok(());
            }
            spin_loop();
        }
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let waker = Waker::from(StdArc::new(Unpark(current())));
        loop {
            if self.advance(Some(&waker)) {
                return Ok(());
            }
            if self.is_stuck() {
                return Err(WaitError::FenceFailed);
            }
            match deadline {
                None => park(),
                Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                    Some(left) if !left.is_zero() => park_timeout(left),
                    _ => return Err(WaitError::TimedOut(self.blockers())),
                },
            }
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: StdArc<Self>) {
        self.0.unpark();
    }
}

impl Work {
    fn forget_places(&mut self) {
        for place in self.places.drain(..) {
            place.space.outstanding.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn add(&mut self, space: &Arc<Space>, endpoint: Option<u64>, ranges: &[IovaRange]) {
        let same = |p: &&mut Place| p.endpoint == endpoint && Arc::ptr_eq(&p.space, space);
        if let Some(place) = self.places.iter_mut().find(same) {
            for range in ranges {
                if place.ranges.len() < RANGES {
                    place.ranges.push(*range);
                } else if let Some(hull) = place.ranges.first_mut() {
                    *hull = hull.hull(*range);
                }
            }
            return;
        }
        space.outstanding.fetch_add(1, Ordering::Relaxed);
        self.places.push(Place { space: space.clone(), endpoint, ranges: ranges.to_vec() });
    }

    /// Those who could not be cut off, as far as they hold this up.
    fn holds(&self) -> Vec<Arc<Lent>> {
        let mut lent = match &self.phase {
            Phase::Leases(leases) => leases.clone(),
            // Not looked for yet.
            _ => {
                let meeting = |place: &Place| place.space.leases.meeting(&place.ranges, place.endpoint);
                self.places.iter().flat_map(meeting).collect()
            }
        };
        lent.retain(|lent| lent.is_hold && !lent.is_over());
        lent
    }

    fn advance(&mut self, waker: Option<&Waker>, may_fence: bool) -> bool {
        loop {
            match &mut self.phase {
                Phase::Acks => {
                    while let Some(ack) = self.acks.last_mut() {
                        let outcome = ack.waiting.poll(waker);
                        if outcome.is_none() || outcome == Some(false) && !may_fence {
                            return false;
                        }
                        let failed = self.acks.pop().filter(|_| outcome == Some(false));
                        if let Some(Awaited { sub, spaces, .. }) = failed {
                            let why = "a call was answered with a failure";
                            let left = lock_std(&self.leaving).fence_and_tell(sub.id(), why, None);
                            if !left.unwrap_or_else(|| sub.fence(why)) {
                                for space in spaces {
                                    sub.hold(&space);
                                    self.add(&space, Some(sub.key()), &[IovaRange::ALL]);
                                }
                            }
                        }
                    }
                    let mut grace = Grace::default();
                    for place in &self.places {
                        grace.pending.extend(place.space.grace_of(place.endpoint).pending);
                    }
                    self.phase = Phase::Guards(grace);
                }
                Phase::Guards(grace) => {
                    let over = match waker {
                        Some(waker) => grace.poll(waker),
                        None => grace.is_over(),
                    };
                    if !over {
                        return false;
                    }
                    let mut leases = Vec::new();
                    for place in &self.places {
                        leases.extend(place.space.leases.meeting(&place.ranges, place.endpoint));
                    }
                    leases.iter().for_each(|lent| lent.revoke());
                    self.phase = Phase::Leases(leases);
                }
                Phase::Leases(leases) => {
                    while let Some(lent) = leases.last() {
                        if !waker.map_or_else(|| lent.is_over(), |waker| lent.poll(waker)) {
                            return false;
                        }
                        leases.pop();
                    }
                    return true;
                }
            }
        }
    }

    fn blockers(&self) -> Vec<Blocker> {
        let age = self.since.map_or(Duration::ZERO, |since| since.elapsed());
        let blocker = |endpoint, label: &str, kind| Blocker { endpoint, label: label.into(), kind, age };
        let mut blockers = Vec::new();
        for lent in self.holds() {
            blockers.push(blocker(
                EndpointId::from_key(lent.endpoint),
                &lent.label,
                BlockerKind::FenceFailed,
            ));
        }
        for Awaited { sub, .. } in &self.acks {
            blockers.push(blocker(sub.endpoint(), &sub.label(), BlockerKind::Ack));
        }
        match &self.phase {
            Phase::Acks => {}
            Phase::Guards(grace) => blockers.extend(grace.pending.iter().map(|(slot, _)| {
                blocker(EndpointId::from_key(slot.endpoint), &slot.label, BlockerKind::Guard)
            })),
            Phase::Leases(leases) => {
                blockers.extend(leases.iter().filter(|lent| !lent.is_hold).map(|lent| {
                    blocker(EndpointId::from_key(lent.endpoint), &lent.label, BlockerKind::Lease)
                }))
            }
        }
        blockers
    }
}

/// The acks of a completion that was dropped: a consumer that fails is fenced all the same.
struct Orphan(StdMutex<Rest>);

struct Rest {
    /// `None` while a thread looks at it, and when it is over.
    acks: Option<Completion>,
    /// An ack has come meanwhile.
    again: bool,
}

impl Orphan {
    fn settle(self: StdArc<Self>) {
        let waker = Waker::from(self.clone());
        loop {
            let mut acks = {
                let mut rest = lock_std(&self.0);
                let Some(acks) = rest.acks.take() else {
                    rest.again = true;
                    return;
                };
                rest.again = false;
                acks
            };
            // With no lock held: it may fence.
            if acks.advance(Some(&waker)) || acks.is_stuck() {
                return;
            }
            let mut rest = lock_std(&self.0);
            rest.acks = Some(acks);
            if !rest.again {
                return;
            }
        }
    }
}

impl Wake for Orphan {
    fn wake(self: StdArc<Self>) {
        if in_step() {
            after_the_step(move || self.settle());
        } else {
            self.settle();
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.forget_places();
        for unit in &self.units {
            unit.outstanding.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if self.0.is_none() {
            return;
        }
        if in_step() {
            // Whoever has to be fenced can only be fenced when this thread holds no lock.
            let rest = Self(self.0.take());
            after_the_step(move || drop(rest));
        } else if !self.advance(None) {
            // Of what is stuck the embedder knows already.
            if !self.is_stuck() {
                dropped_pending();
            }
            self.abandon();
        }
    }
}

// Std's: a static must be const, and no schedule depends on it.
static DROPPED: StdAtomicU64 = StdAtomicU64::new(0);

#[cold]
fn dropped_pending() {
    DROPPED.fetch_add(1, Ordering::Relaxed);
    #[cfg(feature = "tracing")]
    tracing::warn!("a completion was dropped while pending: a guest may have been answered too early");
}

/// Completions dropped while pending, in this process.
pub(crate) fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

impl Future for Completion {
    type Output = ();

    /// Stays pending while a device could not be fenced ([`Completion::is_stuck`]).
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.advance(Some(cx.waker())) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion").field("blockers", &self.blockers()).finish_non_exhaustive()
    }
}
