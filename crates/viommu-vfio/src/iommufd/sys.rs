//! The ioctls of an iommufd, and those of a VFIO device's file that concern it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use viommu::{Access, Iova, IovaRange};

use crate::errno::Errno;
use crate::iommufd::device::Device;
use crate::iommufd::kernel::{Kernel, Limits, Place};
use crate::iommufd::spec::{self, size_of_arg};
use crate::software::Bitmap;

/// Ranges that are read at most.
const MAX_RANGES: u32 = 1 << 12;

/// An iommufd by its descriptor.
#[derive(Debug)]
pub(crate) struct Fd(OwnedFd);

impl Fd {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// A request whose argument holds no address but of what is borrowed for the call.
    fn call<T>(&self, request: u32, arg: &mut T) -> Result<(), Errno> {
        call(self.0.as_fd(), request, arg)
    }
}

/// Makes a request.
fn call<T>(fd: BorrowedFd<'_>, request: u32, arg: &mut T) -> Result<(), Errno> {
    // SAFETY: the argument is the structure that the request takes, with its size in its first word. Addresses in it are
    // of buffers that the caller has borrowed for as long as the call takes, with their true lengths; or of memory that
    // vm-memory has mapped for a guest: nobody in this process takes it for memory of its own, and everybody reads and
    // writes it as what may change at any time. Its pages are pinned, so that none that a device reaches is given to
    // anybody else, also where this process unmaps them.
    let returned = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, core::ptr::from_mut(arg)) };
    if returned < 0 {
        let number = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        return Err(Errno::from_raw(number));
    }
    Ok(())
}

/// An address as the kernel takes it. Exposed, since the kernel writes there.
fn address<T>(list: &mut [T]) -> u64 {
    list.as_mut_ptr().expose_provenance() as u64
}

fn map_flags(access: Access) -> u32 {
    let mut flags = spec::MAP_FIXED_IOVA;
    if access.contains(Access::READ) {
        flags |= spec::MAP_READABLE;
    }
    if access.contains(Access::WRITE) {
        flags |= spec::MAP_WRITEABLE;
    }
    flags
}

impl Kernel for Fd {
    fn ioas_alloc(&self) -> Result<u32, Errno> {
        let mut arg = spec::IoasAlloc { size: size_of_arg::<spec::IoasAlloc>(), flags: 0, out_ioas: 0 };
        self.call(spec::IOAS_ALLOC, &mut arg)?;
        Ok(arg.out_ioas)
    }

    fn destroy(&self, id: u32) -> Result<(), Errno> {
        self.call(spec::DESTROY, &mut spec::Destroy { size: size_of_arg::<spec::Destroy>(), id })
    }

    fn limits(&self, ioas: u32) -> Result<Limits, Errno> {
        let mut count = 16;
        loop {
            let mut list = vec![spec::IovaRangeEntry::default(); usize::try_from(count).unwrap_or(0)];
            let mut arg = spec::IoasIovaRanges {
                size: size_of_arg::<spec::IoasIovaRanges>(),
                ioas,
                count,
                reserved: 0,
                ranges: address(&mut list),
                out_alignment: 0,
            };
            match self.call(spec::IOAS_IOVA_RANGES, &mut arg) {
                Ok(()) => {}
                // It did not fit; each round asks for more, so there is an end.
                Err(Errno::EMSGSIZE) if arg.count > count && arg.count <= MAX_RANGES => {
                    count = arg.count;
                    continue;
                }
                Err(errno) => return Err(errno),
            }
            list.truncate(usize::try_from(arg.count).unwrap_or(usize::MAX));
            let range = |r: &spec::IovaRangeEntry| IovaRange::new(Iova(r.start), Iova(r.last));
            let apertures = list.iter().map(range).collect::<Option<Vec<_>>>().ok_or(Errno::EINVAL)?;
            let page_size = arg.out_alignment.max(1 << 12);
            if !page_size.is_power_of_two() || !apertures.is_sorted_by(|a, b| a.last() < b.start()) {
                return Err(Errno::EINVAL);
            }
            return Ok(Limits { apertures, page_size });
        }
    }

    fn map(&self, place: Place, vaddr: u64) -> Result<(), Errno> {
        let Place { ioas, iova, length, access } = place;
        let size = size_of_arg::<spec::IoasMap>();
        let flags = map_flags(access);
        let mut arg = spec::IoasMap { size, flags, ioas, reserved: 0, vaddr, length, iova };
        self.call(spec::IOAS_MAP, &mut arg)
    }

    fn map_file(&self, place: Place, file: BorrowedFd<'_>, start: u64) -> Result<(), Errno> {
        let Place { ioas, iova, length, access } = place;
        let size = size_of_arg::<spec::IoasMapFile>();
        let flags = map_flags(access);
        let mut arg = spec::IoasMapFile { size, flags, ioas, fd: file.as_raw_fd(), start, length, iova };
        self.call(spec::IOAS_MAP_FILE, &mut arg)
    }

    fn unmap(&self, ioas: u32, iova: u64, length: u64) -> Result<u64, Errno> {
        let mut arg = spec::IoasUnmap { size: size_of_arg::<spec::IoasUnmap>(), ioas, iova, length };
        self.call(spec::IOAS_UNMAP, &mut arg)?;
        Ok(arg.length)
    }

    fn hwpt_alloc(&self, device: u32, ioas: u32, tracks: bool) -> Result<u32, Errno> {
        let flags = if tracks { spec::HWPT_DIRTY_TRACKING } else { 0 };
        let size = size_of_arg::<spec::HwptAlloc>();
        let mut arg = spec::HwptAlloc { size, flags, device, ioas, ..spec::HwptAlloc::default() };
        self.call(spec::HWPT_ALLOC, &mut arg)?;
        Ok(arg.out_hwpt)
    }

    fn can_track(&self, device: u32) -> Result<bool, Errno> {
        let size = size_of_arg::<spec::GetHwInfo>();
        let mut arg = spec::GetHwInfo { size, device, ..spec::GetHwInfo::default() };
        match self.call(spec::GET_HW_INFO, &mut arg) {
            Ok(()) => Ok(arg.out_capabilities & spec::CAP_DIRTY_TRACKING != 0),
            // Before Linux 6.7 there was nothing to ask.
            Err(Errno::ENOTTY | Errno::EOPNOTSUPP) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    fn track(&self, hwpt: u32, on: bool) -> Result<(), Errno> {
        let flags = if on { spec::DIRTY_TRACKING_ENABLE } else { 0 };
        let size = size_of_arg::<spec::SetDirtyTracking>();
        self.call(
            spec::HWPT_SET_DIRTY_TRACKING,
            &mut spec::SetDirtyTracking { size, flags, hwpt, reserved: 0 },
        )
    }

    fn dirty(&self, hwpt: u32, iova: u64, length: u64, bitmap: &mut Bitmap) -> Result<(), Errno> {
        let bits = (bitmap.words.len() as u64).saturating_mul(64);
        if length / bitmap.pgsize > bits {
            return Err(Errno::EINVAL);
        }
        let mut arg = spec::GetDirtyBitmap {
            size: size_of_arg::<spec::GetDirtyBitmap>(),
            hwpt,
            flags: 0,
            reserved: 0,
            iova,
            length,
            page_size: bitmap.pgsize,
            data: address(&mut bitmap.words),
        };
        self.call(spec::HWPT_GET_DIRTY_BITMAP, &mut arg)
    }
}

/// A device by its file below `/dev/vfio/devices`, bound to an iommufd. Closing it, and every duplicate of its
/// descriptor, unbinds it.
#[derive(Debug)]
pub struct VfioDevice {
    fd: OwnedFd,
    id: u32,
    group: Option<u32>,
}

impl VfioDevice {
    pub(crate) fn bind_to(fd: OwnedFd, iommufd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let argsz = size_of_arg::<spec::DeviceBind>();
        let mut arg = spec::DeviceBind { argsz, flags: 0, iommufd: iommufd.as_raw_fd(), out_device: 0 };
        call(fd.as_fd(), spec::DEVICE_BIND_IOMMUFD, &mut arg)?;
        Ok(Self { fd, id: arg.out_device, group: None })
    }

    /// The same, one of several devices that the host can only move together: the number of their IOMMU group.
    #[must_use]
    pub fn in_group(self, group: u32) -> Self {
        Self { group: Some(group), ..self }
    }
}

impl AsFd for VfioDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Device for VfioDevice {
    fn id(&self) -> u32 {
        self.id
    }

    fn attach(&mut self, table: u32) -> Result<(), Errno> {
        let argsz = size_of_arg::<spec::DeviceAttach>();
        let mut arg = spec::DeviceAttach { argsz, flags: 0, table };
        call(self.fd.as_fd(), spec::DEVICE_ATTACH_IOMMUFD_PT, &mut arg)
    }

    fn detach(&mut self) -> Result<(), Errno> {
        let mut arg = [size_of_arg::<[u32; 2]>(), 0];
        call(self.fd.as_fd(), spec::DEVICE_DETACH_IOMMUFD_PT, &mut arg)
    }

    fn group(&self) -> Option<u32> {
        self.group
    }
}
