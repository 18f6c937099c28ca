//! A mirror over vfio-user: the server has exactly the windows that the record has.
//!
//! A guest's unmap is a DMA_UNMAP for each window, of exactly what was mapped; its reply is the server's word that it uses
//! the window no more, and the step waits for it. Nothing is assumed: a reply that does not come in time, or is another
//! than the one awaited, ends the connection and fences the mirror.

mod pieces;
mod state;

use core::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::subscribe::{self, FenceFailed, OutOfReach, Reach, Refused, Unmapped};
use viommu::{Ack, GpaRange, IovaRange, Mapping};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use super::Client;
use pieces::resolve_in;
use state::State;

/// What becomes of guest memory that has no file here (`GuestMemoryRegion::file_offset`), or is not here at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum NoFile {
    /// It is left out: the device faults there, the guest is told nothing, and [`Handle::left_out`] has it.
    #[default]
    LeaveOut,
    /// The server gets a window without a file and asks for each access by a message.
    Messages,
}

type Action = Box<dyn FnMut() -> Result<(), FenceFailed> + Send>;

/// How a mirror is to be.
#[derive(Default)]
pub struct MirrorOptions {
    no_file: NoFile,
    by_messages: bool,
    out_of_reach: OutOfReach,
    action: Option<Action>,
}

impl MirrorOptions {
    /// What becomes of memory without a file.
    #[must_use]
    pub fn no_file(self, no_file: NoFile) -> Self {
        Self { no_file, ..self }
    }

    /// The server gets no files: each access is a message, which [`DeviceMemory`](super::DeviceMemory) answers. Slow, and
    /// exact against any server. It is so without being said where the server takes no descriptors.
    #[must_use]
    pub fn by_messages(self) -> Self {
        Self { by_messages: true, ..self }
    }

    /// What becomes of a mapping out of reach that the guest cannot be refused.
    #[must_use]
    pub fn out_of_reach(self, out_of_reach: OutOfReach) -> Self {
        Self { out_of_reach, ..self }
    }

    /// How the device is cut off when it cannot follow the record: end the server's process, say. It is called until it
    /// succeeds, under the locks of a step, and must return only when the device can do no DMA.
    ///
    /// Without this the connection is ended, and the fence holds when the server has closed its own end: it has unmapped
    /// everything by then, or is gone. A server that has not within the limit, or that keeps memory against the protocol,
    /// is not cut off by that.
    #[must_use]
    pub fn fence(self, action: impl FnMut() -> Result<(), FenceFailed> + Send + 'static) -> Self {
        Self { action: Some(Box::new(action)), ..self }
    }
}

impl fmt::Debug for MirrorOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MirrorOptions")
            .field("no_file", &self.no_file)
            .field("by_messages", &self.by_messages)
            .field("out_of_reach", &self.out_of_reach)
            .field("action", &self.action.is_some())
            .finish()
    }
}

/// The mirror, for `Endpoint::subscribe_mirror`. A new connection takes a new one: its server has nothing, and subscribing
/// replays.
pub struct Mirror(Arc<Mutex<State>>);

/// What of the mirror stays with the embedder. Its calls take the mirror's lock, so they wait for a call to the server that
/// is under way; they may be made from any thread, but not from a subscriber's callback.
#[derive(Clone)]
pub struct Handle(Arc<Mutex<State>>);

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Client {
    /// A mirror that gives the server windows of what lies in `memory`, and the embedder's handle to it. It looks into
    /// `memory` at each call, so one that can be exchanged is seen as it is then. One for a connection.
    pub fn mirror<A>(&self, memory: A, options: MirrorOptions) -> (Mirror, Handle)
    where
        A: GuestAddressSpace + Send + 'static,
        A::M: GuestMemoryBackend,
    {
        let by_messages = options.by_messages || self.capabilities().fds == 0;
        let options = MirrorOptions { by_messages, ..options };
        let state = Arc::new(Mutex::new(State::new(self.clone(), options, resolve_in(memory))));
        (Mirror(state.clone()), Handle(state))
    }
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
        lock(&self.0).held.values().map(|held| held.mapping).collect()
    }
}

impl Handle {
    /// Windows that the server has.
    #[must_use]
    pub fn windows(&self) -> u64 {
        lock(&self.0).windows
    }

    /// What is held in the record's sense and not mapped, since there is no file for it.
    #[must_use]
    pub fn left_out(&self) -> Vec<IovaRange> {
        lock(&self.0).held.values().flat_map(|held| held.pieces.lacks.iter().copied()).collect()
    }

    /// The memory at `gpas` has come, gone, or is another, and the backing has not: what is mapped to it is looked up again,
    /// and windows that differ are taken away and given anew. When it returns, the server has no window of memory that is
    /// not there any more.
    ///
    /// # Errors
    /// The server does not follow, and could not be cut off: the machine must be stopped. One that could be is fenced, and
    /// the record hears of it at its next step.
    pub fn refresh(&self, gpas: GpaRange) -> Result<(), FenceFailed> {
        lock(&self.0).refresh(gpas)
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
            .field("client", &state.client)
            .field("windows", &state.windows)
            .field("fenced", &state.fenced)
            .finish_non_exhaustive()
    }
}
