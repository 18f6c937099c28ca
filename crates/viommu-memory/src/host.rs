//! Between the embedder's memory and viommu: backing from regions, host addresses for mirrors.

use viommu::{Access, Extent, Gpa, GpaRange, Iova, IovaRange, Mapping, Medium};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const PAGE: u64 = 4096;

/// A region of memory that viommu cannot have as backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory region {0} is not made of 4 KiB pages")]
pub struct UnalignedRegion(pub GpaRange);

/// The regions of `memory` as backing, ascending: for [`Builder::backing`](viommu::Builder::backing) or
/// [`Iommu::add_backing`](viommu::Iommu::add_backing). All of them are RAM; an embedder with ROM among them says so
/// itself.
///
/// # Errors
/// The first region that does not start and end on a page.
pub fn ram_extents<M: GuestMemoryBackend>(memory: &M) -> Result<Vec<Extent>, UnalignedRegion> {
    let ranges = memory.iter().filter_map(|r| GpaRange::from_len(Gpa(r.start_addr().0), r.len()));
    let extent = |range: GpaRange| match range.is_aligned(PAGE) {
        true => Ok(Extent { range, medium: Medium::Ram }),
        false => Err(UnalignedRegion(range)),
    };
    ranges.map(extent).collect()
}

/// A part of a mapping as a host's IOMMU maps it: linear in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPiece {
    /// Where the device sees it.
    pub iova: IovaRange,
    /// Where its first byte lies in this process. Valid as long as the region of memory is.
    pub address: *mut u8,
    /// Whether the device may write there.
    pub writable: bool,
}

/// A mapping that this process has no memory for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// No region of memory holds the address.
    #[error("no memory at {0}")]
    NoMemory(Gpa),
    /// The region that holds the address is not mapped into this process as one piece.
    #[error("no host address for {gpa}: {source}")]
    NoAddress {
        /// The first address of the region that the mapping meets.
        gpa: Gpa,
        /// What vm-memory says.
        source: vm_memory::GuestMemoryError,
    },
}

/// What a mirror in this process maps for `mapping`: one piece for each region of `memory` that it touches, ascending.
/// The access is the mapping's, which is what a mirror is told: the backing's restrictions are in it already.
///
/// # Errors
/// The first address without memory, for device registers too; nothing is to be mapped then.
pub fn host_pieces<M: GuestMemoryBackend>(
    memory: &M,
    mapping: &Mapping,
) -> Result<Vec<HostPiece>, HostError> {
    let mut pieces = Vec::new();
    let mut start = mapping.range.start();
    loop {
        let piece = host_piece(memory, mapping, start)?;
        pieces.push(piece);
        match piece.iova.next() {
            Some(next) if next <= mapping.range.last() => start = next,
            _ => return Ok(pieces),
        }
    }
}

/// The piece of `mapping` that begins at `start`, as far as the region goes.
pub(crate) fn host_piece<M: GuestMemoryBackend>(
    memory: &M,
    mapping: &Mapping,
    start: Iova,
) -> Result<HostPiece, HostError> {
    let gpa = mapping.translate(start);
    let region = memory.find_region(GuestAddress(gpa.0)).ok_or(HostError::NoMemory(gpa))?;
    let offset = region.to_region_addr(GuestAddress(gpa.0)).ok_or(HostError::NoMemory(gpa))?;
    let address = region.get_host_address(offset).map_err(|source| HostError::NoAddress { gpa, source })?;
    let room = region.last_addr().0.saturating_sub(gpa.0);
    let last = Iova(start.0.saturating_add(room)).min(mapping.range.last());
    let iova = IovaRange::new(start, last).ok_or(HostError::NoMemory(gpa))?;
    Ok(HostPiece { iova, address, writable: mapping.access.contains(Access::WRITE) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryMmap};

    fn memory(ranges: &[(u64, usize)]) -> GuestMemoryMmap<()> {
        let ranges: Vec<_> = ranges.iter().map(|(start, bytes)| (GuestAddress(*start), *bytes)).collect();
        GuestMemoryMmap::from_ranges(&ranges).unwrap()
    }

    fn iova(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(start), Iova(last)).unwrap()
    }

    #[test]
    fn mapping_over_two_regions_is_two_pieces_at_their_host_addresses() {
        let memory = memory(&[(0, 0x4000), (0x4000, 0x4000)]);
        memory.write_obj(7u32, GuestAddress(0x4000)).unwrap();
        let mapping = Mapping::new(Iova(0x10_0000), 0x4000, Gpa(0x2000), Access::READ).unwrap();
        let pieces = host_pieces(&memory, &mapping).unwrap();
        assert_eq!(pieces[0].iova, iova(0x10_0000, 0x10_1fff));
        assert_eq!(pieces[1].iova, iova(0x10_2000, 0x10_3fff));
        assert_eq!(pieces[0].address, memory.get_host_address(GuestAddress(0x2000)).unwrap());
        assert_eq!(pieces[1].address, memory.get_host_address(GuestAddress(0x4000)).unwrap());
        assert_eq!(pieces.len(), 2);
        assert!(pieces.iter().all(|piece| !piece.writable));
    }

    #[test]
    fn mapping_of_the_last_page_is_one_writable_piece() {
        let memory = memory(&[(0, 0x4000)]);
        let mapping = Mapping::over(iova(u64::MAX - 0xfff, u64::MAX), Gpa(0x3000), Access::RW).unwrap();
        let pieces = host_pieces(&memory, &mapping).unwrap();
        assert_eq!(pieces.len(), 1);
        assert_eq!((pieces[0].iova, pieces[0].writable), (mapping.range, true));
    }

    #[test]
    fn mapping_into_a_hole_names_the_first_address_without_memory() {
        let memory = memory(&[(0, 0x2000), (0x4000, 0x1000)]);
        let mapping = Mapping::new(Iova(0), 0x5000, Gpa(0), Access::RW).unwrap();
        assert!(matches!(host_pieces(&memory, &mapping), Err(HostError::NoMemory(Gpa(0x2000)))));
    }

    #[test]
    fn regions_become_ram_and_an_unaligned_one_is_refused() {
        let ram = |start, last| Extent {
            range: GpaRange::new(Gpa(start), Gpa(last)).unwrap(),
            medium: Medium::Ram,
        };
        let extents = ram_extents(&memory(&[(0, 0x2000), (0x10_0000, 0x1000)])).unwrap();
        assert_eq!(extents, [ram(0, 0x1fff), ram(0x10_0000, 0x10_0fff)]);
        let odd = ram_extents(&memory(&[(0, 0x2000), (0x10_0000, 0x1800)])).unwrap_err();
        assert_eq!(odd, UnalignedRegion(ram(0x10_0000, 0x10_17ff).range));
    }
}
