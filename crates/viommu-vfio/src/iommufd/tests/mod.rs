//! The binding over an iommufd in software.

mod attach;
mod dirty;
mod fake;
mod faults;
mod mapping;

use std::ops::ControlFlow;

use viommu::{
    Access, BindingHandle, Completion, Domain, Endpoint, EndpointConfig, Extent, Gpa, GpaRange, Incident,
    Interest, Iommu, Iova, Medium, Subscription, Tables,
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::software::{self, Config, SoftwareMirror};
use fake::{Area, Call, Fake, Kind, Source};

const PAGE: u64 = 0x1000;

/// Regions of the guest's memory, in pages: first and count. The first two are neighbours.
const REGIONS: [(u64, u64); 3] = [(0, 16), (16, 16), (64, 16)];
/// Pages of read-only memory, in the last region.
const ROM: (u64, u64) = (72, 79);
/// Pages of device registers.
const BAR: (u64, u64) = (256, 263);

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

/// What a rig's devices are like.
#[derive(Clone, Copy)]
struct Kinds {
    /// IOMMUs of the two devices.
    kinds: [u32; 2],
    tracks: [bool; 2],
    groups: [Option<u32>; 2],
}

impl Default for Kinds {
    fn default() -> Self {
        Self { kinds: [0, 0], tracks: [true, true], groups: [None, None] }
    }
}

/// A unit with two bound endpoints in the first of two domains, and a software mirror at that domain.
struct Rig {
    iommu: Iommu,
    domains: [Domain; 2],
    endpoints: [Endpoint; 2],
    /// The kernel's numbers of their devices.
    devices: [u32; 2],
    binding: BindingHandle,
    handle: Handle,
    memory: Arc<GuestMemoryMmap<()>>,
    fake: Fake,
    other: Subscription,
    incidents: Arc<Mutex<Vec<Incident>>>,
}

impl Rig {
    fn new() -> Self {
        Self::with(Kinds::default())
    }

    fn with(kinds: Kinds) -> Self {
        let ranges = REGIONS
            .map(|(first, count)| (GuestAddress(first * PAGE), usize::try_from(count * PAGE).unwrap()));
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let fake = Fake::new();
        let incidents = Arc::new(Mutex::new(Vec::new()));
        let alarm = incidents.clone();
        let extent = |(first, last), medium| Extent { range: gpas(first, last), medium };
        let iommu = Iommu::builder()
            .alarm(move |incident| alarm.lock().unwrap().push(incident.clone()))
            .backing(extent((0, 31), Medium::Ram))
            .backing(extent((64, 71), Medium::Ram))
            .backing(extent(ROM, Medium::Rom))
            .backing(extent(BAR, Medium::Mmio))
            .build()
            .unwrap();
        let domains = [1, 2].map(|id| iommu.create_domain(id, Tables::Owned).unwrap());
        let (binding, handle) = Iommufd::over(Arc::new(fake.clone())).binding(memory.clone());
        let binding = iommu.add_binding(Box::new(binding));
        let mut numbers = [0; 2];
        let endpoints = [0, 1].map(|at: usize| {
            let endpoint =
                iommu.add_endpoint(8 + u32::try_from(at).unwrap(), EndpointConfig::default()).unwrap();
            let device = fake.device(kinds.kinds[at], kinds.tracks[at], kinds.groups[at]);
            numbers[at] = device.id();
            handle.add(endpoint.id(), device).unwrap();
            over(endpoint.bind_with(&binding).unwrap());
            endpoint
        });
        for endpoint in &endpoints {
            over(endpoint.attach(1).unwrap());
        }
        let software = Arc::new(Mutex::new(software::Container::new(Config::default()).unwrap()));
        let other = SoftwareMirror::new(software).mmio(true);
        let other = iommu.subscribe_mirror(Space::Domain(1), Box::new(other), Interest::MIRROR).unwrap();
        fake.take_calls();
        Self { iommu, domains, endpoints, devices: numbers, binding, handle, memory, fake, other, incidents }
    }

    /// Where a page lies in this process.
    fn host(&self, page: u64) -> u64 {
        use vm_memory::GuestMemoryBackend as _;
        self.memory.get_host_address(GuestAddress(page * PAGE)).unwrap().addr() as u64
    }

    /// What the domain's devices must reach, page for page, by the record and the backing alone.
    fn expected(&self, domain: &Domain) -> Vec<(u64, u64, Access)> {
        let backing = self.iommu.backing();
        let mut due = Vec::new();
        domain.for_each(IovaRange::ALL, |mapping| {
            for at in (mapping.range.start().0..=mapping.range.last().0).step_by(0x1000) {
                let gpa = mapping.translate(Iova(at));
                let Some(extent) = backing.iter().find(|e| e.range.contains(gpa)) else { continue };
                let allowed = match extent.medium {
                    Medium::Ram => Access::RW,
                    Medium::Rom => Access::READ,
                    Medium::Mmio => continue,
                };
                let access = mapping.access & allowed;
                if !access.is_empty() {
                    due.push((at, self.host(gpa.0 / PAGE), access));
                }
            }
            ControlFlow::Continue(())
        });
        due
    }

    /// What a device reaches, page for page.
    fn reached(&self, device: usize) -> Vec<(u64, u64, Access)> {
        let page = |area: &Area, at: u64| match area.source {
            Source::Address(vaddr) => (at, vaddr + (at - area.range.start().0), area.access),
            Source::File(_) => panic!("mapped by its file"),
        };
        let areas = self.fake.reached(self.devices[device]);
        let pages = areas.iter().flat_map(|area| {
            (area.range.start().0..=area.range.last().0).step_by(0x1000).map(move |at| page(area, at))
        });
        pages.collect()
    }

    /// Each device reaches what the record says, and nothing else; the other mirror is right.
    #[track_caller]
    fn check(&self) {
        for (at, endpoint) in self.endpoints.iter().enumerate() {
            let expected = match endpoint.view() {
                Some(viommu::View::Domain(id)) => {
                    self.expected(&self.domains[usize::try_from(id).unwrap() - 1])
                }
                Some(viommu::View::Identity) => self.expected(&self.iommu.identity()),
                _ => Vec::new(),
            };
            if endpoint.is_fenced() {
                assert_eq!(self.reached(at), [], "a device that is cut off still reaches something");
            } else {
                assert_eq!(self.reached(at), expected, "device {at}");
            }
        }
        self.check_other();
    }

    #[track_caller]
    fn check_other(&self) {
        assert!(!self.other.is_fenced());
        assert!(self.other.audit().unwrap().is_clean());
    }

    #[track_caller]
    fn check_fenced(&self) {
        assert!(self.endpoints.iter().any(Endpoint::is_fenced));
        self.check();
        let incidents = self.incidents.lock().unwrap();
        assert!(incidents.iter().any(|i| matches!(i, Incident::Fenced { .. })), "{incidents:?}");
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
