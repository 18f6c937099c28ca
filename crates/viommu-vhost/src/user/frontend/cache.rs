//! The cache that the core knows.

use core::fmt;

use viommu::subscribe::{Cache, FenceFailed};
use viommu::{Ack, IovaRange, Mapping};
use viommu_memory::host_pieces;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use std::sync::Arc;

use super::link::Link;

/// What really ends a back end's device: see [`Frontend::cache`](super::Frontend::cache).
pub type CutOff = Box<dyn FnMut() -> Result<(), FenceFailed> + Send>;

/// A back end's IOTLB as a [`Cache`], to be subscribed. None of its calls waits for the back end, but for `fence`.
pub struct FrontendCache<S> {
    pub(super) link: Arc<Link>,
    pub(super) memory: S,
    pub(super) cut_off: CutOff,
}

impl<S: GuestAddressSpace + Send> Cache for FrontendCache<S>
where
    S::M: GuestMemoryBackend,
{
    fn install(&mut self, entry: &Mapping) {
        if entry.access.is_empty() {
            return; // it occupies its range, and means "not mapped"
        }
        // Device registers have no memory: a miss there is refused by who asked for this.
        if let Ok(pieces) = host_pieces(&*self.memory.memory(), entry) {
            self.link.update(entry, &pieces);
        }
    }

    fn invalidate(&mut self, range: IovaRange) -> Ack {
        self.link.invalidate(range)
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        self.link.close();
        (self.cut_off)()
    }

    fn held(&self) -> Option<Vec<Mapping>> {
        Some(self.link.held())
    }
}

impl<S> fmt::Debug for FrontendCache<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontendCache").field("link", &self.link).finish_non_exhaustive()
    }
}
