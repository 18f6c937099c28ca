//! vhost-net and vhost-vsock, a tap, and what arrives behind it, by their calls.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

/// Features: VHOST_NET_F_VIRTIO_NET_HDR (the device takes off the header), VERSION_1, ACCESS_PLATFORM.
pub(super) const FEATURES: u64 = 1 << 27 | VSOCK_FEATURES;

/// VERSION_1, ACCESS_PLATFORM.
pub(super) const VSOCK_FEATURES: u64 = 1 << 32 | 1 << 33;

/// The rings that receive and send, as their driver sees them.
pub(super) const RX: u32 = 0;
pub(super) const TX: u32 = 1;

/// A type of frames that nothing else sends: IEEE 802's for experiments.
pub(super) const ETHERTYPE: u16 = 0x88b5;

const SET_FEATURES: u64 = 0x4008_af00;
const SET_OWNER: u64 = 0xaf01;
const SET_MEM_TABLE: u64 = 0x4008_af03;
const SET_VRING_NUM: u64 = 0x4008_af10;
const SET_VRING_ADDR: u64 = 0x4028_af11;
const SET_VRING_BASE: u64 = 0x4008_af12;
const SET_VRING_KICK: u64 = 0x4008_af20;
const NET_SET_BACKEND: u64 = 0x4008_af30;
const VSOCK_SET_GUEST_CID: u64 = 0x4008_af60;
const VSOCK_SET_RUNNING: u64 = 0x4004_af61;
const TUNSETIFF: u64 = 0x4004_54ca;

/// `struct vhost_vring_state`, and `struct vhost_vring_file` with a descriptor for the number.
#[repr(C)]
struct Ring {
    index: u32,
    value: i32,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct Addresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `struct vhost_memory` with its regions: guest physical address, bytes, address in this process, nothing.
#[repr(C)]
struct Memory<const N: usize> {
    count: u32,
    padding: u32,
    regions: [[u64; 4]; N],
}

fn checked(returned: libc::c_int, call: &str) -> io::Result<libc::c_int> {
    if returned < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(error.kind(), format!("{call}: {error}")));
    }
    Ok(returned)
}

fn ioctl<T>(file: &impl AsRawFd, request: u64, argument: &T, call: &str) -> io::Result<()> {
    // SAFETY: each caller here gives a request and the structure that it reads. The memory that the device comes to know is
    // that of the table, which vm-memory has mapped for it.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), request as _, std::ptr::from_ref(argument)) }, call)?;
    Ok(())
}

/// A vhost device.
#[derive(Debug)]
pub(super) struct Vhost(pub(super) File);

impl Vhost {
    pub(super) fn open(path: &str) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        ioctl(&file, SET_OWNER, &0_u64, "VHOST_SET_OWNER")?;
        Ok(Self(file))
    }

    pub(super) fn duplicate(&self) -> io::Result<OwnedFd> {
        Ok(self.0.try_clone()?.into())
    }

    pub(super) fn set_memory(&self, regions: [[u64; 4]; 2]) -> io::Result<()> {
        let memory = Memory { count: 2, padding: 0, regions };
        ioctl(&self.0, SET_MEM_TABLE, &memory, "VHOST_SET_MEM_TABLE")
    }

    pub(super) fn set_features(&self, features: u64) -> io::Result<()> {
        ioctl(&self.0, SET_FEATURES, &features, "VHOST_SET_FEATURES")
    }

    /// A ring: its size, the device's addresses of its parts, and what kicks it.
    pub(super) fn set_ring(
        &self,
        index: u32,
        size: u16,
        addresses: [u64; 3],
        kick: &OwnedFd,
    ) -> io::Result<()> {
        ioctl(&self.0, SET_VRING_NUM, &Ring { index, value: size.into() }, "VHOST_SET_VRING_NUM")?;
        ioctl(&self.0, SET_VRING_BASE, &Ring { index, value: 0 }, "VHOST_SET_VRING_BASE")?;
        let [descriptors, available, used] = addresses;
        let addresses = Addresses { index, flags: 0, descriptors, used, available, log: 0 };
        ioctl(&self.0, SET_VRING_ADDR, &addresses, "VHOST_SET_VRING_ADDR")?;
        let kick = Ring { index, value: kick.as_raw_fd() };
        ioctl(&self.0, SET_VRING_KICK, &kick, "VHOST_SET_VRING_KICK")
    }

    pub(super) fn set_backend(&self, tap: &File) -> io::Result<()> {
        let backend = Ring { index: TX, value: tap.as_raw_fd() };
        ioctl(&self.0, NET_SET_BACKEND, &backend, "VHOST_NET_SET_BACKEND")
    }

    /// Whether the ring still has a back-end: taking one of no descriptor away fails on one whose owner is gone.
    pub(super) fn unset_backend(&self) -> io::Result<()> {
        ioctl(&self.0, NET_SET_BACKEND, &Ring { index: TX, value: -1 }, "VHOST_NET_SET_BACKEND of none")
    }

    /// The address that a vhost-vsock's guest has.
    pub(super) fn set_guest_cid(&self, cid: u64) -> io::Result<()> {
        ioctl(&self.0, VSOCK_SET_GUEST_CID, &cid, "VHOST_VSOCK_SET_GUEST_CID")
    }

    pub(super) fn set_running(&self, running: bool) -> io::Result<()> {
        ioctl(&self.0, VSOCK_SET_RUNNING, &i32::from(running), "VHOST_VSOCK_SET_RUNNING")
    }
}

/// `struct ifreq`, as far as it is used.
#[repr(C)]
struct IfReq {
    name: [u8; 16],
    flags: i16,
    padding: [u8; 22],
}

/// A tap, and the socket that hears what is sent through it.
pub(super) struct Tap {
    pub(super) file: File,
    heard: OwnedFd,
}

impl Tap {
    /// A tap of this name, up.
    pub(super) fn new(name: &str) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
        let mut request = IfReq { name: [0; 16], flags: 0, padding: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request.flags = 0x0002 | 0x1000; // IFF_TAP, IFF_NO_PI
        ioctl(&file, TUNSETIFF, &request, "TUNSETIFF")?;
        let protocol = i32::from(ETHERTYPE.to_be());
        // SAFETY: no memory is concerned.
        let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, protocol) };
        let socket = checked(socket, "socket")?;
        // SAFETY: the descriptor has just been made and nobody else has it.
        let heard = unsafe { OwnedFd::from_raw_fd(socket) };
        request.flags = 0x0001 | 0x0040; // IFF_UP, IFF_RUNNING
        ioctl(&heard, libc::SIOCSIFFLAGS, &request, "SIOCSIFFLAGS")?;
        Ok(Self { file, heard })
    }

    /// The next frame that came through; how long it is.
    pub(super) fn hear(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        // SAFETY: as many bytes as there are in the slice may be written.
        let got = unsafe { libc::recv(self.heard.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => Ok(Some(got)),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error => Err(error),
            },
        }
    }

    pub(super) fn socket(&self) -> RawFd {
        self.heard.as_raw_fd()
    }
}

/// An eventfd.
pub(super) fn event() -> io::Result<OwnedFd> {
    // SAFETY: no memory is concerned.
    let fd = checked(unsafe { libc::eventfd(0, libc::EFD_NONBLOCK) }, "eventfd")?;
    // SAFETY: the descriptor has just been made and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits until one of these can be read, for so many milliseconds at most.
pub(super) fn wait(fds: [RawFd; 2], milliseconds: i32) -> io::Result<()> {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    // SAFETY: two structures are there to be read and written.
    checked(unsafe { libc::poll(polled.as_mut_ptr(), 2, milliseconds) }, "poll")?;
    Ok(())
}
