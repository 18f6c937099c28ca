//! The data path: devices translate under guards.

use core::cell::Cell;
use core::fmt;
use core::marker::PhantomData;
use core::ops::Deref;

use crate::addr::{Gpa, Iova, IovaRange};
use crate::backing::Medium;
use crate::domain::inner::DomainInner;
use crate::endpoint::{EndpointId, EndpointShared, RegionKind, Sight};
use crate::mapping::{Access, Mapping, Target};
use crate::quiesce::scope::{CallbackScope, in_callback};
use crate::quiesce::slot::{Counted, Entry};
use crate::sync::{Arc, Ordering, fence, lock};
use crate::table::{Hit, PAGE};

/// What an address translates to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The target of the address asked for. For [`Place::Msi`], the address itself.
    pub gpa: Gpa,
    /// The last address (inclusive) up to which this answer goes on linearly. A mapping may go on behind it.
    pub last: Iova,
    /// All that the device may do there, whatever was asked.
    pub access: Access,
    /// What lies there.
    pub place: Place,
}

impl Translation {
    /// Bytes from `iova` (the address asked for) to the end of this answer, as far as they fit a `u64`.
    #[must_use]
    pub fn bytes_from(&self, iova: Iova) -> u64 {
        self.last.0.saturating_sub(iova.0).saturating_add(1)
    }

    /// Whether `next`, the answer for `at`, goes on linearly behind this one, the answer for `run`.
    fn goes_on(&self, run: Iova, at: Iova, next: &Self) -> bool {
        let gpa = self.gpa.0.checked_add(at.0.wrapping_sub(run.0));
        gpa == Some(next.gpa.0) && (self.access, self.place) == (next.access, next.place)
    }
}

/// What a translated address reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Memory.
    Ram,
    /// Memory that cannot be written.
    Rom,
    /// Device registers.
    Mmio,
    /// An MSI doorbell: the write is an interrupt.
    Msi,
}

/// An access that reaches nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} at {iova}: {reason}", Who(*endpoint))]
pub struct Fault {
    /// Whose access; `None` for one that a domain's own subscriber asked for.
    pub endpoint: Option<EndpointId>,
    /// The first address that could not be reached.
    pub iova: Iova,
    /// What was wanted.
    pub access: Access,
    /// Why not.
    pub reason: FaultReason,
}

struct Who(Option<EndpointId>);

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(id) => id.fmt(f),
            None => f.write_str("domain"),
        }
    }
}

/// Why an access faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum FaultReason {
    /// The endpoint is blocked: it is attached to nothing.
    #[error("not attached")]
    Blocked,
    /// Nothing is mapped there.
    #[error("not mapped")]
    Unmapped,
    /// The mapping, or the backing, does not allow the access.
    #[error("not permitted")]
    Permission,
    /// A reserved region, or a read of an MSI region.
    #[error("reserved")]
    Reserved,
    /// It is mapped to an address where the guest has nothing.
    #[error("no backing")]
    NoBacking,
    /// The device has been cut off: a mirror of it could not follow the record.
    #[error("fenced")]
    Fenced,
}

/// Hears of faults as devices run into them: a model's fault queue.
pub trait FaultSink: Send + Sync {
    /// Called on the device's thread, under its guard: must not block, wait or make a step.
    fn fault(&self, fault: &Fault);
}

/// Translates for a domain whose tables lie in guest memory, where no mirror keeps the record filled.
pub trait Walker: Send + Sync {
    /// The extent of the guest's tables (or of a model's IOTLB) that holds `iova`. May run on any thread, under a
    /// guard or a cache's lock; it must not make steps.
    fn walk(&self, iova: Iova) -> Option<Mapping>;
}

/// A device's way to translate: one for each worker and endpoint. Make it on the thread that uses it. A clone is
/// another reader of the same endpoint, with the same label.
pub struct Reader(Translator);

/// An extent of RAM. The last byte of one of 2^64 bytes is not in it, and takes the other way.
#[derive(Clone, Copy)]
struct Near {
    start: u64,
    bytes: u64,
}

impl Near {
    const NOWHERE: Self = Self { start: 0, bytes: 0 };
}

impl Reader {
    pub(crate) fn new(shared: &Arc<EndpointShared>, label: &str) -> Self {
        let entry = Entry::new(label, shared.id.map_or(EndpointId::NOBODY, EndpointId::key));
        shared.add_slot(entry.slot());
        let (seen, sight) = shared.sight();
        Self(Translator { entry, shared: shared.clone(), seen, sight, near: Cell::new(Near::NOWHERE) })
    }

    /// Starts a batch of accesses. What is translated under the guard may be used until it is dropped, and an unmap
    /// completes only then; so a guard covers one bounded batch and never waits for the guest or for I/O of unknown
    /// length. Longer use is a [`Translator::lease`].
    #[inline]
    pub fn enter(&mut self) -> Guard<'_> {
        self.0.enter();
        Guard { translator: &mut self.0, not_send: PhantomData }
    }

    /// As [`Reader::enter`], with a guard that borrows nothing: for interfaces that keep what they are given.
    #[inline]
    pub fn into_guard(mut self) -> OwnedGuard {
        OwnedGuard { counted: self.0.enter_counted(), translator: self.0 }
    }

    /// The endpoint that it reads for.
    #[must_use]
    pub fn endpoint(&self) -> Option<EndpointId> {
        self.0.shared.id
    }
}

impl Clone for Reader {
    fn clone(&self) -> Self {
        Self::new(&self.0.shared, &self.0.entry.slot().label)
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("endpoint", &self.0.shared.id).finish_non_exhaustive()
    }
}

/// One batch of a [`Reader`]. Not `Send`: it is counted for its thread, so that waiting under it is an error and not a
/// deadlock.
pub struct Guard<'r> {
    translator: &'r mut Translator,
    not_send: PhantomData<*const ()>,
}

impl Deref for Guard<'_> {
    type Target = Translator;

    #[inline]
    fn deref(&self) -> &Translator {
        self.translator
    }
}

impl Drop for Guard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.translator.entry.leave();
    }
}

/// As [`Guard`], but it has its reader inside. Dropping it ends the batch and the reader; [`OwnedGuard::leave`] gives
/// the reader back. One that is leaked holds up every later unmap for ever.
///
/// ```compile_fail,E0277
/// fn elsewhere(guard: viommu::OwnedGuard) {
///     std::thread::spawn(move || drop(guard)); // it is counted for the thread that entered
/// }
/// ```
#[must_use = "it protects what is translated under it only while it lives"]
pub struct OwnedGuard {
    // The count goes first: leaving may wake somebody who waits on this thread.
    counted: Counted,
    translator: Translator,
}

impl OwnedGuard {
    /// Ends the batch.
    #[inline]
    #[must_use]
    pub fn leave(self) -> Reader {
        let Self { counted, mut translator } = self;
        drop(counted);
        translator.entry.step_out();
        Reader(translator)
    }
}

impl Deref for OwnedGuard {
    type Target = Translator;

    #[inline]
    fn deref(&self) -> &Translator {
        &self.translator
    }
}

/// What a device can do under a [`Guard`] or an [`OwnedGuard`].
pub struct Translator {
    entry: Entry,
    shared: Arc<EndpointShared>,
    seen: u64,
    sight: Arc<Sight>,
    /// The RAM that the last answer lay in: most lie in the same. Empty after a change of sight.
    near: Cell<Near>,
}

impl Translator {
    #[inline]
    fn enter(&mut self) {
        self.entry.enter();
        if self.shared.generation() != self.seen {
            self.refresh();
        }
    }

    #[inline]
    fn enter_counted(&mut self) -> Counted {
        self.enter();
        Counted::from_enter()
    }

    #[cold]
    fn refresh(&mut self) {
        (self.seen, self.sight) = self.shared.sight();
        self.near.set(Near::NOWHERE);
    }

    /// Translates `iova` for an access of `access` (empty: only asks). A fault is reported to the model.
    ///
    /// # Errors
    /// The fault; nothing may be accessed.
    #[inline]
    pub fn translate(&self, iova: Iova, access: Access) -> Result<Translation, Fault> {
        self.probe(iova, access).inspect_err(|fault| self.report(fault))
    }

    /// As [`Translator::translate`], without a report: for a question that is not an access.
    ///
    /// # Errors
    /// As [`Translator::translate`].
    #[inline]
    pub fn probe(&self, iova: Iova, access: Access) -> Result<Translation, Fault> {
        if self.shared.generation() == self.seen
            && let Some(found) = self.sight.memory(iova, access, self.near.get())
        {
            return Ok(found);
        }
        self.probe_slowly(iova, access)
    }

    /// Everything that is not memory near the last answer.
    #[inline(never)]
    fn probe_slowly(&self, iova: Iova, access: Access) -> Result<Translation, Fault> {
        if self.shared.generation() != self.seen {
            return self.moved().translate(iova, access);
        }
        let answer = self.sight.translate(iova, access)?;
        if answer.place == Place::Ram
            && let Some(extent) = self.sight.backing.at(answer.gpa)
        {
            let bytes = u64::try_from(extent.range.bytes()).unwrap_or(u64::MAX);
            self.near.set(Near { start: extent.range.start().0, bytes });
        }
        Ok(answer)
    }

    /// The endpoint has moved in the middle of this batch: the new view counts from now on.
    #[cold]
    fn moved(&self) -> Arc<Sight> {
        self.shared.sight().1
    }

    #[inline]
    fn sight(&self) -> Arc<Sight> {
        if self.shared.generation() == self.seen { self.sight.clone() } else { self.moved() }
    }

    #[cold]
    fn report(&self, fault: &Fault) {
        if let Some(sink) = &self.sight.faults {
            sink.fault(fault);
        }
    }

    /// All of `range`, as linear pieces in ascending order appended to `pieces`; one state of the address space, even
    /// where it spans several mappings. A fault is reported to the model, and `pieces` is as it was.
    ///
    /// # Errors
    /// The first address that faults.
    pub fn span(&self, range: IovaRange, access: Access, pieces: &mut Vec<Translation>) -> Result<(), Fault> {
        let before = pieces.len();
        let outcome = self.span_of(&self.sight(), range, access, pieces);
        if let Err(fault) = &outcome {
            pieces.truncate(before);
            self.report(fault);
        }
        outcome
    }

    fn span_of(
        &self,
        sight: &Sight,
        range: IovaRange,
        access: Access,
        pieces: &mut Vec<Translation>,
    ) -> Result<(), Fault> {
        let first = sight.translate(range.start(), access)?;
        if first.last >= range.last() {
            pieces.push(Translation { last: range.last(), ..first });
            return Ok(());
        }
        let Some(domain) = &sight.domain else { return sight.collect(range, access, pieces) };
        let before = pieces.len();
        // Churn of other pages alone makes a try fail; some tries are cheaper than the lock. Inside a callback the lock
        // may not be taken, and the version moves on soon: nothing that blocks is done while it is odd.
        for tried in 0_u32.. {
            if tried >= 16 && !in_callback() {
                break;
            }
            let version = domain.version.load(Ordering::Acquire);
            if version & 1 == 0 {
                pieces.truncate(before);
                let outcome = sight.collect(range, access, pieces);
                fence(Ordering::Acquire);
                if domain.version.load(Ordering::Relaxed) == version {
                    return outcome;
                }
            }
            core::hint::spin_loop();
        }
        pieces.truncate(before);
        let _still = lock(&domain.state);
        sight.collect(range, access, pieces)
    }

    /// The linear extent around `iova`, as far as one lookup tells, with its true permission: what a cache may hold.
    pub(crate) fn extent(&self, iova: Iova, access: Access) -> Result<Mapping, Fault> {
        self.sight().extent(iova, access)
    }

    pub(crate) fn fault(&self, iova: Iova, access: Access) -> Fault {
        self.sight().fault(iova, access, FaultReason::Unmapped)
    }

    /// Takes out a use of `range` that outlives the guard: asynchronous I/O, posted buffers. It ends when the lease is
    /// dropped. When the range is to be removed, `revoke` is called, once, from whichever thread makes the step or
    /// polls its completion: it must not block, and asks the holder to end the lease soon.
    ///
    /// # Errors
    /// The first address of `range` that cannot be accessed so.
    pub fn lease(
        &self,
        range: IovaRange,
        access: Access,
        label: &str,
        revoke: impl FnOnce() + Send + 'static,
    ) -> Result<Lease, Fault> {
        let sight = self.sight();
        let blocked = || sight.fault(range.start(), access, FaultReason::Blocked);
        let domain = sight.domain.clone().ok_or_else(blocked).inspect_err(|fault| self.report(fault))?;
        let key = self.entry.slot().endpoint;
        let revoke = Box::new(move || {
            let _callback = CallbackScope::enter();
            revoke();
        });
        // In the set first, then translated, both under this guard: a removal that misses the lease in the set waits
        // for the guard and finds it then; one that came before makes the translation fail.
        let id = domain.readers.leases.lend(range, key, label, revoke);
        let mut lease = Lease { domain, id, pieces: Box::new([]) };
        let mut pieces = Vec::new();
        self.span_of(&sight, range, access, &mut pieces).inspect_err(|fault| self.report(fault))?;
        lease.pieces = pieces.into();
        Ok(lease)
    }
}

/// A use of translated addresses that outlives its guard. `Send`; given back on drop.
pub struct Lease {
    domain: Arc<DomainInner>,
    id: u64,
    pieces: Box<[Translation]>,
}

impl Lease {
    /// What the range translated to: valid until the lease is dropped.
    #[must_use]
    pub fn pieces(&self) -> &[Translation] {
        &self.pieces
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.domain.readers.leases.end(self.id);
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("id", &self.id).field("pieces", &self.pieces).finish_non_exhaustive()
    }
}

impl Sight {
    #[cold]
    fn fault(&self, iova: Iova, access: Access, reason: FaultReason) -> Fault {
        Fault { endpoint: self.endpoint, iova, access, reason }
    }

    #[inline]
    fn lookup(&self, iova: Iova) -> Result<Hit, FaultReason> {
        let Some(domain) = &self.domain else {
            return Err(if self.fenced { FaultReason::Fenced } else { FaultReason::Blocked });
        };
        let hit = match &domain.walker {
            None => domain.table.lookup(iova),
            Some(walker) => walker.walk(iova).filter(|m| m.range.contains(iova)).map(|m| Hit {
                gpa: m.translate(iova),
                access: m.access,
                target: m.target,
                left: m.range.last().0.wrapping_sub(iova.0),
            }),
        };
        hit.ok_or(FaultReason::Unmapped)
    }

    /// What is RAM inside `near`, above all regions, in viommu's own record; `None`: look properly.
    #[inline(always)]
    fn memory(&self, iova: Iova, access: Access, near: Near) -> Option<Translation> {
        let table = self.table.as_ref()?;
        if iova.0 < self.clear_from || self.clear_from == u64::MAX {
            return None;
        }
        let leaf = table.leaf(iova);
        if !leaf.is_memory_for(access) {
            return None;
        }
        let gpa = leaf.gpa(iova);
        let inside = gpa.0.wrapping_sub(near.start);
        if inside >= near.bytes {
            return None;
        }
        let left = leaf.left(iova).min(near.bytes - inside - 1);
        let last = Iova(iova.0.wrapping_add(left));
        Some(Translation { gpa, last, access: leaf.access(), place: Place::Ram })
    }

    fn translate(&self, iova: Iova, access: Access) -> Result<Translation, Fault> {
        let mut stop = u64::MAX;
        if iova.0 < self.clear_from || self.clear_from == u64::MAX {
            match self.region(iova, access) {
                Ok(Some(msi)) => return Ok(msi),
                Ok(None) => stop = self.next_region(iova),
                Err(fault) => return Err(fault),
            }
        }
        let hit = match self.lookup(iova) {
            Ok(hit) => hit,
            Err(reason) => return Err(self.fault(iova, access, reason)),
        };
        if !hit.access.contains(access) || hit.access.is_empty() {
            let none = hit.access.is_empty();
            let reason = if none { FaultReason::Unmapped } else { FaultReason::Permission };
            return Err(self.fault(iova, access, reason));
        }
        let Some(extent) = self.backing.at(hit.gpa) else {
            return Err(self.fault(iova, access, FaultReason::NoBacking));
        };
        let (place, allowed) = match (extent.medium, hit.target) {
            (Medium::Ram, Target::Ram) => (Place::Ram, hit.access),
            (Medium::Rom, _) => (Place::Rom, hit.access & Access::READ),
            (Medium::Mmio, _) | (_, Target::Mmio) => (Place::Mmio, hit.access),
        };
        if !allowed.contains(access) || allowed.is_empty() {
            return Err(self.fault(iova, access, FaultReason::Permission));
        }
        let left = hit.left.min(extent.range.last().0.wrapping_sub(hit.gpa.0)).min(stop.wrapping_sub(iova.0));
        Ok(Translation { gpa: hit.gpa, last: Iova(iova.0.wrapping_add(left)), access: allowed, place })
    }

    /// The answer of the region that holds `iova`, if one does.
    fn region(&self, iova: Iova, access: Access) -> Result<Option<Translation>, Fault> {
        let Some(region) = self.regions.iter().find(|r| r.range.contains(iova)) else { return Ok(None) };
        match region.kind {
            RegionKind::Msi if access == Access::WRITE || access.is_empty() => Ok(Some(Translation {
                gpa: Gpa(iova.0),
                last: region.range.last(),
                access: Access::WRITE,
                place: Place::Msi,
            })),
            _ => Err(self.fault(iova, access, FaultReason::Reserved)),
        }
    }

    /// The last address before the next region.
    fn next_region(&self, iova: Iova) -> u64 {
        let next = self.regions.iter().map(|r| r.range.start()).find(|start| *start > iova);
        next.map_or(u64::MAX, |start| start.0.wrapping_sub(1))
    }

    fn collect(&self, range: IovaRange, access: Access, pieces: &mut Vec<Translation>) -> Result<(), Fault> {
        let (mut at, mut run) = (range.start(), range.start());
        let first = pieces.len();
        loop {
            let piece = self.translate(at, access)?;
            let last = piece.last.min(range.last());
            match pieces.get_mut(first..).and_then(|own| own.last_mut()) {
                // Leaves of one mapping, or neighbours that go on linearly, are one piece.
                Some(before) if before.goes_on(run, at, &piece) => before.last = last,
                _ => {
                    run = at;
                    pieces.push(Translation { last, ..piece });
                }
            }
            match last.checked_add(1) {
                Some(next) if last < range.last() => at = next,
                _ => return Ok(()),
            }
        }
    }

    fn extent(&self, iova: Iova, access: Access) -> Result<Mapping, Fault> {
        let answer = self.translate(iova, access)?;
        if answer.place == Place::Msi {
            return Err(self.fault(iova, access, FaultReason::Reserved));
        }
        // From the start of the page on: all of a page is one mapping, and regions are made of pages.
        let start = Iova(iova.0 & !(PAGE - 1));
        let last = self.run_on(iova, access, answer).unwrap_or(answer.last);
        let range = IovaRange::new(start, last).unwrap_or(IovaRange::ALL);
        let gpa = Gpa(answer.gpa.0.wrapping_sub(iova.0.wrapping_sub(start.0)));
        let target = if answer.place == Place::Mmio { Target::Mmio } else { Target::Ram };
        Ok(Mapping { range, gpa, access: answer.access, target })
    }

    /// The last address up to which the mapping behind `answer` goes on, over a bounded number of leaves; `None` when
    /// the record changed meanwhile.
    fn run_on(&self, iova: Iova, access: Access, answer: Translation) -> Option<Iova> {
        let (table, domain) = (self.table.as_ref()?, self.domain.as_ref()?);
        let version = domain.version.load(Ordering::Acquire);
        if version & 1 != 0 || self.translate(iova, access).ok()? != answer {
            return None;
        }
        let mut last = answer.last;
        for _ in 0..LEAVES {
            let Some(next) = last.checked_add(1).filter(|next| table.leaf(*next).goes_on()) else { break };
            match self.translate(next, access) {
                Ok(more) if answer.goes_on(iova, next, &more) => last = more.last,
                _ => break,
            }
        }
        fence(Ordering::Acquire);
        (domain.version.load(Ordering::Relaxed) == version).then_some(last)
    }
}

/// Leaves that one fill of a cache looks at: 2 MiB of 4 KiB pages.
const LEAVES: usize = 511;
