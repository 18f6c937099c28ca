//! The followed world: our unit, its domains and endpoints, and who listens.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use viommu::endpoint::{Region, RegionKind};
use viommu::{Completion, Domain, Endpoint, Extent, Gpa, GpaRange, Iova, IovaRange, Mapping, Medium};
use viommu_trace::Format;

use super::Options;
use super::follower::{Follower, Home};
use super::guest::{Direct, Eyes, Guest, HALF, Virtio, Vtd};
use super::lacks::Lacks;
use super::notifications::Line;
use super::real::Reals;
use super::tally::Tally;
use super::translations::Pending;
use crate::args::Model;
use crate::report::stats::Stats;

/// Region names that are remembered.
pub(super) const REGIONS: usize = 65_536;

/// A domain of the guest's, as the log shows it.
pub(super) struct Dom {
    /// `None` for a bypass domain.
    pub(super) handle: Option<Domain>,
    pub(super) bypass: bool,
    /// By the log, also those whose attach was refused here.
    pub(super) members: Vec<u32>,
    /// Listens for endpoints that are not known yet.
    pub(super) follower: Option<Follower>,
    /// It was there before the history begins: the log need not show all of its mappings and endpoints.
    pub(super) from_before: bool,
    pub(super) lacks: Lacks,
}

/// Where an endpoint is, by the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The log has not said.
    Unknown,
    Nowhere,
    In(u32),
}

/// An endpoint.
pub(super) struct Ep {
    pub(super) handle: Endpoint,
    pub(super) eyes: Eyes,
    /// Its regions, ascending.
    pub(super) regions: Vec<Region>,
    pub(super) follower: Follower,
    pub(super) place: Place,
    /// It is not where the log has it: its attach was refused here, or it is fenced.
    pub(super) lost: bool,
    /// It sees a domain.
    pub(super) translated: bool,
    /// Its regions were told by the log.
    pub(super) regions_told: bool,
}

/// What kind of guest operation is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) enum Kind {
    #[default]
    None,
    Map,
    Unmap,
    Attach,
    Detach,
    Reset,
}

/// The guest operation whose lines are being read: from its own line to the next operation's.
#[derive(Default)]
pub(super) struct Op {
    pub(super) kind: Kind,
    pub(super) line: u64,
    pub(super) domain: u32,
    pub(super) endpoint: u32,
    pub(super) range: Option<IovaRange>,
    /// The domain was there before an ATTACH that names it.
    pub(super) existed: bool,
    /// The log says by its own lines what goes: our device would have refused the operation.
    pub(super) by_lines: bool,
    /// Mappings that our record removed, ascending, and whether the log has said so of each.
    pub(super) removed: Vec<(Mapping, bool)>,
    pub(super) confirmed: usize,
    /// What went that our record lacked.
    pub(super) lost: Vec<Mapping>,
    /// What went that no mirror ever has: device registers, mappings without access.
    pub(super) quiet: Vec<Mapping>,
    pub(super) notified: Vec<Line>,
    /// Endpoints whose mirror may have been told.
    pub(super) involved: Vec<u32>,
    /// Endpoints that were fenced, or not where the log has them, at some time of the operation.
    pub(super) absent: Vec<u32>,
    /// What a switch of the address space said of the operation's endpoint.
    pub(super) switched: Option<bool>,
}

/// Follows one history.
pub(crate) struct Judge {
    pub(super) guest: Guest,
    pub(super) options: Options,
    pub(super) reals: Reals,
    pub(super) format: Format,
    pub(super) domains: BTreeMap<u32, Dom>,
    pub(super) endpoints: BTreeMap<u32, Ep>,
    /// Domains that the log has attached something to: dead when they are not there.
    pub(super) known: HashSet<u32>,
    /// Endpoint by region index.
    pub(super) regions: HashMap<u32, u32>,
    pub(super) op: Op,
    pub(super) pending: VecDeque<Pending>,
    /// The last line said that a region is told of this once more.
    pub(super) remapped: Option<(u32, IovaRange)>,
    /// What bypass is at the machine's start.
    pub(super) boot_bypass: bool,
    /// The log has shown by its own lines what unmaps remove.
    pub(super) shows_removals: bool,
    pub(super) upper_half: bool,
    pub(super) audited_at: u64,
    /// Entries taken.
    pub(super) entries: u64,
    pub(crate) tally: Tally,
    pub(super) stats: Option<Stats>,
}

pub(super) fn x86_msi() -> Region {
    let range = IovaRange::new(Iova(0xfee0_0000), Iova(0xfeef_ffff)).unwrap_or(IovaRange::ALL);
    Region { range, kind: RegionKind::Msi }
}

impl Judge {
    /// # Errors
    /// When the unit cannot be made, or the history cannot be expressed by the model.
    pub(crate) fn new(
        mut options: Options,
        reals: Reals,
        format: Format,
        stats: Option<Stats>,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let may_cut = Self::may_cut(format);
        let guest = match options.model {
            Model::Direct => Guest::direct(Direct::new(may_cut)?),
            Model::VirtioIommu if may_cut => {
                let why =
                    "unmaps of a Linux trace may cut mappings, which virtio-iommu cannot: use --model direct";
                return Err(why.into());
            }
            Model::VirtioIommu => Guest::virtio(Virtio::new()?),
            Model::SpaprTce => Guest::direct(Direct::with_tces(may_cut)?),
            Model::Vtd if options.fails() || options.limit_entries.is_some() => {
                let why =
                    "tables in guest memory leave nothing to refuse, so mirrors that do are for other models";
                return Err(why.into());
            }
            Model::Vtd => {
                // There are as many extents as pages.
                options.limit_entries = Some(u32::MAX);
                Guest::vtd(Vtd::new(may_cut)?)
            }
        };
        Ok(Self {
            guest,
            options,
            reals,
            format,
            domains: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            known: HashSet::new(),
            regions: HashMap::new(),
            op: Op::default(),
            pending: VecDeque::new(),
            remapped: None,
            boot_bypass: true,
            shows_removals: false,
            upper_half: false,
            audited_at: 0,
            entries: 0,
            tally: Tally::default(),
            stats,
        })
    }

    /// Guest memory is not known from a log: all that is mapped to is memory.
    pub(super) fn reach_memory(&mut self, mapping: &Mapping) {
        let last = mapping.gpa.0.saturating_add(mapping.range.last().0 - mapping.range.start().0);
        if last >= HALF && !self.upper_half {
            self.upper_half = true;
            if let Some(range) = GpaRange::new(Gpa(HALF), Gpa(u64::MAX)) {
                let added = self.guest.iommu().add_backing(Extent { range, medium: Medium::Ram });
                let added = added.map_err(|error| error.kind.to_string());
                self.settle_or(added, "memory");
            }
        }
    }

    /// What the model has no way to say, once the history has asked for it: with the line of the operation.
    pub(crate) fn inexpressible(&self) -> Option<(u64, &str)> {
        Some((self.op.line, self.guest.inexpressible()?))
    }

    /// What the model itself finds wrong.
    pub(super) fn hear(&mut self) {
        let line = self.op.line;
        for what in self.guest.complaints() {
            self.tally.differ(line, || what);
        }
    }

    /// Waits for a step; software consumers are done at once.
    fn settle(&mut self, mut done: Completion) {
        if !done.is_complete() && done.wait_timeout(core::time::Duration::from_secs(10)).is_err() {
            let line = self.op.line;
            self.tally.differ(line, || "the step did not complete".into());
        }
    }

    pub(super) fn settle_or(&mut self, outcome: Result<Completion, String>, what: &str) {
        match outcome {
            Ok(done) => self.settle(done),
            Err(why) => {
                let line = self.op.line;
                self.tally.differ(line, || format!("{what}: {why}"));
            }
        }
    }

    /// The domain, which comes into being where the log names it without an ATTACH before. `None`: it is dead.
    pub(super) fn domain_named(&mut self, id: u32, line: u64) -> Option<&mut Dom> {
        if !self.domains.contains_key(&id) {
            if self.known.contains(&id) {
                return None;
            }
            let handle = self.guest.hold(id);
            self.hear();
            let handle = Some(handle?);
            self.make_domain(id, false);
            self.tally.note_from_before(id, line);
            let home = Home::Domain(self.guest.iommu(), self.guest.number(id)?);
            let follower = Follower::new(&home, &self.options).ok();
            self.guest.mirror_has_come();
            let dom = self.domains.get_mut(&id)?;
            (dom.handle, dom.from_before, dom.follower) = (handle, true, follower);
        }
        self.domains.get_mut(&id)
    }

    /// A domain that is to be: its record comes with its first endpoint.
    pub(super) fn make_domain(&mut self, id: u32, bypass: bool) {
        let (members, lacks) = (Vec::new(), Lacks::default());
        let dom = Dom { handle: None, bypass, members, follower: None, from_before: false, lacks };
        self.domains.insert(id, dom);
    }

    /// Makes the endpoint known. One more than the unit takes is not there.
    pub(super) fn ensure_endpoint(&mut self, id: u32) -> Option<&mut Ep> {
        if !self.endpoints.contains_key(&id) {
            let ep = self.make_endpoint(id, vec![x86_msi()]);
            self.hear();
            self.endpoints.insert(id, ep?);
        }
        self.endpoints.get_mut(&id)
    }

    fn make_endpoint(&mut self, id: u32, regions: Vec<Region>) -> Option<Ep> {
        let handle = self.guest.add_endpoint(id, regions)?;
        let eyes = self.guest.eyes(&handle)?;
        // Empty and blocked, so that no mirror refuses; then what it sees when nothing is attached. The guest does not
        // know of it yet.
        self.guest.hide(&handle);
        let follower = Follower::new(&Home::Endpoint(&handle), &self.options).ok()?;
        self.guest.show(id, &handle);
        let regions = handle.regions();
        Some(Ep {
            handle,
            eyes,
            regions,
            follower,
            place: Place::Unknown,
            lost: false,
            translated: false,
            regions_told: false,
        })
    }

    /// Makes an endpoint anew with other regions: those of one that is there cannot change.
    pub(super) fn rebuild_endpoint(&mut self, id: u32, regions: Vec<Region>) {
        let Some(old) = self.endpoints.remove(&id) else { return };
        let totals = old.follower.totals();
        let (place, fences) = (old.place, old.follower.fences);
        let domain = if let Place::In(domain) = place { Some(domain) } else { None };
        if let Some(domain) = domain.filter(|domain| self.domains.get(domain).is_some_and(|d| !d.bypass)) {
            self.guest.keep(domain, id);
        }
        drop(old.eyes);
        self.guest.remove_endpoint(id, old.handle);
        drop(old.follower);
        let made = self.make_endpoint(id, regions);
        self.hear();
        let Some(mut ep) = made else { return };
        ep.follower.succeed(totals);
        ep.follower.fences = fences;
        ep.regions_told = old.regions_told;
        ep.place = place;
        self.endpoints.insert(id, ep);
        if let Some(domain) = domain {
            self.go(id, domain, false);
        }
    }
}
