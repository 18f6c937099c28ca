//! What tables take, and what taking it costs. Each in a process of its own: resident memory never shrinks.

use std::collections::VecDeque;
use std::time::Instant;

use anyhow::ensure;
use viommu::Tables;

use crate::clock::{Cpu, percentile, resident, sample};
use crate::load::{Effort, PAGE, Random, gpa, iova};
use crate::ours::{self, Ours};
use crate::table::Table;
use crate::work::Figures;

/// Bytes a mapping with one page in each `stride` bytes.
pub(crate) fn sparse<T: Table>(
    new: impl Fn() -> anyhow::Result<T>,
    effort: Effort,
    stride: u64,
) -> anyhow::Result<Figures> {
    let count = effort.sparse();
    let mut table = new()?;
    let before = resident();
    for at in 0..count {
        ensure!(table.map(iova(0) + at * stride, PAGE, gpa(at, count)), "mapping {at} is refused");
    }
    Ok([("memory".to_owned(), vec![(resident() - before) / count as f64])].into())
}

/// Bytes a live mapping after 8 pages were mapped and 7 of them unmapped in each 2 MiB.
pub(crate) fn one_of_eight<T: Table>(
    new: impl Fn() -> anyhow::Result<T>,
    effort: Effort,
) -> anyhow::Result<Figures> {
    let count = effort.sparse();
    let mut table = new()?;
    let before = resident();
    for at in 0..count {
        let page = |k: u64| iova(0) + at * (2 << 20) + k * PAGE;
        for k in 0..8 {
            ensure!(table.map(page(k), PAGE, gpa(at, count)), "mapping {at} is refused");
        }
        for k in 1..8 {
            table.unmap(page(k), PAGE);
        }
    }
    Ok([("memory".to_owned(), vec![(resident() - before) / count as f64])].into())
}

/// Pairs at random addresses in 2^47, of which 1000 are live: nanoseconds a pair, and what memory grew by after the
/// first twentieth, in KiB.
pub(crate) fn fresh(effort: Effort) -> anyhow::Result<Figures> {
    const LIVE: usize = 1000;
    let unit = Ours::new()?;
    let mut random = Random(5);
    let mut live = VecDeque::with_capacity(LIVE + 1);
    let mut pair = |live: &mut VecDeque<u64>| {
        let page = ((random.next() >> 16) & ((1 << 47) - 1)) & !(PAGE - 1);
        if ours::map(&unit.domain, page, PAGE, gpa(page / PAGE, 1 << 20)) {
            live.push_back(page);
        }
        if live.len() > LIVE
            && let Some(oldest) = live.pop_front()
        {
            ours::unmap(&unit.domain, oldest, PAGE);
        }
    };
    let round = effort.fresh_pairs() / 20;
    let mut figures = Figures::new();
    let mut settled = f64::NAN;
    for at in 0..20 {
        let start = Cpu::start();
        for _ in 0..round {
            pair(&mut live);
        }
        if at == 0 {
            settled = resident();
        } else {
            figures.entry("pair".to_owned()).or_default().push(start.each(round));
        }
    }
    figures.insert("growth".to_owned(), vec![(resident() - settled) / 1024.0]);
    Ok(figures)
}

/// Domains with nothing in them: microseconds and KiB each.
pub(crate) fn empty_domains(effort: Effort) -> anyhow::Result<Figures> {
    let iommu = ours::unit()?;
    let count = effort.domains();
    let mut domains = Vec::with_capacity(count as usize);
    let before = resident();
    let mut figures = Figures::new();
    for round in 0..8 {
        let start = Cpu::start();
        for id in 0..count / 8 {
            domains.push(iommu.create_domain(round * count + id, Tables::Owned)?);
        }
        figures.entry("time".to_owned()).or_default().push(start.each(u64::from(count / 8)) / 1e3);
    }
    let each = (resident() - before) / f64::from(count / 8 * 8) / 1024.0;
    figures.insert("memory".to_owned(), vec![each]);
    Ok(figures)
}

/// Maps of pages in order, each in memory that may never have been touched: microseconds, 99.99 % of them.
pub(crate) fn cold(effort: Effort) -> anyhow::Result<Figures> {
    let count = effort.big();
    let mut samples = vec![1u32; usize::try_from(count)?]; // not zero, so that they are touched
    samples.clear();
    let unit = Ours::new()?;
    for at in 0..count {
        let mapping = ours::mapping(iova(at), PAGE, gpa(at, count));
        let start = Instant::now();
        unit.domain.map(mapping)?.wait()?;
        samples.push(sample(start));
    }
    let mut figures = Figures::new();
    for (name, part) in [("p99.99", 0.9999), ("p50", 0.5)] {
        figures.insert(name.to_owned(), vec![percentile(&mut samples, part) / 1e3]);
    }
    Ok(figures)
}
