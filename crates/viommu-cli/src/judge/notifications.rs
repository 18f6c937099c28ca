//! What the recorded VMM told its subscribers, against what our mirrors were told.

use core::ops::ControlFlow;

use viommu::{Access, Gpa, IovaRange, Mapping, Target};
use viommu_trace::Region;

use super::extents::{covered, sort};
use super::operations::touches;
use super::told::lock;
use super::world::{Judge, Kind, Place, REGIONS};

/// A recorded notification.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line {
    line: u64,
    endpoint: u32,
    what: What,
    extent: Mapping,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Map,
    Unmap,
    /// A new subscriber of the recorded VMM is told what is there: no operation of the guest's.
    Replay,
}

impl Judge {
    pub(super) fn notify_map(
        &mut self,
        line: u64,
        region: Region,
        range: IovaRange,
        gpa: Gpa,
        access: Access,
    ) {
        let what = if self.remapped.take() == Some((region.index, range)) { What::Replay } else { What::Map };
        let extent = Mapping { range, gpa, access, target: Target::Ram };
        self.notified(line, region, what, extent);
    }

    pub(super) fn notify_unmap(&mut self, line: u64, region: Region, range: IovaRange) {
        let extent = Mapping { range, gpa: Gpa(0), access: Access::empty(), target: Target::Ram };
        self.notified(line, region, What::Unmap, extent);
    }

    fn notified(&mut self, line: u64, region: Region, what: What, extent: Mapping) {
        self.tally.notifications.recorded += 1;
        let endpoint = self.endpoint_of(line, region);
        if what == What::Replay {
            // It stands for itself, whatever operation is near.
            let holds = self.holds(endpoint, &extent);
            self.count_replay(line, endpoint, &extent, holds);
        } else {
            self.op.notified.push(Line { line, endpoint, what, extent });
        }
    }

    /// The endpoint behind a region; a domain that waits for one gets it.
    fn endpoint_of(&mut self, line: u64, region: Region) -> u32 {
        let known = region.rid.map(u32::from).or_else(|| self.regions.get(&region.index).copied());
        let endpoint = known.unwrap_or_else(|| self.guess(region));
        if self.regions.len() < REGIONS {
            self.regions.insert(region.index, endpoint);
        }
        let place = self.endpoints.get(&endpoint).map_or(Place::Unknown, |ep| ep.place);
        let domain = self.op.domain;
        let waits = matches!(self.op.kind, Kind::Map | Kind::Unmap)
            && self.domains.get(&domain).is_some_and(|dom| dom.from_before);
        if place == Place::Unknown && waits && self.ensure_endpoint(endpoint).is_some() {
            self.found_in(line, endpoint, domain);
        }
        endpoint
    }

    /// A region's name has device and function alone: it is the one among the operation's endpoints that has them.
    fn guess(&self, region: Region) -> u32 {
        let members = self.domains.get(&self.op.domain).map(|dom| dom.members.as_slice()).unwrap_or_default();
        let own = matches!(self.op.kind, Kind::Attach | Kind::Detach).then_some(self.op.endpoint);
        let fits = |id: &u32| id & 0xff == u32::from(region.devfn);
        let mut fitting = own.into_iter().chain(members.iter().copied()).filter(fits);
        fitting.next().unwrap_or_else(|| region.endpoint())
    }

    /// An endpoint turns out to be in a domain from before the history. What was told of this operation counts for it.
    pub(super) fn found_in(&mut self, line: u64, endpoint: u32, domain: u32) {
        self.tally.note_found(endpoint, domain, line);
        let Some(dom) = self.domains.get(&domain) else { return };
        let others = dom.members.iter().filter_map(|id| self.endpoints.get(id)).map(|ep| &ep.follower);
        let told = dom.follower.iter().chain(others).next().map(|follower| {
            let told = lock(&follower.told);
            (told.maps.clone(), told.unmaps.clone())
        });
        self.join(endpoint, domain, false);
        if let (Some((maps, unmaps)), Some(ep)) = (told, self.endpoints.get(&endpoint)) {
            let mut told = lock(&ep.follower.told);
            (told.maps, told.unmaps) = (maps, unmaps);
        }
        if !self.op.involved.contains(&endpoint) {
            self.op.involved.push(endpoint);
        }
    }

    /// Whether our record of the endpoint's domain says the same of all of `extent`.
    fn holds(&self, endpoint: u32, extent: &Mapping) -> bool {
        let Some(Place::In(domain)) = self.endpoints.get(&endpoint).map(|ep| ep.place) else { return false };
        let Some(handle) = self.domains.get(&domain).and_then(|dom| dom.handle.as_ref()) else {
            return false;
        };
        let mut there = Vec::new();
        handle.for_each(extent.range, |m| {
            there.push(m);
            ControlFlow::Continue(())
        });
        covered(extent, &there, false)
    }

    fn count_replay(&mut self, line: u64, endpoint: u32, extent: &Mapping, holds: bool) {
        if holds {
            self.tally.notifications.agree += 1;
        } else if self.cannot_say(endpoint, extent.range, true) {
            self.tally.notifications.unanswered += 1;
        } else {
            self.tally.notifications.differ += 1;
            let range = extent.range;
            self.tally.differ(line, || {
                format!("endpoint {endpoint}: the log tells anew of {range}, we do not have it")
            });
        }
    }

    /// Whether our side of a notification is missing for a reason that is known.
    fn cannot_say(&self, endpoint: u32, range: IovaRange, before: bool) -> bool {
        let Some(ep) = self.endpoints.get(&endpoint) else { return true };
        if ep.lost
            || ep.follower.is_fenced()
            || self.op.absent.contains(&endpoint)
            || ep.place == Place::Unknown
        {
            return true;
        }
        let domain = match ep.place {
            Place::In(domain) => domain,
            _ => self.op.domain,
        };
        match self.domains.get(&domain) {
            Some(dom) => touches(&dom.lacks, &self.op.lost, range) || (before && dom.from_before),
            None => self.op.lost.iter().any(|m| m.range.overlaps(range)),
        }
    }

    /// Compares what both sides were told in one operation. `last`: the log may end inside it.
    pub(super) fn judge_notifications(&mut self, last: bool) {
        let mut lines = core::mem::take(&mut self.op.notified);
        if lines.is_empty() {
            self.op.notified = lines;
            return;
        }
        lines.sort_by_key(|l| (l.endpoint, l.what));
        let mut quiet = core::mem::take(&mut self.op.quiet);
        sort(&mut quiet);
        for group in lines.chunk_by(|a, b| (a.endpoint, a.what) == (b.endpoint, b.what)) {
            self.judge_group(group, &quiet, last);
        }
        self.op.quiet = quiet;
        self.op.notified = lines;
    }

    /// Lines of one kind for one endpoint.
    fn judge_group(&mut self, group: &[Line], quiet: &[Mapping], last: bool) {
        let Some(&Line { endpoint, what, line: first, .. }) = group.first() else { return };
        let is_unmap = what == What::Unmap;
        let mut told = Vec::new();
        if let Some(ep) = self.endpoints.get(&endpoint) {
            let ours = lock(&ep.follower.told);
            told.extend_from_slice(if is_unmap { &ours.unmaps } else { &ours.maps });
        }
        sort(&mut told);
        let mut accepted;
        let accepted: &[Mapping] = if is_unmap && !quiet.is_empty() {
            accepted = [told.as_slice(), quiet].concat();
            sort(&mut accepted);
            &accepted
        } else {
            &told
        };
        for Line { line, extent, .. } in group {
            if covered(extent, accepted, is_unmap) {
                self.tally.notifications.agree += 1;
            } else if self.cannot_say(endpoint, extent.range, is_unmap) {
                self.tally.notifications.unanswered += 1;
            } else {
                self.tally.notifications.differ += 1;
                let (range, verb) = (extent.range, if is_unmap { "unmap" } else { "map" });
                self.tally.differ(*line, || {
                    format!(
                        "endpoint {endpoint}: the log tells of the {verb} of {range}, our mirror was not told"
                    )
                });
            }
        }
        if last || self.cannot_say(endpoint, IovaRange::ALL, false) {
            return;
        }
        let mut theirs: Vec<Mapping> = group.iter().map(|l| l.extent).collect();
        sort(&mut theirs);
        for extent in told.iter().filter(|extent| !covered(extent, &theirs, is_unmap)) {
            let (range, verb) = (extent.range, if is_unmap { "unmap" } else { "map" });
            self.tally.differ(first, || {
                format!("endpoint {endpoint}: our mirror was told of the {verb} of {range}, the log does not say so")
            });
        }
    }
}
