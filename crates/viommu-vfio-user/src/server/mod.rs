//! A socket, and the function behind it.

mod interrupts;
mod link;
mod message;
mod session;
mod version;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

use crate::function::Function;
use crate::memory::WindowLimits;
use session::{Outcome, Session};

pub use interrupts::Interrupts;
pub use link::Link;

/// How long a message that has begun may take, and a client may take to read a reply, before it is given up.
const PATIENCE: Duration = Duration::from_secs(5);

/// A socket that cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// Somebody serves there.
    #[error("{0}: another server is there")]
    InUse(PathBuf),
    /// Something is there that is no socket.
    #[error("{0}: there is something, and it is no socket")]
    NoSocket(PathBuf),
    /// The kernel refuses.
    #[error("{path}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What it says.
        source: io::Error,
    },
}

/// Serves one function on one socket, to one client at a time.
///
/// A client that goes away, or breaks the protocol, costs its own connection: the function is told
/// ([`Function::disconnected`]), all that the client gave is given back, and the next one is welcome. While there is a
/// client, others are refused: they find their connection closed.
#[derive(Debug)]
pub struct Server<F> {
    function: F,
    listener: UnixListener,
    path: PathBuf,
    link: Link,
    stop: Stopper,
    limits: WindowLimits,
}

/// Stops a server, from any thread; clones stop the same one.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Stop>);

#[derive(Debug)]
struct Stop {
    asked: AtomicBool,
    event: OwnedFd,
    link: Link,
}

impl Stopper {
    /// [`Server::run`] returns soon. A client is hung up on.
    pub fn stop(&self) {
        self.0.asked.store(true, Ordering::SeqCst);
        // It cannot be full: nobody else writes.
        let _full = rustix::io::write(&self.0.event, &1_u64.to_ne_bytes());
        self.0.link.hang_up();
    }

    fn is_asked(&self) -> bool {
        self.0.asked.load(Ordering::SeqCst)
    }
}

impl<F: Function> Server<F> {
    /// Makes the socket at `path`, for this user alone (mode 0600), and listens. A socket that is left there by a server
    /// that is gone is replaced.
    ///
    /// # Errors
    /// See [`BindError`].
    pub fn bind(path: &Path, function: F, limits: WindowLimits) -> Result<Self, BindError> {
        let failed = |source: io::Error| BindError::Io { path: path.into(), source };
        clear_path(path)?;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let socket = socket.map_err(|errno| failed(errno.into()))?;
        let address = SocketAddrUnix::new(path).map_err(|errno| failed(errno.into()))?;
        bind(&socket, &address).map_err(|errno| failed(errno.into()))?;
        // Before it listens: nobody can connect in between.
        let private = rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR);
        private.and_then(|()| listen(&socket, 8)).map_err(|errno| failed(errno.into()))?;
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true).map_err(failed)?;
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let event = event.map_err(|errno| failed(errno.into()))?;
        let link = Link::default();
        let stop = Stopper(Arc::new(Stop { asked: AtomicBool::new(false), event, link: link.clone() }));
        Ok(Self { function, listener, path: path.into(), link, stop, limits })
    }

    /// To stop it, from another thread.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        self.stop.clone()
    }

    /// The way to its client, from any thread.
    #[must_use]
    pub fn link(&self) -> Link {
        self.link.clone()
    }

    /// The function. Its server is not running.
    #[must_use]
    pub fn function(&self) -> &F {
        &self.function
    }

    /// Serves clients, one after the other, on this thread, until it is stopped. It can be run again after that only to
    /// return at once.
    ///
    /// # Errors
    /// The listening socket fails; a client's failures are none.
    pub fn run(&mut self) -> io::Result<()> {
        while !self.stop.is_asked() {
            let ready = wait(&self.listener, None, &self.stop, &self.function)?;
            self.events(&ready);
            if !ready.listener || self.stop.is_asked() {
                continue;
            }
            match self.listener.accept() {
                Ok((stream, _)) => self.attend(stream),
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn events(&mut self, ready: &Ready) {
        ready.events.iter().for_each(|index| self.function.event(*index));
    }

    /// One client, from its first message to its last.
    fn attend(&mut self, stream: UnixStream) {
        match self.converse(stream) {
            Ok(why) => crate::log::ended(&self.path, &why),
            Err(error) => crate::log::ended(&self.path, &error),
        }
        self.link.disconnect();
        self.function.disconnected();
        self.function.interrupts().clear();
        let windows = self.function.windows().clone();
        windows.clear(|window| self.function.unmapped(window));
    }

    fn converse(&mut self, stream: UnixStream) -> io::Result<&'static str> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        self.link.connect(stream.try_clone()?);
        crate::log::connected(&self.path);
        self.function.connected(&self.link);
        let mut session = Session::default();
        let mut payload = Vec::new();
        loop {
            let ready = wait(&self.listener, Some(&stream), &self.stop, &self.function)?;
            if self.stop.is_asked() {
                return Ok("the server stops");
            }
            self.events(&ready);
            if ready.listener {
                // One client at a time: the connection ends here.
                let second = self.listener.accept();
                crate::log::second(&self.path, second.is_ok());
            }
            if !ready.client {
                continue;
            }
            let message = match message::receive(&stream, session::MAX_PAYLOAD, &mut payload) {
                Ok(Some(message)) => message,
                Ok(None) => return Ok("the client has closed it"),
                Err(error) => return Err(io::Error::other(error)),
            };
            match session.handle(&mut self.function, message, &payload, self.limits.windows) {
                Outcome::Reply(header, files) => {
                    self.link.reply(&header, session.payload(), &session::borrowed(&files))?;
                }
                Outcome::Silence => {}
                Outcome::HangUp(why) => return Ok(why),
            }
        }
    }
}

impl<F> Drop for Server<F> {
    fn drop(&mut self) {
        // It may have been taken away by hand.
        let _gone = fs::remove_file(&self.path);
    }
}

/// Descriptors that can be read.
#[derive(Default)]
struct Ready {
    listener: bool,
    client: bool,
    events: Vec<usize>,
}

fn wait(
    listener: &UnixListener,
    client: Option<&UnixStream>,
    stop: &Stopper,
    function: &impl Function,
) -> io::Result<Ready> {
    let events = function.events();
    let mut watched: Vec<BorrowedFd<'_>> = vec![stop.0.event.as_fd(), listener.as_fd()];
    watched.extend(events.iter().copied());
    watched.extend(client.map(AsFd::as_fd));
    let mut polled: Vec<_> = watched.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    match poll(&mut polled, None) {
        Ok(_) => {}
        Err(Errno::INTR) => return Ok(Ready::default()),
        Err(errno) => return Err(errno.into()),
    }
    let is_ready = |at: usize| polled.get(at).is_some_and(|fd| !fd.revents().is_empty());
    let first = 2_usize;
    let behind = first.saturating_add(events.len());
    Ok(Ready {
        listener: is_ready(1),
        client: client.is_some() && is_ready(behind),
        events: (first..behind).filter(|at| is_ready(*at)).map(|at| at.saturating_sub(first)).collect(),
    })
}

/// A client that was quicker to go than we to accept, or a want of descriptors: the next one may be served.
fn is_passing(error: &io::Error) -> bool {
    let passing = [Errno::AGAIN, Errno::INTR, Errno::CONNABORTED, Errno::MFILE, Errno::NFILE, Errno::NOBUFS];
    passing.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Removes a socket that nobody listens on.
fn clear_path(path: &Path) -> Result<(), BindError> {
    use std::os::unix::fs::FileTypeExt;
    let Ok(there) = fs::symlink_metadata(path) else { return Ok(()) };
    if !there.file_type().is_socket() {
        return Err(BindError::NoSocket(path.into()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|source| BindError::Io { path: path.into(), source })
        }
        _ => Err(BindError::InUse(path.into())),
    }
}
