//! What a request's parameters must satisfy by themselves, before the record is asked: alignment, ranges, known flags.

use core::ops::RangeInclusive;

use viommu::{Access, Gpa, Iova, IovaRange, Mapping};

use crate::spec::Features;
use crate::spec::request::{Attach, AttachFlags, Map, MapFlags, Status, Unmap};

/// The limits that hold now: the configuration's, and what was negotiated.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    pub(crate) input: IovaRange,
    pub(crate) domains: RangeInclusive<u32>,
    /// Bytes; a power of two.
    pub(crate) granule: u64,
    pub(crate) negotiated: Features,
}

impl Limits {
    fn check_domain(&self, domain: u32) -> Result<u32, Status> {
        if self.domains.contains(&domain) { Ok(domain) } else { Err(Status::RANGE) }
    }

    fn is_aligned(&self, address: u64) -> bool {
        address & self.granule.wrapping_sub(1) == 0
    }

    /// The range of a request; VIRTIO leaves open what an inverted one or one outside the input range is: RANGE.
    fn range(&self, start: u64, end: u64) -> Result<IovaRange, Status> {
        let range = IovaRange::new(Iova(start), Iova(end)).ok_or(Status::RANGE)?;
        if self.input.covers(range) { Ok(range) } else { Err(Status::RANGE) }
    }

    /// The domain, and whether it is to be a bypass one.
    pub(crate) fn attach(&self, request: &Attach) -> Result<(u32, bool), Status> {
        if request.reserved != [0; 4] {
            return Err(Status::INVAL);
        }
        let flags = AttachFlags::from_bits_retain(request.flags.get());
        let known = if self.negotiated.contains(Features::BYPASS_CONFIG) {
            AttachFlags::BYPASS
        } else {
            AttachFlags::empty()
        };
        if !known.contains(flags) {
            return Err(Status::INVAL);
        }
        Ok((self.check_domain(request.domain.get())?, flags.contains(AttachFlags::BYPASS)))
    }

    /// The mapping that a MAP asks for. Without flags it occupies its range and allows nothing.
    pub(crate) fn map(&self, request: &Map) -> Result<Mapping, Status> {
        let flags = MapFlags::from_bits_retain(request.flags.get());
        let mut known = MapFlags::READ | MapFlags::WRITE;
        if self.negotiated.contains(Features::MMIO) {
            known |= MapFlags::MMIO;
        }
        if !known.contains(flags) {
            return Err(Status::INVAL);
        }
        self.check_domain(request.domain.get())?;
        let (start, end) = (request.virt_start.get(), request.virt_end.get());
        let range = self.range(start, end)?;
        // The end of everything wraps to 0, which is aligned.
        if !self.is_aligned(start | request.phys_start.get()) || !self.is_aligned(end.wrapping_add(1)) {
            return Err(Status::RANGE);
        }
        let mut access = Access::empty();
        access.set(Access::READ, flags.contains(MapFlags::READ));
        access.set(Access::WRITE, flags.contains(MapFlags::WRITE));
        let mapping = Mapping::over(range, Gpa(request.phys_start.get()), access).ok_or(Status::RANGE)?;
        Ok(if flags.contains(MapFlags::MMIO) { mapping.mmio() } else { mapping })
    }

    /// The range of an UNMAP. It need not be aligned: it may end in a hole.
    pub(crate) fn unmap(&self, request: &Unmap) -> Result<IovaRange, Status> {
        self.check_domain(request.domain.get())?;
        self.range(request.virt_start.get(), request.virt_end.get())
    }
}
