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

    pub(crate) fn second(socket: &Path, refused: bool) {
        if refused {
            tracing::warn!(socket = %socket.display(), "a second client was refused");
        }
    }

    pub(crate) fn refused(command: u16, errno: Errno) {
        tracing::debug!(command, %errno, "a message was refused");
    }

    pub(crate) fn window(address: u64, size: u64, error: &WindowError) {
        tracing::warn!("the window of {size} bytes at {address:#x} was refused: {error}");
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
    pub(crate) fn second(_: &Path, _: bool) {}
    pub(crate) fn refused(_: u16, _: Errno) {}
    pub(crate) fn window(_: u64, _: u64, _: &WindowError) {}
}

pub(crate) use events::{connected, ended, refused, second, window};
