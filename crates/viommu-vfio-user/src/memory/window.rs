//! One window of guest memory: a file of the client's, mapped here.

use std::fs::File;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use rustix::fs::{FileType, SealFlags, fcntl_get_seals, fstat, fstatfs};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Result as MemoryResult;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion, VolatileSlice,
};

/// Bytes: what windows are made of.
pub const PAGE: u64 = 4096;

/// The file system of huge pages, also those of memfd_create (linux/magic.h).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Why a window cannot be had. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WindowError {
    /// It is empty, not made of whole pages, or passes 2^64-1.
    #[error("not whole pages within 64 bits")]
    Unaligned,
    /// Flags that are not defined, or that ask for a descriptor where there is none.
    #[error("flags {0:#x} make no sense")]
    Flags(u32),
    /// It meets a window that is there.
    #[error("there is a window already")]
    Overlap,
    /// There are as many windows as there may be.
    #[error("more than {0} windows")]
    TooMany(usize),
    /// They lie in as many files as they may.
    #[error("memory of more than {0} files")]
    TooManyFiles(usize),
    /// They have as many bytes as they may.
    #[error("more than {0} bytes of memory")]
    TooMuch(u64),
    /// The descriptor is not that of a file in memory.
    #[error("the descriptor is not memory")]
    NotMemory,
    /// The file could shrink under our hands, and an access would kill this process.
    #[error("the memory is not sealed against shrinking")]
    Unsealed,
    /// There may be no huge page when an access wants one, and that would kill this process.
    #[error("the memory is made of huge pages, which can run out")]
    Huge,
    /// The window is not within the file.
    #[error("the window ends behind the file's end")]
    BehindEnd,
    /// No window is exactly there.
    #[error("there is no such window")]
    Unknown,
    /// The kernel refused to look at the file.
    #[error("the descriptor: {0}")]
    Descriptor(#[from] rustix::io::Errno),
    /// The kernel refused to map it.
    #[error("cannot be mapped: {0}")]
    Map(#[from] MmapRegionError),
}

/// Memory of a window, as long as anybody holds it: it is unmapped from this process with the last reference.
#[derive(Debug)]
pub struct Region {
    region: GuestRegionMmap<()>,
    /// Declared last: told when the memory has been unmapped.
    _gone: Gone,
}

/// Says that a region's memory is unmapped.
#[derive(Clone, Debug, Default)]
pub(crate) struct Latch(Arc<(Mutex<bool>, Condvar)>);

#[derive(Debug)]
struct Gone(Latch);

impl Drop for Gone {
    fn drop(&mut self) {
        let (gone, wake) = &*self.0.0;
        *gone.lock().unwrap_or_else(PoisonError::into_inner) = true;
        wake.notify_all();
    }
}

impl Latch {
    /// Returns when nobody holds the region any more and its memory is unmapped.
    pub(crate) fn wait(&self) {
        let (gone, wake) = &*self.0;
        let mut gone = gone.lock().unwrap_or_else(PoisonError::into_inner);
        while !*gone {
            gone = wake.wait(gone).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What no two files share: device and inode.
pub(super) fn identity(file: &File) -> Result<(u64, u64), WindowError> {
    let stat = fstat(file)?;
    Ok((stat.st_dev, stat.st_ino))
}

impl Region {
    /// Maps `size` bytes of `file` from `offset` on, to be found at `address`.
    pub(super) fn map(
        file: Arc<File>,
        offset: u64,
        address: u64,
        size: u64,
        allow_unsealed: bool,
    ) -> Result<(Self, Latch), WindowError> {
        let stat = fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(WindowError::NotMemory);
        }
        if !allow_unsealed {
            // Only files in memory have seals.
            let seals = fcntl_get_seals(&file).map_err(|_| WindowError::Unsealed)?;
            if !seals.contains(SealFlags::SHRINK) {
                return Err(WindowError::Unsealed);
            }
            if u64::try_from(fstatfs(&file)?.f_type) == Ok(HUGETLBFS_MAGIC) {
                return Err(WindowError::Huge);
            }
        }
        let end = offset.checked_add(size).ok_or(WindowError::BehindEnd)?;
        if u64::try_from(stat.st_size).ok().is_none_or(|bytes| end > bytes) {
            return Err(WindowError::BehindEnd);
        }
        let bytes = usize::try_from(size).map_err(|_| WindowError::BehindEnd)?;
        let mapping = MmapRegion::from_file(FileOffset::from_arc(file, offset), bytes)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(address)).ok_or(WindowError::Unaligned)?;
        let latch = Latch::default();
        Ok((Self { region, _gone: Gone(latch.clone()) }, latch))
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> u64 {
        self.region.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.region.start_addr()
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_host_address(&self, addr: MemoryRegionAddress) -> MemoryResult<*mut u8> {
        self.region.get_host_address(addr)
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.region.file_offset()
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> MemoryResult<VolatileSlice<'_, BS<'_, ()>>> {
        self.region.get_slice(offset, count)
    }
}

impl GuestMemoryRegionBytes for Region {}
