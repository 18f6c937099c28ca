//! The bare calls of a container, whatever is asked: words as <linux/vfio.h> lays them out, beside what viommu makes of it.

use std::os::fd::{AsRawFd, OwnedFd};

use viommu_vfio::{
    Errno,
    software::{Bitmap, MapDma, UnmapDma},
};

const MAP_DMA: u64 = 0x3b71;
const UNMAP_DMA: u64 = 0x3b72;
const DIRTY_PAGES: u64 = 0x3b75;

/// Flags of `DIRTY_PAGES`.
pub(super) const START: u32 = 1;
pub(super) const STOP: u32 = 2;
const GET_BITMAP: u32 = 4;

/// A container.
pub(super) struct Raw(pub(super) OwnedFd);

/// The first word of each argument.
fn head(argsz: u64, flags: u32) -> u64 {
    argsz | u64::from(flags) << 32
}

impl Raw {
    /// # Safety
    ///
    /// The argument's pointers, if it has any, are good for the call, and what is mapped by it is memory that devices
    /// may write to.
    unsafe fn call(&self, request: u64, words: &mut [u64]) -> Result<(), Errno> {
        // SAFETY: the words are what the request reads and writes; the rest is the caller's word.
        let returned = unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, words.as_mut_ptr()) };
        if returned < 0 {
            let number = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
            return Err(Errno::from_raw(number));
        }
        Ok(())
    }

    /// `MAP_DMA`.
    ///
    /// # Safety
    ///
    /// Of what lies at the host's address, there is nothing that a device must not write to.
    pub(super) unsafe fn map(&self, map: &MapDma) -> Result<(), Errno> {
        let mut words = [head(32, map.flags.bits()), map.vaddr, map.iova, map.size];
        // SAFETY: as the caller says; there is no pointer for the kernel to write to.
        unsafe { self.call(MAP_DMA, &mut words) }
    }

    /// `UNMAP_DMA`: the bytes removed.
    pub(super) fn unmap(&self, unmap: &UnmapDma, bitmap: Option<&mut Bitmap>) -> Result<u64, Errno> {
        let (size, bitmap) = bitmap.map_or((24, [0; 3]), |bitmap| (48, words_of(bitmap)));
        let [pages, bytes, data] = bitmap;
        let mut words = [head(size, unmap.flags.bits()), unmap.iova, unmap.size, pages, bytes, data];
        // SAFETY: the bitmap is borrowed for the call, and has as many bytes as is said.
        unsafe { self.call(UNMAP_DMA, &mut words) }?;
        Ok(words[2])
    }

    /// `DIRTY_PAGES` with one of the flags that take no bitmap.
    pub(super) fn track(&self, flag: u32) -> Result<(), Errno> {
        // SAFETY: there is no pointer in it.
        unsafe { self.call(DIRTY_PAGES, &mut [head(8, flag)]) }
    }

    /// `DIRTY_PAGES` with GET_BITMAP.
    pub(super) fn dirty(&self, iova: u64, size: u64, bitmap: &mut Bitmap) -> Result<(), Errno> {
        let [pages, bytes, data] = words_of(bitmap);
        let mut words = [head(48, GET_BITMAP), iova, size, pages, bytes, data];
        // SAFETY: the bitmap is borrowed for the call, and has as many bytes as is said.
        unsafe { self.call(DIRTY_PAGES, &mut words) }
    }
}

/// A bitmap as the kernel takes it; the pointer is good as long as the bitmap stays.
fn words_of(bitmap: &mut Bitmap) -> [u64; 3] {
    let data = bitmap.words.as_mut_ptr().expose_provenance() as u64;
    [bitmap.pgsize, bitmap.words.len() as u64 * 8, data]
}
