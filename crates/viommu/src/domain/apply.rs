//! One step: plan (made by the caller), check and reserve, publish removals, deliver removals, deliver additions,
//! publish additions, observers (L6). With its undo (L3).

use crate::addr::IovaRange;
use crate::backing::Memory;
use crate::change::Change;
use crate::deliver::backed;
use crate::deliver::mirror::{AddError, MirrorSeat};
use crate::domain::inner::{DomainInner, DomainState};
use crate::domain::{SCRATCH, exchange};
use crate::error::{Cap, StepErrorKind};
use crate::mapping::Mapping;
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::CallbackScope;
use crate::sync::{Ordering, fence};
use crate::table::{InsertError, PAGE};

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
    fn publish<R>(&self, publish: impl FnOnce() -> R) -> R {
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
        self.claim(state, 1)?;
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

    /// Adds one mapping, and tells everyone.
    pub(crate) fn add_one(
        &self,
        state: &mut DomainState,
        new: &Mapping,
        done: &mut Completion,
    ) -> Result<(), StepErrorKind> {
        let added = core::slice::from_ref(new);
        let plan = Plan { added, ..Plan::default() };
        // Where its leaf has its place already and the memory behind it is of one piece, nothing is looked up twice.
        let is_simple = !new.access.is_empty() && state.memory.is_ram_behind(new);
        let Some(vacancy) = state.writer.vacancy(new.range).filter(|_| is_simple) else {
            if state.writer.is_taken_in(new.range) {
                return Err(state.overlap(new));
            }
            return self.apply(state, &plan, true, done);
        };
        self.claim(state, 1)?;
        let outcome = match self.check_pieces(state, &plan, added, &[], done) {
            Ok(()) => self.give(state, &plan, added, done),
            refused => refused,
        };
        if outcome.is_ok() {
            self.publish(|| state.writer.fill_vacancy(vacancy, new));
        } else {
            self.totals.give_back(1);
        }
        state.commit(done);
        self.tell_observers(state, &[], if outcome.is_ok() { added } else { &[] });
        outcome
    }

    /// Removes all that is inside `range`, which cuts nothing or is refused, and tells everyone.
    pub(crate) fn remove_all(
        &self,
        state: &mut DomainState,
        range: IovaRange,
        lazy: bool,
        done: &mut Completion,
    ) -> Result<usize, StepErrorKind> {
        if range.bytes() == PAGE.into() {
            let Ok(gone) = self.publish(|| state.writer.remove_page(range)) else {
                return Err(state.cut(range));
            };
            let Some(gone) = gone else { return Ok(0) };
            self.tell_removed(state, &[gone], lazy, done);
            return Ok(1);
        }
        let mut removed = core::mem::take(&mut state.removed);
        let outcome = self.publish(|| state.writer.remove(range, |m| removed.push(m)));
        self.tell_removed(state, &removed, lazy, done);
        removed.clear();
        removed.shrink_to(SCRATCH);
        state.removed = removed;
        outcome.map_err(|_| state.cut(range))
    }

    /// Tells everyone of mappings that have been removed, with nothing left mapped between them.
    #[inline]
    fn tell_removed(&self, state: &mut DomainState, removed: &[Mapping], lazy: bool, done: &mut Completion) {
        let (Some(first), Some(last)) = (removed.first(), removed.last()) else { return };
        let spans = [first.range.hull(last.range)];
        self.totals.give_back(removed.len() as u64);
        let plan = Plan { removed, spans: &spans, ..Plan::default() };
        self.tell_caches(state, &spans, done);
        self.take(state, &plan, removed, done);
        state.commit(done);
        self.note_removal(&spans, lazy, done);
        self.tell_observers(state, removed, &[]);
    }

    fn claim(&self, state: &DomainState, count: u64) -> Result<(), StepErrorKind> {
        if state.limit.is_some_and(|limit| (state.writer.len() as u64).saturating_add(count) > limit) {
            return Err(StepErrorKind::Cap(Cap::DomainMappings));
        }
        if self.totals.claim(count) { Ok(()) } else { Err(StepErrorKind::Cap(Cap::Mappings)) }
    }

    /// `ranges` are gone here: `done` waits for who may still use them. Unless the readers are to be read later, for
    /// several steps at once (`lazy`), nothing is waited for where nobody is inside.
    #[inline]
    pub(crate) fn note_removal(&self, ranges: &[IovaRange], lazy: bool, done: &mut Completion) {
        if !lazy && done.is_ready() && self.readers.is_unused(ranges) {
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
            self.note_removal(plan.spans, lazy, done);
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
        if state.seats.mirrors.is_empty() {
            return Ok(());
        }
        let (mut removed, mut added) = (Vec::new(), core::mem::take(&mut state.pieces));
        plan.removed.iter().for_each(|m| backed(&state.memory, m, &mut |piece| removed.push(*piece)));
        added.clear();
        plan.added.iter().for_each(|m| backed(&state.memory, m, &mut |piece| added.push(*piece)));
        // Last: it fences where it cannot refuse.
        let outcome = self.check_pieces(state, plan, &added, &removed, done);
        state.pieces = added;
        if outcome.is_err() {
            state.writer.give_up();
        }
        outcome
    }

    /// Everything that a mirror can be known to refuse is refused here, before anything is published. Where the guest
    /// cannot be refused, the mirror is fenced instead.
    /// `added` and `removed`: what is backed of that.
    #[inline]
    fn check_pieces(
        &self,
        state: &mut DomainState,
        plan: &Plan<'_>,
        added: &[Mapping],
        removed: &[Mapping],
        done: &mut Completion,
    ) -> Result<(), StepErrorKind> {
        for seat in &mut state.seats.mirrors {
            let fewer = seat.count(removed);
            if let Err((why, range)) = seat.check(added, fewer) {
                let kind = StepErrorKind::Unreachable { subscription: seat.sub.id(), why, range };
                if state.refusable && plan.added != plan.fallback {
                    return Err(kind);
                }
                // The removals of this step are still ahead: a fenced mirror needs none of them. If the fence fails the
                // step never completes, but all others lose what is removed.
                self.fence_seat(seat, &kind.to_string(), done);
            }
        }
        Ok(())
    }

    /// Caches and mirrors lose what has been removed. They cannot refuse: who fails is fenced.
    fn deliver_removals(&self, state: &mut DomainState, plan: &Plan<'_>, done: &mut Completion) {
        self.tell_caches(state, plan.spans, done);
        if state.seats.mirrors.is_empty() {
            return;
        }
        let mut rest = plan.removed;
        for span in plan.spans {
            let inside = rest.partition_point(|m| m.range.last() <= span.last());
            let (here, later) = rest.split_at(inside);
            rest = later;
            self.take(state, plan, here, done);
        }
    }

    /// Mirrors lose those of the removed mappings that are `here`, with nothing left mapped between them.
    #[inline]
    fn take(&self, state: &mut DomainState, plan: &Plan<'_>, here: &[Mapping], done: &mut Completion) {
        let DomainState { seats, memory, pieces: scratch, dirty, .. } = state;
        let _callback = CallbackScope::enter();
        let pieces = pieces_of(here, memory, scratch);
        for seat in &mut seats.mirrors {
            let outcome = if seat.is_direct() {
                seat.remove(pieces, done, dirty)
            } else if !seat.is_live() {
                continue;
            } else if seat.lens.reach.replace && !plan.added.is_empty() {
                exchange::remove_unpaired(seat, memory, plan, here, done, dirty)
            } else {
                seat.remove(pieces, done, dirty)
            };
            if let Err(failure) = outcome {
                self.fence_seat(seat, &failure, done);
            }
        }
        scratch.shrink_to(SCRATCH);
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
        let mut scratch = core::mem::take(&mut state.pieces);
        let pieces = pieces_of(plan.added, &state.memory, &mut scratch);
        let outcome = self.give(state, plan, pieces, done);
        scratch.shrink_to(SCRATCH);
        state.pieces = scratch;
        outcome
    }

    /// `pieces`: what is backed of all that is added.
    #[inline]
    fn give(
        &self,
        state: &mut DomainState,
        plan: &Plan<'_>,
        pieces: &[Mapping],
        done: &mut Completion,
    ) -> Result<(), StepErrorKind> {
        let _callback = CallbackScope::enter();
        for at in 0..state.seats.mirrors.len() {
            let DomainState { seats, memory, dirty, .. } = &mut *state;
            let Some(seat) = seats.mirrors.get_mut(at) else { continue };
            let mut nth = 0;
            let mut add_all = |seat: &mut MirrorSeat, done: &mut Completion| {
                pieces.iter().try_for_each(|piece| {
                    seat.add(piece, done)?;
                    nth += 1;
                    Ok(())
                })
            };
            let outcome = if seat.is_direct() {
                add_all(seat, done)
            } else if !seat.is_live() {
                continue;
            } else {
                plan.added.iter().for_each(|m| seat.stretch(m));
                if seat.lens.reach.replace && !plan.removed.is_empty() {
                    exchange::add_all(seat, memory, plan, done, dirty)
                } else {
                    add_all(seat, done)
                }
            };
            if let Err(error) = outcome {
                self.not_added(state, plan, pieces, (at, nth), *error, done)?;
            }
        }
        Ok(())
    }

    /// The mirror at `at` got the first `nth` of `pieces` and no more. It is fenced, or the step is refused, and all that
    /// it added is taken back.
    #[cold]
    fn not_added(
        &self,
        state: &mut DomainState,
        plan: &Plan<'_>,
        pieces: &[Mapping],
        (at, nth): (usize, usize),
        error: AddError,
        done: &mut Completion,
    ) -> Result<(), StepErrorKind> {
        // Rests of what an unmap cut: the removal stands, so who cannot hold them is fenced.
        let refusable = state.refusable && plan.added != plan.fallback;
        let Some(seat) = state.seats.mirrors.get_mut(at) else { return Ok(()) };
        match error {
            AddError::Fence(failure) => self.fence_seat(seat, &failure, done),
            AddError::Refused(refused) => {
                let kind = StepErrorKind::Refused { subscription: seat.sub.id(), refused };
                if refusable {
                    self.undo(state, plan, pieces, (at, nth), done);
                    self.fall_back(state, plan, done);
                    return Err(kind);
                }
                self.fence_seat(seat, &kind.to_string(), done);
            }
        }
        Ok(())
    }

    /// Takes back what mirrors before `at` got of `pieces`, and the first `nth` of the mirror at `at`.
    fn undo(
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

    /// Cuts a mirror off. If that fails the step never completes, and the embedder hears of it.
    pub(crate) fn fence_seat(&self, seat: &mut MirrorSeat, why: &str, done: &mut Completion) {
        if !seat.fence_and_tell(why) {
            done.set_stuck();
        }
    }

    #[inline]
    fn tell_observers(&self, state: &mut DomainState, removed: &[Mapping], added: &[Mapping]) {
        if state.seats.observers.is_empty() {
            return;
        }
        let _callback = CallbackScope::enter();
        for change in Changes::new(removed, added) {
            for seat in &mut state.seats.observers {
                seat.tell(self.space, &change);
            }
        }
    }
}

/// What is backed of `mappings`: they themselves, where that is one in one piece of memory, else what is put into `scratch`.
#[inline]
fn pieces_of<'a>(mappings: &'a [Mapping], memory: &Memory, scratch: &'a mut Vec<Mapping>) -> &'a [Mapping] {
    match mappings {
        [one] if !one.access.is_empty() && memory.is_ram_behind(one) => mappings,
        _ => {
            scratch.clear();
            mappings.iter().for_each(|m| backed(memory, m, &mut |piece| scratch.push(*piece)));
            scratch
        }
    }
}

impl DomainState {
    /// Ends the step at every mirror that has batches.
    #[inline]
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
