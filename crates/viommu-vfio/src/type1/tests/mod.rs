//! The mirror over a kernel that is the software container, with errors put in.

mod dirty;
mod faults;
mod fencing;
mod mapping;
mod random;

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard};

use viommu::{
    Access, Builder, Completion, Domain, Endpoint, EndpointConfig, Extent, Gpa, GpaRange, Incident, Interest,
    Iommu, Iova, IovaRange, Mapping, Medium, Subscription, Tables,
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::software::{
    self, Bitmap, Config, HostRange, MapDma, Reached, SoftwareMirror, UnmapDma, UnmapFlags,
};

const PAGE: u64 = 0x1000;

/// A call that came to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Map(MapDma),
    Unmap(UnmapDma),
    Track(bool),
    Dirty(u64, u64),
}

/// Which kind of call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Map,
    Unmap,
    /// The unmap of everything, by which a fence is made.
    UnmapAll,
    Dirty,
}

/// A kernel in software.
#[derive(Clone)]
struct Fake(Arc<Mutex<FakeState>>);

struct FakeState {
    container: software::Container,
    calls: Vec<Call>,
    /// Calls of this kind fail, after so many that do not.
    faults: Vec<(Kind, usize, Errno)>,
    /// Just one call of each kind then: later ones succeed.
    once: bool,
    unmap_all: bool,
    tracks: bool,
}

impl Fake {
    fn new(config: Config) -> Self {
        let container = software::Container::new(config).unwrap();
        let (calls, faults) = (Vec::new(), Vec::new());
        Self(Arc::new(Mutex::new(FakeState {
            container,
            calls,
            faults,
            once: false,
            unmap_all: true,
            tracks: true,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, FakeState> {
        self.0.lock().unwrap()
    }

    fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.lock().calls)
    }

    /// Calls of `kind` fail from the one after `good` on, until [`Fake::heal`].
    fn fail(&self, kind: Kind, good: usize, errno: Errno) {
        self.lock().faults.push((kind, good, errno));
    }

    fn heal(&self) {
        let mut fake = self.lock();
        fake.faults.clear();
        fake.once = false;
    }

    fn maps(&self) -> usize {
        self.lock().container.len()
    }
}

impl FakeState {
    fn note(&mut self, call: Call, kind: Kind) -> Result<(), Errno> {
        self.calls.push(call);
        let Some(at) = self.faults.iter().position(|(which, ..)| *which == kind) else { return Ok(()) };
        let (_, good, errno) = &mut self.faults[at];
        if let Some(left) = good.checked_sub(1) {
            *good = left;
            return Ok(());
        }
        let errno = *errno;
        if self.once {
            self.faults.remove(at);
        }
        Err(errno)
    }
}

impl Kernel for Fake {
    fn info(&mut self) -> Result<Info, Errno> {
        let fake = self.lock();
        let info = fake.container.info()?;
        let (page_size, max_bitmap_bytes) = (info.dirty_pgsize, info.max_dirty_bitmap_size);
        Ok(Info {
            page_sizes: info.pgsizes,
            apertures: if info.iova_ranges.is_empty() { vec![IovaRange::ALL] } else { info.iova_ranges },
            entries: Some(info.dma_avail),
            dirty: fake.tracks.then_some(DirtyTracking { page_size, max_bitmap_bytes }),
            unmap_all: fake.unmap_all,
        })
    }

    fn map(&mut self, map: &MapDma) -> Result<(), Errno> {
        let mut fake = self.lock();
        fake.note(Call::Map(*map), Kind::Map)?;
        fake.container.map_dma(*map)
    }

    fn unmap(&mut self, unmap: &UnmapDma, bitmap: Option<&mut Bitmap>) -> Result<u64, Errno> {
        let mut fake = self.lock();
        let all = unmap.flags.contains(UnmapFlags::ALL);
        if all && !fake.unmap_all {
            return Err(Errno::EINVAL);
        }
        fake.note(Call::Unmap(*unmap), if all { Kind::UnmapAll } else { Kind::Unmap })?;
        fake.container.unmap_dma(*unmap, bitmap)
    }

    fn track(&mut self, on: bool) -> Result<(), Errno> {
        let mut fake = self.lock();
        fake.note(Call::Track(on), Kind::Dirty)?;
        if on { fake.container.dirty_start() } else { fake.container.dirty_stop() }
    }

    fn dirty(&mut self, iova: u64, size: u64, bitmap: &mut Bitmap) -> Result<(), Errno> {
        let mut fake = self.lock();
        fake.note(Call::Dirty(iova, size), Kind::Dirty)?;
        fake.container.dirty_bitmap(iova, size, bitmap)
    }
}

/// Regions of the guest's memory, in pages: first and count. The first two are neighbours.
const REGIONS: [(u64, u64); 3] = [(0, 16), (16, 16), (64, 16)];
/// Pages of read-only memory, in the last region.
const ROM: (u64, u64) = (72, 79);
/// Pages of device registers, which this process has mapped.
const BAR: (u64, u64) = (256, 263);
/// Pages of device registers that it has not.
const FAR_BAR: (u64, u64) = (512, 519);

fn memory_of(regions: &[(u64, u64)]) -> Arc<GuestMemoryMmap<()>> {
    let ranges: Vec<_> = regions
        .iter()
        .map(|(first, count)| (GuestAddress(first * PAGE), usize::try_from(count * PAGE).unwrap()))
        .collect();
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

fn host_address(memory: &GuestMemoryMmap<()>, gpa: u64) -> Option<u64> {
    use vm_memory::GuestMemoryBackend as _;
    Some(memory.get_host_address(GuestAddress(gpa)).ok()?.addr() as u64)
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

/// A unit with an endpoint (8) in a domain (1), our mirror at the endpoint, and a software one at the domain.
struct Rig {
    iommu: Iommu,
    endpoint: Endpoint,
    domain: Domain,
    memory: Arc<GuestMemoryMmap<()>>,
    bars: Arc<GuestMemoryMmap<()>>,
    fake: Fake,
    subscription: Subscription,
    handle: Handle,
    /// Another that listens, and that nothing goes wrong at.
    other: Option<Subscription>,
    incidents: Arc<Mutex<Vec<Incident>>>,
}

/// The backing: the first two regions of memory are one extent of it.
fn backed(builder: Builder) -> Builder {
    let extent = |(first, last), medium| Extent { range: gpas(first, last), medium };
    builder
        .backing(extent((0, 31), Medium::Ram))
        .backing(extent((64, 71), Medium::Ram))
        .backing(extent(ROM, Medium::Rom))
        .backing(extent(BAR, Medium::Mmio))
        .backing(extent(FAR_BAR, Medium::Mmio))
}

/// The host's memory is what the guest's regions are.
fn host_memory(memories: &[&GuestMemoryMmap<()>]) -> Vec<HostRange> {
    use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};
    let regions = memories.iter().flat_map(|memory| memory.iter());
    let range = |region: &vm_memory::GuestRegionMmap<()>| {
        let start = region.as_ptr().addr() as u64;
        HostRange { start, last: start + (region.len() - 1), writable: true }
    };
    regions.map(range).collect()
}

fn container_over(fake: &Fake) -> Container {
    Container::over(Box::new(fake.clone())).unwrap()
}

impl Rig {
    fn new() -> Self {
        Self::with(|config| config, |container| container)
    }

    fn with(config: impl FnOnce(Config) -> Config, container: impl FnOnce(Container) -> Container) -> Self {
        let memory = memory_of(&REGIONS);
        let bars = memory_of(&[(BAR.0, BAR.1 - BAR.0 + 1)]);
        let host = host_memory(&[&memory, &bars]);
        let fake = Fake::new(config(Config { memory: Some(host), ..Config::x86_host() }));
        let incidents = Arc::new(Mutex::new(Vec::new()));
        let alarm = incidents.clone();
        let builder = Iommu::builder().alarm(move |incident| alarm.lock().unwrap().push(incident.clone()));
        let iommu = backed(builder).build().unwrap();
        let domain = iommu.create_domain(1, Tables::Owned).unwrap();
        let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
        over(endpoint.attach(1).unwrap());
        let container = container(container_over(&fake).registers(bars.clone()));
        let (mirror, handle) = container.mirror(memory.clone());
        let subscription = endpoint.subscribe_mirror(Box::new(mirror), Interest::MIRROR).unwrap();
        let software = Arc::new(Mutex::new(software::Container::new(Config::default()).unwrap()));
        let other = SoftwareMirror::new(software).mmio(true);
        let other = iommu.subscribe_mirror(domain.space(), Box::new(other), Interest::MIRROR).unwrap();
        Self {
            iommu,
            endpoint,
            domain,
            memory,
            bars,
            fake,
            subscription,
            handle,
            other: Some(other),
            incidents,
        }
    }

    /// What the device must reach of `mapping`'s page at `iova`, by the record and the backing alone.
    fn expected(&self, mapping: &Mapping, iova: Iova) -> Option<(u64, Access)> {
        let gpa = mapping.translate(iova);
        let extent = self.iommu.backing().into_iter().find(|e| e.range.contains(gpa))?;
        let vaddr = match extent.medium {
            Medium::Mmio => host_address(&self.bars, gpa.0)?,
            Medium::Ram | Medium::Rom => host_address(&self.memory, gpa.0)?,
        };
        let allowed = if extent.medium == Medium::Rom { Access::READ } else { Access::RW };
        let access = mapping.access & allowed;
        (!access.is_empty()).then_some((vaddr, access))
    }

    /// The container has what the record says, page for page, and nothing else.
    #[track_caller]
    fn check(&self) {
        let mut due = 0;
        let fake = self.fake.lock();
        self.domain.for_each(IovaRange::ALL, |mapping| {
            for at in (mapping.range.start().0..=mapping.range.last().0).step_by(0x1000) {
                let iova = Iova(at);
                let Some((vaddr, access)) = self.expected(&mapping, iova) else { continue };
                due += PAGE;
                for wanted in [Access::READ, Access::WRITE] {
                    let reached = fake.container.lookup(iova, wanted);
                    let right = if access.contains(wanted) { Reached::Host(vaddr) } else { Reached::Denied };
                    assert_eq!(reached, right, "{iova} of {mapping:?}");
                }
            }
            ControlFlow::Continue(())
        });
        let held: u128 = fake.container.iter().map(|dma| dma.range.bytes()).sum();
        assert_eq!(held, due.into(), "more is mapped than there should be");
        assert_eq!(self.handle.entries(), fake.container.len() as u64);
        drop(fake);
        self.check_audits();
    }

    #[track_caller]
    fn check_audits(&self) {
        for subscription in [&self.subscription].into_iter().chain(&self.other) {
            if let Some(audit) = subscription.audit() {
                assert!(audit.is_clean(), "{audit:?}");
            }
        }
        assert!(self.other.iter().all(|other| !other.is_fenced()));
    }

    /// The device is cut off: nothing is mapped any more. The others are right.
    #[track_caller]
    fn check_fenced(&self) {
        assert!(self.subscription.is_fenced());
        assert_eq!(self.fake.maps(), 0, "the device still reaches something");
        self.check_audits();
        let incidents = self.incidents.lock().unwrap();
        assert!(incidents.iter().any(|i| matches!(i, Incident::Fenced { .. })), "{incidents:?}");
    }

    fn record(&self) -> Vec<Mapping> {
        let mut all = Vec::new();
        self.domain.for_each(IovaRange::ALL, |m| {
            all.push(m);
            ControlFlow::Continue(())
        });
        all
    }
}

/// A call that removed nothing but this.
fn plain_unmap(range: IovaRange) -> Call {
    let size = u64::try_from(range.bytes()).unwrap();
    Call::Unmap(UnmapDma { flags: UnmapFlags::empty(), iova: range.start().0, size })
}
