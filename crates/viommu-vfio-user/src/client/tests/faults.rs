//! Every error that a server can give, at every kind of step: what the guest sees, what the record says, and that the device
//! reaches what the record says or nothing.

use viommu::subscribe::RefusalKind;
use viommu::{AttachErrorKind, StepError, StepErrorKind, SubscribeError};

use super::*;
use crate::spec::Command;

const ERRNOS: [(u32, RefusalKind); 12] = [
    (0, RefusalKind::Device),
    (1, RefusalKind::Device),
    (2, RefusalKind::Device),
    (5, RefusalKind::Device),
    (12, RefusalKind::Resources),
    (14, RefusalKind::Device),
    (17, RefusalKind::Device),
    (22, RefusalKind::Range),
    (28, RefusalKind::Resources),
    (38, RefusalKind::Unsupported),
    (95, RefusalKind::Unsupported),
    (u32::MAX, RefusalKind::Device),
];

/// After each of these nobody knows what the server has done.
const WRONGS: [Fault; 8] = [
    Fault::Silence,
    Fault::HangUp,
    Fault::Id,
    Fault::Command,
    Fault::Size(1),
    Fault::Size(4096),
    Fault::Kind,
    Fault::Huge,
];

fn start() -> Rig {
    start_with(SOON)
}

fn start_with(limit: Duration) -> Rig {
    let rig = Rig::with(100, limit, MirrorOptions::default());
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    over(rig.domain.map(rw(10, 19, 12)).unwrap());
    rig.check();
    rig
}

fn before() -> Vec<Mapping> {
    vec![rw(0, 3, 0), rw(10, 19, 12)]
}

type Step = (&'static str, fn(&Rig) -> Result<Completion, StepError>, fn() -> Vec<Mapping>);

/// Steps that the guest can be refused, and what the record says after a refusal.
const ADDING: [Step; 5] = [
    ("map", |rig| rig.domain.map(rw(30, 31, 4)), before),
    ("map over two regions", |rig| rig.domain.map(rw(30, 41, 10)), before),
    ("replace", |rig| rig.domain.replace(rw(0, 3, 8)), before),
    ("replace over two", |rig| rig.domain.replace(rw(0, 19, 6)), before),
    (
        "batch",
        |rig| rig.domain.batch().unmap(pages(0, 3)).map(rw(30, 41, 10)).commit(),
        || vec![rw(10, 19, 12)],
    ),
];

type Removal = (&'static str, fn(&Rig) -> Completion, usize);

const REMOVING: [Removal; 6] = [
    ("unmap", |rig| rig.domain.unmap(pages(0, 3)).unwrap(), 1),
    ("wide unmap", |rig| rig.domain.unmap(IovaRange::ALL).unwrap(), 0),
    ("replace", |rig| rig.domain.replace(rw(0, 3, 8)).unwrap(), 2),
    ("batch", |rig| rig.domain.batch().unmap(pages(10, 19)).map(rw(30, 31, 4)).commit().unwrap(), 2),
    ("removed memory", |rig| rig.iommu.remove_backing(gpas(0, 27)).unwrap(), 2),
    ("detach", |rig| rig.endpoint.detach().unwrap(), 2),
];

#[test]
fn an_addition_refused_is_a_refusal_for_the_guest_and_nothing_else() {
    for (errno, kind) in ERRNOS {
        for (name, step, after) in ADDING {
            // The first window is refused, or the second.
            for good in 0..2 {
                let rig = start();
                // Once: the way back works.
                rig.server.fail_once(Command::DMA_MAP, good, Fault::Errno(errno));
                match step(&rig) {
                    Ok(done) => {
                        over(done);
                        assert_eq!(good, 1, "{name} did not hear of {errno}");
                    }
                    Err(error) => {
                        over(error.completion);
                        let StepErrorKind::Refused { refused, .. } = error.kind else {
                            panic!("{}", error.kind)
                        };
                        assert_eq!(refused.kind, kind, "{name} with {errno}");
                        assert_eq!(rig.record(), after(), "{name} with {errno}");
                    }
                }
                rig.server.heal();
                assert!(!rig.subscription.is_fenced(), "{name} with {errno}");
                rig.check();
            }
        }
    }
}

#[test]
fn an_addition_whose_outcome_nobody_knows_stands_and_the_device_is_cut_off() {
    for fault in WRONGS {
        for (name, step, _) in ADDING {
            let rig = start_with(if fault == Fault::Silence { AT_ONCE } else { SOON });
            rig.server.fail(Command::DMA_MAP, 0, fault);
            // Not the guest's fault, and not that of other devices in its domain.
            over(step(&rig).unwrap_or_else(|error| panic!("{name} with {fault:?}: {error}")));
            rig.check_fenced();
            assert!(rig.endpoint.is_fenced());
        }
    }
}

#[test]
fn an_addition_whose_undo_fails_cuts_the_device_off() {
    for (name, step, _) in &ADDING[1..] {
        let rig = start();
        rig.server.fail(Command::DMA_MAP, 1, Fault::Errno(12));
        rig.server.fail(Command::DMA_UNMAP, 0, Fault::Errno(5));
        let outcome = step(&rig).map(over).map_err(|error| over(error.completion));
        if rig.subscription.is_fenced() {
            rig.check_fenced();
        } else {
            rig.server.heal();
            rig.check();
            assert!(outcome.is_ok(), "{name}");
        }
    }
}

#[test]
fn an_addition_that_nobody_can_be_refused_cuts_the_device_off() {
    for (errno, _) in ERRNOS {
        let rig = start();
        over(rig.iommu.remove_backing(gpas(0, 27)).unwrap());
        rig.server.fail(Command::DMA_MAP, 0, Fault::Errno(errno));
        // Memory comes under a mapping: the guest has done nothing.
        over(rig.iommu.add_backing(Extent { range: gpas(0, 27), medium: Medium::Ram }).unwrap());
        assert_eq!(rig.record(), before());
        rig.check_fenced();
    }
}

#[test]
fn a_removal_that_fails_happens_all_the_same_and_cuts_the_device_off() {
    let errnos = ERRNOS.iter().map(|(errno, _)| Fault::Errno(*errno));
    let more = [Fault::Size(-1), Fault::Size(-24), Fault::Content];
    for fault in errnos.chain(WRONGS).chain(more) {
        for (name, step, mappings) in REMOVING {
            let rig = start_with(if fault == Fault::Silence { AT_ONCE } else { SOON });
            rig.server.fail(Command::DMA_UNMAP, 0, fault);
            over(step(&rig));
            assert_eq!(rig.record().len(), mappings, "{name} with {fault:?}");
            rig.check_fenced();
            // It gets no further call.
            rig.server.take_calls();
            over(rig.domain.map(rw(50, 51, 0)).unwrap());
            assert_eq!(rig.server.take_calls(), [], "{name} with {fault:?}");
        }
    }
}

#[test]
fn an_attach_refused_leaves_the_endpoint_where_it_was() {
    for (errno, kind) in ERRNOS {
        for good in 0..3 {
            let rig = start();
            let second = rig.iommu.create_domain(2, Tables::Owned).unwrap();
            over(second.map(rw(0, 9, 12)).unwrap());
            over(second.map(rw(20, 20, 3)).unwrap());
            rig.server.fail_once(Command::DMA_MAP, good, Fault::Errno(errno));
            let error = rig.endpoint.attach(2).unwrap_err();
            over(error.completion);
            let AttachErrorKind::Refused(refused) = error.kind else { panic!("{}", error.kind) };
            assert_eq!((refused.kind, error.blocked.len()), (kind, 0));
            assert_eq!(rig.endpoint.attached(), Some(viommu::View::Domain(1)));
            rig.check();
        }
    }
}

#[test]
fn a_subscription_refused_leaves_nothing() {
    for (errno, kind) in ERRNOS {
        let rig = start();
        let (server, stream) = Recorder::start(100);
        server.fail(Command::DMA_MAP, 2, Fault::Errno(errno));
        let client = Client::connect(stream, SOON, NoMemory).unwrap();
        let (mirror, handle) = client.mirror(rig.memory.clone(), MirrorOptions::default());
        let refused = rig.iommu.subscribe_mirror(rig.domain.space(), Box::new(mirror), Interest::MIRROR);
        let Err(SubscribeError::Refused(refused)) = refused else { panic!("{refused:?}") };
        assert_eq!((refused.kind, server.windows().len(), handle.windows()), (kind, 0, 0));
        rig.check();
    }
}

#[test]
fn a_leave_takes_everything_away_and_one_that_fails_cuts_the_device_off() {
    let Rig { server, subscription, client, .. } = start();
    over(subscription.leave());
    assert!(server.windows().is_empty() && client.is_open());
    let Rig { server, subscription, incidents, .. } = start();
    server.fail(Command::DMA_UNMAP, 0, Fault::Errno(5));
    over(subscription.leave());
    server.join();
    assert!(server.windows().is_empty());
    assert!(matches!(incidents.lock().unwrap()[..], [Incident::Fenced { .. }]));
}

#[test]
fn an_embedders_own_fence_counts_and_one_that_fails_stops_the_machine() {
    for holds in [true, false] {
        let asked = Arc::new(Mutex::new(0));
        let times = asked.clone();
        let options = MirrorOptions::default().fence(move || {
            *times.lock().unwrap() += 1;
            if holds { Ok(()) } else { Err(viommu::subscribe::FenceFailed("still running".into())) }
        });
        let rig = Rig::with(100, SOON, options);
        over(rig.domain.map(rw(0, 3, 0)).unwrap());
        rig.server.fail(Command::DMA_UNMAP, 0, Fault::Errno(5));
        let mut done = rig.domain.unmap(pages(0, 3)).unwrap();
        assert_eq!(done.is_complete(), holds);
        assert!(*asked.lock().unwrap() > 0);
        let incidents = rig.incidents.lock().unwrap();
        match &incidents[0] {
            Incident::Fenced { .. } => assert!(holds),
            Incident::FenceFailed { why, .. } => assert!(!holds && why.contains("still running")),
            other => panic!("{other:?}"),
        }
    }
}
