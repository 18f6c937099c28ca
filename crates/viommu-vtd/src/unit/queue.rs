//! The invalidation queue: from descriptors to work.

use viommu::{Gpa, Iova, IovaRange};

use super::jobs::{After, Pasids, Task};
use super::views::Which;
use super::{Control, Inner};
use crate::log;
use crate::memory::WORD;
use crate::metrics::bump;
use crate::paging::PAGE_BITS;
use crate::spec::descriptor as d;
use crate::spec::register::FaultStatus;

/// The most pages of one page-selective invalidation: 2^18, so 1 GiB.
pub(crate) const MAX_MASK: u8 = 18;
/// Bytes of a descriptor, and of a wide one.
pub(crate) const NARROW: u64 = 16;
pub(crate) const WIDE: u64 = 32;

/// What a wait descriptor wants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wait {
    interrupt: bool,
    status: Option<(Gpa, u32)>,
}

/// A descriptor that is none.
struct Malformed(&'static str);

impl Inner {
    /// Fetches the next descriptor, if there is one, and makes it a job.
    pub(super) fn fetch(&self, control: &mut Control) -> bool {
        if self.faults.with(|registers| registers.has(FaultStatus::QUEUE_ERROR)) {
            return false;
        }
        let Some(at) = control.registers.next_descriptor() else { return false };
        let is_wide = control.registers.has_wide_queue();
        // Only scalable mode has wide ones.
        let at = at.filter(|_| !is_wide || self.config.scalable.is_some());
        let mut words = [0; 4];
        let (own, _) = words.split_at_mut(if is_wide { 4 } else { 2 });
        let there = at.is_some_and(|at| self.shared.memory.read(at, own));
        let [low, high, rest @ ..] = words;
        let decoded = match (there, rest) {
            (false, _) => Err(Malformed("a descriptor that cannot be read")),
            (true, [0, 0]) => decode(low, high, self.config.scalable.is_some()),
            (true, _) => Err(Malformed("reserved bits in the upper half of a descriptor")),
        };
        match decoded {
            Ok((task, after)) => {
                self.count(task.as_ref());
                control.jobs.push(task, after);
                true
            }
            Err(Malformed(what)) => {
                bump(&self.shared.counters.queue_errors);
                log::odd(what, low);
                let msi = self.faults.with(|registers| registers.set(FaultStatus::QUEUE_ERROR));
                self.faults.send(msi);
                false
            }
        }
    }

    pub(super) fn count(&self, task: Option<&Task>) {
        let counters = &self.shared.counters;
        match task {
            Some(Task::Contexts(Which::Pasid(_) | Which::Pasids)) => bump(&counters.pasid_invalidations),
            Some(Task::Contexts(_)) => bump(&counters.context_invalidations),
            Some(Task::Translations { range, .. }) if *range == IovaRange::ALL => {
                bump(&counters.wide_invalidations);
            }
            Some(Task::Translations { .. }) => bump(&counters.page_invalidations),
            Some(Task::DeviceTlb { .. }) => bump(&counters.device_tlb_invalidations),
            Some(Task::Switch | Task::Compare { .. }) | None => {}
        }
    }

    /// A wait descriptor's turn: all in front of it is over.
    pub(super) fn answer(&self, control: &mut Control, wait: &Wait) {
        bump(&self.shared.counters.waits);
        if let Some((at, value)) = wait.status
            && !self.shared.memory.write_u32(at, value)
        {
            log::odd("a wait descriptor's status lies nowhere", at.0);
        }
        if wait.interrupt {
            let msi = control.registers.wait_is_over();
            self.faults.send(msi);
        }
    }
}

/// `scalable`: whether there are descriptors for PASIDs.
fn decode(low: u64, high: u64, scalable: bool) -> Result<(Option<Task>, After), Malformed> {
    let byte = |word: u64| u8::try_from(word & 0xff).unwrap_or(0);
    let kind = byte(low & 0xf | (low >> d::TYPE_HIGH & 7) << 4);
    let granularity = byte(low >> d::GRANULARITY & 3);
    let did = half(low >> d::DOMAIN_ID);
    let source = half(low >> d::SOURCE);
    let task = match kind {
        d::CONTEXT => {
            if low & d::CONTEXT_RESERVED != 0 || high != 0 {
                return Err(Malformed("reserved bits in a context descriptor"));
            }
            contexts(granularity, source, byte(low >> d::FUNCTION_MASK & 3))
                .ok_or(Malformed("a context descriptor without granularity"))?
        }
        d::IOTLB => {
            let [reserved_low, reserved_high] = d::IOTLB_RESERVED;
            if low & reserved_low != 0 || high & reserved_high != 0 {
                return Err(Malformed("reserved bits in an IOTLB descriptor"));
            }
            translations(granularity, did, high).ok_or(Malformed("an IOTLB descriptor of no known range"))?
        }
        d::DEVICE_TLB => {
            let [reserved_low, reserved_high] = d::DEVICE_TLB_RESERVED;
            if low & reserved_low != 0 || high & reserved_high != 0 {
                return Err(Malformed("reserved bits in a device-TLB descriptor"));
            }
            let range = sized_range(high, high & d::SIZED != 0)
                .ok_or(Malformed("a device-TLB descriptor of no known range"))?;
            Task::DeviceTlb { source, pasids: Pasids::Without, range }
        }
        // There is no interrupt remapping, and nothing of it to forget.
        d::INTERRUPT => return Ok((None, After::Descriptor)),
        d::WAIT => {
            let [reserved_low, reserved_high] = d::WAIT_RESERVED;
            if low & reserved_low != 0 || high & reserved_high != 0 {
                return Err(Malformed("reserved bits in a wait descriptor"));
            }
            let status = (low & d::WAIT_STATUS != 0)
                .then(|| (Gpa(high), u32::try_from(low >> d::WAIT_DATA).unwrap_or(0)));
            return Ok((None, After::Wait(Wait { interrupt: low & d::WAIT_INTERRUPT != 0, status })));
        }
        d::PASID_IOTLB | d::PASID | d::PASID_DEVICE_TLB if scalable => {
            of_pasids(kind, low, high).ok_or(Malformed("a descriptor for PASIDs of no known kind"))?
        }
        _ => return Err(Malformed("a descriptor of no known type")),
    };
    Ok((Some(task), After::Descriptor))
}

/// A descriptor that is about PASIDs.
fn of_pasids(kind: u8, low: u64, high: u64) -> Option<Task> {
    let granularity = u8::try_from(low >> d::GRANULARITY & 3).ok()?;
    let pasid = u32::try_from(low >> d::PASID_FIELD & 0xf_ffff).ok()?;
    let did = half(low >> d::DOMAIN_ID);
    match kind {
        d::PASID_IOTLB => {
            let [reserved_low, reserved_high] = d::PASID_IOTLB_RESERVED;
            if low & reserved_low != 0 || high & reserved_high != 0 {
                return None;
            }
            // Whoever has the domain id: which PASIDs have it is in tables that may say something else by now.
            match granularity {
                d::pasid_iotlb::ALL => translations(d::DOMAIN, did, 0),
                d::pasid_iotlb::PAGES => translations(d::SELECTIVE, did, high),
                _ => None,
            }
        }
        d::PASID => {
            if low & d::PASID_RESERVED != 0 || high != 0 {
                return None;
            }
            match granularity {
                d::pasid::DOMAIN | d::pasid::GLOBAL => Some(Task::Contexts(Which::Pasids)),
                d::pasid::SELECTIVE => Some(Task::Contexts(Which::Pasid(pasid))),
                _ => None,
            }
        }
        _ => {
            if high & d::PASID_DEVICE_TLB_RESERVED != 0 {
                return None;
            }
            let pasids = if high & d::EVERY_PASID != 0 { Pasids::Every } else { Pasids::One(pasid) };
            let range = sized_range(high, high & d::PASID_SIZED != 0)?;
            Some(Task::DeviceTlb { source: half(low >> d::PASID_SOURCE), pasids, range })
        }
    }
}

fn half(word: u64) -> u16 {
    u16::try_from(word & 0xffff).unwrap_or(0)
}

/// An invalidation of contexts, of a granularity. One of a domain id is one of all: who has which is in the tables,
/// which may say something else by now.
pub(super) fn contexts(granularity: u8, source: u16, function_mask: u8) -> Option<Task> {
    match granularity {
        d::GLOBAL | d::DOMAIN => Some(Task::Contexts(Which::All)),
        d::SELECTIVE => {
            let mask = match function_mask {
                0 => !0,
                1 => !4,
                2 => !6,
                _ => !7,
            };
            Some(Task::Contexts(Which::Source { source, mask }))
        }
        _ => None,
    }
}

/// An invalidation of translations, of a granularity; `address` has the address mask in its lowest bits.
pub(super) fn translations(granularity: u8, did: u16, address: u64) -> Option<Task> {
    match granularity {
        d::GLOBAL => Some(Task::Translations { did: None, range: IovaRange::ALL }),
        d::DOMAIN => Some(Task::Translations { did: Some(did), range: IovaRange::ALL }),
        d::SELECTIVE => {
            let order = u8::try_from(address & d::ADDRESS_MASK).ok().filter(|order| *order <= MAX_MASK)?;
            let last = 1_u64.checked_shl(PAGE_BITS.checked_add(u32::from(order))?)?.checked_sub(1)?;
            let range = IovaRange::new(Iova(address & !last), Iova(address | last))?;
            Some(Task::Translations { did: Some(did), range })
        }
        _ => None,
    }
}

/// The pages of a device-TLB descriptor: one, or as many as the lowest bit that is zero says.
fn sized_range(address: u64, is_sized: bool) -> Option<IovaRange> {
    let page = address >> PAGE_BITS;
    let order = if is_sized { page.trailing_ones().checked_add(1)? } else { 0 };
    let last =
        1_u64.checked_shl(PAGE_BITS.checked_add(order)?).map_or(u64::MAX, |bytes| bytes.saturating_sub(1));
    IovaRange::new(Iova(address & !last), Iova(address | last))
}

/// Where the descriptor at `offset` of a queue is.
pub(super) fn place(base: u64, offset: u64) -> Option<Gpa> {
    base.checked_add(offset).filter(|at| at.is_multiple_of(WORD)).map(Gpa)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(start), Iova(last)).unwrap()
    }

    fn task(low: u64, high: u64) -> Option<Task> {
        decode(low, high, true).ok()?.0
    }

    #[test]
    fn decode_when_pages_are_meant_aligns_the_address_to_the_mask() {
        let page = |high| match task(2 | 3 << 4 | 5 << 16, high) {
            Some(Task::Translations { did: Some(5), range }) => Some(range),
            _ => None,
        };
        assert_eq!(page(0x12_3456_7000), Some(range(0x12_3456_7000, 0x12_3456_7fff)));
        assert_eq!(page(0x1000 | 0x40 | 4), Some(range(0, 0xffff)), "with the hint, too");
        assert_eq!(page(!0xfff | 18), Some(range(!0x3fff_ffff, u64::MAX)));
        assert_eq!(page(19), None, "more than the unit says it can");
    }

    #[test]
    fn decode_when_reserved_bits_are_set_refuses() {
        for (low, high) in [
            (1 | 1 << 4 | 1 << 6, 0),
            (1 | 1 << 4, 1),
            (1, 0),
            (2 | 1 << 4 | 1 << 8, 0),
            (2 | 1 << 4, 0x80),
            (2, 0),
            (3 | 1 << 4, 0),
            (3, 2),
            (5 | 1 << 5, 1),
            (5 | 1 << 16, 0),
            (0, 0),
            (6, 0),
            (7, 0),
            (8, 0),
            (2 | 1 << 4 | 1 << 9, 0),
            (15, 0),
        ] {
            assert!(decode(low, high, false).is_err(), "{low:#x} {high:#x}");
        }
    }

    #[test]
    fn decode_when_a_source_is_meant_masks_its_function() {
        let source = |low: u64| match task(1 | 3 << 4 | low, 0) {
            Some(Task::Contexts(Which::Source { source, mask })) => Some((source, mask)),
            _ => None,
        };
        assert_eq!(source(0x10 << 32), Some((0x10, 0xffff)));
        assert_eq!(source(0x10 << 32 | 1 << 48), Some((0x10, 0xfffb)));
        assert_eq!(source(0x10 << 32 | 3 << 48), Some((0x10, 0xfff8)));
    }

    fn device_tlb_range(high: u64) -> Option<IovaRange> {
        match task(3, high) {
            Some(Task::DeviceTlb { range, .. }) => Some(range),
            _ => None,
        }
    }

    #[test]
    fn sized_range_when_sized_ends_at_the_lowest_zero_bit() {
        assert_eq!(device_tlb_range(0x5000), Some(range(0x5000, 0x5fff)));
        assert_eq!(device_tlb_range(0x4000 | 1), Some(range(0x4000, 0x5fff)));
        assert_eq!(device_tlb_range(0x1_1000 | 1), Some(range(0x1_0000, 0x1_3fff)));
        assert_eq!(device_tlb_range(0x7fff_ffff_ffff_f000 | 1), Some(IovaRange::ALL));
        assert_eq!(device_tlb_range(!0xffe), Some(IovaRange::ALL));
    }
}
