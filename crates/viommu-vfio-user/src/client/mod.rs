//! A vfio-user client: a device of another process, and what it may reach of the guest's memory.
//!
//! - [`Client`] is a connection to a server: what the device has (regions, interrupts), accesses to its regions, its reset.
//!   The embedder connects a stream; the socket's path and who may use it are its business.
//! - [`Mirror`] gives the device windows of memory, exactly those that the record has: a `viommu::subscribe::Mirror`.
//! - [`DeviceMemory`] is what the device reads and writes by messages (DMA_READ, DMA_WRITE): [`SeenThrough`] an endpoint's
//!   view the record decides on each access.
//!
//! # Who may do what
//! A server is not trusted with this process: sizes, numbers and descriptors of what it sends are checked, each answer is
//! waited for within a limit, and what is wrong ends the connection. It is trusted with the *memory it was given*: a file
//! that it has mapped cannot be taken back from outside. A server that is to be held to the record against its will gets
//! no files ([`MirrorOptions::by_messages`]), so that each access is asked for here.
//!
//! # Threads
//! None. A call sends its message and waits for the reply, serving meanwhile what the server asks for; one call at a time,
//! the others wait. While no call is under way the embedder watches the socket and calls [`Client::serve`].

mod connection;
mod device;
mod dma;
mod error;
mod mirror;
mod version;

use core::fmt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use connection::Connection;

pub use crate::function::Area;
pub use crate::spec::{IrqAction, IrqFlags};
pub use device::{DeviceInfo, IrqInfo, RegionInfo};
pub use dma::{DeviceMemory, NoMemory, SeenThrough};
pub use error::ClientError;
pub use mirror::{Handle, Mirror, MirrorOptions, NoFile};
pub use version::Capabilities;

/// How long a reply may take unless it is said, as QEMU has it.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// A connection to a server. A handle: clones are the same connection, which ends with the last of them.
///
/// When anything but an error reply goes wrong the connection is over for good: every later call says so, and a new one
/// begins with a new stream. A call may take the limit for its reply, and the time that the call before it takes; a
/// message that comes in drops may take the limit once more.
#[derive(Clone)]
pub struct Client(Arc<Shared>);

struct Shared {
    connection: Mutex<Connection>,
    capabilities: Capabilities,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("capabilities", &self.0.capabilities).finish_non_exhaustive()
    }
}

impl Client {
    /// Says VERSION on a stream that a server has at its other end. Each reply is waited for no longer than `limit`. What
    /// the server reads and writes by messages is `memory`.
    ///
    /// # Errors
    /// Any of [`ClientError`]; the stream is closed.
    pub fn connect(
        stream: UnixStream,
        limit: Duration,
        memory: impl DeviceMemory + 'static,
    ) -> Result<Self, ClientError> {
        let mut connection = Connection::new(stream, limit, Box::new(memory))?;
        let proposal = version::proposal()?;
        let sizes = (size_of::<crate::spec::Version>(), MAX_VERSION);
        let reply = connection.call(crate::spec::Command::VERSION, &[&proposal], &[], sizes)?;
        let capabilities = version::agreed(&reply.payload)?;
        Ok(Self(Arc::new(Shared { connection: Mutex::new(connection), capabilities })))
    }

    /// What was agreed.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.0.capabilities
    }

    /// Whether calls can still be made.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.connection().is_open()
    }

    /// Why the connection is over; none while it is not.
    #[must_use]
    pub fn why_over(&self) -> Option<String> {
        self.connection().why_over().map(str::to_owned)
    }

    /// Serves what the server asks for at this moment, and notices its end. To be called when the stream can be read and no
    /// call is under way; it waits for a call that is.
    ///
    /// # Errors
    /// The connection is over from now on. Later calls return at once.
    pub fn serve(&self) -> Result<(), ClientError> {
        self.connection().serve()
    }

    /// Ends the connection and waits until the server has closed its end, for the limit at most: a server that follows the
    /// protocol has unmapped all windows by then. Gives whether it has.
    pub fn close(&self, why: &str) -> bool {
        self.connection().close(why)
    }

    pub(crate) fn connection(&self) -> MutexGuard<'_, Connection> {
        // What panics under this lock is the embedder's memory, between two messages.
        self.0.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes of the greatest reply to VERSION.
const MAX_VERSION: usize = 1 << 16;

#[cfg(test)]
mod tests;
