//! What devices accessed: asked of our record and of the cache.

use viommu::{Access, FaultReason, Gpa, Iova, View};
use viommu_trace::Format;
use viommu_vhost::software::Lookup;

use super::told::lock;
use super::world::{Judge, Place};

/// Accesses whose answer may still come: lines of several threads lie between.
const WAITING: usize = 16;

const LAST_BYTE: &str = "an access to the last byte before a mapping is translated by that mapping";

/// What our record answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ours {
    Memory(Gpa),
    Bypass(Gpa),
    Msi,
    Fault,
}

/// A recorded access without an answer so far.
pub(super) struct Pending {
    line: u64,
    endpoint: u32,
    iova: Iova,
    access: Access,
    ours: Ours,
    /// Guest operations before it.
    after: u64,
    /// Its number among the entries of the history.
    entry: u64,
}

impl Judge {
    fn ask_record(&mut self, endpoint: u32, iova: Iova, access: Access) -> Ours {
        let Some(ep) = self.endpoints.get_mut(&endpoint) else { return Ours::Fault };
        let answer = self.guest.look(endpoint, &mut ep.eyes, iova, access);
        let (lost, translated, view) = (ep.lost, ep.translated, ep.handle.view());
        self.hear();
        match answer {
            Ok(t) if t.place == viommu::Place::Msi => Ours::Msi,
            // Where it is now says nothing of where the log has it.
            _ if lost => Ours::Fault,
            // Where all of memory passes, an address without memory passes too.
            Err(fault) if fault.reason == FaultReason::Unmapped && view == Some(View::Identity) => {
                Ours::Bypass(Gpa(iova.0))
            }
            Err(_) => Ours::Fault,
            Ok(t) if translated => Ours::Memory(t.gpa),
            Ok(t) => Ours::Bypass(t.gpa),
        }
    }

    pub(super) fn access(&mut self, line: u64, endpoint: u32, iova: Iova, access: Access) {
        if self.ensure_endpoint(endpoint).is_none() {
            return;
        }
        if self.op.switched.is_some() && self.op.endpoint == endpoint {
            self.settle_switch();
        }
        let ours = self.ask_record(endpoint, iova, access);
        if self.pending.len() >= WAITING
            && let Some(first) = self.pending.pop_front()
        {
            self.silent(&first, false);
        }
        let after = self.tally.operations();
        let entry = self.entries;
        self.pending.push_back(Pending { line, endpoint, iova, access, ours, after, entry });
    }

    pub(super) fn translated(&mut self, line: u64, endpoint: u32, iova: Iova, gpa: Gpa) {
        self.tally.translations.recorded += 1;
        if self.ensure_endpoint(endpoint).is_none() {
            self.tally.translations.unanswered += 1;
            return;
        }
        let matching = self.pending.iter().rposition(|p| p.endpoint == endpoint && p.iova == iova);
        let asked = matching.and_then(|at| self.pending.remove(at));
        let access = asked.as_ref().map_or(Access::empty(), |p| p.access);
        self.place(line, endpoint, iova, gpa, access);
        let now = self.tally.operations();
        let ours = match asked {
            Some(p) if p.after == now && p.ours == Ours::Memory(gpa) => p.ours,
            _ => self.ask_record(endpoint, iova, access),
        };
        let answers = match ours {
            Ours::Memory(at) | Ours::Bypass(at) => at == gpa,
            Ours::Msi | Ours::Fault => false,
        };
        if !answers {
            return self.explain(line, endpoint, iova, gpa, access, ours);
        }
        match self.ask_cache(endpoint, iova, access, gpa) {
            Ok(()) => {
                self.tally.translations.agree += 1;
                let domain = self.domain_of(endpoint);
                if let (Some(stats), Some(domain)) = (&mut self.stats, domain) {
                    stats.accessed(domain, iova);
                }
            }
            Err(why) => {
                self.tally.translations.differ += 1;
                self.tally.differ(line, || format!("endpoint {endpoint} at {iova}: {why}"));
            }
        }
    }

    fn domain_of(&self, endpoint: u32) -> Option<u32> {
        match self.endpoints.get(&endpoint)?.place {
            Place::In(domain) => Some(domain),
            _ => None,
        }
    }

    /// The endpoint's IOTLB, which misses and is filled as the device goes.
    fn ask_cache(&mut self, endpoint: u32, iova: Iova, access: Access, gpa: Gpa) -> Result<(), String> {
        let Some(ep) = self.endpoints.get(&endpoint) else { return Ok(()) };
        let iotlb = &ep.follower.iotlb;
        let mut found = lock(iotlb).lookup(iova, access);
        if found == Lookup::Miss
            && let Some(cache) = ep.follower.cache()
        {
            cache.fill(iova, access).map_err(|why| format!("the cache was not filled: {why}"))?;
            found = lock(iotlb).lookup(iova, access);
        }
        match found {
            Lookup::Hit(at) if at == gpa => Ok(()),
            Lookup::Hit(at) => Err(format!("the cache says {at}, the log {gpa}")),
            other => Err(format!("the cache says {other:?}, the log {gpa}")),
        }
    }

    /// Why our record does not give the recorded answer.
    fn explain(&mut self, line: u64, endpoint: u32, iova: Iova, gpa: Gpa, access: Access, ours: Ours) {
        let Some(ep) = self.endpoints.get(&endpoint) else { return };
        let (lost, place) = (ep.lost || self.op.absent.contains(&endpoint), ep.place);
        let Place::In(domain) = place else {
            if place == Place::Unknown {
                self.tally.translations.unanswered += 1;
            } else {
                self.differing(line, endpoint, iova, gpa, ours);
            }
            return;
        };
        let Some(dom) = self.domains.get(&domain) else { return };
        let lacked =
            dom.lacks.at(iova).is_some_and(|m| m.translate(iova) == gpa && m.access.contains(access));
        let before = dom.from_before && ours == Ours::Fault && !self.record_has(domain, iova);
        if lost || lacked || before {
            self.tally.translations.unanswered += 1;
        } else if access.is_empty() && self.without_access(domain, iova, gpa) {
            self.tally.translations.agree += 1;
        } else if self.is_last_byte(domain, iova, gpa) {
            self.tally.deviate(LAST_BYTE);
            self.tally.translations.unanswered += 1;
        } else {
            self.differing(line, endpoint, iova, gpa, ours);
        }
    }

    fn differing(&mut self, line: u64, endpoint: u32, iova: Iova, gpa: Gpa, ours: Ours) {
        self.tally.translations.differ += 1;
        self.tally.differ(line, || match ours {
            Ours::Memory(at) | Ours::Bypass(at) => {
                format!("endpoint {endpoint} at {iova}: our record says {at}, the log {gpa}")
            }
            Ours::Msi => {
                format!("endpoint {endpoint} at {iova}: an interrupt in our record, the log says {gpa}")
            }
            Ours::Fault => {
                format!("endpoint {endpoint} at {iova}: a fault in our record, the log says {gpa}")
            }
        });
    }

    fn record_has(&self, domain: u32, iova: Iova) -> bool {
        let handle = self.domains.get(&domain).and_then(|dom| dom.handle.as_ref());
        handle.and_then(|h| h.next_mapping(iova)).is_some_and(|m| m.range.contains(iova))
    }

    /// QEMU looks up two bytes, so the byte before a mapping finds it.
    fn is_last_byte(&self, domain: u32, iova: Iova, gpa: Gpa) -> bool {
        let Some(next) = iova.checked_add(1) else { return false };
        let handle = self.domains.get(&domain).and_then(|dom| dom.handle.as_ref());
        let found = handle.and_then(|h| h.next_mapping(next)).filter(|m| m.range.start() == next);
        found.is_some_and(|m| m.gpa.0.wrapping_sub(1) == gpa.0)
    }

    /// An endpoint whose domain the log has not named is where exactly one domain from before the history gives the
    /// recorded answer.
    fn place(&mut self, line: u64, endpoint: u32, iova: Iova, gpa: Gpa, access: Access) {
        let Some(ep) = self.endpoints.get(&endpoint) else { return };
        let never_attached = !matches!(ep.place, Place::In(_)) && self.format != Format::LinuxTrace;
        if !never_attached || !self.domains.values().any(|dom| dom.from_before) {
            return;
        }
        let answers = self.domains.iter().filter(|(_, dom)| dom.from_before).filter(|(_, dom)| {
            let found = dom.handle.as_ref().and_then(|h| h.next_mapping(iova));
            let found = found.filter(|m| m.range.contains(iova) && m.access.contains(access));
            found.is_some_and(|m| m.translate(iova) == gpa)
        });
        let mut ids = answers.map(|(id, _)| *id);
        if let (Some(domain), None) = (ids.next(), ids.next()) {
            drop(ids);
            self.found_in(line, endpoint, domain);
        }
    }

    /// No answer was recorded.
    fn silent(&mut self, pending: &Pending, fault: bool) {
        let Pending { line, endpoint, iova, ours, .. } = *pending;
        match ours {
            Ours::Fault => {
                let Some(ep) = self.endpoints.get(&endpoint) else { return };
                let stale = lock(&ep.follower.iotlb)
                    .entry(iova)
                    .is_some_and(|entry| entry.access.contains(pending.access));
                if stale && pending.after == self.tally.operations() {
                    self.tally.silent.differ += 1;
                    self.tally.differ(line, || format!("endpoint {endpoint} at {iova}: the cache is stale"));
                } else {
                    self.tally.silent.fault += 1;
                }
            }
            Ours::Msi if !fault => self.tally.silent.msi += 1,
            Ours::Bypass(_) if !fault => self.tally.silent.bypass += 1,
            Ours::Msi | Ours::Bypass(_) | Ours::Memory(_) => {
                self.tally.silent.differ += 1;
                let log = if fault { "a fault" } else { "no answer" };
                self.tally
                    .differ(line, || format!("endpoint {endpoint} at {iova}: {ours:?}, the log has {log}"));
            }
        }
    }

    /// The log reports a fault of an access.
    pub(super) fn fault_told(&mut self, endpoint: u32, iova: Iova) {
        let matching = self.pending.iter().rposition(|p| p.endpoint == endpoint && p.iova == iova);
        let Some(mut pending) = matching.and_then(|at| self.pending.remove(at)) else { return };
        if pending.after != self.tally.operations() {
            pending.ours = self.ask_record(endpoint, iova, pending.access);
            pending.after = self.tally.operations();
        }
        self.silent(&pending, true);
    }

    pub(super) fn resolve_all(&mut self) {
        while let Some(pending) = self.pending.pop_front() {
            // A history may end before the answer to its last line.
            if pending.entry != self.entries || !matches!(pending.ours, Ours::Memory(_)) {
                self.silent(&pending, false);
            }
        }
    }
}
