//! What the unit says of its state.

use viommu::{Access, EndpointId};
use viommu_vtd::Config;

use crate::rig::*;

#[test]
fn tables_are_what_lies_in_memory_with_and_without_caching_mode() {
    for caching_mode in [true, false] {
        let mut rig = Rig::new(Config { caching_mode, ..Config::default() });
        rig.vtd.add_endpoint(DEVICE).unwrap();
        assert_eq!(rig.vtd.tables(EndpointId::new(DEVICE.into()), 9), None, "translation is off");
        rig.start();
        assert_eq!(rig.vtd.tables(EndpointId::new(DEVICE.into()), 9), None, "no context entry");
        let root = rig.table();
        rig.map(root, 0x1000, 0x8000, RW);
        rig.map(root, 0x2000, 0xb000, READ);
        rig.map_large(root, 0x4000_0000, 2, 0x40_0000, RW);
        rig.attach(DEVICE, 1, root);
        // Nobody has been told of anything.
        let read_only = viommu::Mapping { access: Access::READ, ..extent(0x2000, 0x1000, 0xb000) };
        let all = [extent(0x1000, 0x1000, 0x8000), read_only, extent(0x4000_0000, 0x20_0000, 0x40_0000)];
        let view = rig.vtd.tables(EndpointId::new(DEVICE.into()), 3).unwrap();
        assert_eq!((&view.mappings[..], view.whole), (&all[..], true));
        let view = rig.vtd.tables(EndpointId::new(DEVICE.into()), 2).unwrap();
        assert_eq!((&view.mappings[..], view.whole), (&all[..2], false));
        assert_eq!(rig.vtd.tables(EndpointId::new(0x18), 9), None, "another device");
    }
}

#[test]
fn tables_without_an_end_are_given_up() {
    let (mut rig, _endpoint) = Rig::started(Config { walk_entries: 1 << 14, ..Config::default() });
    let root = rig.table();
    // Each table of the third level is one that has nothing but itself below, so there is no leaf at all.
    let empty = rig.table();
    let middle = rig.table();
    for entry in 0..512 {
        rig.poke(root + entry * 8, middle | RW);
        rig.poke(middle + entry * 8, empty | RW);
    }
    rig.attach(DEVICE, 1, root);
    let view = rig.vtd.tables(EndpointId::new(DEVICE.into()), 9).unwrap();
    assert_eq!((view.mappings.len(), view.whole), (0, false));
}

#[test]
fn a_domain_is_followed_while_a_mirror_listens() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let root = rig.table();
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    assert!(!rig.vtd.is_followed(1));
    let (subscription, _handle) = mirror(&endpoint);
    assert!(rig.vtd.is_followed(1));
    drop(subscription);
    assert!(!rig.vtd.is_followed(1));
}

#[test]
fn recent_faults_are_the_last_ones_recorded_or_not() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, READ);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    let mut reader = reader(&endpoint);
    assert_eq!(rig.vtd.recent_faults(), []);
    access(&mut reader, 0x1000, Access::WRITE).unwrap_err();
    access(&mut reader, 0x5000, Access::READ).unwrap_err();
    let recent = rig.vtd.recent_faults();
    // The second one finds the first still pending.
    assert_eq!((rig.vtd.metrics().faults, rig.vtd.metrics().faults_collapsed), (1, 1));
    let seen: Vec<_> = recent.iter().map(|one| (one.fault.iova.0, one.fault.access, one.reason)).collect();
    assert_eq!(seen, [(0x1000, Access::WRITE, Some(5)), (0x5000, Access::READ, Some(6))]);
    for at in 0..40 {
        access(&mut reader, at << 20, Access::READ).unwrap_err();
    }
    let recent = rig.vtd.recent_faults();
    assert_eq!((recent.len(), recent.last().map(|one| one.fault.iova.0)), (16, Some(39 << 20)));
}
