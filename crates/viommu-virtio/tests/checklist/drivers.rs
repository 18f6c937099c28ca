//! What Linux's driver does, and what a device must do for it.

use std::sync::atomic::Ordering;

use viommu::endpoint::RegionKind;
use viommu::fuzzing::recording::RecordingMirror;
use viommu::subscribe::Reach;
use viommu::{Access, Interest, Iova, IovaRange};
use viommu_virtio::driver::{DriverError, Request};
use viommu_virtio::spec::Features;
use viommu_virtio::spec::request::Status;
use viommu_virtio::{Config, EndpointPlan};

use crate::rig::*;

#[test]
fn r3_used_length_is_never_0_where_a_status_was_written() {
    let mut rig = rig_with(Config { domain_range: 0..=9, ..config() }, |b| b.domain_mappings(1));
    rig.ok(&attach(1, A));
    rig.ok(&map(1, 0, 0, 0));
    for (request, status) in [
        (map(1, 1, 1, 0), Status::NOMEM),
        (map(1, 0, 0, 0), Status::INVAL),
        (map(10, 0, 0, 0), Status::RANGE),
        (map(2, 0, 0, 0), Status::NOENT),
        (unmap(2, 0, 0), Status::NOENT),
        (unmap_bytes(1, 1, 2), Status::RANGE),
        (attach(10, A), Status::RANGE),
        (attach(1, 77), Status::NOENT),
        (detach(3, A), Status::INVAL),
        (Request::Probe { endpoint: 77 }, Status::NOENT),
    ] {
        assert_eq!(rig.says(&request), status); // and the used length is checked
    }
}

#[test]
fn r5_probe_comes_before_attach() {
    let mut rig = rig();
    rig.ok(&Request::Probe { endpoint: B });
    rig.ok(&attach(1, B));
    rig.ok(&Request::Probe { endpoint: B });
}

#[test]
fn a_lazy_burst_of_256_unmaps_is_one_wait() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    (0..256).for_each(|page| rig.ok(&map(1, 2 * page, 2 * page, page)));
    let mut reader = rig.device.endpoint(A).unwrap().reader("inside").unwrap();
    let guard = reader.enter();
    guard.translate(Iova(0), Access::READ).unwrap();
    (0..256).for_each(|page| {
        rig.driver.push(&unmap(1, 2 * page, 2 * page)).unwrap();
    });
    rig.queue.process().unwrap();
    assert_eq!(rig.pages(1), [], "executed at once");
    assert_eq!((rig.queue.pending(), rig.driver.next_answer().unwrap()), (256, None));
    drop(guard);
    // Somebody else's access in between holds nothing up.
    let guard = reader.enter();
    assert!(guard.probe(Iova(0), Access::READ).is_err());
    rig.queue.process().unwrap();
    let answers = rig.driver.complete().unwrap();
    assert_eq!(answers.len(), 256);
    assert!(answers.iter().all(|answer| answer.status() == Some(Status::OK)));
    drop(guard);
}

#[test]
fn requests_behind_ones_that_wait_are_executed_and_answered_behind_them() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    rig.ok(&map(1, 0, 0, 5));
    let mut reader = rig.device.endpoint(A).unwrap().reader("inside").unwrap();
    let guard = reader.enter();
    let first = rig.driver.push(&unmap(1, 0, 0)).unwrap();
    rig.queue.process().unwrap();
    let second = rig.driver.push(&map(1, 0, 0, 6)).unwrap();
    rig.queue.process().unwrap();
    assert_eq!(rig.pages(1), [(0, 0)], "nothing waits for a device");
    let blockers = rig.queue.blockers();
    assert_eq!((blockers[0].endpoint, blockers[0].label.as_str()), (Some(A.into()), "inside"));
    assert_eq!((rig.queue.pending(), rig.driver.next_answer().unwrap()), (2, None));
    drop(guard);
    rig.serve();
    assert_eq!(rig.queue.blockers(), []);
    let tokens: Vec<_> = rig.driver.complete().unwrap().iter().map(|answer| answer.token).collect();
    assert_eq!(tokens, [first, second]);
}

#[test]
fn answers_that_wait_at_a_reset_never_touch_the_new_ring() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    rig.ok(&map(1, 0, 0, 5));
    let mut reader = rig.device.endpoint(A).unwrap().reader("inside").unwrap();
    let guard = reader.enter();
    rig.driver.push(&unmap(1, 0, 0)).unwrap();
    rig.queue.process().unwrap();
    let mut reset = rig.device.reset();
    assert_eq!(reset.inside.len(), 1, "a device that was not stopped");
    let mut pending = rig.queue.reset();
    rig.driver.reset().unwrap();
    assert!(!reset.completion.is_complete() && !pending.is_complete());
    assert_eq!(rig.queue.pending(), 0);
    drop(guard);
    over(reset.completion);
    over(pending);
    *rig.queue.queue_mut() = rig.driver.request_queue().unwrap();
    over(rig.device.negotiate(Features::all()));
    assert!(rig.driver.complete().unwrap().is_empty());
    rig.ok(&attach(1, A));
    assert!(rig.driver.complete().unwrap().is_empty());
}

#[test]
fn a_full_queue_is_synced_and_goes_on() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    let mut answered = 0;
    for page in 0..3000 {
        if matches!(rig.driver.push(&map(1, page, page, page)), Err(DriverError::Full)) {
            rig.serve();
            answered += rig.driver.complete().unwrap().len();
            rig.driver.push(&map(1, page, page, page)).unwrap();
        }
    }
    rig.serve();
    answered += rig.driver.complete().unwrap().len();
    assert_eq!((answered, rig.record(1).len()), (3000, 3000));
}

#[test]
fn an_unmap_that_was_widened_takes_several_mappings() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    for page in [3, 4, 6, 9] {
        rig.ok(&map(1, page, page, 0));
    }
    rig.ok(&unmap(1, 3, 6));
    assert_eq!(rig.pages(1), [(9, 9)]);
}

#[test]
fn identity_maps_far_beyond_memory_reach_mirrors_only_where_there_is_memory() {
    // Without BYPASS_CONFIG the driver maps everything but the regions.
    let features = Config::default().features - Features::BYPASS_CONFIG;
    let mut rig = rig_with(Config { features, ..config() }, |b| b);
    let (mirror, handle) = RecordingMirror::new(Reach::default());
    let subscription = rig.device.subscribe_mirror(B, mirror, Interest::MIRROR).unwrap();
    rig.ok(&attach(1, B));
    let (ram, last) = (64_u64 << 20, u64::MAX);
    for (start, end) in [(0, RESERVED.0 - 1), (RESERVED.1 + 1, MSI.0 - 1), (MSI.1 + 1, last)] {
        rig.ok(&map_bytes(1, start, end, start, RW));
    }
    let held: Vec<IovaRange> = handle.held().iter().map(|m| m.range).collect();
    assert_eq!(held, [range(0, RESERVED.0 - 1), range(RESERVED.1 + 1, ram - 1)]);
    assert!(subscription.audit().unwrap().is_clean());
    assert_eq!(rig.reads(B, ram - 1), Ok(ram - 1));
    rig.reads(B, ram).unwrap_err();
    rig.ok(&unmap_bytes(1, 0, last));
    assert!(handle.held().is_empty());
}

#[test]
fn the_first_domain_bypasses_and_the_others_do_not() {
    let mut rig = rig_with(Config { domain_range: 100..=200, ..config() }, |b| b);
    rig.ok(&attach_bypass(100, A));
    rig.ok(&attach_bypass(100, B));
    rig.ok(&attach(101, A));
    rig.ok(&map(101, 5, 5, 9));
    assert_eq!((rig.reads(A, 0x5000), rig.reads(B, 0x5000)), (Ok(0x9000), Ok(0x5000)));
    rig.ok(&attach_bypass(100, A));
    assert_eq!(rig.reads(A, 0x5000), Ok(0x5000));
}

#[test]
fn detach_at_device_release_is_ok() {
    let mut rig = rig();
    for bypass in [false, true] {
        rig.ok(&if bypass { attach_bypass(1, A) } else { attach(1, A) });
        rig.ok(&detach(1, A));
    }
}

#[test]
fn an_interrupt_comes_unless_the_driver_polls() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    let first = rig.interrupts.load(Ordering::Relaxed);
    assert_eq!(first, 1);
    for page in 0..8 {
        rig.driver.push(&map(1, page, page, page)).unwrap();
    }
    rig.serve();
    assert_eq!(rig.interrupts.load(Ordering::Relaxed), 2, "one for a batch");
    rig.driver.complete().unwrap();
    rig.driver.set_interrupts(false).unwrap();
    rig.ok(&unmap(1, 0, 7));
    assert_eq!(rig.interrupts.load(Ordering::Relaxed), 2);
}

#[test]
fn endpoints_come_and_go_while_the_driver_works() {
    let mut rig = rig();
    assert_eq!(rig.says(&attach(1, 10)), Status::NOENT);
    let plan = EndpointPlan::default().region(range(MSI.0, MSI.1), RegionKind::Msi);
    rig.device.add_endpoint(10, plan).unwrap();
    assert_eq!(rig.ask(&Request::Probe { endpoint: 10 }).resv_mem().len(), 1);
    rig.ok(&attach(1, 10));
    rig.ok(&map(1, 0, 0, 0));
    over(rig.device.remove_endpoint(10).unwrap());
    assert_eq!(rig.says(&detach(1, 10)), Status::NOENT);
    assert_eq!(rig.says(&unmap(1, 0, 0)), Status::NOENT, "the domain went with its last endpoint");
}
