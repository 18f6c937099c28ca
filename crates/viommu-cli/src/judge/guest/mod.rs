//! How the guest's operations reach the record: as its own steps, or as requests in a ring of a device.
//!
//! Both ways keep a domain as long as an endpoint is attached to it, as virtio-iommu has it. A history that begins in
//! the middle names domains whose endpoints it has not named: those are *held*. A device holds one by an endpoint of its
//! own that stands in for the unknown.

mod direct;
mod memory;
mod reply;
mod tce;
mod virtio;
mod vtd;

use core::ops::ControlFlow;
use core::time::Duration;
use std::collections::BTreeMap;

use viommu::endpoint::Region;
use viommu::{
    Access, Completion, Domain, Endpoint, Fault, Iommu, Iova, IovaRange, Mapping, Translation, View,
};

pub(crate) use direct::Direct;
pub(crate) use memory::Eyes;
pub(crate) use reply::{Answer, REQUESTS, STATUSES, Why};
pub(crate) use virtio::{ModelLine, Virtio};
pub(crate) use vtd::Vtd;

/// The longest that a step may take; software consumers are done at once.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of tables that a unit may take: address space, until it is used.
pub(crate) const TABLE_BYTES: u64 = 1 << 30;
/// Memory from the start; the upper half is added when something is mapped there.
pub(crate) const HALF: u64 = 1 << 63;

fn builder() -> viommu::Builder {
    Iommu::builder().bypass(true).table_bytes(TABLE_BYTES).ram(0, HALF)
}

enum Way {
    Direct(Direct),
    Virtio(Box<Virtio>),
    Vtd(Box<Vtd>),
}

/// The guest's side of the unit.
pub(crate) struct Guest {
    iommu: Iommu,
    way: Way,
    /// Endpoint to domain, where an ATTACH has succeeded.
    attached: BTreeMap<u32, u32>,
    /// Domains that are kept without an endpoint that is known.
    held: BTreeMap<u32, Option<u32>>,
    /// What is wrong, and nobody asked for.
    complaints: Vec<String>,
}

impl Guest {
    pub(crate) fn direct(direct: Direct) -> Self {
        Self::new(direct.iommu().clone(), Way::Direct(direct))
    }

    pub(crate) fn virtio(virtio: Virtio) -> Self {
        Self::new(virtio.iommu().clone(), Way::Virtio(Box::new(virtio)))
    }

    pub(crate) fn vtd(vtd: Vtd) -> Self {
        Self::new(vtd.iommu().clone(), Way::Vtd(Box::new(vtd)))
    }

    fn new(iommu: Iommu, way: Way) -> Self {
        Self { iommu, way, attached: BTreeMap::new(), held: BTreeMap::new(), complaints: Vec::new() }
    }

    pub(crate) fn iommu(&self) -> &Iommu {
        &self.iommu
    }

    /// Whether answers come from a device, so that what is expected of them is worth finding out.
    pub(crate) fn is_checked(&self) -> bool {
        let device = match &self.way {
            Way::Direct(direct) => direct.tce.is_some(),
            Way::Virtio(_) | Way::Vtd(_) => true,
        };
        device || cfg!(debug_assertions)
    }

    /// What the model has no way to say, once such a thing was asked of it.
    pub(crate) fn inexpressible(&self) -> Option<&str> {
        match &self.way {
            Way::Direct(direct) => direct.tce.as_ref()?.inexpressible(),
            Way::Virtio(_) => None,
            Way::Vtd(vtd) => vtd.inexpressible(),
        }
    }

    /// The number that the record has for a domain.
    pub(crate) fn number(&self, domain: u32) -> Option<u32> {
        match &self.way {
            Way::Direct(_) | Way::Virtio(_) => Some(domain),
            Way::Vtd(vtd) => vtd.number(domain),
        }
    }

    /// The history's number of one that the record has a number for.
    pub(crate) fn name(&self, number: u32) -> u32 {
        match &self.way {
            Way::Direct(_) | Way::Virtio(_) => number,
            Way::Vtd(vtd) => vtd.name(number).unwrap_or(number),
        }
    }

    pub(crate) fn domain(&self, id: u32) -> Option<Domain> {
        self.iommu.domain(self.number(id)?)
    }

    /// What the guest has mapped, in the range or across its ends: the record's mappings, or, where tables have it in
    /// pages, what it has asked for.
    pub(crate) fn mappings(&self, id: u32, domain: &Domain, range: IovaRange, mut each: impl FnMut(Mapping)) {
        match &self.way {
            Way::Direct(_) | Way::Virtio(_) => domain.for_each(range, |m| {
                each(m);
                ControlFlow::Continue(())
            }),
            Way::Vtd(vtd) => vtd.mappings(id, range).into_iter().for_each(each),
        }
    }

    /// What those see who are attached to nothing: whether that is all of memory.
    pub(crate) fn bypass(&self) -> bool {
        match &self.way {
            Way::Direct(_) | Way::Virtio(_) => self.iommu.bypass(),
            Way::Vtd(vtd) => vtd.bypass(),
        }
    }

    /// An endpoint that has just come sees nothing until [`Self::show`].
    pub(crate) fn hide(&self, endpoint: &Endpoint) {
        match &self.way {
            Way::Direct(_) | Way::Virtio(_) => drop(endpoint.block()),
            // It has no context entry.
            Way::Vtd(_) => {}
        }
    }

    /// It sees what those see who are attached to nothing. The driver looks at it before it does anything with it.
    pub(crate) fn show(&mut self, id: u32, endpoint: &Endpoint) {
        match &mut self.way {
            Way::Direct(_) => drop(endpoint.detach()),
            Way::Virtio(virtio) => {
                drop(endpoint.detach());
                virtio.probe(id);
            }
            Way::Vtd(vtd) => vtd.set_default(id),
        }
    }

    /// A mirror has come to a domain.
    pub(crate) fn mirror_has_come(&mut self) {
        if let Way::Vtd(vtd) = &mut self.way {
            vtd.settle();
        }
    }

    /// The domain that an endpoint is attached to.
    pub(crate) fn attached(&self, endpoint: u32) -> Option<u32> {
        self.attached.get(&endpoint).copied()
    }

    /// What went wrong since this was asked last.
    pub(crate) fn complaints(&mut self) -> Vec<String> {
        match &mut self.way {
            Way::Direct(_) => {}
            Way::Virtio(virtio) => self.complaints.append(&mut virtio.complaints),
            Way::Vtd(vtd) => self.complaints.append(&mut vtd.complaints()),
        }
        core::mem::take(&mut self.complaints)
    }

    /// What there is to say of the model.
    pub(crate) fn line(&self) -> ModelLine {
        match &self.way {
            Way::Direct(direct) => direct.tce.as_ref().map_or_else(ModelLine::direct, |tce| tce.line()),
            Way::Virtio(virtio) => virtio.line(),
            Way::Vtd(vtd) => vtd.line(),
        }
    }

    /// The history is over: what both ends of the rings have counted must be the same.
    pub(crate) fn end_of_history(&mut self) {
        match &mut self.way {
            Way::Direct(direct) => {
                self.complaints.extend(direct.tce.as_ref().and_then(|tce| tce.compare_counts()));
            }
            Way::Virtio(virtio) => virtio.compare_counts(),
            Way::Vtd(vtd) => vtd.compare(),
        }
    }

    fn settle(&mut self, done: Completion) {
        settle(done, &mut self.complaints);
    }

    /// A new endpoint: with its regions, and without anything that follows it.
    pub(crate) fn add_endpoint(&mut self, id: u32, regions: Vec<Region>) -> Option<Endpoint> {
        match &mut self.way {
            Way::Direct(direct) => direct.add_endpoint(id, regions),
            Way::Virtio(virtio) => virtio.add_endpoint(id, regions),
            Way::Vtd(vtd) => vtd.add_endpoint(id, &regions),
        }
    }

    /// Hot-unplug. Its domain stays if it is held, or if another one is attached to it.
    pub(crate) fn remove_endpoint(&mut self, id: u32, endpoint: Endpoint) {
        let gone = match &mut self.way {
            Way::Direct(_) => endpoint.remove().map_err(|error| error.to_string()),
            Way::Virtio(virtio) => virtio.remove_endpoint(id),
            Way::Vtd(vtd) => vtd.remove_endpoint(id),
        };
        match gone {
            Ok(done) => self.settle(done),
            Err(why) => self.complaints.push(format!("removing endpoint {id}: {why}")),
        }
        let old = self.attached.remove(&id);
        self.left(old);
    }

    /// How an endpoint's device reaches memory.
    pub(crate) fn eyes(&self, endpoint: &Endpoint) -> Option<Eyes> {
        let reader = endpoint.reader("replay")?;
        Some(match &self.way {
            Way::Direct(_) | Way::Vtd(_) => Eyes::Reader(reader),
            Way::Virtio(virtio) => virtio.eyes(reader),
        })
    }

    /// An access of a device.
    pub(crate) fn look(
        &mut self,
        endpoint: u32,
        eyes: &mut Eyes,
        iova: Iova,
        access: Access,
    ) -> Result<Translation, Fault> {
        match (&mut self.way, eyes) {
            (Way::Virtio(virtio), Eyes::Memory(memory)) => virtio.look(endpoint, memory, iova, access),
            (_, Eyes::Reader(reader)) => reader.enter().probe(iova, access),
            (_, Eyes::Memory(memory)) => memory.enter().translator().probe(iova, access),
        }
    }

    /// The guest attaches an endpoint, wherever it is now.
    pub(crate) fn attach(&mut self, id: u32, endpoint: &Endpoint, domain: u32, bypass: bool) -> Answer {
        let answer = match &mut self.way {
            // Where it is already, also if it is fenced there.
            Way::Direct(_) | Way::Vtd(_) if self.attached.get(&id) == Some(&domain) => Answer::Core(Ok(())),
            Way::Direct(direct) => {
                let keeps = self.held.contains_key(&domain) || self.attached.values().any(|d| *d == domain);
                direct.attach(endpoint, domain, bypass, keeps, &mut self.complaints)
            }
            Way::Virtio(virtio) => virtio.attach(id, domain, bypass),
            Way::Vtd(vtd) => vtd.attach(id, domain, bypass),
        };
        if answer.is_ok() {
            let old = self.attached.insert(id, domain);
            self.left(old.filter(|old| *old != domain));
        } else if !matches!(endpoint.attached(), Some(View::Domain(_) | View::Identity)) {
            // It could not be brought back.
            let old = self.attached.remove(&id);
            self.left(old);
        }
        answer
    }

    /// The guest detaches an endpoint: of a domain that it is in, it is nowhere afterwards whatever the answer.
    pub(crate) fn detach(&mut self, id: u32, endpoint: &Endpoint, domain: u32) -> Answer {
        let is_in = self.attached(id) == Some(domain);
        let answer = match &mut self.way {
            Way::Direct(direct) => direct.detach(endpoint, is_in, &mut self.complaints),
            Way::Virtio(virtio) => virtio.detach(id, domain),
            Way::Vtd(vtd) => vtd.detach(id, is_in),
        };
        if is_in {
            self.attached.remove(&id);
            self.left(Some(domain));
        }
        answer
    }

    /// An endpoint has left `domain`: without another one in it, it is gone.
    fn left(&mut self, domain: Option<u32>) {
        let Some(id) = domain else { return };
        if self.held.contains_key(&id) || self.attached.values().any(|domain| *domain == id) {
            return;
        }
        match &mut self.way {
            Way::Direct(direct) => direct.end(id, &mut self.complaints),
            Way::Virtio(_) => {}
            Way::Vtd(vtd) => vtd.end(id),
        }
        if self.domain(id).is_some() {
            self.complaints.push(format!("domain {id} is still there after its last endpoint left"));
        }
    }

    /// Keeps a domain whose endpoints are not known; makes it if it is not there.
    pub(crate) fn hold(&mut self, domain: u32) -> Option<Domain> {
        if !self.held.contains_key(&domain) {
            let stand_in = match &mut self.way {
                Way::Direct(direct) => direct.make(domain).then_some(None),
                Way::Virtio(virtio) => virtio.stand_in(domain).map(Some),
                Way::Vtd(vtd) => vtd.stand_in(domain).map(Some),
            };
            self.held.insert(domain, stand_in?);
        }
        self.domain(domain)
    }

    /// Keeps a domain that would die when `leaving` leaves it.
    pub(crate) fn keep(&mut self, domain: u32, leaving: u32) {
        let mut others = self.attached.iter().filter(|(id, at)| **at == domain && **id != leaving);
        if self.attached(leaving) == Some(domain) && others.next().is_none() {
            drop(others);
            self.hold(domain);
        }
    }

    /// Keeps it no longer.
    pub(crate) fn release(&mut self, domain: u32) {
        let Some(stand_in) = self.held.remove(&domain) else { return };
        match (&mut self.way, stand_in) {
            (Way::Virtio(virtio), Some(stand_in)) => virtio.dismiss(stand_in, domain),
            (Way::Vtd(vtd), Some(stand_in)) => vtd.dismiss(stand_in),
            _ => {}
        }
        self.left(Some(domain));
    }

    pub(crate) fn map(&mut self, id: u32, domain: Option<&Domain>, mapping: Mapping) -> Answer {
        match &mut self.way {
            Way::Direct(direct) => direct.map(id, domain, mapping, &mut self.complaints),
            Way::Virtio(virtio) => virtio.map(id, &mapping),
            Way::Vtd(vtd) => vtd.map(id, domain, &mapping),
        }
    }

    pub(crate) fn unmap(&mut self, id: u32, domain: Option<&Domain>, range: IovaRange) -> Answer {
        match &mut self.way {
            Way::Direct(direct) => direct.unmap(id, domain, range, &mut self.complaints),
            Way::Virtio(virtio) => virtio.unmap(id, range),
            Way::Vtd(vtd) => vtd.unmap(id, domain, range),
        }
    }

    /// An operation is not made: the recorded VMM refused it for what our record lacks.
    pub(crate) fn withhold(&mut self) {
        if let Way::Virtio(virtio) = &mut self.way {
            virtio.withheld += 1;
        }
    }

    /// What endpoints see that are attached to nothing. A mirror that cannot hold all of memory leaves it as it was.
    pub(crate) fn set_bypass(&mut self, on: bool) {
        match &mut self.way {
            Way::Direct(_) => match self.iommu.set_bypass(on) {
                Ok(done) => self.settle(done),
                Err(error) => self.settle(error.completion),
            },
            Way::Virtio(virtio) => virtio.set_bypass(on),
            Way::Vtd(vtd) => vtd.set_bypass(on),
        }
    }

    /// The driver resets the device: all is detached, all domains are gone.
    pub(crate) fn reset(&mut self) {
        match &mut self.way {
            Way::Direct(direct) => {
                let done = match self.iommu.reset(viommu::ResetKind::Device) {
                    Ok(reset) => reset.completion,
                    Err(error) => error.completion,
                };
                direct.all_ended();
                self.settle(done);
            }
            Way::Virtio(virtio) => virtio.reset(),
            Way::Vtd(vtd) => vtd.reset(),
        }
        self.attached.clear();
        for (_, stand_in) in core::mem::take(&mut self.held) {
            if let (Way::Virtio(virtio), Some(stand_in)) = (&mut self.way, stand_in) {
                virtio.free(stand_in);
            }
        }
        if let Some((id, _)) = self.iommu.domains().first() {
            self.complaints.push(format!("domain {id} is still there after a reset"));
        }
    }
}

fn settle(mut done: Completion, complaints: &mut Vec<String>) {
    if !done.is_complete() && done.wait_timeout(PATIENCE).is_err() {
        complaints.push("the step did not complete".into());
    }
}
