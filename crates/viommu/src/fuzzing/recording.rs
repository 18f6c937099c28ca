//! Subscribers that write down what they are told, and check each call against the contract.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use viommu::ack::Resolver;
use viommu::subscribe::{Cache, FenceFailed, Mirror, Observer, Reach, RefusalKind, Refused, Unmapped};
use viommu::{Ack, Change, EndpointId, IovaRange, Mapping, Space, View};

/// A call, as a subscriber got it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// [`Mirror::map`].
    Map(Mapping),
    /// [`Mirror::unmap`].
    Unmap(IovaRange),
    /// [`Mirror::replace`]: old and new.
    Replace(Mapping, Mapping),
    /// [`Mirror::fence`] or [`Cache::fence`].
    Fence,
    /// [`Cache::install`].
    Install(Mapping),
    /// [`Cache::invalidate`].
    Invalidate(IovaRange),
    /// [`Observer::changed`].
    Changed(Change),
    /// [`Observer::moved`].
    Moved(EndpointId, View),
}

/// Decides whether a call is refused.
pub type Refuse = Box<dyn FnMut(&Event) -> bool + Send>;
/// Looks on from inside a call.
pub type Inside = Box<dyn FnMut(&Event) + Send>;

/// What a recording subscriber has seen.
#[derive(Default)]
pub struct Record {
    /// Every call, in order.
    pub log: Vec<Event>,
    /// What it holds, by first address.
    pub shadow: BTreeMap<u64, Mapping>,
    /// Whether it has been fenced.
    pub fenced: bool,
    /// Whether the core has let go of it.
    pub dropped: bool,
    /// Whether fencing fails.
    pub fence_fails: bool,
    /// Which calls are refused.
    pub refuse: Option<Refuse>,
    /// Run inside every call.
    pub inside: Option<Inside>,
    /// Whether acks come later, by `resolvers`.
    pub pending: bool,
    /// What resolves the acks given so far.
    pub resolvers: Vec<Resolver>,
    /// Between begin and commit.
    pub in_batch: bool,
    /// Batches begun.
    pub batches: usize,
}

/// The test's end of a recording subscriber.
#[derive(Clone, Default)]
pub struct Handle(Arc<Mutex<Record>>);

impl Handle {
    /// What it has seen. Not to be held over a step.
    pub fn lock(&self) -> MutexGuard<'_, Record> {
        match self.0.lock() {
            Ok(record) => record,
            Err(poisoned) => poisoned.into_inner(),
        }
    }

    /// The calls since the last time.
    pub fn take(&self) -> Vec<Event> {
        core::mem::take(&mut self.lock().log)
    }

    /// What it holds, ascending.
    pub fn held(&self) -> Vec<Mapping> {
        self.lock().shadow.values().copied().collect()
    }

    /// Refuses calls of one sort from the `n`-th (from 1) on, `times` times.
    pub fn refuse_nth(&self, n: usize, times: usize, of: fn(&Event) -> bool) {
        let mut seen = 0;
        self.lock().refuse = Some(Box::new(move |event| {
            seen += usize::from(of(event));
            of(event) && seen >= n && seen - n < times
        }));
    }

    fn ack(record: &mut Record) -> Ack {
        if !record.pending {
            return Ack::Done;
        }
        let (ack, resolver) = Ack::pending();
        record.resolvers.push(resolver);
        ack
    }

    /// Writes the call down; whether it is to be refused.
    fn note(&self, event: Event) -> bool {
        let inside = self.lock().inside.take();
        if let Some(mut inside) = inside {
            inside(&event);
            self.lock().inside.get_or_insert(inside);
        }
        let mut record = self.lock();
        let mut refuse = record.refuse.take();
        let refused = refuse.as_mut().is_some_and(|refuse| refuse(&event));
        record.refuse = refuse;
        record.log.push(event);
        refused
    }
}

fn refusal() -> Refused {
    Refused::new(RefusalKind::Resources, "told to refuse")
}

/// A mirror that checks I3, I5, its reach and its batches on each call.
pub struct RecordingMirror {
    handle: Handle,
    reach: Reach,
}

impl RecordingMirror {
    /// A mirror of that reach.
    pub fn new(reach: Reach) -> (Box<Self>, Handle) {
        let handle = Handle::default();
        (Box::new(Self { handle: handle.clone(), reach }), handle)
    }

    fn check_extent(&self, record: &Record, extent: &Mapping, replaces: bool) {
        assert!(!record.fenced, "a call after the fence");
        assert!(!extent.access.is_empty(), "I1: {extent:?} allows nothing");
        assert_eq!(self.reach.refuses(extent), None, "L2: {extent:?} is out of reach");
        assert!(self.reach.batches == record.in_batch, "a call outside a batch");
        if !replaces {
            let hit = record.shadow.values().find(|m| m.range.overlaps(extent.range));
            assert_eq!(hit, None, "I3: map of {extent:?} over a live one");
        }
    }
}

impl Mirror for RecordingMirror {
    fn reach(&self) -> Reach {
        self.reach.clone()
    }

    fn begin(&mut self) {
        let mut record = self.handle.lock();
        assert!(self.reach.batches && !record.in_batch, "begin in a batch");
        record.in_batch = true;
        record.batches += 1;
    }

    fn commit(&mut self) -> Ack {
        let mut record = self.handle.lock();
        assert!(core::mem::take(&mut record.in_batch), "commit without begin");
        Handle::ack(&mut record)
    }

    fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        self.check_extent(&self.handle.lock(), extent, false);
        if self.handle.note(Event::Map(*extent)) {
            return Err(refusal());
        }
        let mut record = self.handle.lock();
        record.shadow.insert(extent.range.start().0, *extent);
        let limit = self.reach.entries.map_or(usize::MAX, |limit| limit as usize);
        assert!(record.shadow.len() <= limit, "L4: more extents than {limit}");
        Ok(Handle::ack(&mut record))
    }

    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        {
            let record = self.handle.lock();
            assert!(!record.fenced, "a call after the fence");
            assert!(self.reach.batches == record.in_batch, "a call outside a batch");
        }
        if self.handle.note(Event::Unmap(range)) {
            return Err(refusal());
        }
        let mut record = self.handle.lock();
        let inside: Vec<Mapping> =
            record.shadow.values().filter(|m| m.range.overlaps(range)).copied().collect();
        assert!(!inside.is_empty(), "unmap of nothing at {range}");
        assert!(inside.iter().all(|m| range.covers(m.range)), "I5: {range} cuts one of {inside:?}");
        if !self.reach.wide_unmap {
            assert!(inside.len() == 1 && inside[0].range == range, "{range} is not one of {inside:?}");
        }
        for m in &inside {
            record.shadow.remove(&m.range.start().0);
        }
        let bytes = inside.iter().map(|m| m.range.bytes()).sum();
        Ok(Unmapped { bytes, dirty: None, ack: Handle::ack(&mut record) })
    }

    fn replace(&mut self, old: &Mapping, new: &Mapping) -> Result<Ack, Refused> {
        assert!(self.reach.replace && old.range == new.range, "replace of {old:?} by {new:?}");
        self.check_extent(&self.handle.lock(), new, true);
        assert_eq!(self.handle.lock().shadow.get(&old.range.start().0), Some(old), "replace of another");
        if self.handle.note(Event::Replace(*old, *new)) {
            return Err(refusal());
        }
        let mut record = self.handle.lock();
        record.shadow.insert(new.range.start().0, *new);
        Ok(Handle::ack(&mut record))
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        self.handle.note(Event::Fence);
        let mut record = self.handle.lock();
        record.fenced = true;
        record.in_batch = false;
        if record.fence_fails { Err(FenceFailed("told to fail".into())) } else { Ok(()) }
    }

    fn held(&self) -> Vec<Mapping> {
        self.handle.held()
    }
}

impl Drop for RecordingMirror {
    fn drop(&mut self) {
        self.handle.lock().dropped = true;
    }
}

/// A cache that keeps what is installed until it is told to drop it.
pub struct RecordingCache(Handle);

impl RecordingCache {
    /// An empty cache.
    pub fn new() -> (Box<Self>, Handle) {
        let handle = Handle::default();
        (Box::new(Self(handle.clone())), handle)
    }
}

impl Cache for RecordingCache {
    fn install(&mut self, entry: &Mapping) {
        self.0.note(Event::Install(*entry));
        let mut record = self.0.lock();
        // A fill of what it holds already replaces that.
        record.shadow.retain(|_, m| !m.range.overlaps(entry.range));
        record.shadow.insert(entry.range.start().0, *entry);
    }

    fn invalidate(&mut self, range: IovaRange) -> Ack {
        self.0.note(Event::Invalidate(range));
        let mut record = self.0.lock();
        record.shadow.retain(|_, m| !m.range.overlaps(range));
        Handle::ack(&mut record)
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        self.0.note(Event::Fence);
        let mut record = self.0.lock();
        record.fenced = true;
        if record.fence_fails { Err(FenceFailed("told to fail".into())) } else { Ok(()) }
    }

    fn held(&self) -> Option<Vec<Mapping>> {
        Some(self.0.held())
    }
}

impl Drop for RecordingCache {
    fn drop(&mut self) {
        self.0.lock().dropped = true;
    }
}

/// An observer that writes down what it sees.
pub struct RecordingObserver(Handle);

impl RecordingObserver {
    /// One that has seen nothing.
    pub fn new() -> (Box<Self>, Handle) {
        let handle = Handle::default();
        (Box::new(Self(handle.clone())), handle)
    }
}

impl Observer for RecordingObserver {
    fn changed(&mut self, _space: Space, change: &Change) {
        self.0.note(Event::Changed(*change));
    }

    fn moved(&mut self, endpoint: EndpointId, to: View) {
        self.0.note(Event::Moved(endpoint, to));
    }
}

impl Drop for RecordingObserver {
    fn drop(&mut self) {
        self.0.lock().dropped = true;
    }
}
