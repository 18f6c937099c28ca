//! Operations are made here, and what they come to is compared with what the record says they should.

use core::ops::ControlFlow;

use viommu::{IovaRange, Mapping, Target, View};
use viommu_vfio::software::DEFAULT_DMA_ENTRY_LIMIT;

use super::follower::Follower;
use super::guest::{Answer, HALF, TABLE_BYTES, Why};
use super::world::{Ep, Judge};

const PAGE: u64 = 4096;
/// Domains that a unit takes unless told otherwise.
const DOMAINS: usize = 65_536;
/// Tables that are full have less than this left.
const NEARLY: u64 = 1 << 20;

/// Extents that a mirror gets for a mapping: backing is in two halves.
fn extents(m: &Mapping) -> u64 {
    if m.target == Target::Mmio || m.access.is_empty() {
        return 0;
    }
    let last = m.gpa.0.saturating_add(m.range.last().0 - m.range.start().0);
    1 + u64::from(m.gpa.0 < HALF && last >= HALF)
}

impl Judge {
    fn limit(&self) -> u64 {
        self.options.limit_entries.unwrap_or(DEFAULT_DMA_ENTRY_LIMIT).into()
    }

    /// The answer, against what is expected: one of these, or a refusal by one of the mirrors or a cap.
    fn conclude(
        &mut self,
        answer: Answer,
        mut expected: Vec<Result<(), Why>>,
        mirrors: bool,
    ) -> Result<(), Why> {
        if mirrors && expected.first() == Some(&Ok(())) {
            expected = vec![Err(Why::Refused)];
        } else if answer.is_out_of_memory() && self.guest.iommu().table_bytes() + NEARLY > TABLE_BYTES {
            expected = vec![Err(Why::Cap)];
        }
        let (outcome, wrong) = answer.conclude(&expected);
        if let Some(wrong) = wrong {
            let line = self.op.line;
            self.tally.differ(line, || wrong);
        }
        self.hear();
        outcome
    }

    /// Whether a mirror that follows the domain has refused.
    fn newly_refused(&mut self, domain: u32, answer: &Answer) -> bool {
        if answer.is_ok() && !self.options.fails() {
            return false;
        }
        let Some(dom) = self.domains.get_mut(&domain) else { return false };
        let refused = |follower: &mut Follower| follower.newly_refused() && !follower.is_fenced();
        let mut any = dom.follower.as_mut().is_some_and(refused);
        for id in &dom.members {
            any |= self.endpoints.get_mut(id).is_some_and(|ep| refused(&mut ep.follower));
        }
        self.reals.newly_refused(self.guest.number(domain)) || any
    }

    pub(super) fn step_map(&mut self, domain: u32, mapping: Mapping) -> Result<(), Why> {
        let expected =
            if self.guest.is_checked() { vec![self.expect_map(domain, &mapping)] } else { Vec::new() };
        let handle = self.domains.get(&domain).and_then(|dom| dom.handle.as_ref());
        let answer = self.guest.map(domain, handle, mapping);
        let refused = self.newly_refused(domain, &answer);
        self.conclude(answer, expected, refused)
    }

    /// In the order in which they count.
    fn expect_map(&mut self, domain: u32, m: &Mapping) -> Result<(), Why> {
        if !m.gpa.0.is_multiple_of(PAGE) || !m.range.is_aligned(PAGE) {
            return Err(Why::Unaligned);
        }
        if m.gpa.0.checked_add(m.range.last().0 - m.range.start().0).is_none() {
            return Err(Why::OutOfRange);
        }
        let dom = self.domains.get(&domain).ok_or(Why::NoDomain)?;
        if dom.bypass {
            return Err(Why::Bypass);
        }
        let handle = dom.handle.as_ref().ok_or(Why::NoDomain)?;
        let number = self.guest.number(domain);
        let meets = |ep: &Ep| {
            ep.regions.iter().any(|region| region.range.overlaps(m.range))
                && ep.handle.attached() == number.map(View::Domain)
        };
        if dom.members.iter().filter_map(|id| self.endpoints.get(id)).any(meets) {
            return Err(Why::Reserved);
        }
        if handle.next_mapping(m.range.start()).is_some_and(|old| old.range.overlaps(m.range)) {
            return Err(Why::Overlap);
        }
        let number = self.guest.number(domain);
        let full = self.first_full(domain, m).is_some() || self.reals.cannot_hold(number, m, extents(m));
        if full { Err(Why::Unreachable) } else { Ok(()) }
    }

    /// The first mirror of the domain that has no room for the mapping.
    pub(super) fn first_full(&mut self, domain: u32, m: &Mapping) -> Option<&mut Follower> {
        let (count, limit) = (extents(m), self.limit());
        let full =
            |follower: &Follower| count != 0 && !follower.is_fenced() && follower.held() + count > limit;
        let number = self.guest.number(domain);
        let dom = self.domains.get_mut(&domain)?;
        if dom.follower.as_ref().is_some_and(full) {
            return dom.follower.as_mut();
        }
        let in_it = |ep: &Ep| ep.handle.attached() == number.map(View::Domain);
        let endpoints = &self.endpoints;
        let found = dom
            .members
            .iter()
            .find(|id| endpoints.get(id).is_some_and(|ep| full(&ep.follower) && in_it(ep)))?;
        self.endpoints.get_mut(found).map(|ep| &mut ep.follower)
    }

    pub(super) fn step_unmap(&mut self, domain: u32, range: IovaRange) -> Result<(), Why> {
        let expected =
            if self.guest.is_checked() { vec![self.expect_unmap(domain, range)] } else { Vec::new() };
        let handle = self.domains.get(&domain).and_then(|dom| dom.handle.as_ref());
        let answer = self.guest.unmap(domain, handle, range);
        // A mirror that cannot unmap is fenced, and the unmap goes on.
        self.newly_refused(domain, &answer);
        self.conclude(answer, expected, false)
    }

    fn expect_unmap(&self, domain: u32, range: IovaRange) -> Result<(), Why> {
        let dom = self.domains.get(&domain).ok_or(Why::NoDomain)?;
        if dom.bypass {
            return Err(Why::Bypass);
        }
        let handle = dom.handle.as_ref().ok_or(Why::NoDomain)?;
        let mut cuts = false;
        handle.for_each(range, |m| {
            cuts = !range.covers(m.range);
            if cuts { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        // A record that may cut, does, at pages.
        let may_cut = Self::may_cut(self.format) && range.is_aligned(PAGE);
        if cuts && !may_cut { Err(Why::Cut) } else { Ok(()) }
    }

    pub(super) fn step_attach(&mut self, endpoint: u32, domain: u32, bypass: bool) -> Result<(), Why> {
        let expected =
            if self.guest.is_checked() { self.expect_attach(endpoint, domain, bypass) } else { Vec::new() };
        let Some(ep) = self.endpoints.get_mut(&endpoint) else { return Err(Why::NotAttached) };
        let answer = self.guest.attach(endpoint, &ep.handle, domain, bypass);
        let failed = !answer.is_ok() || self.options.fails();
        // Who is fenced has failed to let go of what it had, and comes along.
        let refused = failed && ep.follower.newly_refused() && !ep.follower.is_fenced();
        self.conclude(answer, expected, refused)
    }

    fn expect_attach(&self, endpoint: u32, domain: u32, bypass: bool) -> Vec<Result<(), Why>> {
        let Some(ep) = self.endpoints.get(&endpoint) else { return Vec::new() };
        if self.guest.attached(endpoint) == Some(domain) {
            return vec![Ok(())];
        }
        if ep.handle.is_fenced() {
            return vec![Err(Why::Fenced)];
        }
        if bypass {
            return self.to_all_of_memory();
        }
        let Some(handle) = self.domains.get(&domain).and_then(|dom| dom.handle.as_ref()) else {
            let full = self.domains.len() > DOMAINS;
            return vec![if full { Err(Why::Cap) } else { Ok(()) }];
        };
        let meets = |region: &viommu::endpoint::Region| {
            let first = handle.next_mapping(region.range.start());
            first.is_some_and(|m| m.range.overlaps(region.range))
        };
        if ep.regions.iter().any(meets) {
            return vec![Err(Why::Reserved)];
        }
        let limit = self.limit();
        if handle.len() as u64 * 2 > limit {
            let mut count = 0;
            handle.for_each(IovaRange::ALL, |m| {
                count += extents(&m);
                ControlFlow::Continue(())
            });
            if count > limit {
                return vec![Err(Why::Unreachable)];
            }
        }
        vec![Ok(())]
    }

    /// A mirror of few extents may have no room for what is left of memory between the regions.
    fn to_all_of_memory(&self) -> Vec<Result<(), Why>> {
        let mut either = vec![Ok(())];
        if self.options.limit_entries.is_some() {
            either.push(Err(Why::Unreachable));
        }
        either
    }

    pub(super) fn step_detach(&mut self, endpoint: u32, domain: u32) -> Result<(), Why> {
        let expected = if self.guest.attached(endpoint) != Some(domain) {
            vec![Err(Why::NotAttached)]
        } else if self.guest.bypass() {
            self.to_all_of_memory()
        } else {
            vec![Ok(())]
        };
        let Some(ep) = self.endpoints.get_mut(&endpoint) else { return Err(Why::NotAttached) };
        let answer = self.guest.detach(endpoint, &ep.handle, domain);
        ep.follower.newly_refused();
        self.conclude(answer, expected, false)
    }
}
