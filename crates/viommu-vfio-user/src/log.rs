//! What clients do, for `tracing`.

#[cfg(feature = "tracing")]
mod events {
    use core::fmt::Display;
    use std::path::Path;

    use rustix::io::Errno;

    use crate::memory::WindowError;

    pub(crate) fn connected(socket: &Path) {
        tracing::info!(socket = %socket.display(), "a client has connected");
    }

    pub(crate) fn ended(socket: &Path, why: &dyn Display) {
        tracing::info!(socket = %socket.display(), %why, "the connection has ended");
    }

    pub(crate) fn second(socket: &Path) {
        tracing::warn!(socket = %socket.display(), "a second client was refused");
    }

    pub(crate) fn not_accepted(socket: &Path, error: &dyn Display) {
        tracing::debug!(socket = %socket.display(), %error, "a client cannot be accepted");
    }

    pub(crate) fn refused(command: u16, errno: Errno) {
        tracing::debug!(command, %errno, "a message was refused");
    }

    pub(crate) fn window(address: u64, size: u64, error: &WindowError, last: bool) {
        let more = if last { "; others of this client are not told of" } else { "" };
        tracing::warn!("the window of {size} bytes at {address:#x} was refused: {error}{more}");
    }
}

#[cfg(not(feature = "tracing"))]
mod events {
    use core::fmt::Display;
    use std::path::Path;

    use rustix::io::Errno;

    use crate::memory::WindowError;

    pub(crate) fn connected(_: &Path) {}
    pub(crate) fn ended(_: &Path, _: &dyn Display) {}
    pub(crate) fn second(_: &Path) {}
    pub(crate) fn not_accepted(_: &Path, _: &dyn Display) {}
    pub(crate) fn refused(_: u16, _: Errno) {}
    pub(crate) fn window(_: u64, _: u64, _: &WindowError, _: bool) {}
}

pub(crate) use events::{connected, ended, not_accepted, refused, second, window};
