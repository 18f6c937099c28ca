//! Windows that come and go, of any page size, side by side.

use viommu::fuzzing::recording::Event;
use viommu::{Access, EndpointConfig, FaultReason, Gpa, Iova, Mapping};
use viommu_spapr::spec::{Code, PageSizes, RtasError};
use viommu_spapr::{BusConfig, BusError, Merge, Query, Slot, Spapr, Window};

use crate::rig::{A, B, DYNAMIC, LIOBN, RW, Rig, builder, code, map, range, type1, unmap};

#[test]
fn a_host_bridge_begins_with_its_default_window() {
    let rig = Rig::new();
    assert_eq!(rig.bus.windows(), [Window::new(LIOBN, 0, 30, 12).unwrap()]);
    assert_eq!(rig.bus.query(), Query { windows: 1, entries: 1 << 31, page_sizes: PageSizes::all() });
    assert_eq!(rig.liobn.window(), rig.bus.windows().first().copied());
}

#[test]
fn an_entry_is_as_large_as_its_windows_page() {
    for shift in [12, 16, 21, 24] {
        let mut rig = Rig::new();
        let window = rig.bus.create_window(shift, 40).unwrap();
        assert_eq!((window.liobn, window.range), (LIOBN | 1, range(DYNAMIC, 1 << 40)));
        let mirror = rig.mirror(type1());
        let liobn = rig.spapr.liobn(window.liobn).unwrap();
        let bytes = 1_u64 << shift;
        let (at, gpa) = (DYNAMIC + 3 * bytes, 2 * bytes);
        assert_eq!(code(liobn.put_tce(at + bytes - 1, gpa | RW)), Code::Success);
        assert_eq!(mirror.take(), [Event::Map(Mapping::new(Iova(at), bytes, Gpa(gpa), Access::RW).unwrap())]);
        assert_eq!(liobn.get_tce(at + 5).wait().unwrap().value, gpa | RW);
        if shift > 12 {
            assert_eq!(code(liobn.put_tce(at, 0x1000 | RW)), Code::Parameter, "less than a page");
        }
        rig.check();
    }
}

#[test]
fn windows_of_two_page_sizes_live_in_one_address_space() {
    let mut rig = Rig::new();
    let big = rig.spapr.liobn(rig.bus.create_window(24, 34).unwrap().liobn).unwrap();
    let mirror = rig.mirror(type1());
    rig.put(0x1000, A | RW);
    assert_eq!(code(big.put_tce(DYNAMIC, 0x100_0000 | RW)), Code::Success);
    assert_eq!(mirror.held().len(), 2);
    let mut reader = rig.endpoint.reader("queue").unwrap();
    let guard = reader.enter();
    assert_eq!(guard.translate(Iova(0x1008), Access::READ).unwrap().gpa, Gpa(A + 8));
    assert_eq!(guard.translate(Iova(DYNAMIC + 0x12_3456), Access::READ).unwrap().gpa, Gpa(0x112_3456));
    let outside = guard.translate(Iova(1 << 40), Access::READ).unwrap_err();
    assert_eq!(outside.reason, FaultReason::Unmapped);
    drop(guard);
    // Each is cleared by itself, and the other's addresses are none of its own.
    assert_eq!(code(big.put_tce(0x1000, 0)), Code::Parameter);
    assert_eq!(code(big.stuff_tce(DYNAMIC, 0, 1 << 10)), Code::Success);
    assert_eq!(rig.get(0x1000), A | RW);
    rig.check();
}

#[test]
fn a_window_that_is_removed_takes_its_entries_and_no_others() {
    let mut rig = Rig::new();
    rig.put(0x1000, A | RW);
    let window = rig.bus.create_window(12, 30).unwrap();
    let liobn = rig.spapr.liobn(window.liobn).unwrap();
    code(liobn.put_tce(DYNAMIC, B | RW));
    code(liobn.put_tce(DYNAMIC + 0x1000, B | RW));
    let mirror = rig.mirror(type1());
    let mut reader = rig.endpoint.reader("queue").unwrap();
    let guard = reader.enter();
    let mut gone = rig.bus.remove_window(window.liobn).unwrap();
    assert_eq!(gone.poll(), None, "a device may be in it");
    drop(guard);
    assert_eq!(gone.poll(), Some(()));
    assert_eq!(mirror.take(), [unmap(DYNAMIC, 0x2000)]);
    assert_eq!(code(liobn.put_tce(DYNAMIC, B | RW)), Code::Parameter);
    assert_eq!(code(liobn.get_tce(DYNAMIC)), Code::Parameter);
    assert_eq!((rig.get(0x1000), liobn.window()), (A | RW, None));
    assert_eq!(rig.bus.remove_window(window.liobn).unwrap_err(), RtasError::Parameter);
    // It comes back empty, and of another shape.
    assert_eq!(rig.bus.create_window(16, 20).unwrap().liobn, window.liobn);
    assert_eq!(liobn.get_tce(DYNAMIC).wait().unwrap().value, 0);
    rig.check();
}

#[test]
fn the_default_window_can_give_way_to_another() {
    let rig = Rig::new();
    rig.bus.create_window(16, 40).unwrap();
    assert_eq!(rig.bus.query().windows, 0);
    assert_eq!(rig.bus.create_window(16, 40), Err(RtasError::Hardware));
    rig.bus.remove_window(LIOBN).unwrap().wait().unwrap();
    assert_eq!(rig.bus.query().windows, 1);
    let window = rig.bus.create_window(16, 32).unwrap();
    assert_eq!(window, Window::new(LIOBN, 0, 32, 16).unwrap());
    rig.bus.reset().unwrap().wait().unwrap();
    assert_eq!(rig.bus.windows(), [Window::new(LIOBN, 0, 30, 12).unwrap()]);
}

#[test]
fn windows_that_cannot_be_are_not_created() {
    let rig = Rig::new();
    for (page_shift, window_shift) in
        [(13, 30), (0, 30), (25, 40), (64, 64), (16, 15), (12, 64), (16, 48), (12, 44), (12, u32::MAX)]
    {
        let refused = rig.bus.create_window(page_shift, window_shift);
        assert_eq!(refused, Err(RtasError::Parameter), "{page_shift}, {window_shift}");
    }
    assert_eq!(rig.bus.windows().len(), 1);
}

#[test]
fn a_window_does_not_overlap_another() {
    let spapr = Spapr::new(builder(), Merge::Never).unwrap();
    let slots = vec![Slot { liobn: 2, start: 1 << 32 }, Slot { liobn: 3, start: 1 << 34 }];
    let config = BusConfig { default_window: None, slots, ..BusConfig::host_bridge(0) };
    let bus = spapr.add_bus(1, config).unwrap();
    assert_eq!(bus.query().windows, 2);
    assert_eq!(bus.create_window(12, 32).unwrap().liobn, 2);
    bus.remove_window(2).unwrap().wait().unwrap();
    assert_eq!(bus.create_window(21, 36).unwrap().liobn, 2);
    assert_eq!(bus.create_window(12, 20), Err(RtasError::Hardware), "its place is taken");
}

#[test]
fn buses_do_not_share_numbers_or_entries() {
    let rig = Rig::new();
    let twice = rig.spapr.add_bus(2, BusConfig::host_bridge(0)).unwrap_err();
    assert!(matches!(twice, BusError::Liobn(liobn) if liobn == LIOBN | 1 || liobn == LIOBN));
    assert!(matches!(rig.spapr.add_bus(1, BusConfig::host_bridge(1)), Err(BusError::Domain(_))));
    let odd = Window { range: range(0x800, 0x1000), ..Window::new(5, 0, 12, 12).unwrap() };
    let config = BusConfig { default_window: Some(odd), ..BusConfig::host_bridge(5) };
    assert!(matches!(rig.spapr.add_bus(3, config), Err(BusError::Window(_))));

    let other = rig.spapr.add_bus(2, BusConfig::host_bridge(1)).unwrap();
    rig.put(0x1000, A | RW);
    assert!(other.domain().is_empty());
    let (endpoint, _) = other.add_endpoint(9, EndpointConfig::default()).unwrap();
    let mut reader = endpoint.reader("queue").unwrap();
    assert!(reader.enter().translate(Iova(0x1000), Access::READ).is_err());
    drop(reader);
    assert!(rig.spapr.remove_bus(2).is_err(), "it has an endpoint");
    endpoint.remove().unwrap().wait().unwrap();
    rig.spapr.remove_bus(2).unwrap().wait().unwrap();
    assert!(rig.spapr.liobn(LIOBN | 0x100).is_none() && rig.spapr.bus(2).is_none());
    assert!(other.windows().is_empty());
    other.reset().unwrap().wait().unwrap();
}

#[test]
fn an_endpoint_that_comes_later_is_filled_alone() {
    let mut rig = Rig::new();
    rig.put(0x1000, A | RW);
    let window = rig.bus.create_window(16, 30).unwrap();
    code(rig.spapr.liobn(window.liobn).unwrap().put_tce(DYNAMIC, A | RW));
    let first = rig.mirror(type1());
    let (endpoint, done) = rig.bus.add_endpoint(9, EndpointConfig::default()).unwrap();
    done.wait().unwrap();
    let (mirror, handle) = viommu::fuzzing::recording::RecordingMirror::new(type1());
    let subscription = endpoint.subscribe_mirror(mirror, viommu::Interest::MIRROR).unwrap();
    let big = Mapping::new(Iova(DYNAMIC), 0x1_0000, Gpa(A), Access::RW).unwrap();
    assert_eq!(handle.take(), [map(0x1000, A | RW), Event::Map(big)]);
    assert_eq!(first.take(), [], "who was there hears nothing");
    rig.put(0x1000, B | RW);
    assert_eq!(handle.take(), [unmap(0x1000, 0x1000), map(0x1000, B | RW)]);
    assert!(subscription.audit().unwrap().is_clean());
    drop(subscription);
    endpoint.remove().unwrap().wait().unwrap();
    rig.check();
}
