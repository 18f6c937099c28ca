//! The connection, as the cache (inside steps) and the embedder's loop see it.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use viommu::ack::Resolver;
use viommu::{Access, Ack, Iova, IovaRange, Mapping};
use viommu_memory::HostPiece;
use zerocopy::IntoBytes;

use super::held::Held;
use super::{Counts, FrontendError};
use crate::spec::{IotlbMsg, kind, perm};
use crate::user::spec::{flag, request};
use crate::user::wire::{Message, Sender, WireError};

/// Extents that are remembered as held; with more, the back end is told to drop all.
const MAX_HELD: usize = 1 << 16;

/// What both sides share. No lock of the core is taken under `state`, and nothing waits under it.
#[derive(Debug)]
pub(super) struct Link {
    /// To the back end.
    pub(super) main: UnixStream,
    /// The back end's own channel.
    pub(super) back: UnixStream,
    /// How long an answer may take.
    pub(super) limit: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) out: Sender,
    /// Answers to IOTLB messages that are to come, in the order of the messages.
    expected: VecDeque<Expected>,
    /// IOTLB messages sent, and answered.
    pub(super) sent: u64,
    pub(super) answered: u64,
    /// The last INVALIDATE that no unmap waits for, by its number in `sent`.
    unawaited: u64,
    /// Whether the back end has an IOTLB: VIRTIO_F_ACCESS_PLATFORM was negotiated with it.
    pub(super) active: bool,
    pub(super) closed: bool,
    held: Held,
    pub(super) counts: Counts,
}

#[derive(Debug)]
struct Expected {
    since: Instant,
    /// Of an INVALIDATE.
    resolver: Option<Resolver>,
}

/// Dropped or resolved when no lock is held: it wakes others.
type Fates = Vec<Resolver>;

impl Link {
    pub(super) fn new(main: UnixStream, back: UnixStream, limit: Duration) -> Self {
        Self { main, back, limit, state: Mutex::default() }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Nothing under it panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new entry, in pieces of host memory. Called inside a fill.
    pub(super) fn update(&self, entry: &Mapping, pieces: &[HostPiece]) {
        let mut fates = Fates::new();
        let mut state = self.state();
        if !state.active || state.closed {
            return;
        }
        let outcome = state.update(&self.main, entry, pieces);
        if outcome.is_err() {
            self.shut(&mut state, &mut fates);
        }
        drop(state);
        drop(fates);
    }

    /// The back end is to drop `range`. Called inside a step.
    pub(super) fn invalidate(&self, range: IovaRange) -> Ack {
        let mut fates = Fates::new();
        let mut state = self.state();
        // What was taken back for another reason may be in use until that has been answered.
        let unanswered = if state.closed { state.sent } else { state.unawaited };
        let has = state.held.remove(range) || state.answered < unanswered;
        if !state.active || !has {
            return Ack::Done;
        }
        if state.closed {
            // Whether it has stopped, nobody knows: the fence finds out.
            return Ack::pending().0;
        }
        let (ack, resolver) = Ack::pending();
        state.counts.invalidates = state.counts.invalidates.saturating_add(1);
        if state.post(&self.main, invalidation(range), Some(resolver)).is_err() {
            self.shut(&mut state, &mut fates);
        }
        drop(state);
        drop(fates);
        ack
    }

    /// A message of the embedder's, between those of ours.
    pub(super) fn forward(&self, message: Message) -> Result<(), WireError> {
        let mut state = self.state();
        let State { out, .. } = &mut *state;
        out.send(&self.main, message)
    }

    /// The features that the embedder sets, on their way.
    pub(super) fn set_active(&self, active: bool, message: Message) -> Result<(), WireError> {
        let mut state = self.state();
        if state.active != active {
            state.held.clear(); // setting the bit makes an empty IOTLB, clearing it destroys one
        }
        state.active = active;
        state.out.send(&self.main, message)
    }

    /// The back end has answered the oldest IOTLB message.
    pub(super) fn answer(&self, value: u64) -> Result<(), FrontendError> {
        let mut state = self.state();
        let expected = state.expected.pop_front().ok_or(FrontendError::Protocol("an answer to nothing"))?;
        state.answered = state.answered.wrapping_add(1);
        if value != 0 {
            state.counts.refused = state.counts.refused.saturating_add(1);
        }
        drop(state);
        match expected.resolver {
            Some(resolver) if value == 0 => resolver.done(),
            Some(resolver) => resolver.failed(),
            None => {}
        }
        Ok(())
    }

    /// Until when the oldest answer must be there.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let state = self.state();
        state.expected.front().and_then(|expected| expected.since.checked_add(self.limit))
    }

    /// Ends the connection. What was to be acknowledged has failed, so the core fences.
    pub(super) fn close(&self) {
        let mut fates = Fates::new();
        let mut state = self.state();
        self.shut(&mut state, &mut fates);
        drop(state);
        drop(fates);
    }

    fn shut(&self, state: &mut State, fates: &mut Fates) {
        state.closed = true;
        fates.extend(state.expected.drain(..).filter_map(|expected| expected.resolver));
        for socket in [&self.main, &self.back] {
            // One that has ended already is what is wanted.
            let _ended = socket.shutdown(Shutdown::Both);
        }
    }

    pub(super) fn held(&self) -> Vec<Mapping> {
        self.state().held.all()
    }
}

impl State {
    fn update(&mut self, main: &UnixStream, entry: &Mapping, pieces: &[HostPiece]) -> Result<(), WireError> {
        if self.held.len() >= MAX_HELD {
            self.held.clear();
            self.take_back(main, IovaRange::ALL)?;
        }
        for stale in self.held.add(entry) {
            self.take_back(main, stale)?;
        }
        for piece in pieces {
            self.counts.updates = self.counts.updates.saturating_add(1);
            // A piece of memory is no longer than that.
            let size = u64::try_from(piece.iova.bytes()).unwrap_or(u64::MAX);
            let uaddr = u64::try_from(piece.address.addr()).unwrap_or(u64::MAX);
            let perm = perm_of(entry.access);
            let iova = piece.iova.start().0;
            self.post(
                main,
                IotlbMsg { iova, size, uaddr, perm, kind: kind::UPDATE, ..IotlbMsg::default() },
                None,
            )?;
        }
        Ok(())
    }

    fn take_back(&mut self, main: &UnixStream, range: IovaRange) -> Result<(), WireError> {
        self.post(main, invalidation(range), None)?;
        self.unawaited = self.sent;
        Ok(())
    }

    fn post(
        &mut self,
        main: &UnixStream,
        body: IotlbMsg,
        resolver: Option<Resolver>,
    ) -> Result<(), WireError> {
        self.expected.push_back(Expected { since: Instant::now(), resolver });
        self.sent = self.sent.wrapping_add(1);
        self.out.send(main, Message::new(request::IOTLB_MSG, flag::NEED_REPLY, body.as_bytes()))
    }
}

/// Back ends compute `iova + size`, and some stop at a sum that wraps. Entries are made of pages and dropped wholly, so
/// without the last byte of all the last page's entry goes as well.
fn invalidation(range: IovaRange) -> IotlbMsg {
    let Iova(iova) = range.start();
    let size = range.last().0.saturating_sub(iova);
    let size = if range.last().0 == u64::MAX { size } else { size.saturating_add(1) };
    IotlbMsg { iova, size, kind: kind::INVALIDATE, ..IotlbMsg::default() }
}

fn perm_of(access: Access) -> u8 {
    let read = if access.contains(Access::READ) { perm::READ } else { 0 };
    let write = if access.contains(Access::WRITE) { perm::WRITE } else { 0 };
    read | write
}
