//! One client: what it sends until a line is whole, what it is still to be sent.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

/// Bytes of a request.
pub(super) const LINE: usize = 16 * 1024;
/// How long a client may keep silent.
const SILENCE: Duration = Duration::from_secs(300);
/// How long a client may take for an answer.
pub(super) const SLOWNESS: Duration = Duration::from_secs(10);
/// The least time between two answers to one client.
const PAUSE: Duration = Duration::from_millis(5);

/// A connection that is never waited for.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
    /// When its client last did what it has to do.
    since: Instant,
    /// Its next request is looked at then.
    not_before: Instant,
    /// Nothing more comes, or is to be taken.
    ends: bool,
    /// It is of no use any more.
    broken: bool,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, now: Instant) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let (input, output) = (Vec::new(), Vec::new());
        Ok(Self { stream, input, output, sent: 0, since: now, not_before: now, ends: false, broken: false })
    }

    fn has_output(&self) -> bool {
        self.sent < self.output.len()
    }

    fn has_line(&self) -> bool {
        self.input.contains(&b'\n')
    }

    /// What poll is to tell of it.
    pub(super) fn waits_for(&self, now: Instant) -> PollFlags {
        if self.has_output() {
            return PollFlags::OUT;
        }
        if self.ends || self.has_line() || now < self.not_before { PollFlags::empty() } else { PollFlags::IN }
    }

    /// When it is to be looked at again, whatever its client does.
    pub(super) fn wakes_at(&self, now: Instant) -> Option<Instant> {
        (!self.has_output() && (self.has_line() || now < self.not_before)).then_some(self.not_before)
    }

    /// How long it waits for its client to ask something; `None` if it does not.
    pub(super) fn idle_for(&self, now: Instant) -> Option<Duration> {
        (!self.has_output()).then(|| now.saturating_duration_since(self.since))
    }

    /// Reads and writes what can be.
    pub(super) fn go_on(&mut self, ready: PollFlags, now: Instant) {
        if self.has_output() {
            if !ready.is_empty() {
                self.send(now);
            }
        } else if ready.contains(PollFlags::IN) {
            self.receive();
        } else if ready.intersects(PollFlags::HUP | PollFlags::ERR) {
            // Nobody is there to read an answer.
            self.broken = true;
        }
    }

    fn receive(&mut self) {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.ends = true,
            Ok(count) => self.input.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            Err(why) if would_wait(&why) => {}
            Err(_) => self.broken = true,
        }
    }

    fn send(&mut self, now: Instant) {
        match self.stream.write(self.output.get(self.sent..).unwrap_or_default()) {
            Ok(count) => self.sent = self.sent.saturating_add(count),
            Err(why) if would_wait(&why) => {}
            Err(_) => self.broken = true,
        }
        if !self.has_output() {
            // A large answer's memory is not kept.
            (self.output, self.sent, self.since) = (Vec::new(), 0, now);
        }
    }

    /// The next request, once it may be answered. An error is to be the answer, and the last one.
    pub(super) fn request(&mut self, now: Instant) -> Option<Result<Vec<u8>, String>> {
        if self.has_output() || self.broken || now < self.not_before {
            return None;
        }
        let end = self.input.iter().position(|byte| *byte == b'\n');
        if end.unwrap_or(self.input.len()) > LINE {
            self.input.clear();
            self.ends = true;
            return Some(Err(format!("a request has {LINE} bytes at most")));
        }
        let rest = self.input.split_off(end? + 1);
        Some(Ok(core::mem::replace(&mut self.input, rest)))
    }

    /// Its answer, which took that long to make.
    pub(super) fn answer(&mut self, bytes: Vec<u8>, took: Duration) {
        let now = Instant::now();
        (self.output, self.sent, self.since) = (bytes, 0, now);
        // A client that asks all the time has half of the thread at most.
        self.not_before = now.checked_add(took.max(PAUSE)).unwrap_or(now);
        self.send(now);
    }

    /// Whether there is nothing left to do for it, or it has taken too long.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        let limit = if self.has_output() { SLOWNESS } else { SILENCE };
        let done = self.ends && !self.has_output() && !self.has_line();
        self.broken || done || now.saturating_duration_since(self.since) > limit
    }
}

fn would_wait(why: &io::Error) -> bool {
    matches!(why.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
