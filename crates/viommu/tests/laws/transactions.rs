//! L3, L4, L6: a mirror that fails at its n-th call, for every n.

use viommu::subscribe::{FenceFailed, Mirror, Reach, RefusalKind, Refused, Unmapped};
use viommu::{
    Ack, AttachErrorKind, BlockerKind, Domain, Incident, Interest, IovaRange, Mapping, Space, StepErrorKind,
    SubscribeError, Tables, View, WaitError,
};

use crate::support::*;

fn record(domain: &Domain) -> Vec<Mapping> {
    let mut all = Vec::new();
    domain.for_each(IovaRange::ALL, |m| {
        all.push(m);
        core::ops::ControlFlow::Continue(())
    });
    all
}

fn reaches() -> Vec<Reach> {
    let plain = Reach::default();
    vec![
        plain.clone(),
        Reach { replace: true, ..plain.clone() },
        Reach { batches: true, wide_unmap: false, ..plain.clone() },
        Reach { replace: true, batches: true, ..plain },
    ]
}

/// Runs a step on {0-9, 10-19, 30-39} with three mirrors of which the second refuses its n-th addition: all others and
/// the record must be `after` (or as without a refusal).
fn every_addition(
    step: impl Fn(&Domain) -> Result<viommu::Completion, viommu::StepError>,
    after: &[Mapping],
) {
    for reach in reaches() {
        let mut refused = 0;
        for n in 1..20 {
            let (iommu, _, domain) = attached();
            let mirrors: Vec<_> = [Reach::default(), reach.clone(), reach.clone()]
                .into_iter()
                .map(|reach| mirror_on(&iommu, 1, reach))
                .collect();
            for m in [rw(0, 9, 100), rw(10, 19, 300), rw(30, 39, 500)] {
                over(domain.map(m).unwrap());
            }
            mirrors[1].1.refuse_nth(n, 1, is_add);
            let Err(error) = step(&domain).map(over) else { break };
            refused += 1;
            assert!(matches!(error.kind, StepErrorKind::Refused { .. }), "{error}");
            over(error.completion);
            assert_eq!(record(&domain), after);
            for (s, m) in &mirrors {
                assert!(!s.is_fenced());
                assert_eq!(m.held(), after, "refused at {n} with {reach:?}");
                assert!(s.audit().unwrap().is_clean());
                assert_eq!(s.counts().held, after.len() as u64);
            }
        }
        assert!(refused > 0, "nothing was refused");
    }
}

const BEFORE: [(u64, u64, u64); 3] = [(0, 9, 100), (10, 19, 300), (30, 39, 500)];

fn before() -> Vec<Mapping> {
    BEFORE.iter().map(|(f, l, g)| rw(*f, *l, *g)).collect()
}

#[test]
fn a_map_refused_changes_nothing() {
    every_addition(|d| d.map(rw(20, 29, 700)), &before());
    every_addition(|d| d.map(rw(20, 20, 700)), &before());
}

#[test]
fn a_replace_refused_restores_what_was_there() {
    every_addition(|d| d.replace(rw(0, 9, 700)), &before());
    every_addition(|d| d.replace(rw(3, 12, 700)), &before());
    every_addition(|d| d.replace(rw(0, 39, 700)), &before());
}

#[test]
fn a_batch_refused_keeps_its_removals() {
    let after = [rw(10, 19, 300), rw(30, 39, 500)];
    every_addition(|d| d.batch().unmap(pages(0, 9)).map(rw(20, 29, 700)).commit(), &after);
    // The same range again: for the guest, the old mapping is gone.
    every_addition(|d| d.batch().unmap(pages(0, 9)).map(rw(0, 9, 700)).commit(), &after);
    every_addition(|d| d.batch().unmap(pages(0, 9)).replace(rw(12, 13, 700)).commit(), &after);
    let two = [(0, 9, 700), (30, 39, 800)].map(|(f, l, g)| rw(f, l, g));
    every_addition(
        |d| d.batch().unmap(pages(0, 9)).map(two[0]).unmap(pages(30, 39)).map(two[1]).commit(),
        &[rw(10, 19, 300)],
    );
    every_addition(|d| d.batch().unmap(pages(0, 9)).map(two[0]).replace(two[1]).commit(), &after);
}

#[test]
fn a_batch_is_one_step_and_later_changes_see_earlier_ones() {
    let (iommu, _, domain) = attached();
    let (_s, m) = mirror_on(&iommu, 1, Reach { batches: true, ..Reach::default() });
    over(domain.map(rw(0, 9, 1)).unwrap());
    m.take();
    let batch = domain.batch().unmap(pages(0, 9)).map(rw(0, 4, 50)).unmap(pages(0, 4)).map(rw(0, 9, 1));
    over(batch.commit().unwrap());
    assert_eq!(m.take(), [], "what comes to the same is no change");
    over(domain.batch().unmap(pages(0, 9)).map(rw(2, 3, 9)).commit().unwrap());
    assert_eq!(m.take(), [Event::Unmap(pages(0, 9)), Event::Map(rw(2, 3, 9))]);
    assert_eq!(m.lock().batches, 2);
}

#[test]
fn a_mirror_that_cannot_remove_is_fenced_and_the_removal_stands() {
    for n in 1..=2 {
        for who in 0..3 {
            let (iommu, _, domain) = attached();
            let mirrors: Vec<_> = (0..3)
                .map(|_| mirror_on(&iommu, 1, Reach { wide_unmap: false, ..Reach::default() }))
                .collect();
            before().into_iter().for_each(|m| over(domain.map(m).unwrap()));
            mirrors[who].1.refuse_nth(n, 1, is_unmap);
            over(domain.unmap(pages(0, 19)).unwrap());
            assert_eq!(record(&domain), [rw(30, 39, 500)]);
            for (at, (s, m)) in mirrors.iter().enumerate() {
                assert_eq!(s.is_fenced(), at == who);
                assert_eq!(m.lock().fenced, at == who);
                if at != who {
                    assert_eq!(m.held(), [rw(30, 39, 500)]);
                }
            }
            // It gets no further call.
            mirrors[who].1.take();
            over(domain.map(rw(0, 0, 1)).unwrap());
            assert_eq!(mirrors[who].1.take(), []);
        }
    }
}

#[test]
fn an_undo_that_fails_fences_and_the_others_are_right() {
    let (iommu, incidents) = unit();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let (first, m1) = mirror_on(&iommu, 1, Reach::default());
    let (second, m2) = mirror_on(&iommu, 1, Reach::default());
    m2.refuse_nth(1, 1, is_map);
    m1.refuse_nth(1, 1, is_unmap);
    let error = domain.map(rw(0, 0, 1)).unwrap_err();
    over(error.completion);
    assert!(first.is_fenced() && !second.is_fenced());
    assert!(domain.is_empty() && m2.held().is_empty());
    assert!(matches!(incidents.lock().unwrap()[..], [Incident::Fenced { .. }]));
}

#[test]
fn a_replacement_whose_old_mapping_cannot_come_back_fences() {
    let (iommu, _, domain) = attached();
    let (first, m1) = mirror_on(&iommu, 1, Reach::default());
    let (second, m2) = mirror_on(&iommu, 1, Reach::default());
    over(domain.map(rw(0, 9, 1)).unwrap());
    m2.refuse_nth(1, 2, is_map);
    let error = domain.replace(rw(0, 9, 100)).unwrap_err();
    over(error.completion);
    assert!(!first.is_fenced() && second.is_fenced());
    assert_eq!((m1.held(), record(&domain)), (vec![rw(0, 9, 1)], vec![rw(0, 9, 1)]));
}

#[test]
fn replace_in_place_is_one_call_and_counts() {
    let (_iommu, endpoint, domain) = attached();
    let (s, m) = mirror_at(&endpoint, Reach { replace: true, ..Reach::default() });
    over(domain.map(rw(0, 9, 1)).unwrap());
    m.take();
    over(domain.replace(rw(0, 9, 100)).unwrap());
    assert_eq!(m.take(), [Event::Replace(rw(0, 9, 1), rw(0, 9, 100))]);
    // A cut is not an exchange.
    over(domain.replace(rw(3, 4, 200)).unwrap());
    assert_eq!(m.held(), [rw(0, 2, 100), rw(3, 4, 200), rw(5, 9, 105)]);
    assert_eq!((s.counts().replace, s.counts().held), (1, 3));
}

#[test]
fn replace_in_place_loses_no_dirty_page() {
    let (_iommu, endpoint, domain) = attached();
    let (_s, _m) = mirror_at(&endpoint, Reach { replace: true, ..Reach::default() });
    over(domain.map(rw(0, 9, 1)).unwrap());
    domain.dirty_start();
    over(domain.replace(rw(0, 9, 100)).unwrap());
    assert_eq!(domain.dirty_take().unwrap(), [gpas(1, 10)], "nobody could say that it was not written");
}

#[test]
fn an_attach_refused_at_any_call_restores_the_old_view() {
    for n in 1..=3 {
        let (iommu, e, domain) = attached();
        let other = iommu.create_domain(2, Tables::Owned).unwrap();
        before().into_iter().for_each(|m| over(domain.map(m).unwrap()));
        for m in [rw(0, 0, 60), rw(2, 2, 61), rw(4, 4, 62)] {
            over(other.map(m).unwrap());
        }
        let (s1, m1) = mirror_at(&e, Reach::default());
        let (s2, m2) = mirror_at(&e, Reach::default());
        m2.refuse_nth(n, 1, is_map);
        let error = e.attach(2).unwrap_err();
        assert!(matches!(error.kind, AttachErrorKind::Refused(_)));
        assert_eq!((error.blocked.len(), e.view()), (0, Some(View::Domain(1))));
        over(error.completion);
        for (s, m) in [(&s1, &m1), (&s2, &m2)] {
            assert_eq!(m.held(), before());
            assert!(s.audit().unwrap().is_clean());
        }
        assert!(translate(&e, 0, viommu::Access::READ).is_ok());
        over(domain.map(rw(50, 50, 9)).unwrap());
        assert_eq!((m1.held().len(), m2.held().len()), (4, 4));
    }
}

#[test]
fn an_endpoint_that_cannot_come_back_is_blocked() {
    let (iommu, incidents) = unit();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let other = iommu.create_domain(2, Tables::Owned).unwrap();
    let e = endpoint(&iommu, 8);
    over(e.attach(1).unwrap());
    over(domain.map(rw(0, 0, 1)).unwrap());
    over(other.map(rw(5, 5, 6)).unwrap());
    let (s, m) = mirror_at(&e, Reach::default());
    m.refuse_nth(1, 2, is_map);
    let error = e.attach(2).unwrap_err();
    assert_eq!((error.blocked, e.view()), (vec![e.id()], Some(View::Blocked)));
    over(error.completion);
    assert_eq!(m.held(), []);
    assert!(translate(&e, 0, viommu::Access::READ).is_err());
    assert!(matches!(incidents.lock().unwrap()[..], [Incident::Blocked { .. }]));
    over(e.attach(1).unwrap());
    assert_eq!(m.held(), [rw(0, 0, 1)]);
    assert!(s.audit().unwrap().is_clean());
}

#[test]
fn who_moved_first_and_cannot_go_back_holds_nothing() {
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let other = iommu.create_domain(2, Tables::Owned).unwrap();
    over(domain.map(rw(0, 0, 1)).unwrap());
    over(other.map(rw(5, 5, 6)).unwrap());
    let (a, b) = (endpoint(&iommu, 1), endpoint(&iommu, 2));
    over(a.attach(1).unwrap());
    over(b.attach(1).unwrap());
    let (_sa, ma) = mirror_at(&a, Reach::default());
    let (_sb, mb) = mirror_at(&b, Reach::default());
    ma.refuse_nth(2, 1, is_map); // its way back
    mb.refuse_nth(1, 1, is_map);
    let to = Some(View::Domain(2));
    let error = iommu.set_views(&[(a.id(), to), (b.id(), to)]).unwrap_err();
    assert_eq!((error.blocked, a.view()), (vec![a.id()], Some(View::Blocked)));
    assert_eq!(b.view(), Some(View::Domain(1)));
    assert_eq!((ma.held(), mb.held()), (vec![], vec![rw(0, 0, 1)]), "blocked, and it still reaches memory");
    over(other.map(rw(9, 9, 6)).unwrap());
    assert_eq!(ma.held(), []);
}

#[test]
fn a_replay_refused_leaves_nothing() {
    for n in 1..=3 {
        for batches in [false, true] {
            let (iommu, _, domain) = attached();
            before().into_iter().for_each(|m| over(domain.map(m).unwrap()));
            let (mirror, m) = RecordingMirror::new(Reach { batches, ..Reach::default() });
            m.refuse_nth(n, 1, is_map);
            let error = iommu.subscribe_mirror(Space::Domain(1), mirror, Interest::MIRROR).unwrap_err();
            assert!(matches!(error, SubscribeError::Refused(_)));
            assert!(m.held().is_empty() && m.lock().dropped && !m.lock().fenced);
        }
    }
}

#[test]
fn a_replay_that_cannot_be_taken_back_fences() {
    let (iommu, _, domain) = attached();
    before().into_iter().for_each(|m| over(domain.map(m).unwrap()));
    let (mirror, m) = RecordingMirror::new(Reach::default());
    m.lock().refuse = Some(Box::new({
        let mut maps = 0;
        move |event| {
            maps += usize::from(is_map(event));
            maps == 2
        }
    }));
    iommu.subscribe_mirror(Space::Domain(1), mirror, Interest::MIRROR).unwrap_err();
    assert!(m.lock().fenced);
}

#[test]
fn added_backing_that_a_mirror_refuses_fences_it() {
    let (iommu, _) = unit_with(|b| b);
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let (good, g) = mirror_on(&iommu, 1, Reach::default());
    let (bad, b) = mirror_on(&iommu, 1, Reach::default());
    let (small, s) = mirror_on(&iommu, 1, Reach { page_sizes: !0xffff, ..Reach::default() });
    over(domain.map(rw(0, 31, 0)).unwrap());
    b.refuse_nth(1, 1, is_map);
    let extent = viommu::Extent { range: gpas(3, 9), medium: viommu::Medium::Ram };
    over(iommu.add_backing(extent).unwrap());
    assert_eq!((g.held(), good.is_fenced(), bad.is_fenced()), (vec![rw(3, 9, 3)], false, true));
    assert!(small.is_fenced() && s.take() == [Event::Fence], "it was asked for what is out of its reach");
}

#[test]
fn a_fence_that_fails_never_completes() {
    let (iommu, incidents) = unit();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let (_s, m) = mirror_on(&iommu, 1, Reach::default());
    over(domain.map(rw(0, 0, 1)).unwrap());
    m.refuse_nth(1, 1, is_unmap);
    m.lock().fence_fails = true;
    let mut done = domain.unmap(pages(0, 0)).unwrap();
    assert!(!done.is_complete() && done.is_stuck());
    assert!(done.blockers().iter().any(|b| b.kind == BlockerKind::FenceFailed));
    assert!(matches!(done.wait(), Err(WaitError::FenceFailed)));
    assert!(matches!(incidents.lock().unwrap()[..], [Incident::FenceFailed { .. }]));
}

#[test]
fn a_fence_that_fails_before_the_removals_keeps_none_of_them_back() {
    let guest = Guest::default();
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, guest.tables()).unwrap();
    let (_good, g) = mirror_on(&iommu, 1, Reach::default());
    let (_bad, b) = mirror_on(&iommu, 1, Reach { apertures: vec![pages(0, 9)], ..Reach::default() });
    guest.set(&[rw(0, 0, 1)]);
    guest.sync(&domain, pages(0, 99));
    b.lock().fence_fails = true;
    guest.set(&[rw(50, 50, 2)]);
    let progress = domain.sync(pages(0, 99), &mut |f, l| guest.next(f, l), 100).unwrap();
    assert!(progress.completion.is_stuck(), "the device may still reach page 0");
    assert_eq!(g.held(), [rw(50, 50, 2)]);
}

#[test]
fn acks_come_later_and_from_another_thread() {
    let (iommu, _, domain) = attached();
    let (_s, m) = mirror_on(&iommu, 1, Reach::default());
    m.lock().pending = true;
    let mut map = domain.map(rw(0, 0, 1)).unwrap();
    let mut unmap = domain.unmap(pages(0, 0)).unwrap();
    assert!(!map.is_complete() && !unmap.is_complete());
    assert_eq!(unmap.blockers()[0].kind, BlockerKind::Ack);
    let resolvers = core::mem::take(&mut m.lock().resolvers);
    let other = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(5));
        resolvers.into_iter().for_each(|r| r.done());
    });
    map.merge(unmap);
    map.wait().unwrap();
    other.join().unwrap();
}

#[test]
fn an_ack_that_fails_or_is_dropped_fences() {
    for dropped in [false, true] {
        let (iommu, _, domain) = attached();
        let (s, m) = mirror_on(&iommu, 1, Reach::default());
        m.lock().pending = true;
        let mut done = domain.map(rw(0, 0, 1)).unwrap();
        assert!(!done.is_complete());
        let resolver = m.lock().resolvers.pop().unwrap();
        if dropped {
            drop(resolver)
        } else {
            resolver.failed()
        }
        assert!(!s.is_fenced());
        done.wait().unwrap();
        assert!(s.is_fenced() && m.lock().fenced);
    }
}

#[test]
fn an_ack_that_fails_where_the_fence_fails_is_stuck() {
    let (iommu, _, domain) = attached();
    let (_s, m) = mirror_on(&iommu, 1, Reach::default());
    m.lock().pending = true;
    m.lock().fence_fails = true;
    let done = domain.map(rw(0, 0, 1)).unwrap();
    m.lock().resolvers.clear();
    assert!(matches!(done.wait(), Err(WaitError::FenceFailed)));
}

#[test]
fn an_ack_that_never_comes_is_named_at_the_time_limit() {
    let (_iommu, endpoint, domain) = attached();
    let (s, m) = mirror_at(&endpoint, Reach::default());
    m.lock().pending = true;
    let mut done = domain.map(rw(0, 0, 1)).unwrap();
    let limit = std::time::Duration::from_millis(2);
    let Err(WaitError::TimedOut(blockers)) = done.wait_timeout(limit) else { panic!("no time-out") };
    assert_eq!((blockers.len(), blockers[0].endpoint), (1, Some(endpoint.id())));
    assert!(blockers[0].label.contains(&s.id().to_string()));
    m.lock().resolvers.clear();
    done.wait().unwrap();
}

#[test]
fn acks_of_a_replay_are_awaited_too() {
    let (iommu, _, domain) = attached();
    over(domain.map(rw(0, 0, 1)).unwrap());
    let (mirror, m) = RecordingMirror::new(Reach::default());
    m.lock().pending = true;
    let mut s = iommu.subscribe_mirror(Space::Domain(1), mirror, Interest::MIRROR).unwrap();
    let mut filled = s.filled();
    assert!(!filled.is_complete());
    m.lock().resolvers.pop().unwrap().failed();
    assert!(filled.is_complete());
    assert!(s.is_fenced() && m.lock().fenced, "a device went on with a copy that is not complete");
}

#[test]
fn a_replay_whose_acks_have_failed_already_does_not_lock_up() {
    let (iommu, _, domain) = attached();
    over(domain.map(rw(0, 0, 1)).unwrap());
    let (mirror, m) = RecordingMirror::new(Reach::default());
    m.lock().pending = true;
    let inside = m.clone();
    let (_ack, _resolver) = Ack::pending();
    // Each ack is dropped by the call behind it, at the latest.
    m.lock().inside = Some(Box::new(move |_| inside.lock().resolvers.clear()));
    over(domain.map(rw(2, 2, 1)).unwrap());
    let mut s = iommu.subscribe_mirror(Space::Domain(1), mirror, Interest::MIRROR).unwrap();
    m.lock().resolvers.clear();
    over(s.filled());
    assert!(s.is_fenced());
}

#[test]
fn a_leaving_mirror_whose_acks_fail_is_fenced() {
    let (iommu, _, domain) = attached();
    over(domain.map(rw(0, 0, 1)).unwrap());
    let (s, m) = mirror_on(&iommu, 1, Reach::default());
    m.lock().pending = true;
    let mut done = s.leave();
    assert!(!done.is_complete());
    m.lock().resolvers.pop().unwrap().failed();
    assert!(done.is_complete());
    assert!(m.lock().fenced, "it let go of what it could not remove");
}

/// Replaces as the trait does by itself.
struct ByDefault(Box<RecordingMirror>);

impl Mirror for ByDefault {
    fn reach(&self) -> Reach {
        self.0.reach()
    }
    fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        self.0.map(extent)
    }
    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        self.0.unmap(range)
    }
    fn fence(&mut self) -> Result<(), FenceFailed> {
        self.0.fence()
    }
    fn held(&self) -> Vec<Mapping> {
        self.0.held()
    }
}

#[test]
fn a_replace_by_default_puts_the_old_extent_back_or_is_fenced() {
    for (times, lost) in [(1, false), (2, true)] {
        let (iommu, _, domain) = attached();
        let (mirror, handle) = RecordingMirror::new(Reach { replace: true, ..Reach::default() });
        let mirror = Box::new(ByDefault(mirror));
        let s = iommu.subscribe_mirror(Space::Domain(1), mirror, Interest::MIRROR).unwrap();
        let other = mirror_on(&iommu, 1, Reach::default());
        over(domain.map(rw(0, 9, 100)).unwrap());
        handle.refuse_nth(1, times, is_map);
        let outcome = domain.replace(rw(0, 9, 300));
        assert_eq!((outcome.is_ok(), s.is_fenced()), (lost, lost), "refused {times} times");
        let now = [rw(0, 9, if lost { 300 } else { 100 })];
        assert_eq!(record(&domain), now);
        assert_eq!(other.1.held(), now);
        if !lost {
            assert_eq!(handle.held(), now);
            assert!(s.audit().unwrap().is_clean());
        }
    }
}

/// Leaves something behind of whatever it is given.
struct Sticky(Handle);

impl Mirror for Sticky {
    fn reach(&self) -> Reach {
        Reach::default()
    }

    fn map(&mut self, _: &Mapping) -> Result<Ack, Refused> {
        Err(Refused::new(RefusalKind::Lost, "half of it is there"))
    }

    fn unmap(&mut self, _: IovaRange) -> Result<Unmapped, Refused> {
        Ok(Unmapped::done(0))
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        self.0.lock().fenced = true;
        Ok(())
    }

    fn held(&self) -> Vec<Mapping> {
        Vec::new()
    }
}

#[test]
fn a_mirror_that_leaves_something_of_what_it_refuses_is_fenced() {
    type Step = fn(&Domain) -> viommu::Completion;
    let steps: [Step; 3] = [
        |domain| domain.map(rw(20, 20, 700)).unwrap(),
        |domain| domain.map(rw(20, 29, 700)).unwrap(),
        |domain| domain.replace(rw(0, 9, 700)).unwrap(),
    ];
    for step in steps {
        let (iommu, _, domain) = attached();
        let sticky = Handle::default();
        let _sticky = iommu
            .subscribe_mirror(Space::Domain(1), Box::new(Sticky(sticky.clone())), Interest::MIRROR)
            .unwrap();
        let (s, m) = mirror_on(&iommu, 1, Reach::default());
        over(step(&domain));
        assert!(sticky.lock().fenced);
        assert_eq!(m.held(), record(&domain));
        assert!(s.audit().unwrap().is_clean() && domain.len() == 1);
    }
}
