//! Guest memory that remembers the region of its last access: rings and requests lie close together, and a search
//! for each of the eight accesses of a request costs more than the request.

use core::cell::Cell;
use core::iter::FusedIterator;

use vm_memory::bitmap::{BS, BitmapSlice};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryResult,
    MemoryRegionAddress, Permissions, VolatileSlice,
};

type BitmapOf<M> = <<M as GuestMemoryBackend>::R as GuestMemoryRegion>::B;

/// The same memory, for the length of one batch.
pub(crate) struct Near<'m, M: GuestMemoryBackend> {
    memory: &'m M,
    last: Cell<Option<&'m M::R>>,
}

impl<'m, M: GuestMemoryBackend> Near<'m, M> {
    pub(crate) fn new(memory: &'m M) -> Self {
        Self { memory, last: Cell::new(None) }
    }

    /// The region of `addr` and the offset there, if `count` bytes lie in it.
    #[inline]
    fn region(&self, addr: GuestAddress, count: usize) -> Option<(&'m M::R, MemoryRegionAddress)> {
        let inside = |region: &'m M::R| {
            let offset = addr.0.checked_sub(region.start_addr().0)?;
            let end = offset.checked_add(u64::try_from(count).ok()?)?;
            (end <= region.len()).then_some((region, MemoryRegionAddress(offset)))
        };
        self.last.get().and_then(inside).or_else(|| {
            let region = self.memory.find_region(addr)?;
            self.last.set(Some(region));
            inside(region)
        })
    }
}

impl<M: GuestMemoryBackend> Near<'_, M> {
    /// Reads all of `bytes`, or fails.
    #[inline]
    pub(crate) fn read(&self, bytes: &mut [u8], addr: GuestAddress) -> GuestMemoryResult<()> {
        match self.slice(addr, bytes.len()) {
            Some(slice) => {
                slice.copy_to(bytes);
                Ok(())
            }
            None => self.memory.read_slice(bytes, addr),
        }
    }

    /// Writes all of `bytes`, or fails.
    #[inline]
    pub(crate) fn write(&self, bytes: &[u8], addr: GuestAddress) -> GuestMemoryResult<()> {
        match self.slice(addr, bytes.len()) {
            Some(slice) => {
                slice.copy_from(bytes);
                Ok(())
            }
            None => self.memory.write_slice(bytes, addr),
        }
    }

    /// Whether all of it is memory.
    #[inline]
    pub(crate) fn is_there(&self, addr: GuestAddress, count: usize) -> bool {
        self.region(addr, count).is_some() || GuestMemoryBackend::check_range(self.memory, addr, count)
    }

    #[inline]
    fn slice(&self, addr: GuestAddress, count: usize) -> Option<VolatileSlice<'_, BS<'_, BitmapOf<M>>>> {
        let (region, offset) = self.region(addr, count)?;
        region.get_slice(offset, count).ok()
    }
}

impl<M: GuestMemoryBackend> GuestMemory for Near<'_, M> {
    type PhysicalMemory = M;
    type Bitmap = BitmapOf<M>;

    #[inline]
    fn check_range(&self, addr: GuestAddress, count: usize, _: Permissions) -> bool {
        self.is_there(addr, count)
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        Ok(match self.region(addr, count) {
            Some((region, offset)) if count > 0 => Slices::One(Some(region.get_slice(offset, count))),
            _ => Slices::Many(GuestMemoryBackend::get_slices(self.memory, addr, count)),
        })
    }

    fn physical_memory(&self) -> Option<&M> {
        Some(self.memory)
    }
}

/// One slice where the access lies in one region; whatever the memory says elsewhere.
enum Slices<'a, B: BitmapSlice, I> {
    One(Option<GuestMemoryResult<VolatileSlice<'a, B>>>),
    Many(I),
}

impl<'a, B, I> Iterator for Slices<'a, B, I>
where
    B: BitmapSlice,
    I: Iterator<Item = GuestMemoryResult<VolatileSlice<'a, B>>>,
{
    type Item = GuestMemoryResult<VolatileSlice<'a, B>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::One(slice) => slice.take(),
            Self::Many(slices) => slices.next(),
        }
    }
}

impl<'a, B, I> FusedIterator for Slices<'a, B, I>
where
    B: BitmapSlice,
    I: FusedIterator<Item = GuestMemoryResult<VolatileSlice<'a, B>>>,
{
}

impl<'a, B, I> GuestMemorySliceIterator<'a, B> for Slices<'a, B, I>
where
    B: BitmapSlice,
    I: GuestMemorySliceIterator<'a, B>,
{
    /// As the one provided, which looks ahead: results are large, and this is all that most accesses do.
    #[inline]
    fn stop_on_error(self) -> GuestMemoryResult<impl Iterator<Item = VolatileSlice<'a, B>>> {
        Ok(match self {
            Self::One(slice) => Readable::One(slice.transpose()?),
            Self::Many(slices) => Readable::Many(slices.stop_on_error()?),
        })
    }
}

/// [`Slices`] up to the first error.
enum Readable<'a, B: BitmapSlice, I> {
    One(Option<VolatileSlice<'a, B>>),
    Many(I),
}

impl<'a, B: BitmapSlice, I: Iterator<Item = VolatileSlice<'a, B>>> Iterator for Readable<'a, B, I> {
    type Item = VolatileSlice<'a, B>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::One(slice) => slice.take(),
            Self::Many(slices) => slices.next(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    #[test]
    fn access_across_regions_and_outside_is_as_in_the_memory_itself() {
        let ranges =
            [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000), (GuestAddress(0x4000), 0x1000)];
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
        let near = Near::new(&memory);
        for start in (0..0x6000_u64).step_by(7) {
            for count in [0, 1, 8, 100, 0x1800] {
                let at = GuestAddress(start);
                let mut bytes = vec![0; count];
                assert_eq!(
                    near.read_slice(&mut bytes, at).is_ok(),
                    memory.read_slice(&mut bytes, at).is_ok(),
                    "{count} bytes at {start:#x}"
                );
                assert_eq!(
                    GuestMemory::check_range(&near, at, count, Permissions::Write),
                    GuestMemory::check_range(&memory, at, count, Permissions::Write),
                    "{count} bytes at {start:#x}"
                );
            }
        }
        near.write_obj(0x1122_3344_u32, GuestAddress(0xffe)).unwrap();
        assert_eq!(memory.read_obj::<u32>(GuestAddress(0xffe)).unwrap(), 0x1122_3344);
        assert!(near.read_obj::<u64>(GuestAddress(u64::MAX - 3)).is_err());
    }
}
