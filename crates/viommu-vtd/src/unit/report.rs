//! What the unit can say of its state, for a reader.

use core::sync::atomic::Ordering;

use viommu::domain::{Found, Walk};
use viommu::{EndpointId, Iova, Mapping};

use super::Vtd;
use crate::context::{Context, look_up};
use crate::cursor::{Cursor, SLICE_ENTRIES};
use crate::faults::RecentFault;

/// What an endpoint's tables in guest memory map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableView {
    /// Each leaf, whole: ascending, disjoint. Where interrupts are written, there is none.
    pub mappings: Vec<Mapping>,
    /// Whether that is all: else there is more behind the last one.
    pub whole: bool,
}

impl Vtd {
    /// Walks the tables of an endpoint as they are now, which is what its device may reach as far as no translation of
    /// before is kept. `None` if it is not translated: translation is off, or its context entry passes or blocks it.
    ///
    /// At most `most` mappings are given, and [`Config::walk_entries`](super::Config::walk_entries) entries read. Takes
    /// the unit's lock, but not for the walk: a driver that changes its tables meanwhile may be seen half-way.
    #[must_use]
    pub fn tables(&self, id: EndpointId, most: usize) -> Option<TableView> {
        if !self.is_translating() {
            return None;
        }
        let shared = &self.0.shared;
        let root = shared.root_table.load(Ordering::Acquire);
        let Context::Paging { paging, .. } = look_up(&*shared.memory, &shared.abilities, root, id) else {
            return None;
        };
        let mut view = TableView::default();
        let (mut from, mut left) = (Some(Iova(0)), self.0.config.walk_entries);
        while let Some(at) = from {
            let mut cursor = Cursor::new(&*shared.memory, shared.abilities.rules, paging);
            // A slice: what it has read is not read again in it.
            let mut next = Some(at);
            while let Some(at) = next.filter(|_| cursor.spent < SLICE_ENTRIES) {
                match cursor.next(at, Iova(u64::MAX)) {
                    Found::Extent(_) if view.mappings.len() >= most => return Some(view),
                    Found::Extent(mapping) => {
                        next = mapping.range.next();
                        view.mappings.push(mapping);
                    }
                    Found::NotYet(pause) => next = Some(pause),
                    Found::Nothing => next = None,
                }
            }
            from = next;
            left = left.saturating_sub(cursor.spent.max(1));
            if left == 0 && from.is_some() {
                return Some(view);
            }
        }
        view.whole = true;
        Some(view)
    }

    /// Whether the record of that domain follows the tables, since a mirror or an observer of new mappings listens.
    /// Elsewhere it has nothing, and [`Vtd::tables`] tells what is mapped.
    #[must_use]
    pub fn is_followed(&self, domain: u32) -> bool {
        self.0.wants.has_mirror(domain)
    }

    /// The last faults, oldest first, also those that are not in the fault registers.
    #[must_use]
    pub fn recent_faults(&self) -> Vec<RecentFault> {
        self.0.faults.recent()
    }
}
