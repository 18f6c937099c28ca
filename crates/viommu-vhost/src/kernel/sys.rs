//! The calls of vhost devices. The only unsafe code of this crate but for other modules of this name.

use core::ffi::c_int;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::ioctl::{Getter, NoArg, Opcode, Setter, ioctl, opcode};

/// The group of vhost's requests in `<linux/vhost.h>`.
const VHOST: u8 = 0xaf;
const GET_FEATURES: Opcode = opcode::read::<u64>(VHOST, 0x00);
const RESET_OWNER: Opcode = opcode::none(VHOST, 0x02);
const SET_BACKEND_FEATURES: Opcode = opcode::write::<u64>(VHOST, 0x25);
const GET_BACKEND_FEATURES: Opcode = opcode::read::<u64>(VHOST, 0x26);
const NET_SET_BACKEND: Opcode = opcode::write::<VringFile>(VHOST, 0x30);
const VSOCK_SET_RUNNING: Opcode = opcode::write::<c_int>(VHOST, 0x61);

/// `struct vhost_vring_file`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct VringFile {
    index: u32,
    fd: i32,
}

pub(super) fn features(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    // SAFETY: this request writes a u64 and nothing else.
    let get = unsafe { Getter::<GET_FEATURES, u64>::new() };
    // SAFETY: the request and what it writes to belong together; no other memory is concerned.
    unsafe { ioctl(fd, get) }
}

pub(super) fn backend_features(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    // SAFETY: this request writes a u64 and nothing else.
    let get = unsafe { Getter::<GET_BACKEND_FEATURES, u64>::new() };
    // SAFETY: the request and what it writes to belong together; no other memory is concerned.
    unsafe { ioctl(fd, get) }
}

pub(super) fn set_backend_features(fd: BorrowedFd<'_>, features: u64) -> Result<(), Errno> {
    // SAFETY: this request reads a u64.
    let set = unsafe { Setter::<SET_BACKEND_FEATURES, u64>::new(features) };
    // SAFETY: the request and what it reads belong together; no other memory is concerned.
    unsafe { ioctl(fd, set) }
}

/// Takes a ring's back-end from it: when it returns, vhost-net does not touch the ring any more.
pub(super) fn net_unset_backend(fd: BorrowedFd<'_>, index: u32) -> Result<(), Errno> {
    // SAFETY: this request reads such a structure; -1 is no descriptor.
    let set = unsafe { Setter::<NET_SET_BACKEND, VringFile>::new(VringFile { index, fd: -1 }) };
    // SAFETY: the request and what it reads belong together; the device lets memory go, and takes none.
    unsafe { ioctl(fd, set) }
}

/// Stops all rings of vhost-vsock.
pub(super) fn vsock_stop(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: this request reads an int.
    let set = unsafe { Setter::<VSOCK_SET_RUNNING, c_int>::new(0) };
    // SAFETY: the request and what it reads belong together; the device lets memory go, and takes none.
    unsafe { ioctl(fd, set) }
}

/// Stops a device and has it forget everything.
pub(super) fn reset_owner(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: this request has no argument.
    let reset = unsafe { NoArg::<RESET_OWNER>::new() };
    // SAFETY: the request has no argument; the device lets memory go, and takes none.
    unsafe { ioctl(fd, reset) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[test]
    fn numbers_are_those_of_linux() {
        assert_eq!(GET_FEATURES, 0x8008_af00);
        assert_eq!(RESET_OWNER, 0xaf02);
        assert_eq!(SET_BACKEND_FEATURES, 0x4008_af25);
        assert_eq!(GET_BACKEND_FEATURES, 0x8008_af26);
        assert_eq!(NET_SET_BACKEND, 0x4008_af30);
        assert_eq!(VSOCK_SET_RUNNING, 0x4004_af61);
    }
}
