//! A worker's own view of an endpoint.

use core::fmt;

use viommu::{Guard, Reader, Translator};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryResult,
    Permissions,
};

use crate::slices::{reaches, slices};

/// Guest memory as one worker of an endpoint's device reaches it. A clone is for another worker.
///
/// `S` is the embedder's memory by guest physical address: an `Arc<GuestMemoryMmap>`, a `GuestMemoryAtomic`, a plain
/// reference.
#[derive(Clone)]
pub struct EndpointMemory<S> {
    reader: Reader,
    memory: S,
}

impl<S: GuestAddressSpace> EndpointMemory<S> {
    /// The view of `reader`'s endpoint over `memory`.
    #[must_use]
    pub fn new(reader: Reader, memory: S) -> Self {
        Self { reader, memory }
    }

    /// Starts a batch of accesses; see [`Reader::enter`]. The guard sees the regions of memory that there are now: one
    /// that is plugged later is reached under the next guard.
    #[inline]
    pub fn enter(&mut self) -> MemoryGuard<'_, S> {
        // First the guard: what can be translated under it was in memory before.
        let guard = self.reader.enter();
        MemoryGuard { memory: self.memory.memory(), guard }
    }
}

impl<S> fmt::Debug for EndpointMemory<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EndpointMemory").field("reader", &self.reader).finish_non_exhaustive()
    }
}

/// One batch of accesses of an [`EndpointMemory`]: a `GuestMemory` of I/O virtual addresses.
///
/// An access is allowed as a whole or not at all: its range may span any number of mappings, and all of it is
/// translated as one state of the address space before the first byte is touched. What is not mapped, not permitted,
/// or not memory (device registers, an MSI doorbell) is `InvalidGuestAddress` of the first such I/O virtual address.
/// Dirty bits are those of the embedder's regions, so by guest physical address. `check_range` is a question and
/// reports no fault to the model; accesses do.
///
/// Slices borrow the guard:
///
/// ```no_run
/// # use viommu::Reader;
/// # use viommu_memory::EndpointMemory;
/// # use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
/// # fn f(reader: Reader, memory: &GuestMemoryMmap<()>) {
/// let mut device = EndpointMemory::new(reader, memory);
/// let guard = device.enter();
/// let slice = guard.get_slices(GuestAddress(0), 4, Permissions::Write).unwrap().next().unwrap().unwrap();
/// slice.write_obj(1u32, 0).unwrap();
/// drop(guard);
/// # }
/// ```
///
/// and cannot outlive it:
///
/// ```compile_fail,E0505
/// # use viommu::Reader;
/// # use viommu_memory::EndpointMemory;
/// # use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};
/// # fn f(reader: Reader, memory: &GuestMemoryMmap<()>) {
/// let mut device = EndpointMemory::new(reader, memory);
/// let guard = device.enter();
/// let slice = guard.get_slices(GuestAddress(0), 4, Permissions::Write).unwrap().next().unwrap().unwrap();
/// drop(guard); // the unmap may complete from here on
/// slice.write_obj(1u32, 0).unwrap();
/// # }
/// ```
///
/// A raw pointer that is taken out of a slice (`ptr_guard`) is not held back by the compiler: who gives one to
/// asynchronous I/O takes out a [`Translator::lease`] first.
pub struct MemoryGuard<'r, S: GuestAddressSpace> {
    // Goes first: who waits for this guard may want to free the memory.
    memory: S::T,
    guard: Guard<'r>,
}

impl<S: GuestAddressSpace> MemoryGuard<'_, S> {
    /// The guard on the record: translations without access, leases, writes to MSI doorbells.
    #[must_use]
    pub fn translator(&self) -> &Translator {
        &self.guard
    }
}

impl<S: GuestAddressSpace> GuestMemory for MemoryGuard<'_, S>
where
    S::M: GuestMemoryBackend + Sized,
{
    type PhysicalMemory = S::M;
    type Bitmap = <<S::M as GuestMemoryBackend>::R as GuestMemoryRegion>::B;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        reaches(&self.guard, &*self.memory, addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        slices(&self.guard, &*self.memory, addr, count, access)
    }
}

impl<S: GuestAddressSpace> fmt::Debug for MemoryGuard<'_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryGuard").finish_non_exhaustive()
    }
}
