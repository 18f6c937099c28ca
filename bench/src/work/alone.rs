//! What only we have: guards, readers, views.

use std::hint::black_box;

use anyhow::{Context as _, ensure};
use viommu::subscribe::Mirror;
use viommu::{EndpointConfig, Interest, Space, Tables};

use crate::clock::{Cpu, nanos, per_call};
use crate::load::{Effort, PAGE, Random, gpa, iova};
use crate::ours::{self, Idle, Ours, mapping, unit};
use crate::table::Table;
use crate::work::{Figures, dense};

/// Nanoseconds to take a guard and give it back.
pub(crate) fn guard(effort: Effort) -> anyhow::Result<Figures> {
    let mut unit = Ours::new()?;
    let mut figures = Figures::new();
    for _ in 0..effort.rounds() * 2 {
        let enter = per_call(effort.budget(), || {
            black_box(&unit.reader.enter());
        });
        figures.entry("guard".to_owned()).or_default().push(enter);
    }
    ensure!(unit.translate(0).is_none(), "nothing is mapped");
    Ok(figures)
}

/// Nanoseconds of a pair whose unmap waits, beside idle readers: the figure's name is their number.
pub(crate) fn idle_readers(effort: Effort) -> anyhow::Result<Figures> {
    let mut figures = Figures::new();
    let count = effort.small();
    let mut unit = Ours::new()?;
    dense::fill(&mut unit, count)?;
    let mut readers = Vec::new();
    let mut random = Random(77);
    // The unit's own reader is the first.
    for more in [0, 15, 48] {
        for at in 0..more {
            let mut reader = unit.endpoint.reader(&format!("idle {at}")).context("the endpoint is there")?;
            drop(reader.enter());
            readers.push(reader);
        }
        for _ in 0..effort.rounds() {
            let pair = per_call(effort.budget(), || {
                let page = random.page(count);
                ours::unmap(&unit.domain, page, PAGE);
                ours::map(&unit.domain, page, PAGE, gpa(page / PAGE, count));
            });
            figures.entry((readers.len() + 1).to_string()).or_default().push(pair);
        }
    }
    Ok(figures)
}

/// Nanoseconds a mapping of an ATTACH that fills a mirror, without the mirror's own calls.
pub(crate) fn attach(effort: Effort) -> anyhow::Result<Figures> {
    let count = effort.small();
    let mut unit = Ours::new()?;
    dense::fill(&mut unit, count)?;
    let endpoint = unit.iommu.add_endpoint(24, EndpointConfig::default())?;
    let subscription = endpoint.subscribe_mirror(Box::new(Idle), Interest::MIRROR)?;
    let mut figures = Figures::new();
    for _ in 0..effort.rounds() {
        let start = Cpu::start();
        endpoint.attach(1)?.wait()?;
        let attach = start.each(count);
        let held = subscription.counts().held;
        ensure!(held == count, "the mirror holds {held} of {count} mappings");
        endpoint.block()?.wait()?;

        let mut mirror: Box<dyn Mirror> = black_box(Box::new(Idle));
        let start = Cpu::start();
        for at in 0..count {
            black_box(mirror.map(&mapping(iova(at), PAGE, gpa(at, count))).is_ok());
        }
        let calls = start.each(count);
        figures.entry("attach".to_owned()).or_default().push((attach - calls).max(0.0));
    }
    Ok(figures)
}

/// Nanoseconds to bring a consumer to an empty address space of 2^64 bytes.
pub(crate) fn empty_replay(effort: Effort) -> anyhow::Result<Figures> {
    const DOMAINS: u32 = 256;
    let iommu = unit()?;
    for id in 0..DOMAINS {
        iommu.create_domain(id, Tables::Owned)?;
    }
    let mut figures = Figures::new();
    for _ in 0..effort.rounds() * 2 {
        let mirrors: Vec<Box<dyn Mirror>> = (0..DOMAINS).map(|_| Box::new(Idle) as _).collect();
        let mut subscriptions = Vec::with_capacity(mirrors.len());
        let start = Cpu::start();
        for (id, mirror) in (0..DOMAINS).zip(mirrors) {
            subscriptions.push(iommu.subscribe_mirror(Space::Domain(id), mirror, Interest::MIRROR)?);
        }
        let each = nanos(start.elapsed()) / f64::from(DOMAINS);
        figures.entry("subscribe".to_owned()).or_default().push(each);
        for subscription in subscriptions {
            subscription.leave().wait()?;
        }
    }
    Ok(figures)
}
