//! One address space of a device's: what a domain of the guest's maps there.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use viommu::subscribe::{FenceFailed, OutOfReach, Reach, RefusalKind, Refused, Unmapped};
use viommu::{Access, Ack, Iova, IovaRange, Mapping};
use viommu_memory::mirror::{Holdings, Inside, Piece, Pieces, Resolve, map_all};

use crate::spec::{IotlbMsg, kind, perm};
use crate::vdpa::wire::Wire;

/// Bytes of the pages that addresses and sizes are made of: the kernel rounds what is not.
const PAGE: u64 = 4096;

/// What was mapped in an address space.
pub(super) struct State {
    pub(super) range: IovaRange,
    pub(super) batches: bool,
    pub(super) limit: Option<u32>,
    pub(super) out_of_reach: OutOfReach,
    pub(super) memory: Resolve,
    pub(super) held: Holdings,
}

/// The way of one address space's messages: the mirror's own, so that its lock is no matter for a step's begin and end.
pub(super) struct Line {
    pub(super) wire: Arc<Mutex<Wire>>,
    pub(super) asid: u32,
    pub(super) in_step: bool,
}

pub(super) fn lock(wire: &Mutex<Wire>) -> MutexGuard<'_, Wire> {
    wire.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The kernel says EFAULT whatever the reason is. What the record can know has been looked at before: the window, that
/// nothing is there, that there is memory. What is left is what has run out.
fn refused(message: &str, errno: Errno) -> Refused {
    let kind = match errno {
        Errno::FAULT | Errno::NOMEM | Errno::NOSPC | Errno::AGAIN | Errno::INTR => RefusalKind::Resources,
        Errno::INVAL | Errno::NOTTY | Errno::OPNOTSUPP => RefusalKind::Unsupported,
        _ => RefusalKind::Device,
    };
    Refused::new(kind, format!("{message}: {errno}"))
}

fn perm_of(access: Access) -> u8 {
    let read = if access.contains(Access::READ) { perm::READ } else { 0 };
    let write = if access.contains(Access::WRITE) { perm::WRITE } else { 0 };
    read | write
}

/// First byte and size; `None` where it is 2^64 bytes, which cannot be said.
fn start_and_size(range: IovaRange) -> Option<(u64, u64)> {
    Some((range.start().0, u64::try_from(range.bytes()).ok()?))
}

impl State {
    pub(super) fn reach(&self) -> Reach {
        // The last page of all is kept out: its end plus one is no address.
        let end = Iova(u64::MAX - PAGE);
        let aperture = IovaRange::new(self.range.start(), self.range.last().min(end));
        Reach {
            apertures: aperture.into_iter().collect(),
            page_sizes: !(PAGE - 1),
            entries: self.limit,
            replace: false,
            wide_unmap: true,
            batches: self.batches,
            mmio: false,
            out_of_reach: self.out_of_reach,
        }
    }

    pub(super) fn map(&mut self, line: &Line, extent: &Mapping) -> Result<Ack, Refused> {
        let pieces = (self.memory)(extent).map_err(|e| Refused::new(RefusalKind::Device, e.to_string()))?;
        let (more, held) = (pieces.count() as u64, self.held.entries());
        // The record counts extents; one over several regions of memory takes more entries than it knows of.
        if let Some(limit) = self.limit
            && held.saturating_add(more) > u64::from(limit)
        {
            let why = format!("{more} entries are wanted beside {held} of {limit}");
            return Err(Refused::new(RefusalKind::Resources, why));
        }
        match &pieces {
            Pieces::Absent => {}
            Pieces::Whole(vaddr) => {
                line.update(extent.access, Piece { range: extent.range, vaddr: *vaddr })?;
            }
            Pieces::Several(list) => map_all(
                &mut { line },
                list,
                |line, piece| line.update(extent.access, piece),
                |line, hull| line.invalidate(hull).map(|()| hull.bytes()),
            )?,
        }
        self.held.insert(*extent, pieces);
        Ok(Ack::Done)
    }

    pub(super) fn unmap(&mut self, line: &Line, range: IovaRange) -> Result<Unmapped, Refused> {
        self.held.unmap(range, |Inside { bytes, hull, .. }| {
            // The kernel removes what touches the range, wholly, and tells no number: whole extents it is, and of nothing
            // held nothing is asked, since an address space that has had no UPDATE yet is none.
            hull.map_or(Ok(()), |hull| line.invalidate(hull))?;
            Ok(Unmapped::done(bytes))
        })
    }

    pub(super) fn fence(&mut self, line: &Line) -> Result<(), FenceFailed> {
        lock(&line.wire).fence()?;
        self.held.clear();
        Ok(())
    }
}

impl Line {
    fn update(&self, access: Access, piece: Piece) -> Result<(), Refused> {
        let too_large = || Refused::new(RefusalKind::Range, "UPDATE: a size of 2^64 cannot be said");
        let (iova, size) = start_and_size(piece.range).ok_or_else(too_large)?;
        let (perm, kind) = (perm_of(access), kind::UPDATE);
        let message = IotlbMsg { iova, size, uaddr: piece.vaddr, perm, kind, padding: [0; 6] };
        self.send(message).map_err(|errno| refused("UPDATE", errno))
    }

    fn invalidate(&self, range: IovaRange) -> Result<(), Refused> {
        let too_large = || Refused::new(RefusalKind::Range, "INVALIDATE: a size of 2^64 cannot be said");
        let (iova, size) = start_and_size(range).ok_or_else(too_large)?;
        let message = IotlbMsg { iova, size, kind: kind::INVALIDATE, ..IotlbMsg::default() };
        self.send(message).map_err(|errno| refused("INVALIDATE", errno))
    }

    fn send(&self, message: IotlbMsg) -> Result<(), Errno> {
        lock(&self.wire).send(self.asid, self.in_step, message)
    }

    pub(super) fn commit(&mut self) -> Ack {
        self.in_step = false;
        if lock(&self.wire).commit(self.asid) {
            return Ack::Done;
        }
        // Whether the device has heard of the step, nobody knows.
        let (ack, resolver) = Ack::pending();
        resolver.failed();
        ack
    }
}
