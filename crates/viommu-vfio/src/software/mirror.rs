//! The mirror over a container: the calls that a real VFIO mirror makes.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use viommu::subscribe::{FenceFailed, Mirror, OutOfReach, Reach, RefusalKind, Refused, Unmapped};
use viommu::{Ack, Gpa, Iova, IovaRange, Mapping, Target};

use super::container::{Container, Dma, MapDma, UnmapDma, UnmapFlags};
use super::dirty::Bitmap;
use super::lock;
use crate::coarse::Coarse;
use crate::errno::Errno;

/// A [`Mirror`] over a [`Container`] that the embedder keeps a handle to.
///
/// Guest physical addresses are host addresses, plus [`hva_offset`](Self::hva_offset). While the container tracks
/// dirty pages, every unmap tells those of what it removes.
#[derive(Debug)]
pub struct SoftwareMirror {
    container: Arc<Mutex<Container>>,
    hva_offset: u64,
    mmio: bool,
    out_of_reach: OutOfReach,
    /// The extents that are device registers: the container does not know what lies behind a host address.
    registers: BTreeSet<Iova>,
}

impl SoftwareMirror {
    /// Over `container`, without device registers, with host addresses equal to guest physical ones.
    #[must_use]
    pub fn new(container: Arc<Mutex<Container>>) -> Self {
        let out_of_reach = OutOfReach::default();
        Self { container, hva_offset: 0, mmio: false, out_of_reach, registers: BTreeSet::new() }
    }

    /// Adds `offset` (modulo 2^64) to a guest physical address to make the host's.
    #[must_use]
    pub fn hva_offset(self, offset: u64) -> Self {
        Self { hva_offset: offset, ..self }
    }

    /// Whether device registers are mapped, as type1 on bare hardware does for peer-to-peer DMA.
    #[must_use]
    pub fn mmio(self, mmio: bool) -> Self {
        Self { mmio, ..self }
    }

    /// What becomes of a mapping out of reach that the guest cannot be refused.
    #[must_use]
    pub fn out_of_reach(self, out_of_reach: OutOfReach) -> Self {
        Self { out_of_reach, ..self }
    }

    /// The container.
    #[must_use]
    pub fn container(&self) -> &Arc<Mutex<Container>> {
        &self.container
    }

    fn mapping(&self, dma: &Dma) -> Mapping {
        let target = if self.registers.contains(&dma.range.start()) { Target::Mmio } else { Target::Ram };
        let gpa = Gpa(dma.vaddr.wrapping_sub(self.hva_offset));
        Mapping { range: dma.range, gpa, access: dma.access, target }
    }
}

impl Mirror for SoftwareMirror {
    fn reach(&self) -> Reach {
        let container = lock(&self.container);
        let config = container.config();
        let anywhere = config.iova_ranges.is_empty();
        Reach {
            apertures: if anywhere { vec![IovaRange::ALL] } else { config.iova_ranges.clone() },
            page_sizes: config.pgsizes,
            entries: Some(config.dma_entry_limit),
            replace: false,
            wide_unmap: true,
            batches: false,
            mmio: self.mmio,
            out_of_reach: self.out_of_reach,
        }
    }

    fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        if extent.target == Target::Mmio && !self.mmio {
            return Err(Refused::new(RefusalKind::Unsupported, "device registers are not mapped here"));
        }
        let size = u64::try_from(extent.range.bytes())
            .map_err(|_| Refused::new(RefusalKind::Range, "MAP_DMA: a size of 2^64 cannot be said"))?;
        let map = MapDma {
            flags: extent.access.into(),
            vaddr: extent.gpa.0.wrapping_add(self.hva_offset),
            iova: extent.range.start().0,
            size,
        };
        lock(&self.container).map_dma(map).map_err(|e| e.refused("MAP_DMA"))?;
        if extent.target == Target::Mmio {
            self.registers.insert(extent.range.start());
        }
        Ok(Ack::Done)
    }

    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        let mut container = lock(&self.container);
        let unmapped = unmap(&mut container, range).map_err(|e| e.refused("UNMAP_DMA"))?;
        drop(container);
        self.registers.retain(|iova| !range.contains(*iova));
        Ok(unmapped)
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        lock(&self.container).detach();
        self.registers.clear();
        Ok(())
    }

    fn held(&self) -> Vec<Mapping> {
        lock(&self.container).iter().map(|dma| self.mapping(&dma)).collect()
    }
}

fn unmap(container: &mut Container, range: IovaRange) -> Result<Unmapped, Errno> {
    if container.is_tracking() {
        return unmap_with_dirty_pages(container, range);
    }
    if range == IovaRange::ALL {
        let bytes = container.iter().map(|dma| dma.range.bytes()).sum();
        let all = UnmapDma { flags: UnmapFlags::ALL, iova: 0, size: 0 };
        container.unmap_dma(all, None)?;
        return Ok(Unmapped::done(bytes));
    }
    // Mappings are whole pages: what a range has beyond whole pages holds none.
    let Some((iova, size)) = whole_pages(range, container.pgsize()) else {
        container.attached()?;
        return Ok(Unmapped::done(0));
    };
    let bytes = container.unmap_dma(UnmapDma { flags: UnmapFlags::empty(), iova, size }, None)?;
    Ok(Unmapped::done(bytes.into()))
}

/// `range` without the bytes that do not fill a page: first byte and size, which fits unless the range is all of it.
fn whole_pages(range: IovaRange, page: u64) -> Option<(u64, u64)> {
    let start = range.start().0.checked_next_multiple_of(page)?;
    let size = match range.next() {
        None => start.wrapping_neg(), // to 2^64; 0 only for all of it
        Some(next) => (next.0 & !(page - 1)).checked_sub(start)?,
    };
    (size != 0).then_some((start, size))
}

/// One call a mapping, since a bitmap has a bit for each page of its range, and ALL takes no bitmap.
fn unmap_with_dirty_pages(container: &mut Container, range: IovaRange) -> Result<Unmapped, Errno> {
    container.attached()?;
    let gone: Vec<Dma> = container.overlapping(range).collect();
    if !gone.iter().all(|dma| range.covers(dma.range)) {
        return Err(Errno::EINVAL);
    }
    let (Some(first), Some(last)) = (gone.first(), gone.last()) else { return Ok(Unmapped::done(0)) };
    let page = container.pgsize();
    let mut dirty = Coarse::new(first.range.hull(last.range), page);
    let mut bytes = 0;
    for dma in &gone {
        let iova = dma.range.start().0;
        let size = u64::try_from(dma.range.bytes()).map_err(|_| Errno::EINVAL)?;
        let mut bitmap = Bitmap::new(page, size)?;
        let unmap = UnmapDma { flags: UnmapFlags::GET_DIRTY_BITMAP, iova, size };
        container.unmap_dma(unmap, Some(&mut bitmap))?;
        bytes += dma.range.bytes();
        bitmap.dirty().for_each(|n| dirty.set(iova + n * page));
    }
    Ok(Unmapped { bytes, dirty: Some(dirty.0), ack: Ack::Done })
}

#[cfg(test)]
#[path = "mirror_tests.rs"]
mod tests;
