//! L2, L7, L10, L16: who may listen to what, replay, leaving, callbacks, audits.

use std::sync::{Arc, Mutex};

use viommu::subscribe::{Producer, Reach, Refused, Unreachable};
use viommu::{
    Access, AttachErrorKind, Cap, FillError, Interest, Iommu, IovaRange, Kinds, Mapping, Space,
    StepErrorKind, SubscribeError, Tables,
};

use crate::support::*;

fn kinds(kinds: Kinds) -> Interest {
    Interest::all_of(kinds)
}

#[test]
fn nobody_subscribes_for_nothing_or_for_half() {
    let (iommu, _, _) = attached();
    let both = Kinds::MAP | Kinds::UNMAP;
    let space = Space::Domain(1);
    for (k, ok) in [(Kinds::empty(), false), (Kinds::MAP, false), (Kinds::UNMAP, false), (both, true)] {
        let (mirror, _) = RecordingMirror::new(Reach::default());
        assert_eq!(iommu.subscribe_mirror(space, mirror, kinds(k)).is_ok(), ok, "{k:?}");
    }
    for (k, ok) in [(Kinds::empty(), false), (both, false), (Kinds::UNMAP, true), (Kinds::DEVICE_TLB, true)] {
        let (cache, _) = RecordingCache::new();
        assert_eq!(iommu.subscribe_cache(space, cache, kinds(k)).is_ok(), ok, "{k:?}");
    }
    for (k, ok) in [(Kinds::empty(), false), (both, true), (Kinds::MAP, true), (Kinds::DEVICE_TLB, false)] {
        let (observer, _) = RecordingObserver::new();
        assert_eq!(iommu.subscribe_observer(space, observer, kinds(k)).is_ok(), ok, "{k:?}");
    }
}

#[test]
fn a_reach_or_window_out_of_order_is_refused() {
    let (iommu, _, _) = attached();
    let try_it = |reach, interest| {
        let (mirror, _) = RecordingMirror::new(reach);
        iommu.subscribe_mirror(Space::Domain(1), mirror, interest).map(drop)
    };
    let wrong = Reach { apertures: vec![pages(9, 12), pages(0, 3)], ..Reach::default() };
    assert!(matches!(try_it(wrong, Interest::MIRROR), Err(SubscribeError::Invalid(_))));
    let none = Reach { page_sizes: 0, ..Reach::default() };
    assert!(matches!(try_it(none, Interest::MIRROR), Err(SubscribeError::Invalid(_))));
    let wraps = Interest::MIRROR.with_offset(PAGE);
    assert!(matches!(try_it(Reach::default(), wraps), Err(SubscribeError::Invalid(_))));
    let bytes = IovaRange::new(viommu::Iova(8), viommu::Iova(0xfff)).unwrap();
    let cut = Interest::MIRROR.within(bytes);
    assert!(matches!(try_it(Reach::default(), cut), Err(SubscribeError::Invalid(_))));
}

#[test]
fn observers_see_old_and_new_of_their_kinds() {
    let (iommu, _, domain) = attached();
    let observe = |interest| {
        let (observer, handle) = RecordingObserver::new();
        (iommu.subscribe_observer(Space::Domain(1), observer, interest).unwrap(), handle)
    };
    let (_a, all) = observe(kinds(Kinds::MAP | Kinds::UNMAP));
    let (_u, unmaps) = observe(kinds(Kinds::UNMAP));
    let (_w, window) = observe(kinds(Kinds::MAP).within(pages(5, 20)).with_offset(100 * PAGE));
    over(domain.map(rw(0, 9, 1)).unwrap());
    over(domain.replace(rw(0, 9, 50)).unwrap());
    over(domain.unmap(pages(0, 9)).unwrap());
    let changes = |h: &Handle| -> Vec<_> {
        let of = |e| {
            if let Event::Changed(c) = e { Some((c.before().copied(), c.after().copied())) } else { None }
        };
        h.take().into_iter().filter_map(of).collect()
    };
    let (old, new) = (Some(rw(0, 9, 1)), Some(rw(0, 9, 50)));
    assert_eq!(changes(&all), [(None, old), (old, new), (new, None)]);
    assert_eq!(changes(&unmaps), [(old, new), (new, None)]);
    let seen = changes(&window);
    assert_eq!(seen[0], (None, Some(rw(105, 109, 6))));
    assert_eq!(seen.len(), 2);
}

type Told = Arc<Mutex<Vec<(Space, Kinds, Kinds)>>>;

#[derive(Default, Clone)]
struct Model {
    told: Told,
    refuse: Arc<Mutex<bool>>,
}

impl Producer for Model {
    fn wanted_changed(&self, space: Space, old: Kinds, new: Kinds) -> Result<(), Refused> {
        if *self.refuse.lock().unwrap() && !(old.contains(new)) {
            return Err(refusal());
        }
        let mut told = self.told.lock().unwrap();
        let before = told.iter().rev().find(|t| t.0 == space).map_or(Kinds::empty(), |t| t.2);
        assert_eq!(before, old, "the model lost count of {space}");
        assert_ne!(old, new);
        told.push((space, old, new));
        Ok(())
    }
}

impl Model {
    fn unit() -> (Iommu, Self) {
        let model = Self::default();
        let (iommu, _) = unit_with(|b| b.ram(0, 1 << 20).producer(Arc::new(model.clone())));
        for id in [1, 2] {
            iommu.create_domain(id, Tables::Owned).unwrap();
        }
        (iommu, model)
    }

    fn wanted(&self, id: u32) -> Kinds {
        let told = self.told.lock().unwrap();
        told.iter().rev().find(|t| t.0 == Space::Domain(id)).map_or(Kinds::empty(), |t| t.2)
    }
}

const BOTH: Kinds = Kinds::MAP.union(Kinds::UNMAP);

#[test]
fn the_model_sees_the_first_and_the_last() {
    let (iommu, model) = Model::unit();
    let e = endpoint(&iommu, 8);
    over(e.attach(1).unwrap());
    let (cache, _) = cache_at(&e);
    assert_eq!(model.wanted(1), Kinds::UNMAP);
    let (mirror, _) = mirror_at(&e, Reach::default());
    assert_eq!(model.wanted(1), BOTH);
    over(e.attach(2).unwrap());
    assert_eq!((model.wanted(1), model.wanted(2)), (Kinds::empty(), BOTH));
    over(mirror.leave());
    assert_eq!(model.wanted(2), Kinds::UNMAP);
    over(cache.leave());
    assert_eq!(model.wanted(2), Kinds::empty());
}

#[test]
fn the_model_refuses_with_a_typed_error() {
    let (iommu, model) = Model::unit();
    let e = endpoint(&iommu, 8);
    *model.refuse.lock().unwrap() = true;
    let (mirror, m) = RecordingMirror::new(Reach::default());
    let (s, _) = mirror_at(&e, Reach::default()); // blocked: nobody to ask
    let error = iommu.subscribe_mirror(Space::Domain(1), mirror, Interest::MIRROR).unwrap_err();
    assert!(matches!(error, SubscribeError::NotProduced { .. }) && m.lock().dropped);
    assert!(matches!(e.attach(1).unwrap_err().kind, AttachErrorKind::NotProduced { .. }));
    *model.refuse.lock().unwrap() = false;
    over(e.attach(1).unwrap());
    over(s.leave());
    assert_eq!(model.wanted(1), Kinds::empty());
}

#[test]
fn what_failed_is_not_wanted_any_more() {
    let (iommu, model) = Model::unit();
    let [one, two] = [1, 2].map(|id| iommu.domain(id).unwrap());
    over(one.map(rw(0, 0, 1)).unwrap());
    over(two.map(rw(50, 50, 1)).unwrap());
    let narrow = Reach { apertures: vec![pages(0, 9)], ..Reach::default() };
    // Subscribing, out of reach and refused.
    let (mirror, _) = RecordingMirror::new(narrow.clone());
    iommu.subscribe_mirror(Space::Domain(2), mirror, Interest::MIRROR).unwrap_err();
    assert_eq!(model.wanted(2), Kinds::empty());
    let (mirror, m) = RecordingMirror::new(Reach::default());
    m.refuse_nth(1, 1, is_map);
    iommu.subscribe_mirror(Space::Domain(2), mirror, Interest::MIRROR).unwrap_err();
    assert_eq!(model.wanted(2), Kinds::empty());
    // Attaching, of which the second cannot.
    let (a, b) = (endpoint(&iommu, 1), endpoint(&iommu, 2));
    let (_a, _) = mirror_at(&a, Reach::default());
    let (_b, mb) = mirror_at(&b, narrow);
    let to = Some(viommu::View::Domain(2));
    iommu.set_views(&[(a.id(), to), (b.id(), to)]).unwrap_err();
    assert_eq!(model.wanted(2), Kinds::empty());
    let to = Some(viommu::View::Domain(1));
    mb.refuse_nth(1, 1, is_map);
    iommu.set_views(&[(a.id(), to), (b.id(), to)]).unwrap_err();
    assert_eq!(model.wanted(1), Kinds::empty());
    over(iommu.set_views(&[(a.id(), to), (b.id(), to)]).unwrap());
    assert_eq!(model.wanted(1), BOTH);
}

#[test]
fn observers_that_move_and_domains_that_end_are_counted() {
    let (iommu, model) = Model::unit();
    let e = endpoint(&iommu, 8);
    let (observer, _) = RecordingObserver::new();
    let s = e.subscribe_observer(observer, kinds(BOTH)).unwrap();
    over(e.attach(1).unwrap());
    assert_eq!(model.wanted(1), BOTH);
    over(e.attach(2).unwrap());
    assert_eq!((model.wanted(1), model.wanted(2)), (Kinds::empty(), BOTH));
    drop(s);
    let (_m, _) = mirror_on(&iommu, 1, Reach::default());
    over(iommu.destroy_domain(1).unwrap());
    assert_eq!(model.wanted(1), Kinds::empty());
}

#[test]
fn an_offset_moves_all_that_a_subscriber_sees() {
    let (_iommu, e, domain) = attached();
    let shift = (10 * PAGE).wrapping_neg();
    let interest = |i: Interest| i.within(pages(20, 29)).with_offset(shift);
    let (mirror, m) = RecordingMirror::new(Reach { apertures: vec![pages(10, 19)], ..Reach::default() });
    let mirror = e.subscribe_mirror(mirror, interest(Interest::MIRROR)).unwrap();
    let (cache, c) = RecordingCache::new();
    let cache = e.subscribe_cache(cache, interest(Interest::CACHE)).unwrap();
    over(domain.map(rw(0, 99, 0)).unwrap());
    assert_eq!(m.held(), [rw(10, 19, 20)]);
    let entry = cache.fill(at(12), Access::READ).unwrap();
    assert!(entry.range.contains(at(12)) && entry.translate(at(12)).0 == 22 * PAGE);
    assert!(pages(10, 19).covers(entry.range));
    assert!(matches!(cache.fill(at(30), Access::READ), Err(FillError::Fault(_))));
    for s in [&mirror, &cache] {
        let audit = s.audit().unwrap();
        assert!(audit.is_clean(), "{audit:?}");
    }
    over(domain.unmap(pages(0, 99)).unwrap());
    assert_eq!(m.take().last(), Some(&Event::Unmap(pages(10, 19))));
    assert_eq!(c.take().last(), Some(&Event::Invalidate(pages(10, 19))));
}

#[test]
fn replay_while_the_domain_changes() {
    let (iommu, _, domain) = attached();
    for p in 0..4_000 {
        over(domain.map(rw(2 * p, 2 * p, p)).unwrap());
    }
    for round in 0..6 {
        let done = std::sync::atomic::AtomicBool::new(false);
        let (s, m) = std::thread::scope(|scope| {
            let churn = scope.spawn(|| {
                let mut p = 0_u64;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    p = (p * 5 + 7 + round) % 4_000;
                    domain.replace(rw(2 * p, 2 * p, (p + round) % 1000)).unwrap().wait().unwrap();
                    domain.replace(rw(2 * p, 2 * p + 1, 9)).unwrap().wait().unwrap();
                    domain.unmap(pages(2 * p, 2 * p + 1)).unwrap().wait().unwrap();
                    domain.map(rw(2 * p, 2 * p, 77)).unwrap().wait().unwrap();
                }
            });
            let result = mirror_on(&iommu, 1, Reach::default());
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            churn.join().unwrap();
            result
        });
        let audit = s.audit().unwrap();
        assert!(audit.is_clean(), "{audit:?}");
        assert_eq!(s.counts().held, m.held().len() as u64);
        over(s.leave());
        assert!(m.held().is_empty() && !m.lock().fenced);
    }
}

#[test]
fn dropping_a_subscription_empties_it() {
    let (iommu, _, domain) = attached();
    over(domain.map(rw(0, 9, 1)).unwrap());
    over(domain.map(rw(20, 29, 1)).unwrap());
    let (s, m) = mirror_on(&iommu, 1, Reach { wide_unmap: false, ..Reach::default() });
    drop(s);
    assert!(m.held().is_empty() && m.lock().dropped && !m.lock().fenced);
    let (s, m) = mirror_on(&iommu, 1, Reach { wide_unmap: false, ..Reach::default() });
    m.refuse_nth(2, 1, is_unmap);
    drop(s);
    assert!(m.lock().fenced && m.lock().dropped);
}

#[test]
fn inside_a_callback_steps_are_errors_and_subscribing_waits() {
    for reach in [Reach::default(), Reach { batches: true, replace: true, ..Reach::default() }] {
        let (iommu, e, domain) = attached();
        let other = iommu.create_domain(2, Tables::Owned).unwrap();
        let (s, m) = mirror_at(&e, reach);
        let (cache, _) = cache_at(&e);
        let late: Arc<Mutex<Vec<_>>> = Arc::default();
        let (mirror, l) = RecordingMirror::new(Reach::default());
        let mut mirror = Some(mirror);
        let leaving = Mutex::new(Some(s));
        let pending = Mutex::new(Some(viommu::Completion::ready()));
        let (iommu2, e2, d2, late2) = (iommu.clone(), e.clone(), domain.clone(), late.clone());
        let ran = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let ran2 = ran.clone();
        m.lock().inside = Some(Box::new(move |_| {
            ran2.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            assert!(matches!(d2.map(rw(90, 90, 1)).unwrap_err().kind, StepErrorKind::InCallback));
            assert!(matches!(other.unmap(pages(0, 0)).unwrap_err().kind, StepErrorKind::InCallback));
            assert!(matches!(e2.attach(2).unwrap_err().kind, AttachErrorKind::InCallback));
            assert!(matches!(e2.detach().unwrap_err().kind, AttachErrorKind::InCallback));
            assert!(matches!(iommu2.set_bypass(true).unwrap_err().kind, AttachErrorKind::InCallback));
            assert!(iommu2.remove_backing(gpas(0, 0)).is_err());
            assert!(iommu2.reset(viommu::ResetKind::System).is_err());
            assert!(matches!(cache.fill(at(0), Access::READ), Err(FillError::InCallback)));
            assert!(pending.lock().unwrap().take().is_none_or(|done| done.wait().is_ok()), "it is over");
            if let Some(mirror) = mirror.take() {
                let s = iommu2.subscribe_mirror(Space::Domain(1), mirror, Interest::MIRROR).unwrap();
                late2.lock().unwrap().push(s);
            }
            drop(leaving.lock().unwrap().take());
        }));
        over(domain.map(rw(0, 9, 1)).unwrap());
        assert_eq!(ran.load(std::sync::atomic::Ordering::Relaxed), 2, "in its map, and as it leaves");
        assert_eq!(l.held(), [rw(0, 9, 1)], "subscribed after the step");
        assert!(m.lock().dropped && m.held().is_empty(), "left after the step");
        assert!(late.lock().unwrap()[0].audit().unwrap().is_clean());
    }
}

/// A mirror that tries a step in every call that it gets.
struct Eager(viommu::Domain, Arc<Mutex<Vec<&'static str>>>);

impl Eager {
    fn try_step(&self, of: &'static str) {
        assert!(matches!(self.0.unmap(pages(90, 90)).unwrap_err().kind, StepErrorKind::InCallback));
        self.1.lock().unwrap().push(of);
    }
}

impl viommu::subscribe::Mirror for Eager {
    fn reach(&self) -> Reach {
        self.try_step("reach");
        Reach { batches: true, ..Reach::default() }
    }
    fn begin(&mut self) {
        self.try_step("begin");
    }
    fn commit(&mut self) -> viommu::Ack {
        self.try_step("commit");
        viommu::Ack::Done
    }
    fn map(&mut self, _: &Mapping) -> Result<viommu::Ack, Refused> {
        self.try_step("map");
        Ok(viommu::Ack::Done)
    }
    fn unmap(&mut self, _: IovaRange) -> Result<viommu::subscribe::Unmapped, Refused> {
        self.try_step("unmap");
        Err(refusal())
    }
    fn fence(&mut self) -> Result<(), viommu::subscribe::FenceFailed> {
        self.try_step("fence");
        Ok(())
    }
    fn held(&self) -> Vec<Mapping> {
        self.try_step("held");
        Vec::new()
    }
}

#[test]
fn every_call_of_a_mirror_is_a_callback() {
    let (iommu, _, domain) = attached();
    let calls = Arc::default();
    let eager = Box::new(Eager(domain.clone(), Arc::clone(&calls)));
    let s = iommu.subscribe_mirror(Space::Domain(1), eager, Interest::MIRROR).unwrap();
    over(domain.map(rw(0, 0, 1)).unwrap());
    assert!(s.audit().is_some());
    over(domain.unmap(pages(0, 0)).unwrap());
    let seen = calls.lock().unwrap().clone();
    for of in ["reach", "begin", "commit", "map", "unmap", "fence", "held"] {
        assert!(seen.contains(&of), "{of} was not called");
    }
}

#[test]
fn leave_inside_a_lease_callback_takes_effect() {
    let (iommu, e, domain) = attached();
    over(domain.map(rw(0, 0, 1)).unwrap());
    let (s, m) = mirror_on(&iommu, 1, Reach::default());
    let mut reader = e.reader("worker").unwrap();
    let guard = reader.enter();
    let s = Mutex::new(Some(s));
    // Removed backing asks for leases only when the completion is polled: outside any step.
    let lease =
        guard.lease(pages(0, 0), Access::READ, "disk", move || drop(s.lock().unwrap().take())).unwrap();
    drop(guard);
    let mut done = iommu.remove_backing(gpas(0, (1 << 18) - 1)).unwrap();
    assert!(!done.is_complete());
    assert!(m.lock().dropped, "it waits for a step that never comes");
    drop(lease);
    over(done);
}

#[test]
fn translate_inside_a_callback_sees_what_is_being_published() {
    let (_iommu, e, domain) = attached();
    let (_s, m) = mirror_at(&e, Reach::default());
    over(domain.map(rw(0, 9, 100)).unwrap());
    let reader = Mutex::new(e.reader("callback").unwrap());
    let seen: Arc<Mutex<Vec<_>>> = Arc::default();
    let log = seen.clone();
    m.lock().inside = Some(Box::new(move |_| {
        let mut reader = reader.lock().unwrap();
        log.lock().unwrap().push(reader.enter().probe(at(3), Access::READ).ok().map(|t| t.gpa.0 / PAGE));
    }));
    over(domain.replace(rw(0, 9, 200)).unwrap());
    assert_eq!(*seen.lock().unwrap(), [None, None], "old, none, new: none while both are delivered");
    assert_eq!(translate(&e, 3, Access::READ).unwrap().gpa.0 / PAGE, 203);
}

#[test]
fn reach_is_checked_before_a_step_begins() {
    let (iommu, _, domain) = attached();
    let holes = Reach { apertures: vec![pages(0, 9), pages(12, 19)], ..Reach::default() };
    let (_good, g) = mirror_on(&iommu, 1, Reach::default());
    let (_s, m) = mirror_on(&iommu, 1, holes);
    let (_l, large) = mirror_on(&iommu, 1, Reach { page_sizes: !0x1fff, ..Reach::default() });
    let why = |map| match domain.map(map).unwrap_err().kind {
        StepErrorKind::Unreachable { why, .. } => why,
        kind => panic!("{kind}"),
    };
    assert_eq!(why(rw(10, 11, 0)), Unreachable::Aperture);
    assert_eq!(why(rw(8, 13, 0)), Unreachable::Aperture);
    assert_eq!(why(rw(0, 0, 0)), Unreachable::PageSize);
    assert_eq!(why(rw(0, 1, 1)), Unreachable::PageSize);
    assert_eq!((g.take(), m.take(), large.take()), (vec![], vec![], vec![]));
    over(domain.map(rw(0, 1, 2)).unwrap());
    over(domain.batch().unmap(pages(0, 1)).map(rw(0, 3, 2)).commit().unwrap());
    domain.batch().unmap(pages(0, 3)).map(rw(10, 11, 2)).commit().unwrap_err();
    assert_eq!(domain.len(), 1, "refused before its removals");
    // Registers and pages without access are in the record alone.
    over(domain.map(rw(10, 10, 2).mmio()).unwrap());
    over(domain.map(map_of(11, 11, 2, Access::empty())).unwrap());
}

#[test]
fn what_is_mapped_already_must_be_in_reach_too() {
    let (iommu, e, domain) = attached();
    over(domain.map(rw(0, 0, 1)).unwrap());
    over(domain.map(rw(30, 30, 1)).unwrap());
    let reach = Reach { apertures: vec![pages(0, 9)], ..Reach::default() };
    let (mirror, m) = RecordingMirror::new(reach.clone());
    let error = iommu.subscribe_mirror(Space::Domain(1), mirror, Interest::MIRROR).unwrap_err();
    assert!(matches!(error, SubscribeError::Unreachable { why: Unreachable::Aperture, .. }));
    assert_eq!(m.take(), []);
    let (mirror, _) = RecordingMirror::new(Reach { entries: Some(1), ..Reach::default() });
    let error = iommu.subscribe_mirror(Space::Domain(1), mirror, Interest::MIRROR).unwrap_err();
    assert!(matches!(error, SubscribeError::Unreachable { why: Unreachable::Entries, .. }));
    over(e.detach().unwrap());
    let (_s, m) = mirror_at(&e, reach);
    assert!(matches!(e.attach(1).unwrap_err().kind, AttachErrorKind::Unreachable { .. }));
    assert_eq!(m.take(), []);
}

#[test]
fn a_lost_reach_fences_or_is_remembered() {
    let (_iommu, e, domain) = attached();
    over(domain.map(rw(0, 0, 1)).unwrap());
    over(domain.map(rw(30, 30, 1)).unwrap());
    let (s, m) = mirror_at(&e, Reach::default());
    over(s.reach_changed(Reach { apertures: vec![pages(0, 39)], ..Reach::default() }).unwrap());
    assert_eq!(m.held().len(), 2);
    domain.map(rw(50, 50, 1)).unwrap_err();
    // While it is blocked, too.
    over(e.detach().unwrap());
    let narrow = Reach { apertures: vec![pages(0, 9)], ..Reach::default() };
    over(s.reach_changed(narrow.clone()).unwrap());
    assert!(matches!(e.attach(1).unwrap_err().kind, AttachErrorKind::Unreachable { .. }));
    let (_s2, m2) = (s, m);
    over(domain.unmap(pages(30, 30)).unwrap());
    over(e.attach(1).unwrap());
    assert_eq!(m2.held(), [rw(0, 0, 1)]);
    let (other, o) = mirror_at(&e, Reach::default());
    over(domain.unmap(pages(0, 0)).unwrap());
    over(domain.map(rw(5, 5, 1)).unwrap());
    let none = Reach { apertures: vec![pages(0, 3)], ..Reach::default() };
    assert!(matches!(other.reach_changed(none), Err(SubscribeError::Fenced(_))));
    assert!(other.is_fenced() && o.lock().fenced);
}

#[test]
fn caps_are_typed_errors() {
    let (iommu, _) =
        unit_with(|b| b.ram(0, 1 << 20).domains(1).endpoints(1).subscriptions(1).domain_mappings(1));
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let cap = |kind: &AttachErrorKind, of| matches!(kind, AttachErrorKind::Cap(c) if *c == of);
    assert!(cap(&iommu.create_domain(2, Tables::Owned).unwrap_err().kind, Cap::Domains));
    let e = endpoint(&iommu, 1);
    let config = viommu::EndpointConfig::default();
    assert!(cap(&iommu.add_endpoint(2, config).unwrap_err().kind, Cap::Endpoints));
    let (_s, _) = mirror_at(&e, Reach::default());
    let (mirror, m) = RecordingMirror::new(Reach::default());
    let error = e.subscribe_mirror(mirror, Interest::MIRROR).unwrap_err();
    assert!(matches!(error, SubscribeError::Cap(Cap::Subscriptions)) && m.lock().dropped);
    over(domain.map(rw(0, 0, 1)).unwrap());
    let kind = domain.map(rw(1, 1, 1)).unwrap_err().kind;
    assert!(matches!(kind, StepErrorKind::Cap(Cap::DomainMappings)));
    assert!(matches!(
        domain.map(rw(0, 0, 1)).unwrap_err().kind,
        StepErrorKind::Cap(_) | StepErrorKind::Overlap { .. }
    ));
}

#[test]
fn an_audit_finds_planted_differences() {
    let (_iommu, e, domain) = attached();
    over(domain.map(rw(0, 9, 1)).unwrap());
    over(domain.map(rw(20, 29, 1)).unwrap());
    let (s, m) = mirror_at(&e, Reach::default());
    let (cache, c) = cache_at(&e);
    cache.fill(at(0), Access::READ).unwrap();
    assert!(s.audit().unwrap().is_clean() && cache.audit().unwrap().is_clean());
    m.lock().shadow.remove(&(20 * PAGE));
    m.lock().shadow.insert(50 * PAGE, rw(50, 50, 1));
    let audit = s.audit().unwrap();
    assert_eq!((audit.missing, audit.extra), (vec![rw(20, 29, 1)], vec![rw(50, 50, 1)]));
    c.lock().shadow.insert(25 * PAGE, rw(25, 25, 7));
    assert_eq!(cache.audit().unwrap().extra, [rw(25, 25, 7)]);
}

#[test]
fn an_audit_of_a_cache_on_walked_tables_looks_through_offset_and_backing() {
    let guest = Guest::default();
    let extent = viommu::Extent { range: gpas(0, 99), medium: viommu::Medium::Rom };
    let (iommu, _) = unit_with(|b| b.backing(extent));
    iommu.create_domain(1, guest.tables()).unwrap();
    guest.set(&[rw(5, 5, 6)]);
    let (cache, _) = RecordingCache::new();
    let interest = Interest::CACHE.within(pages(0, 9)).with_offset(100 * PAGE);
    let cache = iommu.subscribe_cache(Space::Domain(1), cache, interest).unwrap();
    assert_eq!(cache.fill(at(105), Access::READ).unwrap(), map_of(105, 105, 6, Access::READ));
    let audit = cache.audit().unwrap();
    assert!(audit.is_clean(), "{audit:?}");
}

#[test]
fn explicit_device_tlb_invalidations_go_to_their_endpoint_alone() {
    let (iommu, e, _) = attached();
    let other = endpoint(&iommu, 9);
    over(other.attach(1).unwrap());
    let caches: Vec<_> = [&e, &e, &other]
        .iter()
        .zip([Kinds::DEVICE_TLB, Kinds::UNMAP, Kinds::DEVICE_TLB])
        .map(|(e, k)| {
            let (cache, handle) = RecordingCache::new();
            (e.subscribe_cache(cache, kinds(k)).unwrap(), handle)
        })
        .collect();
    over(e.invalidate_device_tlb(pages(0, 9)).unwrap());
    let told: Vec<_> = caches.iter().map(|(_, h)| h.take().len()).collect();
    assert_eq!(told, [1, 0, 0]);
}

#[test]
fn an_invalidation_is_not_enough_while_a_mirror_listens() {
    let guest = Guest::default();
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, guest.tables()).unwrap();
    over(domain.invalidate(pages(0, 9)).unwrap());
    let (s, _) = mirror_on(&iommu, 1, Reach::default());
    guest.set(&[rw(0, 0, 1)]);
    guest.sync(&domain, pages(0, 9));
    assert!(matches!(domain.invalidate(pages(0, 9)).unwrap_err().kind, StepErrorKind::WrongKind(_)));
    over(s.leave());
    // What is not known to be true any more leaves the record: the next mirror would be filled from it.
    over(domain.invalidate(pages(0, 9)).unwrap());
    assert!(domain.is_empty());
    guest.set(&[]);
    guest.sync(&domain, IovaRange::ALL);
    over(domain.invalidate(pages(0, 9)).unwrap());
}

#[test]
fn nothing_is_left_out_where_the_guest_can_be_refused() {
    let (iommu, _, domain) = attached();
    let reach = Reach {
        apertures: vec![pages(0, 9)],
        out_of_reach: viommu::subscribe::OutOfReach::LeaveOut,
        ..Reach::default()
    };
    let (_s, _) = mirror_on(&iommu, 1, reach.clone());
    let kind = domain.map(rw(20, 20, 1)).unwrap_err().kind;
    assert!(matches!(kind, StepErrorKind::Unreachable { why: Unreachable::Aperture, .. }));
    let other = iommu.create_domain(2, Tables::Owned).unwrap();
    over(other.map(rw(20, 20, 1)).unwrap());
    let (mirror, _) = RecordingMirror::new(reach);
    let error = iommu.subscribe_mirror(Space::Domain(2), mirror, Interest::MIRROR).unwrap_err();
    assert!(matches!(error, SubscribeError::Unreachable { .. }));
}

#[test]
fn a_cache_for_device_tlb_alone_hears_no_steps_but_the_end_of_what_it_sees() {
    let (iommu, e, domain) = attached();
    let (cache, handle) = RecordingCache::new();
    let _s = e.subscribe_cache(cache, kinds(Kinds::DEVICE_TLB)).unwrap();
    over(domain.map(rw(0, 0, 1)).unwrap());
    over(domain.map(rw(4, 6, 5)).unwrap());
    over(domain.unmap(pages(0, 0)).unwrap());
    over(domain.unmap(pages(0, 9)).unwrap());
    assert_eq!(handle.take(), []);
    over(e.invalidate_device_tlb(pages(0, 9)).unwrap());
    assert_eq!(handle.take(), [Event::Invalidate(pages(0, 9))]);
    // Nobody but the core knows of these.
    over(domain.map(rw(0, 0, 1)).unwrap());
    over(iommu.remove_backing(gpas(0, (1 << 18) - 1)).unwrap());
    assert_eq!(handle.take(), [Event::Invalidate(pages(0, 0))]);
    over(e.block().unwrap());
    assert_eq!(handle.take(), [Event::Invalidate(IovaRange::ALL)]);
    let there = viommu::Extent { range: gpas(0, (1 << 18) - 1), medium: viommu::Medium::Ram };
    over(iommu.add_backing(there).unwrap());
    over(e.attach_identity().unwrap());
    handle.take();
    over(iommu.remove_backing(there.range).unwrap());
    assert_eq!(handle.take(), [Event::Invalidate(pages(0, (1 << 18) - 1))]);
    let (cache, handle) = RecordingCache::new();
    let _s = iommu.subscribe_cache(Space::Domain(1), cache, kinds(Kinds::DEVICE_TLB)).unwrap();
    over(iommu.destroy_domain(1).unwrap());
    assert_eq!(handle.take(), [Event::Invalidate(IovaRange::ALL)]);
}
