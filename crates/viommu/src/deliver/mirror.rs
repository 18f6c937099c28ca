//! A mirror in its place: what it can hold of the record, and the calls that bring it there.

use crate::ack::Ack;
use crate::addr::{Iova, IovaRange};
use crate::deliver::lens::Lens;
use crate::deliver::{Counts, FENCED_AGAIN, Sub};
use crate::domain::SCRATCH;
use crate::domain::dirty::{DirtyLog, note_dirty};
use crate::mapping::{Mapping, Target};
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::CallbackScope;
use crate::quiesce::space::Space;
use crate::subscribe::{FenceFailed, Interest, Mirror, Reach, RefusalKind, Refused, Unmapped, Unreachable};
use crate::sync::Arc;

/// A mirror that hangs on a domain (with its endpoint, or by itself), or that is parked at a blocked endpoint.
///
/// It keeps no list of what the mirror holds: that is always what its lens shows of the record.
pub(crate) struct MirrorSeat {
    pub(crate) sub: Arc<Sub>,
    /// What it can be given.
    pub(crate) lens: Lens,
    pub(crate) counts: Counts,
    /// Which binding made it, if one did.
    pub(crate) binding: Option<u64>,
    mirror: Box<dyn Mirror>,
    /// Below this address the mirror is up to date; `None`: everywhere. Never inside a mapping that it may be told of.
    cursor: Option<Iova>,
    in_step: bool,
    /// Not fenced. The same as the subscription's word for it, at hand.
    live: bool,
    way: Way,
    /// The most extents that it can hold.
    limit: u64,
    scratch: Vec<Mapping>,
    /// Where it is, or was last.
    space: Option<Arc<Space>>,
    /// Inside a step, of a mirror that replaces in place: what it has not lost, for the way back.
    pub(crate) swap: Swap,
}

/// Which way a step of one mapping, memory of one piece, may go to a mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// One call of `map` or `unmap`, and nothing is to be looked at but the number of extents.
    Direct,
    /// The same, but it has to be in reach, or the call to be in a batch. Most mirrors are so most of the time: alive and
    /// complete, with nothing to clip or to replace in place.
    InStep,
    /// Only as all other steps.
    Long,
}

/// What a step does in place at one mirror.
#[derive(Default)]
pub(crate) struct Swap {
    /// Old mappings that have a successor over the same range and were not unmapped.
    pub(crate) kept: Vec<Mapping>,
    /// Extents exchanged so far: old and new.
    pub(crate) exchanged: Vec<(Mapping, Mapping)>,
    /// Mappings added so far without an exchange.
    pub(crate) added: Vec<Mapping>,
}

/// Why a mirror must be fenced.
pub(crate) type Failure = Box<str>;

/// In a box: what hardly ever comes is not to be carried along.
pub(crate) type Added = Result<(), Box<AddError>>;

impl MirrorSeat {
    pub(crate) fn new(sub: Arc<Sub>, interest: Interest, mirror: Box<dyn Mirror>) -> Self {
        let reach = {
            let _callback = CallbackScope::enter();
            mirror.reach()
        };
        Self {
            sub,
            way: Way::Long,
            limit: 0,
            lens: Lens::new(interest, reach),
            counts: Counts::default(),
            binding: None,
            mirror,
            cursor: Some(Iova(0)),
            in_step: false,
            live: true,
            scratch: Vec::new(),
            space: None,
            swap: Swap::default(),
        }
    }

    /// Comes to an address space, holding nothing.
    pub(crate) fn arrive(&mut self, space: &Arc<Space>, clip_to: Option<Vec<IovaRange>>, refusable: bool) {
        self.space = Some(space.clone());
        self.lens.set_space(clip_to, refusable);
        self.advance(Some(Iova(0)));
    }

    /// The host can do something else from now on; the mirror holds nothing.
    pub(crate) fn set_reach(&mut self, reach: Reach) {
        self.lens.set_reach(reach);
        self.settle();
    }

    fn settle(&mut self) {
        let reach = &self.lens.reach;
        let is_ordinary = self.live && self.cursor.is_none() && self.lens.straight && !reach.replace;
        self.way = match is_ordinary {
            true if self.lens.plain && !reach.batches => Way::Direct,
            true => Way::InStep,
            false => Way::Long,
        };
        self.limit = reach.entries.map_or(u64::MAX, u64::from);
    }

    #[inline]
    pub(crate) fn way(&self) -> Way {
        self.way
    }

    /// Whether steps in `range` are anything to it.
    #[inline]
    pub(crate) fn hears_in(&self, range: IovaRange) -> bool {
        self.live && self.lens.interest.window.overlaps(range)
    }

    /// Whether adding `m`, which is memory of one piece, is one call that it cannot be known to refuse, or no call.
    #[inline]
    pub(crate) fn can_take_as_it_is(&self, m: &Mapping) -> bool {
        match self.way {
            Way::Direct => self.counts.held < self.limit,
            Way::InStep => self.can_hold(m),
            Way::Long => !self.hears_in(m.range),
        }
    }

    #[inline(never)]
    fn can_hold(&self, m: &Mapping) -> bool {
        self.counts.held < self.limit && self.lens.reach.refuses(m).is_none()
    }

    #[inline]
    pub(crate) fn is_live(&self) -> bool {
        self.live
    }

    /// Whether this step has left the old mapping in place here.
    #[inline]
    pub(crate) fn still_holds(&self, old: &Mapping) -> bool {
        self.swap.kept.contains(old)
    }

    /// Whether it holds all that it should.
    pub(crate) fn is_complete(&self) -> bool {
        self.cursor.is_none()
    }

    pub(crate) fn cursor(&self) -> Option<Iova> {
        self.cursor
    }

    /// Everything below `cursor` is delivered; `None`: everything.
    #[inline]
    pub(crate) fn advance(&mut self, cursor: Option<Iova>) {
        self.cursor = cursor;
        self.settle();
    }

    /// A step adds `mapping`. One that lies across the cursor is delivered whole, so the cursor moves behind it.
    #[inline]
    pub(crate) fn stretch(&mut self, mapping: &Mapping) {
        if self.cursor.is_some_and(|cursor| mapping.range.start() < cursor && cursor <= mapping.range.last())
        {
            self.advance(mapping.range.next());
        }
    }

    /// Whether the mapping is behind the cursor: delivered, or to be delivered by a step.
    #[inline]
    fn is_behind(&self, mapping: &Mapping) -> bool {
        self.cursor.is_none_or(|cursor| mapping.range.start() < cursor)
    }

    /// Whether it could hold `pieces` besides what it has, less `fewer` extents. Gives the extents it would add.
    pub(crate) fn check(&mut self, pieces: &[Mapping], fewer: u64) -> Result<(), (Unreachable, IovaRange)> {
        // Never more extents than pieces.
        if self.way == Way::Direct && self.has_room_for(pieces.len(), fewer) || !self.lens.sees(pieces) {
            return Ok(());
        }
        let mut extents = core::mem::take(&mut self.scratch);
        extents.clear();
        pieces.iter().filter(|p| self.is_behind(p)).for_each(|p| self.lens.extents(p, &mut extents));
        let outcome = self.check_extents(&extents, fewer);
        self.scratch = extents;
        outcome
    }

    #[inline]
    fn has_room_for(&self, more: usize, fewer: u64) -> bool {
        self.counts.held.saturating_sub(fewer).saturating_add(more as u64) <= self.limit
    }

    fn check_extents(&self, extents: &[Mapping], fewer: u64) -> Result<(), (Unreachable, IovaRange)> {
        let unreachable = extents.iter().find_map(|e| Some((self.lens.reach.refuses(e)?, e.range)));
        let over = || Some((Unreachable::Entries, extents.last()?.range));
        let over = if self.has_room_for(extents.len(), fewer) { None } else { over() };
        unreachable.or(over).map_or(Ok(()), Err)
    }

    /// How many extents it holds of these backed pieces.
    pub(crate) fn count(&mut self, pieces: &[Mapping]) -> u64 {
        if self.limit == u64::MAX || pieces.is_empty() {
            return 0;
        }
        let mut extents = core::mem::take(&mut self.scratch);
        extents.clear();
        pieces.iter().filter(|p| self.is_behind(p)).for_each(|p| self.lens.extents(p, &mut extents));
        let count = extents.len() as u64;
        self.scratch = extents;
        count
    }

    #[inline]
    fn begin(&mut self) {
        if self.lens.reach.batches && !self.in_step {
            self.in_step = true;
            self.mirror.begin();
        }
    }

    /// Ends the step here, if it has begun here.
    pub(crate) fn commit(&mut self, done: &mut Completion) {
        if self.lens.reach.replace {
            self.swap = Swap::default();
        }
        if self.in_step {
            self.in_step = false;
            let ack = {
                let _callback = CallbackScope::enter();
                self.mirror.commit()
            };
            self.note(ack, done);
        }
    }

    #[inline]
    fn note(&self, ack: Ack, done: &mut Completion) {
        if let Ack::Pending(waiting) = ack {
            done.add_ack(&self.sub, waiting, self.space.iter().cloned().collect());
        }
    }

    /// Gives it one backed piece.
    ///
    /// # Errors
    /// Refused: what of this piece was added has been taken back, or else the failure says that it must be fenced.
    #[inline(always)]
    pub(crate) fn add(&mut self, piece: &Mapping, done: &mut Completion) -> Added {
        if self.lens.straight && piece.target == Target::Ram && self.is_behind(piece) {
            self.begin();
            return self.map_one(piece, done).map_err(|refused| AddError::refused(piece, refused));
        }
        self.add_clipped(piece, done)
    }

    #[inline(never)]
    fn add_clipped(&mut self, piece: &Mapping, done: &mut Completion) -> Added {
        if !self.lens.sees(core::slice::from_ref(piece)) || !self.is_behind(piece) {
            return Ok(());
        }
        let mut extents = core::mem::take(&mut self.scratch);
        extents.clear();
        self.lens.extents(piece, &mut extents);
        let mut outcome = Ok(());
        for (at, extent) in extents.iter().enumerate() {
            self.begin();
            outcome = self.map_one(extent, done).map_err(|refused| AddError::refused(extent, refused));
            if outcome.is_err() {
                for undo in extents.get(..at).unwrap_or_default() {
                    let undone = self.unmap_one(undo.range, core::slice::from_ref(undo), done, &mut None);
                    if let Err(failure) = undone {
                        outcome = Err(AddError::Fence(failure).into());
                    }
                }
                break;
            }
        }
        self.scratch = extents;
        outcome
    }

    /// Maps one extent as a part of a step, to be ended by [`commit`](Self::commit).
    #[inline(never)]
    pub(crate) fn map_in_step(
        &mut self,
        extent: &Mapping,
        done: &mut Completion,
    ) -> Result<(), Box<Refused>> {
        self.begin();
        self.map_one(extent, done)
    }

    /// Maps one extent.
    #[inline]
    pub(crate) fn map_one(&mut self, extent: &Mapping, done: &mut Completion) -> Result<(), Box<Refused>> {
        match self.mirror.map(extent) {
            Ok(ack) => {
                self.counts.map += 1;
                self.counts.held += 1;
                self.note(ack, done);
                Ok(())
            }
            Err(refused) => Err(self.not_mapped(refused)),
        }
    }

    #[cold]
    fn not_mapped(&mut self, refused: Refused) -> Box<Refused> {
        self.counts.refused += 1;
        refused.into()
    }

    /// What [`replace`](Self::replace) would give it of two backed pieces, if it is one extent for one over the same
    /// range. Only then may the old one stay until the new one comes: else it would hold more than a step counted.
    pub(crate) fn exchange(&self, old: &Mapping, new: &Mapping) -> Option<(Mapping, Mapping)> {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        self.lens.extents(old, &mut a);
        self.lens.extents(new, &mut b);
        match (a.as_slice(), b.as_slice()) {
            ([a], [b]) if a.range == b.range => Some((*a, *b)),
            _ => None,
        }
    }

    /// Exchanges one extent for another over the same range.
    pub(crate) fn replace(&mut self, (old, new): (&Mapping, &Mapping), done: &mut Completion) -> Added {
        self.begin();
        match self.mirror.replace(old, new) {
            Ok(ack) => {
                self.counts.replace += 1;
                self.note(ack, done);
                Ok(())
            }
            Err(refused) => {
                self.counts.refused += 1;
                Err(AddError::refused(old, refused.into()))
            }
        }
    }

    /// Takes away what it holds of these backed pieces. Where it unmaps wide, nothing else may be mapped between them.
    pub(crate) fn remove(
        &mut self,
        pieces: &[Mapping],
        done: &mut Completion,
        dirty: &mut Option<DirtyLog>,
    ) -> Result<(), Failure> {
        if !self.lens.sees(pieces) {
            return Ok(());
        }
        let as_they_are = self.lens.straight && self.cursor.is_none();
        if as_they_are && pieces.iter().all(|p| p.target == Target::Ram) {
            return self.remove_extents(pieces, done, dirty);
        }
        let mut extents = core::mem::take(&mut self.scratch);
        extents.clear();
        pieces.iter().filter(|p| self.is_behind(p)).for_each(|p| self.lens.extents(p, &mut extents));
        let outcome = self.remove_extents(&extents, done, dirty);
        extents.clear();
        extents.shrink_to(SCRATCH);
        self.scratch = extents;
        outcome
    }

    /// As a step of its own.
    #[inline(never)]
    pub(crate) fn remove_in_step(
        &mut self,
        pieces: &[Mapping],
        done: &mut Completion,
        dirty: &mut Option<DirtyLog>,
    ) -> Result<(), Failure> {
        self.remove(pieces, done, dirty)?;
        self.commit(done);
        Ok(())
    }

    fn remove_extents(
        &mut self,
        extents: &[Mapping],
        done: &mut Completion,
        dirty: &mut Option<DirtyLog>,
    ) -> Result<(), Failure> {
        let (Some(first), Some(last)) = (extents.first(), extents.last()) else { return Ok(()) };
        self.begin();
        if self.lens.reach.wide_unmap {
            return self.unmap_one(first.range.hull(last.range), extents, done, dirty);
        }
        let mut one_by_one = extents.iter().map(core::slice::from_ref);
        one_by_one.try_for_each(|one| self.unmap_one(one[0].range, one, done, dirty))
    }

    /// Unmaps `range`, in which it holds exactly `extents`.
    #[inline]
    pub(crate) fn unmap_one(
        &mut self,
        range: IovaRange,
        extents: &[Mapping],
        done: &mut Completion,
        log: &mut Option<DirtyLog>,
    ) -> Result<(), Failure> {
        self.counts.unmap += 1;
        // Looked at where it is: moving it costs more than the call.
        let mut outcome = self.mirror.unmap(range);
        match &mut outcome {
            Ok(Unmapped { bytes, dirty, ack }) => {
                let bytes = *bytes;
                if let Ack::Pending(_) = ack {
                    self.note(core::mem::replace(ack, Ack::Done), done);
                }
                self.counts.held = self.counts.held.saturating_sub(extents.len() as u64);
                let expected = extents.iter().map(|e| e.range.bytes()).sum();
                if bytes != expected {
                    return Err(removed_otherwise(range, bytes, expected));
                }
                if log.is_some() {
                    self.counts.dirty += note_dirty(log, extents, dirty.as_ref());
                }
                Ok(())
            }
            Err(refused) => Err(self.not_removed(range, refused)),
        }
    }

    #[cold]
    fn not_removed(&mut self, range: IovaRange, refused: &Refused) -> Failure {
        self.counts.refused += 1;
        format!("unmap of {range} failed: {refused}").into()
    }

    /// Cuts the device off.
    pub(crate) fn fence(&mut self) -> Result<(), FenceFailed> {
        self.live = false;
        self.in_step = false;
        self.settle();
        self.sub.set_fenced();
        let _callback = CallbackScope::enter();
        self.mirror.fence()
    }

    /// Cuts the device off, and tells the embedder. `false`: that failed.
    pub(crate) fn fence_and_tell(&mut self, why: &str) -> bool {
        if !self.live {
            return self.sub.is_cut_off();
        }
        let outcome = self.fence();
        self.sub.tell_fence(outcome, why)
    }

    /// Tries once more, after a fence that failed.
    pub(crate) fn fence_again(&mut self) {
        let outcome = self.fence();
        self.sub.tell_fence(outcome, FENCED_AGAIN);
    }

    /// What the mirror says it holds.
    pub(crate) fn held(&self) -> Vec<Mapping> {
        let _callback = CallbackScope::enter();
        self.mirror.held()
    }
}

#[cold]
fn removed_otherwise(range: IovaRange, bytes: u128, expected: u128) -> Failure {
    format!("unmap of {range} removed {bytes} bytes where {expected} were held").into()
}

impl AddError {
    fn refused(extent: &Mapping, refused: Box<Refused>) -> Box<Self> {
        let lost = |refused: &Refused| format!("{} is lost: {refused}", extent.range).into();
        match refused.kind {
            RefusalKind::Lost => Self::Fence(lost(&refused)).into(),
            _ => Self::Refused(refused).into(),
        }
    }
}

/// Why an addition did not happen.
#[derive(Debug)]
pub(crate) enum AddError {
    /// The mirror refused it; nothing of it is left.
    Refused(Box<Refused>),
    /// The mirror refused it and could not take back a part: it must be fenced.
    Fence(Failure),
}
