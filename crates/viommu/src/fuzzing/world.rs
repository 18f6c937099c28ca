//! A unit with endpoints, domains and subscribers, and the steps that are played on it.

mod check;
mod subscribers;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::domain::{Found, Walk};
use viommu::endpoint::{Region, RegionKind};
use viommu::reader::Walker;
use viommu::subscribe::Reach;
use viommu::{
    Access, AttachError, AttachErrorKind, Cap, Completion, Endpoint, EndpointConfig, EndpointId, Extent, Gpa,
    GpaRange, Interest, Iommu, Iova, IovaRange, Mapping, Medium, Reader, ResetKind, Space, StepError,
    StepErrorKind, Subscription, Tables, View,
};

use super::recording::{Handle, RecordingMirror};
use super::reference::{PAGE, Pages, range_of};

/// Pages of a domain that steps play with.
const WIDTH: u64 = 16;
const SLOTS: usize = 6;
const DOMAINS: [u32; 3] = [1, 2, 3];
const WALKED: u32 = 3;

/// The guest's tables in memory.
#[derive(Clone, Default)]
struct Guest(Arc<Mutex<BTreeMap<u64, Mapping>>>);

impl Guest {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Mapping>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self, from: Iova, last: Iova) -> Option<Mapping> {
        let tables = self.lock();
        let holds = tables.range(..=from.0).next_back().map(|(_, m)| *m).filter(|m| m.range.contains(from));
        holds.or_else(|| tables.range(from.0..=last.0.max(from.0)).next().map(|(_, m)| *m))
    }

    fn pages(&self) -> Pages {
        let mut pages = Pages::default();
        self.lock().values().for_each(|m| pages.map(m));
        pages
    }
}

impl Walker for Guest {
    fn walk(&self, iova: Iova) -> Option<Mapping> {
        self.next(iova, iova).filter(|m| m.range.contains(iova))
    }
}

/// A walk that wants to pause now and then.
struct Pausing<'g> {
    guest: &'g Guest,
    /// Of so many questions one is answered with a pause; 0: none.
    every: u8,
    asked: u8,
}

impl Walk for Pausing<'_> {
    fn next(&mut self, from: Iova, last: Iova) -> Found {
        self.asked = self.asked.wrapping_add(1);
        let found = self.guest.next(from, last);
        let clear = found.map_or(u64::MAX, |m| m.range.start().0);
        let pause = (from.0 - from.0 % PAGE).checked_add(PAGE).filter(|next| *next <= clear);
        let pause = pause.filter(|_| self.every > 0 && self.asked.is_multiple_of(self.every));
        match (pause, found) {
            (Some(pause), _) => Found::NotYet(Iova(pause)),
            (None, Some(m)) => Found::Extent(m),
            (None, None) => Found::Nothing,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Mirror,
    Cache,
    Observer,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Home {
    Endpoint(usize),
    Space(Space),
}

struct Sub {
    subscription: Subscription,
    handle: Handle,
    kind: Kind,
    home: Home,
    interest: Interest,
    reach: Reach,
    /// Nothing can make it fail: it must never be fenced, and never be a reason to refuse.
    sound: bool,
}

pub(super) struct World {
    iommu: Iommu,
    base: u64,
    cap: u64,
    guest: Guest,
    endpoints: Vec<Endpoint>,
    readers: Vec<Reader>,
    attached: Vec<Option<View>>,
    bypass: bool,
    initial_bypass: bool,
    regions: Vec<Vec<Region>>,
    domains: BTreeMap<u32, Pages>,
    extents: Vec<(Extent, bool)>,
    subs: Vec<Option<Sub>>,
}

fn extent(first: u64, last: u64, medium: Medium) -> Extent {
    let range = GpaRange::new(Gpa(first * PAGE), Gpa(last * PAGE + (PAGE - 1)));
    Extent { range: range.unwrap_or(GpaRange::ALL), medium }
}

impl World {
    pub(super) fn new(header: u8) -> Self {
        let initial_bypass = header & 1 != 0;
        let base = if header & 2 != 0 { (u64::MAX / PAGE) - (WIDTH - 1) } else { 0 };
        let cap = if header & 4 != 0 { 5 } else { 1 << 20 };
        let builder = Iommu::builder().bypass(initial_bypass).domain_mappings(cap);
        let iommu = builder.build().unwrap();
        let region = |first, last, kind| Region { range: range_of(base + first, base + last), kind };
        let regions = vec![
            vec![region(6, 6, RegionKind::Msi)],
            vec![region(4, 5, RegionKind::Reserved), region(15, 15, RegionKind::Msi)],
            vec![],
        ];
        let ids = [EndpointId::new(8), EndpointId::new(9), EndpointId::new(9).with_pasid(5)];
        let endpoints: Vec<Endpoint> = (ids.iter().zip(&regions))
            .map(|(id, regions)| {
                iommu.add_endpoint(*id, EndpointConfig { regions: regions.clone() }).unwrap()
            })
            .collect();
        let readers = endpoints.iter().map(|e| e.reader("model").unwrap()).collect();
        let extents = [
            extent(0, 7, Medium::Ram),
            extent(8, 9, Medium::Ram),
            extent(10, 11, Medium::Rom),
            extent(14, 19, Medium::Ram),
            extent(20, 23, Medium::Mmio),
            extent(24, 25, Medium::Ram),
        ];
        let mut world = Self {
            iommu,
            base,
            cap,
            guest: Guest::default(),
            endpoints,
            readers,
            attached: vec![None, None, Some(View::Blocked)],
            bypass: initial_bypass,
            initial_bypass,
            regions,
            domains: BTreeMap::new(),
            extents: extents.into_iter().map(|e| (e, false)).collect(),
            subs: (0..SLOTS).map(|_| None).collect(),
        };
        (0..5).for_each(|at| world.toggle_backing(at));
        world.make_domains();
        world
    }

    fn make_domains(&mut self) {
        for id in DOMAINS {
            let tables = match id {
                1 => Tables::Owned,
                2 => Tables::OwnedCut,
                _ => Tables::Walked { walker: Arc::new(self.guest.clone()), caching_mode: true },
            };
            if !self.domains.contains_key(&id) {
                self.iommu.create_domain(id, tables).unwrap();
                self.domains.insert(id, Pages::default());
            }
        }
    }

    /// All that lets a step be refused, or a mirror be fenced, for reasons that are not the guest's.
    fn all_sound(&self) -> bool {
        self.subs.iter().flatten().all(|s| s.sound)
    }

    fn view(&self, at: usize) -> View {
        let idle = if self.bypass { View::Identity } else { View::Blocked };
        self.attached[at].unwrap_or(idle)
    }

    fn backing(&self) -> Vec<Extent> {
        self.extents.iter().filter(|(_, there)| *there).map(|(e, _)| *e).collect()
    }

    /// What an address space says, page by page.
    fn pages_of(&self, space: Space) -> Pages {
        match space {
            Space::Domain(id) => self.domains.get(&id).cloned().unwrap_or_default(),
            Space::Identity => {
                let mut pages = Pages::default();
                for e in self.backing() {
                    let range = range_of(e.range.start().0 / PAGE, e.range.last().0 / PAGE);
                    pages.map(&Mapping::over(range, e.range.start(), Access::RW).unwrap());
                }
                pages
            }
        }
    }

    fn space_of(&self, home: Home) -> Option<Space> {
        match home {
            Home::Space(space) => Some(space),
            Home::Endpoint(at) => match self.view(at) {
                View::Blocked => None,
                View::Identity => Some(Space::Identity),
                View::Domain(id) => Some(Space::Domain(id)),
            },
        }
    }

    /// Ends a step: acks that are due come, then it must be over.
    fn complete(&mut self, mut done: Completion) {
        let mut resolvers = Vec::new();
        for sub in self.subs.iter().flatten() {
            resolvers.append(&mut sub.handle.lock().resolvers);
        }
        for resolver in resolvers {
            resolver.done();
        }
        assert!(done.is_complete(), "I7: still waiting for {:?}", done.blockers());
    }

    fn ended(&mut self, outcome: Result<Completion, StepError>) -> Result<(), StepErrorKind> {
        match outcome {
            Ok(done) => {
                self.complete(done);
                Ok(())
            }
            Err(StepError { kind, completion }) => {
                self.complete(completion);
                if matches!(kind, StepErrorKind::Unreachable { .. } | StepErrorKind::Refused { .. }) {
                    assert!(!self.all_sound(), "L4: {kind} with nobody to say it");
                }
                Err(kind)
            }
        }
    }

    fn moved(&mut self, outcome: Result<Completion, AttachError>) -> Result<(), Vec<EndpointId>> {
        match outcome {
            Ok(done) => {
                self.complete(done);
                Ok(())
            }
            Err(AttachError { kind, blocked, completion }) => {
                self.complete(completion);
                let may = matches!(
                    kind,
                    AttachErrorKind::Reserved { .. }
                        | AttachErrorKind::Fenced(_)
                        | AttachErrorKind::NoDomain(_)
                );
                assert!(may || !self.all_sound(), "L4: {kind} with nobody to say it");
                Err(blocked)
            }
        }
    }

    fn reserved(&self, id: u32, first: u64, last: u64) -> bool {
        (0..self.endpoints.len())
            .filter(|at| self.view(*at) == View::Domain(id))
            .any(|at| self.regions[at].iter().any(|r| r.range.overlaps(range_of(first, last))))
    }

    /// A mapping over some of the pages that steps play with.
    fn mapping(&self, [a, b, c]: [u8; 3]) -> Mapping {
        let first = u64::from(a & 15);
        let last = (first + u64::from(a >> 4) % 6).min(WIDTH - 1);
        let gpa = u64::from(b % 27);
        let access = match c & 7 {
            0 => Access::empty(),
            1 => Access::READ,
            2 => Access::WRITE,
            _ => Access::RW,
        };
        let m = Mapping::over(range_of(self.base + first, self.base + last), Gpa(gpa * PAGE), access);
        let m = m.unwrap();
        if c & 0x38 == 0x38 { m.mmio() } else { m }
    }

    fn span(&self, a: u8) -> (u64, u64) {
        let first = u64::from(a & 15);
        (self.base + first, self.base + (first + u64::from(a >> 4)).min(WIDTH - 1))
    }

    pub(super) fn step(&mut self, [op, a, b, c, d, e]: [u8; 6]) {
        let id = DOMAINS[usize::from(d) % 2];
        match op % 24 {
            0..=4 => self.batch(id, &[(0, [a, b, c])], e & 1 != 0),
            5..=6 => self.batch(id, &[(1, [a, b, c])], e & 1 != 0),
            7..=8 => self.batch(id, &[(2, [a, b, c])], e & 1 != 0),
            9..=10 => {
                let ops = [(op / 24, [a, b, c]), (e, [b, c, a]), (e >> 2, [c, a, b])];
                self.batch(id, &ops, false);
            }
            11 => self.guest_writes(a, b, c),
            12..=13 => self.sync(a, b),
            14..=15 => self.attach(usize::from(a) % 3, b),
            16 => self.set_bypass(a & 1 != 0),
            17 if a < 24 => self.reset(b & 1 != 0),
            17..=18 => self.toggle_backing(usize::from(b) % self.extents.len()),
            19..=20 => self.subscribe([a, b, c, d]),
            21 => self.fill(usize::from(a) % SLOTS, b, c),
            22 => self.meddle(usize::from(a) % SLOTS, b, c),
            _ => self.replay(usize::from(a) % SLOTS),
        }
    }

    /// Some changes of a domain as one step: maps (0), unmaps (1), replacements (2).
    fn batch(&mut self, id: u32, ops: &[(u8, [u8; 3])], single: bool) {
        let domain = self.iommu.domain(id).unwrap();
        let old = self.domains[&id].clone();
        let (mut new, mut kept) = (old.clone(), old.clone());
        let mut illegal = false;
        let mut batch = domain.batch();
        let mut one = None;
        for (op, bytes) in ops {
            let m = self.mapping(*bytes);
            let (first, last) = (m.range.start().0 / PAGE, m.range.last().0 / PAGE);
            match op % 3 {
                0 => {
                    batch = batch.map(m);
                    one = Some((0, m));
                    illegal = illegal || self.reserved(id, first, last) || new.any(first, last);
                    if !illegal {
                        new.map(&m);
                    }
                }
                1 => {
                    let (first, last) = self.span(bytes[0]);
                    let range = range_of(first, last);
                    let range = if bytes[1] == 0 { IovaRange::ALL } else { range };
                    let (first, last) = (range.start().0 / PAGE, range.last().0 / PAGE);
                    batch = batch.unmap(range);
                    one = Some((1, Mapping { range, ..m }));
                    illegal = illegal || id == 1 && new.cuts(first, last);
                    new.unmap(first, last);
                    kept.unmap(first, last);
                }
                _ => {
                    batch = batch.replace(m);
                    one = Some((2, m));
                    illegal = illegal || self.reserved(id, first, last);
                    if !illegal {
                        new.unmap(first, last);
                        new.map(&m);
                    }
                }
            }
        }
        let outcome = match one.filter(|_| single) {
            Some((0, m)) => domain.map(m),
            Some((1, m)) => domain.unmap(m.range),
            Some((_, m)) => domain.replace(m),
            None => batch.commit(),
        };
        let count = new.mappings().len().max(kept.mappings().len()) as u64;
        let now = match self.ended(outcome) {
            Ok(()) => {
                assert!(!illegal, "the step should have been refused");
                new
            }
            Err(StepErrorKind::Refused { .. }) => {
                assert!(!illegal, "refused by a mirror before it was checked");
                kept
            }
            Err(StepErrorKind::Unreachable { .. }) => old,
            Err(StepErrorKind::Cap(Cap::DomainMappings)) => {
                assert!(illegal || count > self.cap, "a cap that is not reached");
                old
            }
            Err(kind) => {
                assert!(illegal, "refused for no reason: {kind}");
                old
            }
        };
        self.domains.insert(id, now);
    }

    fn guest_writes(&mut self, a: u8, b: u8, c: u8) {
        let (first, last) = self.span(a);
        let mut pages = self.guest.pages();
        // Tables have whole leaves.
        let first = pages.0.get(&first).map_or(first, |c| c.first);
        let last = pages.0.get(&last).map_or(last, |c| c.last);
        pages.unmap(first, last);
        if c & 3 != 0 {
            pages.map(
                &Mapping::over(range_of(first, last), Gpa(u64::from(b % 27) * PAGE), Access::RW).unwrap(),
            );
        }
        let mappings = pages.mappings();
        *self.guest.lock() = mappings.into_iter().map(|m| (m.range.start().0, m)).collect();
        // Caches may have filled from the tables as they were: the guest's invalidation, for them alone.
        for sub in self.subs.iter().flatten().filter(|s| s.kind == Kind::Cache) {
            if self.space_of(sub.home) == Some(Space::Domain(WALKED)) {
                let done = sub.subscription.replay().unwrap();
                drop(done);
            }
        }
    }

    fn sync(&mut self, a: u8, b: u8) {
        let (mut first, mut last) = self.span(a);
        let range = range_of(first, last);
        let theirs = self.guest.pages();
        let ours = self.domains[&WALKED].clone();
        loop {
            let wider = [&theirs, &ours].into_iter().flat_map(|p| p.0.range(first..=last));
            let wider: Vec<_> = wider.map(|(_, c)| (c.first, c.last)).collect();
            let to = wider.iter().fold((first, last), |(f, l), c| (f.min(c.0), l.max(c.1)));
            if to == (first, last) {
                break;
            }
            (first, last) = to;
        }
        let mut now = ours.clone();
        now.unmap(first, last);
        for m in theirs.mappings() {
            let (f, l) = (m.range.start().0 / PAGE, m.range.last().0 / PAGE);
            if f >= first && l <= last && !self.reserved(WALKED, f, l) {
                now.map(&m);
            }
        }
        let domain = self.iommu.domain(WALKED).unwrap();
        let guest = self.guest.clone();
        let mut rest = range;
        for _ in 0..1000 {
            let limit = if b == 0 { usize::MAX } else { usize::from(b % 4) + 1 };
            let mut walk = Pausing { guest: &guest, every: b / 4 % 4, asked: 0 };
            match domain.sync(rest, &mut walk, limit) {
                Ok(progress) => {
                    self.complete(progress.completion);
                    match progress.rest {
                        Some(more) => rest = more,
                        None => {
                            self.domains.insert(WALKED, now);
                            return;
                        }
                    }
                }
                Err(StepError { kind, completion }) => {
                    self.complete(completion);
                    assert_eq!(kind, StepErrorKind::Cap(Cap::DomainMappings));
                    // All that the guest took away is gone, whatever else.
                    let mut record = Pages::default();
                    domain.for_each(IovaRange::ALL, |m| {
                        record.map(&m);
                        core::ops::ControlFlow::Continue(())
                    });
                    self.domains.insert(WALKED, record);
                    return;
                }
            }
        }
        panic!("sync does not end");
    }

    fn attach(&mut self, at: usize, b: u8) {
        let endpoint = self.endpoints[at].clone();
        let to = match b % 8 {
            0..=4 => Some(View::Domain(DOMAINS[usize::from(b) % 3])),
            5 => Some(View::Identity),
            6 => Some(View::Blocked),
            _ => None,
        };
        let mut after = self.attached.clone();
        after[at] = to.or_else(|| endpoint.id().pasid.map(|_| View::Blocked));
        let outcome = match to {
            Some(View::Domain(id)) => endpoint.attach(id),
            Some(View::Identity) => endpoint.attach_identity(),
            Some(View::Blocked) => endpoint.block(),
            None => {
                if at == 1 {
                    after[2] = Some(View::Blocked);
                }
                endpoint.detach()
            }
        };
        match self.moved(outcome) {
            Ok(()) => self.attached = after,
            Err(blocked) => self.blocked(&blocked),
        }
    }

    fn blocked(&mut self, blocked: &[EndpointId]) {
        for (at, endpoint) in self.endpoints.iter().enumerate() {
            if blocked.contains(&endpoint.id()) {
                self.attached[at] = Some(View::Blocked);
            }
        }
    }

    fn set_bypass(&mut self, on: bool) {
        let outcome = self.iommu.set_bypass(on);
        match self.moved(outcome) {
            Ok(()) => self.bypass = on,
            Err(blocked) => self.blocked(&blocked),
        }
    }

    fn reset(&mut self, system: bool) {
        let outcome = self.iommu.reset(if system { ResetKind::System } else { ResetKind::Device });
        match outcome {
            Ok(reset) => {
                self.complete(reset.completion);
                assert_eq!(reset.inside, []);
                self.attached = vec![None, None, Some(View::Blocked)];
                if system {
                    self.bypass = self.initial_bypass;
                }
            }
            Err(error) => {
                assert!(!self.all_sound(), "L4: {error} with nobody to say it");
                self.complete(error.completion);
                self.bypass = self.iommu.bypass();
                self.attached = self.endpoints.iter().map(Endpoint::attached).collect();
                let left = self.attached.iter().all(|v| matches!(v, None | Some(View::Blocked)));
                assert!(left, "L17: an endpoint keeps a domain after a reset");
            }
        }
        assert!(self.iommu.domains().is_empty());
        // Who sat at a domain itself went with it.
        for slot in &mut self.subs {
            let at_domain = |s: &mut Sub| matches!(s.home, Home::Space(Space::Domain(_)));
            if let Some(sub) = slot.take_if(at_domain) {
                assert!(sub.handle.lock().shadow.is_empty() || sub.handle.lock().fenced);
                assert!(sub.handle.lock().dropped || sub.kind == Kind::Cache || sub.kind == Kind::Observer);
            }
        }
        self.domains.clear();
        self.make_domains();
    }

    fn toggle_backing(&mut self, at: usize) {
        let (extent, there) = self.extents[at];
        let outcome =
            if there { self.iommu.remove_backing(extent.range) } else { self.iommu.add_backing(extent) };
        let ended = self.ended(outcome);
        assert_eq!(ended, Ok(()), "backing cannot be refused");
        self.extents[at].1 = !there;
    }

    /// A fresh mirror of each space holds what the reference says; when all have left, nothing is left.
    pub(super) fn finish(mut self) {
        let spaces = DOMAINS.map(Space::Domain).into_iter().chain([Space::Identity]);
        for space in spaces {
            let (mirror, handle) = RecordingMirror::new(Reach::default());
            let subscription = self.iommu.subscribe_mirror(space, mirror, Interest::MIRROR).unwrap();
            let fresh = Sub {
                subscription,
                handle: handle.clone(),
                kind: Kind::Mirror,
                home: Home::Space(space),
                interest: Interest::MIRROR,
                reach: Reach::default(),
                sound: true,
            };
            self.check_sub(&fresh);
            fresh.subscription.leave().wait().unwrap();
            assert!(handle.lock().shadow.is_empty());
        }
        for (slot, at) in (0..SLOTS).zip(0..) {
            if self.subs[slot].is_some() {
                self.subscribe([at, 0, 0, 0]);
            }
        }
        self.check();
        assert_eq!(self.iommu.outstanding(), 0, "completions that never ended");
    }
}
