//! A socket, and the function behind it.

mod interrupts;
mod link;
mod listener;
pub(crate) mod session;
mod version;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::function::Function;
use crate::memory::WindowLimits;
use crate::message;
use session::{Outcome, Session};

pub use interrupts::Interrupts;
pub use link::Link;
pub use listener::{BindError, PrivateListener};
#[cfg(feature = "client")]
pub(crate) use version::MAX_TRANSFER;

/// How long a message that has begun may take, and a client may take to read a reply, before it is given up.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long nobody is accepted after that has failed: what was lacking may be there by then.
const REST: Duration = Duration::from_millis(100);

/// A thread that has given way for so long has others beside it.
const CROWDED: Duration = Duration::from_millis(1);

/// Messages for which it does not give way then.
const CALM: u32 = 256;

/// Clients that are refused while another is there, and told of in the log.
const REFUSALS: u32 = 3;

/// Serves one function on one socket, to one client at a time.
///
/// A client that goes away, or breaks the protocol, costs its own connection: the function is told
/// ([`Function::disconnected`]), all that the client gave is given back, and the next one is welcome. While there is a
/// client, others are refused: they find their connection closed.
#[derive(Debug)]
pub struct Server<F> {
    function: F,
    listener: PrivateListener,
    link: Link,
    stop: Stopper,
    limits: WindowLimits,
    /// When somebody can be accepted again.
    rest: Option<Instant>,
    /// How long to look for the next message before sleeping.
    busy_poll: Duration,
    /// Messages after which not to look, since others want the processor.
    crowded: u32,
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
        let listener = PrivateListener::bind(path)?;
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let event = event.map_err(|errno| BindError::Io { path: path.into(), source: errno.into() })?;
        let link = Link::default();
        let stop = Stopper(Arc::new(Stop { asked: AtomicBool::new(false), event, link: link.clone() }));
        Ok(Self { function, listener, link, stop, limits, rest: None, busy_poll: Duration::ZERO, crowded: 0 })
    }

    /// After a message, looks for the next one for so long before it sleeps, giving way to other threads meanwhile. Being
    /// woken takes longer than most messages, and a guest that waits for its IOMMU sends one after the other. Zero, as it
    /// is at first, sleeps at once.
    #[must_use]
    pub fn busy_poll(self, time: Duration) -> Self {
        Self { busy_poll: time, ..self }
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
            let ready = self.wait(None, None)?;
            self.events(&ready);
            if !ready.listener || self.stop.is_asked() {
                continue;
            }
            if let Some(stream) = self.accept()? {
                self.attend(stream);
            }
        }
        Ok(())
    }

    /// Who waits to be served. `None`: nobody, or it cannot be done now.
    fn accept(&mut self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok(stream) => Ok(Some(stream)),
            Err(error) if is_one_of(&error, &[Errno::AGAIN, Errno::INTR, Errno::CONNABORTED]) => Ok(None),
            Err(error) => {
                // Who waits goes on waiting, and would wake us at once.
                self.rest = Instant::now().checked_add(REST);
                crate::log::not_accepted(self.listener.path(), &error);
                is_one_of(&error, &[Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM])
                    .then_some(None)
                    .ok_or(error)
            }
        }
    }

    fn events(&mut self, ready: &Ready) {
        ready.events.iter().for_each(|index| self.function.event(*index));
    }

    /// One client, from its first message to its last.
    fn attend(&mut self, stream: UnixStream) {
        match self.converse(stream) {
            Ok(why) => crate::log::ended(self.listener.path(), &why),
            Err(error) => crate::log::ended(self.listener.path(), &error),
        }
        clean(&mut self.function, &self.link);
    }

    fn converse(&mut self, stream: UnixStream) -> io::Result<&'static str> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        self.link.connect(stream.try_clone()?);
        crate::log::connected(self.listener.path());
        self.function.connected(&self.link);
        let mut session = Session::new(self.limits.windows);
        let mut payload = Vec::new();
        let mut refused = 0_u32;
        let mut awake_until = None;
        loop {
            let ready = self.wait(Some(&stream), awake_until)?;
            if self.stop.is_asked() {
                return Ok("the server stops");
            }
            self.events(&ready);
            // One client at a time: the connection of another ends here.
            if ready.listener && matches!(self.accept(), Ok(Some(_))) {
                refused = refused.saturating_add(1);
                if refused <= REFUSALS {
                    crate::log::second(self.listener.path());
                }
            }
            if ready.client
                && let Some(why) =
                    exchange(&mut self.function, &mut session, &self.link, &stream, &mut payload)?
            {
                return Ok(why);
            }
            if ready.client && !self.busy_poll.is_zero() {
                awake_until = match self.crowded.checked_sub(1) {
                    Some(left) => {
                        self.crowded = left;
                        None
                    }
                    None => Instant::now().checked_add(self.busy_poll),
                };
            }
        }
    }

    /// Until a client or an event comes, or somebody can be accepted again. Does not sleep before `awake_until`.
    fn wait(&mut self, client: Option<&UnixStream>, awake_until: Option<Instant>) -> io::Result<Ready> {
        let rest = self.rest.map(|until| until.saturating_duration_since(Instant::now()));
        let rest = rest.filter(|rest| !rest.is_zero());
        if rest.is_none() {
            self.rest = None;
        }
        let listener = rest.is_none().then_some(&self.listener);
        let events = self.function.events();
        let watch = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut polled = Vec::with_capacity(events.len().saturating_add(3));
        polled.push(watch(self.stop.0.event.as_fd()));
        polled.extend(events.into_iter().map(watch));
        let after = polled.len();
        polled.extend(client.map(|client| watch(client.as_fd())));
        polled.extend(listener.map(|listener| watch(listener.as_fd())));
        let most = rest.and_then(|rest| Timespec::try_from(rest).ok());
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut ready = Ok(0);
        while ready == Ok(0) && awake_until.is_some_and(|until| Instant::now() < until) {
            ready = poll(&mut polled, Some(&now));
            if ready == Ok(0) {
                let begin = Instant::now();
                std::thread::yield_now();
                if begin.elapsed() > CROWDED {
                    self.crowded = CALM;
                }
            }
        }
        if ready == Ok(0) {
            ready = poll(&mut polled, most.as_ref());
        }
        match ready {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(errno) => return Err(errno.into()),
        }
        let is_ready = |at: usize| polled.get(at).is_some_and(|fd| !fd.revents().is_empty());
        Ok(Ready {
            client: client.is_some() && is_ready(after),
            listener: listener.is_some() && is_ready(after.saturating_add(usize::from(client.is_some()))),
            events: (1..after).filter(|at| is_ready(*at)).map(|at| at.saturating_sub(1)).collect(),
        })
    }
}

/// One message of a client, and the answer to it. Gives why the connection ends, if it does.
pub(crate) fn exchange(
    function: &mut impl Function,
    session: &mut Session,
    link: &Link,
    stream: &UnixStream,
    payload: &mut Vec<u8>,
) -> io::Result<Option<&'static str>> {
    let message = match message::receive(stream, session::MAX_PAYLOAD, PATIENCE, payload) {
        Ok(Some(message)) => message,
        Ok(None) => return Ok(Some("the client has closed it")),
        Err(error) => return Err(io::Error::other(error)),
    };
    match session.handle(function, message, payload) {
        Outcome::Reply(header, files) => {
            link.reply(&header, session.payload(), &session::borrowed(&files))?;
            Ok(None)
        }
        Outcome::Silence => Ok(None),
        Outcome::HangUp(why) => Ok(Some(why)),
    }
}

/// After a client: nothing of it is left. Our end of the connection closes last: to a client that waits for it, it says that
/// none of its memory is used any more.
pub(crate) fn clean(function: &mut impl Function, link: &Link) {
    let stream = link.withdraw();
    function.disconnected();
    function.interrupts().clear();
    let windows = function.windows().clone();
    windows.clear(|window| function.unmapped(window));
    drop(stream);
}

/// Descriptors that can be read.
#[derive(Default)]
struct Ready {
    listener: bool,
    client: bool,
    events: Vec<usize>,
}

fn is_one_of(error: &io::Error, errnos: &[Errno]) -> bool {
    errnos.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}
