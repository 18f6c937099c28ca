//! What a vhost device misses and is told, without the device.

use std::hint::black_box;

use anyhow::ensure;
use viommu::{Interest, Iova, Space};
use viommu_vhost::kernel::Device;

use super::consumers::{any, filled, gpa, iova};
use crate::clock::{Cpu, per_call};
use crate::load::{Effort, PAGE, Random};
use crate::ours::{map, unmap};
use crate::work::Figures;

/// Pages that the device is told of, and that are taken from it, one after the other.
const FEW: u64 = 1 << 10;

/// Rounds of that.
const ROUNDS: u64 = 64;

/// Nanoseconds of an answer to a miss of a device that is full, and of an unmap that a device is told of and of one that it is
/// not, through the record and the vhost cache, with a device that does nothing.
pub(crate) fn ours(effort: Effort) -> anyhow::Result<Figures> {
    let count = effort.small();
    let (memory, iommu, domain) = filled(count)?;
    let few = FEW.min(count);
    let mut figures = Figures::new();
    for _ in 0..effort.rounds() {
        let (device, asks) = Device::of_nothing()?;
        let (cache, handle) = device.cache(memory.clone());
        let subscription = iommu.subscribe_cache(Space::Domain(1), Box::new(cache), Interest::CACHE)?;
        handle.start()?;
        let answer = |page| {
            asks.miss(Iova(iova(page)));
            black_box(handle.serve(&subscription).is_ok());
        };
        let mut take = |name: &str| {
            let start = Cpu::start();
            (0..few).for_each(|page| unmap(&domain, iova(page), PAGE));
            figures.entry(name.to_owned()).or_default().push(start.each(few));
            (0..few).for_each(|page| {
                black_box(map(&domain, iova(page), PAGE, gpa(page)));
            });
        };
        for _ in 0..ROUNDS {
            take("unheard");
            (0..few).for_each(answer);
            take("told");
        }
        let counts = handle.counts();
        let each = ROUNDS * few;
        ensure!((counts.unheard, counts.invalidations) == (each, each), "told otherwise: {counts:?}");
        let mut random = Random(5);
        let answered = per_call(effort.budget(), || answer(any(&mut random, count)));
        figures.entry("answer".to_owned()).or_default().push(answered);
        let counts = handle.counts();
        ensure!(counts.misses == counts.updates && counts.denied == 0, "not all was answered: {counts:?}");
        subscription.leave().wait()?;
    }
    Ok(figures)
}
