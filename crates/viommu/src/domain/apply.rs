//! One step: plan (made by the caller), check and reserve, publish removals, deliver removals, deliver additions,
//! publish additions, observers (L6). With its undo (L3).

use crate::addr::IovaRange;
use crate::change::Change;
use crate::deliver::backed;
use crate::deliver::mirror::{AddError, MirrorSeat};
use crate::domain::inner::{DomainInner, DomainState};
use crate::domain::{SCRATCH, exchange};
use crate::error::{Cap, StepErrorKind};
use crate::mapping::Mapping;
use crate::quiesce::completion::{Completion, RANGES};
use crate::quiesce::scope::CallbackScope;
use crate::sync::{Ordering, fence};
use crate::table::InsertError;

/// The difference that a step makes. All lists ascend and are disjoint in themselves.
#[derive(Clone, Copy, Default)]
pub(crate) struct Plan<'a> {
    /// Mappings that leave the record, whole.
    pub(crate) removed: &'a [Mapping],
    /// Where they are announced as one: each covers some of `removed` and nothing else that is mapped.
    pub(crate) spans: &'a [IovaRange],
    /// Mappings that enter the record. They overlap nothing but `removed`.
    pub(crate) added: &'a [Mapping],
    /// What enters instead of `added` if a mirror refuses: of `removed`, what the guest did not ask to be gone.
    pub(crate) fallback: &'a [Mapping],
}

impl DomainInner {
    /// Bumps the version around `publish`, so that a reader of several mappings sees that they changed.
    #[inline]
    pub(crate) fn publish<R>(&self, publish: impl FnOnce() -> R) -> R {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        let result = publish();
        self.version.store(version.wrapping_add(2), Ordering::Release);
        result
    }

    /// Adds one mapping where nobody listens.
    #[inline]
    pub(crate) fn insert_alone(&self, state: &mut DomainState, new: &Mapping) -> Result<(), StepErrorKind> {
        if let Err(cap) = self.claim(state, 1) {
            // As where somebody listens: what is wrong in itself is told before what is too much.
            return Err(if state.writer.is_taken_in(new.range) { state.overlap(new) } else { cap });
        }
        let outcome = self.publish(|| state.writer.insert(new));
        outcome.map_err(|error| {
            self.totals.give_back(1);
            match error {
                InsertError::NoMemory => StepErrorKind::Cap(Cap::TableBytes),
                InsertError::Overlap => state.overlap(new),
            }
        })
    }

    /// Removes what is inside `range` where nobody listens, and says how much that was.
    #[inline]
    pub(crate) fn remove_alone(
        &self,
        state: &mut DomainState,
        range: IovaRange,
    ) -> Result<usize, StepErrorKind> {
        let count = match self.publish(|| state.writer.remove_all_in(range)) {
            Ok(count) => count,
            Err(_) => return Err(state.cut(range)),
        };
        self.totals.give_back(count as u64);
        Ok(count)
    }

    /// Removes all that is inside `range`, which cuts nothing or is refused, and tells everyone.
    pub(crate) fn remove_all(
        &self,
        state: &mut DomainState,
        range: IovaRange,
        lazy: bool,
        done: &mut Completion,
    ) -> Result<usize, StepErrorKind> {
        let mut removed = core::mem::take(&mut state.removed);
        let outcome = self.publish(|| state.writer.remove(range, |m| removed.push(m)));
        if let (Some(first), Some(last)) = (removed.first(), removed.last()) {
            // Nothing else is mapped in between: it was inside the range too.
            let spans = [first.range.hull(last.range)];
            self.totals.give_back(removed.len() as u64);
            let plan = Plan { removed: &removed, spans: &spans, ..Plan::default() };
            self.deliver_removals(state, &plan, done);
            state.commit(done);
            self.note_removal(&mut state.gone, &spans, lazy, done);
            self.tell_observers(state, &removed, &[]);
        }
        removed.clear();
        removed.shrink_to(SCRATCH);
        state.removed = removed;
        outcome.map_err(|_| state.cut(range))
    }

    pub(crate) fn claim(&self, state: &DomainState, count: u64) -> Result<(), StepErrorKind> {
        if state.limit.is_some_and(|limit| (state.writer.len() as u64).saturating_add(count) > limit) {
            return Err(StepErrorKind::Cap(Cap::DomainMappings));
        }
        if self.totals.claim(count) { Ok(()) } else { Err(StepErrorKind::Cap(Cap::Mappings)) }
    }

    /// `ranges` are gone here: `done` waits for who may still use them, if anybody does. `lazy`: that is asked later,
    /// once for several steps, by [`settle`](Self::settle).
    #[inline]
    pub(crate) fn note_removal(
        &self,
        gone: &mut Vec<IovaRange>,
        ranges: &[IovaRange],
        lazy: bool,
        done: &mut Completion,
    ) {
        if !lazy {
            return self.wait_for_users(ranges, done);
        }
        for range in ranges {
            if gone.len() < RANGES {
                gone.push(*range);
            } else if let Some(hull) = gone.first_mut() {
                *hull = hull.hull(*range);
            }
        }
    }

    /// Ends a series of lazy steps: `done` waits for who may still use what they removed.
    pub(crate) fn settle(&self, state: &mut DomainState, done: &mut Completion) {
        if !state.gone.is_empty() {
            self.wait_for_users(&state.gone, done);
            state.gone.clear();
        }
    }

    #[inline]
    fn wait_for_users(&self, ranges: &[IovaRange], done: &mut Completion) {
        if done.is_ready() && self.readers.is_unused(ranges) {
            return;
        }
        done.add_removal(&self.readers, None, ranges);
        self.readers.leases.meeting(ranges, None).iter().for_each(|lent| lent.revoke());
    }

    /// Makes `plan` true. On an error the record holds `fallback` and every mirror holds the same, or is fenced.
    pub(crate) fn apply(
        &self,
        state: &mut DomainState,
        plan: &Plan<'_>,
        lazy: bool,
        done: &mut Completion,
    ) -> Result<(), StepErrorKind> {
        let grown =
            (plan.added.len().max(plan.fallback.len()) as u64).saturating_sub(plan.removed.len() as u64);
        self.claim(state, grown)?;
        // Claimed: the growth. What is left over is given back below, when it is known what really came.
        let give_back = |now: usize| {
            let claimed = (plan.removed.len() as u64).saturating_add(grown);
            self.totals.give_back(claimed.saturating_sub(now as u64));
        };
        if let Err(kind) = self.check_and_reserve(state, plan, done) {
            self.totals.give_back(grown);
            return Err(kind);
        }
        if !plan.removed.is_empty() {
            self.publish(|| {
                for m in plan.removed {
                    let gone = state.writer.remove_all_in(m.range);
                    debug_assert_eq!(gone, Ok(1));
                }
            });
            self.deliver_removals(state, plan, done);
        }
        let refused = self.deliver_additions(state, plan, done);
        let now = if refused.is_ok() { plan.added } else { plan.fallback };
        self.publish(|| {
            for m in now {
                let there = state.writer.insert(m);
                debug_assert_eq!(there, Ok(()), "reserved and free");
            }
        });
        state.writer.give_up();
        give_back(now.len());
        state.commit(done);
        if !plan.removed.is_empty() {
            self.note_removal(&mut state.gone, plan.spans, lazy, done);
        }
        self.tell_observers(state, plan.removed, now);
        refused
    }

    fn check_and_reserve(
        &self,
        state: &mut DomainState,
        plan: &Plan<'_>,
        done: &mut Completion,
    ) -> Result<(), StepErrorKind> {
        if plan.added.is_empty() {
            return Ok(());
        }
        let reserved = if plan.fallback.is_empty() || plan.fallback == plan.added {
            state.writer.reserve(plan.added)
        } else {
            // Either of the two will be inserted.
            state.writer.reserve(&[plan.added, plan.fallback].concat())
        };
        reserved.map_err(|_| StepErrorKind::Cap(Cap::TableBytes))?;
        // Last: it fences where it cannot refuse.
        if !state.seats.mirrors.is_empty() {
            let outcome = self.check_reach(state, plan, done);
            if outcome.is_err() {
                state.writer.give_up();
            }
            return outcome;
        }
        Ok(())
    }

    /// Everything that a mirror can be known to refuse is refused here, before anything is published. Where the guest
    /// cannot be refused, the mirror is fenced instead.
    fn check_reach(
        &self,
        state: &mut DomainState,
        plan: &Plan<'_>,
        done: &mut Completion,
    ) -> Result<(), StepErrorKind> {
        let refusable = state.refusable && plan.added != plan.fallback;
        let DomainState { seats, memory, pieces, .. } = state;
        let mut removed = Vec::new();
        plan.removed.iter().for_each(|m| backed(memory, m, &mut |piece| removed.push(*piece)));
        pieces.clear();
        plan.added.iter().for_each(|m| backed(memory, m, &mut |piece| pieces.push(*piece)));
        for seat in seats.mirrors.iter_mut().filter(|seat| seat.is_live()) {
            let fewer = seat.count(&removed);
            if let Err((why, range)) = seat.check(pieces, fewer) {
                let kind = StepErrorKind::Unreachable { subscription: seat.sub.id(), why, range };
                if refusable {
                    return Err(kind);
                }
                // The removals of this step are still ahead: a fenced mirror needs none of them. If the fence fails the
                // step waits for one that holds, but all others lose what is removed.
                self.fence_seat(seat, &kind.to_string(), done);
            }
        }
        Ok(())
    }

    /// Caches and mirrors lose what has been removed. They cannot refuse: who fails is fenced.
    pub(crate) fn deliver_removals(&self, state: &mut DomainState, plan: &Plan<'_>, done: &mut Completion) {
        self.tell_caches(state, plan.spans, done);
        let DomainState { seats, memory, pieces, dirty, .. } = state;
        if seats.mirrors.is_empty() {
            return;
        }
        let _callback = CallbackScope::enter();
        let mut rest = plan.removed;
        for span in plan.spans {
            let inside = rest.partition_point(|m| m.range.last() <= span.last());
            let (here, later) = rest.split_at(inside);
            rest = later;
            pieces.clear();
            here.iter().for_each(|m| backed(memory, m, &mut |piece| pieces.push(*piece)));
            for seat in seats.mirrors.iter_mut().filter(|seat| seat.is_live()) {
                let outcome = if seat.lens.reach.replace && !plan.added.is_empty() {
                    exchange::remove_unpaired(seat, memory, plan, here, done, dirty)
                } else {
                    seat.remove(pieces, done, dirty)
                };
                if let Err(failure) = outcome {
                    self.fence_seat(seat, &failure, done);
                }
            }
        }
        pieces.clear();
        pieces.shrink_to(SCRATCH);
    }

    /// Mirrors get what is added, all or none of it; if none, they get the fallback.
    fn deliver_additions(
        &self,
        state: &mut DomainState,
        plan: &Plan<'_>,
        done: &mut Completion,
    ) -> Result<(), StepErrorKind> {
        if plan.added.is_empty() || state.seats.mirrors.is_empty() {
            return Ok(());
        }
        let _callback = CallbackScope::enter();
        // Rests of what an unmap cut: the removal stands, so who cannot hold them is fenced.
        let refusable = state.refusable && plan.added != plan.fallback;
        let mut pieces = core::mem::take(&mut state.pieces);
        pieces.clear();
        plan.added.iter().for_each(|m| backed(&state.memory, m, &mut |piece| pieces.push(*piece)));
        let mut refusal = None;
        for (at, seat) in state.seats.mirrors.iter_mut().enumerate().filter(|(_, seat)| seat.is_live()) {
            plan.added.iter().for_each(|m| seat.stretch(m));
            let mut nth = 0;
            let outcome = if seat.lens.reach.replace && !plan.removed.is_empty() {
                exchange::add_all(seat, &state.memory, plan, done, &mut state.dirty)
            } else {
                pieces.iter().try_for_each(|piece| {
                    seat.add(piece, done)?;
                    nth += 1;
                    Ok(())
                })
            };
            let Err(error) = outcome else { continue };
            match *error {
                AddError::Fence(failure) => self.fence_seat(seat, &failure, done),
                AddError::Refused(refused) => {
                    let kind = StepErrorKind::Refused { subscription: seat.sub.id(), refused: *refused };
                    if refusable {
                        refusal = Some((at, nth, kind));
                        break;
                    }
                    self.fence_seat(seat, &kind.to_string(), done);
                }
            }
        }
        let outcome = match refusal {
            None => Ok(()),
            Some((at, nth, kind)) => {
                self.undo(state, plan, &pieces, (at, nth), done);
                self.fall_back(state, plan, done);
                Err(kind)
            }
        };
        pieces.clear();
        pieces.shrink_to(SCRATCH);
        state.pieces = pieces;
        outcome
    }

    /// Takes back what mirrors before `at` got of `pieces`, and the first `nth` of the mirror at `at`.
    pub(crate) fn undo(
        &self,
        state: &mut DomainState,
        plan: &Plan<'_>,
        pieces: &[Mapping],
        (at, nth): (usize, usize),
        done: &mut Completion,
    ) {
        for (k, seat) in state.seats.mirrors.iter_mut().enumerate().take(at.saturating_add(1)) {
            if seat.lens.reach.replace && !plan.removed.is_empty() {
                if let Err(failure) = exchange::undo(seat, &state.memory, done, &mut state.dirty) {
                    self.fence_seat(seat, &failure, done);
                }
                continue;
            }
            let got = if k == at { pieces.get(..nth).unwrap_or_default() } else { pieces };
            // One by one: other mappings may lie between them.
            for piece in got {
                if !seat.is_live() {
                    break;
                }
                if let Err(failure) = seat.remove(core::slice::from_ref(piece), done, &mut state.dirty) {
                    self.fence_seat(seat, &failure, done);
                }
            }
        }
    }

    /// Gives all mirrors what goes back into the record. Who refuses what it held before is fenced.
    fn fall_back(&self, state: &mut DomainState, plan: &Plan<'_>, done: &mut Completion) {
        let memory = state.memory.clone();
        for seat in state.seats.mirrors.iter_mut().filter(|seat| seat.is_live()) {
            // Kept for an exchange that does not come, and gone for the guest.
            if let Err(failure) = exchange::drop_kept(seat, &memory, plan, done, &mut state.dirty) {
                self.fence_seat(seat, &failure, done);
            }
        }
        for m in plan.fallback {
            for seat in state.seats.mirrors.iter_mut().filter(|seat| !seat.still_holds(m)) {
                seat.stretch(m);
                let mut failure = None;
                backed(&memory, m, &mut |piece| {
                    if seat.is_live() && failure.is_none() {
                        failure = seat.add(piece, done).err();
                    }
                });
                if let Some(failure) = failure {
                    self.fence_seat(seat, &format!("could not restore {}: {failure:?}", m.range), done);
                }
            }
        }
    }

    /// Cuts a mirror off. If that fails the embedder hears of it, and neither this step completes nor a later one that
    /// removes anything here, until it is cut off after all.
    pub(crate) fn fence_seat(&self, seat: &mut MirrorSeat, why: &str, done: &mut Completion) {
        if !seat.fence_and_tell(why) {
            seat.sub.hold(&self.readers);
            seat.sub.await_cut(done);
        }
    }

    #[inline]
    pub(crate) fn tell_observers(&self, state: &mut DomainState, removed: &[Mapping], added: &[Mapping]) {
        if !state.seats.observers.is_empty() {
            self.tell_changes(state, removed, added);
        }
    }

    fn tell_changes(&self, state: &mut DomainState, removed: &[Mapping], added: &[Mapping]) {
        let _callback = CallbackScope::enter();
        for change in Changes::new(removed, added) {
            for seat in &mut state.seats.observers {
                seat.tell(self.space, &change);
            }
        }
    }
}

impl DomainState {
    /// Ends the step at every mirror that has batches.
    pub(crate) fn commit(&mut self, done: &mut Completion) {
        for seat in &mut self.seats.mirrors {
            seat.commit(done);
        }
    }

    #[cold]
    pub(crate) fn overlap(&self, new: &Mapping) -> StepErrorKind {
        let existing = self.writer.next(new.range.start()).map_or(new.range, |m| m.range);
        StepErrorKind::Overlap { range: new.range, existing }
    }

    #[cold]
    pub(crate) fn cut(&self, range: IovaRange) -> StepErrorKind {
        let at = |iova| self.writer.next(iova).filter(|m| m.range.contains(iova) && !range.covers(m.range));
        let existing = at(range.start()).or_else(|| at(range.last())).map_or(range, |m| m.range);
        StepErrorKind::Cut { range, existing }
    }

    /// The first region of an endpoint here that `range` meets.
    #[inline]
    pub(crate) fn region_in(&self, range: IovaRange) -> Result<(), StepErrorKind> {
        match self.regions.iter().find(|(_, r)| r.range.overlaps(range)) {
            None => Ok(()),
            Some((endpoint, region)) => {
                Err(StepErrorKind::Reserved { range, region: region.range, endpoint: *endpoint })
            }
        }
    }
}

/// Merges what left and what came into changes, ascending by address: removals over a range before additions there.
struct Changes<'a> {
    removed: core::iter::Peekable<core::slice::Iter<'a, Mapping>>,
    added: core::iter::Peekable<core::slice::Iter<'a, Mapping>>,
}

impl<'a> Changes<'a> {
    fn new(removed: &'a [Mapping], added: &'a [Mapping]) -> Self {
        Self { removed: removed.iter().peekable(), added: added.iter().peekable() }
    }
}

impl Iterator for Changes<'_> {
    type Item = Change;

    fn next(&mut self) -> Option<Change> {
        match (self.removed.peek().copied(), self.added.peek().copied()) {
            (Some(old), Some(new)) if old.range == new.range => {
                self.removed.next();
                self.added.next();
                if old == new { self.next() } else { Some(Change::Replace { old: *old, new: *new }) }
            }
            (Some(old), new) if new.is_none_or(|new| old.range.start() <= new.range.last()) => {
                self.removed.next();
                Some(Change::Unmap { old: *old })
            }
            (_, Some(new)) => {
                self.added.next();
                Some(Change::Map { new: *new })
            }
            (Some(old), None) => {
                self.removed.next();
                Some(Change::Unmap { old: *old })
            }
            (None, None) => None,
        }
    }
}
