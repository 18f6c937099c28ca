//! Every error that a container can give, at every kind of step: what the guest sees, what the record says, that the
//! device reaches what the record says or nothing, and that another mirror is right.

use viommu::subscribe::RefusalKind;
use viommu::{AttachErrorKind, StepError, StepErrorKind, SubscribeError};

use super::*;

/// Errors of `MAP_DMA`, with the shape in which the model hears of each.
const MAP_ERRORS: [(Errno, RefusalKind); 12] = [
    (Errno::EINVAL, RefusalKind::Range),
    (Errno::EEXIST, RefusalKind::Device),
    (Errno::ENOSPC, RefusalKind::Resources),
    (Errno::ENOMEM, RefusalKind::Resources),
    (Errno::EAGAIN, RefusalKind::Resources),
    (Errno::EINTR, RefusalKind::Resources),
    (Errno::EFAULT, RefusalKind::Device),
    (Errno::EBUSY, RefusalKind::Device),
    (Errno::EIO, RefusalKind::Device),
    (Errno::EBADF, RefusalKind::Device),
    (Errno::ENOTTY, RefusalKind::Unsupported),
    (Errno::from_raw(131), RefusalKind::Device),
];

/// Errors of `UNMAP_DMA`. Which one makes no difference: a removal is never refused.
const UNMAP_ERRORS: [Errno; 5] = [Errno::EINVAL, Errno::EIO, Errno::EBUSY, Errno::EBADF, Errno::ENOMEM];

fn start() -> Rig {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    over(rig.domain.map(rw(10, 19, 12)).unwrap());
    rig.check();
    rig
}

const BEFORE: [(u64, u64, u64); 2] = [(0, 3, 0), (10, 19, 12)];

fn before() -> Vec<Mapping> {
    BEFORE.iter().map(|(first, last, gpa)| rw(*first, *last, *gpa)).collect()
}

fn refused(error: StepError) -> RefusalKind {
    over(error.completion);
    match error.kind {
        StepErrorKind::Refused { refused, .. } => refused.kind,
        other => panic!("{other}"),
    }
}

/// Steps that the guest can be refused, and what the record says after a refusal.
type Step = (&'static str, fn(&Rig) -> Result<Completion, StepError>, fn() -> Vec<Mapping>);

const ADDING: [Step; 6] = [
    ("map", |rig| rig.domain.map(rw(30, 31, 4)), before),
    ("map over two regions", |rig| rig.domain.map(rw(30, 41, 10)), before),
    ("replace", |rig| rig.domain.replace(rw(0, 3, 8)), before),
    ("replace of less", |rig| rig.domain.replace(map_of(11, 12, 4, Access::READ)), before),
    ("replace over two", |rig| rig.domain.replace(rw(0, 19, 6)), before),
    (
        "batch",
        |rig| rig.domain.batch().unmap(pages(0, 3)).map(rw(30, 41, 10)).commit(),
        || vec![rw(10, 19, 12)],
    ),
];

#[test]
fn an_addition_refused_is_a_refusal_for_the_guest_and_nothing_else() {
    for (errno, kind) in MAP_ERRORS {
        for (name, step, after) in ADDING {
            // The first call fails, or the second: a piece is there already.
            for good in 0..2 {
                let rig = start();
                rig.fake.lock().faults.push((Kind::Map, good, errno));
                let heals = rig.fake.clone();
                // Once: the way back works.
                let outcome = once(&heals, || step(&rig));
                match outcome {
                    Ok(done) => {
                        over(done);
                        assert_eq!(good, 1, "{name} did not hear of {errno}");
                    }
                    Err(error) => {
                        assert_eq!(refused(error), kind, "{name} with {errno}");
                        assert_eq!(rig.record(), after(), "{name} with {errno}");
                    }
                }
                assert!(!rig.subscription.is_fenced(), "{name} with {errno}");
                rig.check();
            }
        }
    }
}

/// Runs a step in which a planned error comes once.
fn once<T>(fake: &Fake, step: impl FnOnce() -> T) -> T {
    fake.lock().once = true;
    let outcome = step();
    fake.heal();
    outcome
}

#[test]
fn an_addition_whose_undo_fails_too_cuts_the_device_off() {
    for (errno, _) in MAP_ERRORS {
        for (name, step, _) in ADDING {
            let rig = start();
            rig.fake.fail(Kind::Map, 0, errno);
            rig.fake.fail(Kind::Unmap, 0, Errno::EIO);
            let outcome = step(&rig).map(over).map_err(refused);
            rig.fake.heal();
            // A plain map has nothing to undo: the guest is refused, and all is well.
            if rig.subscription.is_fenced() {
                rig.check_fenced();
            } else {
                assert!(outcome.is_err(), "{name} with {errno}");
                rig.check();
            }
        }
    }
}

#[test]
fn an_addition_that_nobody_can_be_refused_cuts_the_device_off() {
    for (errno, _) in MAP_ERRORS {
        let rig = Rig::new();
        over(rig.domain.map(rw(0, 3, 0)).unwrap());
        over(rig.domain.map(rw(20, 23, 128)).unwrap());
        rig.fake.fail(Kind::Map, 0, errno);
        // Memory comes under a mapping: the guest has done nothing.
        over(rig.iommu.add_backing(Extent { range: gpas(128, 131), medium: Medium::Ram }).unwrap());
        assert_eq!(rig.record().len(), 2);
        rig.check_fenced();
    }
}

#[test]
fn a_removal_that_fails_happens_all_the_same_and_cuts_the_device_off() {
    type Removal = (&'static str, fn(&Rig) -> Completion, usize);
    let removals: [Removal; 6] = [
        ("unmap", |rig| rig.domain.unmap(pages(0, 3)).unwrap(), 1),
        ("wide unmap", |rig| rig.domain.unmap(IovaRange::ALL).unwrap(), 0),
        ("replace", |rig| rig.domain.replace(rw(0, 3, 8)).unwrap(), 2),
        ("batch", |rig| rig.domain.batch().unmap(pages(10, 19)).map(rw(30, 31, 4)).commit().unwrap(), 2),
        ("removed memory", |rig| rig.iommu.remove_backing(gpas(0, 31)).unwrap(), 2),
        ("detach", |rig| rig.endpoint.detach().unwrap(), 2),
    ];
    for errno in UNMAP_ERRORS {
        for (name, step, mappings) in removals {
            let rig = start();
            rig.fake.fail(Kind::Unmap, 0, errno);
            over(step(&rig));
            assert_eq!(rig.record().len(), mappings, "{name} with {errno}");
            rig.check_fenced();
            assert!(rig.endpoint.is_fenced());
            // It gets no further call.
            rig.fake.take_calls();
            over(rig.domain.map(rw(50, 51, 0)).unwrap());
            assert_eq!(rig.fake.take_calls(), [], "{name} with {errno}");
        }
    }
}

#[test]
fn a_removal_that_fails_with_a_fence_that_fails_never_completes() {
    for errno in UNMAP_ERRORS {
        let rig = start();
        rig.fake.fail(Kind::Unmap, 0, errno);
        rig.fake.fail(Kind::UnmapAll, 0, errno);
        let mut done = rig.domain.unmap(pages(0, 3)).unwrap();
        assert!(!done.is_complete() && done.is_stuck());
        assert_eq!(rig.record(), [rw(10, 19, 12)], "nobody in this process uses it any more");
        rig.check_audits();
        let incidents = rig.incidents.lock().unwrap();
        let Incident::FenceFailed { why, .. } = &incidents[0] else { panic!("{incidents:?}") };
        assert!(why.contains(&format!("UNMAP_DMA of everything: {errno}")), "{why}");
    }
}

#[test]
fn an_attach_refused_leaves_the_endpoint_where_it_was() {
    for (errno, kind) in MAP_ERRORS {
        for good in 0..3 {
            let rig = start();
            let second = rig.iommu.create_domain(2, Tables::Owned).unwrap();
            over(second.map(rw(0, 9, 12)).unwrap());
            over(second.map(rw(20, 20, 3)).unwrap());
            rig.fake.lock().faults.push((Kind::Map, good, errno));
            let error = once(&rig.fake, || rig.endpoint.attach(2)).unwrap_err();
            over(error.completion);
            let AttachErrorKind::Refused(refused) = error.kind else { panic!("{}", error.kind) };
            assert_eq!((refused.kind, error.blocked.len()), (kind, 0));
            assert_eq!(rig.endpoint.attached(), Some(viommu::View::Domain(1)));
            rig.check();
        }
    }
}

#[test]
fn an_attach_whose_way_back_is_refused_blocks_the_endpoint() {
    for (errno, _) in MAP_ERRORS {
        let rig = start();
        let second = rig.iommu.create_domain(2, Tables::Owned).unwrap();
        over(second.map(rw(20, 20, 3)).unwrap());
        rig.fake.fail(Kind::Map, 0, errno);
        let error = rig.endpoint.attach(2).unwrap_err();
        over(error.completion);
        assert_eq!(error.blocked, [rig.endpoint.id()]);
        assert_eq!(rig.fake.maps(), 0, "a blocked endpoint reaches nothing");
        assert_eq!(rig.record(), before());
        rig.check_audits();
    }
}

#[test]
fn a_subscription_refused_leaves_nothing() {
    for (errno, kind) in MAP_ERRORS {
        for good in 0..3 {
            let rig = start();
            let fake = Fake::new(Config::x86_host());
            fake.fail(Kind::Map, good, errno);
            let (mirror, _) = container_over(&fake).mirror(rig.memory.clone());
            let refused = rig.iommu.subscribe_mirror(rig.domain.space(), Box::new(mirror), Interest::MIRROR);
            let Err(SubscribeError::Refused(refused)) = refused else { panic!("{refused:?}") };
            assert_eq!((refused.kind, fake.maps()), (kind, 0));
            rig.check();
        }
    }
}

#[test]
fn a_leave_that_fails_cuts_the_device_off() {
    for errno in UNMAP_ERRORS {
        let Rig { fake, subscription, incidents, .. } = start();
        fake.fail(Kind::Unmap, 0, errno);
        over(subscription.leave());
        assert_eq!(fake.maps(), 0);
        assert!(matches!(incidents.lock().unwrap()[..], [Incident::Fenced { .. }]));
    }
}

#[test]
fn an_error_of_tracking_is_the_callers_and_changes_nothing() {
    for errno in [Errno::EINVAL, Errno::ENOMEM, Errno::EACCES, Errno::EFAULT] {
        let rig = start();
        rig.fake.fail(Kind::Dirty, 0, errno);
        assert_eq!(rig.handle.dirty_start(), Err(errno));
        rig.fake.heal();
        rig.handle.dirty_start().unwrap();
        rig.fake.fail(Kind::Dirty, 1, errno);
        assert_eq!(rig.handle.dirty(), Err(errno));
        rig.fake.heal();
        assert_eq!(rig.handle.dirty().unwrap(), [gpas(0, 3), gpas(12, 21)]);
        rig.check();
    }
}
