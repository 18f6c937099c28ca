//! The descriptor: one message a read, one a write.

use core::fmt;
use std::os::fd::OwnedFd;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use zerocopy::{FromZeros as _, IntoBytes as _};

use crate::spec::Message;

/// Reads or writes that a signal has cut short, before it counts as "not now".
const TRIES: usize = 16;

/// What a device says and is told. Reading and writing may go on at the same time.
pub(crate) trait Line: Send + Sync {
    /// The next message of the device; `AGAIN` when there is none.
    fn read(&self) -> Result<Message, Errno>;

    /// One message to the device; `AGAIN` when it takes none now. When it returns, the device has done what it says.
    fn write(&self, message: &Message) -> Result<(), Errno>;
}

/// A vhost descriptor, or what behaves like one.
#[derive(Debug)]
pub(crate) struct Fd(OwnedFd);

impl Fd {
    /// Makes reads return at once; writes to a kernel's vhost are not concerned.
    pub(crate) fn new(fd: OwnedFd) -> Result<Self, Errno> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self(fd))
    }
}

/// Tries again where a signal came in between.
fn again<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    for _ in 0..TRIES {
        match call() {
            Err(Errno::INTR) => {}
            outcome => return outcome,
        }
    }
    Err(Errno::AGAIN)
}

impl Line for Fd {
    fn read(&self) -> Result<Message, Errno> {
        let mut message = Message::new_zeroed();
        let got = again(|| rustix::io::read(&self.0, message.as_mut_bytes()))?;
        match got {
            0 => Err(Errno::PIPE), // the other end is closed
            got if got == size_of::<Message>() => Ok(message),
            _ => Err(Errno::BADMSG),
        }
    }

    fn write(&self, message: &Message) -> Result<(), Errno> {
        let put = again(|| rustix::io::write(&self.0, message.as_bytes()))?;
        // Half a message is none, and there is no way to take it back.
        if put == size_of::<Message>() { Ok(()) } else { Err(Errno::BADMSG) }
    }
}

/// An errno by its number and its words.
pub(crate) struct Shown(pub(crate) Errno);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::io::Error::from(self.0).fmt(f)
    }
}
