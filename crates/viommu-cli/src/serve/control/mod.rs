//! The control socket: who serves tells of the live state, and takes devices in and out.
//!
//! One thread has all connections, and none of them is waited for: a client that sends nothing, or too much, or does
//! not read its answer, costs its own connection.

mod connection;
pub(crate) mod protocol;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use viommu_vfio_user::{BindError, PrivateListener};
use viommu_virtio::viot::Bdf;

use super::device::Kind;
use super::options::behind_a_port;
use super::snapshot::Snapshot;
use connection::Connection;
use protocol::{Answer, Plugged, Request, line};

/// Connections at a time.
const CONNECTIONS: usize = 16;
/// A connection that has waited for its client so long may be dropped for a new one.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks at what the clock alone changes.
const TICK: Duration = Duration::from_millis(500);
/// Between failures to accept, such as for want of descriptors.
const BREATH: Duration = Duration::from_millis(50);

/// What is served, as the control socket sees it. Called on its thread, one call at a time.
pub(crate) trait Live: Send + Sync {
    /// The state, with all mappings or without.
    fn snapshot(&self, mappings: bool) -> Snapshot;

    /// Makes a device, its socket included, at an address where nothing is.
    ///
    /// # Errors
    /// Why not, for the client; nothing has changed.
    fn plug(&self, address: Bdf, device: Kind) -> Result<Plugged, String>;

    /// Takes a device away that was plugged in.
    ///
    /// # Errors
    /// Why not, for the client; nothing has changed.
    fn unplug(&self, address: Bdf) -> Result<Plugged, String>;
}

/// Answers until it is dropped, or told to stop.
#[derive(Debug)]
pub(crate) struct Control {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Listens at `path`.
    ///
    /// # Errors
    /// As [`PrivateListener::bind`]; or there is no thread to be had.
    pub(crate) fn start(path: &Path, live: Arc<dyn Live>) -> Result<Self, BindError> {
        let failed = |source: io::Error| BindError::Io { path: path.into(), source };
        let listener = PrivateListener::bind(path)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let stop = Arc::new(stop.map_err(|errno| failed(errno.into()))?);
        let told = stop.clone();
        let thread = thread::Builder::new().name("control".into()).spawn(move || {
            Server { listener, stop: told, live, connections: Vec::new(), deaf_until: None }.run();
        });
        let thread = thread.map_err(failed)?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends all connections, and removes the socket.
    pub(crate) fn stop(self) {}
}

impl Drop for Control {
    fn drop(&mut self) {
        // An eventfd takes it, unless it is full: then it wakes anyway.
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported, and ends with the thread.
            let _ = thread.join();
        }
    }
}

struct Server {
    listener: PrivateListener,
    stop: Arc<OwnedFd>,
    live: Arc<dyn Live>,
    connections: Vec<Connection>,
    /// No connection is accepted before.
    deaf_until: Option<Instant>,
}

impl Server {
    fn run(&mut self) {
        loop {
            let now = Instant::now();
            self.deaf_until = self.deaf_until.filter(|until| *until > now);
            let wake = self
                .connections
                .iter()
                .filter_map(|connection| connection.wakes_at(now))
                .chain(self.deaf_until);
            let wait = wake.map(|at| at.saturating_duration_since(now)).min().unwrap_or(TICK).min(TICK);
            let deaf = self.deaf_until.is_some();
            let mut polled = vec![
                PollFd::new(&*self.stop, PollFlags::IN),
                PollFd::new(&self.listener, if deaf { PollFlags::empty() } else { PollFlags::IN }),
            ];
            polled.extend(
                self.connections.iter().map(|c| PollFd::from_borrowed_fd(c.as_fd(), c.waits_for(now))),
            );
            // Rounded up: not to come back before it is time.
            let wait =
                Timespec { tv_sec: 0, tv_nsec: (wait + Duration::from_millis(1)).subsec_nanos().into() };
            match poll(&mut polled, Some(&wait)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => thread::sleep(BREATH),
            }
            let ready: Vec<PollFlags> = polled.iter().map(PollFd::revents).collect();
            drop(polled);
            let [stopped, coming, ready @ ..] = ready.as_slice() else { return };
            if !stopped.is_empty() {
                return;
            }
            let now = Instant::now();
            for (connection, ready) in self.connections.iter_mut().zip(ready) {
                connection.go_on(*ready, now);
                if let Some(request) = connection.request(now) {
                    let answer = request.map_or_else(Answer::Error, |bytes| answer(&*self.live, &bytes));
                    connection.answer(line(&answer), now.elapsed());
                }
            }
            self.connections.retain(|connection| !connection.is_over(now));
            if coming.contains(PollFlags::IN) {
                self.accept(now);
            }
        }
    }

    fn accept(&mut self, now: Instant) {
        match self.listener.accept() {
            Ok(stream) => {
                if self.connections.len() >= CONNECTIONS {
                    let waits = |c: &Connection| c.idle_for(now).filter(|idle| *idle > PATIENCE);
                    let oldest =
                        self.connections.iter().enumerate().filter_map(|(n, c)| Some((waits(c)?, n)));
                    match oldest.max() {
                        Some((_, n)) => drop(self.connections.swap_remove(n)),
                        // What is accepted and dropped is closed.
                        None => return,
                    }
                }
                if let Ok(connection) = Connection::new(stream, now) {
                    self.connections.push(connection);
                }
            }
            Err(why) if matches!(why.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            // The connection stays in the queue, and poll would say so at once.
            Err(_) => self.deaf_until = now.checked_add(BREATH),
        }
    }
}

fn answer(live: &dyn Live, bytes: &[u8]) -> Answer {
    let parse = |text: &str| text.parse::<Bdf>().map_err(|why| why.to_string());
    let outcome = Request::parse(bytes).and_then(|request| match request {
        Request::Get { get: protocol::What::Snapshot, mappings } => {
            Ok(Answer::Snapshot(Box::new(live.snapshot(mappings))))
        }
        Request::Plug { plug } => {
            let address = parse(&plug.address)?;
            if let Some(why) = behind_a_port(address) {
                return Err(why);
            }
            let device = Kind::parse(&plug.device)?;
            device.check()?;
            live.plug(address, device).map(Answer::Plugged)
        }
        Request::Unplug { unplug } => live.unplug(parse(&unplug.address)?).map(Answer::Unplugged),
    });
    outcome.unwrap_or_else(Answer::Error)
}
