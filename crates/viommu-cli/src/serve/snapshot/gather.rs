//! What the IOMMU itself can say of its state.

use core::ops::ControlFlow;
use core::time::Duration;
use std::time::Instant;

use viommu::{FaultReason, IovaRange};
use viommu_virtio::VirtioIommu;
use viommu_vtd::{Stage, Vtd};

use super::{
    Domain, Endpoint, Fault, Faults, Function, Hex, Histogram, Iommu, Mapping, Requests, View, VtdState,
};
use crate::judge::{REQUESTS, STATUSES};
use crate::serve::machine::Place;

/// Nanoseconds.
pub(crate) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Iommu {
    /// Asks the device. `mappings`: for all mappings too, domain by domain, each under its lock: requests to that
    /// domain wait meanwhile. `started` is when the server did.
    pub(crate) fn of(device: &VirtioIommu, function: Function, started: Instant, mappings: bool) -> Self {
        let record = device.iommu();
        let metrics = device.metrics();
        let requests = metrics.requests.iter().zip(REQUESTS).flat_map(|(row, request)| {
            let counts = row.iter().zip(STATUSES).filter(|(count, _)| **count != 0);
            counts.map(move |(count, status)| Requests {
                request: request.to_owned(),
                status: status.to_owned(),
                count: *count,
            })
        });
        let request_times =
            Histogram { classes: metrics.request_times.to_vec(), longest_ns: nanos(metrics.request_longest) };
        let lost = metrics.events_dropped_full.saturating_add(metrics.events_dropped_rate);
        Self {
            function: Function { request_times: Some(request_times), ..function },
            bypass: record.bypass(),
            domains: record
                .domains()
                .iter()
                .map(|(id, domain)| Domain::of(*id, domain, record, mappings))
                .collect(),
            requests: requests.collect(),
            malformed: metrics.malformed,
            unmap_times: Histogram {
                classes: metrics.unmap_times.to_vec(),
                longest_ns: nanos(metrics.unmap_longest),
            },
            outstanding: count(record.outstanding()),
            faults: Faults {
                domain: metrics.faults_domain,
                mapping: metrics.faults_mapping,
                unknown: metrics.faults_unknown,
                pending: count(metrics.events_pending),
                reported: metrics.events_sent,
                lost,
                recent: device.recent_faults().iter().map(|one| fault(one.at, &one.fault, started)).collect(),
            },
            table_bytes: record.table_bytes(),
            vtd: None,
        }
    }
}

/// Mappings of one domain that are looked for in a guest's tables, at most.
const MOST: usize = 1 << 20;

impl Iommu {
    /// Asks a VT-d unit. What it was told counts as requests. `mappings`: for all mappings too, as [`Iommu::of`].
    pub(crate) fn of_vtd(
        vtd: &Vtd,
        place: &Place,
        function: Function,
        started: Instant,
        mappings: bool,
    ) -> Self {
        let record = vtd.iommu();
        let metrics = vtd.metrics();
        let requests = [
            ("context", metrics.context_invalidations),
            ("pages", metrics.page_invalidations),
            ("domain", metrics.wide_invalidations),
            ("dev TLB", metrics.device_tlb_invalidations),
            ("wait", metrics.waits),
        ];
        let requests = requests
            .into_iter()
            .filter(|(_, count)| *count != 0)
            .map(|(request, count)| Requests { request: request.to_owned(), status: "OK".to_owned(), count });
        let unsaid = metrics.faults_lost.saturating_add(metrics.faults_collapsed);
        // Those whose domain nobody sees are the unit's own business.
        let domains = record.domains().into_iter().filter(|(id, _)| !record.endpoints_in(*id).is_empty());
        Self {
            function,
            bypass: record.bypass(),
            domains: domains.map(|(id, domain)| Domain::of_vtd(vtd, id, &domain, mappings)).collect(),
            requests: requests.collect(),
            malformed: metrics.queue_errors,
            outstanding: count(record.outstanding()),
            faults: Faults {
                mapping: metrics.faults.saturating_add(unsaid).saturating_add(metrics.faults_quiet),
                reported: metrics.faults,
                lost: unsaid,
                recent: vtd.recent_faults().iter().map(|one| fault(one.at, &one.fault, started)).collect(),
                ..Faults::default()
            },
            table_bytes: record.table_bytes(),
            vtd: Some(VtdState {
                mode: match vtd.config().scalable {
                    None => "legacy",
                    Some(Stage::Second) => "second-stage",
                    Some(Stage::First) => "first-stage",
                }
                .into(),
                caching_mode: vtd.config().caching_mode,
                registers: place.at().map(Hex),
                in_table: place.in_table().map(Hex),
                table: place.path().display().to_string(),
            }),
            ..Self::default()
        }
    }
}

impl Domain {
    fn of(id: u32, domain: &viommu::Domain, record: &viommu::Iommu, mappings: bool) -> Self {
        let list = mappings.then(|| {
            let mut list = Vec::new();
            domain.for_each(IovaRange::ALL, |m| {
                list.push(m.into());
                ControlFlow::Continue(())
            });
            list
        });
        Self {
            id,
            endpoints: record.endpoints_in(id).iter().map(|id| id.requester).collect(),
            live: count(list.as_ref().map_or_else(|| domain.len(), Vec::len)),
            table_bytes: domain.table_bytes(),
            mappings: list,
            tables: None,
        }
    }

    /// Where the record does not follow the guest's tables, these are walked.
    fn of_vtd(vtd: &Vtd, id: u32, domain: &viommu::Domain, mappings: bool) -> Self {
        let record = vtd.iommu();
        let followed = vtd.is_followed(id);
        let tables = (mappings || !followed).then(|| {
            let user = record.endpoints_in(id).first().copied();
            let view = user.and_then(|user| vtd.tables(user, MOST)).unwrap_or_default();
            view.mappings.into_iter().map(Mapping::from).collect::<Vec<_>>()
        });
        let mut all = Self::of(id, domain, record, mappings && followed);
        if let Some(tables) = &tables
            && !followed
        {
            all.live = count(tables.len());
        }
        all.tables = tables.filter(|_| mappings);
        all
    }
}

impl From<viommu::Mapping> for Mapping {
    fn from(m: viommu::Mapping) -> Self {
        Self {
            start: Hex(m.range.start().0),
            last: Hex(m.range.last().0),
            gpa: Hex(m.gpa.0),
            access: m.access.into(),
            mmio: m.target == viommu::Target::Mmio,
        }
    }
}

impl Endpoint {
    /// Asks the IOMMU what the device at the function sees; without one it sees all of memory.
    pub(crate) fn of(record: Option<&viommu::Iommu>, id: u32, function: Function) -> Self {
        let Some(record) = record else {
            return Self { function, id, view: View::Untranslated, ..Self::default() };
        };
        let endpoint = record.endpoint(id);
        let view = match endpoint.as_ref().and_then(viommu::Endpoint::view) {
            None | Some(viommu::View::Blocked) => View::Blocked,
            Some(viommu::View::Identity) => View::Identity,
            Some(viommu::View::Domain(id)) => View::Domain(id),
        };
        let fenced = endpoint.as_ref().is_some_and(viommu::Endpoint::is_fenced);
        let batches = endpoint.as_ref().map_or(0, viommu::Endpoint::batches);
        Self { function, id, view, fenced, batches }
    }
}

fn fault(at: Instant, fault: &viommu::Fault, started: Instant) -> Fault {
    let reason = match fault.reason {
        FaultReason::Blocked => "blocked",
        FaultReason::Unmapped => "unmapped",
        FaultReason::Permission => "permission",
        FaultReason::Reserved => "reserved",
        FaultReason::NoBacking => "no memory",
        FaultReason::Fenced => "fenced",
        _ => "unknown",
    };
    Fault {
        at_ns: nanos(at.saturating_duration_since(started)),
        endpoint: fault.endpoint.map_or(u32::MAX, |id| id.requester),
        iova: Hex(fault.iova.0),
        access: fault.access.into(),
        reason: reason.to_owned(),
    }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}
