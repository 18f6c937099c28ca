//! The followed world: our unit, its domains and endpoints, and who listens.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use viommu::endpoint::{Region, RegionKind};
use viommu::{
    Completion, Domain, Endpoint, EndpointConfig, Extent, Gpa, GpaRange, Iommu, Iova, IovaRange, Mapping,
    Medium, Reader, Tables, View,
};
use viommu_trace::Format;

use super::Options;
use super::follower::{Follower, Home};
use super::lacks::Lacks;
use super::notifications::Line;
use super::tally::Tally;
use super::translations::Pending;
use crate::report::stats::Stats;

/// Bytes of tables that the unit may take: address space, until it is used.
const TABLE_BYTES: u64 = 1 << 30;
/// Memory from the start; the upper half is added when something is mapped there.
const HALF: u64 = 1 << 63;
/// Region names that are remembered.
pub(super) const REGIONS: usize = 65_536;

/// A domain of the guest's, as the log shows it.
pub(super) struct Dom {
    /// `None` for a bypass domain.
    pub(super) handle: Option<Domain>,
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
    pub(super) reader: Reader,
    pub(super) follower: Follower,
    pub(super) place: Place,
    /// It is not where the log has it: its attach was refused here, or it is fenced.
    pub(super) lost: bool,
    /// It sees a domain.
    pub(super) translated: bool,
    /// Its regions were told by the log.
    pub(super) regions_told: bool,
}

impl Ep {
    /// Whether it sees what the log says.
    pub(super) fn is_in_place(&self) -> bool {
        match self.place {
            Place::In(domain) => {
                matches!(self.handle.view(), Some(View::Identity))
                    || self.handle.view() == Some(View::Domain(domain))
            }
            Place::Unknown | Place::Nowhere => true,
        }
    }
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
    pub(super) iommu: Iommu,
    pub(super) options: Options,
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
    /// When the unit cannot be made: there is no address space for its tables.
    pub(crate) fn new(
        options: Options,
        format: Format,
        stats: Option<Stats>,
    ) -> Result<Self, viommu::BuildError> {
        let iommu = Iommu::builder().bypass(true).table_bytes(TABLE_BYTES).ram(0, HALF).build()?;
        Ok(Self {
            iommu,
            options,
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
                let added = self.iommu.add_backing(Extent { range, medium: Medium::Ram });
                let added = added.map_err(|error| error.kind.to_string());
                self.settle_or(added, "memory");
            }
        }
    }

    /// Waits for a step; software consumers are done at once.
    pub(super) fn settle(&mut self, mut done: Completion) {
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
            self.make_domain(id, false)?.from_before = true;
            self.tally.note_from_before(id, line);
            let home = Home::Domain(&self.iommu, id);
            let follower = Follower::new(&home, &self.options).ok();
            self.domains.get_mut(&id)?.follower = follower;
        }
        self.domains.get_mut(&id)
    }

    pub(super) fn make_domain(&mut self, id: u32, bypass: bool) -> Option<&mut Dom> {
        let tables = if Self::may_cut(self.format) { Tables::OwnedCut } else { Tables::Owned };
        let handle = if bypass { None } else { Some(self.iommu.create_domain(id, tables).ok()?) };
        let (members, lacks) = (Vec::new(), Lacks::default());
        let dom = Dom { handle, members, follower: None, from_before: false, lacks };
        self.domains.insert(id, dom);
        self.domains.get_mut(&id)
    }

    /// Makes the endpoint known. One more than the unit takes is not there.
    pub(super) fn ensure_endpoint(&mut self, id: u32) -> Option<&mut Ep> {
        if !self.endpoints.contains_key(&id) {
            let ep = self.make_endpoint(id, vec![x86_msi()])?;
            self.endpoints.insert(id, ep);
        }
        self.endpoints.get_mut(&id)
    }

    fn make_endpoint(&self, id: u32, regions: Vec<Region>) -> Option<Ep> {
        let handle = self.iommu.add_endpoint(id, EndpointConfig { regions }).ok()?;
        let reader = handle.reader("replay")?;
        // Empty and blocked, so that no mirror refuses; then what it sees when nothing is attached.
        drop(handle.block());
        let follower = Follower::new(&Home::Endpoint(&handle), &self.options).ok()?;
        let mut ep = Ep {
            handle,
            reader,
            follower,
            place: Place::Unknown,
            lost: false,
            translated: false,
            regions_told: false,
        };
        let before = ep.follower.raw();
        drop(ep.handle.detach());
        ep.follower.skip_from(before);
        Some(ep)
    }

    /// Makes an endpoint anew with other regions: those of one that is there cannot change.
    pub(super) fn rebuild_endpoint(&mut self, id: u32, regions: Vec<Region>) {
        let Some(old) = self.endpoints.remove(&id) else { return };
        let totals = old.follower.totals();
        let (place, fences) = (old.place, old.follower.fences);
        drop(old.reader);
        let gone = old.handle.remove().map_err(|error| error.to_string());
        self.settle_or(gone, "removing an endpoint");
        drop(old.follower);
        let Some(mut ep) = self.make_endpoint(id, regions) else { return };
        ep.follower.succeed(totals);
        ep.follower.fences = fences;
        ep.regions_told = old.regions_told;
        ep.place = place;
        self.endpoints.insert(id, ep);
        if let Place::In(domain) = place {
            self.go_unasked(id, Some(domain));
        }
    }
}
