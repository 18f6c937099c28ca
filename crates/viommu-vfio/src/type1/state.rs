//! What the container holds and how it changes: the calls of the mirror, and of the embedder's handle.

use viommu::subscribe::{OutOfReach, Reach, RefusalKind, Refused, Unmapped};
use viommu::{Access, Ack, Iova, IovaRange, Mapping, Target};
use viommu_memory::HostError;
use viommu_memory::mirror::{Holding, Holdings, Inside, Pieces, Resolve, map_all};

use crate::coarse::Coarse;
use crate::errno::Errno;
use crate::software::{Bitmap, MapDma, UnmapDma, UnmapFlags};
use crate::type1::fence::Action;
use crate::type1::info::Info;
use crate::type1::kernel::Kernel;
use crate::written::{Written, pages_of};

/// The devices have been cut off, and the container is not used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Closed;

/// A container, and what was mapped in it.
pub(crate) struct State {
    pub(crate) kernel: Result<Box<dyn Kernel>, Closed>,
    /// As it was at the start, or when the embedder last had it read; its entries are those left and those held here.
    pub(crate) info: Info,
    pub(crate) out_of_reach: OutOfReach,
    pub(crate) memory: Resolve,
    pub(crate) registers: Option<Resolve>,
    pub(crate) action: Option<Action>,
    pub(crate) held: Holdings,
    pub(crate) tracking: bool,
    /// Dirty pages that were read, and not told since what came behind them failed.
    pub(crate) untold: Written,
}

fn closed() -> Refused {
    Refused::new(RefusalKind::Device, "the container is closed")
}

/// First byte and size; `None` where it is 2^64 bytes, which cannot be said.
fn start_and_size(range: IovaRange) -> Option<(u64, u64)> {
    Some((range.start().0, u64::try_from(range.bytes()).ok()?))
}

/// Unmaps whole pieces, `expected` bytes of them; gives the bytes that the kernel says.
fn unmap_range(
    kernel: &mut Result<Box<dyn Kernel>, Closed>,
    info: &Info,
    range: IovaRange,
    expected: u128,
) -> Result<u128, Refused> {
    let kernel = kernel.as_mut().map_err(|Closed| closed())?;
    let removed = match start_and_size(range) {
        Some((iova, size)) => kernel.unmap(&UnmapDma { flags: UnmapFlags::empty(), iova, size }, None),
        None if info.unmap_all => kernel.unmap(&UnmapDma { flags: UnmapFlags::ALL, iova: 0, size: 0 }, None),
        None => Err(Errno::EINVAL), // nothing in reach makes it
    };
    let removed = removed.map_err(|e| e.refused("UNMAP_DMA"))?;
    // It counts in 64 bits.
    #[expect(clippy::cast_possible_truncation, reason = "modulo 2^64 is meant")]
    let matches = removed == expected as u64;
    Ok(if matches { expected } else { removed.into() })
}

impl State {
    /// Reads what the container can do now.
    pub(crate) fn refresh(&mut self) -> Result<(), Errno> {
        let kernel = self.kernel.as_mut().map_err(|Closed| Errno::EBADF)?;
        let info = kernel.info()?;
        let ours = u32::try_from(self.held.entries()).unwrap_or(u32::MAX);
        self.info = Info { entries: info.entries.map(|left| left.saturating_add(ours)), ..info };
        Ok(())
    }

    pub(crate) fn reach(&self) -> Reach {
        // Linux 6.12 loses sight of a mapping that ends at 2^64-1, where the aperture of an AMD-Vi ends: it could not be
        // removed.
        let end = Iova(u64::MAX - self.info.page_size());
        let below = |range: &IovaRange| IovaRange::new(range.start(), range.last().min(end));
        Reach {
            apertures: self.info.apertures.iter().filter_map(below).collect(),
            page_sizes: self.info.page_sizes,
            entries: self.info.entries,
            replace: false,
            wide_unmap: true,
            batches: false,
            mmio: true,
            out_of_reach: self.out_of_reach,
        }
    }

    /// The pieces of `extent`. Device registers that this process has not mapped are left out, and known.
    pub(crate) fn pieces_of(&self, extent: &Mapping) -> Result<Pieces, HostError> {
        match (extent.target, &self.registers) {
            (Target::Ram, _) => (self.memory)(extent),
            (Target::Mmio, None) => Ok(Pieces::Absent),
            (Target::Mmio, Some(registers)) => Ok(registers(extent).unwrap_or(Pieces::Absent)),
        }
    }

    pub(crate) fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        let pieces = self.pieces_of(extent).map_err(|e| Refused::new(RefusalKind::Device, e.to_string()))?;
        let more = pieces.count() as u64;
        // The record counts extents; one over several regions of memory takes more entries than it knows of.
        let held = self.held.entries();
        if let Some(limit) = self.info.entries
            && held.saturating_add(more) > u64::from(limit)
        {
            let why = format!("{more} entries are wanted beside {held} of {limit}");
            return Err(Refused::new(RefusalKind::Resources, why));
        }
        match &pieces {
            Pieces::Absent => {}
            Pieces::Whole(vaddr) => self.map_piece(extent.access, extent.range, *vaddr)?,
            Pieces::Several(list) => map_all(
                self,
                list,
                |state, piece| state.map_piece(extent.access, piece.range, piece.vaddr),
                |state, hull| unmap_range(&mut state.kernel, &state.info, hull, hull.bytes()),
            )?,
        }
        self.held.insert(*extent, pieces);
        Ok(Ack::Done)
    }

    fn map_piece(&mut self, access: Access, range: IovaRange, vaddr: u64) -> Result<(), Refused> {
        let kernel = self.kernel.as_mut().map_err(|Closed| closed())?;
        let too_large = || Refused::new(RefusalKind::Range, "MAP_DMA: a size of 2^64 cannot be said");
        let (iova, size) = start_and_size(range).ok_or_else(too_large)?;
        kernel.map(&MapDma { flags: access.into(), vaddr, iova, size }).map_err(|e| e.refused("MAP_DMA"))
    }

    pub(crate) fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        if self.tracking {
            return self.unmap_and_track(range);
        }
        let Self { kernel, info, held, .. } = self;
        held.unmap(range, |Inside { bytes: total, present, hull }| {
            // Exactly what was mapped: the embedder may have mappings of its own beside it.
            let removed = hull.map_or(Ok(0), |hull| unmap_range(kernel, info, hull, present))?;
            // Another number is for the record to see: it fences.
            Ok(Unmapped::done(total - present + removed))
        })
    }

    fn unmap_and_track(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        let Inside { bytes: total, present, hull } = self.held.sum(range)?;
        let mut unmapped = Unmapped::done(total);
        if let Some(hull) = hull {
            let (removed, dirty) = self.unmap_with_dirty_pages(range, hull)?;
            unmapped = Unmapped { bytes: total - present + removed, dirty, ..unmapped };
        }
        self.held.remove(range);
        Ok(unmapped)
    }

    /// One call a piece, since a bitmap has a bit for each page of its range. A kernel that gives no bitmap is asked to
    /// remove the rest without one: then all of it counts as written.
    fn unmap_with_dirty_pages(
        &mut self,
        range: IovaRange,
        hull: IovaRange,
    ) -> Result<(u128, Option<viommu::subscribe::DirtyBitmap>), Refused> {
        let kernel = self.kernel.as_mut().map_err(|Closed| closed())?;
        let page = self.info.dirty.map_or(4096, |dirty| dirty.page_size);
        let mut dirty = Some(Coarse::new(hull, page));
        let mut bytes = 0;
        for piece in self.held.inside(range).flat_map(Holding::pieces) {
            let Some((iova, size)) = start_and_size(piece.range) else { continue };
            let told = match Bitmap::new(page, size) {
                Err(errno) => Err(errno),
                Ok(_) if dirty.is_none() => Err(Errno::EINVAL),
                Ok(mut bitmap) => {
                    let unmap = UnmapDma { flags: UnmapFlags::GET_DIRTY_BITMAP, iova, size };
                    kernel.unmap(&unmap, Some(&mut bitmap)).map(|removed| (removed, bitmap))
                }
            };
            match told {
                Ok((removed, bitmap)) => {
                    bytes += u128::from(removed);
                    if let Some(dirty) = &mut dirty {
                        pages_of(&bitmap, size).for_each(|n| dirty.set(iova + n * page));
                    }
                }
                Err(_) => {
                    dirty = None;
                    let unmap = UnmapDma { flags: UnmapFlags::empty(), iova, size };
                    bytes += u128::from(kernel.unmap(&unmap, None).map_err(|e| e.refused("UNMAP_DMA"))?);
                }
            }
        }
        Ok((bytes, dirty.map(|dirty| dirty.0)))
    }
}
