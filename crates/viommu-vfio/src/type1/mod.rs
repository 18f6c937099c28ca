//! A mirror over a VFIO type1 v2 container of the kernel's.
//!
//! The embedder owns the devices: it opens container and groups, sets the IOMMU's type, and hands over a descriptor of
//! the container (its own, or a duplicate of the one that `vfio-ioctls` has). Everything that the guest maps for the
//! endpoint that the mirror is subscribed at is then mapped there, and nothing else.
//!
//! **One container is one isolation set.** All devices of all groups in it see the same mappings, so their endpoints must
//! move together ([`Iommu::isolate_together`](viommu::Iommu::isolate_together)), and the mirror is subscribed at one of
//! them. Devices that shall see different domains need a container each.
//!
//! ```no_run
//! use std::os::fd::{BorrowedFd, OwnedFd};
//! use std::sync::Arc;
//! use viommu::{Endpoint, Interest, Iommu};
//! use viommu_vfio::type1::Container;
//! use vm_memory::GuestMemoryMmap;
//!
//! # fn f(iommu: Iommu, first: Endpoint, second: Endpoint, memory: Arc<GuestMemoryMmap>, fd: OwnedFd)
//! # -> Result<(), Box<dyn std::error::Error>> {
//! // `fd`: a container with groups in it, after SET_IOMMU(TYPE1v2).
//! let container = Container::open(fd)?;
//! println!("the guest may map {:?}", container.info().apertures);
//! let (mirror, handle) = container.mirror(memory);
//!
//! iommu.isolate_together(&[first.id(), second.id()])?; // two devices in the container
//! let subscription = first.subscribe_mirror(Box::new(mirror), Interest::MIRROR)?;
//!
//! // A migration: pages written since, by guest physical address.
//! let domain = iommu.domain(1).ok_or("no such domain")?;
//! domain.dirty_start();
//! handle.dirty_start()?;
//! let mut written = handle.dirty()?;
//! written.extend(domain.dirty_take().unwrap_or_default()); // of mappings that are gone, always second
//! # Ok(())
//! # }
//! ```
//!
//! # What happens when
//! | event | calls |
//! | --- | --- |
//! | a mapping | `MAP_DMA`, once for each region of memory that it touches: all of them, or none |
//! | mappings go | `UNMAP_DMA` over exactly what was mapped; while pages are tracked, one call a mapping, with its bitmap |
//! | a change of target or access | unmap and map: type1 has nothing better, and a device faults in between |
//! | memory comes or goes ([`Iommu::add_backing`](viommu::Iommu::add_backing), [`remove_backing`](viommu::Iommu::remove_backing)) | unmaps and maps of what lies over it, with the host addresses of that moment |
//! | memory stays and moves in this process | nothing: see [`Handle::stale`] |
//!
//! Calls are made on the thread of the step, under the domain's lock, and block as long as the kernel does: `MAP_DMA`
//! pins memory, at 20 µs a MiB or so. All are acknowledged at once: when `UNMAP_DMA` returns, the IOMMU has been flushed.
//!
//! The repository's `docs/vfio-type1.md` has the table of errors.

mod dirty;
mod fence;
mod info;
mod kernel;
#[cfg(feature = "bench")]
mod nothing;
mod state;
#[expect(unsafe_code, reason = "ioctls")]
mod sys;

use core::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::subscribe::{self, FenceFailed, OutOfReach, Reach, Refused, Unmapped};
use viommu::{Ack, GpaRange, IovaRange, Mapping};
use viommu_memory::mirror::{Holding, Holdings, Pieces, Resolve, resolve_in};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

pub use crate::errno::Errno;
use fence::Action;
pub use info::{DirtyTracking, Info};
use kernel::Kernel;
use state::State;

/// A container that a mirror will be made over.
pub struct Container {
    kernel: Box<dyn Kernel>,
    info: Info,
    registers: Option<Resolve>,
    out_of_reach: OutOfReach,
    action: Option<Action>,
}

/// A container that no mirror can be made over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another version of the interface than 0.
    #[error("the kernel's VFIO has version {0}, not 0")]
    Version(i32),
    /// Its IOMMU is not of type1 v2.
    #[error("the container's IOMMU is not of type1 v2")]
    NotType1v2,
    /// A call failed: not a container, or one without a group or an IOMMU.
    #[error("{call}: {errno}")]
    Failed {
        /// Which.
        call: &'static str,
        /// With what.
        errno: Errno,
    },
}

/// A new container with these groups in it (files `/dev/vfio/N`) and an IOMMU of type1 v2: for an embedder that has no
/// other way to set one up. A group leaves it when its file is closed.
///
/// # Errors
/// [`OpenError::Failed`]: a device of a group is not bound to VFIO (EPERM or EINVAL), or a group is in use (EBUSY).
pub fn container_of(groups: &[BorrowedFd<'_>]) -> Result<OwnedFd, OpenError> {
    let failed = |call| move |errno| OpenError::Failed { call, errno };
    let container = sys::Fd::create().map_err(failed("open /dev/vfio/vfio"))?;
    groups.iter().try_for_each(|group| container.add(*group)).map_err(failed("GROUP_SET_CONTAINER"))?;
    container.set_type1_v2().map_err(failed("SET_IOMMU"))?;
    Ok(container.into_inner())
}

impl Container {
    /// Over a descriptor of a container to which groups and an IOMMU of type1 v2 have been given. Reads what it can do:
    /// that becomes the mirror's reach, and what a model should offer its guest (pages, and as reserved regions what lies
    /// between the apertures). Not in reach is the page that ends at 2^64-1: Linux 6.12 could not remove it.
    ///
    /// The container may have mappings already, of addresses that the guest cannot map; they stay until a fence.
    ///
    /// # Errors
    /// See [`OpenError`]; the descriptor is closed.
    pub fn open(fd: OwnedFd) -> Result<Self, OpenError> {
        let fd = sys::Fd::new(fd);
        let failed = |call| move |errno| OpenError::Failed { call, errno };
        match fd.api_version().map_err(failed("GET_API_VERSION"))? {
            0 => {}
            version => return Err(OpenError::Version(version)),
        }
        if !fd.is_type1_v2().map_err(failed("CHECK_EXTENSION"))? {
            return Err(OpenError::NotType1v2);
        }
        Self::over(Box::new(fd)).map_err(failed("GET_INFO"))
    }

    fn over(mut kernel: Box<dyn Kernel>) -> Result<Self, Errno> {
        let info = kernel.info()?;
        Ok(Self { kernel, info, registers: None, out_of_reach: OutOfReach::default(), action: None })
    }

    /// What it can do.
    #[must_use]
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Device registers that this process has mapped (BARs of other devices), at their guest physical addresses: what the
    /// guest maps of them is mapped, for DMA from device to device. All others are left out: the device faults there, the
    /// guest is told nothing, and [`Handle::left_out`] has them.
    #[must_use]
    pub fn registers<A>(self, registers: A) -> Self
    where
        A: GuestAddressSpace + Send + 'static,
        A::M: GuestMemoryBackend,
    {
        Self { registers: Some(resolve_in(registers)), ..self }
    }

    /// What becomes of a mapping out of reach that the guest cannot be refused.
    #[must_use]
    pub fn out_of_reach(self, out_of_reach: OutOfReach) -> Self {
        Self { out_of_reach, ..self }
    }

    /// How the devices are cut off when the mirror cannot follow the record: close them, or take their groups out of the
    /// container. It is called at most until it succeeds, under the locks of a step, and must return only when no device
    /// of the container can do DMA. Then the mirror closes its descriptor.
    ///
    /// Without this, everything is unmapped, and the kernel is asked whether anything is left. That cuts the devices off,
    /// and leaves them in the embedder's hands; it fails where the kernel cannot unmap.
    #[must_use]
    pub fn fence(self, action: impl FnMut() -> Result<(), FenceFailed> + Send + 'static) -> Self {
        Self { action: Some(Box::new(action)), ..self }
    }

    /// A mirror that maps what lies in `memory`, and the embedder's handle to it. It looks into `memory` at each call, so
    /// one that can be exchanged (vm-memory's `GuestMemoryAtomic`) is seen as it is then.
    pub fn mirror<A>(self, memory: A) -> (Mirror, Handle)
    where
        A: GuestAddressSpace + Send + 'static,
        A::M: GuestMemoryBackend,
    {
        let Self { kernel, info, registers, out_of_reach, action } = self;
        let state = State {
            kernel: Ok(kernel),
            info,
            out_of_reach,
            memory: resolve_in(memory),
            registers,
            action,
            held: Holdings::default(),
            tracking: false,
            untold: crate::written::Written::default(),
        };
        let state = Arc::new(Mutex::new(state));
        (Mirror(state.clone()), Handle(state))
    }
}

impl fmt::Debug for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Container").field("info", &self.info).finish_non_exhaustive()
    }
}

/// The mirror, for [`Endpoint::subscribe_mirror`](viommu::Endpoint::subscribe_mirror). Closes its descriptor of the
/// container when it is dropped or fenced.
pub struct Mirror(Arc<Mutex<State>>);

/// What of the mirror stays with the embedder. Its calls take the mirror's lock, so they wait for a call to the kernel that
/// is under way; they may be made from any thread, but not from a subscriber's callback.
#[derive(Clone)]
pub struct Handle(Arc<Mutex<State>>);

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
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
        lock(&self.0).kernel = Err(state::Closed);
    }
}

impl fmt::Debug for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Mirror").field(&Handle(self.0.clone())).finish()
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.0);
        f.debug_struct("Handle")
            .field("info", &state.info)
            .field("entries", &state.held.entries())
            .field("tracking", &state.tracking)
            .field("closed", &state.kernel.is_err())
            .finish_non_exhaustive()
    }
}

impl Handle {
    /// Entries of the container that the mirror takes: at least one for each extent, one for each region of memory that an
    /// extent touches, none for what is left out.
    #[must_use]
    pub fn entries(&self) -> u64 {
        lock(&self.0).held.entries()
    }

    /// Extents of device registers that are not mapped, since this process has not mapped them: see
    /// [`Container::registers`]. To the record they count as held.
    #[must_use]
    pub fn left_out(&self) -> Vec<Mapping> {
        let state = lock(&self.0);
        let left_out = state.held.iter().filter(|held| held.pieces == Pieces::Absent);
        left_out.map(|held| held.mapping).collect()
    }

    /// Extents whose memory lies elsewhere in this process than when they were mapped, or nowhere: devices still use what
    /// was there. Not empty after an embedder has exchanged memory without taking it out of the backing;
    /// [`Subscription::replay`](viommu::Subscription::replay) maps all anew then.
    #[must_use]
    pub fn stale(&self) -> Vec<Mapping> {
        let state = lock(&self.0);
        let moved = |held: &&Holding| state.pieces_of(&held.mapping).ok().as_ref() != Some(&held.pieces);
        state.held.iter().filter(moved).map(|held| held.mapping).collect()
    }

    /// Reads what the container can do again, for [`Subscription::reach_changed`](viommu::Subscription::reach_changed):
    /// a group has joined or left.
    ///
    /// # Errors
    /// That of `GET_INFO`; EBADF once fenced. Nothing has changed.
    pub fn refresh(&self) -> Result<Reach, Errno> {
        let mut state = lock(&self.0);
        state.refresh()?;
        Ok(state.reach())
    }

    /// Has the kernel track dirty pages. Once more changes nothing. Tell the domain first
    /// ([`Domain::dirty_start`](viommu::Domain::dirty_start)): it keeps those of mappings that go meanwhile.
    ///
    /// # Errors
    /// EOPNOTSUPP where the container cannot, EBADF once fenced, or the kernel's. Nothing has changed.
    pub fn dirty_start(&self) -> Result<(), Errno> {
        lock(&self.0).track(true)
    }

    /// Ends tracking: what is dirty is forgotten.
    ///
    /// # Errors
    /// As [`Handle::dirty_start`].
    pub fn dirty_stop(&self) -> Result<(), Errno> {
        lock(&self.0).track(false)
    }

    /// What devices wrote through what is mapped now, since tracking began or the last call; ascending, disjoint. One call
    /// to the kernel a mapping. Devices that cannot tell are reported to have written to every page that they may.
    ///
    /// # Errors
    /// EINVAL when tracking is off, EBADF once fenced, or the kernel's: what had been read is told by the next call.
    pub fn dirty(&self) -> Result<Vec<GpaRange>, Errno> {
        lock(&self.0).dirty()
    }
}

#[cfg(test)]
mod tests;
