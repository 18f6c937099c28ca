//! Messages over a stream, with descriptors, never waiting for the peer.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use zerocopy::{FromBytes, IntoBytes};

use super::spec::{HEADER, Header, flag};

/// Bytes of the largest payload: the regions of a memory table, a device's configuration.
pub(super) const MAX_PAYLOAD: usize = 4096;
/// Descriptors with one message.
const MAX_FDS: usize = 32;
/// Bytes that wait for a peer that does not read.
const MAX_WAITING: usize = 1 << 20;
/// Descriptors that do: who sends them on would have none left for itself.
const MAX_WAITING_FDS: usize = 256;

/// Why nothing comes or goes any more: the connection is over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The peer has closed it.
    #[error("the peer has gone")]
    Gone,
    /// The peer reads nothing, and too much waits for it.
    #[error("the peer does not read")]
    Stalled,
    /// A message of another version than 1.
    #[error("a message with the flags {0:#x}")]
    Flags(u32),
    /// A message is too long.
    #[error("a message of {0} bytes")]
    Size(u32),
    /// There are too many descriptors with a message.
    #[error("more than {MAX_FDS} descriptors with a message")]
    TooManyFds,
    /// The system says so.
    #[error(transparent)]
    Io(io::Error),
}

impl From<Errno> for WireError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::CONNRESET | Errno::PIPE => Self::Gone,
            other => Self::Io(other.into()),
        }
    }
}

/// One message.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) request: u32,
    pub(super) flags: u32,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Message {
    pub(super) fn new(request: u32, flags: u32, payload: &[u8]) -> Self {
        let flags = flags | flag::VERSION;
        Self { request, flags, payload: payload.to_vec(), fds: Vec::new() }
    }

    /// The answer to this one that is a number: 0 for "done".
    pub(super) fn answer(&self, value: u64) -> Self {
        Self::new(self.request, flag::REPLY, value.as_bytes())
    }

    pub(super) fn wants_answer(&self) -> bool {
        self.flags & flag::NEED_REPLY != 0
    }

    /// The number that is all of the payload.
    pub(super) fn number(&self) -> Option<u64> {
        u64::read_from_bytes(&self.payload).ok()
    }
}

/// What has come of a message that is not whole yet.
#[derive(Debug, Default)]
pub(super) struct Receiver {
    header: [u8; HEADER],
    payload: Vec<u8>,
    got: usize,
    fds: Vec<OwnedFd>,
}

impl Receiver {
    /// The next whole message; `None` when no more has come yet.
    pub(super) fn next(&mut self, socket: &UnixStream) -> Result<Option<Message>, WireError> {
        loop {
            let room = match self.got.checked_sub(HEADER) {
                None => self.header.get_mut(self.got..),
                Some(got) => self.payload.get_mut(got..),
            };
            let Some(room) = room.filter(|room| !room.is_empty()) else { break };
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let buffers = &mut [IoSliceMut::new(room)];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let part = match recvmsg(socket, buffers, &mut ancillary, flags) {
                Ok(part) => part,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            };
            for more in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(more) = more {
                    self.fds.extend(more);
                }
            }
            if part.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_FDS {
                return Err(WireError::TooManyFds);
            }
            if part.bytes == 0 {
                return Err(WireError::Gone);
            }
            self.got = self.got.saturating_add(part.bytes);
            if self.got == HEADER {
                let header = self.head();
                let (flags, size) = (header.flags.get(), header.size.get());
                if flags & flag::VERSION_MASK != flag::VERSION {
                    return Err(WireError::Flags(flags));
                }
                let bytes = usize::try_from(size).ok().filter(|bytes| *bytes <= MAX_PAYLOAD);
                self.payload.clear();
                self.payload.resize(bytes.ok_or(WireError::Size(size))?, 0);
            }
        }
        let header = self.head();
        self.got = 0;
        Ok(Some(Message {
            request: header.request.get(),
            flags: header.flags.get(),
            payload: core::mem::take(&mut self.payload),
            fds: core::mem::take(&mut self.fds),
        }))
    }

    fn head(&self) -> Header {
        Header::read_from_bytes(&self.header).unwrap_or_default()
    }
}

/// What could not be written yet.
#[derive(Debug, Default)]
pub(super) struct Sender {
    waiting: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    /// Bytes of the first of them that are gone.
    sent: usize,
    bytes: usize,
    fds: usize,
}

impl Sender {
    /// Sends `message` behind all that was sent before, now or with a later [`Sender::flush`].
    pub(super) fn send(&mut self, socket: &UnixStream, message: Message) -> Result<(), WireError> {
        let size = u32::try_from(message.payload.len()).map_err(|_| WireError::Size(u32::MAX))?;
        let (request, flags) = (message.request.into(), message.flags.into());
        let mut bytes = Header { request, flags, size: size.into() }.as_bytes().to_vec();
        bytes.extend_from_slice(&message.payload);
        self.bytes = self.bytes.saturating_add(bytes.len());
        self.fds = self.fds.saturating_add(message.fds.len());
        self.waiting.push_back((bytes, message.fds));
        self.flush(socket)?;
        let room = self.bytes <= MAX_WAITING && self.fds <= MAX_WAITING_FDS;
        if room { Ok(()) } else { Err(WireError::Stalled) }
    }

    pub(super) fn flush(&mut self, socket: &UnixStream) -> Result<(), WireError> {
        while let Some((bytes, fds)) = self.waiting.front() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            if self.sent == 0
                && !borrowed.is_empty()
                && !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed))
            {
                return Err(WireError::TooManyFds);
            }
            let rest = IoSlice::new(bytes.get(self.sent..).unwrap_or_default());
            // Not by the descriptor's own flags: a peer that sent it can change those.
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(socket, &[rest], &mut ancillary, flags) {
                Ok(more) => self.sent = self.sent.saturating_add(more),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
            if self.sent >= bytes.len() {
                self.bytes = self.bytes.saturating_sub(bytes.len());
                self.fds = self.fds.saturating_sub(fds.len());
                self.sent = 0;
                self.waiting.pop_front();
            }
        }
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
