//! What the container holds and how it changes: the calls of the mirror, and of the embedder's handle.

use std::collections::BTreeMap;

use viommu::subscribe::{OutOfReach, Reach, RefusalKind, Refused, Unmapped};
use viommu::{Access, Ack, Iova, IovaRange, Mapping, Target};
use viommu_memory::HostError;

use crate::coarse::Coarse;
use crate::errno::Errno;
use crate::software::{Bitmap, MapDma, UnmapDma, UnmapFlags};
use crate::type1::fence::Action;
use crate::type1::host::{Piece, Pieces, Resolve};
use crate::type1::info::Info;
use crate::type1::kernel::Kernel;

/// The devices have been cut off, and the container is not used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Closed;

/// One extent of the record's.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) mapping: Mapping,
    pub(crate) pieces: Pieces,
}

impl Held {
    pub(crate) fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.pieces.of(self.mapping.range)
    }

    /// Bytes that the container has of it.
    fn bytes(&self) -> u128 {
        if self.pieces == Pieces::Absent { 0 } else { self.mapping.range.bytes() }
    }
}

/// A container, and what was mapped in it.
pub(crate) struct State {
    pub(crate) kernel: Result<Box<dyn Kernel>, Closed>,
    /// As it was at the start, or when the embedder last had it read; its entries are those left and those held here.
    pub(crate) info: Info,
    pub(crate) out_of_reach: OutOfReach,
    pub(crate) memory: Resolve,
    pub(crate) registers: Option<Resolve>,
    pub(crate) action: Option<Action>,
    /// By the first address.
    pub(crate) held: BTreeMap<u64, Held>,
    /// Entries of the container that they take.
    pub(crate) entries: u64,
    pub(crate) tracking: bool,
    /// Dirty pages that were read, and not told since what came behind them failed.
    pub(crate) untold: Vec<viommu::GpaRange>,
}

/// A piece could not be mapped, and those before it could not be taken back.
const LEFT_BEHIND: &str = "what was mapped before it could not be taken back";

/// The dirty pages of a mapping of `size` bytes. Linux leaves rubbish in the rest of the last word.
pub(crate) fn pages_of(bitmap: &Bitmap, size: u64) -> impl Iterator<Item = u64> + '_ {
    let pages = size / bitmap.pgsize;
    bitmap.dirty().take_while(move |page| *page < pages)
}

fn closed() -> Refused {
    Refused::new(RefusalKind::Device, "the container is closed")
}

/// First byte and size; `None` where it is 2^64 bytes, which cannot be said.
fn start_and_size(range: IovaRange) -> Option<(u64, u64)> {
    Some((range.start().0, u64::try_from(range.bytes()).ok()?))
}

impl State {
    /// Reads what the container can do now.
    pub(crate) fn refresh(&mut self) -> Result<(), Errno> {
        let kernel = self.kernel.as_mut().map_err(|Closed| Errno::EBADF)?;
        let info = kernel.info()?;
        let ours = u32::try_from(self.entries).unwrap_or(u32::MAX);
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
        if let Some(limit) = self.info.entries
            && self.entries.saturating_add(more) > u64::from(limit)
        {
            let (limit, held) = (limit, self.entries);
            let why = format!("{more} entries are wanted beside {held} of {limit}");
            return Err(Refused::new(RefusalKind::Resources, why));
        }
        match &pieces {
            Pieces::Absent => {}
            Pieces::Whole(vaddr) => self.map_piece(extent.access, extent.range, *vaddr)?,
            Pieces::Several(list) => self.map_pieces(extent.access, list)?,
        }
        self.entries += more;
        self.held.insert(extent.range.start().0, Held { mapping: *extent, pieces });
        Ok(Ack::Done)
    }

    fn map_piece(&mut self, access: Access, range: IovaRange, vaddr: u64) -> Result<(), Refused> {
        let kernel = self.kernel.as_mut().map_err(|Closed| closed())?;
        let too_large = || Refused::new(RefusalKind::Range, "MAP_DMA: a size of 2^64 cannot be said");
        let (iova, size) = start_and_size(range).ok_or_else(too_large)?;
        kernel.map(&MapDma { flags: access.into(), vaddr, iova, size }).map_err(|e| e.refused("MAP_DMA"))
    }

    /// All of them or none.
    fn map_pieces(&mut self, access: Access, list: &[Piece]) -> Result<(), Refused> {
        for (at, piece) in list.iter().enumerate() {
            let Err(refused) = self.map_piece(access, piece.range, piece.vaddr) else { continue };
            let before = list.get(..at).unwrap_or_default();
            let (Some(first), Some(last)) = (before.first(), before.last()) else { return Err(refused) };
            let hull = first.range.hull(last.range);
            return Err(match self.unmap_range(hull, hull.bytes()) {
                Ok(bytes) if bytes == hull.bytes() => refused,
                Ok(_) | Err(_) => Refused::new(RefusalKind::Lost, format!("{refused}; {LEFT_BEHIND}")),
            });
        }
        Ok(())
    }

    /// Unmaps whole pieces, `expected` bytes of them; gives the bytes that the kernel says.
    fn unmap_range(&mut self, range: IovaRange, expected: u128) -> Result<u128, Refused> {
        let kernel = self.kernel.as_mut().map_err(|Closed| closed())?;
        let removed = match start_and_size(range) {
            Some((iova, size)) => kernel.unmap(&UnmapDma { flags: UnmapFlags::empty(), iova, size }, None),
            None if self.info.unmap_all => {
                kernel.unmap(&UnmapDma { flags: UnmapFlags::ALL, iova: 0, size: 0 }, None)
            }
            None => Err(Errno::EINVAL), // nothing in reach makes it
        };
        let removed = removed.map_err(|e| e.refused("UNMAP_DMA"))?;
        // It counts in 64 bits.
        #[expect(clippy::cast_possible_truncation, reason = "modulo 2^64 is meant")]
        let matches = removed == expected as u64;
        Ok(if matches { expected } else { removed.into() })
    }

    pub(crate) fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        let (start, last) = (range.start().0, range.last().0);
        if self.cuts(range) {
            return Err(Refused::new(RefusalKind::Range, format!("{range} would cut what is held")));
        }
        let (mut total, mut present, mut entries) = (0, 0, 0);
        let mut hull: Option<IovaRange> = None;
        for held in self.held.range(start..=last).map(|(_, held)| held) {
            total += held.mapping.range.bytes();
            if held.pieces != Pieces::Absent {
                present += held.bytes();
                entries += held.pieces.count() as u64;
                hull = Some(hull.map_or(held.mapping.range, |hull| hull.hull(held.mapping.range)));
            }
        }
        let mut unmapped = Unmapped::done(total);
        if let Some(hull) = hull {
            // Exactly what was mapped: the embedder may have mappings of its own beside it.
            let removed = match self.tracking {
                false => self.unmap_range(hull, present)?,
                true => {
                    let (removed, dirty) = self.unmap_with_dirty_pages(range, hull)?;
                    unmapped.dirty = dirty;
                    removed
                }
            };
            // Another number is for the record to see: it fences.
            unmapped.bytes = total - present + removed;
        }
        while let Some((&first, _)) = self.held.range(start..=last).next() {
            self.held.remove(&first);
        }
        self.entries = self.entries.saturating_sub(entries);
        Ok(unmapped)
    }

    /// Whether an extent sticks out of `range` at either end.
    fn cuts(&self, range: IovaRange) -> bool {
        let before = self.held.range(..range.start().0).next_back();
        let inside = self.held.range(range.start().0..=range.last().0).next_back();
        before.is_some_and(|(_, held)| held.mapping.range.overlaps(range))
            || inside.is_some_and(|(_, held)| !range.covers(held.mapping.range))
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
        let inside = self.held.range(range.start().0..=range.last().0);
        for piece in inside.flat_map(|(_, held)| held.pieces()) {
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
