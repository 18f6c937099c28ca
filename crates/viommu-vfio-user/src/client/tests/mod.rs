//! The client against servers that do what they are told: ours, one that writes down what it is given, and hostile ones.

mod device;
mod faults;
mod hostile;
mod mirror;
mod random;
mod recorder;

use std::fs::File;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, memfd_create};
use viommu::{
    Access, Completion, Domain, Endpoint, EndpointConfig, Extent, Gpa, GpaRange, Incident, Interest, Iommu,
    Iova, IovaRange, Mapping, Medium, Subscription, Tables,
};
use viommu_memory::EndpointSpace;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::*;
use recorder::{Fault, Recorder};

const PAGE: u64 = 0x1000;

/// Regions of the guest's memory, in pages: first, count, and where they begin in their file; the last has none.
const REGIONS: [(u64, u64, Option<u64>); 3] = [(0, 16, Some(16)), (16, 16, Some(0)), (64, 16, None)];
/// Pages of read-only memory, in the second region.
const ROM: (u64, u64) = (28, 31);

fn memfd(pages: u64) -> File {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let file = File::from(fd);
    file.set_len(pages * PAGE).unwrap();
    fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    file
}

fn region(first: u64, count: u64, file: Option<u64>) -> GuestRegionMmap<()> {
    let bytes = usize::try_from(count * PAGE).unwrap();
    let mapping = match file {
        Some(at) => MmapRegion::from_file(FileOffset::new(memfd(at + count), at * PAGE), bytes),
        None => MmapRegion::new(bytes),
    };
    GuestRegionMmap::new(mapping.unwrap(), GuestAddress(first * PAGE)).unwrap()
}

fn memory() -> Arc<GuestMemoryMmap<()>> {
    let regions = REGIONS.iter().map(|(first, count, file)| region(*first, *count, *file)).collect();
    Arc::new(GuestMemoryMmap::from_regions(regions).unwrap())
}

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

/// A unit with an endpoint (8) in a domain (1), whose device is behind a server that writes down what it is given.
struct Rig {
    iommu: Iommu,
    endpoint: Endpoint,
    domain: Domain,
    memory: Arc<GuestMemoryMmap<()>>,
    server: Recorder,
    client: Client,
    subscription: Subscription,
    handle: Handle,
    incidents: Arc<Mutex<Vec<Incident>>>,
}

const SOON: Duration = Duration::from_secs(5);
const AT_ONCE: Duration = Duration::from_millis(30);

impl Rig {
    fn new() -> Self {
        Self::with(100, SOON, MirrorOptions::default())
    }

    fn with(windows: u32, limit: Duration, options: MirrorOptions) -> Self {
        let memory = memory();
        let incidents = Arc::new(Mutex::new(Vec::new()));
        let alarm = incidents.clone();
        let extent = |(first, last), medium| Extent { range: gpas(first, last), medium };
        let iommu = Iommu::builder()
            .alarm(move |incident| alarm.lock().unwrap().push(incident.clone()))
            .backing(extent((0, 27), Medium::Ram))
            .backing(extent(ROM, Medium::Rom))
            .backing(extent((64, 79), Medium::Ram))
            .build()
            .unwrap();
        let domain = iommu.create_domain(1, Tables::Owned).unwrap();
        let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
        over(endpoint.attach(1).unwrap());
        let (server, stream) = Recorder::start(windows);
        let view = EndpointSpace::new(endpoint.reader("messages").unwrap(), memory.clone());
        let client = Client::connect(stream, limit, SeenThrough(view)).unwrap();
        let (mirror, handle) = client.mirror(memory.clone(), options);
        let subscription = endpoint.subscribe_mirror(Box::new(mirror), Interest::MIRROR).unwrap();
        Self { iommu, endpoint, domain, memory, server, client, subscription, handle, incidents }
    }

    fn record(&self) -> Vec<Mapping> {
        let mut all = Vec::new();
        self.domain.for_each(IovaRange::ALL, |mapping| {
            all.push(mapping);
            ControlFlow::Continue(())
        });
        all
    }

    /// What the server must have for a page at `gpa`: the file, where in it, and the flags.
    fn expected(&self, gpa: u64, access: Access) -> Option<(u64, u64, u32)> {
        use vm_memory::GuestMemoryBackend as _;
        use vm_memory::GuestMemoryRegion as _;
        let page = gpa / PAGE;
        let allowed = match page {
            0..28 => Access::RW,
            28..32 => Access::READ,
            _ => return None, // nothing there, or no file
        };
        let region = self.memory.find_region(GuestAddress(gpa))?;
        let file = region.file_offset()?;
        let access = access & allowed;
        let offset = file.start() + (gpa - region.start_addr().0);
        (!access.is_empty()).then(|| (fstat(file.file()).unwrap().st_ino, offset, u32::from(access.bits())))
    }

    /// The server has what the record says, page for page, and nothing else.
    #[track_caller]
    fn check(&self) {
        let windows = self.server.windows();
        let mut due = 0;
        for mapping in self.record() {
            for at in (mapping.range.start().0..=mapping.range.last().0).step_by(0x1000) {
                let expected = self.expected(mapping.translate(Iova(at)).0, mapping.access);
                let there = windows.iter().find(|w| (w.address..=w.address + (w.size - 1)).contains(&at));
                let there = there.map(|w| (w.file.unwrap(), w.offset + (at - w.address), w.flags));
                assert_eq!(there, expected, "{at:#x} of {mapping:?}");
                due += if expected.is_some() { PAGE } else { 0 };
            }
        }
        assert_eq!(windows.iter().map(|w| w.size).sum::<u64>(), due, "more is mapped than there should be");
        assert_eq!(self.handle.windows(), windows.len() as u64);
        let audit = self.subscription.audit().unwrap();
        assert!(audit.is_clean(), "{audit:?}");
    }

    /// The device is cut off: the server has closed its end, and has nothing any more. The record is right.
    #[track_caller]
    fn check_fenced(&self) {
        assert!(self.subscription.is_fenced());
        assert!(!self.client.is_open());
        self.server.join();
        assert_eq!(self.server.windows().len(), 0, "the device still reaches something");
        assert!(matches!(self.incidents.lock().unwrap()[..], [Incident::Fenced { .. }]));
    }
}
