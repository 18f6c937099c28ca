//! A unit with endpoints, domains and subscribers, and what they should be.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::endpoint::{Region, RegionKind};
use viommu::reader::Walker;
use viommu::subscribe::{OutOfReach, Reach};
use viommu::{
    Access, AttachError, AttachErrorKind, Cap, Completion, Endpoint, EndpointConfig, EndpointId, Extent,
    FaultReason, FillError, Gpa, GpaRange, Interest, Iommu, Iova, IovaRange, Kinds, Mapping, Medium, Place,
    Reader, ResetKind, Space, StepError, StepErrorKind, SubscribeError, Subscription, Tables, View,
};

use super::recording::{Event, Handle, RecordingCache, RecordingMirror, RecordingObserver};
use super::reference::{PAGE, Pages, given, medium_at, range_of};

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

pub struct World {
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
    pub fn new(header: u8) -> Self {
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

    pub fn step(&mut self, [op, a, b, c, d, e]: [u8; 6]) {
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
        let mut at = range.start();
        for _ in 0..100 {
            let rest = IovaRange::new(at, range.last().max(at)).unwrap();
            let limit = if b == 0 { usize::MAX } else { usize::from(b % 4) + 1 };
            let mut walk = |from, last| guest.next(from, last);
            match domain.sync(rest, &mut walk, limit) {
                Ok(progress) => {
                    self.complete(progress.completion);
                    match progress.next {
                        Some(next) if next <= range.last() => at = next,
                        _ => {
                            // With a limit the pieces behind the range are the caller's to go on with.
                            if let Some(next) = progress.next {
                                at = next;
                                if at.0 / PAGE <= last {
                                    continue;
                                }
                            }
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

    fn subscribe(&mut self, [a, b, c, d]: [u8; 4]) {
        let slot = usize::from(a) % SLOTS;
        if let Some(sub) = self.subs[slot].take() {
            let done = sub.subscription.leave();
            let resolvers = core::mem::take(&mut sub.handle.lock().resolvers);
            resolvers.into_iter().for_each(|r| r.done());
            self.complete(done);
            let record = sub.handle.lock();
            assert!(
                record.fenced || record.shadow.is_empty(),
                "leaves something behind: {:?}",
                record.shadow
            );
            assert!(record.dropped || sub.kind == Kind::Cache, "kept after it left");
            return;
        }
        let home = match b % 6 {
            0..=2 => Home::Endpoint(usize::from(b) % 6),
            3 => Home::Space(Space::Identity),
            _ => Home::Space(Space::Domain(DOMAINS[usize::from(b) / 6 % 3])),
        };
        let window = match c & 3 {
            0 | 1 => IovaRange::ALL,
            2 => range_of(self.base + 4, self.base + 11),
            _ => range_of(self.base, self.base + 7),
        };
        let offset = match c & 12 {
            4 if window != IovaRange::ALL && self.base == 0 => 64 * PAGE,
            4 if window != IovaRange::ALL => (64 * PAGE).wrapping_neg(),
            _ => 0,
        };
        let kind = match c >> 4 {
            0..=3 => Kind::Cache,
            4 => Kind::Observer,
            _ => Kind::Mirror,
        };
        let kinds = if kind == Kind::Cache { Kinds::UNMAP } else { Kinds::MAP | Kinds::UNMAP };
        let interest = Interest::all_of(kinds).within(window).with_offset(offset);
        let mut reach = Reach {
            replace: d & 1 != 0,
            wide_unmap: d & 2 == 0,
            batches: d & 4 != 0,
            mmio: d & 8 != 0,
            out_of_reach: if d & 16 != 0 { OutOfReach::LeaveOut } else { OutOfReach::Fence },
            ..Reach::default()
        };
        match d >> 5 {
            1 => reach.page_sizes = !0x1fff,
            2 => reach.entries = Some(3),
            3 => {
                let at = |f: u64, l: u64| {
                    let range = range_of(self.base + f, self.base + l);
                    let start = Iova(range.start().0.wrapping_add(offset));
                    IovaRange::new(start, Iova(range.last().0.wrapping_add(offset))).unwrap()
                };
                reach.apertures = vec![at(0, 5), at(8, 15)];
            }
            _ => {}
        }
        let sound = kind != Kind::Mirror || d >> 5 == 0 || d >> 5 > 3;
        let on = self.iommu.clone();
        let outcome;
        let handle;
        macro_rules! subscribe {
            ($made:expr, $at_endpoint:ident, $at_space:ident) => {{
                let (subscriber, its) = $made;
                handle = its;
                outcome = match home {
                    Home::Endpoint(at) => self.endpoints[at].$at_endpoint(subscriber, interest),
                    Home::Space(space) => on.$at_space(space, subscriber, interest),
                };
            }};
        }
        match kind {
            Kind::Mirror => {
                subscribe!(RecordingMirror::new(reach.clone()), subscribe_mirror, subscribe_mirror);
            }
            Kind::Cache => subscribe!(RecordingCache::new(), subscribe_cache, subscribe_cache),
            Kind::Observer => {
                subscribe!(RecordingObserver::new(), subscribe_observer, subscribe_observer);
            }
        }
        match outcome {
            Ok(subscription) => {
                self.subs[slot] = Some(Sub { subscription, handle, kind, home, interest, reach, sound });
            }
            Err(error) => {
                assert!(!sound, "refused for no reason: {error}");
                assert!(matches!(error, SubscribeError::Unreachable { .. }), "not foreseen: {error}");
                assert!(handle.lock().log.is_empty(), "called before it was refused");
            }
        }
    }

    fn fill(&mut self, slot: usize, b: u8, c: u8) {
        let Some(sub) = self.subs[slot].as_ref().filter(|s| s.kind == Kind::Cache) else { return };
        let page = self.base + u64::from(b & 15);
        let iova = Iova((page * PAGE + 8).wrapping_add(sub.interest.offset));
        let access = [Access::READ, Access::WRITE, Access::RW, Access::empty()][usize::from(c & 3)];
        let due = self.due_of(sub).get(&((iova.0 - 8) / PAGE)).copied();
        match sub.subscription.fill(iova, access) {
            Ok(entry) => {
                let (gpa, allowed) = due.expect("L9: filled with what is not there");
                assert!(entry.range.contains(iova) && allowed == entry.access && allowed.contains(access));
                assert_eq!(entry.translate(iova).0 / PAGE, gpa);
            }
            Err(FillError::Fault(fault)) => {
                let may = due.is_none_or(|(_, allowed)| !allowed.contains(access));
                assert!(may || fault.reason == FaultReason::Fenced, "not filled: {fault}");
            }
            Err(error) => panic!("not filled: {error}"),
        }
    }

    /// Trouble: a call is refused, acks come later.
    fn meddle(&mut self, slot: usize, b: u8, c: u8) {
        let Some(sub) = self.subs[slot].as_mut().filter(|s| s.kind == Kind::Mirror) else { return };
        if b & 1 != 0 {
            let pending = sub.handle.lock().pending;
            sub.handle.lock().pending = !pending;
            return;
        }
        sub.sound = false;
        let (nth, times) = (usize::from(c & 3) + 1, usize::from(c >> 6) % 3 + 1);
        let of: fn(&Event) -> bool = match b >> 1 & 3 {
            0 => |e| matches!(e, Event::Unmap(_)),
            _ => |e| matches!(e, Event::Map(_) | Event::Replace(..)),
        };
        sub.handle.refuse_nth(nth, times, of);
    }

    fn replay(&mut self, slot: usize) {
        let Some(sub) = &self.subs[slot] else { return };
        let sound = sub.sound;
        match sub.subscription.replay() {
            Ok(done) => self.complete(done),
            Err(error) => assert!(!sound, "a replay refused for no reason: {error}"),
        }
    }

    /// What a mirror must hold, or a cache may: by page, in the subscriber's addresses.
    fn due_of(&self, sub: &Sub) -> BTreeMap<u64, (u64, Access)> {
        let Some(space) = self.space_of(sub.home) else { return BTreeMap::new() };
        let is_mirror = sub.kind == Kind::Mirror;
        let walked = space == Space::Domain(WALKED) && !is_mirror;
        let pages = if walked { self.guest.pages() } else { self.pages_of(space) };
        let backing = self.backing();
        let none = Vec::new();
        let regions = match sub.home {
            Home::Endpoint(at) => &self.regions[at],
            Home::Space(_) => &none,
        };
        let outward = |page: u64| (page * PAGE).wrapping_add(sub.interest.offset) / PAGE;
        let in_identity = |page: u64| {
            let range = range_of(page, page);
            let there = Iova(outward(page) * PAGE);
            pages.0.contains_key(&page)
                && !regions.iter().any(|r| r.range.overlaps(range))
                && sub.reach.apertures.iter().any(|a| a.contains(there))
        };
        let mut due = BTreeMap::new();
        for (page, cell) in &pages.0 {
            let range = range_of(*page, *page);
            if !sub.interest.window.covers(range) {
                continue;
            }
            let Some((gpa, access, mmio)) = given(&backing, cell) else { continue };
            if is_mirror && mmio && !sub.reach.mmio {
                continue;
            }
            if !is_mirror && regions.iter().any(|r| r.range.overlaps(range)) {
                continue;
            }
            if is_mirror && space == Space::Identity {
                let pair = sub.reach.granule() == PAGE || in_identity(page & !1) && in_identity(page | 1);
                if !(in_identity(*page) && pair) {
                    continue;
                }
            }
            due.insert(outward(*page), (gpa, access));
        }
        due
    }

    fn held(sub: &Sub) -> BTreeMap<u64, (u64, Access)> {
        let mut held = BTreeMap::new();
        for m in sub.handle.held() {
            let (first, last) = (m.range.start().0 / PAGE, m.range.last().0 / PAGE);
            for page in first..=last {
                let twice = held.insert(page, (m.gpa.0 / PAGE + (page - first), m.access));
                assert_eq!(twice, None, "two entries over one page");
            }
        }
        held
    }

    pub fn check(&mut self) {
        for (id, pages) in &self.domains {
            pages.check(&self.iommu.domain(*id).unwrap());
        }
        for (at, endpoint) in self.endpoints.iter().enumerate() {
            assert_eq!(endpoint.view(), Some(self.view(at)), "{} sees something else", endpoint.id());
        }
        for sub in self.subs.iter().flatten() {
            self.check_sub(sub);
        }
        for at in 0..self.endpoints.len() {
            self.check_endpoint(at);
        }
    }

    fn check_sub(&self, sub: &Sub) {
        let fenced = sub.handle.lock().fenced;
        assert_eq!(sub.subscription.is_fenced(), fenced);
        assert!(!(fenced && sub.sound), "L11: fenced for no reason");
        if fenced {
            return;
        }
        for event in sub.handle.take() {
            let range = match event {
                Event::Map(m) | Event::Install(m) | Event::Replace(_, m) => m.range,
                Event::Unmap(range) | Event::Invalidate(range) => range,
                Event::Changed(change) => change.range(),
                Event::Fence | Event::Moved(..) => continue,
            };
            let window = sub.interest.window;
            let start = window.start().0.wrapping_add(sub.interest.offset);
            let last = window.last().0.wrapping_add(sub.interest.offset);
            assert!(range.start().0 >= start && range.last().0 <= last, "I8: {event:?} outside the window");
        }
        let (due, held) = (self.due_of(sub), Self::held(sub));
        match sub.kind {
            Kind::Mirror => {
                let all = sub.reach.out_of_reach == OutOfReach::Fence
                    || self.space_of(sub.home) != Some(Space::Domain(WALKED));
                if all {
                    assert_eq!(held, due, "I1: a mirror that is not equal");
                } else {
                    let within = held.iter().all(|(page, what)| due.get(page) == Some(what));
                    assert!(within, "I1: {held:?} beyond {due:?}");
                }
                let counts = sub.subscription.counts();
                assert_eq!(counts.held, sub.handle.lock().shadow.len() as u64, "miscounted");
            }
            Kind::Cache => {
                for (page, what) in &held {
                    assert_eq!(due.get(page), Some(what), "I2: stale at page {page:#x}");
                }
            }
            Kind::Observer => return,
        }
        let audit = sub.subscription.audit().expect("it tells what it holds");
        assert!(audit.is_clean(), "L16: {audit:?}");
    }

    fn check_endpoint(&mut self, at: usize) {
        let view = self.view(at);
        let fenced = self.endpoints[at].is_fenced();
        let backing = self.backing();
        let pages = match view {
            View::Blocked => None,
            View::Identity => Some(self.pages_of(Space::Identity)),
            View::Domain(WALKED) => Some(self.guest.pages()),
            View::Domain(id) => self.domains.get(&id).cloned(),
        };
        let guard = self.readers[at].enter();
        for page in self.base..=self.base + (WIDTH - 1) {
            let iova = Iova(page * PAGE + 16);
            for access in [Access::READ, Access::WRITE] {
                let answer = guard.probe(iova, access);
                let answer = answer.map(|t| (t.gpa, t.access, t.place)).map_err(|f| f.reason);
                let region = self.regions[at].iter().find(|r| r.range.contains(iova));
                let due = match (region, &pages) {
                    (Some(r), _) if r.kind == RegionKind::Msi && access == Access::WRITE => {
                        Ok((Gpa(iova.0), Access::WRITE, Place::Msi))
                    }
                    (Some(_), _) => Err(FaultReason::Reserved),
                    _ if fenced => Err(FaultReason::Fenced),
                    (None, None) => Err(FaultReason::Blocked),
                    (None, Some(pages)) => Self::answer(pages, &backing, page, access),
                };
                assert_eq!(answer, due, "{:?} of {iova} at {}", access, self.endpoints[at].id());
            }
        }
    }

    fn answer(
        pages: &Pages,
        backing: &[Extent],
        page: u64,
        access: Access,
    ) -> Result<(Gpa, Access, Place), FaultReason> {
        let cell = pages.0.get(&page).filter(|c| !c.access.is_empty()).ok_or(FaultReason::Unmapped)?;
        if !cell.access.contains(access) {
            return Err(FaultReason::Permission);
        }
        let medium = medium_at(backing, cell.gpa).ok_or(FaultReason::NoBacking)?;
        let place = match medium {
            Medium::Rom => Place::Rom,
            Medium::Ram if !cell.mmio => Place::Ram,
            _ => Place::Mmio,
        };
        let allowed = if medium == Medium::Rom { cell.access & Access::READ } else { cell.access };
        if !allowed.contains(access) {
            return Err(FaultReason::Permission);
        }
        Ok((Gpa(cell.gpa * PAGE + 16), allowed, place))
    }

    /// A fresh mirror of each space holds what the reference says; when all have left, nothing is left.
    pub fn finish(mut self) {
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
        for slot in 0..SLOTS {
            if self.subs[slot].is_some() {
                self.subscribe([slot as u8, 0, 0, 0]);
            }
        }
        self.check();
        assert_eq!(self.iommu.outstanding(), 0, "completions that never ended");
    }
}
