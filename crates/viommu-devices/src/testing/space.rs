//! Guest memory of which pages vanish from one guard to the next, as behind an IOMMU.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::mmap::GuestRegionMmap;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryResult, Permissions,
};

pub(crate) const PAGE: u64 = 4096;

/// Memory from address 0 on.
#[derive(Clone)]
pub(crate) struct Space {
    pub(crate) memory: Arc<GuestMemoryMmap>,
    /// Guards that are live.
    pub(crate) guards: Arc<AtomicUsize>,
    /// Guards that there have been.
    entered: Arc<AtomicUsize>,
    /// From which guard on a page is gone.
    gone: Arc<Mutex<BTreeMap<u64, usize>>>,
}

impl Space {
    pub(crate) fn new(bytes: u64) -> Self {
        let ranges = [(GuestAddress(0), usize::try_from(bytes).expect("small"))];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("some memory"));
        Self { memory, guards: Arc::default(), entered: Arc::default(), gone: Arc::default() }
    }

    /// The page of `addr` is there for so many guards more.
    pub(crate) fn vanish(&self, addr: u64, after: usize) {
        let number = self.entered.load(Ordering::Relaxed) + after;
        self.gone.lock().expect("no panic").insert(addr / PAGE, number);
    }

    /// All pages are there again.
    pub(crate) fn restore(&self) {
        self.gone.lock().expect("no panic").clear();
    }

    /// Guards that there have been.
    #[cfg(test)]
    pub(crate) fn entered(&self) -> usize {
        self.entered.load(Ordering::Relaxed)
    }
}

impl GuestAddressSpace for Space {
    type M = View;
    type T = Rc<View>;

    fn memory(&self) -> Rc<View> {
        assert_eq!(self.guards.fetch_add(1, Ordering::Relaxed), 0, "one guard at a time");
        let number = self.entered.fetch_add(1, Ordering::Relaxed);
        Rc::new(View { space: self.clone(), number })
    }
}

/// One guard.
pub(crate) struct View {
    space: Space,
    number: usize,
}

impl Drop for View {
    fn drop(&mut self) {
        self.space.guards.fetch_sub(1, Ordering::Relaxed);
    }
}

impl GuestMemory for View {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = <GuestRegionMmap as vm_memory::GuestMemoryRegion>::B;

    fn check_range(&self, addr: GuestAddress, count: usize, _: Permissions) -> bool {
        let Some(last) = addr.0.checked_add(u64::try_from(count.max(1)).expect("64 bits") - 1) else {
            return false;
        };
        let gone = self.space.gone.lock().expect("no panic");
        let vanished = gone.range(addr.0 / PAGE..=last / PAGE).any(|(_, from)| self.number >= *from);
        !vanished && GuestMemoryBackend::check_range(&*self.space.memory, addr, count)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, vm_memory::bitmap::BS<'a, Self::Bitmap>>> {
        if count > 0 && !self.check_range(addr, count, access) {
            return Err(GuestMemoryError::InvalidGuestAddress(addr));
        }
        Ok(GuestMemoryBackend::get_slices(&*self.space.memory, addr, count))
    }
}
