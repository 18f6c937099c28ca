// What the examples of coming-from-qemu.md share: subscribers that write down what they are told, and a small machine.

use std::sync::{Arc, Mutex};

use viommu::subscribe::{Cache, FenceFailed, Mirror, Observer, Reach, RefusalKind, Refused, Unmapped};
use viommu::{
    Access, Ack, Change, Domain, Endpoint, EndpointConfig, Gpa, Iommu, Iova, IovaRange, Mapping, Space,
    Tables,
};

/// Lines that subscribers write and an example reads.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn note(&self, line: String) {
        self.0.lock().unwrap().push(line);
    }

    /// What was written since the last call.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

/// A mirror: keeps a full copy, as VFIO's container does. Refuses all but the first `room` extents.
pub struct Copy {
    pub log: Log,
    pub room: usize,
    held: Vec<Mapping>,
}

impl Mirror for Copy {
    fn reach(&self) -> Reach {
        Reach::default()
    }

    fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        if self.held.len() == self.room {
            return Err(Refused::new(RefusalKind::Resources, "full"));
        }
        self.log.note(format!("map {} to {}", extent.range, extent.gpa));
        self.held.push(*extent);
        Ok(Ack::Done)
    }

    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        self.log.note(format!("unmap {range}"));
        let gone = self.held.extract_if(.., |m| range.covers(m.range));
        Ok(Unmapped::done(gone.map(|m| m.range.bytes()).sum()))
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        self.log.note("fence".into());
        Ok(())
    }

    fn held(&self) -> Vec<Mapping> {
        self.held.clone()
    }
}

/// A cache: keeps what it asked for, as vhost does.
pub struct Tlb(pub Log);

impl Cache for Tlb {
    fn install(&mut self, entry: &Mapping) {
        self.0.note(format!("install {} to {}", entry.range, entry.gpa));
    }

    fn invalidate(&mut self, range: IovaRange) -> Ack {
        self.0.note(format!("invalidate {range}"));
        Ack::Done
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        Ok(())
    }
}

/// An observer: looks on.
pub struct Watch(pub Log);

impl Observer for Watch {
    fn changed(&mut self, _space: Space, change: &Change) {
        let gpa = |m: Option<&Mapping>| m.map_or("nothing".into(), |m| m.gpa.to_string());
        self.0.note(format!("{}: {} becomes {}", change.range(), gpa(change.before()), gpa(change.after())));
    }
}

pub fn copy(log: &Log) -> Box<Copy> {
    Box::new(Copy { log: log.clone(), room: usize::MAX, held: Vec::new() })
}

pub fn tlb(log: &Log) -> Box<Tlb> {
    Box::new(Tlb(log.clone()))
}

pub fn watch(log: &Log) -> Box<Watch> {
    Box::new(Watch(log.clone()))
}

/// One page that may be read and written.
pub fn page(iova: u64, gpa: u64) -> Mapping {
    Mapping::new(Iova(iova), 0x1000, Gpa(gpa), Access::RW).unwrap()
}

/// 1 GiB of RAM, and endpoint 8 in domain 1, which is empty.
pub fn machine() -> (Iommu, Endpoint, Domain) {
    let iommu = Iommu::builder().ram(0, 1 << 30).build().unwrap();
    let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    endpoint.attach(1).unwrap().wait().unwrap();
    (iommu, endpoint, domain)
}
