//! The back end: what a device in a process of its own needs to live behind an IOMMU.
//!
//! [`Backend`] owns the connection to the front end, and gives the daemon another in its place, for whatever speaks
//! vhost-user in it: the `vhost` crate's `BackendReqHandler`, say. IOTLB messages and the channel for MISSes do not get
//! there; all else passes, both ways, and what it says of features and memory is noted on the way.
//!
//! ```text
//! front end <--main--> Backend <--> vhost::vhost_user::BackendReqHandler
//!      ^-- MISS -- DeviceMemory: guards, and MISSes where there is no entry
//! ```
//!
//! - [`DeviceMemory`] is guest memory at the device's addresses; [`DeviceIommu`] the same as vm-memory's `Iommu`.
//! - An INVALIDATE is answered when nobody is inside what it takes back: no access that began before still runs, and
//!   none that begins later finds it. A new memory table likewise.
//! - What the front end sends is checked: ranges, permissions, addresses outside its memory table are answered with a
//!   failure and change nothing; what is no message ends the connection. Entries are capped: the IOTLB is emptied when
//!   it is full.
//!
//! A thread of the daemon's calls [`Backend::process`] when a socket is readable, or is given to [`Backend::serve`]. It must
//! be neither that of the device's accesses, nor that of the daemon's vhost-user code: both wait for it.

mod iommu;
mod iotlb;
mod memory;
mod misses;
mod ring;
mod table;

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use viommu::StepError;
use vm_memory::GuestAddress;

use self::iotlb::Iotlb;
use self::table::Table;
use super::iotlb_message;
use super::spec::{backend_request, protocol, request};
use super::wire::{Message, Receiver, Sender, WireError};
use crate::spec::VIRTIO_F_ACCESS_PLATFORM;

pub use self::iommu::DeviceIommu;
pub use self::iotlb::Memory;
pub use self::memory::{DeviceGuard, DeviceMemory};
pub use self::misses::MissError;
pub use self::ring::Ring;
pub use self::table::TableError;

/// Messages that are taken from one socket before the others are looked at.
const BATCH: usize = 64;
/// Times that all sockets are looked at in one call: a peer may send without end.
const ROUNDS: usize = 16;

/// How a back end behaves.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BackendOptions {
    /// How long an access waits for the front end's UPDATE. 5 s unless told otherwise.
    pub patience: Duration,
    /// How long a guard may last that an INVALIDATE waits for; then the connection ends. 5 s unless told otherwise.
    pub limit: Duration,
    /// Entries at most, at least 1. 65536 unless told otherwise.
    pub entries: u64,
    /// Memory may be a file that is not sealed against shrinking: one that shrinks kills this process.
    pub allow_unsealed: bool,
}

impl Default for BackendOptions {
    fn default() -> Self {
        let patience = memory::PATIENCE;
        Self { patience, limit: patience, entries: 1 << 16, allow_unsealed: false }
    }
}

/// Why the connection is over; it is closed, and nothing can be reached any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The front end or the daemon's end is gone, or has sent what is no message.
    #[error("the {end}: {error}")]
    Wire {
        /// Which socket.
        end: &'static str,
        /// What is wrong.
        error: WireError,
    },
    /// What the front end says makes no sense.
    #[error("the front end sends {0}")]
    Protocol(&'static str),
    /// The memory table cannot be had.
    #[error(transparent)]
    Table(TableError),
    /// A guard lasts too long.
    #[error("the device holds a guard for longer than {0:?}")]
    Busy(Duration),
    /// The IOTLB itself failed, when it was made or later.
    #[error("the IOTLB: {0}")]
    Setup(String),
    /// It was closed before.
    #[error("the connection is closed")]
    Closed,
}

impl BackendError {
    fn step(error: StepError) -> Self {
        Self::Setup(error.to_string())
    }
}

/// What there was on a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// MISSes sent.
    pub misses: u64,
    /// UPDATEs that took effect.
    pub updates: u64,
    /// INVALIDATEs answered.
    pub invalidates: u64,
    /// Messages answered with a failure.
    pub refused: u64,
}

/// A vhost-user connection whose device is behind an IOMMU.
#[derive(Debug)]
pub struct Backend {
    iotlb: Arc<Iotlb>,
    main: UnixStream,
    /// To the daemon's vhost-user code.
    inner: UnixStream,
    options: BackendOptions,
    incoming: Mutex<Incoming>,
    refused: AtomicU64,
}

/// What one thread at a time goes through.
#[derive(Debug, Default)]
struct Incoming {
    main: Receiver,
    back: Receiver,
    inner: Receiver,
    to_main: Sender,
    to_inner: Sender,
    channel: Option<Arc<UnixStream>>,
    /// Protocol features.
    protocol: u64,
    closed: bool,
}

impl Backend {
    /// Over `main`, a connection of a front end's on which nothing has been read. Gives the socket for the daemon's own
    /// vhost-user code, which uses it as it would `main`: it offers VIRTIO_F_ACCESS_PLATFORM and the protocol features
    /// REPLY_ACK and BACKEND_REQ, and takes memory from [`Backend::memory`] and ring addresses from
    /// [`Backend::ring_address`].
    ///
    /// # Errors
    /// There are no descriptors left, or no address space for the IOTLB's tables.
    pub fn new(main: UnixStream, options: BackendOptions) -> Result<(Self, UnixStream), BackendError> {
        let setup = |error: std::io::Error| BackendError::Setup(error.to_string());
        let (inner, daemon) = UnixStream::pair().map_err(setup)?;
        let iotlb = Arc::new(Iotlb::new(&options)?);
        let (incoming, refused) = Default::default();
        Ok((Self { iotlb, main, inner, options, incoming, refused }, daemon))
    }

    /// Guest memory at the device's addresses.
    ///
    /// # Errors
    /// The connection is over.
    pub fn memory(&self) -> Result<DeviceMemory, BackendError> {
        DeviceMemory::new(self.iotlb.clone())
    }

    /// The same as vm-memory's `Iommu`, over [`Backend::physical`].
    ///
    /// # Errors
    /// The connection is over.
    pub fn iommu(&self) -> Result<DeviceIommu, BackendError> {
        DeviceIommu::new(self.iotlb.clone())
    }

    /// Guest memory by guest physical address, untranslated.
    #[must_use]
    pub fn physical(&self) -> Memory {
        self.iotlb.memory.clone()
    }

    /// The address, for [`Backend::memory`], of what SET_VRING_ADDR says: the same where addresses are translated; without
    /// VIRTIO_F_ACCESS_PLATFORM it is one of the front end's own, which must be in its memory table.
    #[must_use]
    pub fn ring_address(&self, said: u64) -> Option<GuestAddress> {
        if self.iotlb.is_active() {
            return Some(GuestAddress(said));
        }
        self.iotlb.table().guest_of(said, 1).map(GuestAddress)
    }

    /// What there was.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counts {
            misses: self.iotlb.misses.count(),
            updates: load(&self.iotlb.updates),
            invalidates: load(&self.iotlb.invalidates),
            refused: load(&self.refused),
        }
    }

    /// Entries in the IOTLB now.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.iotlb.len()
    }

    /// Calls `f` with what to poll for reading: the front end's, its channel for MISSes where there is one, the daemon's.
    fn with_sockets<R>(&self, f: impl FnOnce(&[(BorrowedFd<'_>, bool)]) -> R) -> R {
        let incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = incoming.channel.clone();
        let sending = [!incoming.to_main.is_empty(), !incoming.to_inner.is_empty()];
        drop(incoming);
        let mut sockets = vec![(self.main.as_fd(), sending[0]), (self.inner.as_fd(), sending[1])];
        if let Some(channel) = &channel {
            sockets.push((channel.as_fd(), self.iotlb.misses.wants_to_write()));
        }
        f(&sockets)
    }

    /// Waits until there is something to be done, for `limit` at most where one is given. Blocks.
    ///
    /// # Errors
    /// The system's.
    pub fn wait(&self, limit: Option<Duration>) -> Result<(), BackendError> {
        let limit = limit.and_then(|limit| rustix::event::Timespec::try_from(limit).ok());
        let polled = self.with_sockets(|sockets| {
            let events = |out| if out { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            let mut fds: Vec<_> =
                sockets.iter().map(|(socket, out)| PollFd::new(socket, events(*out))).collect();
            poll(&mut fds, limit.as_ref())
        });
        match polled {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(BackendError::Wire { end: "sockets", error: errno.into() }),
        }
    }

    /// Processes until the connection is over; gives why. Blocks: for a thread of the daemon's.
    pub fn serve(&self) -> BackendError {
        loop {
            if let Err(error) = self.process().and_then(|()| self.wait(None)) {
                self.close();
                return error;
            }
        }
    }

    /// Ends the connection, from any thread: nothing can be reached any more. Does not wait for who is inside a guard.
    pub fn close(&self) {
        self.iotlb.close();
        for socket in [&self.main, &self.inner] {
            // One that has ended already is what is wanted.
            let _ended = socket.shutdown(Shutdown::Both);
        }
    }

    /// Does what is to be done on the sockets. Blocks for guards that an INVALIDATE must wait for, at most for
    /// [`BackendOptions::limit`]. One thread at a time, which holds no guard.
    ///
    /// # Errors
    /// The connection is over and closed: to be called no more.
    pub fn process(&self) -> Result<(), BackendError> {
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        if incoming.closed {
            return Err(BackendError::Closed);
        }
        let outcome = self.turn(&mut incoming);
        if outcome.is_err() {
            incoming.closed = true;
            self.close();
        }
        outcome
    }

    fn turn(&self, incoming: &mut Incoming) -> Result<(), BackendError> {
        let at = |end| move |error| BackendError::Wire { end, error };
        incoming.to_main.flush(&self.main).map_err(at("front end"))?;
        incoming.to_inner.flush(&self.inner).map_err(at("daemon"))?;
        self.iotlb.misses.flush().map_err(at("front end's channel"))?;
        for _ in 0..ROUNDS {
            let mut took = 0_usize;
            for _ in 0..BATCH {
                let Some(message) = incoming.inner.next(&self.inner).map_err(at("daemon"))? else { break };
                took = took.saturating_add(1);
                incoming.to_main.send(&self.main, message).map_err(at("front end"))?;
            }
            if let Some(channel) = incoming.channel.clone() {
                for _ in 0..BATCH {
                    let next = incoming.back.next(&channel).map_err(at("front end's channel"))?;
                    let Some(message) = next else { break };
                    took = took.saturating_add(1);
                    let answer =
                        (message.request == backend_request::IOTLB_MSG).then(|| message.number()).flatten();
                    let answer = answer.and_then(|value| self.iotlb.misses.answered(value));
                    answer.ok_or(BackendError::Protocol("an answer to nothing"))?;
                }
            }
            for _ in 0..BATCH {
                let Some(message) = incoming.main.next(&self.main).map_err(at("front end"))? else { break };
                took = took.saturating_add(1);
                self.on_message(incoming, message)?;
            }
            if took == 0 {
                break;
            }
        }
        Ok(())
    }

    fn on_message(&self, incoming: &mut Incoming, mut message: Message) -> Result<(), BackendError> {
        match message.request {
            request::IOTLB_MSG => return self.iotlb_message(incoming, &message),
            request::SET_BACKEND_REQ_FD => return self.set_channel(incoming, message),
            request::SET_FEATURES => {
                let features =
                    message.number().ok_or(BackendError::Protocol("features that are no number"))?;
                self.iotlb.set_active(features & VIRTIO_F_ACCESS_PLATFORM != 0)?;
            }
            request::SET_PROTOCOL_FEATURES => incoming.protocol = message.number().unwrap_or(0),
            request::SET_MEM_TABLE => {
                let fds = clones(&message)?;
                let table = Table::read(&message.payload, fds, self.options.allow_unsealed);
                self.iotlb.set_table(table.map_err(BackendError::Table)?)?;
            }
            request::ADD_MEM_REG => {
                let region = Table::region_of(&message.payload).map_err(BackendError::Table)?;
                let mut table = self.iotlb.table();
                let fd =
                    clones(&message)?.pop().ok_or(BackendError::Protocol("memory without a descriptor"))?;
                table.add(region, fd, self.options.allow_unsealed).map_err(BackendError::Table)?;
                self.iotlb.set_table(table)?;
            }
            request::REM_MEM_REG => {
                let region = Table::region_of(&message.payload).map_err(BackendError::Table)?;
                let mut table = self.iotlb.table();
                table.remove(&region).map_err(BackendError::Table)?;
                self.iotlb.set_table(table)?;
                message.fds.clear(); // some send one, which is of no use
            }
            // The daemon waits for the device, and the front end for the daemon: MISSes are answered by nobody.
            request::GET_VRING_BASE | request::RESET_OWNER | request::RESET_DEVICE => {
                self.iotlb.misses.stop()
            }
            _ => {}
        }
        let sent = incoming.to_inner.send(&self.inner, message);
        sent.map_err(|error| BackendError::Wire { end: "daemon", error })
    }

    fn iotlb_message(&self, incoming: &mut Incoming, message: &Message) -> Result<(), BackendError> {
        let body = iotlb_message(&message.payload);
        let body = body.ok_or(BackendError::Protocol("an IOTLB message of a wrong size"))?;
        let outcome = self.iotlb.message(&body)?;
        if outcome.is_err() {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        let answer = message.answer(u64::from(outcome.is_err()));
        let sent = incoming.to_main.send(&self.main, answer);
        sent.map_err(|error| BackendError::Wire { end: "front end", error })
    }

    fn set_channel(&self, incoming: &mut Incoming, mut message: Message) -> Result<(), BackendError> {
        let fd = message.fds.pop().ok_or(BackendError::Protocol("a channel without a descriptor"))?;
        let channel = Arc::new(UnixStream::from(fd));
        let replies = incoming.protocol & protocol::REPLY_ACK != 0;
        self.iotlb.misses.connect(channel.clone(), replies);
        (incoming.channel, incoming.back) = (Some(channel), Receiver::default());
        if !message.wants_answer() {
            return Ok(());
        }
        let sent = incoming.to_main.send(&self.main, message.answer(0));
        sent.map_err(|error| BackendError::Wire { end: "front end", error })
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.close();
    }
}

/// Copies of the descriptors, since the daemon gets them too.
fn clones(message: &Message) -> Result<Vec<std::os::fd::OwnedFd>, BackendError> {
    let clones: std::io::Result<Vec<_>> = message.fds.iter().map(|fd| fd.try_clone()).collect();
    clones.map_err(|error| BackendError::Setup(error.to_string()))
}
