//! What the IOMMU itself can say of its state.

use core::ops::ControlFlow;
use core::time::Duration;
use std::time::Instant;

use viommu::{FaultReason, IovaRange};
use viommu_virtio::VirtioIommu;
use viommu_vtd::Vtd;

use super::{Domain, Endpoint, Fault, Faults, Function, Hex, Histogram, Iommu, Mapping, Requests, View};
use crate::judge::{REQUESTS, STATUSES};

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
                recent: device.recent_faults().iter().map(|recent| fault(recent, started)).collect(),
            },
            table_bytes: record.table_bytes(),
        }
    }
}

impl Iommu {
    /// Asks a VT-d unit. What it was told counts as requests; its faults are in its registers, for the driver.
    pub(crate) fn of_vtd(vtd: &Vtd, function: Function, mappings: bool) -> Self {
        let record = vtd.iommu();
        let metrics = vtd.metrics();
        let requests = [
            ("contexts", metrics.context_invalidations),
            ("pages", metrics.page_invalidations),
            ("domains", metrics.wide_invalidations),
            ("device TLB", metrics.device_tlb_invalidations),
            ("wait", metrics.waits),
        ];
        let requests = requests.into_iter().filter(|(_, count)| *count != 0).map(|(request, count)| {
            Requests { request: request.to_owned(), status: "done".to_owned(), count }
        });
        let lost = metrics.faults_lost.saturating_add(metrics.faults_collapsed);
        Self {
            function,
            bypass: record.bypass(),
            domains: record
                .domains()
                .iter()
                .map(|(id, domain)| Domain::of(*id, domain, record, mappings))
                .collect(),
            requests: requests.collect(),
            malformed: metrics.queue_errors,
            outstanding: count(record.outstanding()),
            faults: Faults { mapping: metrics.faults, reported: metrics.faults, lost, ..Faults::default() },
            table_bytes: record.table_bytes(),
            ..Self::default()
        }
    }
}

impl Domain {
    fn of(id: u32, domain: &viommu::Domain, record: &viommu::Iommu, mappings: bool) -> Self {
        let list = mappings.then(|| {
            let mut list = Vec::new();
            domain.for_each(IovaRange::ALL, |m| {
                list.push(Mapping {
                    start: Hex(m.range.start().0),
                    last: Hex(m.range.last().0),
                    gpa: Hex(m.gpa.0),
                    access: m.access.into(),
                    mmio: m.target == viommu::Target::Mmio,
                });
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

fn fault(recent: &viommu_virtio::RecentFault, started: Instant) -> Fault {
    let fault = recent.fault;
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
        at_ns: nanos(recent.at.saturating_duration_since(started)),
        endpoint: fault.endpoint.map_or(u32::MAX, |id| id.requester),
        iova: Hex(fault.iova.0),
        access: fault.access.into(),
        reason: reason.to_owned(),
    }
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}
