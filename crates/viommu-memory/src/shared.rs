//! An endpoint's view as a handle to share.

use core::fmt;
use std::rc::Rc;

use viommu::{Reader, Translator};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryResult,
    Permissions,
};

use crate::pool::{Entered, Pool};
use crate::slices::{reaches, slices};

/// Guest memory as an endpoint's device reaches it, for devices that take a [`GuestAddressSpace`]. `Send` and `Sync`
/// where `S` is; clones share their readers.
///
/// [`GuestAddressSpace::memory`] starts a guard, and the guard ends with the last clone of what it returned, the
/// `DescriptorChain`s and iterators made from it included. So a device asks for `memory()` once for each batch, as it
/// does for a `GuestMemoryAtomic`, and keeps none of it while it waits.
///
/// After the endpoint has been removed every access is an error, also when one of the same id has been added since: a
/// new endpoint takes a new handle.
#[derive(Clone)]
pub struct EndpointSpace<S> {
    pool: Pool,
    memory: S,
}

impl<S: GuestAddressSpace> EndpointSpace<S> {
    /// The view of `reader`'s endpoint over `memory`, the embedder's memory by guest physical address. Guards report
    /// themselves under the reader's label.
    #[must_use]
    pub fn new(reader: Reader, memory: S) -> Self {
        Self { pool: Pool::new(reader), memory }
    }
}

impl<S> fmt::Debug for EndpointSpace<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EndpointSpace").field("pool", &self.pool).finish_non_exhaustive()
    }
}

impl<S: GuestAddressSpace> GuestAddressSpace for EndpointSpace<S>
where
    S::M: GuestMemoryBackend + Sized,
{
    type M = OwnedMemoryGuard<S>;
    /// Not an `Arc`: a guard belongs to the thread that entered.
    type T = Rc<OwnedMemoryGuard<S>>;

    fn memory(&self) -> Self::T {
        // First the guard: what can be translated under it was in memory before.
        let entered = self.pool.enter();
        Rc::new(OwnedMemoryGuard { memory: self.memory.memory(), entered })
    }
}

/// One batch of accesses of an [`EndpointSpace`]; for the rest see [`MemoryGuard`](crate::MemoryGuard).
///
/// It holds up every later unmap if it is leaked.
pub struct OwnedMemoryGuard<S: GuestAddressSpace> {
    // Goes first: who waits for this guard may want to free the memory.
    memory: S::T,
    entered: Entered,
}

impl<S: GuestAddressSpace> OwnedMemoryGuard<S> {
    /// The guard on the record: translations without access, leases, writes to MSI doorbells.
    #[must_use]
    pub fn translator(&self) -> &Translator {
        self.entered.translator()
    }
}

impl<S: GuestAddressSpace> GuestMemory for OwnedMemoryGuard<S>
where
    S::M: GuestMemoryBackend + Sized,
{
    type PhysicalMemory = S::M;
    type Bitmap = <<S::M as GuestMemoryBackend>::R as GuestMemoryRegion>::B;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        reaches(self.translator(), &*self.memory, addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        slices(self.translator(), &*self.memory, addr, count, access)
    }
}

impl<S: GuestAddressSpace> fmt::Debug for OwnedMemoryGuard<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnedMemoryGuard").finish_non_exhaustive()
    }
}
