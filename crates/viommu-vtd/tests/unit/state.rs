//! Save and restore.

use proptest::prelude::*;
use viommu::fuzzing::recording::{Event, RecordingMirror};
use viommu::subscribe::{Interest, Reach};
use viommu::{Access, Builder, Endpoint, Iommu, IovaRange};
use viommu_vtd::spec::register as r;
use viommu_vtd::{Config, Msi, RestoreError, STATE_VERSION, SaveError, Saved, Stage};

use crate::rig::*;

fn builder() -> Builder {
    Iommu::builder().ram(0, RAM)
}

/// Everything that a driver can read.
fn page(rig: &Rig) -> Vec<u8> {
    let mut page = vec![0; 4096];
    rig.vtd.read(0, &mut page);
    page
}

/// A device with two pages, and two faults: of another device, and of a write to the second page.
fn busy(config: Config) -> (Rig, Endpoint, u64) {
    let (mut rig, endpoint) = Rig::started(config);
    let other = rig.vtd.add_endpoint(0x18).unwrap();
    rig.write32(r::FAULT_CONTROL, 1 << 31);
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, FIRST_RW);
    rig.map(root, 0x2000, 0x9000, FIRST_READ);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    assert!(access(&mut reader(&other), 0x1000, Access::READ).is_err());
    assert!(access(&mut reader(&endpoint), 0x2000, Access::WRITE).is_err());
    (rig, endpoint, root)
}

/// A unit for the same driver, with the same devices.
fn successor(rig: &Rig, builder: Builder) -> (Rig, Endpoint) {
    let other = rig.successor(builder);
    let endpoint = other.vtd.add_endpoint(DEVICE).unwrap();
    other.vtd.add_endpoint(0x18).unwrap();
    (other, endpoint)
}

fn over_json(saved: &Saved) -> Saved {
    serde_json::from_str(&serde_json::to_string(saved).unwrap()).unwrap()
}

#[test]
fn what_is_saved_is_the_same_after_a_restore_in_every_mode() {
    for caching_mode in [true, false] {
        for scalable in [None, Some(Stage::Second), Some(Stage::First)] {
            let config = Config { caching_mode, scalable, ..Config::default() };
            let (rig, _endpoint, _root) = busy(config);
            let saved = over_json(&rig.vtd.save().unwrap());
            let (mut other, endpoint) = successor(&rig, builder());
            let mirror = config.announces().then(|| mirror(&endpoint));
            other.vtd.restore(&saved).unwrap().wait().unwrap();
            assert_eq!(other.vtd.save().unwrap(), saved);
            assert_eq!(page(&other), page(&rig));
            assert!(other.vtd.is_translating());
            if let Some((subscription, handle)) = &mirror {
                let read_only = viommu::Mapping { access: Access::READ, ..extent(0x2000, 0x1000, 0x9000) };
                assert_eq!(handle.held(), [extent(0x1000, 0x1000, 0x8000), read_only]);
                assert!(subscription.audit().unwrap().is_clean());
            }
            assert_eq!(access(&mut reader(&endpoint), 0x1004, Access::WRITE), Ok(0x8004));
            assert!(access(&mut reader(&endpoint), 0x3000, Access::READ).is_err());
            // The driver goes on where it was: faults that it has not seen, its queue.
            assert_eq!(other.fault().map(|fault| fault.0), Some(0x18));
            assert_eq!(other.fault().map(|fault| (fault.0, fault.2)), Some((DEVICE, 0x2000)));
            other.submit(&[domain(1)]);
        }
    }
}

#[test]
fn an_interrupt_that_was_held_back_comes_after_a_restore() {
    let (rig, ..) = busy(Config::default());
    assert_eq!(rig.read32(r::FAULT_CONTROL), 3 << 30);
    let saved = rig.vtd.save().unwrap();
    let (other, _endpoint) = successor(&rig, builder());
    other.vtd.restore(&saved).unwrap().wait().unwrap();
    assert_eq!(*other.interrupts.lock().unwrap(), []);
    other.write32(r::FAULT_CONTROL, 0);
    assert_eq!(*other.interrupts.lock().unwrap(), [Msi { address: 0xfee0_0000, data: 0x41 }]);
}

#[test]
fn the_root_table_in_use_is_the_one_that_was_set_not_the_one_that_was_written() {
    let (rig, ..) = busy(Config::default());
    rig.write64(r::ROOT_TABLE, 0x30_0000);
    let saved = rig.vtd.save().unwrap();
    assert_eq!((saved.registers.root_table, saved.registers.root_in_use), (0x30_0000, ROOT));
    let (other, endpoint) = successor(&rig, builder());
    other.vtd.restore(&saved).unwrap().wait().unwrap();
    assert_eq!(access(&mut reader(&endpoint), 0x1000, Access::READ), Ok(0x8000));
    assert_eq!(other.read64(r::ROOT_TABLE), 0x30_0000);
    other.command(1 << 31 | 1 << 30 | 1 << 26);
    assert!(access(&mut reader(&endpoint), 0x1000, Access::READ).is_err());
}

#[test]
fn descriptors_in_the_queue_are_done_on_the_other_side_once() {
    let (mut rig, endpoint, root) = busy(Config::default());
    let (_subscription, _handle) = mirror(&endpoint);
    rig.settle();
    rig.unmap(root, 0x1000);
    let first = rig.push(&[pages(1, 0x1000, 0)]);
    // Nothing has looked at the queue yet.
    let saved = rig.vtd.save().unwrap();
    assert_ne!(saved.registers.queue_head, saved.registers.queue_tail);
    let (other, endpoint) = successor(&rig, builder());
    let (_subscription, handle) = mirror(&endpoint);
    other.vtd.restore(&saved).unwrap().wait().unwrap();
    assert_ne!(other.status(), first);
    assert_eq!(other.vtd.metrics().waits, 0, "a restore answers nothing");
    other.settle();
    assert_eq!(other.status(), first);
    assert_eq!((handle.held().len(), other.vtd.metrics().waits), (1, 1));
    assert_eq!(other.read64(r::QUEUE_HEAD), other.read64(r::QUEUE_TAIL));
}

#[test]
fn answers_that_are_out_are_waited_for_before_a_save() {
    let (mut rig, endpoint, root) = busy(Config::default());
    let mut reader = reader(&endpoint);
    let guard = reader.enter();
    guard.translate(viommu::Iova(0x1000), Access::READ).unwrap();
    rig.unmap(root, 0x1000);
    let status = rig.push(&[pages(1, 0x1000, 0)]);
    assert_eq!(rig.process(), viommu_vtd::Progress::Waiting);
    assert!(matches!(rig.vtd.save(), Err(SaveError::Pending(_))));
    drop(guard);
    rig.settle();
    assert_eq!(rig.status(), status);
    rig.vtd.save().unwrap();
}

#[test]
fn a_queue_that_stands_still_goes_on_where_the_error_is_cleared() {
    let (mut rig, ..) = busy(Config::default());
    let tail = rig.read64(r::QUEUE_TAIL);
    rig.push(&[(0xf, 0)]);
    rig.settle();
    let saved = rig.vtd.save().unwrap();
    assert_eq!(saved.faults.status, 1 << 4);
    let (other, _endpoint) = successor(&rig, builder());
    other.vtd.restore(&saved).unwrap().wait().unwrap();
    other.settle();
    assert_eq!(other.read64(r::QUEUE_HEAD), tail);
    other.poke(QUEUE + tail, 2 | 1 << 4);
    other.write32(r::FAULT_STATUS, 1 << 4);
    other.settle();
    assert_eq!(other.read64(r::QUEUE_HEAD), other.read64(r::QUEUE_TAIL));
}

#[test]
fn pasids_see_their_tables_after_a_restore() {
    let config = Config { scalable: Some(Stage::Second), ..Config::default() };
    let (mut rig, _endpoint, _root) = busy(config);
    rig.vtd.add_pasid(DEVICE, 5).unwrap();
    let root = rig.table();
    rig.map(root, 0x7000, 0xa000, RW);
    rig.attach_pasid(DEVICE, 5, 3, root);
    rig.announce_pasid(5, 3);
    let saved = rig.vtd.save().unwrap();
    let (other, endpoint) = successor(&rig, builder());
    let pasid = other.vtd.add_pasid(DEVICE, 5).unwrap();
    let (_subscription, handle) = mirror(&pasid);
    other.vtd.restore(&saved).unwrap().wait().unwrap();
    assert_eq!(handle.held(), [extent(0x7000, 0x1000, 0xa000)]);
    assert_eq!(access(&mut reader(&pasid), 0x7000, Access::WRITE), Ok(0xa000));
    assert!(access(&mut reader(&endpoint), 0x7000, Access::WRITE).is_err());
    // And one that comes later.
    let late = other.vtd.add_pasid(DEVICE, 6).unwrap();
    assert!(access(&mut reader(&late), 0x7000, Access::WRITE).is_err());
}

#[test]
fn what_was_there_before_a_restore_is_gone() {
    let (rig, ..) = busy(Config::default());
    let saved = rig.vtd.save().unwrap();
    // The same memory, another root table, in use.
    let (mut other, endpoint) = successor(&rig, builder());
    let (_subscription, handle) = mirror(&endpoint);
    other.start();
    let (root, tables) = (other.table(), other.table());
    let contexts = other.table();
    other.poke(root, contexts | 1);
    other.map(tables, 0x5000, 0xb000, RW);
    other.poke(contexts + u64::from(DEVICE) * 16 + 8, 2 << 8 | 2);
    other.poke(contexts + u64::from(DEVICE) * 16, tables | 1);
    other.write64(r::ROOT_TABLE, root);
    other.command(1 << 31 | 1 << 30 | 1 << 26);
    assert_eq!(handle.held(), [extent(0x5000, 0x1000, 0xb000)]);
    other.vtd.restore(&saved).unwrap().wait().unwrap();
    assert_eq!(handle.held().len(), 2);
    assert!(access(&mut reader(&endpoint), 0x5000, Access::READ).is_err());
    assert_eq!(other.vtd.save().unwrap(), saved);
    // And one with translation off.
    let fresh = Rig::new(Config::default()).vtd.save().unwrap();
    other.vtd.restore(&fresh).unwrap().wait().unwrap();
    assert_eq!(access(&mut reader(&endpoint), 0x5000, Access::READ), Ok(0x5000));
    assert!(!other.vtd.is_translating() && other.vtd.iommu().domains().is_empty());
}

/// As after a reset.
fn assert_reset(rig: &Rig) {
    assert_eq!(page(rig), page(&Rig::new(*rig.vtd.config())));
    assert!(rig.vtd.iommu().domains().is_empty());
    assert!(!rig.vtd.is_translating());
}

#[test]
fn a_mirror_that_refuses_fails_the_whole_restore() {
    let (rig, ..) = busy(Config::default());
    let saved = rig.vtd.save().unwrap();
    let (other, endpoint) = successor(&rig, builder());
    let (mirror, handle) = RecordingMirror::new(Reach::default());
    let subscription = endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap();
    handle.refuse_nth(1, 1, |event| matches!(event, Event::Map(m) if m.range.start().0 == 0x2000));
    let refused = other.vtd.restore(&saved);
    assert!(matches!(refused, Err(RestoreError::Mirror(id)) if id == endpoint.id()), "{refused:?}");
    assert_reset(&other);
    assert!(subscription.is_fenced() && access(&mut reader(&endpoint), 0x1000, Access::READ).is_err());
}

#[test]
fn more_than_the_record_may_have_fails_the_whole_restore() {
    let (rig, ..) = busy(Config::default());
    let saved = rig.vtd.save().unwrap();
    let (other, endpoint) = successor(&rig, builder().domain_mappings(1));
    let (_subscription, _handle) = mirror(&endpoint);
    assert!(matches!(other.vtd.restore(&saved), Err(RestoreError::Cap)));
    assert_reset(&other);
    assert_eq!(access(&mut reader(&endpoint), 0x1000, Access::READ), Ok(0x1000));
}

#[test]
fn a_unit_that_offers_something_else_refuses() {
    let (rig, ..) = busy(Config::default());
    let saved = rig.vtd.save().unwrap();
    let own = Config::default();
    for (config, differs) in [
        (Config { caching_mode: false, ..own }, "CAP"),
        (Config { scalable: Some(Stage::Second), ..own }, "ECAP"),
        (Config { pass_through: false, ..own }, "ECAP"),
        (Config { width: viommu_vtd::Width::Bits39, ..own }, "CAP"),
        (Config { host_bits: 46, ..own }, "the width of a host address"),
    ] {
        let other = Rig::on(rig.memory.clone(), config, builder());
        let refused = other.vtd.restore(&saved);
        assert!(matches!(refused, Err(RestoreError::Differs { what, .. }) if what == differs), "{refused:?}");
    }
    // What a driver does not see may differ.
    let other = Rig::on(rig.memory.clone(), Config { walk_entries: 1 << 16, ..own }, builder());
    other.vtd.restore(&saved).unwrap().wait().unwrap();
}

/// `change` makes it a state that no unit has saved.
#[track_caller]
fn refused(change: impl FnOnce(&mut Saved)) -> RestoreError {
    let (rig, endpoint, _root) = busy(Config::default());
    let (_subscription, handle) = mirror(&endpoint);
    rig.settle();
    let (registers, held) = (page(&rig), handle.held());
    handle.take();
    let mut saved = rig.vtd.save().unwrap();
    change(&mut saved);
    let error = rig.vtd.restore(&saved).unwrap_err();
    assert_eq!((page(&rig), handle.held(), handle.take()), (registers, held, vec![]), "nothing has changed");
    error
}

#[test]
fn what_no_unit_can_have_saved_is_refused() {
    assert!(matches!(refused(|s| s.version = STATE_VERSION + 1), RestoreError::Version(2)));
    let changes: &[fn(&mut Saved)] = &[
        |s| s.registers.global_status |= 1 << 27,
        |s| s.registers.global_status |= 1 << 25,
        |s| s.registers.global_status &= !(1 << 30),
        |s| s.registers.context_command |= 1 << 63,
        |s| s.registers.iotlb_command |= 1 << 63,
        |s| s.registers.queue_head = 8,
        |s| s.registers.queue_head = 0x8_0000,
        |s| s.registers.queue_tail = 1 << 40,
        |s| s.registers.wait_status = 2,
        |s| s.registers.wait_event.control = 1 << 30,
        |s| s.registers.wait_event.control = 3 << 30,
        |s| s.registers.wait_event.control |= 1,
        |s| s.registers.wait_event.data = 0x1_0000,
        |s| s.registers.wait_event.address = 2,
        |s| s.faults.status = 2,
        |s| s.faults.status = 1 << 5,
        |s| s.faults.status = 1 << 8,
        |s| s.faults.event.control = 1 << 30,
        |s| s.faults.records = Default::default(),
        |s| s.faults.records[3][0] = 1,
        |s| s.faults.records[3][1] = 1 << 16,
        |s| s.faults.records[3][1] = 1 << 60,
        |s| s.faults.next = 8,
        |s| s.faults.next = u32::MAX,
    ];
    for (at, change) in changes.iter().enumerate() {
        let error = refused(change);
        assert!(matches!(error, RestoreError::Invalid(_)), "{at}: {error:?}");
    }
    let text = serde_json::to_string(&busy(Config::default()).0.vtd.save().unwrap()).unwrap();
    for (from, to) in [("\"version\":1,", ""), ("\"records\":[", "\"records\":[[0,0],"), (":1,", ":-1,")] {
        assert!(text.contains(from));
        assert!(serde_json::from_str::<Saved>(&text.replacen(from, to, 1)).is_err(), "{from}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is restored reads as it was saved; and the unit lives, whatever the driver's registers point at.
    #[test]
    fn any_state_is_restored_exactly_or_refused(
        status in prop::bits::u32::masked(0xc400_0000),
        words in prop::array::uniform8(any::<u64>()),
        small in prop::array::uniform8(0_u64..RAM),
        is_wild in any::<bool>(),
    ) {
        let (rig, ..) = busy(Config::default());
        let mut saved = rig.vtd.save().unwrap();
        let one = |at: usize| if is_wild { words[at] } else { small[at] };
        let own = &mut saved.registers;
        own.global_status = status | 1 << 30;
        (own.root_table, own.root_in_use) = (one(0), one(1));
        (own.context_command, own.iotlb_command) = (one(2) >> 1, one(3) >> 1);
        (own.queue_address, own.invalidate_address) = (one(4), one(5));
        (own.queue_head, own.queue_tail) = (one(6) & 0x7_fff0, one(7) & 0x7_fff0);
        let (other, endpoint) = successor(&rig, builder());
        let (_subscription, handle) = mirror(&endpoint);
        other.vtd.restore(&saved).unwrap().wait().unwrap();
        prop_assert_eq!(other.vtd.save().unwrap(), saved);
        other.settle();
        let inside = |m: &viommu::Mapping| IovaRange::ALL.covers(m.range);
        prop_assert!(handle.held().iter().all(inside));
        let _ = access(&mut reader(&endpoint), 0x1000, Access::READ);
    }
}

#[test]
fn state_of_the_first_version_is_read() {
    let saved: Saved = serde_json::from_str(include_str!("../data/state-1.json")).unwrap();
    let (rig, ..) = busy(Config::default());
    let (mut other, endpoint) = successor(&rig, builder());
    let (_subscription, handle) = mirror(&endpoint);
    other.vtd.restore(&saved).unwrap().wait().unwrap();
    assert_eq!(handle.held().len(), 2);
    assert_eq!(other.fault(), Some((0x18, 1, 0x1000, true)));
    assert_eq!(other.fault(), Some((DEVICE, 5, 0x2000, false)));
    other.submit(&[domain(1)]);
}

/// Writes the fixture anew: `VIOMMU_WRITE_STATE=FILE cargo test -p viommu-vtd --test unit write_state`.
#[test]
fn write_state_when_asked() {
    let (rig, ..) = busy(Config::default());
    let text = serde_json::to_string(&rig.vtd.save().unwrap()).unwrap();
    assert!(text.contains("\"version\":1"));
    if let Some(file) = std::env::var_os("VIOMMU_WRITE_STATE") {
        std::fs::write(file, text + "\n").unwrap();
    }
}
