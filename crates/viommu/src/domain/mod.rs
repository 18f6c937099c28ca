//! Domains: what a model says, as steps on the record.

pub(crate) mod apply;
pub(crate) mod dirty;
mod exchange;
pub(crate) mod inner;
pub(crate) mod plan;
mod single;
pub(crate) mod sync;

use core::fmt;
use core::ops::ControlFlow;

use crate::addr::{GpaRange, Iova, IovaRange};
use crate::domain::dirty::{DirtyLog, GpaSet, mark};
use crate::domain::inner::{DomainInner, DomainState};
use crate::domain::plan::{Draft, Op};
use crate::error::{StepError, StepErrorKind};
use crate::mapping::Mapping;
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::{BurstScope, CallbackScope, StepScope};
use crate::subscribe::{DirtyBitmap, Space};
use crate::sync::{Arc, MutexGuard, lock};
use crate::table::PAGE;

pub use inner::Tables;
pub use sync::{Found, Progress, Walk};

/// Mappings that a scratch list keeps room for between steps.
pub(crate) const SCRATCH: usize = 1024;

/// One I/O address space of the guest: a set of disjoint mappings. A handle; clones name the same domain.
///
/// Every method that changes something is one *step*: atomic, and in one order for all subscribers. Steps of one
/// domain exclude each other, those of two domains do not. Ranges are inclusive and in bytes, aligned to the unit's
/// page. A step is over for the guest when its [`Completion`] has resolved.
#[derive(Clone)]
pub struct Domain(pub(crate) Arc<DomainInner>);

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Domain({})", self.0.space)
    }
}

impl Domain {
    /// Which address space it is.
    #[must_use]
    pub fn space(&self) -> Space {
        self.0.space
    }

    /// Mappings in the record.
    #[must_use]
    pub fn len(&self) -> usize {
        lock(&self.0.state).writer.len()
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The mapping that holds `from`, else the first behind it. Takes the domain's lock.
    #[must_use]
    pub fn next_mapping(&self, from: Iova) -> Option<Mapping> {
        lock(&self.0.state).writer.next(from)
    }

    /// Whether all of `range` has backing now, of whatever medium: for models whose guests may only map what is there.
    /// Takes the domain's lock.
    #[must_use]
    pub fn is_backed(&self, range: GpaRange) -> bool {
        lock(&self.0.state).memory.holds(range)
    }

    /// Visits every mapping that touches `range`, whole, in ascending order, under the domain's lock: `visit` must not
    /// call back into the domain. Returns early when it breaks.
    pub fn for_each(&self, range: IovaRange, mut visit: impl FnMut(Mapping) -> ControlFlow<()>) {
        let _scope = StepScope::enter();
        let state = lock(&self.0.state);
        let _callback = CallbackScope::enter();
        state.writer.for_each(range, &mut visit);
    }

    /// Adds a mapping where nothing is.
    ///
    /// # Errors
    /// See [`StepErrorKind`]: nothing has changed, or all that was added has been taken back.
    #[inline]
    pub fn map(&self, new: Mapping) -> Result<Completion, StepError> {
        self.one_step(|domain, state, done| domain.map_in(state, &new, done))
    }

    /// Removes every mapping inside `range`; one that is not there is no error. Where the tables are
    /// [`Tables::Owned`], a range that would cut a mapping is refused and removes nothing; elsewhere the parts outside
    /// stay mapped. The range may begin and end anywhere in a hole; inside a page that is mapped it would cut a mapping
    /// where none can be cut, and is refused everywhere.
    ///
    /// # Errors
    /// See [`StepErrorKind`]. A removal itself never fails: a mirror that cannot remove is fenced.
    #[inline]
    pub fn unmap(&self, range: IovaRange) -> Result<Completion, StepError> {
        self.one_step(|domain, state, done| {
            let count = domain.unmap_in(state, range, false, done)?;
            if count == 0 {
                domain.await_held(range, done);
            }
            Ok(())
        })
    }

    /// Whatever is mapped inside `new.range` becomes `new`; parts of mappings that stick out stay. An in-place change
    /// is an ordinary step: everyone hears of what was there before.
    ///
    /// # Errors
    /// See [`StepErrorKind`]. After a mirror's refusal what was there is there again.
    pub fn replace(&self, new: Mapping) -> Result<Completion, StepError> {
        self.one_step(|domain, state, done| {
            domain.check_mapping(state, &new)?;
            domain.run(state, &[Op::Assign(new.range, vec![new])], false, done)
        })
    }

    fn one_step(
        &self,
        step: impl FnOnce(&DomainInner, &mut DomainState, &mut Completion) -> Result<(), StepErrorKind>,
    ) -> Result<Completion, StepError> {
        let _scope = StepScope::enter().map_err(|_| StepErrorKind::InCallback)?;
        let mut done = Completion::ready();
        let outcome = {
            let mut state = lock(&self.0.state);
            self.0.alive(&state)?;
            step(&self.0, &mut state, &mut done)
        };
        match outcome {
            Ok(()) => Ok(done),
            Err(kind) => Err(StepError { kind, completion: done }),
        }
    }

    /// Several changes as one step: collect them, then [`Batch::commit`].
    pub fn batch(&self) -> Batch<'_> {
        Batch { domain: self, ops: Vec::new() }
    }

    /// Several steps under one taking of the domain's lock, with one [`Completion`] for all: for a burst of requests.
    /// Other threads' steps wait until it is dropped; another step on this thread is an error meanwhile.
    ///
    /// # Errors
    /// [`StepErrorKind::InCallback`], [`StepErrorKind::Gone`].
    pub fn burst(&self) -> Result<Burst<'_>, StepError> {
        let scope = StepScope::enter().map_err(|_| StepErrorKind::InCallback)?;
        let state = lock(&self.0.state);
        self.0.alive(&state)?;
        Ok(Burst {
            domain: &self.0,
            state,
            done: Completion::ready(),
            _alone: BurstScope::enter(),
            _scope: scope,
        })
    }

    /// Tells caches (mirrors have none of it) that anything inside `range` may have changed: a superset of what has.
    /// For tables in guest memory while no mirror listens; with a mirror it takes [`Domain::sync`].
    ///
    /// # Errors
    /// [`StepErrorKind::WrongKind`] while a mirror listens, or where the record is viommu's own.
    pub fn invalidate(&self, range: IovaRange) -> Result<Completion, StepError> {
        self.one_step(|domain, state, done| {
            if state.seats.mirrors.iter().any(|seat| seat.is_live()) {
                return Err(StepErrorKind::WrongKind("a mirror listens: it needs a sync of the range"));
            }
            if domain.walker.is_none() {
                return Err(StepErrorKind::WrongKind("the record is viommu's own: say what changed"));
            }
            // What a mirror that has left was told there is not known to be true any more.
            let outcome = domain.run(state, &[Op::Unmap(range)], true, done);
            domain.tell_caches(state, &[range], done);
            domain.note_removal(&mut state.gone, &[range], true, done);
            domain.settle(state, done);
            outcome
        })
    }

    /// Starts, or goes on with, remembering what devices wrote through mappings that are removed.
    pub fn dirty_start(&self) {
        lock(&self.0.state).dirty.get_or_insert_with(DirtyLog::default);
    }

    /// The guest physical addresses written through mappings removed since the start or the last call, ascending;
    /// `None` when tracking is off. What a host could not report counts as written.
    #[must_use]
    pub fn dirty_take(&self) -> Option<Vec<GpaRange>> {
        lock(&self.0.state).dirty.as_mut().map(|log| core::mem::take(log).0.ranges())
    }

    /// Ends tracking.
    pub fn dirty_stop(&self) {
        lock(&self.0.state).dirty = None;
    }

    /// The guest physical addresses that `bitmap` (by IOVA) says were written, through the mappings there are now.
    /// What was removed before is in [`Domain::dirty_take`], which must be called after this.
    #[must_use]
    pub fn dirty_gpas(&self, bitmap: &DirtyBitmap) -> Vec<GpaRange> {
        let bits = bitmap.words.len() as u64 * 64;
        let bytes = bits.saturating_mul(bitmap.page_size).max(1);
        let range = IovaRange::from_len(bitmap.start, bytes)
            .or_else(|| IovaRange::new(bitmap.start, Iova(u64::MAX)))
            .unwrap_or(IovaRange::ALL);
        let mut set = GpaSet::default();
        lock(&self.0.state).writer.for_each(range, &mut |m| {
            if m.access.contains(crate::mapping::Access::WRITE) {
                mark(bitmap, &m, &mut set);
            }
            ControlFlow::Continue(())
        });
        set.ranges()
    }

    /// Bytes of tables that this domain's record takes.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        lock(&self.0.state).writer.bytes()
    }
}

/// Several changes of one domain that become one step. Later ones see earlier ones.
#[must_use = "nothing happens before `commit`"]
pub struct Batch<'d> {
    domain: &'d Domain,
    ops: Vec<Op>,
}

impl Batch<'_> {
    /// Adds a mapping where nothing is.
    pub fn map(mut self, new: Mapping) -> Self {
        self.ops.push(Op::Map(new));
        self
    }

    /// Removes every mapping inside `range`, as [`Domain::unmap`]; here it must be made of whole pages.
    pub fn unmap(mut self, range: IovaRange) -> Self {
        self.ops.push(Op::Unmap(range));
        self
    }

    /// As [`Domain::replace`].
    pub fn replace(mut self, new: Mapping) -> Self {
        self.ops.push(Op::Assign(new.range, vec![new]));
        self
    }

    /// Makes all of it one step: what comes to the same in the end is no change at all.
    ///
    /// # Errors
    /// The first change that is refused; nothing has changed then. After a mirror's refusal what the batch unmapped is
    /// unmapped, what it replaced is there again, what it mapped is not.
    pub fn commit(self) -> Result<Completion, StepError> {
        self.domain.one_step(|domain, state, done| {
            for op in &self.ops {
                match op {
                    Op::Map(m) => domain.check_mapping(state, m)?,
                    Op::Unmap(range) => domain.check_range(*range)?,
                    Op::Assign(_, list) => list.iter().try_for_each(|m| domain.check_mapping(state, m))?,
                }
            }
            domain.run(state, &self.ops, false, done)
        })
    }
}

/// Several steps under one lock: see [`Domain::burst`].
pub struct Burst<'d> {
    domain: &'d DomainInner,
    // In the order in which they end: the lock first.
    state: MutexGuard<'d, DomainState>,
    done: Completion,
    _alone: BurstScope,
    _scope: StepScope,
}

impl Burst<'_> {
    /// As [`Domain::map`].
    ///
    /// # Errors
    /// As [`Domain::map`].
    #[inline]
    pub fn map(&mut self, new: Mapping) -> Result<(), StepErrorKind> {
        self.domain.map_in(&mut self.state, &new, &mut self.done)
    }

    /// As [`Domain::unmap`]; gives the number of mappings removed.
    ///
    /// # Errors
    /// As [`Domain::unmap`].
    #[inline]
    pub fn unmap(&mut self, range: IovaRange) -> Result<usize, StepErrorKind> {
        let count = self.domain.unmap_in(&mut self.state, range, true, &mut self.done)?;
        if count == 0 {
            self.domain.await_held(range, &mut self.done);
        }
        Ok(count)
    }

    /// As [`Domain::replace`].
    ///
    /// # Errors
    /// As [`Domain::replace`].
    pub fn replace(&mut self, new: Mapping) -> Result<(), StepErrorKind> {
        self.domain.check_mapping(&self.state, &new)?;
        self.domain.run(&mut self.state, &[Op::Assign(new.range, vec![new])], true, &mut self.done)
    }

    /// Ends the burst. Resolves when all of its steps are complete; the readers are read once for them.
    pub fn finish(mut self) -> Completion {
        self.domain.settle(&mut self.state, &mut self.done);
        core::mem::replace(&mut self.done, Completion::ready())
    }
}

impl Drop for Burst<'_> {
    /// Without [`Burst::finish`]: as a completion that is dropped.
    fn drop(&mut self) {
        self.domain.settle(&mut self.state, &mut self.done);
    }
}

impl DomainInner {
    #[inline]
    fn alive(&self, state: &DomainState) -> Result<(), StepErrorKind> {
        if state.dead { Err(StepErrorKind::Gone(self.space)) } else { Ok(()) }
    }

    #[inline]
    pub(crate) fn check_range(&self, range: IovaRange) -> Result<(), StepErrorKind> {
        if !range.is_aligned(self.page_size) {
            return Err(StepErrorKind::Unaligned { range, page_size: self.page_size });
        }
        Ok(())
    }

    #[inline]
    pub(crate) fn check_mapping(&self, state: &DomainState, m: &Mapping) -> Result<(), StepErrorKind> {
        let misaligned = m.gpa.0 & self.page_size.wrapping_sub(1) != 0;
        if misaligned || !m.range.is_aligned(self.page_size) {
            return Err(StepErrorKind::Unaligned { range: m.range, page_size: self.page_size });
        }
        let wraps = m.gpa.checked_add(m.range.last().0.wrapping_sub(m.range.start().0)).is_none();
        if wraps || !self.aperture.covers(m.range) {
            return Err(StepErrorKind::OutOfRange { range: m.range, aperture: self.aperture });
        }
        if state.regions.is_empty() { Ok(()) } else { state.region_in(m.range) }
    }

    #[inline]
    fn map_in(
        &self,
        state: &mut DomainState,
        new: &Mapping,
        done: &mut Completion,
    ) -> Result<(), StepErrorKind> {
        self.check_mapping(state, new)?;
        if !state.seats.any_in(new.range) {
            return self.insert_alone(state, new);
        }
        self.add_one(state, new, done)
    }

    #[inline]
    fn unmap_in(
        &self,
        state: &mut DomainState,
        range: IovaRange,
        lazy: bool,
        done: &mut Completion,
    ) -> Result<usize, StepErrorKind> {
        let range = match range.is_aligned(self.page_size) {
            true => range,
            false => match self.whole_pages(state, range)? {
                Some(range) => range,
                None => return Ok(0),
            },
        };
        if state.may_cut && state.writer.cuts(range) {
            let before = state.writer.len();
            self.run(state, &[Op::Unmap(range)], lazy, done)?;
            return Ok(before.saturating_sub(state.writer.len()).max(1));
        }
        if !state.seats.any_in(range) {
            let count = self.remove_alone(state, range)?;
            if count != 0 {
                self.note_removal(&mut state.gone, &[range], lazy, done);
            }
            return Ok(count);
        }
        if range.bytes() == PAGE.into() {
            return self.remove_one(state, range, lazy, done);
        }
        self.remove_all(state, range, lazy, done)
    }

    /// What is asked to be gone from `range` may be gone from the record already, and still be reached by a device that
    /// could not be cut off.
    #[cold]
    fn await_held(&self, range: IovaRange, done: &mut Completion) {
        if self.readers.leases.are_held() {
            done.add_removal(&self.readers, None, &[range]);
        }
    }

    /// The pages of which an unmap of `range` consists, if there are any: where it ends inside a page, nothing may be
    /// mapped.
    #[cold]
    fn whole_pages(&self, state: &DomainState, range: IovaRange) -> Result<Option<IovaRange>, StepErrorKind> {
        let (start, last, mask) = (range.start(), range.last(), self.page_size.wrapping_sub(1));
        let is_mapped = |at: Iova| state.writer.next(at).is_some_and(|m| m.range.contains(at));
        let (begins_inside, ends_inside) = (start.0 & mask != 0, last.0 & mask != mask);
        if begins_inside && is_mapped(start) || ends_inside && is_mapped(last) {
            return Err(state.cut(range));
        }
        let first = if begins_inside { Iova(start.0 | mask).checked_add(1) } else { Some(start) };
        let end = if ends_inside { (last.0 & !mask).checked_sub(1).map(Iova) } else { Some(last) };
        Ok(first.zip(end).and_then(|(first, end)| IovaRange::new(first, end)))
    }

    /// Plans and applies checked changes as one step.
    pub(crate) fn run(
        &self,
        state: &mut DomainState,
        ops: &[Op],
        lazy: bool,
        done: &mut Completion,
    ) -> Result<(), StepErrorKind> {
        let mut draft = Draft::default();
        for op in ops {
            draft.change(state, op)?;
        }
        for op in ops {
            if let Op::Unmap(range) = op {
                self.await_held(*range, done);
            }
        }
        let planned = draft.finish(&state.writer);
        if planned.is_empty() {
            return Ok(());
        }
        self.apply(state, &planned.plan(), lazy, done)
    }

    /// Tells the caches that asked for removals.
    pub(crate) fn tell_caches(&self, state: &DomainState, ranges: &[IovaRange], done: &mut Completion) {
        let _callback = CallbackScope::enter();
        for range in ranges {
            let caches = state.seats.caches.iter().filter(|cache| cache.hears_steps());
            caches.for_each(|cache| cache.invalidate(*range, &self.readers, done));
        }
    }
}
