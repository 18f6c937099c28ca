//! Fault reports (D44 to D47).

use viommu::Access;
use viommu_virtio::spec::event::{DOMAIN, Fault, FaultFlags, MAPPING, UNKNOWN};
use viommu_virtio::{Config, EventLimits};

use crate::rig::*;

fn report(rig: &mut Rig) -> Vec<Fault> {
    rig.events.process().unwrap();
    rig.driver.events().unwrap()
}

#[test]
fn d44_reserved_and_unknown_flags_of_a_report_are_zero() {
    let mut rig = rig();
    rig.driver.fill_events().unwrap();
    rig.reads(A, 0x1234).unwrap_err();
    rig.writes(A, u64::MAX).unwrap_err();
    rig.ok(&attach(1, A));
    rig.ok(&map_bytes(1, 0x4000, 0x4fff, 0, R));
    rig.reads(A, 0x5000).unwrap_err();
    rig.writes(A, 0x4000).unwrap_err();
    rig.access(A, 0x6000, Access::RW).unwrap_err();
    rig.reads(B, MSI.0).unwrap_err();
    let faults = report(&mut rig);
    let seen: Vec<_> =
        faults.iter().map(|f| (f.reason, f.flags.get(), f.endpoint.get(), f.address.get())).collect();
    let (read, write) = (FaultFlags::READ.bits(), FaultFlags::WRITE.bits());
    let at = FaultFlags::ADDRESS.bits();
    let due = [
        (DOMAIN, read | at, A, 0x1234),
        (DOMAIN, write | at, A, u64::MAX),
        (MAPPING, read | at, A, 0x5000),
        (MAPPING, write | at, A, 0x4000),
        (MAPPING, read | write | at, A, 0x6000),
        (MAPPING, read | at, B, MSI.0),
    ];
    assert_eq!(seen, due);
    assert!(faults.iter().all(|f| f.reserved == [0; 3] && f.reserved1.get() == 0));
}

#[test]
fn d44_a_fault_that_the_specification_does_not_name_is_unknown() {
    let mut rig = rig();
    rig.driver.fill_events().unwrap();
    rig.ok(&attach(1, A));
    rig.ok(&map_bytes(1, 0x4000, 0x4fff, 1 << 40, RW));
    rig.reads(A, 0x4000).unwrap_err(); // mapped to where nothing is
    let faults = report(&mut rig);
    assert_eq!((faults.len(), faults[0].reason, faults[0].address.get()), (1, UNKNOWN, 0x4000));
}

#[test]
fn d45_reports_name_endpoints_that_are_there() {
    let mut rig = rig();
    rig.reads(A, 0x1000).unwrap_err();
    rig.reads(B, 0x2000).unwrap_err();
    over(rig.device.remove_endpoint(A).unwrap());
    rig.driver.fill_events().unwrap();
    let faults = report(&mut rig);
    assert_eq!(faults.iter().map(|f| f.endpoint.get()).collect::<Vec<_>>(), [B]);
}

#[test]
fn d46_reports_have_the_address() {
    let mut rig = rig();
    rig.driver.fill_events().unwrap();
    rig.reads(A, 0x7_7777).unwrap_err();
    let faults = report(&mut rig);
    assert_eq!(faults[0].flags.get() & FaultFlags::ADDRESS.bits(), FaultFlags::ADDRESS.bits());
    assert_eq!(faults[0].address.get(), 0x7_7777);
}

#[test]
fn d47_a_report_is_not_split_over_small_buffers() {
    let mut rig = rig();
    rig.reads(A, 0x1000).unwrap_err();
    rig.driver.post_event(8).unwrap();
    rig.driver.post_event(16).unwrap();
    rig.driver.post_event(23).unwrap();
    rig.events.process().unwrap();
    for _ in 0..3 {
        assert_eq!(rig.driver.next_event().unwrap(), Some(vec![]), "given back empty");
    }
    assert_eq!(rig.driver.next_event().unwrap(), None);
    rig.driver.post_event(40).unwrap();
    rig.events.process().unwrap();
    assert_eq!(rig.driver.next_event().unwrap().map(|bytes| bytes.len()), Some(24), "and not lost");
}

#[test]
fn reports_wait_for_buffers_in_order_and_are_bounded() {
    let events = EventLimits { pending: 6, per_endpoint: 4, per_second: u32::MAX };
    let mut rig = rig_with(Config { events, ..config() }, |b| b);
    for at in 0..20 {
        rig.reads(A, at * PAGE).unwrap_err();
    }
    for at in 0..20 {
        rig.reads(B, at * PAGE).unwrap_err();
    }
    rig.driver.post_event(24).unwrap();
    assert_eq!(report(&mut rig).len(), 1);
    rig.driver.fill_events().unwrap();
    let faults = report(&mut rig);
    let seen: Vec<_> = faults.iter().map(|f| (f.endpoint.get(), f.address.get() / PAGE)).collect();
    assert_eq!(seen, [(A, 1), (A, 2), (A, 3), (B, 0), (B, 1)], "the first of each, and the others are lost");
    assert_eq!(rig.device.metrics().events_dropped_full, 34);
}
