//! A PCI device driven from user space: container, group, device, and what it may reach.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_TYPE1v2_IOMMU,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_region_info,
};

/// Requests of <linux/vfio.h>: `_IO(';', 100 + n)`.
const fn request(number: u64) -> u64 {
    0x3b64 + number
}

const SET_IOMMU: u64 = request(2);
const GROUP_SET_CONTAINER: u64 = request(4);
const GROUP_GET_DEVICE_FD: u64 = request(6);
const DEVICE_GET_REGION_INFO: u64 = request(8);
const MAP_DMA: u64 = request(13);
const UNMAP_DMA: u64 = request(14);

/// What each argument begins with.
fn bytes_of<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("a structure of a few words")
}

/// What a device may do with what is mapped for it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Access {
    Read,
    Both,
}

/// A device and the address space that it sees.
pub(crate) struct Device {
    file: File,
    /// None where the device is an iommufd's.
    container: Option<File>,
    /// Open as long as the device is.
    _group: Option<File>,
}

impl Device {
    /// Takes the device at a PCI address, which is bound to vfio-pci, into an address space of its own.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub(crate) fn open(bdf: &str, group: &str) -> io::Result<Device> {
        Device::open_as(bdf, group, VFIO_TYPE1v2_IOMMU)
    }

    /// The same, with an IOMMU of another type.
    ///
    /// # Errors
    ///
    /// As [`Device::open`].
    pub(crate) fn open_as(bdf: &str, group: &str, iommu: u32) -> io::Result<Device> {
        let open = |path: &str| OpenOptions::new().read(true).write(true).open(path);
        let container = open("/dev/vfio/vfio")?;
        let group = open(&format!("/dev/vfio/{group}"))?;
        let descriptor = container.as_raw_fd();
        // SAFETY: the argument is a descriptor that is open, behind a pointer that is valid during the call.
        named("SET_CONTAINER", unsafe {
            libc::ioctl(group.as_raw_fd(), GROUP_SET_CONTAINER, &raw const descriptor)
        })?;
        // SAFETY: the argument is a number.
        named("SET_IOMMU", unsafe { libc::ioctl(container.as_raw_fd(), SET_IOMMU, u64::from(iommu)) })?;
        let name = std::ffi::CString::new(bdf)?;
        // SAFETY: the argument is a string that ends with a zero and outlives the call.
        let file = named("GET_DEVICE_FD", unsafe {
            libc::ioctl(group.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr())
        })?;
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        let file = unsafe { File::from_raw_fd(file) };
        Ok(Device { file, container: Some(container), _group: Some(group) })
    }

    /// Another descriptor of the container.
    ///
    /// # Errors
    ///
    /// If there is none left.
    pub(crate) fn container(&self) -> io::Result<OwnedFd> {
        Ok(self.address_space()?.try_clone()?.into())
    }

    fn address_space(&self) -> io::Result<&File> {
        self.container.as_ref().ok_or_else(|| io::Error::other("the device has no container"))
    }

    /// A device by its own file.
    pub(crate) fn of_file(file: OwnedFd) -> Device {
        Device { file: file.into(), container: None, _group: None }
    }

    /// Another descriptor of the device.
    ///
    /// # Errors
    ///
    /// If there is none left.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// Lets the device reach memory of this program's under another address.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub(crate) fn map(&self, iova: u64, address: u64, size: u64, access: Access) -> io::Result<()> {
        let flags = match access {
            Access::Read => VFIO_DMA_MAP_FLAG_READ,
            Access::Both => VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        };
        let map = vfio_iommu_type1_dma_map {
            argsz: bytes_of::<vfio_iommu_type1_dma_map>(),
            flags,
            vaddr: address,
            iova,
            size,
        };
        // SAFETY: the argument is what this request takes, valid during the call; the memory stays where it is until
        // it is unmapped or the container goes, which is with this device.
        named("MAP_DMA", unsafe { libc::ioctl(self.address_space()?.as_raw_fd(), MAP_DMA, &raw const map) })?;
        Ok(())
    }

    /// Takes the memory at an address away from the device.
    ///
    /// # Errors
    ///
    /// If the kernel refuses, or something else was there.
    pub(crate) fn unmap(&self, iova: u64, size: u64) -> io::Result<()> {
        let mut unmap = vfio_iommu_type1_dma_unmap {
            argsz: bytes_of::<vfio_iommu_type1_dma_unmap>(),
            flags: 0,
            iova,
            size,
            ..Default::default()
        };
        // SAFETY: the argument is what this request takes, valid during the call.
        named("UNMAP_DMA", unsafe {
            libc::ioctl(self.address_space()?.as_raw_fd(), UNMAP_DMA, &raw mut unmap)
        })?;
        if unmap.size != size {
            return Err(io::Error::other(format!("{} bytes were unmapped, not {size}", unmap.size)));
        }
        Ok(())
    }

    /// Where a region (a BAR by its number, or configuration space) begins in the device's file.
    ///
    /// # Errors
    ///
    /// If there is no such region.
    fn region(&self, index: u32) -> io::Result<u64> {
        let mut info =
            vfio_region_info { argsz: bytes_of::<vfio_region_info>(), index, ..Default::default() };
        // SAFETY: the argument is what this request takes, valid during the call.
        named("GET_REGION_INFO", unsafe {
            libc::ioctl(self.file.as_raw_fd(), DEVICE_GET_REGION_INFO, &raw mut info)
        })?;
        Ok(info.offset)
    }

    /// Reads from a BAR.
    ///
    /// # Errors
    ///
    /// If the device does not answer.
    pub(crate) fn read<const N: usize>(&self, bar: u32, offset: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, self.region(bar)? + offset)?;
        Ok(bytes)
    }

    /// Writes to a BAR.
    ///
    /// # Errors
    ///
    /// If the device does not take it.
    pub(crate) fn write(&self, bar: u32, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.region(bar)? + offset)
    }

    /// Reads configuration space.
    ///
    /// # Errors
    ///
    /// As [`Device::read`].
    pub(crate) fn config<const N: usize>(&self, offset: u64) -> io::Result<[u8; N]> {
        self.read(VFIO_PCI_CONFIG_REGION_INDEX, offset)
    }

    /// Writes configuration space.
    ///
    /// # Errors
    ///
    /// As [`Device::write`].
    pub(crate) fn write_config(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write(VFIO_PCI_CONFIG_REGION_INDEX, offset, bytes)
    }
}

fn named(request: &str, returned: i32) -> io::Result<i32> {
    if returned < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(error.kind(), format!("{request}: {error}")));
    }
    Ok(returned)
}
