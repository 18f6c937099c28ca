//! A stream socket of this guest's own to a vhost-vsock's guest, non-blocking, by its calls.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// `SO_VM_SOCKETS_CONNECT_TIMEOUT`: the kernel takes a request back whose answer does not come in time.
const CONNECT_TIMEOUT: libc::c_int = 6;

pub(super) struct Socket(OwnedFd);

impl Socket {
    /// One that asks for a connection: the request is a packet for the device.
    pub(super) fn connect(cid: u64, port: u32) -> io::Result<Self> {
        // SAFETY: no memory is concerned.
        let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor has just been made and nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let limit = libc::timeval { tv_sec: 300, tv_usec: 0 };
        let value = std::ptr::from_ref(&limit).cast();
        // SAFETY: the structure is read, and is as long as is said.
        let set = unsafe { libc::setsockopt(fd, libc::AF_VSOCK, CONNECT_TIMEOUT, value, length(&limit)) };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
        let address = libc::sockaddr_vm {
            svm_family: u16::try_from(libc::AF_VSOCK).map_err(io::Error::other)?,
            svm_reserved1: 0,
            svm_port: port,
            svm_cid: u32::try_from(cid).map_err(io::Error::other)?,
            svm_zero: [0; 4],
        };
        // SAFETY: the structure is read, and is as long as is said.
        let connected = unsafe { libc::connect(fd, std::ptr::from_ref(&address).cast(), length(&address)) };
        match io::Error::last_os_error() {
            error if connected < 0 && error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(Self(socket)),
            error if connected < 0 => Err(error),
            _ => Err(io::Error::other("connected before an answer")),
        }
    }

    /// What became of the connection: nothing yet, or whether it was accepted (the errno if not).
    pub(super) fn answer(&self) -> io::Result<Option<Result<(), i32>>> {
        let mut polled = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one structure is there to be read and written.
        if unsafe { libc::poll(&raw mut polled, 1, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        if polled.revents == 0 {
            return Ok(None);
        }
        let (mut errno, mut bytes) = (0_i32, length(&0_i32));
        let (fd, value) = (self.0.as_raw_fd(), (&raw mut errno).cast());
        // SAFETY: a number is written, which is as long as is said, and its length.
        let got = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, value, &raw mut bytes) };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Some(if errno == 0 { Ok(()) } else { Err(errno) }))
    }

    /// Sends, all of it or nothing: a packet for the device.
    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: as many bytes as there are in the slice may be read.
        let sent =
            unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
        match usize::try_from(sent) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            Ok(sent) => Err(io::Error::other(format!("{sent} bytes sent"))),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}

fn length<T>(_: &T) -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).expect("a few bytes")
}
