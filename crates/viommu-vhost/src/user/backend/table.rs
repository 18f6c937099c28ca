//! The front end's memory table: guest memory, mapped here.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, SealFlags, fcntl_get_seals, fstat};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionCollectionError,
    GuestRegionMmap, MmapRegion,
};
use zerocopy::FromBytes;

use crate::user::spec::{MemoryRegion, MemoryTable};

const PAGE: u64 = 4096;
/// Regions that there may be: as many as descriptors come with a message.
const MAX_REGIONS: usize = 32;

/// Why a memory table cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// Its size does not fit what it says.
    #[error("a memory table of a wrong size")]
    Size,
    /// There is not one descriptor for each region.
    #[error("{regions} regions with {fds} descriptors")]
    Descriptors {
        /// Regions.
        regions: usize,
        /// Descriptors.
        fds: usize,
    },
    /// A region is empty, not made of whole pages, or passes 2^64-1.
    #[error("a region that is not whole pages within 64 bits")]
    Unaligned,
    /// Two regions have an address in common, the guest's or the front end's.
    #[error("regions that overlap")]
    Overlap,
    /// There are as many as there may be.
    #[error("more than {MAX_REGIONS} regions")]
    TooMany,
    /// A region that is to go is not there.
    #[error("no such region")]
    Unknown,
    /// The descriptor is not that of a file in memory.
    #[error("the descriptor is not memory")]
    NotMemory,
    /// The file could shrink under our hands, and an access would kill this process.
    #[error("the memory is not sealed against shrinking")]
    Unsealed,
    /// A region ends behind its file's end.
    #[error("a region ends behind its file's end")]
    BehindEnd,
    /// The system refuses to look at the file.
    #[error("the descriptor: {0}")]
    Descriptor(#[from] rustix::io::Errno),
    /// The system refuses to map it.
    #[error("cannot be mapped: {0}")]
    Map(#[from] MmapRegionError),
    /// vm-memory refuses the regions.
    #[error(transparent)]
    Regions(#[from] GuestRegionCollectionError),
}

/// Guest memory, as the front end knows it. A value: each change makes a new one.
#[derive(Clone, Debug, Default)]
pub(super) struct Table(Vec<Region>);

#[derive(Clone, Debug)]
struct Region {
    said: MemoryRegion,
    memory: Arc<GuestRegionMmap<()>>,
}

impl Table {
    /// What SET_MEM_TABLE says.
    pub(super) fn read(payload: &[u8], fds: Vec<OwnedFd>, allow_unsealed: bool) -> Result<Self, TableError> {
        let (head, rest) = MemoryTable::read_from_prefix(payload).map_err(|_| TableError::Size)?;
        let count = usize::try_from(head.regions.get()).map_err(|_| TableError::Size)?;
        if count > MAX_REGIONS {
            return Err(TableError::TooMany);
        }
        let bytes = count.checked_mul(size_of::<MemoryRegion>()).ok_or(TableError::Size)?;
        let rest = rest.get(..bytes).ok_or(TableError::Size)?;
        if fds.len() != count {
            return Err(TableError::Descriptors { regions: count, fds: fds.len() });
        }
        let mut table = Self::default();
        for (said, fd) in rest.chunks_exact(size_of::<MemoryRegion>()).zip(fds) {
            let said = MemoryRegion::read_from_bytes(said).map_err(|_| TableError::Size)?;
            table.add(said, fd, allow_unsealed)?;
        }
        Ok(table)
    }

    /// What ADD_MEM_REG and REM_MEM_REG say.
    pub(super) fn region_of(payload: &[u8]) -> Result<MemoryRegion, TableError> {
        let region = payload.get(8..).ok_or(TableError::Size)?;
        Ok(MemoryRegion::read_from_prefix(region).map_err(|_| TableError::Size)?.0)
    }

    pub(super) fn add(
        &mut self,
        said: MemoryRegion,
        fd: OwnedFd,
        allow_unsealed: bool,
    ) -> Result<(), TableError> {
        if self.0.len() >= MAX_REGIONS {
            return Err(TableError::TooMany);
        }
        let (guest, size) = (said.guest.get(), said.size.get());
        let (user, offset) = (said.user.get(), said.offset.get());
        let whole = [guest, size, user, offset].iter().all(|number| number % PAGE == 0);
        let end = size
            .checked_sub(1)
            .filter(|rest| [guest, user].iter().all(|start| start.checked_add(*rest).is_some()));
        if !whole || end.is_none() {
            return Err(TableError::Unaligned);
        }
        let meets = |a: u64, other: u64, bytes: u64| {
            a < other.saturating_add(bytes) && other < a.saturating_add(size)
        };
        if self.0.iter().any(|r| {
            let bytes = r.said.size.get();
            meets(guest, r.said.guest.get(), bytes) || meets(user, r.said.user.get(), bytes)
        }) {
            return Err(TableError::Overlap);
        }
        let stat = fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(TableError::NotMemory);
        }
        // Only files in memory have seals.
        if !allow_unsealed && !fcntl_get_seals(&fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
            return Err(TableError::Unsealed);
        }
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        if offset.checked_add(size).is_none_or(|end| end > length) {
            return Err(TableError::BehindEnd);
        }
        let bytes = usize::try_from(size).map_err(|_| TableError::Unaligned)?;
        let region = MmapRegion::from_file(FileOffset::new(File::from(fd), offset), bytes)?;
        let memory = GuestRegionMmap::new(region, GuestAddress(guest)).ok_or(TableError::Unaligned)?;
        self.0.push(Region { said, memory: Arc::new(memory) });
        self.0.sort_by_key(|region| region.said.guest.get());
        Ok(())
    }

    /// Removes the region of these addresses and this size; its file is not compared.
    pub(super) fn remove(&mut self, said: &MemoryRegion) -> Result<(), TableError> {
        let key = |r: &MemoryRegion| (r.guest.get(), r.size.get(), r.user.get());
        let at =
            self.0.iter().position(|region| key(&region.said) == key(said)).ok_or(TableError::Unknown)?;
        self.0.remove(at);
        Ok(())
    }

    pub(super) fn memory(&self) -> Result<GuestMemoryMmap, TableError> {
        // The last region may go too; vm-memory takes a list of none for a mistake.
        if self.0.is_empty() {
            return Ok(GuestMemoryMmap::new());
        }
        Ok(GuestMemoryMmap::from_arc_regions(self.0.iter().map(|region| region.memory.clone()).collect())?)
    }

    /// The guest's ranges: start and bytes.
    pub(super) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().map(|region| (region.said.guest.get(), region.memory.len()))
    }

    /// Where `bytes` bytes from the front end's address `user` on lie, which must be in one region.
    pub(super) fn guest_of(&self, user: u64, bytes: u64) -> Option<u64> {
        self.0.iter().find_map(|Region { said, .. }| {
            let inside = user.checked_sub(said.user.get())?;
            let end = inside.checked_add(bytes)?;
            (end <= said.size.get()).then(|| said.guest.get().checked_add(inside)).flatten()
        })
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
