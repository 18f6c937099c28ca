//! The ioctls of a container. The only unsafe code of this crate.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use libc::{c_int, c_ulong};
use vfio_bindings::bindings::vfio::{
    VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, VFIO_TYPE1v2_IOMMU, VFIO_UNMAP_ALL, vfio_bitmap,
    vfio_iommu_type1_dirty_bitmap_get, vfio_iommu_type1_dma_map,
};

use crate::errno::Errno;
use crate::software::{Bitmap, MapDma, UnmapDma, UnmapFlags};
use crate::type1::info::Info;
use crate::type1::kernel::Kernel;

/// Requests of <linux/vfio.h>: `_IO(';', 100 + n)`, without a size in them.
const fn request(number: u32) -> u32 {
    0x3b64 + number
}

const GET_API_VERSION: u32 = request(0);
const CHECK_EXTENSION: u32 = request(1);
const SET_IOMMU: u32 = request(2);
const GROUP_SET_CONTAINER: u32 = request(4);
const GET_INFO: u32 = request(12);
const MAP_DMA: u32 = request(13);
const UNMAP_DMA: u32 = request(14);
const DIRTY_PAGES: u32 = request(17);

/// The largest answer of `GET_INFO` that is read, in words of 8 bytes: thousands of IOVA ranges.
const MAX_INFO_WORDS: usize = 1 << 13;

/// `struct vfio_iommu_type1_dma_unmap` with the bitmap that follows it for GET_DIRTY_BITMAP.
#[repr(C)]
struct DmaUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
    bitmap: vfio_bitmap,
}

/// `struct vfio_iommu_type1_dirty_bitmap` with what follows it for GET_BITMAP.
#[repr(C)]
struct DirtyPages {
    argsz: u32,
    flags: u32,
    get: vfio_iommu_type1_dirty_bitmap_get,
}

const _: () = {
    assert!(core::mem::offset_of!(DmaUnmap, bitmap) == 24 && size_of::<DmaUnmap>() == 48);
    assert!(core::mem::offset_of!(DirtyPages, get) == 8 && size_of::<DirtyPages>() == 48);
};

/// What an argument begins with.
const fn argsz<T>() -> u32 {
    let size = size_of::<T>();
    assert!(size < 4096);
    #[expect(clippy::cast_possible_truncation, reason = "just looked at")]
    let size = size as u32;
    size
}

/// A container by its descriptor.
#[derive(Debug)]
pub(crate) struct Fd(OwnedFd);

impl Fd {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The version of the interface; 0 is the one that there is.
    pub(crate) fn api_version(&self) -> Result<c_int, Errno> {
        self.by_value(GET_API_VERSION, 0)
    }

    /// Whether the container has an IOMMU of type1 v2. Its driver knows both types; v1 alone does not track pages.
    pub(crate) fn is_type1_v2(&self) -> Result<bool, Errno> {
        if self.by_value(CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU.into())? <= 0 {
            return Ok(false);
        }
        let mut nothing = [argsz::<[u32; 2]>(), 0];
        // SAFETY: the request takes a pointer to these two words; without a flag it does nothing with them.
        let outcome =
            checked(unsafe { libc::ioctl(self.0.as_raw_fd(), DIRTY_PAGES as _, nothing.as_mut_ptr()) });
        Ok(outcome != Err(Errno::EACCES))
    }

    /// An empty container.
    pub(crate) fn create() -> Result<Self, Errno> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/vfio/vfio");
        let errno = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(0));
        Ok(Self(file.map_err(errno)?.into()))
    }

    /// Puts a group in.
    pub(crate) fn add(&self, group: BorrowedFd<'_>) -> Result<(), Errno> {
        let container = self.0.as_raw_fd();
        // SAFETY: the argument points to a descriptor that is open; the request reads it and nothing else.
        checked(unsafe { libc::ioctl(group.as_raw_fd(), GROUP_SET_CONTAINER as _, &raw const container) })?;
        Ok(())
    }

    /// Gives the container, which has a group, its IOMMU.
    pub(crate) fn set_type1_v2(&self) -> Result<(), Errno> {
        self.by_value(SET_IOMMU, VFIO_TYPE1v2_IOMMU.into()).map(drop)
    }

    pub(crate) fn into_inner(self) -> OwnedFd {
        self.0
    }

    /// A request whose argument is a number.
    fn by_value(&self, request: u32, value: c_ulong) -> Result<c_int, Errno> {
        // SAFETY: the argument is a number, and the requests given here do not take it for a pointer.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, value) })
    }
}

fn checked(returned: c_int) -> Result<c_int, Errno> {
    if returned < 0 {
        let number = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        return Err(Errno::from_raw(number));
    }
    Ok(returned)
}

/// As the kernel takes a bitmap. The pointer is good as long as `bitmap` is neither moved from nor grown.
fn raw(bitmap: &mut Bitmap) -> vfio_bitmap {
    let size = (bitmap.words.len() as u64).saturating_mul(8);
    vfio_bitmap { pgsize: bitmap.pgsize, size, data: bitmap.words.as_mut_ptr() }
}

impl Kernel for Fd {
    fn info(&mut self) -> Result<Info, Errno> {
        let mut words: Vec<u64> = vec![0; 64];
        loop {
            let bytes = words.len() * 8;
            let size = u32::try_from(bytes).map_err(|_| Errno::EINVAL)?;
            let mut head = [0; 8];
            head[..4].copy_from_slice(&size.to_ne_bytes());
            words[0] = u64::from_ne_bytes(head);
            // SAFETY: the argument points to as many bytes as its first word says, to be written to.
            checked(unsafe { libc::ioctl(self.0.as_raw_fd(), GET_INFO as _, words.as_mut_ptr()) })?;
            let answer: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let needed = answer.first_chunk().map_or(0, |size| u32::from_ne_bytes(*size));
            let needed = usize::try_from(needed).map_err(|_| Errno::EINVAL)?;
            if needed <= bytes {
                let unmap_all =
                    self.by_value(CHECK_EXTENSION, VFIO_UNMAP_ALL.into()).is_ok_and(|has| has > 0);
                return Info::parse(&answer, unmap_all).ok_or(Errno::EINVAL);
            }
            // It did not fit; each round asks for more, so there is an end.
            let more = needed.div_ceil(8);
            if more > MAX_INFO_WORDS {
                return Err(Errno::EINVAL);
            }
            words = vec![0; more];
        }
    }

    fn map(&mut self, map: &MapDma) -> Result<(), Errno> {
        let MapDma { flags, vaddr, iova, size } = *map;
        let argsz = argsz::<vfio_iommu_type1_dma_map>();
        let arg = vfio_iommu_type1_dma_map { argsz, flags: flags.bits(), vaddr, iova, size };
        // SAFETY: the argument is what this request reads. What it lets a device reach is memory that vm-memory has
        // mapped for a guest: nobody in this process takes it for memory of its own, and everybody reads and writes it
        // as what may change at any time. Its pages are pinned, so that none that the device reaches is given to
        // anybody else, also where this process unmaps them.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), MAP_DMA as _, &raw const arg) })?;
        Ok(())
    }

    fn unmap(&mut self, unmap: &UnmapDma, bitmap: Option<&mut Bitmap>) -> Result<u64, Errno> {
        let UnmapDma { flags, iova, size } = *unmap;
        if flags.contains(UnmapFlags::GET_DIRTY_BITMAP) != bitmap.is_some() {
            return Err(Errno::EINVAL);
        }
        let with_bitmap = bitmap.is_some();
        let bitmap = bitmap.map_or_else(vfio_bitmap::default, raw);
        let argsz = if with_bitmap { argsz::<DmaUnmap>() } else { argsz::<[u64; 3]>() };
        let mut arg = DmaUnmap { argsz, flags: flags.bits(), iova, size, bitmap };
        // SAFETY: the argument is what this request reads and writes; its bitmap, looked at with the flag alone, points to
        // as many bytes as it says, which are borrowed for the time of the call.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), UNMAP_DMA as _, &raw mut arg) })?;
        Ok(arg.size)
    }

    fn track(&mut self, on: bool) -> Result<(), Errno> {
        let flags = if on { VFIO_IOMMU_DIRTY_PAGES_FLAG_START } else { VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP };
        let arg = [argsz::<[u32; 2]>(), flags];
        // SAFETY: the argument is what this request reads with these flags.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), DIRTY_PAGES as _, arg.as_ptr()) })?;
        Ok(())
    }

    fn dirty(&mut self, iova: u64, size: u64, bitmap: &mut Bitmap) -> Result<(), Errno> {
        let get = vfio_iommu_type1_dirty_bitmap_get { iova, size, bitmap: raw(bitmap) };
        let flags = VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP;
        let mut arg = DirtyPages { argsz: argsz::<DirtyPages>(), flags, get };
        // SAFETY: the argument is what this request reads; its bitmap points to as many bytes as it says, which are
        // borrowed for the time of the call.
        checked(unsafe { libc::ioctl(self.0.as_raw_fd(), DIRTY_PAGES as _, &raw mut arg) })?;
        Ok(())
    }
}
