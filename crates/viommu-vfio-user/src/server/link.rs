//! The way to the client that there is at the moment.

use std::io;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::IntoBytes;

use super::version::MAX_TRANSFER;
use crate::message;
use crate::spec::{Command, DmaAccess, Header, MessageFlags};

/// Sends to the client from any thread: messages are never mixed. A handle: clones are the same link.
#[derive(Clone, Debug, Default)]
pub struct Link(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Not held while anything is sent: who hangs up on a client that does not read must not wait for it.
    client: Mutex<Client>,
    /// Held while a message is sent.
    sending: Mutex<Sending>,
}

/// The stream to a client that is not spoken with any more.
pub(crate) struct Withdrawn(Option<Arc<UnixStream>>);

impl Drop for Withdrawn {
    fn drop(&mut self) {
        if let Some(stream) = &self.0 {
            // Somebody may be in the middle of sending. A connection that has ended already is what is wanted.
            let _ended = stream.shutdown(Shutdown::Both);
        }
    }
}

#[derive(Debug, Default)]
struct Client {
    stream: Option<Arc<UnixStream>>,
    /// That there have been.
    count: u64,
}

#[derive(Debug, Default)]
struct Sending {
    /// For commands of ours. Replies carry the client's.
    id: u16,
    buffer: Vec<u8>,
}

impl Link {
    fn client(&self) -> MutexGuard<'_, Client> {
        // Nothing panics under this lock.
        self.0.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sending(&self) -> MutexGuard<'_, Sending> {
        // A message that a panic has cut off would break the stream, and nothing panics in sending one.
        self.0.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn connect(&self, stream: UnixStream) {
        let mut client = self.client();
        client.count = client.count.wrapping_add(1);
        client.stream = Some(Arc::new(stream));
    }

    /// Nothing is sent to the client any more. The connection ends when what this returns is dropped.
    pub(crate) fn withdraw(&self) -> Withdrawn {
        Withdrawn(self.client().stream.take())
    }

    /// Ends the connection, from any thread: who reads from it finds its end, and who waits to write does not any more.
    pub(crate) fn hang_up(&self) {
        if let Some(stream) = &self.client().stream {
            // A connection that has ended already is what is wanted.
            let _ended = stream.shutdown(Shutdown::Both);
        }
    }

    /// Whether there is a client.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.client().stream.is_some()
    }

    /// Clients that there have been.
    #[must_use]
    pub fn clients(&self) -> u64 {
        self.client().count
    }

    fn send(&self, header: &Header, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let stream = self.client().stream.clone().ok_or(io::ErrorKind::NotConnected)?;
        let sent = message::send(&stream, header, payload, fds);
        if sent.is_err() {
            // A part of the message may be on its way, and nothing makes sense behind it.
            let _ended = stream.shutdown(Shutdown::Both);
        }
        sent
    }

    pub(crate) fn reply(&self, header: &Header, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let _turn = self.sending();
        self.send(header, payload, fds)
    }

    /// Writes `data` at `address` of the client's memory by VFIO_USER_DMA_WRITE, without waiting for a reply: the client
    /// does it as the function would over PCI, so its bus master bit must be set. This is how an MSI is sent. May block
    /// for some seconds on a client that does not read.
    ///
    /// # Errors
    /// There is no client, or it does not take the message: that ends its connection. Or there are more data than a
    /// message may have (1 MiB).
    pub fn dma_write(&self, address: u64, data: &[u8]) -> io::Result<()> {
        if data.len() > MAX_TRANSFER {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut sending = self.sending();
        sending.id = sending.id.wrapping_add(1);
        let count = u64::try_from(data.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut buffer = core::mem::take(&mut sending.buffer);
        buffer.clear();
        buffer.extend_from_slice(DmaAccess { address: address.into(), count: count.into() }.as_bytes());
        buffer.extend_from_slice(data);
        let size = buffer.len().saturating_add(crate::spec::HEADER);
        let header = Header {
            id: sending.id.into(),
            command: Command::DMA_WRITE.0.into(),
            size: u32::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?.into(),
            flags: MessageFlags::NO_REPLY.bits().into(),
            error: 0.into(),
        };
        let sent = self.send(&header, &buffer, &[]);
        sending.buffer = buffer;
        sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::thread;
    use std::time::{Duration, Instant};

    fn linked() -> (Link, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let link = Link::default();
        link.connect(ours);
        (link, theirs)
    }

    #[test]
    fn hang_up_when_somebody_waits_to_write_ends_the_waiting() {
        let (link, _theirs) = linked();
        let writer = link.clone();
        let writer = thread::spawn(move || {
            // Nobody reads, and no time-out is set.
            while writer.dma_write(0x1000, &[0; 4096]).is_ok() {}
        });
        thread::sleep(Duration::from_millis(50));
        assert!(!writer.is_finished());
        link.hang_up();
        writer.join().unwrap();
        assert!(link.is_connected());
        drop(link.withdraw());
        assert!(!link.is_connected());
    }

    #[test]
    fn connection_when_a_message_was_cut_off_is_over() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
        let link = Link::default();
        link.connect(ours);
        let begin = Instant::now();
        while link.dma_write(0, &[0; 65536]).is_ok() {}
        assert!(begin.elapsed() < Duration::from_secs(5));
        // What came is followed by the end, not by another message.
        let mut all = Vec::new();
        theirs.read_to_end(&mut all).unwrap();
        assert!(link.dma_write(0, &[0]).is_err());
    }

    #[test]
    fn dma_write_without_a_client_or_with_too_much_is_refused() {
        let link = Link::default();
        assert_eq!(link.dma_write(0, &[1]).unwrap_err().kind(), io::ErrorKind::NotConnected);
        let (link, mut theirs) = linked();
        let error = link.dma_write(0, &vec![0; MAX_TRANSFER + 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        link.dma_write(0, &[]).unwrap();
        drop(link.withdraw());
        let mut all = Vec::new();
        assert_eq!(theirs.read_to_end(&mut all).unwrap(), 32);
        assert_eq!(link.clients(), 1);
    }
}
