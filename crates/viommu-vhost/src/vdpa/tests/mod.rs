//! The mirror over a device in software.

mod fake;
mod faults;
mod mapping;

use std::ops::ControlFlow;

use viommu::{
    Access, Builder, Completion, Domain, Endpoint, EndpointConfig, Extent, Gpa, GpaRange, Incident, Interest,
    Iommu, Medium, Subscription, Tables,
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::spec::{kind, perm};
use fake::{Entry, Fake, RESET};

const PAGE: u64 = 0x1000;

/// Regions of the guest's memory, in pages: first and count. The first two are neighbours.
const REGIONS: [(u64, u64); 3] = [(0, 16), (16, 16), (64, 16)];
/// Pages of read-only memory, in the last region.
const ROM: (u64, u64) = (72, 79);
/// Pages of device registers.
const BAR: (u64, u64) = (256, 263);

const INFO: Info = Info { range: IovaRange::ALL, batches: true, persists: true, address_spaces: 2 };

fn pages(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first * PAGE), Iova(last * PAGE + (PAGE - 1))).unwrap()
}

fn gpas(first: u64, last: u64) -> GpaRange {
    GpaRange::new(Gpa(first * PAGE), Gpa(last * PAGE + (PAGE - 1))).unwrap()
}

fn map_of(first: u64, last: u64, gpa: u64, access: Access) -> Mapping {
    Mapping::over(pages(first, last), Gpa(gpa * PAGE), access).unwrap()
}

fn rw(first: u64, last: u64, gpa: u64) -> Mapping {
    map_of(first, last, gpa, Access::RW)
}

#[track_caller]
fn over(mut done: Completion) {
    assert!(done.is_complete(), "still waits for {:?}", done.blockers());
}

/// A unit with an endpoint (8) in a domain (1) and one (9) in another (2), which are two address spaces of one device.
struct Rig {
    iommu: Iommu,
    domains: [Domain; 2],
    endpoints: [Endpoint; 2],
    subscriptions: [Subscription; 2],
    handles: [Handle; 2],
    memory: Arc<GuestMemoryMmap<()>>,
    fake: Fake,
    incidents: Arc<Mutex<Vec<Incident>>>,
}

fn backed(builder: Builder) -> Builder {
    let extent = |(first, last), medium| Extent { range: gpas(first, last), medium };
    builder
        .backing(extent((0, 31), Medium::Ram))
        .backing(extent((64, 71), Medium::Ram))
        .backing(extent(ROM, Medium::Rom))
        .backing(extent(BAR, Medium::Mmio))
}

impl Rig {
    fn new() -> Self {
        Self::with(INFO, |device| device)
    }

    fn with(info: Info, device: impl FnOnce(Device) -> Device) -> Self {
        let ranges = REGIONS
            .map(|(first, count)| (GuestAddress(first * PAGE), usize::try_from(count * PAGE).unwrap()));
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let fake = Fake::new(info, 64);
        let incidents = Arc::new(Mutex::new(Vec::new()));
        let alarm = incidents.clone();
        let builder = Iommu::builder().alarm(move |incident| alarm.lock().unwrap().push(incident.clone()));
        let iommu = backed(builder).build().unwrap();
        let device = device(Device::over(Box::new(fake.clone()), info).entries(Some(64)));
        let domains = [1, 2].map(|id| iommu.create_domain(id, Tables::Owned).unwrap());
        let endpoints = [(8, 1), (9, 2)].map(|(id, domain)| {
            let endpoint = iommu.add_endpoint(id, EndpointConfig::default()).unwrap();
            over(endpoint.attach(domain).unwrap());
            endpoint
        });
        let mirrors =
            [0, 1].map(|asid| device.mirror(asid.min(info.address_spaces - 1), memory.clone()).unwrap());
        let handles = [0, 1].map(|at: usize| mirrors[at].1.clone());
        let mut mirrors = mirrors.into_iter().map(|(mirror, _)| mirror);
        let subscriptions = endpoints.each_ref().map(|endpoint| {
            endpoint.subscribe_mirror(Box::new(mirrors.next().unwrap()), Interest::MIRROR).unwrap()
        });
        fake.take_calls();
        Self { iommu, domains, endpoints, subscriptions, handles, memory, fake, incidents }
    }

    fn host(&self, page: u64) -> u64 {
        use vm_memory::GuestMemoryBackend as _;
        self.memory.get_host_address(GuestAddress(page * PAGE)).unwrap().addr() as u64
    }

    /// What an address space must have, page for page, by the record and the backing alone.
    fn expected(&self, at: usize) -> Vec<Entry> {
        let backing = self.iommu.backing();
        let mut due = Vec::new();
        if self.endpoints[at].attached().is_none_or(|view| view == viommu::View::Blocked) {
            return due;
        }
        self.domains[at].for_each(IovaRange::ALL, |mapping| {
            for iova in (mapping.range.start().0..=mapping.range.last().0).step_by(0x1000) {
                let gpa = mapping.translate(Iova(iova));
                let Some(extent) = backing.iter().find(|e| e.range.contains(gpa)) else { continue };
                let allowed = match extent.medium {
                    Medium::Ram => Access::RW,
                    Medium::Rom => Access::READ,
                    Medium::Mmio => continue,
                };
                let access = mapping.access & allowed;
                if !access.is_empty() {
                    let read = if access.contains(Access::READ) { perm::READ } else { 0 };
                    let write = if access.contains(Access::WRITE) { perm::WRITE } else { 0 };
                    due.push((iova, iova + 0xfff, self.host(gpa.0 / PAGE), read | write));
                }
            }
            ControlFlow::Continue(())
        });
        due
    }

    /// The device has what the record says, page for page, and nothing else, unless it is cut off.
    #[track_caller]
    fn check(&self) {
        for at in 0..2 {
            let asid = u32::try_from(at).unwrap();
            let entries = self.fake.reached(asid);
            let pages = entries.iter().flat_map(|(first, last, uaddr, perm)| {
                (*first..=*last)
                    .step_by(0x1000)
                    .map(move |iova| (iova, iova + 0xfff, uaddr + (iova - first), *perm))
            });
            let pages: Vec<Entry> = pages.collect();
            if self.handles[at].is_closed() {
                assert_eq!(pages, [], "a device that is cut off still reaches something");
            } else {
                assert_eq!(pages, self.expected(at), "address space {asid}");
                assert_eq!(self.handles[at].entries(), entries.len() as u64);
                assert!(self.subscriptions[at].audit().unwrap().is_clean());
            }
        }
    }

    fn record(&self) -> Vec<Mapping> {
        let mut all = Vec::new();
        self.domains[0].for_each(IovaRange::ALL, |m| {
            all.push(m);
            ControlFlow::Continue(())
        });
        all
    }
}
