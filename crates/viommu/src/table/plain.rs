//! The record as an ordered map behind a lock: slow and obviously right. The reference of the radix table.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Arc, RwLock};

use super::{Cuts, Hit, InsertError};
use crate::addr::{Iova, IovaRange};
use crate::mapping::Mapping;

type Map = BTreeMap<u64, Mapping>;

/// What readers look into.
pub(crate) struct Table(RwLock<Map>);

/// What the domain changes, under its own lock.
pub(crate) struct Writer(Arc<Table>);

impl Table {
    pub(crate) fn new() -> (Arc<Self>, Writer) {
        let table = Arc::new(Self(RwLock::new(Map::new())));
        (table.clone(), Writer(table))
    }

    /// To be called under a guard, or under the writer's lock.
    pub(crate) fn lookup(&self, iova: Iova) -> Option<Hit> {
        let map = self.0.read().unwrap();
        let (_, m) = map.range(..=iova.0).next_back()?;
        m.range.contains(iova).then(|| Hit {
            gpa: m.translate(iova),
            access: m.access,
            target: m.target,
            left: m.range.last().0 - iova.0,
        })
    }
}

impl Writer {
    /// The whole mapping that holds `from`, else the first behind it.
    pub(crate) fn next(&self, from: Iova) -> Option<Mapping> {
        let map = self.0.0.read().unwrap();
        let before = map.range(..=from.0).next_back().map(|(_, m)| *m).filter(|m| m.range.contains(from));
        before.or_else(|| map.range(from.0..).next().map(|(_, m)| *m))
    }

    /// Visits every mapping that touches `range`, whole, in order.
    pub(crate) fn for_each(&self, range: IovaRange, f: &mut dyn FnMut(Mapping) -> ControlFlow<()>) {
        let mut at = Some(range.start());
        while let Some(m) = at.and_then(|at| self.next(at)).filter(|m| m.range.overlaps(range)) {
            if f(m).is_break() {
                return;
            }
            at = m.range.next();
        }
    }

    /// Adds one mapping, visible to readers when this returns (page by page while it runs).
    pub(crate) fn insert(&mut self, m: &Mapping) -> Result<(), InsertError> {
        if self.next(m.range.start()).is_some_and(|old| old.range.overlaps(m.range)) {
            return Err(InsertError::Overlap);
        }
        self.0.0.write().unwrap().insert(m.range.start().0, *m);
        Ok(())
    }

    /// Whether a mapping sticks out of `range` at either end.
    pub(crate) fn cuts(&self, range: IovaRange) -> bool {
        let sticks_out =
            |at: Iova| self.next(at).is_some_and(|m| m.range.contains(at) && !range.covers(m.range));
        sticks_out(range.start()) || sticks_out(range.last())
    }

    /// Removes every mapping inside `range`, telling `gone` of each; refused when one would be cut.
    pub(crate) fn remove(&mut self, range: IovaRange, gone: &mut dyn FnMut(Mapping)) -> Result<usize, Cuts> {
        if self.cuts(range) {
            return Err(Cuts);
        }
        let mut count = 0;
        while let Some(m) = self.next(range.start()).filter(|m| range.covers(m.range)) {
            self.0.0.write().unwrap().remove(&m.range.start().0);
            gone(m);
            count += 1;
        }
        Ok(count)
    }

    /// Mappings in the record.
    pub(crate) fn len(&self) -> usize {
        self.0.0.read().unwrap().len()
    }
}
