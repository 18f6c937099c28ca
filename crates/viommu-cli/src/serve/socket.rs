//! Sockets that only the user who serves can connect to.

use std::fs;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// A listener whose file goes when it is dropped.
#[derive(Debug)]
pub(crate) struct PrivateListener {
    listener: UnixListener,
    path: PathBuf,
}

impl PrivateListener {
    /// Listens at `path`, with mode 0600 from the first moment. A socket that nobody listens at any more, of a server
    /// that was killed, is replaced.
    ///
    /// # Errors
    /// `AddrInUse`: somebody listens there. `AlreadyExists`: there is something else than a socket. What the system says.
    pub(crate) fn new(path: &Path) -> io::Result<Self> {
        remove_stale(path)?;
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // The file gets the socket's mode when it is bound: there is no moment in which others could connect.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        let listener = Self { listener: UnixListener::from(socket), path: path.to_owned() };
        listen(&listener.listener, BACKLOG)?;
        Ok(listener)
    }

    /// What is listened at.
    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for PrivateListener {
    fn drop(&mut self) {
        // It may be gone with its directory.
        let _ = fs::remove_file(&self.path);
    }
}

fn remove_stale(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let there = match fs::symlink_metadata(path) {
        Ok(there) => there,
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(why) => return Err(why),
    };
    if !there.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is something that is no socket"));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody serves there already")),
        Err(why) if why.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(why) => Err(why),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn new_makes_a_private_socket_and_drop_removes_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let listener = PrivateListener::new(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert!(listener.listener().accept().is_ok());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn new_where_somebody_listens_is_refused_and_leaves_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let _first = PrivateListener::new(&path).unwrap();
        assert_eq!(PrivateListener::new(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn new_over_a_socket_of_a_server_that_died_replaces_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        // Std's leaves its file behind, as a killed server does.
        drop(UnixListener::bind(&path).unwrap());
        let _again = PrivateListener::new(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn new_over_a_file_is_refused_and_leaves_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        fs::write(&path, "precious").unwrap();
        assert_eq!(PrivateListener::new(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
