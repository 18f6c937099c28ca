//! One message from the socket, or to it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use zerocopy::{FromBytes, IntoBytes};

use crate::spec::{HEADER, Header};

/// Descriptors that come with one message at most; the other end is told so.
pub(crate) const MAX_FDS: usize = 16;

/// Why nothing can be read any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReceiveError {
    #[error("a message of {0} bytes")]
    Size(u32),
    #[error("more than {MAX_FDS} descriptors with a message")]
    TooManyFds,
    #[error("the other end went away in the middle of a message")]
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

/// Reads one message, its payload into `payload`. `None`: the other end has closed the connection. A message that does not
/// come for as long as the socket's receive time-out says, or is not there after `patience`, is late.
pub(crate) fn receive(
    socket: impl AsFd,
    max_payload: usize,
    patience: Duration,
    payload: &mut Vec<u8>,
) -> Result<Option<Received>, ReceiveError> {
    let begin = Instant::now();
    let is_late = || begin.elapsed() >= patience;
    let mut bytes = [0; HEADER];
    let mut fds = Vec::new();
    let got = fill(&socket, &mut bytes, &mut fds, is_late)?;
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
    if fill(&socket, payload, &mut fds, is_late)? < rest {
        return Err(ReceiveError::CutOff);
    }
    Ok(Some(Received { header, fds }))
}

/// Reads until `bytes` is full or the stream ends, and gives how many bytes it got.
fn fill(
    socket: &impl AsFd,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    is_late: impl Fn() -> bool,
) -> Result<usize, ReceiveError> {
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
        // Not only the socket's own time-out, which starts anew with each byte.
        if got < bytes.len() && is_late() {
            return Err(ReceiveError::Late);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::thread;

    const PATIENCE: Duration = Duration::from_millis(100);

    fn header(size: u32) -> Header {
        Header { id: 7.into(), command: 9.into(), size: size.into(), ..Header::default() }
    }

    fn pair() -> (UnixStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        (ours, theirs)
    }

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn message_when_sent_is_received_with_its_descriptors() {
        let (ours, theirs) = pair();
        let fds: Vec<_> = (0..MAX_FDS).map(|_| null()).collect();
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send(&theirs, &header(19), b"abc", &borrowed).unwrap();
        send(&theirs, &header(16), b"", &[]).unwrap();
        drop(theirs);
        let mut payload = vec![1; 100];
        let first = receive(&ours, 3, PATIENCE, &mut payload).unwrap().unwrap();
        assert_eq!((first.header.id.get(), first.fds.len(), &payload[..]), (7, MAX_FDS, &b"abc"[..]));
        let second = receive(&ours, 3, PATIENCE, &mut payload).unwrap().unwrap();
        assert_eq!((second.fds.len(), payload.len()), (0, 0));
        assert!(receive(&ours, 3, PATIENCE, &mut payload).unwrap().is_none());
    }

    #[test]
    fn message_when_its_size_cannot_be_is_refused() {
        for size in [0, 15, 20, u32::MAX] {
            let (ours, theirs) = pair();
            send(&theirs, &header(size), b"abcdef", &[]).unwrap();
            let error = receive(&ours, 3, PATIENCE, &mut Vec::new()).unwrap_err();
            assert!(matches!(error, ReceiveError::Size(said) if said == size), "{error}");
        }
    }

    #[test]
    fn message_when_its_end_does_not_come_is_cut_off_or_late() {
        for bytes in [1, 15, 16, 17, 18] {
            let (ours, mut theirs) = pair();
            let whole = [header(19).as_bytes(), b"abc"].concat();
            theirs.write_all(&whole[..bytes]).unwrap();
            let error = receive(&ours, 3, PATIENCE, &mut Vec::new()).unwrap_err();
            assert!(matches!(error, ReceiveError::Late), "{bytes}: {error}");

            let (ours, mut theirs) = pair();
            theirs.write_all(&whole[..bytes]).unwrap();
            drop(theirs);
            let error = receive(&ours, 3, PATIENCE, &mut Vec::new()).unwrap_err();
            assert!(matches!(error, ReceiveError::CutOff), "{bytes}: {error}");
        }
    }

    #[test]
    fn message_when_it_comes_byte_by_byte_is_late_all_the_same() {
        let (ours, mut theirs) = pair();
        let writer = thread::spawn(move || {
            let mut bytes = header(1016).as_bytes().to_vec();
            bytes.resize(1016, 0);
            // Well within the time-out of a single wait; ends with the connection.
            for byte in bytes {
                if theirs.write_all(&[byte]).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(10));
            }
        });
        let begin = Instant::now();
        let error = receive(&ours, 1000, PATIENCE, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, ReceiveError::Late), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(3));
        drop(ours);
        writer.join().unwrap();
    }

    #[test]
    fn descriptors_when_too_many_are_refused_also_in_parts() {
        let fds: Vec<_> = (0..MAX_FDS).map(|_| null()).collect();
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let (ours, theirs) = pair();
        // Each part with as many as may be.
        let first = header(19);
        send(&theirs, &first, b"", &borrowed).unwrap();
        send(&theirs, &header(0), b"", &borrowed).unwrap();
        let error = receive(&ours, 3, PATIENCE, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, ReceiveError::TooManyFds), "{error}");
    }
}
