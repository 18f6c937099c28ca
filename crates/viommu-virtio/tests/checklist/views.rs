//! ATTACH and DETACH (D10 to D21).

use viommu::fuzzing::recording::RecordingMirror;
use viommu::subscribe::Reach;
use viommu::{FaultReason, Interest, View};
use viommu_virtio::spec::Features;
use viommu_virtio::spec::request::Status;
use viommu_virtio::{Config, EndpointPlan};

use crate::rig::*;

fn view(rig: &Rig, endpoint: u32) -> View {
    rig.device.endpoint(endpoint).unwrap().view().unwrap()
}

#[test]
fn d10_attach_with_reserved_bits_is_invalid() {
    let mut rig = rig();
    for at in 16..20 {
        assert_eq!(rig.says(&raw(&attach(1, A), |bytes| bytes[at] = 1)), Status::INVAL);
    }
    assert_eq!(view(&rig, A), View::Blocked);
    assert!(rig.device.iommu().domains().is_empty());
}

#[test]
fn d11_attach_with_an_unknown_flag_is_invalid() {
    let mut rig = rig();
    for bit in 1..32 {
        let flags = 1_u32 << bit;
        let request = raw(&attach(1, A), |bytes| bytes[12..16].copy_from_slice(&flags.to_le_bytes()));
        assert_eq!(rig.says(&request), Status::INVAL);
    }
    let mut old = rig_with(config(), |b| b);
    over(old.device.reset().completion);
    over(old.device.negotiate(Features::all() - Features::BYPASS_CONFIG));
    assert_eq!(old.says(&attach_bypass(1, A)), Status::INVAL, "unknown where it is not negotiated");
    old.ok(&attach(1, A));
}

#[test]
fn d12_attach_of_no_endpoint_is_noent() {
    let mut rig = rig();
    assert_eq!(rig.says(&attach(1, 77)), Status::NOENT);
    assert!(rig.device.iommu().domains().is_empty(), "it leaves no domain");
}

#[test]
fn d13_a_second_endpoint_comes_to_a_domain() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    rig.ok(&map(1, 5, 5, 9));
    rig.ok(&attach(1, B));
    assert_eq!((rig.reads(A, 0x5010), rig.reads(B, 0x5010)), (Ok(0x9010), Ok(0x9010)));
}

#[test]
fn d14_a_flag_that_is_not_the_domains_is_invalid() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    rig.ok(&attach_bypass(2, B));
    assert_eq!(rig.says(&attach_bypass(1, B)), Status::INVAL);
    assert_eq!(rig.says(&attach(2, A)), Status::INVAL);
    assert_eq!((view(&rig, A), view(&rig, B)), (View::Domain(1), View::Identity));
    // Also for who is there already.
    assert_eq!(rig.says(&attach_bypass(1, A)), Status::INVAL);
}

#[test]
fn d15_attach_moves_an_endpoint_and_what_it_leaves_may_die() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    rig.ok(&attach(1, B));
    rig.ok(&map(1, 5, 5, 9));
    rig.ok(&attach(2, A));
    assert_eq!((rig.reads(A, 0x5000), rig.reads(B, 0x5000)), (Err(FaultReason::Unmapped), Ok(0x9000)));
    rig.ok(&attach(2, B));
    assert_eq!(rig.says(&map(1, 5, 5, 9)), Status::NOENT, "the last one has left");
    rig.ok(&attach(1, B));
    assert_eq!(rig.pages(1), [], "it begins empty again");
}

#[test]
fn d15_attach_where_it_is_keeps_the_mappings() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    rig.ok(&map(1, 5, 5, 9));
    rig.ok(&attach(1, A));
    assert_eq!(rig.reads(A, 0x5000), Ok(0x9000));
    rig.ok(&attach_bypass(2, A));
    rig.ok(&attach_bypass(2, A));
    assert_eq!(view(&rig, A), View::Identity);
}

#[test]
fn d16_an_endpoint_that_does_not_fit_the_domain_is_unsupp() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    rig.ok(&map_bytes(1, RESERVED.1 - 0xfff, RESERVED.1, 0, RW));
    rig.ok(&attach(2, B));
    rig.ok(&map(2, 7, 7, 7));
    assert_eq!(rig.says(&attach(1, B)), Status::UNSUPP);
    assert_eq!((view(&rig, B), rig.reads(B, 0x7000)), (View::Domain(2), Ok(0x7000)), "where it was");
    rig.ok(&unmap_bytes(1, RESERVED.1 - 0xfff, RESERVED.1));
    rig.ok(&attach(1, B));
}

#[test]
fn d16_a_mirror_that_cannot_hold_the_domain_refuses_the_attach() {
    let mut rig = rig();
    let (mirror, handle) = RecordingMirror::new(Reach { entries: Some(2), ..Reach::default() });
    let added =
        rig.device.add_endpoint(10, EndpointPlan::default().mirror(mirror, Interest::MIRROR)).unwrap();
    rig.ok(&attach(1, A));
    for page in [1, 3, 5] {
        rig.ok(&map(1, page, page, page));
    }
    assert_eq!(rig.says(&attach(1, 10)), Status::NOMEM);
    assert_eq!(view(&rig, 10), View::Blocked);
    rig.ok(&unmap(1, 5, 5));
    rig.ok(&attach(1, 10));
    assert_eq!(handle.held().len(), 2);
    assert_eq!(rig.says(&map(1, 5, 5, 5)), Status::NOMEM, "nor can it hold more");
    assert_eq!(rig.pages(1), [(1, 1), (3, 3)]);
    assert!(added.subscriptions[0].audit().unwrap().is_clean());
}

#[test]
fn d17_who_is_not_rejected_is_attached() {
    let mut rig = rig();
    rig.ok(&attach(0, A));
    assert_eq!(view(&rig, A), View::Domain(0));
    rig.ok(&attach(u32::MAX, A));
    assert_eq!(view(&rig, A), View::Domain(u32::MAX));
    rig.ok(&attach_bypass(1, A));
    assert_eq!((view(&rig, A), rig.reads(A, 0x4004)), (View::Identity, Ok(0x4004)));
}

#[test]
fn d17_a_failed_attach_leaves_no_domain() {
    let mut rig = rig_with(config(), |b| b.domains(1));
    rig.ok(&attach(1, A));
    assert_eq!(rig.says(&attach(2, B)), Status::NOMEM, "the cap on domains");
    assert_eq!(rig.says(&map(2, 1, 1, 1)), Status::NOENT);
    assert_eq!(view(&rig, B), View::Blocked);
    rig.ok(&detach(1, A));
    rig.ok(&attach(2, B));
}

#[test]
fn d18_reserved_of_detach_is_ignored() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    rig.ok(&raw(&detach(1, A), |bytes| bytes[12..20].fill(0xff)));
    assert_eq!(view(&rig, A), View::Blocked);
}

#[test]
fn d19_detach_of_no_endpoint_is_noent() {
    assert_eq!(rig().says(&detach(1, 77)), Status::NOENT);
}

#[test]
fn d20_detach_from_another_domain_is_invalid() {
    let mut rig = rig();
    assert_eq!(rig.says(&detach(1, A)), Status::INVAL);
    rig.ok(&attach(1, A));
    rig.ok(&attach(2, B));
    assert_eq!(rig.says(&detach(2, A)), Status::INVAL);
    assert_eq!(rig.says(&detach(3, A)), Status::INVAL);
    assert_eq!(view(&rig, A), View::Domain(1));
}

#[test]
fn d21_after_detach_the_endpoint_reaches_no_mapping() {
    for bypass in [false, true] {
        let mut rig = rig_with(Config { bypass, ..Config::default() }, |b| b);
        rig.ok(&attach(1, A));
        rig.ok(&attach(1, B));
        rig.ok(&map(1, 5, 5, 9));
        assert_eq!(rig.reads(A, 0x5000), Ok(0x9000));
        rig.ok(&detach(1, A));
        let due = if bypass { Ok(0x5000) } else { Err(FaultReason::Blocked) };
        assert_eq!(rig.reads(A, 0x5000), due);
        assert_eq!(rig.reads(B, 0x5000), Ok(0x9000), "the other one still does");
        rig.ok(&detach(1, B));
        assert!(rig.device.iommu().domains().is_empty());
    }
}

#[test]
fn d21_the_answer_to_a_detach_waits_for_a_device_that_is_inside() {
    let mut rig = rig();
    rig.ok(&attach(1, A));
    rig.ok(&map(1, 5, 5, 9));
    let mut reader = rig.device.endpoint(A).unwrap().reader("inside").unwrap();
    let guard = reader.enter();
    guard.translate(viommu::Iova(0x5000), viommu::Access::READ).unwrap();
    rig.driver.push(&detach(1, A)).unwrap();
    rig.queue.process().unwrap();
    assert_eq!((rig.queue.pending(), rig.driver.next_answer().unwrap()), (1, None));
    drop(guard);
    rig.serve();
    assert_eq!(rig.driver.next_answer().unwrap().unwrap().status(), Some(Status::OK));
}
