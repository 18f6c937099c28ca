//! Subscribers that complain when the contract is broken.

use std::collections::BTreeMap;

use super::*;
use crate::ack::{Ack, Resolver};
use crate::subscribe::{Cache, FenceFailed, Mirror, Reach, Refused, Unmapped};

/// What a mirror holds, seen from outside.
#[derive(Default)]
pub(super) struct Shadow {
    pub(super) held: BTreeMap<u64, Mapping>,
    /// A callback is running.
    pub(super) running: bool,
    /// It has left: no call may come any more.
    pub(super) left: bool,
    pub(super) fenced: bool,
    /// Acks that have not been resolved.
    pub(super) unresolved: Vec<Resolver>,
    /// Acks promised and acks resolved.
    pub(super) promised: usize,
    pub(super) resolved: usize,
}

/// A mirror with exact extents, as VFIO's.
pub(super) struct Exact {
    shadow: Arc<Mutex<Shadow>>,
    reach: Reach,
    /// Acks come later.
    late: bool,
}

impl Exact {
    pub(super) fn new(reach: Reach) -> (Box<Self>, Arc<Mutex<Shadow>>) {
        let shadow = Arc::new(Mutex::new(Shadow::default()));
        (Box::new(Self { shadow: shadow.clone(), reach, late: false }), shadow)
    }

    /// Its acks are resolved by whoever takes them out of the shadow.
    pub(super) fn late() -> (Box<Self>, Arc<Mutex<Shadow>>) {
        let (mirror, shadow) = Self::new(Reach::default());
        (Box::new(Self { late: true, ..*mirror }), shadow)
    }

    /// One call. Others can run in the middle of it.
    fn call<R>(&self, f: impl FnOnce(&mut Shadow) -> R) -> R {
        {
            let mut shadow = self.shadow.lock().unwrap();
            assert!(!shadow.left, "a call after the leave");
            assert!(!shadow.fenced, "a call after the fence");
            assert!(!core::mem::replace(&mut shadow.running, true), "two calls at a time");
        }
        let mut shadow = self.shadow.lock().unwrap();
        shadow.running = false;
        f(&mut shadow)
    }

    fn ack(late: bool, shadow: &mut Shadow) -> Ack {
        if !late {
            return Ack::Done;
        }
        let (ack, resolver) = Ack::pending();
        shadow.unresolved.push(resolver);
        shadow.promised += 1;
        ack
    }
}

impl Mirror for Exact {
    fn reach(&self) -> Reach {
        self.reach.clone()
    }

    fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        self.call(|shadow| {
            let over = shadow.held.values().find(|m| m.range.overlaps(extent.range));
            assert_eq!(over, None, "I3: {extent:?} over what is held");
            shadow.held.insert(extent.range.start().0, *extent);
            Ok(Self::ack(self.late, shadow))
        })
    }

    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        self.call(|shadow| {
            let touched: Vec<_> = shadow.held.values().filter(|m| m.range.overlaps(range)).copied().collect();
            let cut = touched.iter().find(|m| !range.covers(m.range));
            assert_eq!(cut, None, "I5: {range} cuts");
            assert!(!touched.is_empty(), "an unmap of nothing at {range}");
            touched.iter().for_each(|m| drop(shadow.held.remove(&m.range.start().0)));
            let bytes = touched.iter().map(|m| m.range.bytes()).sum();
            Ok(Unmapped { ack: Self::ack(self.late, shadow), ..Unmapped::done(bytes) })
        })
    }

    fn replace(&mut self, old: &Mapping, new: &Mapping) -> Result<Ack, Refused> {
        self.call(|shadow| {
            let before = shadow.held.insert(new.range.start().0, *new);
            assert_eq!(before.as_ref(), Some(old), "a replacement of what is not held");
            Ok(Self::ack(self.late, shadow))
        })
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        let mut shadow = self.shadow.lock().unwrap();
        shadow.fenced = true;
        shadow.held.clear();
        Ok(())
    }

    fn held(&self) -> Vec<Mapping> {
        self.shadow.lock().unwrap().held.values().copied().collect()
    }
}

/// What a cache holds, seen from outside.
pub(super) type Entries = Arc<Mutex<BTreeMap<u64, Mapping>>>;

/// A cache of pages.
pub(super) struct Pages(Entries);

impl Pages {
    pub(super) fn new() -> (Box<Self>, Entries) {
        let entries = Entries::default();
        (Box::new(Self(entries.clone())), entries)
    }
}

/// What a device finds in its cache.
pub(super) fn find(entries: &Entries, iova: Iova) -> Option<Gpa> {
    entries.lock().unwrap().get(&iova.0).map(|m| m.gpa)
}

pub(super) fn holds(entries: &Entries, gpa: Gpa) -> bool {
    entries.lock().unwrap().values().any(|m| m.gpa == gpa)
}

impl Cache for Pages {
    fn install(&mut self, entry: &Mapping) {
        let before = self.0.lock().unwrap().insert(entry.range.start().0, *entry);
        assert!(before.is_none_or(|m| m.gpa == entry.gpa), "{entry:?} beside the stale {before:?}");
    }

    fn invalidate(&mut self, range: IovaRange) -> Ack {
        self.0.lock().unwrap().retain(|_, m| !m.range.overlaps(range));
        Ack::Done
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        self.0.lock().unwrap().clear();
        Ok(())
    }

    fn held(&self) -> Option<Vec<Mapping>> {
        Some(self.0.lock().unwrap().values().copied().collect())
    }
}
