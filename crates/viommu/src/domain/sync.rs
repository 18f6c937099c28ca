//! Tables in guest memory: compare what they say with what has been announced, and make that the step.

use crate::addr::{Iova, IovaRange};
use crate::domain::Domain;
use crate::domain::inner::{DomainInner, DomainState};
use crate::domain::plan::Op;
use crate::error::{StepError, StepErrorKind};
use crate::mapping::Mapping;
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::{CallbackScope, StepScope};
use crate::sync::lock;

/// What a [`Walk`] has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// An extent.
    Extent(Mapping),
    /// There is none up to the end of what was asked for.
    Nothing,
    /// There is none in front of this address, which is behind where the walk began; further it has not looked, since
    /// it has read enough tables for now. The [`Domain::sync`] ends its call there.
    NotYet(Iova),
}

/// A walk over the guest's tables, by a model. A closure that gives the extent, or `None`, is one that always looks to
/// the end.
pub trait Walk {
    /// The guest's extent (a leaf, whole) that holds `from`, else the first behind it that starts at or before `last`.
    /// Extents are page-aligned and disjoint. What cannot be read, or has reserved bits set, is not mapped. Each entry
    /// is read once; called under the domain's lock, so a walk over empty tables must end with [`Found::NotYet`].
    fn next(&mut self, from: Iova, last: Iova) -> Found;
}

impl<F: FnMut(Iova, Iova) -> Option<Mapping>> Walk for F {
    fn next(&mut self, from: Iova, last: Iova) -> Found {
        self(from, last).map_or(Found::Nothing, Found::Extent)
    }
}

impl Found {
    fn extent(self) -> Option<Mapping> {
        match self {
            Self::Extent(m) => Some(m),
            Self::Nothing | Self::NotYet(_) => None,
        }
    }
}

/// How far a [`Domain::sync`] has come.
#[derive(Debug)]
#[must_use]
pub struct Progress {
    /// What is still to be compared: the range of the next call. It may end behind the first one, where an extent of the
    /// record that lay across its end has gone. `None`: all is compared.
    pub rest: Option<IovaRange>,
    /// Resolves when what was removed so far is used no more.
    pub completion: Completion,
}

impl Domain {
    /// Compares the guest's tables over `range` with the record, and announces the differences as one step: whole
    /// extents go, then new ones come; an extent that is the same stays untouched. The comparison goes outward to the
    /// ends of extents, the record's and the guest's, that cross the ends of `range`. Caches are told of all of
    /// `range`, as far as it was compared: what they hold may be newer than the record.
    ///
    /// At most about `limit` extents are looked at in one call, and what the walk looks at; it says where to go on.
    ///
    /// # Errors
    /// [`StepErrorKind::WrongKind`] where the record is viommu's own; caps: what is gone has been removed then, and
    /// what is new is not there. The guest cannot be refused: a mirror that
    /// cannot follow is fenced, or the extent left out, as its [`Reach`](crate::subscribe::Reach) says.
    pub fn sync(&self, range: IovaRange, walk: &mut dyn Walk, limit: usize) -> Result<Progress, StepError> {
        let _scope = StepScope::enter().map_err(|_| StepErrorKind::InCallback)?;
        let mut completion = Completion::ready();
        let mut state = lock(&self.0.state);
        self.0.alive(&state)?;
        match self.0.sync_in(&mut state, range, walk, limit.max(1), &mut completion) {
            Ok(rest) => Ok(Progress { rest, completion }),
            Err(kind) => Err(StepError { kind, completion }),
        }
    }
}

impl DomainInner {
    fn sync_in(
        &self,
        state: &mut DomainState,
        range: IovaRange,
        walk: &mut dyn Walk,
        limit: usize,
        done: &mut Completion,
    ) -> Result<Option<IovaRange>, StepErrorKind> {
        if self.walker.is_none() {
            return Err(StepErrorKind::WrongKind("the record is viommu's own: say what changed"));
        }
        let (compared, guest, rest) = {
            let _callback = CallbackScope::enter();
            gather(state, range, walk, limit)
        };
        // What the guest may not map (outside the aperture, over a region, misaligned) is not mapped; nor is what a
        // walk gives twice.
        let mut free = Some(Iova(0));
        let mut legal = guest;
        legal.retain(|m| {
            let fits =
                free.is_some_and(|free| m.range.start() >= free) && self.check_mapping(state, m).is_ok();
            if fits {
                free = m.range.next();
            }
            fits
        });
        let mut outcome = self.run(state, &[Op::Assign(compared, legal.clone())], true, done);
        if outcome.is_err() {
            // A cap keeps out what is new. What the guest took away is gone all the same (L3).
            legal.retain(|m| state.writer.next(m.range.start()) == Some(*m));
            let gone = self.run(state, &[Op::Assign(compared, legal)], true, done);
            outcome = outcome.and(gone);
        }
        self.tell_caches(state, &[compared], done);
        self.note_removal(&mut state.gone, &[compared], true, done);
        self.settle(state, done);
        outcome.map(|()| rest)
    }
}

/// Reads the guest's extents over `range`, widened to whole extents on both sides. Gives the range that is covered,
/// the extents, and what is left when `limit` cut it short.
fn gather(
    state: &DomainState,
    range: IovaRange,
    walk: &mut dyn Walk,
    limit: usize,
) -> (IovaRange, Vec<Mapping>, Option<IovaRange>) {
    let mut start = range.start();
    // Outward at the start: until neither the record nor the guest has an extent across it.
    loop {
        let ours = state.writer.next(start).filter(|m| m.range.contains(start));
        let theirs = walk.next(start, start).extent().filter(|m| m.range.contains(start));
        let wider = ours.into_iter().chain(theirs).map(|m| m.range.start()).min().unwrap_or(start);
        if wider >= start {
            break;
        }
        start = wider;
    }
    let mut guest: Vec<Mapping> = Vec::new();
    let mut last = range.last();
    let (mut at, mut seen) = (start, 0_usize);
    loop {
        let ours = state.writer.next(at).filter(|m| m.range.start() <= last);
        // Ours has to be covered whole: the guest is asked about all of it.
        last = ours.map_or(last, |m| m.range.last().max(last));
        let found = walk.next(at, last);
        let theirs = found.extent().filter(|m| m.range.last() >= at && m.range.start() <= last);
        // Where the walk wants to pause: what it said nothing of is not compared.
        let pause = match (found, at.checked_add(1)) {
            (Found::NotYet(pause), Some(least)) => Some(pause.max(least)).filter(|pause| *pause <= last),
            _ => None,
        };
        // The nearer one first; the widest end of all that begins in front of it must be covered.
        let nearest = theirs.iter().chain(&ours).map(|m| m.range.start().max(at));
        let nearest = nearest.filter(|near| pause.is_none_or(|pause| *near < pause)).min();
        let before_pause = pause.map(|pause| Iova(pause.0.wrapping_sub(1)));
        let Some(nearest) = nearest.or(before_pause) else { break };
        let mut end = nearest;
        if let Some(m) = theirs.filter(|m| m.range.start() <= nearest) {
            end = end.max(m.range.last());
            last = last.max(m.range.last());
            guest.push(m);
        }
        if let Some(m) = ours.filter(|m| m.range.start() <= nearest) {
            // The guest's extents under ours are walked next.
            if theirs.is_none_or(|t| t.range.start() > nearest) {
                let stop = theirs.map(|t| Iova(t.range.start().0.wrapping_sub(1))).or(before_pause);
                end = end.max(stop.map_or_else(|| m.range.last(), |stop| stop.min(m.range.last())));
            }
        }
        // Nor may one of ours be cut where the guest's have led.
        let across = state.writer.next(last).filter(|m| m.range.contains(last));
        last = across.map_or(last, |m| m.range.last());
        seen = seen.saturating_add(1);
        let Some(next) = end.checked_add(1).filter(|next| *next <= last) else { break };
        at = next;
        if seen >= limit || pause.is_some_and(|pause| at >= pause) {
            // An extent of ours across this point is not the guest's any more, or it would have been seen as one. It
            // goes now, whole; what the guest has in its rest comes with the next call.
            let ours = state.writer.next(at).filter(|m| m.range.start() < at);
            let covered = IovaRange::new(start, ours.map_or(end, |m| m.range.last())).unwrap_or(range);
            return (covered, guest, IovaRange::new(at, last));
        }
    }
    (IovaRange::new(start, last).unwrap_or(range), guest, None)
}
