//! Every error that an iommufd can give, at every kind of step: what the guest sees, what the record says, that devices
//! reach what the record says or nothing, and that another mirror is right.

use viommu::subscribe::RefusalKind;
use viommu::{AttachErrorKind, StepError, StepErrorKind};

use super::*;

/// Errors of `IOAS_MAP`, with the shape in which the model hears of each.
const MAP_ERRORS: [(Errno, RefusalKind); 13] = [
    (Errno::EINVAL, RefusalKind::Range),
    (Errno::EOVERFLOW, RefusalKind::Range),
    (Errno::EADDRINUSE, RefusalKind::Range),
    (Errno::EEXIST, RefusalKind::Device),
    (Errno::ENOENT, RefusalKind::Device),
    (Errno::ENOMEM, RefusalKind::Resources),
    (Errno::EINTR, RefusalKind::Resources),
    (Errno::EFAULT, RefusalKind::Device),
    (Errno::EBUSY, RefusalKind::Device),
    (Errno::EBADF, RefusalKind::Device),
    (Errno::ENOTTY, RefusalKind::Unsupported),
    (Errno::EOPNOTSUPP, RefusalKind::Unsupported),
    (Errno::from_raw(131), RefusalKind::Device),
];

/// Errors of `IOAS_UNMAP`. Which one makes no difference: a removal is never refused.
const UNMAP_ERRORS: [Errno; 5] = [Errno::ENOENT, Errno::EBUSY, Errno::EOVERFLOW, Errno::EINVAL, Errno::EBADF];

/// Errors of what switches a device, or makes it something to be switched to.
const SWITCH_ERRORS: [(Errno, RefusalKind); 6] = [
    (Errno::EADDRINUSE, RefusalKind::Range),
    (Errno::ENOMEM, RefusalKind::Resources),
    (Errno::EBUSY, RefusalKind::Device),
    (Errno::ENODEV, RefusalKind::Device),
    (Errno::ENOENT, RefusalKind::Device),
    (Errno::EOPNOTSUPP, RefusalKind::Unsupported),
];

fn start() -> Rig {
    started(Rig::new())
}

fn started(rig: Rig) -> Rig {
    over(rig.domains[0].map(rw(0, 3, 0)).unwrap());
    over(rig.domains[0].map(rw(10, 19, 12)).unwrap());
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

/// Plans an error that comes once, and runs a step.
fn once<T>(rig: &Rig, kind: Kind, good: usize, errno: Errno, step: impl FnOnce() -> T) -> T {
    rig.fake.lock().once = true;
    rig.fake.fail(kind, good, errno);
    let outcome = step();
    rig.fake.heal();
    outcome
}

/// Steps that the guest can be refused, and what the record says after a refusal.
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
    for (errno, kind) in MAP_ERRORS {
        for (name, step, after) in ADDING {
            // The first call fails, or the second: a piece is there already.
            for good in 0..2 {
                let rig = start();
                match once(&rig, Kind::Map, good, errno, || step(&rig)) {
                    Ok(done) => {
                        over(done);
                        assert_eq!(good, 1, "{name} did not hear of {errno}");
                    }
                    Err(error) => {
                        assert_eq!(refused(error), kind, "{name} with {errno}");
                        assert_eq!(rig.record(), after(), "{name} with {errno}");
                    }
                }
                assert!(!rig.endpoints.iter().any(Endpoint::is_fenced), "{name} with {errno}");
                rig.check();
            }
        }
    }
}

#[test]
fn an_addition_whose_undo_fails_too_cuts_the_devices_off() {
    for (errno, _) in MAP_ERRORS {
        for (name, step, _) in ADDING {
            let rig = start();
            rig.fake.fail(Kind::Map, 0, errno);
            rig.fake.fail(Kind::Unmap, 0, Errno::ENOENT);
            let outcome = step(&rig).map(over).map_err(refused);
            rig.fake.heal();
            // A plain map has nothing to undo: the guest is refused, and all is well.
            if rig.endpoints[0].is_fenced() {
                rig.check_fenced();
            } else {
                assert!(outcome.is_err(), "{name} with {errno}");
                rig.check();
            }
        }
    }
}

#[test]
fn an_addition_that_nobody_can_be_refused_cuts_the_devices_off() {
    for (errno, _) in MAP_ERRORS {
        let rig = start();
        over(rig.domains[0].map(rw(20, 23, 128)).unwrap());
        rig.fake.fail(Kind::Map, 0, errno);
        // Memory comes under a mapping: the guest has done nothing.
        over(rig.iommu.add_backing(Extent { range: gpas(128, 131), medium: Medium::Ram }).unwrap());
        assert_eq!(rig.record().len(), 3);
        assert!(rig.endpoints.iter().all(Endpoint::is_fenced), "both are in the domain");
        assert!(rig.reached(0).is_empty() && rig.reached(1).is_empty());
        rig.check_other();
    }
}

#[test]
fn a_removal_that_fails_happens_all_the_same_and_cuts_the_devices_off() {
    type Removal = (&'static str, fn(&Rig) -> Completion, usize);
    let removals: [Removal; 5] = [
        ("unmap", |rig| rig.domains[0].unmap(pages(0, 3)).unwrap(), 1),
        ("wide unmap", |rig| rig.domains[0].unmap(IovaRange::ALL).unwrap(), 0),
        ("replace", |rig| rig.domains[0].replace(rw(0, 3, 8)).unwrap(), 2),
        ("batch", |rig| rig.domains[0].batch().unmap(pages(10, 19)).map(rw(30, 31, 4)).commit().unwrap(), 2),
        ("removed memory", |rig| rig.iommu.remove_backing(gpas(0, 31)).unwrap(), 2),
    ];
    for errno in UNMAP_ERRORS {
        for (name, step, mappings) in removals {
            let rig = start();
            rig.fake.fail(Kind::Unmap, 0, errno);
            rig.fake.take_calls();
            over(step(&rig));
            assert_eq!(rig.record().len(), mappings, "{name} with {errno}");
            assert!(rig.endpoints.iter().all(Endpoint::is_fenced), "{name} with {errno}");
            let calls = rig.fake.take_calls();
            let detached = calls.iter().filter(|call| matches!(call, Call::Detach(_))).count();
            assert_eq!(detached, 2, "{name}: both are detached for real: {calls:?}");
            rig.check_fenced();
            over(rig.domains[0].map(rw(50, 51, 0)).unwrap());
            assert_eq!(rig.fake.take_calls(), [], "{name} with {errno}: it gets no further call");
        }
    }
}

#[test]
fn a_kernel_that_has_lost_a_mapping_is_found_out() {
    let rig = start();
    rig.fake.betray(0);
    over(rig.domains[0].unmap(pages(0, 3)).unwrap());
    rig.check_fenced();
    // One of two: other bytes than are known to be there.
    let rig = start();
    rig.fake.betray(0);
    over(rig.domains[0].unmap(IovaRange::ALL).unwrap());
    rig.check_fenced();
    // The way back: off the dead copy, and bound again.
    for endpoint in &rig.endpoints {
        over(endpoint.detach().unwrap());
        over(endpoint.bind_with(&rig.binding).unwrap());
    }
    over(rig.domains[0].map(rw(5, 5, 5)).unwrap());
    for endpoint in &rig.endpoints {
        over(endpoint.attach(1).unwrap());
        assert!(!endpoint.is_fenced());
    }
    rig.check();
    assert_eq!(rig.fake.objects(), (1, 1));
}

#[test]
fn a_removal_that_fails_with_a_fence_that_fails_never_completes() {
    for errno in UNMAP_ERRORS {
        let rig = start();
        rig.fake.fail(Kind::Unmap, 0, errno);
        rig.fake.fail(Kind::Detach, 1, Errno::ENODEV);
        let mut done = rig.domains[0].unmap(pages(0, 3)).unwrap();
        assert!(!done.is_complete() && done.is_stuck());
        assert_eq!(rig.record(), [rw(10, 19, 12)], "nobody in this process uses it any more");
        rig.check_other();
        let incidents = rig.incidents.lock().unwrap();
        let Incident::FenceFailed { why, .. } = &incidents[0] else { panic!("{incidents:?}") };
        assert!(why.contains("DETACH_IOMMUFD_PT of") && why.contains("ENODEV"), "{why}");
        assert!(rig.reached(0).is_empty(), "the one that could be detached is");
    }
}

#[test]
fn a_switch_refused_leaves_the_endpoint_where_it_was() {
    for (errno, kind) in SWITCH_ERRORS {
        for call in [Kind::Attach, Kind::Alloc, Kind::Hwpt] {
            let rig = start();
            over(rig.domains[1].map(rw(0, 9, 12)).unwrap());
            let error = once(&rig, call, 0, errno, || rig.endpoints[0].attach(2)).unwrap_err();
            over(error.completion);
            let AttachErrorKind::Refused(refused) = error.kind else { panic!("{}", error.kind) };
            assert_eq!((refused.kind, error.blocked.len()), (kind, 0), "{call:?} with {errno}");
            assert_eq!(rig.endpoints[0].attached(), Some(viommu::View::Domain(1)));
            rig.check();
            assert_eq!(rig.fake.objects(), (1, 1), "{call:?} with {errno}: what was made is gone again");
        }
    }
}

#[test]
fn an_attach_that_finds_no_fitting_table_and_can_make_none_is_refused() {
    for (errno, kind) in SWITCH_ERRORS {
        let rig = started(Rig::with(Kinds { kinds: [0, 1], ..Kinds::default() }));
        over(rig.endpoints[1].attach(2).unwrap());
        let error = once(&rig, Kind::Hwpt, 0, errno, || rig.endpoints[0].attach(2)).unwrap_err();
        over(error.completion);
        let AttachErrorKind::Refused(refused) = error.kind else { panic!("{}", error.kind) };
        assert_eq!(refused.kind, kind);
        rig.check();
    }
    // A table that is made, and does not fit all the same.
    let rig = started(Rig::with(Kinds { kinds: [0, 1], ..Kinds::default() }));
    over(rig.endpoints[1].attach(2).unwrap());
    let objects = rig.fake.objects();
    rig.fake.fail(Kind::Attach, 0, Errno::EINVAL);
    over(rig.endpoints[0].attach(2).unwrap_err().completion);
    rig.fake.heal();
    assert_eq!(rig.fake.objects(), objects);
    rig.check();
}

#[test]
fn a_fill_refused_leaves_the_endpoint_where_it_was() {
    for (errno, kind) in MAP_ERRORS {
        for good in 0..2 {
            let rig = start();
            over(rig.domains[1].map(rw(0, 9, 12)).unwrap());
            let error = once(&rig, Kind::Map, good, errno, || rig.endpoints[0].attach(2)).unwrap_err();
            over(error.completion);
            let AttachErrorKind::Refused(refused) = error.kind else { panic!("{}", error.kind) };
            assert_eq!((refused.kind, error.blocked.len()), (kind, 0));
            rig.check();
            assert_eq!(rig.fake.objects(), (1, 1));
        }
    }
}

#[test]
fn a_detach_refused_leaves_the_endpoint_where_it_was() {
    let rig = start();
    let error = once(&rig, Kind::Detach, 0, Errno::ENODEV, || rig.endpoints[0].block()).unwrap_err();
    over(error.completion);
    assert_eq!(rig.endpoints[0].attached(), Some(viommu::View::Domain(1)));
    rig.check();
}

#[test]
fn to_cut_off_one_device_is_to_cut_off_its_group() {
    let rig = started(Rig::with(Kinds { groups: [Some(4), Some(4)], ..Kinds::default() }));
    // Unplugged, and it cannot be detached the first time: then it is fenced.
    let Rig { endpoints: [first, _second], fake, devices, .. } = rig;
    fake.lock().once = true;
    fake.fail(Kind::Detach, 0, Errno::EBUSY);
    over(first.remove().unwrap());
    assert!(devices.iter().all(|device| fake.reached(*device).is_empty()));
}
