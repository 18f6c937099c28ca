//! Ready-made ways to cut a device off, for [`Device::fence`](super::Device::fence).

use std::os::fd::OwnedFd;

use rustix::fd::AsFd as _;
use rustix::io::Errno;
use viommu::subscribe::FenceFailed;

use super::line::Shown;
use super::sys;

fn failed(call: &str) -> impl Fn(Errno) -> FenceFailed {
    move |errno| FenceFailed(format!("{call}: {}", Shown(errno)))
}

/// VHOST_NET_SET_BACKEND with -1 for the rings 0 to `rings - 1` of a vhost-net device (2: receive and transmit). Each call
/// waits until its ring is not worked on. The device stays as it is otherwise, and goes on when its driver has reset it and
/// the back-ends are set again. The calling process must be the device's owner.
pub fn net(fd: OwnedFd, rings: u32) -> impl FnMut() -> Result<(), FenceFailed> + Send + 'static {
    move || {
        (0..rings)
            .try_for_each(|index| sys::net_unset_backend(fd.as_fd(), index))
            .map_err(failed("VHOST_NET_SET_BACKEND"))
    }
}

/// VHOST_VSOCK_SET_RUNNING with 0: as [`net`], for vhost-vsock.
pub fn vsock(fd: OwnedFd) -> impl FnMut() -> Result<(), FenceFailed> + Send + 'static {
    move || sys::vsock_stop(fd.as_fd()).map_err(failed("VHOST_VSOCK_SET_RUNNING"))
}

/// VHOST_RESET_OWNER: vhost-net and vhost-scsi stop and forget everything, IOTLB and features too.
pub fn reset_owner(fd: OwnedFd) -> impl FnMut() -> Result<(), FenceFailed> + Send + 'static {
    move || sys::reset_owner(fd.as_fd()).map_err(failed("VHOST_RESET_OWNER"))
}
