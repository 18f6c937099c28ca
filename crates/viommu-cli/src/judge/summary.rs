//! What a replay came to, in the shape of its JSON.

use serde::Serialize;
use viommu::{IovaRange, View};

use super::follower::Follower;
use super::guest::ModelLine;
use super::real::RealLine;
use super::tally::{Answers, Silent};
use super::world::Judge;

/// All of it.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) model: ModelLine,
    pub(crate) history: HistoryLine,
    pub(crate) record: Record,
    pub(crate) translations: Translations,
    pub(crate) notifications: Notifications,
    pub(crate) mirrors: Vec<MirrorLine>,
    pub(crate) caches: Vec<CacheLine>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) real_mirrors: Vec<RealLine>,
    pub(crate) audits: Audits,
    pub(crate) seconds: f64,
    /// Counted in all; the first of them follow.
    pub(crate) differences: u64,
    pub(crate) first_differences: Vec<DifferenceLine>,
    /// Why reading stopped before the end.
    pub(crate) error: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct HistoryLine {
    pub(crate) source: String,
    pub(crate) format: &'static str,
    pub(crate) lines: u64,
    pub(crate) operations: u64,
    pub(crate) attach: u64,
    pub(crate) detach: u64,
    pub(crate) map: u64,
    pub(crate) unmap: u64,
    pub(crate) removed: u64,
    pub(crate) deviations: u64,
    pub(crate) resets: u64,
    pub(crate) passed_over: u64,
    pub(crate) refused_by_both: u64,
    pub(crate) refused_here: u64,
    pub(crate) fences: u64,
    pub(crate) deviation_kinds: Vec<Deviation>,
    pub(crate) from_before: Vec<FromBefore>,
    pub(crate) found_endpoints: Vec<Found>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) attribution: Option<AttributionLine>,
}

/// Something that our device would have done otherwise.
#[derive(Debug, Serialize)]
pub(crate) struct Deviation {
    pub(crate) what: &'static str,
    pub(crate) count: u64,
}

/// A domain that was there before the history begins.
#[derive(Debug, Serialize)]
pub(crate) struct FromBefore {
    pub(crate) domain: u32,
    pub(crate) line: u64,
}

/// An endpoint whose domain was found from another line than an ATTACH.
#[derive(Debug, Serialize)]
pub(crate) struct Found {
    pub(crate) endpoint: u32,
    pub(crate) domain: u32,
    pub(crate) line: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct AttributionLine {
    pub(crate) maps: u64,
    pub(crate) maps_attributed: u64,
    pub(crate) unmaps: u64,
    pub(crate) unmaps_attributed: u64,
    pub(crate) unmaps_inferred: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Record {
    pub(crate) domains: Vec<DomainLine>,
    pub(crate) endpoints: Vec<EndpointLine>,
}

#[derive(Debug, Serialize)]
pub(crate) struct DomainLine {
    pub(crate) id: u32,
    pub(crate) mappings: u64,
    pub(crate) pages: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct EndpointLine {
    pub(crate) id: u32,
    pub(crate) view: &'static str,
    pub(crate) domain: Option<u32>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Translations {
    pub(crate) recorded: u64,
    pub(crate) agree: u64,
    pub(crate) differ: u64,
    pub(crate) unanswered: u64,
    pub(crate) silent: SilentLine,
}

#[derive(Debug, Serialize)]
pub(crate) struct SilentLine {
    pub(crate) msi: u64,
    pub(crate) bypass: u64,
    pub(crate) fault: u64,
    pub(crate) differ: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Notifications {
    pub(crate) recorded: u64,
    pub(crate) agree: u64,
    pub(crate) differ: u64,
    pub(crate) unanswered: u64,
}

/// Calls that guest operations asked for; `replayed` are extents mapped for other reasons: bypass, a new
/// subscription.
#[derive(Debug, Serialize)]
pub(crate) struct MirrorLine {
    pub(crate) endpoint: Option<u32>,
    pub(crate) domain: Option<u32>,
    pub(crate) map: u64,
    pub(crate) unmap: u64,
    pub(crate) replace: u64,
    pub(crate) held: u64,
    pub(crate) refused: u64,
    pub(crate) fenced: bool,
    pub(crate) fences: u64,
    pub(crate) replayed: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct CacheLine {
    pub(crate) endpoint: Option<u32>,
    pub(crate) domain: Option<u32>,
    pub(crate) fills: u64,
    pub(crate) hits: u64,
    pub(crate) invalidations: u64,
    pub(crate) held: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Audits {
    pub(crate) run: u64,
    pub(crate) failed: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct DifferenceLine {
    pub(crate) line: u64,
    pub(crate) what: String,
}

/// What the reader of the history knows of it.
pub(crate) struct Read {
    pub(crate) source: String,
    pub(crate) lines: u64,
    pub(crate) passed_over: u64,
    pub(crate) attribution: Option<viommu_trace::Attribution>,
    pub(crate) error: Option<String>,
    pub(crate) seconds: f64,
}

impl Judge {
    /// What it came to.
    pub(crate) fn summary(&self, read: Read) -> Summary {
        let tally = &self.tally;
        let Answers { recorded, agree, differ, unanswered } = tally.translations;
        let Silent { msi, bypass, fault, differ: silent } = tally.silent;
        let notified = tally.notifications;
        let (mut mirrors, mut caches) = (Vec::new(), Vec::new());
        for (id, ep) in &self.endpoints {
            let domain = self.view_of(ep.handle.view()).1;
            mirrors.push(mirror_line(Some(*id), domain, &ep.follower));
            caches.push(cache_line(Some(*id), domain, &ep.follower));
        }
        for (id, dom) in &self.domains {
            if let Some(follower) = &dom.follower {
                mirrors.push(mirror_line(None, Some(*id), follower));
                caches.push(cache_line(None, Some(*id), follower));
            }
        }
        let endpoints = self.endpoints.iter().map(|(id, ep)| {
            let (view, domain) =
                if ep.follower.is_fenced() { ("blocked", None) } else { self.view_of(ep.handle.view()) };
            EndpointLine { id: *id, view, domain }
        });
        Summary {
            model: self.guest.line(),
            history: self.history_line(&read),
            record: Record { domains: self.domain_lines(), endpoints: endpoints.collect() },
            translations: Translations {
                recorded,
                agree,
                differ,
                unanswered,
                silent: SilentLine { msi, bypass, fault, differ: silent },
            },
            notifications: Notifications {
                recorded: notified.recorded,
                agree: notified.agree,
                differ: notified.differ,
                unanswered: notified.unanswered,
            },
            mirrors,
            caches,
            real_mirrors: self.real_lines(),
            audits: Audits { run: tally.audits_run, failed: tally.audits_failed },
            seconds: read.seconds,
            differences: tally.differences,
            first_differences: (tally.first.iter())
                .map(|d| DifferenceLine { line: d.line, what: d.what.clone() })
                .collect(),
            error: read.error,
        }
    }

    fn history_line(&self, read: &Read) -> HistoryLine {
        let tally = &self.tally;
        HistoryLine {
            source: read.source.clone(),
            format: self.format.name(),
            lines: read.lines,
            operations: tally.operations(),
            attach: tally.attach,
            detach: tally.detach,
            map: tally.map,
            unmap: tally.unmap,
            removed: tally.removed,
            deviations: tally.deviations.values().sum(),
            resets: tally.resets,
            passed_over: read.passed_over,
            refused_by_both: tally.refused_by_both,
            refused_here: tally.refused_here,
            fences: tally.fences,
            deviation_kinds: (tally.deviations.iter())
                .map(|(what, count)| Deviation { what, count: *count })
                .collect(),
            from_before: (tally.from_before.iter())
                .map(|(domain, line)| FromBefore { domain: *domain, line: *line })
                .collect(),
            found_endpoints: (tally.found.iter())
                .map(|&(endpoint, domain, line)| Found { endpoint, domain, line })
                .collect(),
            attribution: read.attribution.map(|a| AttributionLine {
                maps: a.maps,
                maps_attributed: a.maps_attributed,
                unmaps: a.unmaps,
                unmaps_attributed: a.unmaps_attributed,
                unmaps_inferred: a.unmaps_inferred,
            }),
        }
    }

    fn domain_lines(&self) -> Vec<DomainLine> {
        let line = |(id, dom): (&u32, &super::world::Dom)| {
            let (mut mappings, mut bytes) = (0, 0_u128);
            if let Some(handle) = &dom.handle {
                self.guest.mappings(*id, handle, IovaRange::ALL, |m| {
                    mappings += 1;
                    bytes += m.range.bytes();
                });
            }
            DomainLine { id: *id, mappings, pages: u64::try_from(bytes / 4096).unwrap_or(u64::MAX) }
        };
        self.domains.iter().map(line).collect()
    }

    fn view_of(&self, view: Option<View>) -> (&'static str, Option<u32>) {
        match view {
            Some(View::Identity) => ("identity", None),
            Some(View::Domain(number)) => ("domain", Some(self.guest.name(number))),
            Some(View::Blocked) | None => ("blocked", None),
        }
    }
}

fn mirror_line(endpoint: Option<u32>, domain: Option<u32>, follower: &Follower) -> MirrorLine {
    let totals = follower.totals();
    MirrorLine {
        endpoint,
        domain,
        map: totals.map,
        unmap: totals.unmap,
        replace: totals.replace,
        held: follower.held(),
        refused: totals.refused,
        fenced: follower.is_fenced(),
        fences: follower.fences,
        replayed: totals.replayed,
    }
}

fn cache_line(endpoint: Option<u32>, domain: Option<u32>, follower: &Follower) -> CacheLine {
    let iotlb = super::told::lock(&follower.iotlb);
    let counts = iotlb.counts();
    CacheLine {
        endpoint,
        domain,
        fills: counts.fills,
        hits: counts.hits,
        invalidations: counts.invalidations,
        held: iotlb.len() as u64,
    }
}
