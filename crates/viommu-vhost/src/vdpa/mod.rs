//! A mirror over a vhost-vDPA device of the kernel's: one for each of its address spaces that the guest's mappings go to.
//!
//! The embedder owns the device: it opens `/dev/vhost-vdpa-N`, becomes its owner (`VHOST_SET_OWNER`), sets its rings up, and
//! hands over a duplicate of the descriptor. Unlike other vhost devices this one asks for nothing: it reaches what was
//! pushed to it, and everything that the guest maps is.
//!
//! ```no_run
//! use std::os::fd::{BorrowedFd, OwnedFd};
//! use std::sync::Arc;
//! use viommu::{Endpoint, Interest};
//! use viommu_vhost::vdpa::Device;
//! use vm_memory::GuestMemoryMmap;
//!
//! # fn f(endpoint: Endpoint, memory: Arc<GuestMemoryMmap>, fd: OwnedFd) -> Result<(), Box<dyn std::error::Error>> {
//! // `fd`: a vhost-vDPA device that this process owns.
//! let device = Device::open(fd, 0)?;
//! println!("the guest may map {:?}", device.info().range);
//! let (mirror, _handle) = device.mirror(0, memory)?;
//! let subscription = endpoint.subscribe_mirror(Box::new(mirror), Interest::MIRROR)?;
//! # Ok(())
//! # }
//! ```
//!
//! # What happens when
//! | event | messages |
//! | --- | --- |
//! | a step | BATCH_BEGIN before its first message and BATCH_END behind its last one, where the device takes batches |
//! | a mapping | UPDATE, once for each region of memory that it touches: all of them, or none |
//! | mappings go | INVALIDATE over exactly what was mapped |
//! | a change of target or access | INVALIDATE, then UPDATE; in a batch, a device that takes whole tables sees them as one |
//!
//! Messages are written on the thread of the step, under the domain's lock. All are acknowledged at once.
//!
//! The repository's `docs/vhost-vdpa.md` has the table of errors.

#[cfg(feature = "bench")]
mod nothing;
mod state;
#[expect(unsafe_code, reason = "ioctls")]
mod sys;
mod wire;

use core::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use viommu::subscribe::{self, FenceFailed, OutOfReach, Reach, Refused, Unmapped};
use viommu::{Ack, Iova, IovaRange, Mapping};
use viommu_memory::mirror::{Holding, Holdings, resolve_in};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use crate::spec::backend;
use state::{Line, State};
use wire::{Kernel, Wire};

/// Entries of an address space: the kernel's parameter `max_iotlb_entries`, as it is unless somebody sets it.
pub const DEFAULT_ENTRIES: u32 = 2048;

/// What a device can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Where mappings may lie, inclusive.
    pub range: IovaRange,
    /// Whether messages of a step take effect together.
    pub batches: bool,
    /// Whether what is mapped stays when the device is reset. If not, the embedder has all of it mapped anew after each
    /// reset: [`Subscription::replay`](viommu::Subscription::replay).
    pub persists: bool,
    /// Address spaces, numbered from 0: at least one.
    pub address_spaces: u32,
}

/// A device that no mirror can be made over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// It knows no messages of the second version.
    #[error("the device takes no IOTLB messages of version 2")]
    NoMessages,
    /// It has no such features as were asked for: these.
    #[error("the device lacks the back-end features {0:#x}")]
    NoFeatures(u64),
    /// Its IOVA range makes no sense.
    #[error("the device's IOVA range is {first:#x} to {last:#x}")]
    NoRange {
        /// As it says.
        first: u64,
        /// As it says, inclusive.
        last: u64,
    },
    /// It has no such address space.
    #[error("there is no address space {asid}: the device has {count}")]
    NoAddressSpace {
        /// That was asked for.
        asid: u32,
        /// There are.
        count: u32,
    },
    /// A call failed: not a vhost-vDPA device.
    #[error("{call}: {errno}")]
    Failed {
        /// Which.
        call: &'static str,
        /// With what.
        errno: Errno,
    },
}

/// Makes this process the owner of a device (`VHOST_SET_OWNER`), which nobody owns: for an embedder that has no other way
/// to do so.
///
/// # Errors
/// EBUSY where it has an owner; ENOTTY where the descriptor is of something else.
pub fn own(device: BorrowedFd<'_>) -> Result<(), Errno> {
    sys::set_owner(device)
}

/// A device that mirrors will be made over.
pub struct Device {
    wire: Arc<Mutex<Wire>>,
    info: Info,
    entries: Option<u32>,
    out_of_reach: OutOfReach,
}

impl Device {
    /// Over a descriptor of a vhost-vDPA device. Negotiates the features of its back-end that are needed here, and those of
    /// `more` ([`backend`]): one call sets them all. Reads what it can do.
    ///
    /// # Errors
    /// See [`OpenError`]; the descriptor is closed.
    pub fn open(fd: OwnedFd, more: u64) -> Result<Self, OpenError> {
        let fd = sys::Fd(fd);
        let failed = |call| move |errno| OpenError::Failed { call, errno };
        let offered = fd.backend_features().map_err(failed("VHOST_GET_BACKEND_FEATURES"))?;
        let features = wanted(offered, more)?;
        fd.set_backend_features(features).map_err(failed("VHOST_SET_BACKEND_FEATURES"))?;
        let [first, last] = fd.iova_range().map_err(failed("VHOST_VDPA_GET_IOVA_RANGE"))?;
        let range = IovaRange::new(Iova(first), Iova(last)).ok_or(OpenError::NoRange { first, last })?;
        let address_spaces = match features & backend::IOTLB_ASID {
            0 => 1,
            _ => fd.address_spaces().map_err(failed("VHOST_VDPA_GET_AS_NUM"))?.max(1),
        };
        let info = Info {
            range,
            batches: features & backend::IOTLB_BATCH != 0,
            persists: features & backend::IOTLB_PERSIST != 0,
            address_spaces,
        };
        Ok(Self::over(Box::new(fd), info))
    }

    fn over(kernel: Box<dyn Kernel>, info: Info) -> Self {
        let wire = Arc::new(Mutex::new(Wire::new(kernel, info.batches)));
        Self { wire, info, entries: Some(DEFAULT_ENTRIES), out_of_reach: OutOfReach::default() }
    }

    /// What it can do.
    #[must_use]
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// How many entries an address space has, where that is not [`DEFAULT_ENTRIES`]. More than the kernel has would be refused
    /// by it; more than the device has (a simulator has a limit of its own) is not noticed by anybody amid a batch.
    #[must_use]
    pub fn entries(self, entries: Option<u32>) -> Self {
        Self { entries, ..self }
    }

    /// What becomes of a mapping out of reach that the guest cannot be refused.
    #[must_use]
    pub fn out_of_reach(self, out_of_reach: OutOfReach) -> Self {
        Self { out_of_reach, ..self }
    }

    /// How the device is cut off when a mirror cannot follow the record. It is called at most until it succeeds, under the
    /// locks of a step, and must return only when the device can do no DMA. Then the descriptor is closed.
    ///
    /// Without this, the device is reset: its status is 0 then, and its rings do not run.
    #[must_use]
    pub fn fence(self, action: impl FnMut() -> Result<(), FenceFailed> + Send + 'static) -> Self {
        state::lock(&self.wire).action = Some(Box::new(action));
        self
    }

    /// A mirror of one address space that maps what lies in `memory`, and the embedder's handle to it. It looks into
    /// `memory` at each call, so one that can be exchanged (vm-memory's `GuestMemoryAtomic`) is seen as it is then.
    ///
    /// Memory must be mapped shared from a file (a memfd) where the device takes addresses of this process instead of pinned
    /// pages: of other memory such a device's kernel maps nothing, and says nothing.
    ///
    /// # Errors
    /// [`OpenError::NoAddressSpace`].
    pub fn mirror<A>(&self, asid: u32, memory: A) -> Result<(Mirror, Handle), OpenError>
    where
        A: GuestAddressSpace + Send + 'static,
        A::M: GuestMemoryBackend,
    {
        if asid >= self.info.address_spaces {
            return Err(OpenError::NoAddressSpace { asid, count: self.info.address_spaces });
        }
        let state = State {
            range: self.info.range,
            batches: self.info.batches,
            limit: self.entries,
            out_of_reach: self.out_of_reach,
            memory: resolve_in(memory),
            held: Holdings::default(),
        };
        let (state, wire) = (Arc::new(Mutex::new(state)), &self.wire);
        let line = Line { wire: wire.clone(), asid, in_step: false };
        Ok((Mirror { state: state.clone(), line }, Handle { state, wire: wire.clone(), asid }))
    }
}

/// Of what a device offers, what it is told to use.
fn wanted(offered: u64, more: u64) -> Result<u64, OpenError> {
    if offered & backend::IOTLB_MSG_V2 == 0 {
        return Err(OpenError::NoMessages);
    }
    match more & !offered {
        0 => {}
        missing => return Err(OpenError::NoFeatures(missing)),
    }
    let ours = backend::IOTLB_MSG_V2 | backend::IOTLB_BATCH | backend::IOTLB_ASID | backend::IOTLB_PERSIST;
    Ok(offered & ours | more)
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("info", &self.info)
            .field("entries", &self.entries)
            .finish_non_exhaustive()
    }
}

/// The mirror of an address space, for [`Endpoint::subscribe_mirror`](viommu::Endpoint::subscribe_mirror).
pub struct Mirror {
    state: Arc<Mutex<State>>,
    line: Line,
}

/// What of the mirror stays with the embedder. Its calls take the mirror's lock, so they wait for a message that is being
/// written; they may be made from any thread, but not from a subscriber's callback.
#[derive(Clone)]
pub struct Handle {
    state: Arc<Mutex<State>>,
    wire: Arc<Mutex<Wire>>,
    asid: u32,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl subscribe::Mirror for Mirror {
    fn reach(&self) -> Reach {
        lock(&self.state).reach()
    }

    fn begin(&mut self) {
        self.line.in_step = true;
    }

    fn commit(&mut self) -> Ack {
        self.line.commit()
    }

    fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        lock(&self.state).map(&self.line, extent)
    }

    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        lock(&self.state).unmap(&self.line, range)
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        lock(&self.state).fence(&self.line)
    }

    fn held(&self) -> Vec<Mapping> {
        lock(&self.state).held.mappings()
    }
}

impl Handle {
    /// Messages of UPDATE that the kernel has had and not lost: one for each region of memory that an extent touches. Each
    /// takes at least one entry of the kernel's; memory that is not contiguous takes more.
    #[must_use]
    pub fn entries(&self) -> u64 {
        lock(&self.state).held.entries()
    }

    /// Whether the device has been cut off.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        state::lock(&self.wire).is_closed()
    }

    /// Extents whose memory lies elsewhere in this process than when they were mapped, or nowhere: the device still uses
    /// what was there. [`Subscription::replay`](viommu::Subscription::replay) maps all anew then.
    #[must_use]
    pub fn stale(&self) -> Vec<Mapping> {
        let state = lock(&self.state);
        let moved = |held: &&Holding| (state.memory)(&held.mapping).ok().as_ref() != Some(&held.pieces);
        state.held.iter().filter(moved).map(|held| held.mapping).collect()
    }
}

impl fmt::Debug for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Line { wire, asid, .. } = &self.line;
        let handle = Handle { state: self.state.clone(), wire: wire.clone(), asid: *asid };
        f.debug_tuple("Mirror").field(&handle).finish()
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.state);
        f.debug_struct("Handle")
            .field("asid", &self.asid)
            .field("entries", &state.held.entries())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
