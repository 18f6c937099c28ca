//! Operations as changes of tables in guest memory and invalidations: a small driver, and a VT-d unit with caching mode.

mod driver;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use core::ops::ControlFlow;

use serde::Serialize;
use viommu::endpoint::Region;
use viommu::{Completion, Domain, Endpoint, EndpointId, Iommu, Iova, IovaRange, Mapping, Target};
use viommu_vtd::{Config, Vtd as Unit};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::super::world::x86_msi;
use super::reply::{Answer, Why};
use driver::{Context, Driver, LEVELS, PAGE, PASS_DID, Sent};

/// Bits of a guest physical address.
const HOST_BITS: u32 = 52;

/// The unit, its driver, and what the driver knows.
pub(crate) struct Vtd {
    driver: Driver,
    may_cut: bool,
    bypass: bool,
    domains: BTreeMap<u32, Tables>,
    /// By requester: what its context entry says.
    contexts: BTreeMap<u16, Option<Context>>,
    /// Who is in a domain, also in one of bypass.
    attached: BTreeSet<u16>,
    /// Endpoints of our own that stand in for unknown ones; and those of them that do not now.
    stand_ins: Vec<u16>,
    idle: Vec<u16>,
    resets: u64,
    most_tables: u64,
    inexpressible: Option<String>,
}

/// A domain.
struct Tables {
    did: u16,
    root: u64,
    /// What the guest has mapped, each in one go.
    mappings: BTreeMap<u64, Mapping>,
}

/// What went between driver and unit.
#[derive(Debug, Serialize)]
pub(crate) struct UnitLine {
    /// Descriptors, by what they invalidate.
    pub(crate) descriptors: Sent,
    /// Pages of tables: the most at one time.
    pub(crate) tables: u64,
    pub(crate) resets: u64,
    /// Endpoints that the history does not have, for domains from before it.
    pub(crate) stand_ins: u64,
}

impl Vtd {
    /// # Errors
    /// There is no memory for tables.
    pub(crate) fn new(may_cut: bool) -> Result<Self, Box<dyn std::error::Error>> {
        let memory = [(GuestAddress(driver::BASE), usize::try_from(driver::BYTES)?)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&memory)?);
        let config = Config { host_bits: HOST_BITS, ..Config::default() };
        let unit = Unit::new(super::builder(), memory.clone(), config)?;
        Ok(Self {
            driver: Driver::new(unit, memory),
            may_cut,
            bypass: true,
            domains: BTreeMap::new(),
            contexts: BTreeMap::new(),
            attached: BTreeSet::new(),
            stand_ins: Vec::new(),
            idle: Vec::new(),
            resets: 0,
            most_tables: 0,
            inexpressible: None,
        })
    }

    pub(super) fn iommu(&self) -> &Iommu {
        self.driver.vtd.iommu()
    }

    pub(super) fn inexpressible(&self) -> Option<&str> {
        self.inexpressible.as_deref()
    }

    pub(super) fn bypass(&self) -> bool {
        self.bypass
    }

    pub(super) fn complaints(&mut self) -> Vec<String> {
        core::mem::take(&mut self.driver.complaints)
    }

    pub(super) fn line(&self) -> super::ModelLine {
        let unit = UnitLine {
            descriptors: self.driver.sent,
            tables: self.most_tables,
            resets: self.resets,
            stand_ins: self.stand_ins.len() as u64,
        };
        super::ModelLine { name: "vtd", device: None, tables: None, unit: Some(unit) }
    }

    /// What the unit says it has done, against what the driver has sent; and what the tables map, against the record.
    pub(super) fn compare(&mut self) {
        let (metrics, sent) = (self.driver.vtd.metrics(), self.driver.sent);
        let theirs = [
            metrics.context_invalidations,
            metrics.page_invalidations,
            metrics.wide_invalidations,
            metrics.waits,
        ];
        let ours = [sent.contexts, sent.pages, sent.domains + sent.global, sent.waits];
        let odd = [
            metrics.queue_errors,
            metrics.syncs_cut,
            metrics.syncs_capped,
            metrics.syncs_failed,
            metrics.refused_views,
        ];
        if theirs != ours || odd != [0; 5] {
            let what = format!("the unit has counted {theirs:?} and {odd:?}, the driver has sent {ours:?}");
            self.driver.complaints.push(what);
        }
        for (requester, context) in &self.contexts {
            let Some(Context::Tables { did, .. }) = context else { continue };
            let id = EndpointId::new(u32::from(*requester));
            let walked = self.driver.vtd.tables(id, usize::MAX).map(|view| view.mappings);
            let mut record = Vec::new();
            if let Some(domain) = self.iommu().domain(u32::from(*did)) {
                domain.for_each(IovaRange::ALL, |m| {
                    record.push(m);
                    ControlFlow::Continue(())
                });
            }
            if self.driver.vtd.is_followed(u32::from(*did)) && walked.as_ref() != Some(&record) {
                let what =
                    format!("the tables of endpoint {requester} and the record have different mappings");
                self.driver.complaints.push(what);
            }
        }
    }

    fn cannot(&mut self, what: &str) -> Answer {
        self.inexpressible.get_or_insert_with(|| format!("VT-d tables cannot express {what}"));
        Answer::Inexpressible
    }

    fn full(&mut self) -> Answer {
        self.cannot("what is more than a GiB of them")
    }

    /// The record's number of a domain: its domain id.
    pub(super) fn number(&self, domain: u32) -> Option<u32> {
        self.domains.get(&domain).map(|tables| u32::from(tables.did))
    }

    /// The other way round.
    pub(super) fn name(&self, number: u32) -> Option<u32> {
        self.domains.iter().find(|(_, tables)| u32::from(tables.did) == number).map(|(id, _)| *id)
    }

    /// What the guest has mapped, as it has asked for it, as far as it meets the range.
    pub(super) fn mappings(&self, domain: u32, range: IovaRange) -> Vec<Mapping> {
        let Some(tables) = self.domains.get(&domain) else { return Vec::new() };
        let before = tables.mappings.range(..range.start().0).next_back().map(|(_, m)| *m);
        let inside = tables.mappings.range(range.start().0..=range.last().0).map(|(_, m)| *m);
        before.filter(|m| m.range.overlaps(range)).into_iter().chain(inside).collect()
    }

    pub(super) fn add_endpoint(&mut self, id: u32, regions: &[Region]) -> Option<Endpoint> {
        let Ok(requester) = u16::try_from(id) else {
            self.cannot("an endpoint whose number has more than 16 bits");
            return None;
        };
        if regions != [x86_msi()] {
            self.cannot("reserved regions but that of x86's interrupts");
            return None;
        }
        self.contexts.insert(requester, None);
        match self.driver.vtd.add_endpoint(requester) {
            Ok(endpoint) => Some(endpoint),
            Err(why) => {
                self.driver.complaints.push(format!("the unit does not take endpoint {id}: {why}"));
                None
            }
        }
    }

    pub(super) fn remove_endpoint(&mut self, id: u32) -> Result<Completion, String> {
        let requester = requester(id);
        self.set(requester, None);
        self.attached.remove(&requester);
        self.contexts.remove(&requester);
        self.driver.vtd.remove_endpoint(requester).map_err(|why| why.to_string())
    }

    /// Gives a requester a context entry, unless it has it.
    fn set(&mut self, requester: u16, new: Option<Context>) -> bool {
        let Some(old) = self.contexts.get_mut(&requester) else { return false };
        let old = core::mem::replace(old, new);
        let done = old == new || self.driver.set_context(requester, old, new);
        if !done {
            self.full();
        }
        done
    }

    fn default_context(&self, requester: u16) -> Option<Context> {
        (self.bypass && !self.stand_ins.contains(&requester)).then_some(Context::Pass)
    }

    /// An endpoint is attached to nothing.
    pub(super) fn set_default(&mut self, id: u32) {
        let requester = requester(id);
        self.attached.remove(&requester);
        let context = self.default_context(requester);
        self.set(requester, context);
    }

    /// A mirror has come.
    pub(super) fn settle(&mut self) {
        self.driver.settle();
    }

    fn context_of(&mut self, domain: u32) -> Option<Context> {
        if !self.domains.contains_key(&domain) {
            let is_free = |did: &u16| self.domains.values().all(|tables| tables.did != *did);
            // Domain id 0 is the unit's. The history's own number, where that is possible.
            let own = u16::try_from(domain).ok().filter(|did| *did != 0 && *did != PASS_DID);
            let did = own.filter(is_free).or_else(|| (1..PASS_DID).rev().find(is_free))?;
            let root = self.driver.table()?;
            self.domains.insert(domain, Tables { did, root, mappings: BTreeMap::new() });
        }
        let tables = self.domains.get(&domain)?;
        Some(Context::Tables { did: tables.did, root: tables.root })
    }

    pub(super) fn attach(&mut self, id: u32, domain: u32, bypass: bool) -> Answer {
        let context = if bypass { Some(Context::Pass) } else { self.context_of(domain) };
        if context.is_none() || !self.set(requester(id), context) {
            return self.full();
        }
        self.attached.insert(requester(id));
        Answer::Core(Ok(()))
    }

    pub(super) fn detach(&mut self, id: u32, is_in: bool) -> Answer {
        if !is_in {
            return Answer::Core(Err(Why::NotAttached));
        }
        self.set_default(id);
        Answer::Core(Ok(()))
    }

    /// A domain has no endpoints any more.
    pub(super) fn end(&mut self, domain: u32) {
        let Some(tables) = self.domains.remove(&domain) else { return };
        if self.iommu().domain(tables.did.into()).is_some() {
            let what = format!("domain {domain} is still there after its last endpoint left");
            self.driver.complaints.push(what);
        }
        self.free(tables.root);
    }

    fn free(&mut self, root: u64) {
        let mut freed = Vec::new();
        self.driver.collect(root, LEVELS, &mut freed);
        self.driver.give_back(freed);
    }

    /// Attaches an endpoint of our own to a domain.
    pub(super) fn stand_in(&mut self, domain: u32) -> Option<u32> {
        let requester = match self.idle.pop() {
            Some(requester) => requester,
            None => {
                let requester = (0..=u16::MAX).rev().find(|id| !self.contexts.contains_key(id))?;
                self.add_endpoint(requester.into(), &[x86_msi()])?;
                self.stand_ins.push(requester);
                requester
            }
        };
        let id = u32::from(requester);
        self.attach(id, domain, false).is_ok().then_some(id)
    }

    pub(super) fn dismiss(&mut self, stand_in: u32) {
        self.set_default(stand_in);
        self.idle.push(requester(stand_in));
    }

    pub(super) fn set_bypass(&mut self, on: bool) {
        self.bypass = on;
        let nowhere = self.contexts.keys().filter(|id| !self.attached.contains(id));
        for requester in nowhere.copied().collect::<Vec<_>>() {
            self.set_default(requester.into());
        }
    }

    /// All is detached.
    pub(super) fn reset(&mut self) {
        self.resets += 1;
        self.attached.clear();
        let ids: Vec<u16> = self.contexts.keys().copied().collect();
        let entries: Vec<_> = ids.into_iter().map(|id| (id, self.default_context(id))).collect();
        if !self.driver.reset_contexts(&entries) {
            self.full();
        }
        self.contexts = entries.into_iter().collect();
        for (_, tables) in core::mem::take(&mut self.domains) {
            self.free(tables.root);
        }
        self.idle.clone_from(&self.stand_ins);
    }

    pub(super) fn map(&mut self, id: u32, domain: Option<&Domain>, m: &Mapping) -> Answer {
        let Some((domain, tables)) = domain.zip(self.domains.get(&id)) else {
            return Answer::Core(Err(Why::NoDomain));
        };
        let (did, root) = (tables.did, tables.root);
        let last = m.gpa.0.checked_add(m.range.last().0 - m.range.start().0);
        let there = domain.next_mapping(m.range.start());
        let what = if m.target != Target::Ram {
            "a mapping of device registers"
        } else if m.access.is_empty() {
            "a mapping without access"
        } else if !m.range.is_aligned(PAGE) || !m.gpa.0.is_multiple_of(PAGE) {
            "a mapping that is not whole pages"
        } else if m.range.last().0 > driver::mask(LEVELS + 1) {
            "an address of more than 48 bits"
        } else if last.is_none_or(|last| last >> (HOST_BITS - 1) != 0) {
            "a target of more than 51 bits"
        } else if m.range.overlaps(x86_msi().range) {
            "a mapping over x86's interrupts"
        } else if there.is_some_and(|there| there.range.overlaps(m.range)) {
            "a map that is refused since something is there, where it would be replaced"
        } else {
            ""
        };
        if !what.is_empty() {
            return self.cannot(&format!("{what}, at {}", m.range));
        }
        let mut freed = Vec::new();
        if !self.driver.map(root, m, !self.may_cut, &mut freed) {
            return self.full();
        }
        self.most_tables = self.most_tables.max(self.driver.tables_in_use());
        self.driver.flush(did, m.range, freed.is_empty());
        self.driver.give_back(freed);
        if let Some(tables) = self.domains.get_mut(&id) {
            tables.mappings.insert(m.range.start().0, *m);
        }
        self.expect(did, domain, m.range, Some(m));
        Answer::Core(Ok(()))
    }

    pub(super) fn unmap(&mut self, id: u32, domain: Option<&Domain>, range: IovaRange) -> Answer {
        let Some((domain, tables)) = domain.zip(self.domains.get(&id)) else {
            return Answer::Core(Err(Why::NoDomain));
        };
        let (did, root) = (tables.did, tables.root);
        let met = self.mappings(id, range);
        let cuts = met.iter().any(|m| !range.covers(m.range));
        if cuts && !self.may_cut || !range.is_aligned(PAGE) {
            let what = "an unmap that is refused since it would cut a mapping, or is not whole pages";
            return self.cannot(&format!("{what}, at {range}"));
        }
        let all = IovaRange::new(Iova(0), Iova(driver::mask(LEVELS + 1)));
        let Some(inside) = all.and_then(|all| range.intersect(all)) else { return Answer::Core(Ok(())) };
        let mut freed = Vec::new();
        self.driver.unmap(root, LEVELS, 0, inside, &mut freed);
        self.driver.flush(did, inside, freed.is_empty());
        self.driver.give_back(freed);
        if let Some(tables) = self.domains.get_mut(&id) {
            for m in met {
                tables.mappings.remove(&m.range.start().0);
                let before = range.start().0.checked_sub(1).map(Iova);
                let head = before.and_then(|last| IovaRange::new(m.range.start(), last));
                let tail = range.next().and_then(|next| IovaRange::new(next, m.range.last()));
                for rest in [head, tail].into_iter().flatten().filter_map(|rest| m.clip(rest)) {
                    tables.mappings.insert(rest.range.start().0, rest);
                }
            }
        }
        self.expect(did, domain, inside, None);
        Answer::Core(Ok(()))
    }

    /// What the record has over the range must be this, in whatever pieces.
    fn expect(&mut self, did: u16, domain: &Domain, range: IovaRange, due: Option<&Mapping>) {
        if !self.driver.vtd.is_followed(did.into()) {
            return;
        }
        let (mut next, mut right) = (Some(range.start()), true);
        domain.for_each(range, |m| {
            right &= due.is_some_and(|due| {
                let same = due.translate(m.range.start()) == m.gpa && due.access == m.access;
                same && next == Some(m.range.start()) && due.range.covers(m.range)
            });
            next = m.range.next();
            ControlFlow::Continue(())
        });
        right &= due.is_none() || next == range.next();
        if !right {
            let what = if due.is_some() { "was mapped" } else { "was unmapped" };
            self.driver.complaints.push(format!("the record does not say that {range} {what}"));
        }
    }
}

fn requester(id: u32) -> u16 {
    // Others have not been added.
    u16::try_from(id).unwrap_or(u16::MAX)
}
