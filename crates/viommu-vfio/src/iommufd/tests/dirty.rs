//! Pages that devices wrote.

use super::*;

#[test]
fn written_pages_are_told_once_by_guest_address() {
    let rig = Rig::new();
    over(rig.domains[0].map(rw(100, 103, 14)).unwrap());
    over(rig.domains[0].map(map_of(200, 201, 4, Access::READ)).unwrap());
    assert_eq!(rig.handle.dirty(), Err(Errno::EINVAL), "not while nothing is tracked");
    assert!(rig.fake.write(rig.devices[0], 100 * PAGE));
    rig.handle.dirty_start().unwrap();
    // Over two regions; by both devices; and never to what is read-only.
    assert!(rig.fake.write(rig.devices[0], 101 * PAGE));
    assert!(rig.fake.write(rig.devices[1], 102 * PAGE + 8));
    assert!(!rig.fake.write(rig.devices[1], 200 * PAGE));
    assert_eq!(rig.handle.dirty().unwrap(), [gpas(15, 16)]);
    assert_eq!(rig.handle.dirty().unwrap(), [], "clean once read");
    rig.handle.dirty_stop().unwrap();
    assert_eq!(rig.handle.dirty(), Err(Errno::EINVAL));
}

#[test]
fn each_kind_of_table_is_asked() {
    let rig = Rig::with(Kinds { kinds: [0, 1], ..Kinds::default() });
    over(rig.domains[0].map(rw(100, 103, 0)).unwrap());
    rig.handle.dirty_start().unwrap();
    assert!(rig.fake.write(rig.devices[0], 100 * PAGE) && rig.fake.write(rig.devices[1], 102 * PAGE));
    assert_eq!(rig.handle.dirty().unwrap(), [gpas(0, 0), gpas(2, 2)]);
}

#[test]
fn tables_that_come_later_track_too() {
    let rig = Rig::new();
    over(rig.domains[1].map(rw(5, 5, 9)).unwrap());
    rig.handle.dirty_start().unwrap();
    over(rig.endpoints[1].attach(2).unwrap());
    assert!(rig.fake.write(rig.devices[1], 5 * PAGE));
    assert_eq!(rig.handle.dirty().unwrap(), [gpas(9, 9)]);
}

#[test]
fn all_that_may_be_written_counts_when_it_is_unmapped() {
    let rig = Rig::new();
    over(rig.domains[0].map(rw(100, 103, 0)).unwrap());
    over(rig.domains[0].map(map_of(200, 201, 8, Access::READ)).unwrap());
    rig.domains[0].dirty_start();
    rig.handle.dirty_start().unwrap();
    over(rig.domains[0].unmap(IovaRange::ALL).unwrap());
    assert_eq!(rig.domains[0].dirty_take().unwrap(), [gpas(0, 3)]);
}

#[test]
fn a_device_that_cannot_tell_is_refused_and_a_late_one_counts_for_all() {
    let rig = Rig::with(Kinds { tracks: [true, false], ..Kinds::default() });
    assert_eq!(rig.handle.dirty_start(), Err(Errno::EOPNOTSUPP));
    let rig = Rig::with(Kinds { kinds: [0, 1], ..Kinds::default() });
    rig.handle.dirty_start().unwrap();
    over(rig.domains[0].map(rw(100, 103, 0)).unwrap());
    let late = rig.iommu.add_endpoint(30, EndpointConfig::default()).unwrap();
    rig.handle.add(late.id(), rig.fake.device(7, false, None)).unwrap();
    over(late.bind_with(&rig.binding).unwrap());
    over(late.attach(1).unwrap());
    assert_eq!(rig.handle.dirty().unwrap(), [gpas(0, 3)]);
}

#[test]
fn an_error_of_tracking_is_the_callers_and_loses_nothing() {
    for errno in [Errno::EINVAL, Errno::ENOMEM, Errno::EOPNOTSUPP, Errno::EFAULT] {
        let rig = Rig::new();
        over(rig.domains[0].map(rw(100, 100, 0)).unwrap());
        over(rig.domains[0].map(rw(102, 102, 2)).unwrap());
        rig.fake.fail(Kind::Track, 0, errno);
        assert_eq!(rig.handle.dirty_start(), Err(errno));
        rig.fake.heal();
        rig.handle.dirty_start().unwrap();
        assert!(rig.fake.write(rig.devices[0], 100 * PAGE) && rig.fake.write(rig.devices[0], 102 * PAGE));
        rig.fake.fail(Kind::Dirty, 1, errno);
        assert_eq!(rig.handle.dirty(), Err(errno));
        rig.fake.heal();
        assert_eq!(rig.handle.dirty().unwrap(), [gpas(0, 0), gpas(2, 2)], "the first was read already");
        rig.check();
    }
}
