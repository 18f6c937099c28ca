//! A bus with an endpoint, and who follows it.

use viommu::fuzzing::recording::{Event, Handle, RecordingCache, RecordingMirror};
use viommu::subscribe::Reach;
use viommu::{
    Access, Builder, Endpoint, EndpointConfig, Gpa, Interest, Iommu, Iova, IovaRange, Mapping, Subscription,
};
use viommu_spapr::spec::Code;
use viommu_spapr::{Answer, Bus, BusConfig, Liobn, Merge, Pending, Spapr};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(crate) const RAM: u64 = 64 << 20;
pub(crate) const LIOBN: u32 = 0x8000_0000;
pub(crate) const DYNAMIC: u64 = 0x0800_0000_0000_0000;
pub(crate) const LIST: u64 = 0x10_0000;
/// Two pages of memory.
pub(crate) const A: u64 = 0x20_0000;
pub(crate) const B: u64 = 0x30_0000;
pub(crate) const RO: u64 = 1;
pub(crate) const WO: u64 = 2;
pub(crate) const RW: u64 = 3;

pub(crate) struct Rig {
    pub(crate) spapr: Spapr,
    pub(crate) bus: Bus,
    pub(crate) liobn: Liobn,
    pub(crate) endpoint: Endpoint,
    pub(crate) memory: GuestMemoryMmap,
    /// Who drops one, leaves.
    subscriptions: Vec<Subscription>,
}

pub(crate) fn builder() -> Builder {
    Iommu::builder().ram(0, RAM)
}

/// What a type1 container does: an unmap and a map, for a change.
pub(crate) fn type1() -> Reach {
    Reach::default()
}

/// What replaces in place.
pub(crate) fn replacing() -> Reach {
    Reach { replace: true, ..Reach::default() }
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with(builder(), Merge::Never)
    }

    pub(crate) fn with(builder: Builder, merge: Merge) -> Self {
        let spapr = Spapr::new(builder, merge).unwrap();
        let bus = spapr.add_bus(1, BusConfig::host_bridge(0)).unwrap();
        let (endpoint, done) = bus.add_endpoint(8, EndpointConfig::default()).unwrap();
        done.wait().unwrap();
        let liobn = spapr.liobn(LIOBN).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        Self { spapr, bus, liobn, endpoint, memory, subscriptions: Vec::new() }
    }

    pub(crate) fn mirror(&mut self, reach: Reach) -> Handle {
        let (mirror, handle) = RecordingMirror::new(reach);
        self.subscriptions.push(self.endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap());
        handle.take();
        handle
    }

    /// A cache that holds what there is at these pages.
    pub(crate) fn cache(&mut self, pages: &[u64]) -> Handle {
        let (cache, handle) = RecordingCache::new();
        let subscription = self.endpoint.subscribe_cache(cache, Interest::CACHE).unwrap();
        for page in pages {
            for access in [Access::READ, Access::WRITE] {
                // What is not mapped is not filled.
                let _ = subscription.fill(Iova(*page), access);
            }
        }
        self.subscriptions.push(subscription);
        handle.take();
        handle
    }

    pub(crate) fn put(&self, ioba: u64, tce: u64) -> Code {
        code(self.liobn.put_tce(ioba, tce))
    }

    pub(crate) fn get(&self, ioba: u64) -> u64 {
        let Answer { code, value } = self.liobn.get_tce(ioba).wait().unwrap();
        assert_eq!(code, Code::Success);
        value
    }

    pub(crate) fn stuff(&self, ioba: u64, count: u64) -> Code {
        code(self.liobn.stuff_tce(ioba, 0, count))
    }

    pub(crate) fn write_list(&self, tces: &[u64]) {
        for (at, tce) in (0_u64..).zip(tces) {
            self.memory.write_slice(&tce.to_be_bytes(), GuestAddress(LIST + 8 * at)).unwrap();
        }
    }

    pub(crate) fn put_list(&self, ioba: u64, tces: &[u64]) -> Code {
        self.write_list(tces);
        code(self.liobn.put_tce_indirect(ioba, LIST, tces.len() as u64, &self.memory))
    }

    /// All copies hold what the record says.
    pub(crate) fn check(&self) {
        for subscription in &self.subscriptions {
            let audit = subscription.audit().unwrap();
            assert!(audit.is_clean(), "{audit:?}");
        }
        assert_eq!(self.spapr.iommu().outstanding(), 0);
    }
}

pub(crate) fn code(pending: Pending<Answer>) -> Code {
    pending.wait().unwrap().code
}

pub(crate) fn range(start: u64, bytes: u64) -> IovaRange {
    IovaRange::from_len(Iova(start), bytes).unwrap()
}

/// A page of 4 KiB.
pub(crate) fn page(ioba: u64, tce: u64) -> Mapping {
    Mapping::new(Iova(ioba), 0x1000, Gpa(tce & !3), access(tce)).unwrap()
}

pub(crate) fn access(tce: u64) -> Access {
    Access::from_bits_truncate((tce & 3) as u8)
}

pub(crate) fn map(ioba: u64, tce: u64) -> Event {
    Event::Map(page(ioba, tce))
}

pub(crate) fn unmap(ioba: u64, bytes: u64) -> Event {
    Event::Unmap(range(ioba, bytes))
}

pub(crate) fn invalidate(ioba: u64, bytes: u64) -> Event {
    Event::Invalidate(range(ioba, bytes))
}
