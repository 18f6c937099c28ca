//! What QEMU's sPAPR model, and its notifiers with any model, get wrong or got wrong: one test each.

use std::time::{Duration, Instant};

use viommu::fuzzing::recording::{Event, RecordingCache, RecordingMirror};
use viommu::subscribe::Reach;
use viommu::{
    Access, EndpointConfig, Extent, FaultReason, Gpa, GpaRange, Interest, Iova, Kinds, Mapping, Medium, Space,
};
use viommu_spapr::spec::Code;
use viommu_spapr::{BusConfig, Merge, Spapr, Window};

use crate::rig::{A, B, DYNAMIC, LIOBN, RW, Rig, builder, code, invalidate, map, page, range, type1, unmap};

#[test]
fn an_unmap_only_subscriber_hears_of_a_change_in_place() {
    let mut rig = Rig::new();
    rig.put(0, A | RW);
    let cache = rig.cache(&[0]);
    rig.put(0, B | RW);
    assert_eq!(cache.take(), [invalidate(0, 0x1000)]);
}

#[test]
fn a_type1_like_mirror_never_gets_a_map_over_a_live_extent() {
    // The mirror itself panics on one.
    let mut rig = Rig::new();
    let mirror = rig.mirror(type1());
    for tce in [A | RW, B | RW, B, B | 1, A | 2, 0, A | RW] {
        rig.put(0x7000, tce);
        rig.check();
    }
    assert_eq!(mirror.held(), [page(0x7000, A | RW)]);
}

#[test]
fn the_kind_of_an_event_does_not_come_from_the_new_permission() {
    let mut rig = Rig::new();
    rig.put(0, A | RW);
    let mirror = rig.mirror(type1());
    // Permission none over nothing is no unmap, and a permission over something is not only a map.
    rig.put(0x1000, 0);
    assert_eq!(mirror.take(), []);
    rig.put(0, A | 1);
    assert_eq!(mirror.take(), [unmap(0, 0x1000), map(0, A | 1)]);
}

#[test]
fn a_reset_tells_everyone() {
    let mut rig = Rig::new();
    rig.put(0, A | RW);
    rig.put(0x9000, B | RW);
    let (mirror, cache) = (rig.mirror(type1()), rig.cache(&[0, 0x9000]));
    rig.spapr.reset().unwrap().wait().unwrap();
    assert_eq!((mirror.held(), cache.held()), (vec![], vec![]));
    assert_eq!(mirror.take().len(), 1, "one unmap for a mirror that takes wide ones");
    assert_eq!(rig.get(0), 0);
    rig.check();
}

#[test]
fn a_mirror_of_a_window_of_128_tib_is_filled_at_once() {
    let mut rig = Rig::new();
    let before = rig.bus.domain().table_bytes();
    let start = Instant::now();
    let window = rig.bus.create_window(16, 47).unwrap();
    let mirror = rig.mirror(type1());
    assert_eq!(mirror.held(), []);
    assert_eq!(rig.bus.domain().table_bytes(), before, "an empty window takes no memory");
    let liobn = rig.spapr.liobn(window.liobn).unwrap();
    let last = window.range.last().0 - 0xffff;
    for at in [DYNAMIC, last] {
        assert_eq!(code(liobn.put_tce(at, A | RW)), Code::Success);
    }
    assert_eq!(mirror.held().len(), 2);
    assert_eq!(code(liobn.stuff_tce(DYNAMIC, 0, 1 << 31)), Code::Success);
    assert_eq!(mirror.held(), []);
    assert!(start.elapsed() < Duration::from_secs(5), "2^31 entries are not walked");
    let used = rig.bus.domain().table_bytes() - before;
    assert!(used <= 128 << 10, "{used} bytes for two entries");
}

#[test]
fn a_device_tlb_may_subscribe() {
    let rig = Rig::new();
    let (cache, handle) = RecordingCache::new();
    let interest = Interest::all_of(Kinds::DEVICE_TLB);
    let subscription = rig.endpoint.subscribe_cache(cache, interest).unwrap();
    rig.endpoint.invalidate_device_tlb(range(0, 0x1000)).unwrap().wait().unwrap();
    assert_eq!(handle.take(), [invalidate(0, 0x1000)]);
    subscription.leave().wait().unwrap();
}

#[test]
fn an_unmap_of_one_subscriber_takes_nothing_of_its_neighbours() {
    let mut rig = Rig::new();
    let (low, low_handle) = RecordingMirror::new(type1());
    let (high, high_handle) = RecordingMirror::new(type1());
    let below = Interest::MIRROR.within(range(0, 0x3000));
    let above = Interest::MIRROR.within(range(0x3000, 0x10_0000));
    let low = rig.endpoint.subscribe_mirror(low, below).unwrap();
    let high = rig.endpoint.subscribe_mirror(high, above).unwrap();
    rig.put_list(0, &[A | RW, A | RW, A | RW, B | RW, B | RW, B | RW]);
    rig.stuff(0, 3);
    assert_eq!((low_handle.held().len(), high_handle.held().len()), (0, 3));
    assert_eq!(low_handle.take().last(), Some(&unmap(0, 0x3000)), "no power of two");
    drop((low, high));
    rig.mirror(type1());
    rig.check();
}

#[test]
fn an_entry_that_straddles_a_window_of_interest_is_clipped_with_its_target() {
    let rig = Rig::new();
    let window = rig.bus.create_window(16, 20).unwrap();
    let (mirror, handle) = RecordingMirror::new(type1());
    let interest = Interest::MIRROR.within(range(DYNAMIC + 0x8000, 0x1_0000));
    let subscription = rig.endpoint.subscribe_mirror(mirror, interest).unwrap();
    let liobn = rig.spapr.liobn(window.liobn).unwrap();
    assert_eq!(code(liobn.put_tce(DYNAMIC, A | RW)), Code::Success);
    let clipped = Mapping::new(Iova(DYNAMIC + 0x8000), 0x8000, Gpa(A + 0x8000), Access::RW).unwrap();
    assert_eq!(handle.take(), [Event::Map(clipped)]);
    subscription.leave().wait().unwrap();
}

#[test]
fn a_translation_at_the_end_of_a_hole_does_not_find_the_next_entry() {
    let rig = Rig::new();
    rig.put(0x2000, A | RW);
    let mut reader = rig.endpoint.reader("queue").unwrap();
    let fault = reader.enter().translate(Iova(0x1fff), Access::READ).unwrap_err();
    assert_eq!(fault.reason, FaultReason::Unmapped);
    assert_eq!(rig.get(0x1fff), 0);
    assert_eq!(rig.get(0x2fff), A | RW);
}

#[test]
fn a_refusal_of_a_mirror_reaches_the_guest() {
    let mut rig = Rig::new();
    let mirror = rig.mirror(Reach { entries: Some(1), ..type1() });
    assert_eq!(rig.put(0, A | RW), Code::Success);
    assert_eq!(rig.put(0x1000, A | RW), Code::Resource);
    mirror.refuse_nth(1, 1, |event| matches!(event, Event::Map(_)));
    rig.stuff(0, 1);
    assert_eq!(rig.put(0, A | RW), Code::Resource);
    assert_eq!((rig.get(0), mirror.held()), (0, vec![]));
}

#[test]
fn a_bad_entry_in_a_list_leaves_nothing_half_done() {
    let mut rig = Rig::new();
    rig.put(0, A | RW);
    let mirror = rig.mirror(type1());
    assert_eq!(rig.put_list(0, &[B | RW, B | RW, B | 0x800 | RW]), Code::Parameter);
    assert_eq!((rig.get(0), mirror.take()), (A | RW, vec![]));
}

#[test]
fn an_entry_over_two_regions_of_memory_is_reachable_as_a_whole() {
    // 16 MiB that hotplug has made of two pieces.
    let rig = Rig::with(viommu::Iommu::builder().ram(0, 0x180_0000), Merge::Never);
    let rest = GpaRange::from_len(Gpa(0x180_0000), 0x80_0000).unwrap();
    rig.spapr.iommu().add_backing(Extent { range: rest, medium: Medium::Ram }).unwrap().wait().unwrap();
    let window = rig.bus.create_window(24, 30).unwrap();
    let mut rig = rig;
    let mirror = rig.mirror(type1());
    let liobn = rig.spapr.liobn(window.liobn).unwrap();
    assert_eq!(code(liobn.put_tce(DYNAMIC, 0x100_0000 | RW)), Code::Success);
    let bytes: u128 = mirror.held().iter().map(|m| m.range.bytes()).sum();
    assert_eq!((mirror.held().len(), bytes), (2, 16 << 20));
    let mut reader = rig.endpoint.reader("queue").unwrap();
    let hit = reader.enter().translate(Iova(DYNAMIC + 0x80_0000), Access::WRITE).unwrap().gpa;
    assert_eq!(hit, Gpa(0x180_0000));
    rig.check();
}

#[test]
fn a_window_of_all_addresses_is_stuffed_in_one_go() {
    let spapr = Spapr::new(builder(), Merge::Never).unwrap();
    let all = Window::new(7, 0, 64, 12);
    let config = BusConfig { default_window: all, slots: Vec::new(), ..BusConfig::host_bridge(0) };
    let bus = spapr.add_bus(7, config).unwrap();
    let (endpoint, _) = bus.add_endpoint(1, EndpointConfig::default()).unwrap();
    let (mirror, handle) = RecordingMirror::new(type1());
    let subscription = endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap();
    let liobn = spapr.liobn(7).unwrap();
    let last = u64::MAX - 0xfff;
    assert_eq!(code(liobn.put_tce(0, A | RW)), Code::Success);
    assert_eq!(code(liobn.put_tce(last, A | RW)), Code::Success);
    assert_eq!(liobn.get_tce(u64::MAX).wait().unwrap().value, A | RW);
    assert_eq!(code(liobn.stuff_tce(0, 0, 1 << 52)), Code::Success);
    assert_eq!(handle.held(), []);
    assert!(subscription.audit().unwrap().is_clean());
}

#[test]
fn a_subscriber_may_leave_while_its_window_goes() {
    let rig = Rig::new();
    rig.put(0, A | RW);
    let (mirror, handle) = RecordingMirror::new(type1());
    let subscription = rig.endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap();
    // Its own callback lets it go.
    let slot = std::sync::Mutex::new(Some(subscription));
    handle.lock().inside = Some(Box::new(move |_| drop(slot.lock().unwrap().take())));
    rig.bus.remove_window(LIOBN).unwrap().wait().unwrap();
    handle.lock().inside = None;
    assert_eq!(handle.held(), []);
    assert!(handle.lock().dropped);
    assert_eq!(rig.spapr.iommu().outstanding(), 0);
}

#[test]
fn devices_of_a_bus_can_share_one_copy() {
    let rig = Rig::new();
    let (second, done) = rig.bus.add_endpoint(9, EndpointConfig::default()).unwrap();
    done.wait().unwrap();
    let (mirror, handle) = RecordingMirror::new(type1());
    let space = Space::Domain(rig.bus.number());
    let shared = rig.spapr.iommu().subscribe_mirror(space, mirror, Interest::MIRROR).unwrap();
    rig.put(0, A | RW);
    assert_eq!(handle.take(), [map(0, A | RW)], "once, for two devices");
    for endpoint in [&rig.endpoint, &second] {
        let mut reader = endpoint.reader("queue").unwrap();
        assert_eq!(reader.enter().translate(Iova(0), Access::RW).unwrap().gpa, Gpa(A));
    }
    shared.leave().wait().unwrap();
}
