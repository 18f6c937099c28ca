//! A binding over the kernel's iommufd: an IOAS for each address space that the guest's devices are in.
//!
//! The embedder owns the devices: it opens `/dev/iommu` and the devices' files, binds these to it, and hands them over.
//! From then on an endpoint's move is one switch of its device, from the table of one domain to that of another: nothing
//! is unmapped and mapped anew, and devices in one domain share one copy, with each page pinned once.
//!
//! ```no_run
//! use std::fs::File;
//! use std::sync::Arc;
//! use viommu::{Endpoint, Iommu};
//! use viommu_vfio::iommufd::Iommufd;
//! use vm_memory::GuestMemoryMmap;
//!
//! # fn f(iommu: Iommu, endpoint: Endpoint, memory: Arc<GuestMemoryMmap>) -> Result<(), Box<dyn std::error::Error>> {
//! # let open = |path| File::options().read(true).write(true).open(path);
//! let iommufd = Iommufd::open(open("/dev/iommu")?.into())?;
//! let device = iommufd.bind(open("/dev/vfio/devices/vfio0")?.into())?;
//! let (binding, handle) = iommufd.binding(memory);
//! let binding = iommu.add_binding(Box::new(binding));
//!
//! let limits = handle.add(endpoint.id(), Box::new(device))?;
//! println!("the guest may map {:?}", limits.apertures);
//! endpoint.bind_with(&binding)?.wait()?;
//! # Ok(())
//! # }
//! ```
//!
//! # What happens when
//! | event | calls |
//! | --- | --- |
//! | the first device of an address space | `IOAS_ALLOC`, `HWPT_ALLOC`, a map for each mapping, then one attach |
//! | another device, or one that comes back | one attach; before it `HWPT_ALLOC`, if its IOMMU is of another kind |
//! | a device is blocked | one detach: the kernel lets nothing through |
//! | the last device leaves | one attach elsewhere or a detach, then one unmap, and `DESTROY` |
//! | a mapping | `IOAS_MAP` or `IOAS_MAP_FILE`, once for each region of memory that it touches: all of them, or none |
//! | mappings go | `IOAS_UNMAP` over exactly what was mapped |
//! | a change of target or access | unmap and map: a device faults in between |
//! | memory comes or goes | unmaps and maps of what lies over it, with the host addresses of that moment |
//!
//! Calls are made on the thread of the step, under the domain's lock, and block as long as the kernel does. All are
//! acknowledged at once: when `IOAS_UNMAP` returns, the IOMMU has been flushed.
//!
//! The repository's `docs/iommufd.md` has the table of errors.

mod device;
mod hub;
mod ioas;
mod kernel;
#[cfg(feature = "bench")]
mod nothing;
mod spec;
#[expect(unsafe_code, reason = "ioctls")]
mod sys;

use core::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::subscribe::{self, Bound, FenceFailed, OutOfReach, Reach, Refused, Space, Unmapped};
use viommu::{Ack, EndpointId, GpaRange, IovaRange, Mapping};
use viommu_memory::mirror::{Holding, Holdings, Resolve, resolve_in};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

pub use crate::errno::Errno;
use crate::written::Written;
pub use device::Device;
use hub::Hub;
use ioas::{Files, Ioas, files_in};
use kernel::Kernel;
pub use kernel::Limits;
pub use sys::VfioDevice;

/// An iommufd that a binding will be made over.
pub struct Iommufd {
    kernel: Arc<dyn Kernel>,
    fd: Option<Arc<sys::Fd>>,
    out_of_reach: OutOfReach,
    files: bool,
}

impl Iommufd {
    /// Over a descriptor of `/dev/iommu`.
    ///
    /// # Errors
    /// That of `IOAS_ALLOC`, by which is found out whether it is one; the descriptor is closed.
    pub fn open(fd: OwnedFd) -> Result<Self, Errno> {
        let fd = Arc::new(sys::Fd::new(fd));
        let made = Self { fd: Some(fd.clone()), ..Self::over(fd) };
        made.kernel.destroy(made.kernel.ioas_alloc()?)?;
        Ok(made)
    }

    fn over(kernel: Arc<dyn Kernel>) -> Self {
        Self { kernel, fd: None, out_of_reach: OutOfReach::default(), files: false }
    }

    /// Binds a VFIO device, by a descriptor of its file below `/dev/vfio/devices`: its DMA is blocked until it is
    /// switched somewhere. The descriptor may be a duplicate of the embedder's.
    ///
    /// # Errors
    /// The kernel's: the descriptor is closed.
    pub fn bind(&self, device: OwnedFd) -> Result<VfioDevice, Errno> {
        VfioDevice::bind_to(device, self.fd.as_ref().ok_or(Errno::EBADF)?.as_fd())
    }

    /// What becomes of a mapping out of reach that the guest cannot be refused.
    #[must_use]
    pub fn out_of_reach(self, out_of_reach: OutOfReach) -> Self {
        Self { out_of_reach, ..self }
    }

    /// Memory whose regions are of files is mapped by its files (`IOAS_MAP_FILE`), where the kernel can (since Linux
    /// 6.13; a memfd, or a file on hugetlbfs), and by its address otherwise. Say this only if all of these regions are
    /// shared mappings (`MAP_SHARED`): of a private one the device would see the file and not the memory.
    #[must_use]
    pub fn by_files(self) -> Self {
        Self { files: true, ..self }
    }

    /// The binding, which maps what lies in `memory`, and the embedder's handle to it. It looks into `memory` at each
    /// call, so one that can be exchanged (vm-memory's `GuestMemoryAtomic`) is seen as it is then.
    pub fn binding<A>(self, memory: A) -> (Binding, Handle)
    where
        A: GuestAddressSpace + Send + 'static,
        A::M: GuestMemoryBackend,
    {
        let hub = Arc::new(Hub::new(self.kernel));
        let files = self.files;
        let memory = Box::new(move || (resolve_in(memory.clone()), files.then(|| files_in(memory.clone()))));
        (Binding { hub: hub.clone(), memory, out_of_reach: self.out_of_reach }, Handle(hub))
    }
}

impl fmt::Debug for Iommufd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iommufd").field("fd", &self.fd).field("files", &self.files).finish_non_exhaustive()
    }
}

/// The binding, for [`Iommu::add_binding`](viommu::Iommu::add_binding).
pub struct Binding {
    hub: Arc<Hub>,
    memory: Box<dyn Fn() -> (Resolve, Option<Files>) + Send>,
    out_of_reach: OutOfReach,
}

impl subscribe::Binding for Binding {
    fn mirror_for(&mut self, space: Space, first: EndpointId) -> Result<Box<dyn subscribe::Mirror>, Refused> {
        let (id, hwpt, limits) = self.hub.make(first)?;
        let (memory, files) = (self.memory)();
        let state = Ioas {
            hub: self.hub.clone(),
            id,
            limits,
            out_of_reach: self.out_of_reach,
            memory,
            files,
            held: Holdings::default(),
            untold: Written::default(),
            closed: false,
        };
        let state = Arc::new(Mutex::new(state));
        self.hub.register(space, id, hwpt, Arc::downgrade(&state));
        Ok(Box::new(Mirror(state)))
    }

    fn bind(&mut self, endpoint: EndpointId, to: Bound) -> Result<Ack, Refused> {
        match to {
            Bound::Space(space) => self.hub.bind(endpoint, space)?,
            Bound::Blocked => self.hub.unbind(endpoint)?,
        }
        Ok(Ack::Done)
    }

    fn fence(&mut self, endpoint: EndpointId) -> Result<(), FenceFailed> {
        self.hub.cut_off(|id, _| id == endpoint)
    }
}

impl fmt::Debug for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Binding").field(&Handle(self.hub.clone())).finish()
    }
}

/// The mirror of one address space.
struct Mirror(Arc<Mutex<Ioas>>);

fn lock(state: &Mutex<Ioas>) -> MutexGuard<'_, Ioas> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl subscribe::Mirror for Mirror {
    fn reach(&self) -> Reach {
        lock(&self.0).reach()
    }

    fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        lock(&self.0).map(extent)
    }

    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        lock(&self.0).unmap(range)
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        lock(&self.0).fence()
    }

    fn held(&self) -> Vec<Mapping> {
        lock(&self.0).held.mappings()
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let mut ioas = lock(&self.0);
        ioas.closed = true;
        ioas.hub.clone().close(ioas.id);
    }
}

/// What of the binding stays with the embedder. Its calls take the locks of binding and mirrors, so they wait for a call to
/// the kernel that is under way; they may be made from any thread, but not from a subscriber's callback.
#[derive(Clone)]
pub struct Handle(Arc<Hub>);

impl Handle {
    /// Takes the device of an endpoint, before the endpoint is bound. It is attached to an empty IOAS for a moment, to
    /// learn what it can reach: that becomes the reach of an address space that it is the first in, and is what a model
    /// should offer its guest (pages, and as reserved regions what lies between the apertures).
    ///
    /// # Errors
    /// EEXIST where the endpoint has a device; the kernel's, and then the device is closed.
    pub fn add(&self, endpoint: EndpointId, device: Box<dyn Device>) -> Result<Limits, Errno> {
        self.0.add(endpoint, device)
    }

    /// Gives a device back, detached: for hot-unplug, after the endpoint has been removed. Until then a step that would
    /// switch the device is refused.
    ///
    /// # Errors
    /// ENODEV where there is none; the kernel's, and then all is as it was.
    pub fn remove(&self, endpoint: EndpointId) -> Result<Box<dyn Device>, Errno> {
        self.0.remove(endpoint)
    }

    /// What a device could reach when it was added.
    #[must_use]
    pub fn limits(&self, endpoint: EndpointId) -> Option<Limits> {
        self.0.devices().slots.get(&endpoint).map(|slot| slot.limits.clone())
    }

    /// IOASes that there are now: one for each address space that a device is in.
    #[must_use]
    pub fn spaces(&self) -> usize {
        self.0.devices().tables.len()
    }

    /// Hardware page tables that there are now.
    #[must_use]
    pub fn tables(&self) -> usize {
        self.0.devices().tables.iter().map(|table| table.hwpts.len()).sum()
    }

    /// Mappings that the kernel has: one for each region of memory that an extent touches.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.states().iter().map(|state| lock(state).held.entries()).sum()
    }

    /// Extents whose memory lies elsewhere in this process than when they were mapped, or nowhere: devices still use what
    /// was there. Not empty after an embedder has exchanged memory without taking it out of the backing.
    #[must_use]
    pub fn stale(&self) -> Vec<Mapping> {
        let mut stale = Vec::new();
        for state in self.states() {
            let state = lock(&state);
            let moved = |held: &&Holding| (state.memory)(&held.mapping).ok().as_ref() != Some(&held.pieces);
            stale.extend(state.held.iter().filter(moved).map(|held| held.mapping));
        }
        stale
    }

    /// Has every table track dirty pages, and those that come later. Once more clears what was not read. Tell the domains
    /// first ([`Domain::dirty_start`](viommu::Domain::dirty_start)): each keeps those of mappings that go meanwhile, and
    /// counts all that the device could write there as written.
    ///
    /// # Errors
    /// EOPNOTSUPP where the IOMMU of one of the devices cannot, or the kernel's: nothing is tracked that was not before.
    pub fn dirty_start(&self) -> Result<(), Errno> {
        self.0.track(true)
    }

    /// Ends tracking: what is dirty is forgotten.
    ///
    /// # Errors
    /// The kernel's: some tables may track still.
    pub fn dirty_stop(&self) -> Result<(), Errno> {
        self.0.track(false)?;
        self.states().iter().for_each(|state| lock(state).untold.clear());
        Ok(())
    }

    /// What devices wrote through what is mapped now, since tracking began or the last call; ascending, disjoint. One call
    /// to the kernel for each mapping and table. Of an address space with a device that cannot tell and that came later,
    /// all that may be written.
    ///
    /// # Errors
    /// EINVAL when tracking is off, or the kernel's: what had been read is told by the next call.
    pub fn dirty(&self) -> Result<Vec<GpaRange>, Errno> {
        if !self.0.devices().tracking {
            return Err(Errno::EINVAL);
        }
        let states = self.states();
        states.iter().try_for_each(|state| lock(state).dirty())?;
        let mut all = Written::default();
        states.iter().for_each(|state| all.join(&mut lock(state).untold));
        Ok(all.take())
    }

    /// The mirrors that there are.
    fn states(&self) -> Vec<Arc<Mutex<Ioas>>> {
        self.0.devices().tables.iter().filter_map(|table| table.state.upgrade()).collect()
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let devices = self.0.devices();
        f.debug_struct("Handle")
            .field("devices", &devices.slots.keys().collect::<Vec<_>>())
            .field("spaces", &devices.tables.len())
            .field("tracking", &devices.tracking)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
