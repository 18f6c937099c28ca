//! The process at the other end.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use viommu::subscribe::FenceFailed;

/// A back end's process, by a descriptor that stays that process's: no other of the same number is ever meant.
#[derive(Debug)]
pub struct Peer(OwnedFd);

impl Peer {
    /// The process that connected `socket`, or listened for it. It must be alive still.
    ///
    /// # Errors
    /// The system's. `ESRCH`: it has ended.
    pub fn of(socket: &UnixStream) -> std::io::Result<Self> {
        Ok(Self::of_pid(socket_peercred(socket)?.pid)?)
    }

    /// A process by its number, which the caller keeps from being another's (a child not waited for).
    ///
    /// # Errors
    /// The system's.
    pub fn of_pid(pid: Pid) -> Result<Self, Errno> {
        pidfd_open(pid, PidfdFlags::empty()).map(Self)
    }

    /// Kills it and waits for its end, at most for `limit`: with it goes its view of guest memory, so this is what
    /// fences a device that runs there. Blocks.
    ///
    /// # Errors
    /// It may not be killed, or is there still after `limit`.
    pub fn kill(&self, limit: Duration) -> Result<(), FenceFailed> {
        match pidfd_send_signal(&self.0, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(errno) => return Err(FenceFailed(format!("the back end cannot be killed: {errno}"))),
        }
        let until = Instant::now().checked_add(limit);
        loop {
            let left = until.map_or(limit, |until| until.saturating_duration_since(Instant::now()));
            let wait = Timespec::try_from(left).ok();
            let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
            match poll(&mut fds, wait.as_ref()) {
                Ok(0) => return Err(FenceFailed(format!("the back end does not end within {limit:?}"))),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => {
                    return Err(FenceFailed(format!("the back end's end cannot be awaited: {errno}")));
                }
            }
        }
    }
}
