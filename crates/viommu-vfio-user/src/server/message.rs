//! One message from the socket, or to it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::spec::{HEADER, Header};

/// Descriptors that come with one message at most; a client is told so.
pub(crate) const MAX_FDS: usize = 16;

/// Why nothing can be read any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    #[error("a message of {0} bytes")]
    Size(u32),
    #[error("more than {MAX_FDS} descriptors with a message")]
    TooManyFds,
    #[error("the client went away in the middle of a message")]
    CutOff,
    #[error("the rest of a message did not come")]
    Late,
    #[error(transparent)]
    Io(io::Error),
}

impl From<Errno> for ReceiveError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::AGAIN => Self::Late,
            Errno::CONNRESET | Errno::PIPE => Self::CutOff,
            other => Self::Io(other.into()),
        }
    }
}

/// A message, but for its payload, which is in the buffer that was given.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) header: Header,
    pub(crate) fds: Vec<OwnedFd>,
}

/// Reads one message, its payload into `payload`. `None`: the client has closed the connection. Waits for as long as
/// the socket's receive time-out says.
pub(crate) fn receive(
    socket: impl AsFd,
    max_payload: usize,
    payload: &mut Vec<u8>,
) -> Result<Option<Received>, ReceiveError> {
    let mut bytes = [0; HEADER];
    let mut fds = Vec::new();
    let got = fill(&socket, &mut bytes, &mut fds)?;
    if got == 0 {
        return Ok(None);
    }
    if got < HEADER {
        return Err(ReceiveError::CutOff);
    }
    let header = Header::read_from_bytes(&bytes).map_err(|_| ReceiveError::CutOff)?;
    let size = header.size.get();
    let rest = usize::try_from(size).ok().and_then(|size| size.checked_sub(HEADER));
    let rest = rest.filter(|rest| *rest <= max_payload).ok_or(ReceiveError::Size(size))?;
    payload.clear();
    payload.resize(rest, 0);
    if fill(&socket, payload, &mut fds)? < rest {
        return Err(ReceiveError::CutOff);
    }
    Ok(Some(Received { header, fds }))
}

/// Reads until `bytes` is full or the stream ends, and gives how many bytes it got.
fn fill(socket: &impl AsFd, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, ReceiveError> {
    let mut got = 0_usize;
    while let Some(room) = bytes.get_mut(got..).filter(|room| !room.is_empty()) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
        let message = match recvmsg(socket, &mut [IoSliceMut::new(room)], &mut ancillary, flags) {
            Ok(message) => message,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = part {
                fds.extend(more);
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
            return Err(ReceiveError::TooManyFds);
        }
        if message.bytes == 0 {
            break;
        }
        got = got.saturating_add(message.bytes);
    }
    Ok(got)
}

/// Sends one message as a whole. The caller holds off others meanwhile.
pub(crate) fn send(
    socket: impl AsFd,
    header: &Header,
    payload: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let head = header.as_bytes();
    let total = head.len().saturating_add(payload.len());
    let mut sent = 0_usize;
    while sent < total {
        let skip = sent.saturating_sub(head.len());
        let parts = [
            IoSlice::new(head.get(sent..).unwrap_or_default()),
            IoSlice::new(payload.get(skip..).unwrap_or_default()),
        ];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if sent == 0 && !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many descriptors for one message"));
        }
        match sendmsg(&socket, &parts, &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(bytes) => sent = sent.saturating_add(bytes),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
