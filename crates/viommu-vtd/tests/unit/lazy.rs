//! Without caching mode: nothing is announced but removals.

use viommu::fuzzing::recording::{RecordingCache, RecordingMirror};
use viommu::subscribe::{Interest, Reach};
use viommu::{Access, Iova, SubscribeError};
use viommu_vtd::Config;

use crate::rig::*;

const LAZY: Config = Config {
    scalable: None,
    caching_mode: false,
    width: viommu_vtd::Width::Bits48,
    host_bits: 48,
    pass_through: true,
    device_tlb: true,
    walk_entries: 1 << 20,
};

#[test]
fn mirrors_are_refused_at_subscribe_wherever_the_endpoint_is() {
    let mut rig = Rig::new(LAZY);
    let endpoint = rig.vtd.add_endpoint(DEVICE).unwrap();
    for translating in [false, true] {
        if translating {
            rig.start();
        }
        let (mirror, _handle) = RecordingMirror::new(Reach::default());
        let refused = endpoint.subscribe_mirror(mirror, Interest::MIRROR);
        assert!(matches!(refused, Err(SubscribeError::NotProduced { .. })), "{refused:?}");
    }
}

#[test]
fn entries_that_appear_are_found_when_the_device_comes() {
    let (mut rig, endpoint) = Rig::started(LAZY);
    let mut reader = reader(&endpoint);
    assert!(access(&mut reader, 0x1000, Access::READ).is_err());
    let root = rig.table();
    rig.attach(DEVICE, 1, root);
    assert!(access(&mut reader, 0x1000, Access::READ).is_err());
    rig.map(root, 0x1000, 0x8000, RW);
    assert_eq!(access(&mut reader, 0x1000, Access::READ), Ok(0x8000));
    let walks = rig.vtd.metrics().walks;
    assert_eq!(access(&mut reader, 0x1008, Access::WRITE), Ok(0x8008));
    assert_eq!(rig.vtd.metrics().walks, walks, "the IOTLB has it");
}

#[test]
fn what_is_cached_stays_until_it_is_invalidated_and_no_longer() {
    let (mut rig, endpoint) = Rig::started(LAZY);
    let mut reader = reader(&endpoint);
    let root = rig.table();
    rig.attach(DEVICE, 1, root);
    for page in 1..4 {
        rig.map(root, page * 0x1000, 0x8000, RW);
        access(&mut reader, page * 0x1000, Access::READ).unwrap();
        rig.unmap(root, page * 0x1000);
    }
    assert_eq!(access(&mut reader, 0x1000, Access::READ), Ok(0x8000), "stale, as the driver allows");
    rig.submit(&[pages(2, 0x1000, 0)]);
    assert!(access(&mut reader, 0x1000, Access::READ).is_ok(), "another domain id");
    rig.submit(&[pages(1, 0x1000, 0)]);
    assert!(access(&mut reader, 0x1000, Access::READ).is_err());
    assert!(access(&mut reader, 0x2000, Access::READ).is_ok());
    rig.submit(&[domain(1)]);
    assert!(access(&mut reader, 0x2000, Access::READ).is_err());
    // The context, likewise.
    let other = rig.table();
    rig.map(root, 0x1000, 0x8000, RW);
    rig.map(other, 0x1000, 0x9000, RW);
    rig.attach(DEVICE, 2, other);
    assert_eq!(access(&mut reader, 0x1000, Access::READ), Ok(0x8000));
    rig.submit(&[device_context(DEVICE)]);
    assert_eq!(access(&mut reader, 0x1000, Access::READ), Ok(0x9000));
    rig.context(DEVICE, 1 | 2 << 2, 2);
    rig.submit(&[device_context(DEVICE)]);
    assert_eq!(access(&mut reader, 0x1000, Access::READ), Ok(0x1000));
}

#[test]
fn caches_hear_of_what_is_invalidated_and_devices_of_their_own() {
    let (mut rig, endpoint) = Rig::started(LAZY);
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, RW);
    rig.context(DEVICE, root | 1 | 1 << 2, 1 << 8 | 2);
    rig.submit(&[device_context(DEVICE)]);
    let (cache, handle) = RecordingCache::new();
    let subscription = endpoint.subscribe_cache(cache, Interest::CACHE).unwrap();
    let (device, device_handle) = RecordingCache::new();
    let kinds = viommu::Kinds::DEVICE_TLB;
    let own = endpoint.subscribe_cache(device, Interest::all_of(kinds)).unwrap();
    subscription.fill(Iova(0x1000), Access::READ).unwrap();
    own.fill(Iova(0x1000), Access::READ).unwrap();
    assert_eq!((handle.held().len(), device_handle.held().len()), (1, 1));
    rig.unmap(root, 0x1000);
    rig.submit(&[pages(1, 0x1000, 0)]);
    assert_eq!((handle.held().len(), device_handle.held().len()), (0, 1));
    rig.submit(&[(3 | u64::from(DEVICE) << 32, 0x1000)]);
    assert_eq!(device_handle.held().len(), 0);
    assert_eq!(rig.vtd.metrics().sync_slices, 0, "nothing is walked for caches");
}
