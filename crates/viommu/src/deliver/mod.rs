//! From a difference in the record to calls on those who hold a copy: clip, order, undo, fence.

pub(crate) mod cache;
pub(crate) mod lens;
pub(crate) mod mirror;

use std::sync::Weak;

use crate::addr::{GpaRange, IovaRange};
use crate::backing::{Medium, Memory};
use crate::change::Change;
use crate::endpoint::{EndpointId, EndpointShared, Sight};
use crate::error::Incident;
use crate::iommu::unit::{Totals, Unit};
use crate::mapping::{Access, Mapping, Target};
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::CallbackScope;
use crate::quiesce::space::{self, Hold};
use crate::subscribe::{FenceFailed, Interest, Kinds, Observer, Space};
use crate::sync::{Arc, AtomicBool, Mutex, Ordering, lock};

pub(crate) use cache::CacheSeat;
pub(crate) use mirror::MirrorSeat;

/// Why one is fenced whose fence has failed.
pub(crate) const FENCED_AGAIN: &str = "the fence that had failed was tried again";

/// What is known of a subscription everywhere: its number, whose it is, whether it is fenced.
pub(crate) struct Sub {
    id: u64,
    endpoint: Option<EndpointId>,
    fenced: AtomicBool,
    /// `Some`: its fence failed, so nobody knows what its device can still reach; it may be anything that is or was
    /// mapped in these address spaces.
    uncut: Mutex<Option<Vec<Hold>>>,
    /// The endpoints that it serves: cut off with it.
    serves: Mutex<Vec<Arc<EndpointShared>>>,
    unit: Weak<Unit>,
    /// The counters of its unit, and the alarm: it may outlive the unit.
    pub(crate) totals: Arc<Totals>,
}

impl Sub {
    /// A new one of `unit`.
    pub(crate) fn new(unit: &Unit, endpoint: Option<EndpointId>) -> Arc<Self> {
        Arc::new(Self {
            id: unit.next_id(),
            endpoint,
            fenced: AtomicBool::new(false),
            uncut: Mutex::new(None),
            serves: Mutex::new(Vec::new()),
            unit: unit.this.clone(),
            totals: unit.totals.clone(),
        })
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The endpoint that it follows; `None` when it belongs to a domain.
    pub(crate) fn endpoint(&self) -> Option<EndpointId> {
        self.endpoint
    }

    pub(crate) fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Acquire)
    }

    /// How reports name it.
    pub(crate) fn label(&self) -> String {
        format!("subscription {}", self.id)
    }

    /// The key of its endpoint.
    pub(crate) fn key(&self) -> u64 {
        self.endpoint.map_or(EndpointId::NOBODY, EndpointId::key)
    }

    /// Whether its fence, which has been tried, held.
    pub(crate) fn is_cut_off(&self) -> bool {
        lock(&self.uncut).is_none()
    }

    /// It could not be cut off, and may hold what is or was mapped in `space`: no removal there is over before it is.
    pub(crate) fn hold(&self, space: &Arc<space::Space>) {
        if let Some(holds) = lock(&self.uncut).as_mut()
            && !holds.iter().any(|hold| Arc::ptr_eq(&hold.space, space))
        {
            holds.push(Hold::new(space, self.key(), &self.label()));
        }
    }

    /// `done` is not over before it is cut off.
    pub(crate) fn await_cut(&self, done: &mut Completion) {
        for hold in lock(&self.uncut).iter().flatten() {
            done.add_removal(&hold.space, Some(self.key()), &[IovaRange::ALL]);
        }
    }

    /// Takes note of what came of its fence, and tells the alarm; whether that held.
    pub(crate) fn tell_fence(&self, outcome: Result<(), FenceFailed>, why: &str) -> bool {
        let (subscription, endpoint) = (self.id, self.endpoint);
        let held = outcome.is_ok();
        if held {
            let holds = lock(&self.uncut).take();
            holds.into_iter().flatten().for_each(Hold::end); // outside the lock: it wakes who waits
        } else {
            lock(&self.uncut).get_or_insert_default();
        }
        self.totals.alarm(&match outcome {
            Ok(()) => Incident::Fenced { subscription, endpoint, why: why.into() },
            Err(failed) => Incident::FenceFailed { subscription, endpoint, why: format!("{why}; {failed}") },
        });
        held
    }

    /// Marks it, and its endpoints, as cut off: their accesses in this process fault from now on.
    pub(crate) fn set_fenced(&self) {
        self.fenced.store(true, Ordering::Release);
        for endpoint in lock(&self.serves).iter() {
            endpoint.publish(|sight| Sight { fenced: true, ..sight.copy() });
        }
    }

    pub(crate) fn serve(&self, endpoint: &Arc<EndpointShared>) {
        lock(&self.serves).push(endpoint.clone());
    }

    pub(crate) fn forsake(&self, id: EndpointId) {
        lock(&self.serves).retain(|e| e.id != Some(id));
    }

    pub(crate) fn serves(&self, id: EndpointId) -> bool {
        lock(&self.serves).iter().any(|e| e.id == Some(id))
    }

    pub(crate) fn serves_nobody(&self) -> bool {
        lock(&self.serves).is_empty()
    }

    /// Fences the subscriber from outside a step; `false` when that failed.
    pub(crate) fn fence(&self, why: &str) -> bool {
        if let Some(unit) = self.unit.upgrade() {
            unit.fence(self.id, why);
        }
        self.is_cut_off()
    }
}

/// Calls that a subscription has had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Extents mapped (replay included).
    pub map: u64,
    /// Unmap calls; for a cache, invalidations.
    pub unmap: u64,
    /// Extents replaced in place.
    pub replace: u64,
    /// Entries filled into a cache.
    pub fills: u64,
    /// Calls that the subscriber refused.
    pub refused: u64,
    /// Extents that a mirror holds now.
    pub held: u64,
    /// Pages written by the device that unmaps reported (see [`Domain::dirty_take`](crate::Domain::dirty_take)).
    pub dirty: u64,
}

/// An observer in its place.
pub(crate) struct ObserverSeat {
    pub(crate) sub: Arc<Sub>,
    pub(crate) interest: Interest,
    pub(crate) observer: Box<dyn Observer>,
    pub(crate) counts: Counts,
}

impl ObserverSeat {
    pub(crate) fn tell(&mut self, space: Space, change: &Change) {
        if !self.interest.kinds.intersects(change.kinds()) {
            return;
        }
        let clip = |m: &Mapping| {
            let m = m.clip(self.interest.window)?;
            Some(Mapping { range: self.interest.outward(m.range), ..m })
        };
        let clipped = match change {
            Change::Map { new } => clip(new).map(|new| Change::Map { new }),
            Change::Unmap { old } => clip(old).map(|old| Change::Unmap { old }),
            Change::Replace { old, new } => {
                clip(old).zip(clip(new)).map(|(old, new)| Change::Replace { old, new })
            }
        };
        let Some(change) = clipped else { return };
        match change {
            Change::Map { .. } => self.counts.map += 1,
            Change::Unmap { .. } => self.counts.unmap += 1,
            Change::Replace { .. } => self.counts.replace += 1,
        }
        self.observer.changed(space, &change);
    }
}

/// Everyone who listens at one place.
#[derive(Default)]
pub(crate) struct Seats {
    pub(crate) mirrors: Vec<MirrorSeat>,
    pub(crate) caches: Vec<Arc<CacheSeat>>,
    pub(crate) observers: Vec<ObserverSeat>,
    /// Where any of them may hear of a step.
    heard: Option<IovaRange>,
}

impl Seats {
    /// With nobody else.
    pub(crate) fn new(
        mirrors: Vec<MirrorSeat>,
        caches: Vec<Arc<CacheSeat>>,
        observers: Vec<ObserverSeat>,
    ) -> Self {
        let mut seats = Self { mirrors, caches, observers, heard: None };
        seats.settle();
        seats
    }

    fn settle(&mut self) {
        let mirrors = self.mirrors.iter().map(|s| s.lens.interest.window);
        let caches = self.caches.iter().filter(|s| s.hears_steps()).map(|s| s.interest.window);
        let observers = self.observers.iter().map(|s| s.interest.window);
        self.heard = mirrors.chain(caches).chain(observers).reduce(IovaRange::hull);
    }

    /// Whether anybody may hear of a step in `range`.
    #[inline]
    pub(crate) fn any_in(&self, range: IovaRange) -> bool {
        self.heard.is_some_and(|heard| heard.overlaps(range))
    }

    /// The kinds that all of them together want.
    pub(crate) fn wanted(&self) -> Kinds {
        let mirrors = self.mirrors.iter().map(|s| s.lens.interest.kinds);
        let caches = self.caches.iter().map(|s| s.interest.kinds);
        let observers = self.observers.iter().map(|s| s.interest.kinds);
        mirrors.chain(caches).chain(observers).fold(Kinds::empty(), Kinds::union)
    }

    /// The kinds that those who follow `endpoint` want; observers aside, who hold nothing.
    pub(crate) fn wanted_by(&self, endpoint: EndpointId) -> Kinds {
        let mine = |sub: &Arc<Sub>| sub.endpoint() == Some(endpoint);
        let mirrors = self.mirrors.iter().filter(|s| mine(&s.sub)).map(|s| s.lens.interest.kinds);
        let caches = self.caches.iter().filter(|s| mine(&s.sub)).map(|s| s.interest.kinds);
        mirrors.chain(caches).fold(Kinds::empty(), Kinds::union)
    }

    /// Takes out those that follow `endpoint`.
    pub(crate) fn take_of(&mut self, endpoint: EndpointId) -> Self {
        self.take_if(|sub| sub.endpoint() == Some(endpoint))
    }

    /// Takes out one subscription.
    pub(crate) fn take(&mut self, id: u64) -> Self {
        self.take_if(|sub| sub.id() == id)
    }

    pub(crate) fn take_if(&mut self, which: impl Fn(&Sub) -> bool) -> Self {
        let mirrors = self.mirrors.extract_if(.., |s| which(&s.sub)).collect();
        let caches = self.caches.extract_if(.., |s| which(&s.sub)).collect();
        let observers = self.observers.extract_if(.., |s| which(&s.sub)).collect();
        self.settle();
        Self::new(mirrors, caches, observers)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.mirrors.is_empty() && self.caches.is_empty() && self.observers.is_empty()
    }

    /// Cuts a mirror or a cache of these off and says so; whether that held, `None` when it is not here. `space`: where
    /// they are.
    pub(crate) fn fence_and_tell(
        &mut self,
        id: u64,
        why: &str,
        space: Option<&Arc<space::Space>>,
    ) -> Option<bool> {
        let _callback = CallbackScope::enter();
        let (held, sub) = match self.mirrors.iter_mut().find(|seat| seat.sub.id() == id) {
            Some(mirror) => (mirror.fence_and_tell(why), &mirror.sub),
            None => {
                let cache = self.caches.iter().find(|seat| seat.sub.id() == id)?;
                (cache.fence_and_tell(why), &cache.sub)
            }
        };
        if let Some(space) = space.filter(|_| !held) {
            sub.hold(space);
        }
        Some(held)
    }

    /// Tries once more to cut off whoever could not be. `done` is not over before they are.
    pub(crate) fn fence_again(&mut self, done: &mut Completion) {
        let _callback = CallbackScope::enter();
        for seat in self.mirrors.iter_mut().filter(|seat| !seat.sub.is_cut_off()) {
            seat.fence_again();
            seat.sub.await_cut(done);
        }
        for seat in self.caches.iter().filter(|seat| !seat.sub.is_cut_off()) {
            seat.fence_again();
            seat.sub.await_cut(done);
        }
    }

    pub(crate) fn append(&mut self, mut other: Self) {
        self.mirrors.append(&mut other.mirrors);
        self.caches.append(&mut other.caches);
        self.observers.append(&mut other.observers);
        self.settle();
    }
}

/// The parts of `mapping` that have backing, with the access that the backing allows: what a mirror may be given.
#[inline]
pub(crate) fn backed(memory: &Memory, mapping: &Mapping, f: &mut impl FnMut(&Mapping)) {
    if mapping.access.is_empty() {
        return;
    }
    if memory.is_ram_behind(mapping) {
        return f(mapping);
    }
    backed_in_parts(memory, mapping, f);
}

fn backed_in_parts(memory: &Memory, mapping: &Mapping, f: &mut dyn FnMut(&Mapping)) {
    let Some(target) = GpaRange::new(mapping.gpa, mapping.gpa_last()) else { return };
    for extent in memory.over(target) {
        let Some(part) = extent.range.intersect(target) else { continue };
        let whole = part == target;
        let mut piece = if whole { Some(*mapping) } else { part_of(mapping, part) };
        let Some(piece) = piece.as_mut() else { continue };
        match extent.medium {
            Medium::Ram => {}
            Medium::Rom => piece.access &= Access::READ,
            Medium::Mmio => piece.target = Target::Mmio,
        }
        if !piece.access.is_empty() {
            f(piece);
        }
    }
}

/// The part of `mapping` whose target is `part`, which lies inside it.
fn part_of(mapping: &Mapping, part: GpaRange) -> Option<Mapping> {
    let start = mapping.range.start().checked_add(part.start().0.checked_sub(mapping.gpa.0)?)?;
    let last = mapping.range.start().checked_add(part.last().0.checked_sub(mapping.gpa.0)?)?;
    mapping.clip(IovaRange::new(start, last)?)
}
