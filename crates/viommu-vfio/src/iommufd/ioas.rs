//! One IOAS: what a domain of the guest's maps there.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use viommu::subscribe::{FenceFailed, OutOfReach, Reach, RefusalKind, Refused, Unmapped};
use viommu::{Access, Ack, Gpa, Iova, IovaRange, Mapping};
use viommu_memory::mirror::{Holdings, Piece, Pieces, Resolve, map_all};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion as _};

use crate::errno::Errno;
use crate::iommufd::hub::{Hub, Hwpt};
use crate::iommufd::kernel::{Kernel, Limits, Place};
use crate::software::Bitmap;
use crate::written::{Written, pages_of};

/// The file behind guest memory at an address, and where in it.
pub(super) type Files = Box<dyn Fn(Gpa) -> Option<(Arc<File>, u64)> + Send>;

/// As vm-memory has it.
pub(super) fn files_in<A>(memory: A) -> Files
where
    A: GuestAddressSpace + Send + 'static,
    A::M: GuestMemoryBackend,
{
    Box::new(move |gpa| {
        let memory = memory.memory();
        let region = memory.find_region(GuestAddress(gpa.0))?;
        let file = region.file_offset()?;
        let offset = gpa.0.checked_sub(region.start_addr().0)?;
        Some((file.arc().clone(), file.start().checked_add(offset)?))
    })
}

/// An IOAS, and what was mapped in it.
pub(super) struct Ioas {
    pub(super) hub: Arc<Hub>,
    pub(super) id: u32,
    /// Of the device for which it was made.
    pub(super) limits: Limits,
    pub(super) out_of_reach: OutOfReach,
    pub(super) memory: Resolve,
    pub(super) files: Option<Files>,
    pub(super) held: Holdings,
    /// Dirty pages that were read, and not told since what came behind them failed.
    pub(super) untold: Written,
    /// Its devices have been cut off.
    pub(super) closed: bool,
}

/// Unmaps whole pieces; gives the bytes that the kernel says.
fn unmap_range(kernel: &dyn Kernel, ioas: u32, range: IovaRange) -> Result<u128, Refused> {
    let refused = |errno: Errno| errno.refused("IOAS_UNMAP");
    // Nothing in reach is of 2^64 bytes.
    let length = u64::try_from(range.bytes()).map_err(|_| refused(Errno::EOVERFLOW))?;
    kernel.unmap(ioas, range.start().0, length).map(u128::from).map_err(refused)
}

impl Ioas {
    pub(super) fn reach(&self) -> Reach {
        // The last page of all is kept out: its end plus one is no address.
        let end = Iova(u64::MAX - self.limits.page_size);
        let below = |range: &IovaRange| IovaRange::new(range.start(), range.last().min(end));
        Reach {
            apertures: self.limits.apertures.iter().filter_map(below).collect(),
            page_sizes: !self.limits.page_size.wrapping_sub(1),
            entries: None,
            replace: false,
            wide_unmap: true,
            batches: false,
            mmio: false,
            out_of_reach: self.out_of_reach,
        }
    }

    pub(super) fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        if self.closed {
            return Err(Refused::new(RefusalKind::Device, "the devices have been cut off"));
        }
        let pieces = (self.memory)(extent).map_err(|e| Refused::new(RefusalKind::Device, e.to_string()))?;
        match &pieces {
            Pieces::Absent => {}
            Pieces::Whole(vaddr) => self.map_piece(extent, Piece { range: extent.range, vaddr: *vaddr })?,
            Pieces::Several(list) => map_all(
                self,
                list,
                |ioas, piece| ioas.map_piece(extent, piece),
                |ioas, hull| unmap_range(&*ioas.hub.kernel, ioas.id, hull),
            )?,
        }
        self.held.insert(*extent, pieces);
        Ok(Ack::Done)
    }

    fn map_piece(&mut self, extent: &Mapping, piece: Piece) -> Result<(), Refused> {
        let too_large = || Refused::new(RefusalKind::Range, "IOAS_MAP: a size of 2^64 cannot be said");
        let length = u64::try_from(piece.range.bytes()).map_err(|_| too_large())?;
        let iova = piece.range.start();
        let place = Place { ioas: self.id, iova: iova.0, length, access: extent.access };
        let kernel = &self.hub.kernel;
        if let Some(files) = &self.files
            && let Some((file, start)) = files(extent.translate(iova))
        {
            match kernel.map_file(place, file.as_fd(), start) {
                Ok(()) => return Ok(()),
                // The kernel does not know the call: never again. Or the file is no memfd: by its address, then.
                Err(Errno::ENOTTY) => self.files = None,
                Err(Errno::EINVAL) => {}
                Err(errno) => return Err(errno.refused("IOAS_MAP_FILE")),
            }
        }
        self.hub.kernel.map(place, piece.vaddr).map_err(|e| e.refused("IOAS_MAP"))
    }

    pub(super) fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        if self.closed {
            return Err(Refused::new(RefusalKind::Device, "the devices have been cut off"));
        }
        let Self { hub, id, held, .. } = self;
        // Exactly what was mapped: asked to remove what is not there, the kernel answers ENOENT, and only then is that
        // a sign that the two disagree. Another number than was held is for the record to see: it fences.
        let removed = held.unmap(range, |inside| {
            inside.hull.map_or(Ok(inside.bytes), |hull| unmap_range(&*hub.kernel, *id, hull))
        });
        // Bits read before the removal would miss what was written in between, and behind it they are gone. So there are
        // none, and all that the device could write counts as written.
        removed.map(Unmapped::done)
    }

    /// Returns when no device uses it any more. Once it has, it does nothing.
    pub(super) fn fence(&mut self) -> Result<(), FenceFailed> {
        if self.closed {
            return Ok(());
        }
        let id = self.id;
        self.hub.cut_off(|_, at| at == Some(id))?;
        self.closed = true;
        self.held.clear();
        Ok(())
    }

    /// Adds what was written since the last call.
    pub(super) fn dirty(&mut self) -> Result<(), Errno> {
        let hub = self.hub.clone();
        let hwpts: Vec<Hwpt> = {
            let devices = hub.devices();
            if !devices.tracking {
                return Err(Errno::EINVAL);
            }
            let mine = devices.tables.iter().filter(|table| table.ioas == self.id);
            mine.flat_map(|table| table.hwpts.iter().copied()).collect()
        };
        let Self { held, untold, limits, .. } = self;
        let page = limits.page_size;
        for held in held.iter().filter(|held| held.mapping.access.contains(Access::WRITE)) {
            if hwpts.iter().any(|hwpt| !hwpt.tracks) {
                untold.add_all(&held.mapping);
                continue;
            }
            for piece in held.pieces() {
                let size = u64::try_from(piece.range.bytes()).map_err(|_| Errno::EINVAL)?;
                for hwpt in &hwpts {
                    let mut bitmap = Bitmap::new(page, size)?;
                    hub.kernel.dirty(hwpt.id, piece.range.start().0, size, &mut bitmap)?;
                    untold.add(&held.mapping, piece, pages_of(&bitmap, size), page);
                }
            }
        }
        Ok(())
    }
}
