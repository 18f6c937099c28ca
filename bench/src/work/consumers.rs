//! What an event costs on its way to a consumer's host, without the host.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use viommu::{Interest, Iommu, Space, Tables};
use viommu_vfio::type1::Container;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::clock::{Cpu, per_call};
use crate::load::{Effort, PAGE, Random};
use crate::ours::{map, unmap};
use crate::work::Figures;

/// Bytes of the guest's memory, in two regions.
const MEMORY: u64 = 1 << 30;

/// Addresses of the device's that are used: pages that do not touch.
fn iova(page: u64) -> u64 {
    (1 << 32) + page * 2 * PAGE
}

fn gpa(page: u64) -> u64 {
    page * 7 % (MEMORY / PAGE) * PAGE
}

/// Nanoseconds of a pair and of a replayed mapping, through the record and the type1 mirror, with a kernel that does
/// nothing.
pub(crate) fn type1(effort: Effort) -> anyhow::Result<Figures> {
    let count = effort.small();
    let half = usize::try_from(MEMORY / 2)?;
    let memory = [(GuestAddress(0), half), (GuestAddress(MEMORY / 2), half)];
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&memory)?);
    let iommu = Iommu::builder().ram(0, MEMORY / 2).ram(MEMORY / 2, MEMORY / 2).build()?;
    let domain = iommu.create_domain(1, Tables::Owned)?;
    let mut figures = Figures::new();
    (0..count)
        .try_for_each(|page| map(&domain, iova(page), PAGE, gpa(page)).then_some(()))
        .context("a map")?;
    for _ in 0..effort.rounds() {
        let (mirror, handle) = Container::of_nothing(1 << 17)?.mirror(memory.clone());
        let start = Cpu::start();
        let subscription = iommu.subscribe_mirror(Space::Domain(1), Box::new(mirror), Interest::MIRROR)?;
        figures.entry("replay".to_owned()).or_default().push(start.each(count));
        ensure!(handle.entries() == count, "{} of {count} mappings are held", handle.entries());
        let mut random = Random(5);
        let pair = per_call(effort.budget(), || {
            let page = random.page(count);
            unmap(&domain, iova(page), PAGE);
            black_box(map(&domain, iova(page), PAGE, gpa(page)));
        });
        figures.entry("pair".to_owned()).or_default().push(pair);
        subscription.leave().wait()?;
    }
    Ok(figures)
}
