//! Sockets that only the user who serves can connect to.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

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

/// A listening socket of mode 0600, that does not block. Its file goes when it is dropped.
#[derive(Debug)]
pub struct PrivateListener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    identity: Option<(u64, u64)>,
}

impl PrivateListener {
    /// Listens at `path`. A socket that nobody listens at any more, of a server that was killed, is replaced.
    ///
    /// # Errors
    /// See [`BindError`]; what is there is as it was.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        clear(path)?;
        let failed = |source: io::Error| BindError::Io { path: path.into(), source };
        let make = || -> io::Result<Self> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // The file gets the socket's mode when it is bound: there is no moment in which others could connect.
            fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            bind(&socket, &SocketAddrUnix::new(path)?)?;
            let listener = UnixListener::from(socket);
            let listener = Self { listener, path: path.into(), identity: identity(path) };
            listen(&listener.listener, BACKLOG)?;
            Ok(listener)
        };
        make().map_err(failed)
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who has connected first, if anybody waits.
    ///
    /// # Errors
    /// As [`UnixListener::accept`].
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().map(|(stream, _)| stream)
    }
}

impl AsFd for PrivateListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for PrivateListener {
    fn drop(&mut self) {
        // It may have been taken away by hand, and another server's may be there.
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _gone = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|there| (there.dev(), there.ino()))
}

/// Removes a socket that nobody listens on.
fn clear(path: &Path) -> Result<(), BindError> {
    let failed = |source: io::Error| BindError::Io { path: path.into(), source };
    let there = match fs::symlink_metadata(path) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !there.file_type().is_socket() {
        return Err(BindError::NoSocket(path.into()));
    }
    // One that has no time for us is one that is there: do not wait for it.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let probe = probe.map_err(|errno| failed(errno.into()))?;
    let address = SocketAddrUnix::new(path).map_err(|errno| failed(errno.into()))?;
    match connect(&probe, &address) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(failed),
        Err(Errno::NOENT) => Ok(()),
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(BindError::InUse(path.into())),
        Err(errno) => Err(failed(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn bind_makes_a_private_socket_and_drop_removes_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let listener = PrivateListener::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert!(listener.accept().is_ok());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn bind_where_somebody_listens_is_refused_and_leaves_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let _first = PrivateListener::bind(&path).unwrap();
        assert!(matches!(PrivateListener::bind(&path), Err(BindError::InUse(_))));
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn bind_over_a_socket_of_a_server_that_died_replaces_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        // Std's leaves its file behind, as a killed server does.
        drop(UnixListener::bind(&path).unwrap());
        let _again = PrivateListener::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn bind_over_a_file_is_refused_and_leaves_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(PrivateListener::bind(&path), Err(BindError::NoSocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
