//! The register page, the queue, and when commands are over.

use viommu::{Access, View};
use viommu_vtd::spec::register as r;
use viommu_vtd::{Config, Msi, Progress, Width};

use crate::rig::*;

#[test]
fn capabilities_say_what_the_unit_does() {
    let rig = Rig::new(Config::default());
    assert_eq!(rig.read32(r::VERSION), 0x10);
    assert_eq!(rig.read64(r::CAPABILITY), 0x00d2_078c_222f_0686);
    assert_eq!(rig.read64(r::EXTENDED_CAPABILITY), 0x0fc3);
    let lazy = Config { caching_mode: false, width: Width::Bits39, pass_through: false, ..Config::default() };
    let rig = Rig::new(lazy);
    assert_eq!(rig.read64(r::CAPABILITY), 0x00d2_078c_2226_0206);
    assert_eq!(rig.read64(r::EXTENDED_CAPABILITY), 0x0f83);
    let mut bytes = [0xff; 3];
    rig.vtd.read(9, &mut bytes);
    assert_eq!(bytes, [0x02, 0x26, 0x22], "any size, anywhere");
    let mut page = [0xff; 8192];
    rig.vtd.read(0, &mut page);
    assert!(page[0x300..].iter().all(|byte| *byte == 0), "no protected memory, nothing behind the page");
}

#[test]
fn translation_is_off_until_the_driver_switches_it_on_and_again_when_it_switches_it_off() {
    let mut rig = Rig::new(Config::default());
    let endpoint = rig.vtd.add_endpoint(DEVICE).unwrap();
    let mut reader = reader(&endpoint);
    assert_eq!(access(&mut reader, 0x1234, Access::WRITE), Ok(0x1234));
    let root = rig.table();
    rig.map(root, 0x4000_0000, 0x8000, RW);
    rig.attach(DEVICE, 5, root);
    rig.start();
    assert_eq!(endpoint.view(), Some(View::Domain(5)));
    assert_eq!(access(&mut reader, 0x4000_0123, Access::WRITE), Ok(0x8123));
    assert!(access(&mut reader, 0x1234, Access::READ).is_err());
    assert!(rig.vtd.is_translating());
    rig.command(1 << 26);
    assert_eq!(rig.read32(r::GLOBAL_STATUS), 1 << 26 | 1 << 30);
    assert_eq!(access(&mut reader, 0x1234, Access::READ), Ok(0x1234));
    assert!(rig.vtd.iommu().domains().is_empty());
}

#[test]
fn translation_is_off_in_the_status_only_when_nobody_uses_what_it_gave() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    let mut reader = reader(&endpoint);
    let guard = reader.enter();
    guard.translate(viommu::Iova(0x1000), Access::READ).unwrap();
    rig.write32(r::GLOBAL_COMMAND, 1 << 26);
    assert_eq!(rig.process(), Progress::Waiting);
    assert_eq!(rig.read32(r::GLOBAL_STATUS) >> 31, 1);
    assert!(!rig.vtd.blockers().is_empty());
    drop(guard);
    assert_eq!(rig.read32(r::GLOBAL_STATUS) >> 31, 0);
}

#[test]
fn a_wait_is_over_only_when_the_device_has_let_go() {
    for caching_mode in [true, false] {
        let (mut rig, endpoint) = Rig::started(Config { caching_mode, ..Config::default() });
        let root = rig.table();
        rig.map(root, 0x1000, 0x8000, RW);
        rig.attach(DEVICE, 1, root);
        rig.announce(DEVICE, 1);
        let mut reader = reader(&endpoint);
        let guard = reader.enter();
        guard.translate(viommu::Iova(0x1000), Access::READ).unwrap();
        rig.unmap(root, 0x1000);
        let before = rig.status();
        let status = rig.push(&[pages(1, 0x1000, 0)]);
        assert_eq!(rig.process(), Progress::Waiting);
        assert_eq!((rig.status(), rig.read64(r::QUEUE_HEAD)), (before, rig.read64(r::QUEUE_TAIL) - 16));
        // What it does from now on finds nothing, though the driver is not answered.
        assert!(guard.probe(viommu::Iova(0x1000), Access::READ).is_err());
        drop(guard);
        assert_eq!(rig.process(), Progress::Idle);
        assert_eq!((rig.status(), rig.read64(r::QUEUE_HEAD)), (status, rig.read64(r::QUEUE_TAIL)));
    }
}

#[test]
fn a_wait_with_an_interrupt_sends_one_until_the_driver_has_seen_it() {
    let (mut rig, _endpoint) = Rig::started(Config::default());
    rig.write32(r::WAIT_DATA, 0x51);
    rig.write32(r::WAIT_ADDRESS, 0xfee0_1000);
    rig.write32(r::WAIT_UPPER, 1);
    rig.submit(&[(5 | 1 << 4, 0)]);
    assert_eq!((rig.read32(r::WAIT_STATUS), rig.read32(r::WAIT_CONTROL)), (1, 3 << 30), "masked at first");
    rig.write32(r::WAIT_CONTROL, 0);
    let msi = Msi { address: 0x1_fee0_1000, data: 0x51 };
    assert_eq!(*rig.interrupts.lock().unwrap(), [msi]);
    rig.submit(&[(5 | 1 << 4, 0)]);
    assert_eq!(rig.interrupts.lock().unwrap().len(), 1);
    rig.write32(r::WAIT_STATUS, 1);
    rig.submit(&[(5 | 1 << 4, 0)]);
    assert_eq!(*rig.interrupts.lock().unwrap(), [msi, msi]);
}

#[test]
fn the_queue_when_it_is_full_goes_round() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let root = rig.table();
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    let mut reader = reader(&endpoint);
    for page in 0..600 {
        let iova = page % 7 * 0x1000;
        rig.map(root, iova, 0x10_0000 + page * 0x1000, RW);
        rig.submit(&[pages(1, iova, 0)]);
        assert_eq!(access(&mut reader, iova, Access::READ), Ok(0x10_0000 + page * 0x1000));
    }
    assert!(rig.vtd.metrics().waits >= 600);
}

#[test]
fn a_descriptor_that_is_none_stops_the_queue_until_the_error_is_cleared() {
    let (mut rig, _endpoint) = Rig::started(Config::default());
    let head = rig.read64(r::QUEUE_HEAD);
    let status = rig.push(&[(0xf, 0)]);
    assert_eq!(rig.process(), Progress::Idle);
    assert_eq!((rig.read32(r::FAULT_STATUS), rig.read64(r::QUEUE_HEAD)), (1 << 4, head));
    assert_eq!(rig.interrupts.lock().unwrap().len(), 1);
    // The driver puts something else there, as Linux does.
    rig.poke(QUEUE + head, 5);
    rig.poke(QUEUE + head + 8, 0);
    assert_eq!(rig.process(), Progress::Idle);
    assert_ne!(rig.status(), status);
    rig.write32(r::FAULT_STATUS, 1 << 4);
    rig.settle();
    assert_eq!((rig.read32(r::FAULT_STATUS), rig.status()), (0, status));
    // A queue that is no memory.
    rig.command(1 << 31);
    rig.write64(r::QUEUE_TAIL, 0);
    rig.write64(r::QUEUE_ADDRESS, RAM);
    rig.command(1 << 31 | 1 << 26);
    rig.write64(r::QUEUE_TAIL, 16);
    assert_eq!(rig.process(), Progress::Idle);
    assert_eq!(rig.read32(r::FAULT_STATUS), 1 << 4);
    assert_eq!(rig.vtd.metrics().queue_errors, 2);
}

#[test]
fn register_based_invalidation_reads_as_busy_until_it_is_over() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let (_subscription, handle) = mirror(&endpoint);
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, RW);
    rig.attach(DEVICE, 1, root);
    rig.write64(r::CONTEXT_COMMAND, 1 << 63 | 3 << 61 | u64::from(DEVICE) << 16);
    rig.settle();
    assert_eq!(rig.read64(r::CONTEXT_COMMAND) >> 59, 0b1111);
    assert_eq!(handle.take(), [mapped(0x1000, 0x1000, 0x8000)]);
    let mut reader = reader(&endpoint);
    let guard = reader.enter();
    guard.translate(viommu::Iova(0x1000), Access::READ).unwrap();
    rig.unmap(root, 0x1000);
    rig.write64(r::INVALIDATE_ADDRESS, 0x1000);
    rig.write32(r::IOTLB_COMMAND, 0);
    rig.write32(r::IOTLB_COMMAND + 4, 1 << 31 | 3 << 28 | 1);
    assert_eq!(rig.process(), Progress::Waiting);
    assert_eq!(rig.read64(r::IOTLB_COMMAND) >> 63, 1);
    assert_eq!(handle.take(), [unmapped(0x1000, 0x1000)]);
    drop(guard);
    assert_eq!(rig.read64(r::IOTLB_COMMAND) >> 57, 0b1_1011);
    // More pages than one invalidation may have: nothing was performed.
    rig.write64(r::INVALIDATE_ADDRESS, 19);
    rig.write64(r::IOTLB_COMMAND, 1 << 63 | 3 << 60 | 1 << 32);
    rig.settle();
    assert_eq!(rig.read64(r::IOTLB_COMMAND) >> 57, 0b1_1000);
}

#[test]
fn a_reset_brings_back_what_was_at_first() {
    for caching_mode in [true, false] {
        let (mut rig, endpoint) = Rig::started(Config { caching_mode, ..Config::default() });
        let root = rig.table();
        rig.map(root, 0x1000, 0x8000, RW);
        rig.attach(DEVICE, 1, root);
        rig.announce(DEVICE, 1);
        let reset = rig.vtd.reset();
        assert!(reset.refused.is_none() && reset.inside.is_empty());
        reset.completion.wait().unwrap();
        assert_eq!((rig.read32(r::GLOBAL_STATUS), rig.read64(r::QUEUE_ADDRESS)), (0, 0));
        assert_eq!(rig.read32(r::FAULT_CONTROL), 1 << 31);
        let mut reader = reader(&endpoint);
        assert_eq!(access(&mut reader, 0x1000, Access::WRITE), Ok(0x1000));
        rig.start();
        assert_eq!(access(&mut reader, 0x1000, Access::WRITE), Ok(0x8000));
    }
}

#[test]
fn endpoints_that_come_and_go_see_what_their_entries_say() {
    for caching_mode in [true, false] {
        let (mut rig, _endpoint) = Rig::started(Config { caching_mode, ..Config::default() });
        let root = rig.table();
        rig.map(root, 0x1000, 0x8000, RW);
        rig.attach(0x18, 1, root);
        rig.context(0x20, 1 | 2 << 2, 2);
        let late = rig.vtd.add_endpoint(0x18).unwrap();
        let passing = rig.vtd.add_endpoint(0x20).unwrap();
        let blocked = rig.vtd.add_endpoint(0x28).unwrap();
        assert_eq!(access(&mut reader(&late), 0x1000, Access::READ), Ok(0x8000));
        assert_eq!(access(&mut reader(&passing), 0x1000, Access::READ), Ok(0x1000));
        assert!(access(&mut reader(&blocked), 0x1000, Access::READ).is_err());
        assert!(rig.vtd.add_endpoint(0x18).is_err());
        rig.vtd.remove_endpoint(0x18).unwrap().wait().unwrap();
        assert!(rig.vtd.remove_endpoint(0x18).is_err());
        assert!(late.view().is_none());
        let again = rig.vtd.add_endpoint(0x18).unwrap();
        assert_eq!(access(&mut reader(&again), 0x1000, Access::READ), Ok(0x8000));
    }
}
