//! The front end: a device in another process, whose IOTLB is a cache of an endpoint.
//!
//! [`Frontend`] owns the socket to the back end, and gives the embedder another in its place, for whatever speaks
//! vhost-user in it: the `vhost` crate's `Frontend`, say. What comes from there goes to the back end as it is, and the
//! answers come back; the IOTLB's messages go between them, and the embedder's code sees none of it.
//!
//! ```text
//! vhost::vhost_user::Frontend <--> Frontend <--main--> back end
//!                     core: fill, invalidate ^ <--back-end channel-- MISS
//! ```
//!
//! The embedder calls [`Frontend::process`] when one of [`Frontend::sockets`] is readable, or gives a thread of its own
//! to [`Frontend::serve`]. That must not be the thread that waits for the back end's answers in the embedder's code.
//!
//! - A MISS is answered by [`Subscription::fill`]: an UPDATE with the mapping's true permission for each region of memory
//!   that it lies in, then, when the back end has it, the answer to the MISS.
//! - An unmap of what the back end holds sends INVALIDATE, and its ack is pending until the back end's answer is there.
//!   No step and no other subscriber waits for it.
//! - An answer that does not come within the time limit, or that says "failed", or a connection that ends, is never
//!   taken for done: the connection is closed, and the core fences: the endpoint is blocked, and the device's process
//!   is cut off by what the embedder gave to [`Frontend::cache`].

mod cache;
mod held;
mod link;
mod peer;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use viommu::reader::FaultSink;
use viommu::{Access, FillError, Iova, Subscription, Target};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use self::link::Link;
use super::iotlb_message;
use super::spec::{backend_request, flag, protocol, request};
use super::wire::{Message, Receiver, Sender, WireError};
use crate::spec::{VIRTIO_F_ACCESS_PLATFORM, kind};

pub use self::cache::{CutOff, FrontendCache};
pub use self::peer::Peer;

/// Messages that are taken from one socket before the others are looked at.
const BATCH: usize = 64;
/// Times that all sockets are looked at in one call: a peer may send without end.
const ROUNDS: usize = 16;
/// Answers that wait: for that to the UPDATE of their MISS, or behind another.
const MAX_MISSES: usize = 1 << 12;

/// Why the connection is over; it is closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrontendError {
    /// The back end or the embedder's end is gone, or has sent what is no message.
    #[error("the {end}: {error}")]
    Wire {
        /// Which socket.
        end: &'static str,
        /// What is wrong.
        error: WireError,
    },
    /// What the back end says makes no sense.
    #[error("the back end sends {0}")]
    Protocol(&'static str),
    /// An answer did not come in time.
    #[error("the back end has not answered for {0:?}")]
    TimedOut(Duration),
    /// The embedder and the back end have agreed on VIRTIO_F_ACCESS_PLATFORM, but not on what an IOTLB takes.
    #[error("an IOTLB takes the protocol features REPLY_ACK and BACKEND_REQ")]
    Negotiation,
    /// It was closed before.
    #[error("the connection is closed")]
    Closed,
}

/// What there was on a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// MISSes of the back end.
    pub misses: u64,
    /// Those for which there was nothing to give.
    pub misses_refused: u64,
    /// UPDATEs sent.
    pub updates: u64,
    /// INVALIDATEs sent that an unmap waits for.
    pub invalidates: u64,
    /// Messages that the back end has answered with a failure.
    pub refused: u64,
    /// Accesses that the back end says its IOTLB forbade.
    pub access_fails: u64,
}

/// A vhost-user connection whose IOTLB is a cache of the core.
pub struct Frontend {
    link: Arc<Link>,
    /// To the embedder's code.
    inner: UnixStream,
    faults: Option<Arc<dyn FaultSink>>,
    incoming: Mutex<Incoming>,
}

/// What one thread at a time goes through.
#[derive(Default)]
struct Incoming {
    main: Receiver,
    back: Receiver,
    inner: Receiver,
    to_inner: Sender,
    to_back: Sender,
    /// The back end's end of its channel, until it has been sent.
    channel: Option<OwnedFd>,
    /// SET_BACKEND_REQ_FD was sent, and its answer is to come.
    channel_sent: bool,
    features: u64,
    protocol: u64,
    /// In the order of the back end's messages: nothing else says which answer is whose.
    answers: VecDeque<Answer>,
}

/// An answer on the back end's channel. Of the message that it is for, nothing is kept.
struct Answer {
    message: Message,
    /// It goes when so many IOTLB messages have been answered, and says "failed" if more than so many have failed.
    after: Option<(u64, u64)>,
}

impl std::fmt::Debug for Frontend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frontend").field("link", &self.link).finish_non_exhaustive()
    }
}

impl Frontend {
    /// Over `main`, the socket to a back end, on which nothing has been sent. An answer may take `limit` at most. Gives
    /// the socket for the embedder's code, which uses it as it would `main`: it negotiates VIRTIO_F_ACCESS_PLATFORM, and
    /// REPLY_ACK and BACKEND_REQ with it, and does not send SET_BACKEND_REQ_FD. `faults` hears of misses for which
    /// there is nothing, on the thread that processes.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn new(
        main: UnixStream,
        limit: Duration,
        faults: Option<Arc<dyn FaultSink>>,
    ) -> std::io::Result<(Self, UnixStream)> {
        let (back, theirs) = UnixStream::pair()?;
        let (inner, embedder) = UnixStream::pair()?;
        let link = Arc::new(Link::new(main, back, limit));
        let incoming = Incoming { channel: Some(theirs.into()), ..Incoming::default() };
        Ok((Self { link, inner, faults, incoming: Mutex::new(incoming) }, embedder))
    }

    /// The cache to subscribe, once ([`Interest::CACHE`](viommu::Interest::CACHE)). `memory` is guest memory as the
    /// embedder has sent its table: user addresses are the host addresses of its regions.
    ///
    /// `cut_off` is called when the back end does not do as it must, the connection being closed: it returns when the
    /// device can do no more DMA, or says that it failed. A closed connection alone stops no process that has guest memory
    /// mapped: [`Peer::kill`] does. It runs inside a step or a poll of its completion.
    pub fn cache<S>(&self, memory: S, cut_off: CutOff) -> FrontendCache<S>
    where
        S: GuestAddressSpace + Send,
        S::M: GuestMemoryBackend,
    {
        FrontendCache { link: self.link.clone(), memory, cut_off }
    }

    /// What to poll for reading: the back end's two and the embedder's.
    pub fn sockets(&self) -> [BorrowedFd<'_>; 3] {
        [self.link.main.as_fd(), self.link.back.as_fd(), self.inner.as_fd()]
    }

    /// Until when [`Frontend::process`] must be called though nothing is readable: the time limit of an answer.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.link.deadline()
    }

    /// What there was.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.link.state().counts
    }

    /// Whether the connection is over.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.link.state().closed
    }

    /// Ends the connection, from any thread. INVALIDATEs on their way have failed: the core fences.
    pub fn close(&self) {
        self.link.close();
    }

    /// Does what is to be done on the sockets, and looks at the time limit; does not block. `subscription` is that of
    /// [`Frontend::cache`]. One thread at a time; no lock of the core may be held.
    ///
    /// # Errors
    /// The connection is over and closed: to be called no more.
    pub fn process(&self, subscription: &Subscription) -> Result<(), FrontendError> {
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = self.turn(&mut incoming, subscription);
        if outcome.is_err() {
            self.link.close();
            let _ended = self.inner.shutdown(std::net::Shutdown::Both);
        }
        outcome
    }

    /// Processes until the connection is over; gives why. Blocks: for a thread of the embedder's. A time limit is noticed
    /// within twice its length.
    pub fn serve(&self, subscription: &Subscription) -> FrontendError {
        loop {
            if let Err(error) = self.process(subscription) {
                return error;
            }
            let until = self.deadline().map(|until| until.saturating_duration_since(Instant::now()));
            let wait = until.unwrap_or(self.link.limit).min(self.link.limit);
            let wait = Timespec::try_from(wait.saturating_add(Duration::from_millis(1))).ok();
            let sending = self.wants_to_write();
            let sockets = self.sockets();
            let mut fds: Vec<_> = sockets
                .iter()
                .zip(sending)
                .map(|(socket, out)| {
                    PollFd::new(socket, if out { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN })
                })
                .collect();
            match poll(&mut fds, wait.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    self.link.close();
                    return FrontendError::Wire { end: "sockets", error: errno.into() };
                }
            }
        }
    }

    /// Which of [`Frontend::sockets`] has something waiting to be written: to be polled for writing too.
    #[must_use]
    pub fn wants_to_write(&self) -> [bool; 3] {
        let incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        [!self.link.state().out.is_empty(), !incoming.to_back.is_empty(), !incoming.to_inner.is_empty()]
    }

    fn turn(&self, incoming: &mut Incoming, subscription: &Subscription) -> Result<(), FrontendError> {
        let at = |end| move |error| FrontendError::Wire { end, error };
        if self.link.state().closed {
            return Err(FrontendError::Closed);
        }
        {
            let mut state = self.link.state();
            state.out.flush(&self.link.main).map_err(at("back end"))?;
        }
        incoming.to_inner.flush(&self.inner).map_err(at("embedder"))?;
        incoming.to_back.flush(&self.link.back).map_err(at("back end's channel"))?;
        for _ in 0..ROUNDS {
            let mut took = 0_usize;
            for _ in 0..BATCH {
                let Some(message) = incoming.inner.next(&self.inner).map_err(at("embedder"))? else { break };
                took = took.saturating_add(1);
                self.outward(incoming, message)?;
            }
            for _ in 0..BATCH {
                let Some(message) = incoming.main.next(&self.link.main).map_err(at("back end"))? else {
                    break;
                };
                took = took.saturating_add(1);
                self.inward(incoming, message)?;
            }
            for _ in 0..BATCH {
                if !incoming.channel_sent {
                    break; // nobody has the other end
                }
                let next = incoming.back.next(&self.link.back).map_err(at("back end's channel"))?;
                let Some(message) = next else { break };
                took = took.saturating_add(1);
                self.on_request(incoming, message, subscription)?;
            }
            self.send_answers(incoming)?;
            if took == 0 {
                break;
            }
        }
        match self.link.deadline() {
            Some(deadline) if deadline <= Instant::now() => Err(FrontendError::TimedOut(self.link.limit)),
            _ => Ok(()),
        }
    }

    /// A message of the embedder's.
    fn outward(&self, incoming: &mut Incoming, message: Message) -> Result<(), FrontendError> {
        let at = |error| FrontendError::Wire { end: "back end", error };
        let number = message.number();
        match message.request {
            request::SET_FEATURES => {
                incoming.features = number.unwrap_or(0);
                let active = incoming.features & VIRTIO_F_ACCESS_PLATFORM != 0;
                if active && !incoming.channel_sent {
                    return Err(FrontendError::Negotiation);
                }
                self.link.set_active(active, message).map_err(at)
            }
            request::SET_PROTOCOL_FEATURES => {
                incoming.protocol = number.unwrap_or(0);
                self.link.forward(message).map_err(at)?;
                let wanted = protocol::REPLY_ACK | protocol::BACKEND_REQ;
                if incoming.protocol & wanted == wanted
                    && let Some(channel) = incoming.channel.take()
                {
                    let mut ours = Message::new(request::SET_BACKEND_REQ_FD, flag::NEED_REPLY, &[]);
                    ours.fds.push(channel);
                    incoming.channel_sent = true;
                    self.link.forward(ours).map_err(at)?;
                }
                Ok(())
            }
            request::SET_BACKEND_REQ_FD | request::IOTLB_MSG => {
                Err(FrontendError::Protocol("nothing, but the embedder sends what is not its to send"))
            }
            _ => self.link.forward(message).map_err(at),
        }
    }

    /// An answer of the back end's.
    fn inward(&self, incoming: &mut Incoming, message: Message) -> Result<(), FrontendError> {
        match message.request {
            request::IOTLB_MSG => {
                let value = message.number().ok_or(FrontendError::Protocol("an answer that is no number"))?;
                self.link.answer(value)
            }
            request::SET_BACKEND_REQ_FD => match message.number() {
                Some(0) => Ok(()),
                _ => Err(FrontendError::Protocol("that it takes no channel of its own")),
            },
            _ => {
                let sent = incoming.to_inner.send(&self.inner, message);
                sent.map_err(|error| FrontendError::Wire { end: "embedder", error })
            }
        }
    }

    /// A request of the back end's.
    fn on_request(
        &self,
        incoming: &mut Incoming,
        message: Message,
        subscription: &Subscription,
    ) -> Result<(), FrontendError> {
        let body = match message.request {
            backend_request::IOTLB_MSG => iotlb_message(&message.payload)
                .ok_or(FrontendError::Protocol("an IOTLB message of a wrong size"))?,
            // Configuration changes and the like are not passed on.
            _ => return self.answer_back(incoming, &message, 1),
        };
        match body.kind {
            kind::MISS => {
                let access = super::access_of(body.perm).filter(|access| !access.is_empty());
                let access = access.ok_or(FrontendError::Protocol("a MISS for no access"))?;
                self.miss(incoming, message, Iova(body.iova), access, subscription)
            }
            kind::ACCESS_FAIL => {
                let mut state = self.link.state();
                state.counts.access_fails = state.counts.access_fails.saturating_add(1);
                drop(state);
                self.answer_back(incoming, &message, 0)
            }
            _ => Err(FrontendError::Protocol("an IOTLB message that is not its to send")),
        }
    }

    fn miss(
        &self,
        incoming: &mut Incoming,
        message: Message,
        iova: Iova,
        access: Access,
        subscription: &Subscription,
    ) -> Result<(), FrontendError> {
        let (active, before) = {
            let mut state = self.link.state();
            state.counts.misses = state.counts.misses.saturating_add(1);
            (state.active, (state.counts.updates, state.counts.refused))
        };
        // No lock of ours: the fill comes back to the link.
        let filled = if active { subscription.fill(iova, access) } else { Err(FillError::NotACache) };
        if let (Err(FillError::Fault(fault)), Some(sink)) = (&filled, &self.faults) {
            sink.fault(fault);
        }
        let mut state = self.link.state();
        let given = filled.is_ok_and(|entry| entry.target == Target::Ram) && state.counts.updates != before.0;
        let sent = state.sent;
        if !given {
            state.counts.misses_refused = state.counts.misses_refused.saturating_add(1);
        }
        drop(state);
        if given {
            self.answer_later(incoming, &message, 0, Some((sent, before.1)))
        } else {
            self.answer_back(incoming, &message, 1)
        }
    }

    /// Sends the answers that wait for none of the back end's, up to the first that does.
    fn send_answers(&self, incoming: &mut Incoming) -> Result<(), FrontendError> {
        let (answered, refused) = {
            let state = self.link.state();
            (state.answered, state.counts.refused)
        };
        let due = |answer: &Answer| answer.after.is_none_or(|(sent, _)| sent <= answered);
        while incoming.answers.front().is_some_and(due) {
            let Some(Answer { message, after }) = incoming.answers.pop_front() else { break };
            let failed = after.is_some_and(|(_, before)| refused != before);
            let message = if failed { message.answer(1) } else { message };
            let sent = incoming.to_back.send(&self.link.back, message);
            sent.map_err(|error| FrontendError::Wire { end: "back end's channel", error })?;
        }
        Ok(())
    }

    fn answer_back(
        &self,
        incoming: &mut Incoming,
        message: &Message,
        value: u64,
    ) -> Result<(), FrontendError> {
        self.answer_later(incoming, message, value, None)
    }

    fn answer_later(
        &self,
        incoming: &mut Incoming,
        message: &Message,
        value: u64,
        after: Option<(u64, u64)>,
    ) -> Result<(), FrontendError> {
        if !message.wants_answer() {
            return Ok(());
        }
        if incoming.answers.len() >= MAX_MISSES {
            return Err(FrontendError::Protocol("more MISSes than it answers UPDATEs"));
        }
        incoming.answers.push_back(Answer { message: message.answer(value), after });
        self.send_answers(incoming)
    }
}
