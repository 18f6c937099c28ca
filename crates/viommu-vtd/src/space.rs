//! Who translates: for a set of page tables, and for one endpoint whose context is looked up as it goes.

use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use viommu::reader::Walker;
use viommu::{Access, EndpointId, Gpa, Iova, IovaRange, Mapping};

use crate::context::{Abilities, Context, look_up};
use crate::iotlb::Iotlb;
use crate::memory::TableMemory;
use crate::metrics::{Counters, bump};
use crate::paging::{Paging, usable};
use crate::sync::{Mutex, lock};

/// What all walkers of a unit share.
pub(crate) struct Shared {
    pub(crate) memory: Arc<dyn TableMemory>,
    pub(crate) abilities: Abilities,
    pub(crate) counters: Arc<Counters>,
    /// The root table that the driver has set, as in the register.
    pub(crate) root_table: AtomicU64,
}

/// Translates through one set of page tables, with an IOTLB.
pub(crate) struct TableWalker {
    shared: Arc<Shared>,
    paging: Mutex<Paging>,
    pub(crate) iotlb: Iotlb,
}

impl TableWalker {
    pub(crate) fn new(shared: Arc<Shared>, paging: Paging) -> Self {
        Self { shared, paging: Mutex::new(paging), iotlb: Iotlb::new() }
    }

    pub(crate) fn paging(&self) -> Paging {
        *lock(&self.paging)
    }

    /// Other tables from now on.
    pub(crate) fn repoint(&self, paging: Paging) {
        *lock(&self.paging) = paging;
        self.iotlb.invalidate(IovaRange::ALL);
    }
}

impl Walker for TableWalker {
    #[inline]
    fn walk(&self, iova: Iova) -> Option<Mapping> {
        if let Some(known) = self.iotlb.get(iova) {
            return Some(known);
        }
        let before = self.iotlb.before();
        bump(&self.shared.counters.walks);
        let Shared { memory, abilities, .. } = &*self.shared;
        let leaf = abilities.rules.leaf(&**memory, self.paging(), iova)?;
        self.iotlb.put(&leaf, before);
        Some(leaf)
    }
}

/// Translates for one endpoint of a unit without caching mode: its driver says nothing when it writes a context entry,
/// so that is looked up when the device comes.
pub(crate) struct EndpointWalker {
    shared: Arc<Shared>,
    id: EndpointId,
    current: Mutex<Current>,
}

#[derive(Default)]
struct Current {
    /// Counts what made the context unknown again.
    changes: u64,
    /// One that is present.
    known: Option<(Context, Option<Arc<TableWalker>>)>,
}

impl EndpointWalker {
    pub(crate) fn new(shared: Arc<Shared>, id: EndpointId) -> Self {
        Self { shared, id, current: Mutex::default() }
    }

    /// What the tables say of the endpoint, or said when they were last looked at.
    pub(crate) fn context(&self) -> (Context, Option<Arc<TableWalker>>) {
        let changes = {
            let current = lock(&self.current);
            if let Some(known) = &current.known {
                return known.clone();
            }
            current.changes
        };
        let Shared { memory, abilities, root_table, .. } = &*self.shared;
        let context = look_up(&**memory, abilities, root_table.load(Ordering::Acquire), self.id);
        let walker = match context {
            Context::Paging { paging, .. } => Some(Arc::new(TableWalker::new(self.shared.clone(), paging))),
            Context::Pass => None,
            // Not kept: the driver may write it without a word.
            Context::Blocked(..) => return (context, None),
        };
        let mut current = lock(&self.current);
        if current.changes == changes {
            current.known = Some((context, walker.clone()));
        }
        (context, walker)
    }

    /// The context may have changed.
    pub(crate) fn forget(&self) {
        let mut current = lock(&self.current);
        current.changes = current.changes.wrapping_add(1);
        current.known = None;
    }

    /// Drops translations of `range`, if the endpoint is in the domain id; `None`: in any. Gives whether it may be.
    pub(crate) fn invalidate(&self, did: Option<u16>, range: IovaRange) -> bool {
        let current = lock(&self.current);
        match &current.known {
            // It is read, perhaps, and not kept yet: so its tables have not been walked.
            None => true,
            Some((context, _)) if did.is_some() && context.did() != did => false,
            Some((_, walker)) => {
                if let Some(walker) = walker {
                    walker.iotlb.invalidate(range);
                }
                true
            }
        }
    }
}

impl Walker for EndpointWalker {
    fn walk(&self, iova: Iova) -> Option<Mapping> {
        match self.context() {
            (_, Some(walker)) => walker.walk(iova),
            (Context::Pass, _) => {
                let all = Mapping::over(IovaRange::ALL, Gpa(0), Access::RW)?;
                usable(all, iova, self.id.pasid.is_some()).ok()
            }
            _ => None,
        }
    }
}
