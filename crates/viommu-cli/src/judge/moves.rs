//! Attach, detach, reset and bypass, as the log shows them.

use core::ops::ControlFlow;

use viommu::endpoint::{Region, RegionKind};
use viommu::{Access, AttachErrorKind, Iova, IovaRange, ResetKind, Target, View};
use viommu_trace::{Reserved, Reset};

use super::follower::Home;
use super::world::{Judge, Kind, Place, x86_msi};

const REATTACH: &str = "an attach of a domain's only endpoint to it again drops its mappings";
const PAGE: u64 = 4096;

impl Judge {
    pub(super) fn attach(&mut self, line: u64, domain: u32, endpoint: u32, bypass: bool) {
        self.begin(Kind::Attach, line);
        self.tally.attach += 1;
        (self.op.domain, self.op.endpoint) = (domain, endpoint);
        let Some(ep) = self.ensure_endpoint(endpoint) else { return };
        if let Place::In(old) = ep.place {
            let drops = self.domains.get(&old).is_some_and(|dom| {
                let full = dom.handle.as_ref().is_some_and(|handle| !handle.is_empty());
                dom.members == [endpoint] && (full || !dom.lacks.is_empty())
            });
            if old == domain && drops {
                self.tally.deviate(REATTACH);
            }
            self.leave(endpoint, old);
        }
        self.known.insert(domain);
        self.op.existed = self.domains.contains_key(&domain);
        if !self.op.existed && self.make_domain(domain, bypass).is_none() {
            return;
        }
        self.join(endpoint, domain, true);
    }

    /// Puts an endpoint that is in no domain into one. Where a mirror waited for an endpoint, this is it.
    pub(super) fn join(&mut self, endpoint: u32, domain: u32, asked: bool) {
        let Some(dom) = self.domains.get_mut(&domain) else { return };
        let waiting = dom.follower.take();
        dom.members.push(endpoint);
        let bypass = dom.handle.is_none();
        if let Some(ep) = self.endpoints.get_mut(&endpoint) {
            ep.place = Place::In(domain);
            if let Some(waiting) = waiting {
                ep.follower.succeed(waiting.totals());
                ep.follower.fences += waiting.fences;
            }
        }
        if bypass {
            self.go(endpoint, View::Identity, false);
        } else {
            self.go(endpoint, View::Domain(domain), asked);
        }
    }

    /// As the log has it, and as no guest operation asks for it.
    pub(super) fn go_unasked(&mut self, endpoint: u32, domain: Option<u32>) {
        match domain {
            Some(id) if self.domains.get(&id).is_some_and(|dom| dom.handle.is_some()) => {
                self.go(endpoint, View::Domain(id), false);
            }
            _ => self.go(endpoint, View::Identity, false),
        }
    }

    /// Brings an endpoint to a view by way of nothing, so that its mirror is told of one address space at a time.
    /// `asked`: a guest operation asks for it, and the recorded VMM tells its own subscribers.
    fn go(&mut self, endpoint: u32, to: View, asked: bool) {
        self.block(endpoint, asked);
        let Some(ep) = self.endpoints.get_mut(&endpoint) else { return };
        let asked = asked && matches!(to, View::Domain(_));
        let before = ep.follower.raw();
        ep.follower.guest_asks(asked);
        let outcome = match to {
            View::Domain(domain) => ep.handle.attach(domain),
            View::Identity => ep.handle.attach_identity(),
            View::Blocked => ep.handle.block(),
        };
        ep.follower.guest_asks(false);
        if !asked {
            ep.follower.skip_from(before);
        }
        ep.translated = outcome.is_ok() && matches!(to, View::Domain(_));
        ep.lost = outcome.is_err();
        match outcome {
            Ok(done) => self.settle(done),
            Err(error) => {
                let told = ep.regions_told;
                let reserved = matches!(error.kind, AttachErrorKind::Reserved { .. });
                if !told && reserved && !ep.handle.regions().is_empty() {
                    return self.rebuild_endpoint(endpoint, Vec::new());
                }
                if matches!(error.kind, AttachErrorKind::Unreachable { .. }) {
                    ep.follower.refused_ahead();
                }
                if asked {
                    self.tally.refused_here += 1;
                }
            }
        }
        self.after_step();
    }

    /// Takes all away from an endpoint.
    fn block(&mut self, endpoint: u32, asked: bool) {
        if !self.op.involved.contains(&endpoint) {
            self.op.involved.push(endpoint);
        }
        let Some(ep) = self.endpoints.get_mut(&endpoint) else { return };
        if ep.lost && !self.op.absent.contains(&endpoint) {
            self.op.absent.push(endpoint);
        }
        let view = ep.handle.view();
        if ep.handle.attached() == Some(View::Blocked) && !ep.follower.is_fenced() {
            return;
        }
        let asked = asked && matches!(view, Some(View::Domain(_)));
        ep.translated = false;
        let before = ep.follower.raw();
        ep.follower.guest_asks(asked);
        // Who is fenced can only be detached; it sees nothing anyway.
        let fenced = ep.follower.is_fenced();
        let outcome = if fenced { ep.handle.detach() } else { ep.handle.block() };
        ep.follower.guest_asks(false);
        if !asked {
            ep.follower.skip_from(before);
        }
        self.settle_or(outcome.map_err(|error| error.to_string()), "taking a view away");
        self.after_step();
    }

    /// Takes an endpoint out of its domain, which dies with its last. Its own next view comes after this.
    fn leave(&mut self, endpoint: u32, domain: u32) {
        self.note_quiet(domain);
        self.block(endpoint, true);
        if let Some(ep) = self.endpoints.get_mut(&endpoint) {
            ep.place = Place::Nowhere;
        }
        let Some(dom) = self.domains.get_mut(&domain) else { return };
        dom.members.retain(|member| *member != endpoint);
        if dom.members.is_empty() {
            // Others may be in it that the log has not named: then it comes into being once more.
            if dom.from_before {
                self.known.remove(&domain);
            }
            self.destroy(domain);
        }
    }

    /// The mappings of a domain that QEMU announces the end of, though it never announced them.
    fn note_quiet(&mut self, domain: u32) {
        let Some(dom) = self.domains.get(&domain) else { return };
        self.op.lost.extend(dom.lacks.touching(IovaRange::ALL));
        let quiet = &mut self.op.quiet;
        if let Some(handle) = &dom.handle {
            handle.for_each(IovaRange::ALL, |m| {
                if m.target == Target::Mmio || m.access.is_empty() {
                    quiet.push(m);
                }
                ControlFlow::Continue(())
            });
        }
    }

    fn destroy(&mut self, domain: u32) {
        let Some(mut dom) = self.domains.remove(&domain) else { return };
        let lost = dom.lacks.take_all();
        self.op.lost.extend(lost);
        if let (Some(handle), Some(stats)) = (&dom.handle, &mut self.stats) {
            stats.dropped(handle.len() as u64);
        }
        if dom.handle.take().is_some() {
            let gone = self.iommu.destroy_domain(domain).map_err(|error| error.to_string());
            self.settle_or(gone, "the end of a domain");
        }
    }

    pub(super) fn detach(&mut self, line: u64, domain: u32, endpoint: u32) {
        self.begin(Kind::Detach, line);
        self.tally.detach += 1;
        (self.op.domain, self.op.endpoint) = (domain, endpoint);
        let Some(ep) = self.ensure_endpoint(endpoint) else { return };
        match ep.place {
            Place::In(now) if now == domain => self.leave(endpoint, domain),
            Place::Unknown => {
                // It was in the domain before the history begins.
                if self.domains.contains_key(&domain) {
                    self.tally.note_found(endpoint, domain, line);
                    self.join(endpoint, domain, false);
                    self.leave(endpoint, domain);
                } else if let Some(ep) = self.endpoints.get_mut(&endpoint) {
                    ep.place = Place::Nowhere;
                }
            }
            // A domain that it is not in: refused by the recorded VMM and here.
            _ => return,
        }
        self.unattach(endpoint);
    }

    /// What an endpoint sees that nothing is attached to.
    fn unattach(&mut self, endpoint: u32) {
        let Some(ep) = self.endpoints.get_mut(&endpoint) else { return };
        let before = ep.follower.raw();
        let outcome = ep.handle.detach();
        ep.follower.skip_from(before);
        ep.lost = ep.follower.is_fenced();
        match outcome {
            Ok(done) => self.settle(done),
            Err(_) => ep.lost = true,
        }
    }

    pub(super) fn reset(&mut self, line: u64, reset: Reset) {
        self.begin(Kind::Reset, line);
        self.tally.resets += 1;
        let domains: Vec<u32> = self.domains.keys().copied().collect();
        domains.iter().for_each(|domain| self.note_quiet(*domain));
        let endpoints: Vec<u32> = self.endpoints.keys().copied().collect();
        for id in &endpoints {
            let placed = self.endpoints.get_mut(id).is_some_and(|ep| {
                let placed = matches!(ep.place, Place::In(_));
                ep.place = Place::Nowhere;
                placed
            });
            if placed {
                self.block(*id, true);
            }
        }
        let befores: Vec<_> = self.endpoints.values().map(|ep| ep.follower.raw()).collect();
        match self.iommu.reset(ResetKind::Device) {
            Ok(reset) => self.settle(reset.completion),
            Err(error) => self.settle(error.completion),
        }
        for (ep, before) in self.endpoints.values_mut().zip(befores) {
            ep.follower.skip_from(before);
            let fenced = ep.follower.is_fenced();
            ep.lost = fenced;
        }
        for domain in domains {
            if let (Some(dom), Some(stats)) = (self.domains.get(&domain), &mut self.stats) {
                stats.dropped(dom.handle.as_ref().map_or(0, |handle| handle.len()) as u64);
            }
            // The unit has dropped it, if nothing that is fenced held it.
            if self.iommu.domain(domain).is_some() {
                drop(self.iommu.destroy_domain(domain));
            }
        }
        self.domains.clear();
        if matches!(reset, Reset::System) {
            self.set_bypass(self.boot_bypass);
        }
    }

    /// QEMU's line for an endpoint that left. Those that an operation of the guest's makes are followed already.
    pub(super) fn detached(&mut self, domain: u32, endpoint: u32) {
        let followed = match self.op.kind {
            Kind::Attach | Kind::Detach => self.op.endpoint == endpoint,
            Kind::Reset => true,
            _ => false,
        };
        if followed {
            return;
        }
        if self.endpoints.get(&endpoint).is_some_and(|ep| ep.place == Place::In(domain)) {
            self.leave(endpoint, domain);
            self.unattach(endpoint);
        }
    }

    pub(super) fn endpoint_removed(&mut self, endpoint: u32) {
        if let Some(Place::In(domain)) = self.endpoints.get(&endpoint).map(|ep| ep.place) {
            self.detached(domain, endpoint);
        }
    }

    pub(super) fn domain_removed(&mut self, domain: u32) {
        if self.op.kind == Kind::Attach && self.op.domain == domain {
            return; // dropped and made again, as followed
        }
        let Some(dom) = self.domains.get(&domain) else { return };
        self.known.insert(domain);
        for endpoint in dom.members.clone() {
            self.leave(endpoint, domain);
            self.unattach(endpoint);
        }
        self.destroy(domain);
    }

    /// The recorded VMM made the domain: what we had under its number from before is gone.
    pub(super) fn domain_added(&mut self, domain: u32) {
        let attach = self.op.kind == Kind::Attach && self.op.domain == domain;
        if !attach || !self.op.existed {
            return;
        }
        self.op.existed = false;
        let endpoint = self.op.endpoint;
        let members = self.domains.get(&domain).map(|dom| dom.members.clone()).unwrap_or_default();
        for member in members {
            self.leave(member, domain);
            if member != endpoint {
                self.unattach(member);
            }
        }
        self.destroy(domain);
        if self.make_domain(domain, false).is_some() {
            self.known.insert(domain);
            self.join(endpoint, domain, true);
        }
    }

    /// A switch tells of the operation's own endpoint where it went, and of one without a domain what bypass is.
    pub(super) fn switched(&mut self, bus: u8, devfn: u8, enabled: bool) {
        let own = matches!(self.op.kind, Kind::Attach | Kind::Detach)
            && self.op.endpoint & 0xff == u32::from(devfn)
            && (bus == 0 || self.op.endpoint == u32::from(bus) << 8 | u32::from(devfn));
        if own {
            self.op.switched = Some(enabled);
            return;
        }
        let id = u32::from(bus) << 8 | u32::from(devfn);
        if self.endpoints.get(&id).is_some_and(|ep| matches!(ep.place, Place::In(_))) {
            return;
        }
        if self.op.kind == Kind::None {
            self.boot_bypass = !enabled;
        }
        self.bypass(!enabled);
    }

    /// What the last switch of an operation said, once its lines are over.
    pub(super) fn settle_switch(&mut self) {
        let (Some(enabled), endpoint) = (self.op.switched.take(), self.op.endpoint) else { return };
        let domain = self.op.domain;
        match self.op.kind {
            Kind::Attach if !enabled => {
                // A bypass domain: QEMU's ATTACH line does not say so.
                let Some(dom) = self.domains.get_mut(&domain) else { return };
                if dom.handle.as_ref().is_some_and(|handle| handle.is_empty()) {
                    let members = dom.members.clone();
                    members.iter().for_each(|member| self.go(*member, View::Identity, false));
                    if let Some(dom) = self.domains.get_mut(&domain) {
                        dom.handle = None;
                    }
                    let gone = self.iommu.destroy_domain(domain).map_err(|error| error.to_string());
                    self.settle_or(gone, "a bypass domain");
                }
            }
            Kind::Detach if self.endpoints.get(&endpoint).is_some_and(|ep| ep.place == Place::Nowhere) => {
                self.bypass(!enabled);
            }
            _ => {}
        }
    }

    pub(super) fn bypass(&mut self, on: bool) {
        if self.iommu.bypass() != on {
            self.set_bypass(on);
        }
    }

    fn set_bypass(&mut self, on: bool) {
        let befores: Vec<_> = self.endpoints.values().map(|ep| ep.follower.raw()).collect();
        match self.iommu.set_bypass(on) {
            Ok(done) => self.settle(done),
            // A mirror that cannot hold all of memory: its endpoint stays without it.
            Err(error) => self.settle(error.completion),
        }
        for (ep, before) in self.endpoints.values_mut().zip(befores) {
            ep.follower.skip_from(before);
        }
        self.after_step();
    }

    /// Reserved regions are told by PROBE; x86's are assumed until then.
    pub(super) fn reserved(&mut self, endpoint: u32, kind: Reserved, range: IovaRange) {
        let Some(ep) = self.ensure_endpoint(endpoint) else { return };
        let mask = PAGE - 1;
        let (start, last) = (range.start().0 & !mask, range.last().0 | mask);
        let Some(range) = IovaRange::new(Iova(start), Iova(last)) else { return };
        let kind = if kind == Reserved::Msi { RegionKind::Msi } else { RegionKind::Reserved };
        let region = Region { range, kind };
        let mut regions = if ep.regions_told { ep.handle.regions() } else { Vec::new() };
        ep.regions_told = true;
        if regions.iter().any(|old| old.range.overlaps(range)) {
            return; // told before
        }
        regions.push(region);
        if regions != ep.handle.regions() {
            self.rebuild_endpoint(endpoint, regions);
        }
    }

    /// Whether x86's MSI region was only assumed for an endpoint of the domain; if so, it is assumed no more.
    pub(super) fn forget_assumed(&mut self, domain: u32) -> bool {
        let Some(dom) = self.domains.get(&domain) else { return false };
        let assumed = |id: &u32| {
            self.endpoints.get(id).is_some_and(|ep| !ep.regions_told && ep.handle.regions() == [x86_msi()])
        };
        let whose: Vec<u32> = dom.members.iter().copied().filter(assumed).collect();
        for id in &whose {
            self.rebuild_endpoint(*id, Vec::new());
        }
        !whose.is_empty()
    }

    /// Who could not follow a step is fenced; with `--unfence` it gets a successor.
    pub(super) fn after_step(&mut self) {
        if !self.options.fails() {
            return;
        }
        let Self { endpoints, domains, op, tally, options, iommu, .. } = self;
        for (id, ep) in endpoints.iter_mut().filter(|(_, ep)| ep.follower.is_fenced()) {
            if ep.follower.newly_fenced() {
                tally.fences += 1;
                op.absent.push(*id);
            }
            ep.lost = true;
            if options.unfence && ep.follower.renew(&Home::Endpoint(&ep.handle), options).is_ok() {
                ep.lost = !ep.is_in_place();
            }
        }
        let waiting = domains.iter_mut().filter_map(|(id, dom)| Some((*id, dom.follower.as_mut()?)));
        for (id, follower) in waiting.filter(|(_, follower)| follower.is_fenced()) {
            tally.fences += u64::from(follower.newly_fenced());
            if options.unfence {
                // Left fenced where it is refused.
                let _ = follower.renew(&Home::Domain(iommu, id), options);
            }
        }
    }

    /// What is asked of an endpoint without rights is answered by what the record says of the address.
    pub(super) fn without_access(&self, domain: u32, iova: Iova, gpa: viommu::Gpa) -> bool {
        let handle = self.domains.get(&domain).and_then(|dom| dom.handle.as_ref());
        let found = handle.and_then(|handle| handle.next_mapping(iova));
        found.is_some_and(|m| {
            m.range.contains(iova) && m.access == Access::empty() && m.translate(iova) == gpa
        })
    }
}
