//! viommu, through what it gives to everyone.

use std::time::Duration;

use anyhow::Context as _;
use viommu::subscribe::{Cache, FenceFailed, Mirror, Reach, Refused, Unmapped};
use viommu::{
    Access, Ack, Domain, Endpoint, EndpointConfig, Gpa, Interest, Iommu, Iova, IovaRange, Mapping, Reader,
    Space, Subscription, Tables,
};

use crate::clock::Cpu;
use crate::load::{HIGH_RAM, LOW_RAM};
use crate::table::Table;

/// Lookups under one guard: a device's batch.
pub(crate) const BATCH: u64 = 16;

/// A unit with one endpoint that is attached to one domain.
pub(crate) struct Ours {
    pub(crate) iommu: Iommu,
    pub(crate) endpoint: Endpoint,
    pub(crate) domain: Domain,
    pub(crate) reader: Reader,
}

/// A unit of the size that the structures are measured in.
pub(crate) fn unit() -> anyhow::Result<Iommu> {
    let builder = Iommu::builder().ram(LOW_RAM.0, LOW_RAM.1).ram(HIGH_RAM.0, HIGH_RAM.1);
    Ok(builder.build()?)
}

/// `bytes` at `iova`; the benchmark's own addresses never wrap.
#[inline]
pub(crate) fn mapping(iova: u64, bytes: u64, gpa: u64) -> Mapping {
    Mapping::new(Iova(iova), bytes, Gpa(gpa), Access::RW).expect("a range")
}

#[inline]
pub(crate) fn range(iova: u64, bytes: u64) -> IovaRange {
    IovaRange::from_len(Iova(iova), bytes).expect("a range")
}

impl Ours {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let iommu = unit()?;
        let endpoint = iommu.add_endpoint(16, EndpointConfig::default())?;
        let domain = iommu.create_domain(1, Tables::Owned)?;
        endpoint.attach(1)?.wait()?;
        let reader = endpoint.reader("bench").context("the endpoint is there")?;
        Ok(Self { iommu, endpoint, domain, reader })
    }

    /// Subscribes to the domain itself.
    pub(crate) fn mirror(&self, interest: Interest) -> anyhow::Result<Subscription> {
        Ok(self.iommu.subscribe_mirror(Space::Domain(1), Box::new(Idle), interest)?)
    }
}

#[inline]
pub(crate) fn map(domain: &Domain, iova: u64, bytes: u64, gpa: u64) -> bool {
    domain.map(mapping(iova, bytes, gpa)).is_ok_and(|done| done.wait().is_ok())
}

#[inline]
pub(crate) fn unmap(domain: &Domain, iova: u64, bytes: u64) {
    domain.unmap(range(iova, bytes)).expect("an unmap").wait().expect("nobody is inside");
}

/// One lookup of a batch.
#[inline]
pub(crate) fn look(guard: &viommu::Guard<'_>, iova: u64) -> Option<u64> {
    guard.translate(Iova(iova), Access::READ).ok().map(|hit| hit.gpa.0)
}

impl Table for Ours {
    fn new() -> anyhow::Result<Self> {
        Ours::new()
    }

    fn map(&mut self, iova: u64, bytes: u64, gpa: u64) -> bool {
        map(&self.domain, iova, bytes, gpa)
    }

    fn unmap(&mut self, iova: u64, bytes: u64) {
        unmap(&self.domain, iova, bytes);
    }

    fn translate(&mut self, iova: u64) -> Option<u64> {
        look(&self.reader.enter(), iova)
    }

    fn lookups(&mut self, count: u64, mut next: impl FnMut() -> u64) -> u64 {
        let mut misses = 0;
        for _ in 0..count / BATCH {
            let guard = self.reader.enter();
            for _ in 0..BATCH {
                misses += u64::from(std::hint::black_box(look(&guard, next())).is_none());
            }
        }
        misses
    }

    fn replay(&mut self) -> Option<(Duration, u64)> {
        let mirror = Box::new(Idle);
        let start = Cpu::start();
        let subscription = self.iommu.subscribe_mirror(Space::Domain(1), mirror, Interest::MIRROR).ok()?;
        let time = start.elapsed();
        let told = subscription.counts().map;
        subscription.leave().wait().ok()?;
        Some((time, told))
    }
}

/// A consumer that does nothing, with a limit on its entries as real ones have.
pub(crate) struct Idle;

impl Mirror for Idle {
    fn reach(&self) -> Reach {
        Reach { entries: Some(1 << 24), ..Reach::default() }
    }

    fn map(&mut self, _: &Mapping) -> Result<Ack, Refused> {
        Ok(Ack::Done)
    }

    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        Ok(Unmapped::done(range.bytes()))
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        Ok(())
    }

    fn held(&self) -> Vec<Mapping> {
        Vec::new()
    }
}

impl Cache for Idle {
    fn install(&mut self, _: &Mapping) {}

    fn invalidate(&mut self, _: IovaRange) -> Ack {
        Ack::Done
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        Ok(())
    }
}
