//! Every error that a device can give, at every kind of step: what the guest sees, what the record says, and that the device
//! reaches what the record says or nothing.

use viommu::subscribe::RefusalKind;
use viommu::{AttachErrorKind, StepError, StepErrorKind, SubscribeError};

use super::*;

/// Errors of UPDATE, with the shape in which the model hears of each. The kernel says EFAULT for nearly all.
const ERRORS: [(Errno, RefusalKind); 8] = [
    (Errno::FAULT, RefusalKind::Resources),
    (Errno::NOMEM, RefusalKind::Resources),
    (Errno::INTR, RefusalKind::Resources),
    (Errno::INVAL, RefusalKind::Unsupported),
    (Errno::BADF, RefusalKind::Device),
    (Errno::PERM, RefusalKind::Device),
    (Errno::IO, RefusalKind::Device),
    (Errno::NODEV, RefusalKind::Device),
];

fn start() -> Rig {
    let rig = Rig::new();
    over(rig.domains[0].map(rw(0, 3, 0)).unwrap());
    over(rig.domains[0].map(rw(10, 19, 12)).unwrap());
    over(rig.domains[1].map(rw(7, 7, 7)).unwrap());
    rig.check();
    rig
}

fn before() -> Vec<Mapping> {
    vec![rw(0, 3, 0), rw(10, 19, 12)]
}

fn refused(error: StepError) -> RefusalKind {
    over(error.completion);
    match error.kind {
        StepErrorKind::Refused { refused, .. } => refused.kind,
        other => panic!("{other}"),
    }
}

fn once<T>(rig: &Rig, kind: u8, good: usize, errno: Errno, step: impl FnOnce() -> T) -> T {
    rig.fake.lock().once = true;
    rig.fake.fail(kind, good, errno);
    let outcome = step();
    rig.fake.heal();
    outcome
}

/// Cut off, and the alarm has heard of it; the record is the guest's.
#[track_caller]
fn check_fenced(rig: &Rig) {
    assert!(rig.subscriptions[0].is_fenced() && rig.handles[0].is_closed());
    rig.check();
    let incidents = rig.incidents.lock().unwrap();
    assert!(incidents.iter().any(|i| matches!(i, Incident::Fenced { .. })), "{incidents:?}");
}

type Step = (&'static str, fn(&Rig) -> Result<Completion, StepError>, fn() -> Vec<Mapping>);

const ADDING: [Step; 6] = [
    ("map", |rig| rig.domains[0].map(rw(30, 31, 4)), before),
    ("map over two regions", |rig| rig.domains[0].map(rw(30, 41, 10)), before),
    ("replace", |rig| rig.domains[0].replace(rw(0, 3, 8)), before),
    ("replace of less", |rig| rig.domains[0].replace(map_of(11, 12, 4, Access::READ)), before),
    ("replace over two", |rig| rig.domains[0].replace(rw(0, 19, 6)), before),
    (
        "batch",
        |rig| rig.domains[0].batch().unmap(pages(0, 3)).map(rw(30, 41, 10)).commit(),
        || vec![rw(10, 19, 12)],
    ),
];

#[test]
fn an_addition_refused_is_a_refusal_for_the_guest_and_nothing_else() {
    for (errno, kind) in ERRORS {
        for (name, step, after) in ADDING {
            for good in 0..2 {
                let rig = start();
                match once(&rig, kind::UPDATE, good, errno, || step(&rig)) {
                    Ok(done) => {
                        over(done);
                        assert_eq!(good, 1, "{name} did not hear of {errno}");
                    }
                    Err(error) => {
                        assert_eq!(refused(error), kind, "{name} with {errno}");
                        assert_eq!(rig.record(), after(), "{name} with {errno}");
                    }
                }
                assert!(!rig.subscriptions[0].is_fenced(), "{name} with {errno}");
                rig.check();
            }
        }
    }
}

#[test]
fn a_batch_that_cannot_begin_refuses_an_addition() {
    for (errno, kind) in ERRORS {
        let rig = start();
        let error =
            once(&rig, kind::BATCH_BEGIN, 0, errno, || rig.domains[0].map(rw(30, 31, 4))).unwrap_err();
        assert_eq!(refused(error), kind);
        assert_eq!(rig.record(), before());
        rig.check();
    }
}

#[test]
fn a_batch_that_cannot_end_cuts_the_device_off() {
    for (errno, _) in ERRORS {
        for (name, step, _) in ADDING {
            let rig = start();
            // The guest is told that it is done: the device reaches nothing from here on.
            over(once(&rig, kind::BATCH_END, 0, errno, || step(&rig)).unwrap());
            assert!(rig.subscriptions[0].is_fenced(), "{name} with {errno}");
            check_fenced(&rig);
        }
    }
}

#[test]
fn a_removal_that_fails_happens_all_the_same_and_cuts_the_device_off() {
    type Removal = (&'static str, fn(&Rig) -> Completion, usize);
    let removals: [Removal; 6] = [
        ("unmap", |rig| rig.domains[0].unmap(pages(0, 3)).unwrap(), 1),
        ("wide unmap", |rig| rig.domains[0].unmap(IovaRange::ALL).unwrap(), 0),
        ("replace", |rig| rig.domains[0].replace(rw(0, 3, 8)).unwrap(), 2),
        ("batch", |rig| rig.domains[0].batch().unmap(pages(10, 19)).map(rw(30, 31, 4)).commit().unwrap(), 2),
        ("removed memory", |rig| rig.iommu.remove_backing(gpas(0, 31)).unwrap(), 2),
        ("detach", |rig| rig.endpoints[0].detach().unwrap(), 2),
    ];
    for (errno, _) in ERRORS {
        for (name, step, mappings) in removals {
            for message in [kind::INVALIDATE, kind::BATCH_BEGIN] {
                let rig = start();
                rig.fake.fail(message, 0, errno);
                over(step(&rig));
                assert_eq!(rig.record().len(), mappings, "{name} with {errno}");
                check_fenced(&rig);
                rig.fake.take_calls();
                over(rig.domains[0].map(rw(50, 51, 0)).unwrap());
                assert_eq!(rig.fake.take_calls(), [], "{name} with {errno}: it gets no further message");
            }
        }
    }
}

#[test]
fn the_other_address_space_of_a_device_that_was_cut_off_is_found_to_be_so_too() {
    let rig = start();
    rig.fake.fail(kind::INVALIDATE, 0, Errno::FAULT);
    over(rig.domains[0].unmap(pages(0, 3)).unwrap());
    rig.fake.heal();
    check_fenced(&rig);
    let error = rig.domains[1].map(rw(30, 30, 3)).unwrap_err();
    assert_eq!(refused(error), RefusalKind::Device);
    over(rig.domains[1].unmap(pages(7, 7)).unwrap());
    assert!(rig.subscriptions[1].is_fenced());
}

#[test]
fn an_addition_whose_undo_fails_too_cuts_the_device_off() {
    for (errno, _) in ERRORS {
        for (name, step, _) in ADDING {
            let rig = start();
            rig.fake.fail(kind::UPDATE, 0, errno);
            rig.fake.fail(kind::INVALIDATE, 0, Errno::FAULT);
            let outcome = step(&rig).map(over).map_err(refused);
            rig.fake.heal();
            if rig.subscriptions[0].is_fenced() {
                check_fenced(&rig);
            } else {
                assert!(outcome.is_err(), "{name} with {errno}");
                rig.check();
            }
        }
    }
}

#[test]
fn a_fence_that_fails_never_lets_the_removal_complete() {
    type Plan = (fn(&Rig), &'static str);
    let fails: [Plan; 2] = [
        (|rig| rig.fake.fail(RESET, 0, Errno::IO), "VHOST_VDPA_SET_STATUS"),
        (|rig| rig.fake.lock().status = 0x40, "after a reset the status is 0x40"),
    ];
    for (plan, words) in fails {
        let rig = start();
        rig.fake.fail(kind::INVALIDATE, 0, Errno::FAULT);
        plan(&rig);
        let mut done = rig.domains[0].unmap(pages(0, 3)).unwrap();
        assert!(!done.is_complete() && done.is_stuck());
        let incidents = rig.incidents.lock().unwrap();
        let Incident::FenceFailed { why, .. } = &incidents[0] else { panic!("{incidents:?}") };
        assert!(why.contains(words), "{why}");
    }
}

#[test]
fn an_embedders_own_fence_is_used_until_it_succeeds() {
    let tries = Arc::new(Mutex::new(0));
    let count = tries.clone();
    let rig = Rig::with(INFO, |device| {
        device.fence(move || {
            *count.lock().unwrap() += 1;
            Ok(())
        })
    });
    over(rig.domains[0].map(rw(0, 3, 0)).unwrap());
    rig.fake.fail(kind::INVALIDATE, 0, Errno::FAULT);
    over(rig.domains[0].unmap(pages(0, 3)).unwrap());
    assert!(rig.subscriptions[0].is_fenced() && rig.handles[0].is_closed());
    assert_eq!(*tries.lock().unwrap(), 1);
}

#[test]
fn an_attach_refused_leaves_the_endpoint_where_it_was() {
    for (errno, kind) in ERRORS {
        for good in 0..2 {
            let rig = start();
            let third = rig.iommu.create_domain(3, Tables::Owned).unwrap();
            over(third.map(rw(0, 9, 12)).unwrap());
            let error = once(&rig, kind::UPDATE, good, errno, || rig.endpoints[0].attach(3)).unwrap_err();
            over(error.completion);
            let AttachErrorKind::Refused(refused) = error.kind else { panic!("{}", error.kind) };
            assert_eq!((refused.kind, error.blocked.len()), (kind, 0));
            assert_eq!(rig.endpoints[0].attached(), Some(viommu::View::Domain(1)));
            rig.check();
        }
    }
}

#[test]
fn a_subscription_refused_leaves_nothing() {
    for (errno, kind) in ERRORS {
        let rig = start();
        let fake = Fake::new(INFO, 64);
        fake.fail(kind::UPDATE, 1, errno);
        let device = Device::over(Box::new(fake.clone()), INFO);
        let (mirror, _) = device.mirror(0, rig.memory.clone()).unwrap();
        let refused = rig.iommu.subscribe_mirror(rig.domains[0].space(), Box::new(mirror), Interest::MIRROR);
        let Err(SubscribeError::Refused(refused)) = refused else { panic!("{refused:?}") };
        assert_eq!((refused.kind, fake.reached(0)), (kind, Vec::new()));
    }
}
