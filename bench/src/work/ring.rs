//! Requests through virtio-iommu's ring, beside the same steps on the bare record.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use viommu::{Domain, Interest, Iommu, Subscription};
use viommu_virtio::driver::{Driver, Request};
use viommu_virtio::spec::request::{AttachFlags, MapFlags, Status};
use viommu_virtio::{Config, EndpointPlan, RequestQueue, VirtioIommu};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::clock::nanos;
use crate::load::{Effort, HIGH_RAM, LOW_RAM, PAGE, Random, gpa, iova};
use crate::ours::{Idle, mapping, range};
use crate::work::Figures;

/// Pages mapped.
const LIVE: u64 = 1 << 14;
/// Requests a kick.
pub(crate) const BATCHES: [u16; 3] = [1, 16, 256];
/// Mirrors that hear of them.
pub(crate) const MIRRORS: [usize; 3] = [0, 1, 4];

type Memory = Arc<GuestMemoryMmap>;

struct Rig {
    driver: Driver<Memory>,
    requests: RequestQueue<Memory>,
    domain: Domain,
    /// Who drops one, leaves.
    _subscriptions: Vec<Subscription>,
}

fn rig(mirrors: usize) -> anyhow::Result<Rig> {
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)])?);
    let builder = Iommu::builder().ram(LOW_RAM.0, LOW_RAM.1).ram(HIGH_RAM.0, HIGH_RAM.1);
    let device = VirtioIommu::new(builder, Config::default())?;
    let plan =
        (0..mirrors).fold(EndpointPlan::default(), |plan, _| plan.mirror(Box::new(Idle), Interest::MIRROR));
    let added = device.add_endpoint(8, plan)?;
    let mut driver = Driver::new(memory.clone(), 0, 512, 512)?;
    device.negotiate(device.features()).wait()?;
    let mut requests = device.request_queue(driver.request_queue()?, memory, || {});
    driver.push(&Request::Attach { domain: 1, endpoint: 8, flags: AttachFlags::empty() })?;
    requests.process()?;
    ensure!(driver.complete()?.iter().all(|answer| answer.status() == Some(Status::OK)), "not attached");
    let domain = device.iommu().domain(1).context("attached")?;
    for page in 0..LIVE {
        domain.map(mapping(iova(page), PAGE, gpa(page, LIVE)))?.wait()?;
    }
    Ok(Rig { driver, requests, domain, _subscriptions: added.subscriptions })
}

fn index(random: &mut Random) -> u64 {
    (random.next() >> 20) & (LIVE - 1)
}

fn unmap(page: u64) -> Request {
    Request::Unmap { domain: 1, virt_start: iova(page), virt_end: iova(page) + (PAGE - 1) }
}

fn map(page: u64) -> Request {
    Request::Map {
        domain: 1,
        virt_start: iova(page),
        virt_end: iova(page) + (PAGE - 1),
        phys_start: gpa(page, LIVE),
        flags: MapFlags::READ | MapFlags::WRITE,
    }
}

impl Rig {
    /// Kicks with so many requests until `budget` has gone. Nanoseconds that the device takes for a pair.
    fn through_the_ring(&mut self, batch: u16, budget: Duration, random: &mut Random) -> anyhow::Result<f64> {
        let (mut time, mut count, mut is_map, mut page) = (Duration::ZERO, 0_u64, false, 0);
        while time < budget {
            for _ in 0..batch {
                if is_map {
                    self.driver.push(&map(page))?;
                } else {
                    page = index(random);
                    self.driver.push(&unmap(page))?;
                }
                is_map = !is_map;
            }
            let start = Instant::now();
            self.requests.process()?;
            time += start.elapsed();
            count += u64::from(batch);
            while let Some(answer) = self.driver.next_answer()? {
                ensure!(answer.status() == Some(Status::OK), "a request failed");
            }
        }
        if is_map {
            self.driver.push(&map(page))?;
            self.requests.process()?;
            self.driver.complete()?;
        }
        Ok(nanos(time) / count as f64 * 2.0)
    }

    /// The same steps on the record alone: as a burst.
    fn on_the_record(&self, batch: u16, budget: Duration, random: &mut Random) -> anyhow::Result<f64> {
        let (mut time, mut count, mut is_map, mut page) = (Duration::ZERO, 0_u64, false, 0);
        while time < budget || is_map {
            let steps: Vec<_> = (0..batch)
                .map(|_| {
                    if !is_map {
                        page = index(random);
                    }
                    is_map = !is_map;
                    (!is_map, page)
                })
                .collect();
            let start = Instant::now();
            let mut burst = self.domain.burst()?;
            for (is_map, page) in &steps {
                if *is_map {
                    burst.map(mapping(iova(*page), PAGE, gpa(*page, LIVE)))?;
                } else {
                    black_box(burst.unmap(range(iova(*page), PAGE))?);
                }
            }
            let mut done = burst.finish();
            ensure!(done.is_complete(), "nobody is inside");
            time += start.elapsed();
            count += u64::from(batch);
        }
        Ok(nanos(time) / count as f64 * 2.0)
    }
}

/// Nanoseconds of a pair, by where, mirrors and requests a kick.
pub(crate) fn ours(effort: Effort) -> anyhow::Result<Figures> {
    let mut figures = Figures::new();
    for mirrors in MIRRORS {
        let mut rig = rig(mirrors)?;
        let mut random = Random(77);
        for _ in 0..effort.rounds() {
            for batch in BATCHES {
                let ring = rig.through_the_ring(batch, effort.budget() / 2, &mut random)?;
                let bare = rig.on_the_record(batch, effort.budget() / 2, &mut random)?;
                figures.entry(format!("ring {mirrors} {batch}")).or_default().push(ring);
                figures.entry(format!("bare {mirrors} {batch}")).or_default().push(bare);
            }
        }
    }
    Ok(figures)
}
