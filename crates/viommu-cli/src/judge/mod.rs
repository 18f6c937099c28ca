//! Follows a history through the core, and checks all that can be checked.

mod audits;
mod expect;
mod extents;
mod follower;
mod guest;
mod lacks;
mod moves;
mod notifications;
mod operations;
mod real;
mod summary;
mod tally;
mod told;
mod translations;
mod world;

use std::num::NonZeroU64;

use viommu_trace::{Entry, Event, Format, Region};

pub(crate) use guest::{REQUESTS, STATUSES};
pub(crate) use real::{Interface, Reals};
pub(crate) use summary::{Read, Summary};
pub(crate) use world::Judge;

use crate::args::Model;
use crate::report::stats::Stats;

/// What the replay is asked to do besides.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    /// How operations reach the record.
    pub(crate) model: Model,
    /// Each mirror refuses every n-th map that a guest operation asks of it.
    pub(crate) fail_map: Option<NonZeroU64>,
    /// Each mirror fails every n-th unmap that a guest operation asks of it.
    pub(crate) fail_unmap: Option<NonZeroU64>,
    /// A fenced mirror gets a successor.
    pub(crate) unfence: bool,
    /// Extents that a mirror can hold.
    pub(crate) limit_entries: Option<u32>,
}

impl Options {
    fn fails(&self) -> bool {
        self.fail_map.is_some() || self.fail_unmap.is_some()
    }
}

impl Judge {
    /// Takes the next entry.
    pub(crate) fn take(&mut self, entry: &Entry) {
        let line = entry.line;
        self.entries += 1;
        if let Some(stats) = &mut self.stats {
            stats.at(entry);
        }
        match entry.event {
            Event::Access { endpoint, iova, access } => self.access(line, endpoint, iova, access),
            Event::Translated { endpoint, iova, gpa } => self.translated(line, endpoint, iova, gpa),
            Event::Map { domain, range, gpa, access, target } => {
                self.map(line, domain, viommu::Mapping { range, gpa, access, target });
            }
            Event::Unmap { domain, range } => self.unmap(line, domain, range),
            Event::Unmapped { domain, range } => self.unmapped(line, domain, range),
            Event::NotifyMap { region, range, gpa, access, .. } => {
                self.notify_map(line, region, range, gpa, access);
            }
            Event::NotifyUnmap { region, range } => self.notify_unmap(line, region, range),
            Event::Remap { region, range, .. } => self.remapped = Some((region.index, range)),
            Event::Attach { domain, endpoint, bypass } => self.attach(line, domain, endpoint, bypass),
            Event::Detach { domain, endpoint } => self.detach(line, domain, endpoint),
            Event::Detached { domain, endpoint } => self.detached(domain, endpoint),
            Event::DomainAdded { domain } => self.domain_added(domain),
            Event::DomainRemoved { domain } => self.domain_removed(domain),
            Event::EndpointRemoved { endpoint } => self.endpoint_removed(endpoint),
            Event::Reset(reset) => self.reset(line, reset),
            Event::SwitchAddressSpace { bus, devfn, enabled } => self.switched(bus, devfn, enabled),
            Event::Bypass { on } | Event::Config { bypass: on, .. } => {
                self.settle_switch();
                self.bypass(on);
            }
            Event::ReservedRegion { endpoint, kind, range } => self.reserved(endpoint, kind, range),
            Event::Fault { endpoint, address, .. } => self.fault_told(endpoint, address),
            Event::RegionAdded { region } => self.region_added(region),
            // That an endpoint is known says nothing of where it is; a mark is a remark.
            _ => {}
        }
    }

    /// The history is over; of its last operation some lines may be missing.
    pub(crate) fn end(&mut self) {
        self.finish_operation(true);
        self.resolve_all();
        self.audit_all();
        self.end_interfaces();
        self.guest.end_of_history();
        self.hear();
    }

    /// The statistics for the report, if they were asked for.
    pub(crate) fn into_stats(self) -> Option<Stats> {
        self.stats
    }

    fn region_added(&mut self, region: Region) {
        self.regions.remove(&region.index);
    }

    /// Whether unmaps of such a history may cut mappings.
    fn may_cut(format: Format) -> bool {
        format == Format::LinuxTrace
    }
}
