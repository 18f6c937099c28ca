//! Attach, detach, reset and bypass, as the log shows them.

use core::ops::ControlFlow;

use viommu::endpoint::{Region, RegionKind};
use viommu::{Access, Iova, IovaRange, Target, View};
use viommu_trace::{Reserved, Reset};

use super::follower::Home;
use super::guest::Why;
use super::told::Asks;
use super::world::{Judge, Kind, Place, x86_msi};

const REATTACH: &str = "an attach of a domain's only endpoint to it again drops its mappings";
const PAGE: u64 = 4096;

impl Judge {
    pub(super) fn attach(&mut self, line: u64, domain: u32, endpoint: u32, bypass: bool) {
        self.begin(Kind::Attach, line);
        self.tally.attach += 1;
        (self.op.domain, self.op.endpoint) = (domain, endpoint);
        let Some(ep) = self.ensure_endpoint(endpoint) else { return };
        let mut old = if let Place::In(old) = ep.place { Some(old) } else { None };
        if old == Some(domain) {
            self.attach_again(endpoint, domain);
            old = None;
        }
        self.known.insert(domain);
        self.op.existed = self.domains.contains_key(&domain);
        if !self.op.existed {
            self.make_domain(domain, bypass);
        }
        let live = old.map(|old| self.prepare_to_leave(endpoint, old));
        self.join(endpoint, domain, true);
        if let (Some(old), Some(live)) = (old, live) {
            if self.guest.attached(endpoint) == Some(old) {
                // It was refused, and is where it was; not so in the log.
                self.take_out(endpoint, old);
                if let Some(ep) = self.endpoints.get_mut(&endpoint) {
                    ep.lost = true;
                }
            }
            self.forget_member(endpoint, old, live);
        }
    }

    /// An ATTACH to where the endpoint is changes nothing for our device. QEMU takes it out and puts it in again.
    fn attach_again(&mut self, endpoint: u32, domain: u32) {
        let Some(dom) = self.domains.get(&domain) else { return };
        let full = dom.handle.as_ref().is_some_and(|handle| !handle.is_empty());
        if dom.members == [endpoint] && (full || !dom.lacks.is_empty()) {
            self.tally.deviate(REATTACH);
        }
        if self.guest.attached(endpoint) == Some(domain) {
            let bypass = dom.bypass;
            if let Err(why) = self.step_attach(endpoint, domain, bypass) {
                let line = self.op.line;
                self.tally.differ(line, || format!("an attach to where it is: {why:?}"));
            }
        }
        self.leave(endpoint, domain);
    }

    /// Puts an endpoint into a domain. Where a mirror waited for an endpoint, this is it.
    pub(super) fn join(&mut self, endpoint: u32, domain: u32, asked: bool) {
        let Some(dom) = self.domains.get_mut(&domain) else { return };
        let waiting = dom.follower.take();
        dom.members.push(endpoint);
        if let Some(ep) = self.endpoints.get_mut(&endpoint) {
            ep.place = Place::In(domain);
            if let Some(waiting) = waiting {
                ep.follower.succeed(waiting.totals());
                ep.follower.fences += waiting.fences;
            }
        }
        self.go(endpoint, domain, asked);
    }

    /// The endpoint is about to see something else.
    fn involve(&mut self, endpoint: u32) {
        if !self.op.involved.contains(&endpoint) {
            self.op.involved.push(endpoint);
        }
        let lost = self.endpoints.get(&endpoint).is_some_and(|ep| ep.lost);
        if lost && !self.op.absent.contains(&endpoint) {
            self.op.absent.push(endpoint);
        }
    }

    /// Attaches an endpoint to a domain that it is a member of, as one step from wherever it is. `asked`: a guest
    /// operation asks for it, and the recorded VMM tells its own subscribers.
    pub(super) fn go(&mut self, endpoint: u32, domain: u32, asked: bool) {
        self.involve(endpoint);
        let Some(bypass) = self.domains.get(&domain).map(|dom| dom.bypass) else { return };
        let Some(ep) = self.endpoints.get_mut(&endpoint) else { return };
        // All of memory is nothing that the recorded VMM tells of.
        let sees_domain = matches!(ep.handle.view(), Some(View::Domain(_)));
        ep.follower.asks(Asks { maps: asked && !bypass, unmaps: asked && sees_domain });
        let outcome = self.step_attach(endpoint, domain, bypass);
        let Some(ep) = self.endpoints.get_mut(&endpoint) else { return };
        ep.follower.asks(Asks::NOTHING);
        ep.translated = outcome.is_ok() && !bypass;
        ep.lost = outcome.is_err();
        let (regions_told, regions) = (ep.regions_told, ep.regions.len());
        if outcome == Err(Why::Unreachable) {
            ep.follower.refused_ahead();
        }
        if outcome.is_ok() {
            self.guest.release(domain);
        } else if !bypass {
            // The log has the endpoint there, and mappings to come.
            self.guest.hold(domain);
        }
        self.hear();
        let record = self.guest.domain(domain);
        if let Some(dom) = self.domains.get_mut(&domain) {
            dom.handle = record;
        }
        if outcome == Err(Why::Reserved) && !regions_told && regions != 0 {
            return self.rebuild_endpoint(endpoint, Vec::new());
        }
        if asked && outcome.is_err() && !bypass {
            self.tally.refused_here += 1;
        }
        self.after_step();
    }

    /// What there is to note before an endpoint leaves a domain. Gives the mappings that go if it is the last one.
    fn prepare_to_leave(&mut self, endpoint: u32, domain: u32) -> u64 {
        self.note_quiet(domain);
        self.involve(endpoint);
        let Some(dom) = self.domains.get(&domain) else { return 0 };
        if !dom.bypass && dom.members.iter().any(|member| *member != endpoint) {
            // Others are in it by the log, also such as were refused here.
            self.guest.keep(domain, endpoint);
        }
        dom.handle.as_ref().map_or(0, |handle| handle.len() as u64)
    }

    /// Detaches an endpoint, if it is in that domain here.
    fn take_out(&mut self, endpoint: u32, domain: u32) {
        let Some(ep) = self.endpoints.get_mut(&endpoint) else { return };
        let sees_domain = matches!(ep.handle.view(), Some(View::Domain(_)));
        ep.follower.asks(Asks { maps: false, unmaps: sees_domain });
        let outcome = self.step_detach(endpoint, domain);
        if let Some(ep) = self.endpoints.get_mut(&endpoint) {
            ep.follower.asks(Asks::NOTHING);
            ep.translated = false;
            ep.lost = ep.follower.is_fenced() || matches!(outcome, Err(why) if why != Why::NotAttached);
        }
        self.after_step();
    }

    /// Takes an endpoint out of its domain, which dies with its last.
    fn leave(&mut self, endpoint: u32, domain: u32) {
        let live = self.prepare_to_leave(endpoint, domain);
        self.take_out(endpoint, domain);
        if let Some(ep) = self.endpoints.get_mut(&endpoint) {
            ep.place = Place::Nowhere;
        }
        self.forget_member(endpoint, domain, live);
    }

    /// A domain without members is no more.
    fn forget_member(&mut self, endpoint: u32, domain: u32, live: u64) {
        let Some(dom) = self.domains.get_mut(&domain) else { return };
        dom.members.retain(|member| *member != endpoint);
        if dom.members.is_empty() {
            // Others may be in it that the log has not named: then it comes into being once more.
            if dom.from_before {
                self.known.remove(&domain);
            }
            self.destroy(domain, live);
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

    /// Nothing of a domain is left, which had so many mappings.
    fn destroy(&mut self, domain: u32, live: u64) {
        let Some(mut dom) = self.domains.remove(&domain) else { return };
        let lost = dom.lacks.take_all();
        self.op.lost.extend(lost);
        if let Some(stats) = &mut self.stats {
            stats.dropped(live);
        }
        self.guest.release(domain);
        self.hear();
        self.move_interfaces();
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
                } else {
                    let _refused = self.step_detach(endpoint, domain);
                    if let Some(ep) = self.endpoints.get_mut(&endpoint) {
                        ep.place = Place::Nowhere;
                    }
                }
            }
            // A domain that it is not in: refused by the recorded VMM and here.
            _ => {
                let _refused = self.step_detach(endpoint, domain);
            }
        }
    }

    pub(super) fn reset(&mut self, line: u64, reset: Reset) {
        self.begin(Kind::Reset, line);
        self.tally.resets += 1;
        let domains: Vec<u32> = self.domains.keys().copied().collect();
        domains.iter().for_each(|domain| self.note_quiet(*domain));
        if let Some(stats) = &mut self.stats {
            let records = self.domains.values().filter_map(|dom| dom.handle.as_ref());
            records.for_each(|record| stats.dropped(record.len() as u64));
        }
        let endpoints: Vec<u32> = self.endpoints.keys().copied().collect();
        for id in &endpoints {
            let Some(ep) = self.endpoints.get_mut(id) else { continue };
            let placed = matches!(ep.place, Place::In(_));
            ep.place = Place::Nowhere;
            let sees_domain = matches!(ep.handle.view(), Some(View::Domain(_)));
            ep.follower.asks(Asks { maps: false, unmaps: placed && sees_domain });
            if placed {
                self.involve(*id);
            }
        }
        self.guest.reset();
        self.hear();
        for ep in self.endpoints.values_mut() {
            ep.follower.asks(Asks::NOTHING);
            ep.translated = false;
            ep.lost = ep.follower.is_fenced();
        }
        self.domains.clear();
        self.after_step();
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
        }
    }

    pub(super) fn endpoint_removed(&mut self, endpoint: u32) {
        // No operation of the guest's does that, but for a reset, after which it is nowhere.
        if let Some(Place::In(domain)) = self.endpoints.get(&endpoint).map(|ep| ep.place) {
            self.leave(endpoint, domain);
        }
    }

    pub(super) fn domain_removed(&mut self, domain: u32) {
        if self.op.kind == Kind::Attach && self.op.domain == domain {
            return; // dropped and made again, as followed
        }
        let Some(dom) = self.domains.get(&domain) else { return };
        for endpoint in dom.members.clone() {
            self.leave(endpoint, domain);
        }
        self.known.insert(domain);
        self.destroy_live(domain);
    }

    /// The end of a domain that no endpoint is known in.
    fn destroy_live(&mut self, domain: u32) {
        let record = self.domains.get(&domain).and_then(|dom| dom.handle.as_ref());
        let live = record.map_or(0, |record| record.len() as u64);
        self.destroy(domain, live);
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
        }
        self.destroy_live(domain);
        self.make_domain(domain, false);
        self.known.insert(domain);
        self.join(endpoint, domain, true);
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
                    dom.handle = None;
                    dom.bypass = true;
                    for member in &members {
                        self.take_out(*member, domain);
                    }
                    self.guest.release(domain);
                    self.hear();
                    members.iter().for_each(|member| self.go(*member, domain, false));
                }
            }
            Kind::Detach if self.endpoints.get(&endpoint).is_some_and(|ep| ep.place == Place::Nowhere) => {
                self.bypass(!enabled);
            }
            _ => {}
        }
    }

    pub(super) fn bypass(&mut self, on: bool) {
        if self.guest.bypass() != on {
            self.set_bypass(on);
        }
    }

    fn set_bypass(&mut self, on: bool) {
        self.guest.set_bypass(on);
        self.hear();
        // A mirror of few extents may have no room for all of memory.
        if self.guest.bypass() != on && self.options.limit_entries.is_none() {
            let line = self.op.line;
            self.tally.differ(line, || format!("bypass is not {on} after it was written"));
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
        let mut regions = if ep.regions_told { ep.regions.clone() } else { Vec::new() };
        ep.regions_told = true;
        if regions.iter().any(|old| old.range.overlaps(range)) {
            return; // told before
        }
        regions.push(region);
        if regions != ep.regions {
            self.rebuild_endpoint(endpoint, regions);
        }
    }

    /// Whether x86's MSI region was only assumed for an endpoint of the domain; if so, it is assumed no more.
    pub(super) fn forget_assumed(&mut self, domain: u32) -> bool {
        let Some(dom) = self.domains.get(&domain) else { return false };
        let assumed =
            |id: &u32| self.endpoints.get(id).is_some_and(|ep| !ep.regions_told && ep.regions == [x86_msi()]);
        let whose: Vec<u32> = dom.members.iter().copied().filter(assumed).collect();
        for id in &whose {
            self.rebuild_endpoint(*id, Vec::new());
        }
        !whose.is_empty()
    }

    /// Who could not follow a step is fenced; with `--unfence` it gets a successor.
    pub(super) fn after_step(&mut self) {
        self.move_interfaces();
        if !self.options.fails() {
            return;
        }
        let Self { endpoints, domains, op, tally, options, guest, .. } = self;
        for (id, ep) in endpoints.iter_mut().filter(|(_, ep)| ep.follower.is_fenced()) {
            if ep.follower.newly_fenced() {
                tally.fences += 1;
                op.absent.push(*id);
            }
            ep.lost = true;
            if options.unfence && ep.follower.renew(&Home::Endpoint(&ep.handle), options).is_ok() {
                let bypass = |domain| domains.get(&domain).is_some_and(|dom| dom.bypass);
                ep.lost = match ep.place {
                    Place::In(domain) if bypass(domain) => ep.handle.view() != Some(View::Identity),
                    Place::In(domain) => ep.handle.view() != Some(View::Domain(domain)),
                    Place::Unknown | Place::Nowhere => false,
                };
            }
        }
        let waiting = domains.iter_mut().filter_map(|(id, dom)| Some((*id, dom.follower.as_mut()?)));
        for (id, follower) in waiting.filter(|(_, follower)| follower.is_fenced()) {
            tally.fences += u64::from(follower.newly_fenced());
            if options.unfence {
                // Left fenced where it is refused.
                let _ = follower.renew(&Home::Domain(guest.iommu(), id), options);
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
