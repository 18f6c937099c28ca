//! MISSes on the back end's channel, and those who wait for their UPDATEs.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use viommu::{Access, Iova, IovaRange};
use zerocopy::IntoBytes;

use crate::spec::{IotlbMsg, kind, perm};
use crate::user::spec::{backend_request, flag};
use crate::user::wire::{Message, Sender, WireError};

/// MISSes under way at a time.
const MAX_SENT: usize = 4096;
const PAGE: u64 = 4096;

/// Why an address stays unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MissError {
    /// The connection is over.
    #[error("there is no front end")]
    Closed,
    /// The front end has given no channel for MISSes.
    #[error("the front end has given no channel of our own")]
    NoChannel,
    /// The front end says that nothing is mapped there for such an access.
    #[error("the front end has nothing there")]
    Refused,
    /// The front end did not answer in time.
    #[error("the front end does not answer")]
    TimedOut,
    /// The front end takes something back, or stops the device, which would wait for who waits here.
    #[error("the front end takes back what this batch may be using")]
    Interrupted,
    /// Too many are under way.
    #[error("too many misses")]
    TooMany,
}

const WAITING: u8 = 0;
const ANSWERED: u8 = 1;
const REFUSED: u8 = 2;

/// An access that is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Miss {
    pub(super) page: Iova,
    pub(super) access: Access,
}

impl Miss {
    pub(super) fn at(iova: Iova, access: Access) -> Self {
        Self { page: Iova(iova.0 & !(PAGE - 1)), access }
    }
}

#[derive(Debug)]
struct Sent {
    miss: Miss,
    outcome: Arc<AtomicU8>,
}

#[derive(Debug, Default)]
pub(super) struct Misses {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    channel: Option<Arc<UnixStream>>,
    out: Sender,
    /// Whether MISSes are answered.
    replies: bool,
    /// In the order of their answers.
    sent: VecDeque<Sent>,
    /// Removals that wait for guards: nobody inside one may wait for an UPDATE.
    removals: usize,
    /// Times that everybody who waited was to give up.
    stops: u64,
    closed: bool,
    count: u64,
}

impl Misses {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing under it panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The channel. Those who wait for an answer on an old one give up.
    pub(super) fn connect(&self, channel: Arc<UnixStream>, replies: bool) {
        let mut state = self.state();
        let State { removals, stops, closed, count, .. } = *state;
        *state = State {
            channel: Some(channel),
            replies,
            removals,
            closed,
            count,
            stops: stops.wrapping_add(1),
            ..State::default()
        };
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Everybody who waits gives up: the device is to stop.
    pub(super) fn stop(&self) {
        let mut state = self.state();
        state.stops = state.stops.wrapping_add(1);
        drop(state);
        self.changed.notify_all();
    }

    /// While it lives, nobody inside a guard waits.
    pub(super) fn removal(&self) -> Removal<'_> {
        let mut state = self.state();
        state.removals = state.removals.saturating_add(1);
        drop(state);
        self.changed.notify_all();
        Removal(self)
    }

    /// MISSes sent.
    pub(super) fn count(&self) -> u64 {
        self.state().count
    }

    pub(super) fn flush(&self) -> Result<(), WireError> {
        let mut state = self.state();
        let State { channel, out, .. } = &mut *state;
        channel.as_ref().map_or(Ok(()), |channel| out.flush(channel))
    }

    pub(super) fn wants_to_write(&self) -> bool {
        !self.state().out.is_empty()
    }

    /// The front end has answered the oldest; `None` when there is none.
    pub(super) fn answered(&self, value: u64) -> Option<()> {
        let sent = self.state().sent.pop_front()?;
        if value != 0 {
            // One that an UPDATE has come for is answered.
            let _kept = sent.outcome.compare_exchange(WAITING, REFUSED, Ordering::AcqRel, Ordering::Acquire);
        } else {
            sent.outcome.store(ANSWERED, Ordering::Release);
        }
        self.changed.notify_all();
        Some(())
    }

    /// An UPDATE has taken effect.
    pub(super) fn updated(&self, range: IovaRange) {
        let mut state = self.state();
        for sent in state.sent.iter().filter(|sent| range.contains(sent.miss.page)) {
            sent.outcome.store(ANSWERED, Ordering::Release);
        }
        if !state.replies {
            state.sent.retain(|sent| sent.outcome.load(Ordering::Acquire) == WAITING);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Asks for `wanted`, and waits until each is answered, at most until `until`. Whoever is inside a guard gives up
    /// when something is taken back. That all went well says nothing of what is there now: ask again.
    pub(super) fn fetch(&self, wanted: &[Miss], in_guard: bool, until: Instant) -> Result<(), MissError> {
        let mut state = self.state();
        let stops = state.stops;
        let mut outcomes = Vec::with_capacity(wanted.len());
        for miss in wanted {
            outcomes.push(state.ask(*miss)?);
        }
        let outcome = loop {
            if state.closed {
                break Err(MissError::Closed);
            }
            let is = |wanted| move |outcome: &Arc<AtomicU8>| outcome.load(Ordering::Acquire) == wanted;
            if outcomes.iter().any(is(REFUSED)) {
                break Err(MissError::Refused);
            }
            if outcomes.iter().all(is(ANSWERED)) {
                break Ok(());
            }
            if state.stops != stops || in_guard && state.removals > 0 {
                break Err(MissError::Interrupted);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Err(MissError::TimedOut);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        drop(outcomes);
        if outcome.is_err() && !state.replies {
            // Nothing else would remove what nobody waits for any more.
            state.sent.retain(|sent| Arc::strong_count(&sent.outcome) > 1);
        }
        outcome
    }
}

impl State {
    fn ask(&mut self, miss: Miss) -> Result<Arc<AtomicU8>, MissError> {
        let same = |sent: &&Sent| sent.miss == miss && sent.outcome.load(Ordering::Acquire) == WAITING;
        if let Some(sent) = self.sent.iter().find(same) {
            return Ok(sent.outcome.clone());
        }
        if self.closed {
            return Err(MissError::Closed);
        }
        if self.sent.len() >= MAX_SENT {
            return Err(MissError::TooMany);
        }
        let channel = self.channel.clone().ok_or(MissError::NoChannel)?;
        let read = if miss.access.contains(Access::READ) { perm::READ } else { 0 };
        let write = if miss.access.contains(Access::WRITE) { perm::WRITE } else { 0 };
        let body =
            IotlbMsg { iova: miss.page.0, perm: read | write, kind: kind::MISS, ..IotlbMsg::default() };
        let flags = if self.replies { flag::NEED_REPLY } else { 0 };
        let message = Message::new(backend_request::IOTLB_MSG, flags, body.as_bytes());
        self.out.send(&channel, message).map_err(|_| MissError::Closed)?;
        self.count = self.count.wrapping_add(1);
        let outcome = Arc::new(AtomicU8::new(WAITING));
        self.sent.push_back(Sent { miss, outcome: outcome.clone() });
        Ok(outcome)
    }
}

/// See [`Misses::removal`].
pub(super) struct Removal<'m>(&'m Misses);

impl Drop for Removal<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.removals = state.removals.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn miss_without_answers_when_given_up_is_asked_for_again() {
        let misses = Misses::default();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        misses.connect(Arc::new(ours), false);
        let wanted = [Miss::at(Iova(0x1000), Access::READ)];
        let removal = misses.removal();
        assert_eq!(misses.fetch(&wanted, true, Instant::now()), Err(MissError::Interrupted));
        drop(removal);
        // The front end may have looked at it when nothing was there, and says nothing of that.
        assert_eq!(misses.fetch(&wanted, true, Instant::now()), Err(MissError::TimedOut));
        assert_eq!(misses.count(), 2);
        assert!(misses.state().sent.is_empty());
    }
}
