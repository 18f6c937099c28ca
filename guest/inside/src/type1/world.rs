//! A record with one endpoint, whose device is behind the kernel's container.

use std::{
    error::Error,
    ops::ControlFlow,
    sync::{Arc, Mutex},
};

use viommu::{
    Access, Completion, Domain, Endpoint, EndpointConfig, Extent, Gpa, GpaRange, Incident, Interest, Iommu,
    Iova, IovaRange, Mapping, Medium, StepError, Subscription, Tables,
};
use viommu_vfio::type1::{Container, Handle};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::{
    PAGE,
    edu::{BYTES, Edu},
};

/// Bytes of a page, as addresses are counted.
pub(crate) const STEP: u64 = PAGE as u64;

/// Regions of the record's memory, in pages: first and count. The first two are neighbours, and one extent of backing.
const REGIONS: [(u64, u64); 3] = [(0, 256), (256, 256), (4096, 64)];

/// The page that the device loads from: its place in memory, and where the device sees it.
pub(crate) const SOURCE: u64 = 4096 + 63;
pub(crate) const SOURCE_AT: u64 = 0x7000;

/// Where in its page a transfer begins.
const OFFSET: u64 = 0x140;

/// What the device writes.
fn stamp() -> [u8; BYTES] {
    std::array::from_fn(|at| u8::try_from(at ^ 0xa5).unwrap_or(0))
}

/// The whole.
pub(crate) struct World {
    pub(crate) iommu: Iommu,
    pub(crate) domain: Domain,
    pub(crate) endpoint: Endpoint,
    pub(crate) subscription: Subscription,
    pub(crate) handle: Handle,
    pub(crate) incidents: Arc<Mutex<Vec<Incident>>>,
    pub(crate) memory: GuestMemoryMmap<()>,
}

/// Pages `first` to `last` of the device's addresses.
pub(crate) fn pages(first: u64, last: u64) -> Result<IovaRange, &'static str> {
    IovaRange::new(Iova(first * STEP), Iova(last * STEP + (STEP - 1))).ok_or("no such range")
}

/// The same at the pages of memory from `target` on.
pub(crate) fn mapping(first: u64, last: u64, target: u64, access: Access) -> Result<Mapping, &'static str> {
    Mapping::over(pages(first, last)?, Gpa(target * STEP), access).ok_or("no such mapping")
}

pub(crate) fn rw(first: u64, last: u64, target: u64) -> Result<Mapping, &'static str> {
    mapping(first, last, target, Access::RW)
}

/// The backing of the last region, which may be taken away.
pub(crate) fn plugged() -> Result<Extent, &'static str> {
    extent(REGIONS[2].0, REGIONS[2].0 + REGIONS[2].1 - 2)
}

fn extent(first: u64, last: u64) -> Result<Extent, &'static str> {
    let range = GpaRange::new(Gpa(first * STEP), Gpa(last * STEP + (STEP - 1))).ok_or("no such range")?;
    Ok(Extent { range, medium: Medium::Ram })
}

/// All of it.
pub(crate) fn backing() -> Result<[Extent; 3], &'static str> {
    Ok([extent(0, 511)?, plugged()?, extent(SOURCE, SOURCE)?])
}

/// The memory of a record, with what the device loads in its place.
///
/// # Errors
///
/// If there is none left.
pub(crate) fn memory() -> Result<GuestMemoryMmap<()>, Box<dyn Error>> {
    loaded(GuestMemoryMmap::from_ranges(&ranges())?)
}

/// The same, each region of a memfd.
///
/// # Errors
///
/// As [`memory`].
pub(crate) fn memory_of_files() -> Result<GuestMemoryMmap<()>, Box<dyn Error>> {
    let mut regions = Vec::new();
    for (start, bytes) in ranges() {
        let file = crate::memory::memfd(bytes as u64)?;
        regions.push((start, bytes, Some(FileOffset::new(file, 0))));
    }
    loaded(GuestMemoryMmap::from_ranges_with_files(regions)?)
}

fn ranges() -> [(GuestAddress, usize); 3] {
    REGIONS.map(|(first, count)| (GuestAddress(first * STEP), usize::try_from(count * STEP).unwrap_or(0)))
}

fn loaded(memory: GuestMemoryMmap<()>) -> Result<GuestMemoryMmap<()>, Box<dyn Error>> {
    memory.write_slice(&stamp(), GuestAddress(SOURCE * STEP + OFFSET))?;
    Ok(memory)
}

/// Where the device loads from.
pub(crate) fn load() -> u64 {
    SOURCE_AT * STEP + OFFSET
}

/// The address of a transfer to a page.
pub(crate) fn target(page: u64) -> u64 {
    page * STEP + OFFSET
}

/// It is over, at once: the kernel's answers are.
pub(crate) fn over(mut done: Completion) -> Result<(), Box<dyn Error>> {
    if done.is_complete() { Ok(()) } else { Err(format!("still waits for {:?}", done.blockers()).into()) }
}

impl World {
    /// Over a container; its device sees the source's page.
    ///
    /// # Errors
    ///
    /// If it cannot be mapped.
    pub(crate) fn new(container: Container) -> Result<World, Box<dyn Error>> {
        let memory = memory()?;
        let incidents = Arc::new(Mutex::new(Vec::new()));
        let alarm = incidents.clone();
        let builder = Iommu::builder()
            .table_bytes(32 << 20) // the machine is small
            .alarm(move |incident| {
                if let Ok(mut incidents) = alarm.lock() {
                    incidents.push(incident.clone());
                }
            });
        let iommu =
            backing()?.into_iter().fold(builder, |builder, extent| builder.backing(extent)).build()?;
        let endpoint = iommu.add_endpoint(32, EndpointConfig::default())?;
        let domain = iommu.create_domain(1, Tables::Owned)?;
        endpoint.attach(1)?.wait()?;
        let (mirror, handle) = container.mirror(Arc::new(memory.clone()));
        let subscription = endpoint.subscribe_mirror(Box::new(mirror), Interest::MIRROR)?;
        over(domain.map(rw(SOURCE_AT, SOURCE_AT, SOURCE)?)?)?;
        Ok(World { iommu, domain, endpoint, subscription, handle, incidents, memory })
    }

    /// Has the device fill its buffer with what [`World::landed`] looks for.
    pub(crate) fn load(&self, edu: Edu<'_>) -> Result<(), Box<dyn Error>> {
        edu.load(load())
    }

    /// The address of a transfer to a page.
    pub(crate) fn target(page: u64) -> u64 {
        target(page)
    }

    /// Where the device's transfer to `page` must arrive: a page of memory, or nowhere.
    pub(crate) fn expected(&self, page: u64) -> Result<Option<u64>, Box<dyn Error>> {
        let mut reader = self.endpoint.reader("probe").ok_or("no such endpoint")?;
        let found = reader.enter().probe(Iova(World::target(page)), Access::WRITE);
        Ok(found.ok().map(|translation| translation.gpa.0 / STEP))
    }

    /// As the function of this name.
    pub(crate) fn landed(&self) -> Result<Vec<u64>, Box<dyn Error>> {
        landed(&self.memory)
    }

    /// Has the device write to a page, and looks where it arrives.
    ///
    /// # Errors
    ///
    /// If that is not where the record says.
    pub(crate) fn probe(&self, edu: Edu<'_>, page: u64, what: &str) -> Result<(), Box<dyn Error>> {
        let expected = self.expected(page)?;
        edu.store(World::target(page))?;
        self.compare(expected, page, what)
    }

    /// Looks where a transfer to `page` has arrived.
    ///
    /// # Errors
    ///
    /// As [`World::probe`].
    pub(crate) fn compare(&self, expected: Option<u64>, page: u64, what: &str) -> Result<(), Box<dyn Error>> {
        let landed = self.landed()?;
        if landed != Vec::from_iter(expected) {
            return Err(format!(
                "{what}: a write to page {page:#x} arrived at the pages {landed:x?} of memory, not at {expected:x?}"
            )
            .into());
        }
        Ok(())
    }

    /// The mirror has what the record says, and the kernel as many entries as the mirror.
    ///
    /// # Errors
    ///
    /// If not.
    pub(crate) fn audit(&self, left: Option<u32>, limit: Option<u32>) -> Result<(), Box<dyn Error>> {
        let audit = self.subscription.audit().ok_or("the mirror is cut off")?;
        if !audit.is_clean() {
            return Err(format!("the mirror differs from the record: {audit:?}").into());
        }
        let taken = limit.zip(left).map(|(limit, left)| u64::from(limit - left));
        if taken != Some(self.handle.entries()) {
            return Err(
                format!("the kernel has {taken:?} entries, the mirror {}", self.handle.entries()).into()
            );
        }
        Ok(())
    }

    /// The record.
    pub(crate) fn record(&self) -> Vec<Mapping> {
        let mut all = Vec::new();
        self.domain.for_each(IovaRange::ALL, |mapping| {
            all.push(mapping);
            ControlFlow::Continue(())
        });
        all
    }
}

/// The pages of `memory` to which the device has written, which are as before then.
///
/// # Errors
///
/// If something else has been written.
pub(crate) fn landed(memory: &GuestMemoryMmap<()>) -> Result<Vec<u64>, Box<dyn Error>> {
    let mut landed = Vec::new();
    let mut found = [0; BYTES];
    for page in REGIONS.iter().flat_map(|(first, count)| *first..first + count).filter(|page| *page != SOURCE)
    {
        let at = GuestAddress(page * STEP + OFFSET);
        memory.read_slice(&mut found, at)?;
        if found != [0; BYTES] {
            if found != stamp() {
                return Err(format!("something else is in page {page:#x}: {found:x?}").into());
            }
            landed.push(page);
            memory.write_slice(&[0; BYTES], at)?;
        }
    }
    Ok(landed)
}

/// The words of a step's refusal.
///
/// # Errors
///
/// If it was none.
pub(crate) fn refusal(outcome: Result<Completion, StepError>) -> Result<String, Box<dyn Error>> {
    match outcome {
        Ok(_) => Err("a step that must be refused was not".into()),
        Err(error) => {
            let words = error.to_string();
            over(error.completion)?;
            Ok(words)
        }
    }
}
