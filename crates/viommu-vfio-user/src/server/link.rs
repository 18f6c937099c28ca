//! The way to the client that there is at the moment.

use std::io;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::IntoBytes;

use super::message;
use crate::spec::{Command, DmaAccess, Header, MessageFlags};

/// Sends to the client from any thread: messages are never mixed. A handle: clones are the same link.
#[derive(Clone, Debug, Default)]
pub struct Link(Arc<Mutex<Sending>>);

#[derive(Debug, Default)]
struct Sending {
    stream: Option<UnixStream>,
    /// For commands of ours. Replies carry the client's.
    id: u16,
    buffer: Vec<u8>,
    clients: u64,
}

impl Link {
    fn lock(&self) -> MutexGuard<'_, Sending> {
        // A message that a panic has cut off would break the stream, and nothing panics in sending one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn connect(&self, stream: UnixStream) {
        let mut sending = self.lock();
        let clients = sending.clients.wrapping_add(1);
        *sending = Sending { stream: Some(stream), clients, ..Sending::default() };
    }

    pub(crate) fn disconnect(&self) {
        self.lock().stream = None;
    }

    /// Ends the connection, from any thread: who reads from it finds its end.
    pub(crate) fn hang_up(&self) {
        if let Some(stream) = &self.lock().stream {
            // A connection that has ended already is what is wanted.
            let _ended = stream.shutdown(Shutdown::Both);
        }
    }

    /// Whether there is a client.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.lock().stream.is_some()
    }

    /// Clients that there have been.
    #[must_use]
    pub fn clients(&self) -> u64 {
        self.lock().clients
    }

    pub(crate) fn reply(&self, header: &Header, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let sending = self.lock();
        let stream = sending.stream.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        message::send(stream, header, payload, fds)
    }

    /// Writes `data` at `address` of the client's memory by VFIO_USER_DMA_WRITE, without waiting for a reply: the client
    /// does it as the function would over PCI, so its bus master bit must be set. This is how an MSI is sent. May block
    /// for some seconds on a client that does not read.
    ///
    /// # Errors
    /// There is no client, or it does not take the message.
    pub fn dma_write(&self, address: u64, data: &[u8]) -> io::Result<()> {
        let mut sending = self.lock();
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
        let stream = sending.stream.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let sent = message::send(stream, &header, &buffer, &[]);
        sending.buffer = buffer;
        sent
    }
}
