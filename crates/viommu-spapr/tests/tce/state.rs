//! Save and restore.

use viommu::{EndpointConfig, Iova, IovaRange};
use viommu_spapr::spec::Code;
use viommu_spapr::{BusConfig, Merge, RestoreError, SaveError, Saved, Spapr, Window};

use crate::rig::{A, B, DYNAMIC, RW, Rig, builder, code, page, type1};

fn programmed() -> Saved {
    let rig = Rig::new();
    rig.put(0x1000, A | RW);
    rig.put(0x2000, B | 1);
    let window = rig.bus.create_window(16, 32).unwrap();
    code(rig.spapr.liobn(window.liobn).unwrap().put_tce(DYNAMIC + 0x1_0000, B | RW));
    rig.spapr.save().unwrap()
}

#[test]
fn what_is_restored_is_what_was_saved_and_everyone_holds_it() {
    let saved = programmed();
    let mut rig = Rig::new();
    rig.put(0x7000, A | RW);
    let mirror = rig.mirror(type1());
    rig.spapr.restore(&saved).unwrap().wait().unwrap();
    assert_eq!(rig.spapr.save().unwrap(), saved);
    assert_eq!((mirror.held().len(), rig.get(0x1000), rig.get(0x7000)), (3, A | RW, 0));
    assert_eq!(rig.put(0x2000, A | RW), Code::Success);
    rig.check();
    let text = serde_json::to_string(&saved).unwrap();
    assert_eq!(serde_json::from_str::<Saved>(&text).unwrap(), saved);
}

#[test]
fn a_save_waits_for_answers() {
    let rig = Rig::new();
    rig.put(0, A | RW);
    let mut reader = rig.endpoint.reader("queue").unwrap();
    let guard = reader.enter();
    let pending = rig.liobn.put_tce(0, 0);
    assert_eq!(rig.spapr.save(), Err(SaveError::Pending(1)));
    drop(guard);
    code(pending);
    assert!(rig.spapr.save().is_ok());
}

#[test]
fn state_that_no_guest_could_have_made_is_refused() {
    let rig = Rig::new();
    rig.put(0x7000, A | RW);
    let good = programmed();
    let with = |change: fn(&mut Saved)| {
        let mut bad = good.clone();
        change(&mut bad);
        let refused = rig.spapr.restore(&bad).unwrap_err();
        assert_eq!(rig.get(0x7000), A | RW, "nothing has changed");
        refused
    };
    assert_eq!(with(|s| s.version = 2), RestoreError::Version(2));
    assert_eq!(with(|s| s.buses[0].number = 2), RestoreError::Bus(2));
    assert_eq!(with(|s| s.buses.clear()), RestoreError::Bus(1));
    assert_eq!(
        with(|s| {
            let again = s.buses[0].clone();
            s.buses.push(again);
        }),
        RestoreError::Bus(1)
    );
    let windows: [fn(&mut Vec<Window>); 6] = [
        |w| w[0].liobn = 77,
        |w| w[1].page_shift = 13,
        |w| w[1].page_shift = 99,
        |w| w[1].range = IovaRange::ALL,
        |w| w[0].range = IovaRange::new(Iova(0), Iova(0xfff)).unwrap(),
        |w| {
            let again = w[1];
            w.push(again);
        },
    ];
    for (at, change) in windows.into_iter().enumerate() {
        let mut bad = good.clone();
        change(&mut bad.buses[0].windows);
        let refused = rig.spapr.restore(&bad);
        // A smaller default window could have been created there, but its entries are outside.
        let due = matches!(refused, Err(RestoreError::Window { .. } | RestoreError::Entry { .. }));
        assert!(due, "{at}: {refused:?}");
    }
    for bad in [
        page(0x1000, A | RW),
        page(0x4000, A),
        page(0x4000_0000, A | RW),
        viommu::Mapping { gpa: viommu::Gpa(A + 8), ..page(0x4000, A | RW) },
        page(0x4000, A | RW).mmio(),
        page(DYNAMIC + 0x5_0000, A | RW),
        viommu::Mapping { range: crate::rig::range(0x4000, 0x2000), ..page(0x4000, A | RW) },
    ] {
        let mut state = good.clone();
        let entries = &mut state.buses[0].entries;
        let at = entries.partition_point(|m| m.range.start() < bad.range.start());
        entries.insert(at, bad);
        let refused = rig.spapr.restore(&state);
        assert!(matches!(refused, Err(RestoreError::Entry { .. })), "{bad:?}: {refused:?}");
    }
}

#[test]
fn a_restore_that_is_refused_leaves_nothing() {
    let saved = programmed();
    let spapr = Spapr::new(builder().domain_mappings(2), Merge::Never).unwrap();
    let bus = spapr.add_bus(1, BusConfig::host_bridge(0)).unwrap();
    bus.add_endpoint(8, EndpointConfig::default()).unwrap().1.wait().unwrap();
    let refused = spapr.restore(&saved).unwrap_err();
    assert!(matches!(refused, RestoreError::Refused { number: 1, .. }));
    assert!(bus.domain().is_empty());
    assert_eq!(bus.windows().len(), 1);
}
