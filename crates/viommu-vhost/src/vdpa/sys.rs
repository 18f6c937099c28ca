//! The calls of a vhost-vDPA device.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Getter, NoArg, Opcode, Setter, ioctl, opcode};
use zerocopy::IntoBytes as _;

use crate::spec::Message;
use crate::vdpa::wire::Kernel;

/// The group of vhost's requests in `<linux/vhost.h>`.
const VHOST: u8 = 0xaf;
const SET_OWNER: Opcode = opcode::none(VHOST, 0x01);
const SET_BACKEND_FEATURES: Opcode = opcode::write::<u64>(VHOST, 0x25);
const GET_BACKEND_FEATURES: Opcode = opcode::read::<u64>(VHOST, 0x26);
const VDPA_GET_STATUS: Opcode = opcode::read::<u8>(VHOST, 0x71);
const VDPA_SET_STATUS: Opcode = opcode::write::<u8>(VHOST, 0x72);
const VDPA_GET_IOVA_RANGE: Opcode = opcode::read::<[u64; 2]>(VHOST, 0x78);
const VDPA_GET_AS_NUM: Opcode = opcode::read::<u32>(VHOST, 0x7a);

pub(super) fn set_owner(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: this request takes no argument.
    let set = unsafe { NoArg::<SET_OWNER>::new() };
    // SAFETY: no memory is concerned: the device takes what it is given later for this process's.
    unsafe { ioctl(fd, set) }
}

/// A device by its descriptor.
#[derive(Debug)]
pub(super) struct Fd(pub(super) OwnedFd);

impl Fd {
    pub(super) fn backend_features(&self) -> Result<u64, Errno> {
        // SAFETY: this request writes a u64 and nothing else.
        let get = unsafe { Getter::<GET_BACKEND_FEATURES, u64>::new() };
        // SAFETY: the request and what it writes to belong together; no other memory is concerned.
        unsafe { ioctl(self.0.as_fd(), get) }
    }

    pub(super) fn set_backend_features(&self, features: u64) -> Result<(), Errno> {
        // SAFETY: this request reads a u64.
        let set = unsafe { Setter::<SET_BACKEND_FEATURES, u64>::new(features) };
        // SAFETY: the request and what it reads belong together; no other memory is concerned.
        unsafe { ioctl(self.0.as_fd(), set) }
    }

    /// First and last address.
    pub(super) fn iova_range(&self) -> Result<[u64; 2], Errno> {
        // SAFETY: this request writes two u64 and nothing else.
        let get = unsafe { Getter::<VDPA_GET_IOVA_RANGE, [u64; 2]>::new() };
        // SAFETY: the request and what it writes to belong together; no other memory is concerned.
        unsafe { ioctl(self.0.as_fd(), get) }
    }

    pub(super) fn address_spaces(&self) -> Result<u32, Errno> {
        // SAFETY: this request writes a u32 and nothing else.
        let get = unsafe { Getter::<VDPA_GET_AS_NUM, u32>::new() };
        // SAFETY: the request and what it writes to belong together; no other memory is concerned.
        unsafe { ioctl(self.0.as_fd(), get) }
    }

    fn status(&self) -> Result<u8, Errno> {
        // SAFETY: this request writes a byte and nothing else.
        let get = unsafe { Getter::<VDPA_GET_STATUS, u8>::new() };
        // SAFETY: the request and what it writes to belong together; no other memory is concerned.
        unsafe { ioctl(self.0.as_fd(), get) }
    }
}

impl Kernel for Fd {
    fn write(&mut self, message: &Message) -> Result<(), Errno> {
        // What an UPDATE lets a device reach is memory that vm-memory has mapped for a guest: nobody in this process takes
        // it for memory of its own. Its pages are pinned, or their file is held.
        let bytes = message.as_bytes();
        match rustix::io::write(&self.0, bytes)? {
            written if written == bytes.len() => Ok(()),
            _ => Err(Errno::IO),
        }
    }

    fn reset(&mut self) -> Result<u8, Errno> {
        // SAFETY: this request reads a byte.
        let set = unsafe { Setter::<VDPA_SET_STATUS, u8>::new(0) };
        // SAFETY: the request and what it reads belong together; the device lets memory go, and takes none.
        unsafe { ioctl(self.0.as_fd(), set) }?;
        self.status()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[test]
    fn numbers_are_those_of_linux() {
        assert_eq!(SET_OWNER, 0xaf01);
        assert_eq!(SET_BACKEND_FEATURES, 0x4008_af25);
        assert_eq!(GET_BACKEND_FEATURES, 0x8008_af26);
        assert_eq!(VDPA_GET_STATUS, 0x8001_af71);
        assert_eq!(VDPA_SET_STATUS, 0x4001_af72);
        assert_eq!(VDPA_GET_IOVA_RANGE, 0x8010_af78);
        assert_eq!(VDPA_GET_AS_NUM, 0x8004_af7a);
    }
}
