//! What an event costs on its way to a consumer's host, without the host.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use viommu::{Domain, EndpointConfig, Interest, Iommu, Space, Tables};
use viommu_vfio::{iommufd::Iommufd, type1::Container};
use viommu_vhost::vdpa::{DEFAULT_ENTRIES, Device};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::clock::{Cpu, per_call};
use crate::load::{Effort, PAGE, Random};
use crate::ours::{map, unmap};
use crate::work::Figures;

/// Bytes of the guest's memory, in two regions.
const MEMORY: u64 = 1 << 30;

/// Addresses of the device's that are used: pages that do not touch.
pub(super) fn iova(page: u64) -> u64 {
    (1 << 32) + page * 2 * PAGE
}

/// The number of a random one of `count` (a power of two) pages.
pub(super) fn any(random: &mut Random, count: u64) -> u64 {
    (random.next() >> 20) & (count - 1)
}

pub(super) fn gpa(page: u64) -> u64 {
    page * 7 % (MEMORY / PAGE) * PAGE
}

/// A mirror in its place: what holds it there, and how many entries its host has.
struct Seated {
    leave: Box<dyn FnOnce() -> anyhow::Result<()>>,
    entries: Box<dyn Fn() -> u64>,
}

pub(super) type Memory = Arc<GuestMemoryMmap<()>>;

/// Memory, and domain 1 with so many pages of it.
pub(super) fn filled(count: u64) -> anyhow::Result<(Memory, Iommu, Domain)> {
    let half = usize::try_from(MEMORY / 2)?;
    let memory = [(GuestAddress(0), half), (GuestAddress(MEMORY / 2), half)];
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&memory)?);
    let iommu = Iommu::builder().ram(0, MEMORY / 2).ram(MEMORY / 2, MEMORY / 2).build()?;
    let domain = iommu.create_domain(1, Tables::Owned)?;
    (0..count)
        .try_for_each(|page| map(&domain, iova(page), PAGE, gpa(page)).then_some(()))
        .context("a map")?;
    Ok((memory, iommu, domain))
}

/// Nanoseconds of a pair and of a replayed mapping, through the record and a mirror that `seat` puts at domain 1, with a host
/// that does nothing.
fn measure(
    effort: Effort,
    count: u64,
    seat: impl Fn(&Iommu, Memory) -> anyhow::Result<Seated>,
) -> anyhow::Result<Figures> {
    let (memory, iommu, domain) = filled(count)?;
    let mut figures = Figures::new();
    for _ in 0..effort.rounds() {
        let start = Cpu::start();
        let seated = seat(&iommu, memory.clone())?;
        figures.entry("replay".to_owned()).or_default().push(start.each(count));
        let held = (seated.entries)();
        ensure!(held == count, "{held} of {count} mappings are held");
        let mut random = Random(5);
        let pair = per_call(effort.budget(), || {
            let page = (random.next() >> 20) % count;
            unmap(&domain, iova(page), PAGE);
            black_box(map(&domain, iova(page), PAGE, gpa(page)));
        });
        figures.entry("pair".to_owned()).or_default().push(pair);
        (seated.leave)()?;
    }
    Ok(figures)
}

/// The type1 mirror.
pub(crate) fn type1(effort: Effort) -> anyhow::Result<Figures> {
    measure(effort, effort.small(), |iommu, memory| {
        let (mirror, handle) = Container::of_nothing(1 << 17)?.mirror(memory);
        let subscription = iommu.subscribe_mirror(Space::Domain(1), Box::new(mirror), Interest::MIRROR)?;
        Ok(Seated {
            leave: Box::new(move || Ok(subscription.leave().wait()?)),
            entries: Box::new(move || handle.entries()),
        })
    })
}

/// The iommufd binding: the endpoint that comes to the domain is the first one there.
pub(crate) fn iommufd(effort: Effort) -> anyhow::Result<Figures> {
    measure(effort, effort.small(), |iommu, memory| {
        let (iommufd, device) = Iommufd::of_nothing();
        let (binding, handle) = iommufd.binding(memory);
        let binding = iommu.add_binding(Box::new(binding));
        let endpoint = iommu.add_endpoint(8, EndpointConfig::default())?;
        handle.add(endpoint.id(), device).map_err(anyhow::Error::new)?;
        endpoint.bind_with(&binding)?.wait()?;
        endpoint.attach(1).map_err(|error| anyhow::anyhow!("{}", error.kind))?.wait()?;
        Ok(Seated {
            leave: Box::new(move || Ok(endpoint.remove().context("the endpoint is gone")?.wait()?)),
            entries: Box::new(move || handle.entries()),
        })
    })
}

/// The vhost-vDPA mirror, as full as a kernel lets it be: each step is a batch of its own.
pub(crate) fn vdpa(effort: Effort) -> anyhow::Result<Figures> {
    measure(effort, u64::from(DEFAULT_ENTRIES), |iommu, memory| {
        let (mirror, handle) = Device::of_nothing(DEFAULT_ENTRIES).mirror(0, memory)?;
        let subscription = iommu.subscribe_mirror(Space::Domain(1), Box::new(mirror), Interest::MIRROR)?;
        Ok(Seated {
            leave: Box::new(move || Ok(subscription.leave().wait()?)),
            entries: Box::new(move || handle.entries()),
        })
    })
}
