//! Map and unmap, as the log shows them.

use viommu::{IovaRange, Mapping, Target};

use super::guest::Why;
use super::lacks::Lacks;
use super::told::Asks;
use super::world::{Judge, Kind, Op};

const PART_OF_A_PAGE: &str = "a map that is not whole pages is accepted";
const PAST_THE_END: &str = "a map whose target passes 2^64-1 is accepted";
const OVER_A_REGION: &str = "a map over a reserved region is accepted";
const NO_ROOM: &str = "a map beyond our caps is accepted";
const CUT: &str = "an unmap that would cut a mapping removes others";
const PART_UNMAP: &str = "an unmap that is not whole pages removes mappings";

impl Judge {
    /// A new operation of the guest's: the lines of the last one are over.
    pub(super) fn begin(&mut self, kind: Kind, line: u64) {
        self.finish_operation(false);
        self.op.kind = kind;
        self.op.line = line;
    }

    /// The lines of an operation are over. `last`: of the last one some may be missing.
    pub(super) fn finish_operation(&mut self, last: bool) {
        self.settle_switch();
        if !last
            && self.op.kind == Kind::Unmap
            && self.op.confirmed < self.op.removed.len()
            && self.shows_removals
        {
            let missing = self.op.removed.iter().filter(|(_, said)| !said);
            let ranges: Vec<IovaRange> = missing.map(|(m, _)| m.range).collect();
            let line = self.op.line;
            for range in ranges {
                self.tally.differ(line, || format!("our record removed {range}, the log does not say so"));
            }
        }
        self.judge_notifications(last);
        for id in &self.op.involved {
            if let Some(ep) = self.endpoints.get(id) {
                super::told::lock(&ep.follower.told).clear();
            }
        }
        if let Some(waiting) = self.domains.get(&self.op.domain).and_then(|dom| dom.follower.as_ref()) {
            super::told::lock(&waiting.told).clear();
        }
        // Its lists keep their room.
        let Op { mut removed, mut lost, mut quiet, mut notified, mut involved, mut absent, .. } =
            core::mem::take(&mut self.op);
        removed.clear();
        lost.clear();
        quiet.clear();
        notified.clear();
        involved.clear();
        absent.clear();
        self.op = Op { removed, lost, quiet, notified, involved, absent, ..Op::default() };
        self.audit_now_and_then();
    }

    fn listen(&mut self, domain: u32, asks: Asks) {
        let Some(dom) = self.domains.get(&domain) else { return };
        for id in &dom.members {
            if let Some(ep) = self.endpoints.get(id) {
                ep.follower.asks(asks);
            }
        }
        if let Some(waiting) = &dom.follower {
            waiting.asks(asks);
        }
        if asks != Asks::NOTHING {
            self.op.involved.clone_from(&dom.members);
        }
    }

    pub(super) fn map(&mut self, line: u64, domain: u32, mapping: Mapping) {
        self.begin(Kind::Map, line);
        self.tally.map += 1;
        (self.op.domain, self.op.range) = (domain, Some(mapping.range));
        let Some(dom) = self.domain_named(domain, line).filter(|dom| dom.handle.is_some()) else {
            // A domain that is dead, or one of bypass.
            let refused = self.step_map(domain, mapping).is_err();
            self.tally.refused_by_both += u64::from(refused);
            return;
        };
        if dom.lacks.touching(mapping.range).next().is_some() {
            // The recorded VMM has something there that our record lacks.
            self.guest.withhold();
            self.tally.refused_by_both += 1;
            return;
        }
        self.reach_memory(&mapping);
        self.listen(domain, Asks::ALL);
        let outcome = self.step_map(domain, mapping);
        let outcome = match outcome {
            Err(Why::Reserved) if self.forget_assumed(domain) => {
                self.listen(domain, Asks::ALL);
                self.step_map(domain, mapping)
            }
            outcome => outcome,
        };
        self.listen(domain, Asks::NOTHING);
        let deviation = match outcome {
            Ok(()) => {
                if let Some(stats) = &mut self.stats {
                    stats.mapped(domain, mapping.range);
                }
                self.interfaces_see(domain);
                self.after_step();
                return;
            }
            Err(Why::Overlap) => {
                // QEMU looks for overlaps alone; where our record has other reasons too, they come before this one.
                self.tally.refused_by_both += 1;
                return;
            }
            Err(Why::Refused) => {
                // The mirror's own count has it.
                self.tally.refused_here += 1;
                None
            }
            Err(Why::Unreachable) => {
                self.tally.refused_here += 1;
                if let Some(follower) = self.first_full(domain, &mapping) {
                    follower.refused_ahead();
                }
                None
            }
            Err(Why::Unaligned) => Some(PART_OF_A_PAGE),
            Err(Why::OutOfRange) => Some(PAST_THE_END),
            Err(Why::Reserved) => Some(OVER_A_REGION),
            Err(Why::Cap) => Some(NO_ROOM),
            Err(other) => {
                self.tally.differ(line, || format!("our record refuses the map: {other:?}"));
                None
            }
        };
        self.after_step();
        if let Some(what) = deviation {
            // The recorded VMM refuses what overlaps, whatever else there is to it.
            if self.record_touches(domain, mapping.range) {
                self.tally.refused_by_both += 1;
                return;
            }
            self.tally.deviate(what);
        }
        if let Some(dom) = self.domains.get_mut(&domain) {
            dom.lacks.insert(mapping);
        }
    }

    fn record_touches(&self, domain: u32, range: IovaRange) -> bool {
        let handle = self.domains.get(&domain).and_then(|dom| dom.handle.as_ref());
        let next = handle.and_then(|handle| handle.next_mapping(range.start()));
        next.is_some_and(|m| m.range.overlaps(range))
    }

    pub(super) fn unmap(&mut self, line: u64, domain: u32, range: IovaRange) {
        self.begin(Kind::Unmap, line);
        self.tally.unmap += 1;
        (self.op.domain, self.op.range) = (domain, Some(range));
        let may_cut = Self::may_cut(self.format);
        let named = self.domain_named(domain, line);
        let Some((handle, lacks)) = named.and_then(|dom| Some((dom.handle.clone()?, &dom.lacks))) else {
            // Dead, or one of bypass.
            let _refused = self.step_unmap(domain, range);
            return;
        };
        let sticks_out = lacks.touching(range).any(|m| !range.covers(m.range));
        let mut cuts = sticks_out;
        let removed = &mut self.op.removed;
        self.guest.mappings(domain, &handle, range, |m| {
            cuts |= !range.covers(m.range);
            removed.push((m, false));
        });
        if sticks_out {
            // The recorded VMM meets a mapping to cut that our record lacks.
            self.guest.withhold();
            self.op.removed.clear();
            self.op.by_lines = true;
            return;
        }
        self.listen(domain, Asks::ALL);
        let outcome = self.step_unmap(domain, range);
        self.listen(domain, Asks::NOTHING);
        match outcome {
            Ok(()) if !cuts || may_cut => self.unmapped_here(domain, range),
            Ok(()) => {
                self.tally.differ(line, || format!("our record cut a mapping for the unmap of {range}"))
            }
            Err(Why::Cut) if cuts => {
                self.op.removed.clear();
                self.op.by_lines = true;
            }
            Err(other) => {
                self.op.removed.clear();
                self.tally.differ(line, || format!("our record refuses the unmap of {range}: {other:?}"));
            }
        }
        self.after_step();
    }

    /// What our record has removed, as the guest asked.
    fn unmapped_here(&mut self, domain: u32, range: IovaRange) {
        let count = self.op.removed.len() as u64;
        self.tally.removed += count;
        let quiet = self.op.removed.iter().map(|(m, _)| m);
        self.op.quiet.extend(quiet.filter(|m| m.target == Target::Mmio || m.access.is_empty()));
        if let Some(dom) = self.domains.get_mut(&domain).filter(|dom| !dom.lacks.is_empty()) {
            self.op.lost.extend(dom.lacks.take_inside(range));
        }
        if let Some(stats) = &mut self.stats {
            self.op.removed.iter().for_each(|(m, _)| stats.unmapped(domain, m.range));
        }
    }

    /// The log says that a mapping went.
    pub(super) fn unmapped(&mut self, line: u64, domain: u32, range: IovaRange) {
        self.shows_removals = true;
        let own = self.op.kind == Kind::Unmap && self.op.domain == domain;
        if own && self.op.range.is_some_and(|asked| !asked.covers(range)) {
            self.tally.differ(line, || format!("the log removed {range}, which the guest did not ask for"));
        }
        if own && !self.op.by_lines {
            let at = self.op.removed.partition_point(|(m, _)| m.range.start() < range.start());
            if let Some((m, said)) = self.op.removed.get_mut(at).filter(|(m, said)| m.range == range && !said)
            {
                *said = true;
                let _ = m;
                self.op.confirmed += 1;
                return;
            }
            if self.op.lost.iter().any(|m| m.range == range) {
                return;
            }
        } else if let Some(ours) = self.removed_by_line(domain, range) {
            if own && ours && !core::mem::replace(&mut self.op.existed, true) {
                let whole = self.op.range.is_some_and(|range| range.is_aligned(4096));
                self.tally.deviate(if whole { CUT } else { PART_UNMAP });
            }
            return;
        }
        if self.domains.get(&domain).is_none_or(|dom| !dom.from_before) {
            self.tally.differ(line, || format!("the log removed {range}, which our record did not have"));
        }
    }

    /// Removes what the log says went; whether it was our record that had it. `None`: there was no such mapping.
    fn removed_by_line(&mut self, domain: u32, range: IovaRange) -> Option<bool> {
        let dom = self.domains.get_mut(&domain)?;
        if let Some(m) = dom.lacks.take_exact(range) {
            self.op.lost.push(m);
            return Some(false);
        }
        let handle = dom.handle.clone()?;
        let mut found = None;
        self.guest.mappings(domain, &handle, range, |m| {
            if m.range == range {
                found = Some(m);
            }
        });
        let found = found?;
        self.listen(domain, Asks::ALL);
        if let Err(why) = self.step_unmap(domain, range) {
            let line = self.op.line;
            self.tally.differ(line, || format!("a removal that the log shows: {why:?}"));
        }
        self.listen(domain, Asks::NOTHING);
        self.tally.removed += 1;
        if found.target == Target::Mmio || found.access.is_empty() {
            self.op.quiet.push(found);
        }
        if let Some(stats) = &mut self.stats {
            stats.unmapped(domain, range);
        }
        self.after_step();
        Some(true)
    }
}

/// Whether one of these touches the range.
pub(super) fn touches(lacks: &Lacks, lost: &[Mapping], range: IovaRange) -> bool {
    lacks.touching(range).next().is_some() || lost.iter().any(|m| m.range.overlaps(range))
}
