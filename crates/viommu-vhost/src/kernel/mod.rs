//! A cache over a vhost device of the kernel's: vhost-net, vhost-vsock, vhost-scsi.
//!
//! The device's rings and buffers are then addresses of its own. What it has no translation for it asks (MISS), and this
//! answers through the record; what the guest takes away it is told before the guest hears that it is gone. The embedder
//! owns the device: it opens and sets it up, with the `vhost` crate or by itself, and hands over a duplicate of its
//! descriptor.
//!
//! ```no_run
//! use std::os::fd::OwnedFd;
//! use std::sync::Arc;
//! use viommu::{Endpoint, Interest};
//! use viommu_vhost::kernel::{Device, Protocol, fence};
//! use vm_memory::GuestMemoryMmap;
//!
//! # fn wait_for(_: bool, _: Option<std::time::Instant>) {}
//! # fn f(endpoint: Endpoint, memory: Arc<GuestMemoryMmap>, vhost: OwnedFd) -> Result<(), Box<dyn std::error::Error>> {
//! // After VHOST_SET_OWNER and VHOST_SET_MEM_TABLE; before VHOST_SET_FEATURES.
//! let protocol = Protocol::negotiate(&vhost)?;
//! let device = Device::new(vhost.try_clone()?, protocol)?.fence(fence::net(vhost.try_clone()?, 2));
//! let (cache, handle) = device.cache(memory);
//! let subscription = endpoint.subscribe_cache(Box::new(cache), Interest::CACHE)?;
//!
//! // VHOST_SET_FEATURES with VIRTIO_F_ACCESS_PLATFORM; the rings' addresses, which are the device's own.
//! handle.start()?;
//! // VHOST_NET_SET_BACKEND. A thread of the embedder's then serves the device:
//! loop {
//!     let turn = handle.serve(&subscription)?;
//!     if !turn.more {
//!         wait_for(turn.waits, turn.deadline); // poll(2): readable, writable if it waits, until the deadline
//!     }
//! }
//! # }
//! ```
//!
//! # What happens when
//! | event | what is done |
//! | --- | --- |
//! | MISS | translated and answered with UPDATE, as one act against every step: the extent from the missed page on, cut to its region of memory, with the mapping's own permission |
//! | MISS of what is not mapped, or not so | no answer: counted, logged, given to [`Device::faults`]. The ring waits |
//! | mappings, views or memory go | INVALIDATE, where the device may hold some of it; else nothing |
//! | the device takes no message | what it must be told waits in order, steps are pending (nobody else is held up), [`Handle::serve`] tries again; at the time limit the device is cut off |
//! | the device refuses an INVALIDATE | it is cut off |
//!
//! The repository's `docs/vhost-kernel.md` has the table of errors.

mod counts;
pub mod fence;
mod host;
mod line;
#[cfg(feature = "bench")]
mod nothing;
mod protocol;
mod serve;
mod state;
#[expect(unsafe_code, reason = "ioctls")]
mod sys;

use core::fmt;
use std::io;
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use viommu::reader::FaultSink;
use viommu::subscribe::{self, FenceFailed};
use viommu::{Ack, IovaRange, Mapping};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

pub use counts::Counts;
use line::Line;
pub use protocol::{Protocol, ProtocolError};
pub use serve::{ServeError, Turn};
use state::{Phase, Settings, Shared, Wake};

use crate::software::DEFAULT_CAPACITY;

/// How long a removal may wait for the device.
const TIME_LIMIT: Duration = Duration::from_secs(2);

/// Who writes to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Writes {
    /// The step that removes something, at once, if the device takes it; the kernel is seldom long about it. A guest hears of
    /// its unmap the sooner.
    #[default]
    InStep,
    /// [`Handle::serve`] alone. For a device whose ring may be held up for long, since the memory that it works on is not
    /// there (userfaultfd): a step never waits for that.
    ByWorker,
}

/// A device that a cache will be made over.
pub struct Device {
    line: Arc<dyn Line>,
    settings: Settings,
    wake: Option<Wake>,
}

impl Device {
    /// Over a descriptor of a vhost device, which is made not to block on reading: its duplicates too. Nothing is said to
    /// the device before [`Handle::start`].
    ///
    /// # Errors
    /// That of `fcntl`.
    pub fn new(fd: OwnedFd, protocol: Protocol) -> io::Result<Self> {
        Ok(Self::over(Arc::new(line::Fd::new(fd)?), protocol))
    }

    fn over(line: Arc<dyn Line>, protocol: Protocol) -> Self {
        let settings = Settings {
            protocol,
            action: None,
            faults: None,
            room: DEFAULT_CAPACITY,
            by_worker: false,
            limit: TIME_LIMIT,
        };
        Self { line, settings, wake: None }
    }

    /// Entries that the device is to hold at most (2048, vhost's own number): the oldest is dropped for a new one.
    #[must_use]
    pub fn entries(mut self, entries: NonZero<usize>) -> Self {
        self.settings.room = entries.get();
        self
    }

    /// How long a removal may wait for the device to read it (2 s) before the device is cut off.
    #[must_use]
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.settings.limit = limit;
        self
    }

    /// Who writes to the device.
    #[must_use]
    pub fn writes(mut self, writes: Writes) -> Self {
        self.settings.by_worker = writes == Writes::ByWorker;
        self
    }

    /// Called when something begins to wait for the device: the thread that serves it is to call [`Handle::serve`].
    /// It runs under the locks of a step and must do no more than wake that thread (an eventfd, say).
    #[must_use]
    pub fn on_wait(mut self, wake: impl Fn() + Send + Sync + 'static) -> Self {
        self.wake = Some(Box::new(wake));
        self
    }

    /// Hears of misses that have no answer, on the thread that serves: a model's fault queue, by which the guest is told.
    #[must_use]
    pub fn faults(mut self, sink: Arc<dyn FaultSink>) -> Self {
        self.settings.faults = Some(sink);
        self
    }

    /// How the device is cut off when it cannot follow the record: see [`fence`] for ready-made ways. It is called until it
    /// succeeds once, under the locks of a step, and must return only when the device works on no ring.
    ///
    /// Without this, the device is told to drop everything, and then gets no answers. It fails where the device does not
    /// take that.
    #[must_use]
    pub fn fence(mut self, action: impl FnMut() -> Result<(), FenceFailed> + Send + 'static) -> Self {
        self.settings.action = Some(Box::new(action));
        self
    }

    /// A cache whose device reaches what lies in `memory`, and the embedder's handle to it. It looks into `memory` at each
    /// answer, so one that can be exchanged (vm-memory's `GuestMemoryAtomic`) is seen as it is then.
    pub fn cache<A>(self, memory: A) -> (Cache, Handle)
    where
        A: GuestAddressSpace + Send + 'static,
        A::M: GuestMemoryBackend,
    {
        let shared = Shared::new(self.line, host::resolve_in(memory), self.settings, self.wake);
        let shared = Arc::new(shared);
        (Cache(shared.clone()), Handle(shared))
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("protocol", &self.settings.protocol).finish_non_exhaustive()
    }
}

/// The cache, for [`Endpoint::subscribe_cache`](viommu::Endpoint::subscribe_cache) with
/// [`Interest::CACHE`](viommu::Interest::CACHE). Closes its descriptor of the device when it is dropped or fenced: a device
/// whose subscription has left has no entry, and gets no answer.
pub struct Cache(Arc<Shared>);

/// What of the cache stays with the embedder. Its calls may be made from any thread, but not from a subscriber's callback.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl subscribe::Cache for Cache {
    fn install(&mut self, entry: &Mapping) {
        self.0.install(entry);
    }

    fn invalidate(&mut self, range: IovaRange) -> Ack {
        self.0.invalidate(range)
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        self.0.fence()
    }

    fn held(&self) -> Option<Vec<Mapping>> {
        Some(held(&self.0))
    }
}

impl Drop for Cache {
    /// What it had to say is said, or the device has been cut off.
    fn drop(&mut self) {
        self.0.close();
    }
}

fn held(shared: &Shared) -> Vec<Mapping> {
    shared.state().held.iter().copied().collect()
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").finish_non_exhaustive()
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

impl Handle {
    /// The device has its IOTLB: to be called after each VHOST_SET_FEATURES with
    /// [`VIRTIO_F_ACCESS_PLATFORM`](crate::spec::VIRTIO_F_ACCESS_PLATFORM), before its rings have back-ends. The IOTLB is
    /// emptied, which also shows that there is one. Until then, the device counts as stopped. Once more changes nothing.
    ///
    /// # Errors
    /// The device's answer to that (EFAULT where it has no IOTLB), EBUSY for one that could not be told of a removal and
    /// has not been stopped, EBADF for one that was cut off. It stays as it was.
    pub fn start(&self) -> io::Result<()> {
        Ok(self.0.start()?)
    }

    /// The device works on no ring, and its entries do not matter any more: to be called when its back-ends have been taken
    /// away, before its features change or it is closed. What waits for it is over; it is told nothing until it is started
    /// again. Waits for a message that is being written.
    ///
    /// The caller vouches for it: a device that still works on a ring would use what the guest has taken away.
    pub fn stop(&self) {
        self.0.stop();
    }

    /// Gives the device up, if a removal has waited too long at `now`: whoever waits for it then cuts the device off.
    /// [`Handle::serve`] does that too; with [`Writes::ByWorker`], another thread must, since the one that serves may be
    /// held up.
    pub fn expire(&self, now: Instant) {
        self.0.expire(now);
    }

    /// What the device may hold, with guest physical addresses: at least what it does hold.
    #[must_use]
    pub fn held(&self) -> Vec<Mapping> {
        held(&self.0)
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.0.state().counts
    }

    /// Whether it has been cut off.
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        self.0.state().phase == Phase::Fenced
    }
}

#[cfg(test)]
mod tests;
