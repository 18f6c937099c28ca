//! Bounds, permissions, places, dirty bits.

use std::sync::{Arc, Mutex};

use viommu::endpoint::{Region, RegionKind};
use viommu::reader::FaultSink;
use viommu::{
    Access, EndpointConfig, Extent, Fault, FaultReason, Gpa, GpaRange, Iova, IovaRange, Mapping, Medium,
    Place,
};
use viommu_memory::{EndpointMemory, EndpointSpace};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryError, GuestMemoryRegion, GuestMemoryResult, GuestRegionMmap, Permissions,
};

use crate::{PAGE, Rig};

fn gpas(start: u64, bytes: u64) -> GpaRange {
    GpaRange::from_len(Gpa(start), bytes).unwrap()
}

fn invalid_at<T>(outcome: &GuestMemoryResult<T>) -> Option<u64> {
    match outcome {
        Err(GuestMemoryError::InvalidGuestAddress(at)) => Some(at.0),
        _ => None,
    }
}

fn byte(rig: &Rig, gpa: u64) -> u8 {
    rig.memory.read_obj(GuestAddress(gpa)).unwrap()
}

#[test]
fn write_over_mappings_that_lie_apart_lands_in_each() {
    let rig = Rig::new();
    rig.map(0x8000_0000, 1, 0x5000, Access::RW);
    rig.map(0x8000_1000, 1, 0x2000, Access::RW);
    rig.map(0x8000_2000, 1, 0x1_4000, Access::RW);
    let data: Vec<u8> = (0..=255).cycle().take(0x1010).collect();
    let mut worker = rig.worker();
    worker.enter().write_slice(&data, GuestAddress(0x8000_0ff8)).unwrap();
    let mut back = vec![0; data.len()];
    rig.memory.read_slice(&mut back[..8], GuestAddress(0x5ff8)).unwrap();
    rig.memory.read_slice(&mut back[8..0x1008], GuestAddress(0x2000)).unwrap();
    rig.memory.read_slice(&mut back[0x1008..], GuestAddress(0x1_4000)).unwrap();
    assert_eq!(back, data);
    let mut through = vec![0; data.len()];
    rig.space().memory().read_slice(&mut through, GuestAddress(0x8000_0ff8)).unwrap();
    assert_eq!(through, data);
}

#[test]
fn mapping_over_two_regions_gives_a_slice_of_each() {
    let rig = Rig::new();
    rig.map(0, 2, 7 * PAGE, Access::RW);
    let mut worker = rig.worker();
    let guard = worker.enter();
    let slices = guard.get_slices(GuestAddress(0x800), 0x1000, Permissions::Read).unwrap();
    let lengths: Vec<_> = slices.map(|slice| slice.unwrap().len()).collect();
    assert_eq!(lengths, [0x800, 0x800]);
}

#[test]
fn access_that_meets_a_hole_or_a_read_only_mapping_touches_nothing() {
    let rig = Rig::new();
    rig.map(0x1000, 1, 0x1000, Access::RW);
    rig.map(0x2000, 1, 0x5000, Access::READ);
    let mut worker = rig.worker();
    let guard = worker.enter();
    let at = GuestAddress(0x1ff0);
    assert_eq!(invalid_at(&guard.write(&[7; 0x20], at)), Some(0x2000));
    assert_eq!(byte(&rig, 0x1ff0), 0);
    assert_eq!(byte(&rig, 0x5000), 0);
    guard.read_slice(&mut [0; 0x20], at).unwrap();
    assert_eq!(invalid_at(&guard.read_slice(&mut [0; 0x1100], at)), Some(0x3000));
    assert!(guard.check_range(at, 0x20, Permissions::Read));
    assert!(!guard.check_range(at, 0x20, Permissions::Write));
    assert!(!guard.check_range(at, 0x1100, Permissions::Read));
}

#[test]
fn slices_without_a_stated_use_need_both_permissions() {
    let rig = Rig::new();
    rig.map(0x1000, 1, 0x1000, Access::READ);
    rig.map(0x2000, 1, 0x2000, Access::RW);
    let mut worker = rig.worker();
    let guard = worker.enter();
    assert!(guard.get_slices(GuestAddress(0x1000), 1, Permissions::No).is_err());
    assert!(guard.get_slices(GuestAddress(0x2000), 1, Permissions::No).is_ok());
}

#[test]
fn device_registers_and_doorbells_are_errors() {
    let doorbells = IovaRange::new(Iova(0xfee0_0000), Iova(0xfeef_ffff)).unwrap();
    let msi = Region { range: doorbells, kind: RegionKind::Msi };
    let registers = Extent { range: gpas(0x10_0000, PAGE), medium: Medium::Mmio };
    let rig = Rig::with(EndpointConfig { regions: vec![msi] }, |builder| builder.backing(registers));
    let bar = Mapping::new(Iova(0x2000), PAGE, Gpa(0x10_0000), Access::RW).unwrap();
    rig.domain.map(bar.mmio()).unwrap().wait().unwrap();
    rig.map(0x1000, 1, 0x1000, Access::RW);
    let mut worker = rig.worker();
    let guard = worker.enter();
    assert_eq!(invalid_at(&guard.write_obj(1u32, GuestAddress(0x2000))), Some(0x2000));
    assert_eq!(invalid_at(&guard.write_slice(&[1; 8], GuestAddress(0x1ffc))), Some(0x2000));
    assert_eq!(byte(&rig, 0x1ffc), 0);
    assert!(!guard.check_range(GuestAddress(0x1ffc), 8, Permissions::Read));
    let doorbell = GuestAddress(0xfee0_0010);
    assert_eq!(invalid_at(&guard.write_obj(1u32, doorbell)), Some(doorbell.0));
    // Which of the two it is, the device can ask.
    let hit = guard.translator().probe(Iova(doorbell.0), Access::WRITE).unwrap();
    assert_eq!(hit.place, Place::Msi);
}

#[test]
fn rom_can_be_read_and_not_written() {
    let rig = Rig::new();
    rig.iommu.remove_backing(gpas(20 * PAGE, 4 * PAGE)).unwrap().wait().unwrap();
    let rom = Extent { range: gpas(20 * PAGE, 4 * PAGE), medium: Medium::Rom };
    rig.iommu.add_backing(rom).unwrap().wait().unwrap();
    rig.map(0, 1, 20 * PAGE, Access::RW);
    let mut worker = rig.worker();
    let guard = worker.enter();
    assert_eq!(guard.read_obj::<u32>(GuestAddress(0)).unwrap(), 0);
    assert_eq!(invalid_at(&guard.write_obj(1u32, GuestAddress(0))), Some(0));
    assert_eq!(byte(&rig, 20 * PAGE), 0);
}

#[test]
fn last_byte_of_all_is_reached_and_the_one_behind_it_is_an_overflow() {
    let rig = Rig::new();
    rig.map(u64::MAX - 0x1fff, 1, 0x3000, Access::RW);
    rig.map(u64::MAX - 0xfff, 1, 0x1000, Access::RW);
    let mut worker = rig.worker();
    let guard = worker.enter();
    guard.write_slice(&[9; 0x1100], GuestAddress(u64::MAX - 0x10ff)).unwrap();
    assert_eq!((byte(&rig, 0x3f00), byte(&rig, 0x1fff)), (9, 9));
    assert!(guard.check_range(GuestAddress(u64::MAX), 1, Permissions::Write));
    let past = guard.write_slice(&[9; 2], GuestAddress(u64::MAX));
    assert!(matches!(past, Err(GuestMemoryError::GuestAddressOverflow)));
    assert!(!guard.check_range(GuestAddress(u64::MAX), 2, Permissions::Write));
    assert!(!guard.check_range(GuestAddress(1), usize::MAX, Permissions::Write));
}

#[test]
fn access_of_no_bytes_succeeds_anywhere() {
    let rig = Rig::new();
    let mut worker = rig.worker();
    let guard = worker.enter();
    for at in [0, 0x1234_5678, u64::MAX] {
        let at = GuestAddress(at);
        assert!(guard.check_range(at, 0, Permissions::ReadWrite));
        assert_eq!(guard.get_slices(at, 0, Permissions::Write).unwrap().count(), 0);
        guard.write_slice(&[], at).unwrap();
        guard.read_slice(&mut [], at).unwrap();
    }
}

#[test]
fn dirty_bits_are_those_of_the_guest_physical_pages() {
    let rig = Rig::new();
    rig.map(0x8000_0000, 1, 0x5000, Access::RW);
    rig.map(0x8000_1000, 1, 0x1_5000, Access::RW);
    rig.map(0x8000_2000, 1, 0x6000, Access::RW);
    let mut worker = rig.worker();
    let guard = worker.enter();
    guard.read_slice(&mut [0; 0x1010], GuestAddress(0x8000_0ff8)).unwrap();
    guard.write_slice(&[1; 0x10], GuestAddress(0x8000_0ff8)).unwrap();
    let mut dirty = Vec::new();
    for region in rig.memory.iter() {
        for offset in (0..region.len()).step_by(0x1000) {
            if region.bitmap().dirty_at(usize::try_from(offset).unwrap()) {
                dirty.push(region.start_addr().0 + offset);
            }
        }
    }
    assert_eq!(dirty, [0x5000, 0x1_5000]);
}

#[derive(Default)]
struct Faults(Mutex<Vec<Fault>>);

impl FaultSink for Faults {
    fn fault(&self, fault: &Fault) {
        self.0.lock().unwrap().push(*fault);
    }
}

#[test]
fn accesses_report_their_fault_and_questions_do_not() {
    let faults = Arc::new(Faults::default());
    let rig = Rig::with(EndpointConfig::default(), |builder| builder.faults(faults.clone()));
    rig.map(0x1000, 1, 0x1000, Access::READ);
    let mut worker = rig.worker();
    let guard = worker.enter();
    assert!(!guard.check_range(GuestAddress(0x1000), 0x2000, Permissions::Read));
    assert!(faults.0.lock().unwrap().is_empty());
    guard.read_slice(&mut [0; 0x1100], GuestAddress(0x1000)).unwrap_err();
    guard.write_obj(1u8, GuestAddress(0x1004)).unwrap_err();
    let seen: Vec<_> = faults.0.lock().unwrap().iter().map(|f| (f.iova.0, f.reason)).collect();
    assert_eq!(seen, [(0x2000, FaultReason::Unmapped), (0x1004, FaultReason::Permission)]);
}

#[test]
fn region_that_is_plugged_is_reached_under_the_next_guard() {
    let rig = Rig::new();
    let atomic = GuestMemoryAtomic::new((*rig.memory).clone());
    let space = EndpointSpace::new(rig.endpoint.reader("space").unwrap(), atomic.clone());
    let mut worker = EndpointMemory::new(rig.endpoint.reader("worker").unwrap(), atomic.clone());
    let (before, guard) = (space.memory(), worker.enter());

    let region = GuestRegionMmap::from_range(GuestAddress(0x10_0000), 0x1000, None).unwrap();
    let more = atomic.memory().insert_region(Arc::new(region)).unwrap();
    atomic.lock().unwrap().replace(more);
    let extent = Extent { range: gpas(0x10_0000, PAGE), medium: Medium::Ram };
    let mut done = rig.iommu.add_backing(extent).unwrap();
    assert!(done.is_complete());
    let mapping = Mapping::new(Iova(0x7000), PAGE, Gpa(0x10_0000), Access::RW).unwrap();
    assert!(rig.domain.map(mapping).unwrap().is_complete());

    // The device's address comes back, not the guest's.
    assert_eq!(invalid_at(&before.write_obj(5u32, GuestAddress(0x7010))), Some(0x7010));
    assert_eq!(invalid_at(&guard.write_obj(5u32, GuestAddress(0x7010))), Some(0x7010));
    assert!(!guard.check_range(GuestAddress(0x7010), 4, Permissions::Write));
    drop(guard);
    worker.enter().write_obj(5u32, GuestAddress(0x7010)).unwrap();
    assert_eq!(space.memory().read_obj::<u32>(GuestAddress(0x7010)).unwrap(), 5);
}

#[test]
fn endpoint_that_moves_or_goes_takes_its_view_along() {
    let rig = Rig::new();
    rig.map(0x9000, 1, 0x1000, Access::RW);
    let space = rig.space();
    space.memory().write_obj(1u8, GuestAddress(0x9000)).unwrap();
    rig.endpoint.attach_identity().unwrap().wait().unwrap();
    assert!(!space.memory().check_range(GuestAddress(0x9000 + (16 << 12)), 1, Permissions::Read));
    assert_eq!(space.memory().read_obj::<u8>(GuestAddress(0x1000)).unwrap(), 1);
    rig.endpoint.clone().remove().unwrap().wait().unwrap();
    assert_eq!(invalid_at(&space.memory().read_obj::<u8>(GuestAddress(0x1000))), Some(0x1000));
    let held: Vec<_> = (0..3).map(|_| space.memory()).collect(); // more guards than readers yet
    assert!(held.iter().all(|guard| guard.read_obj::<u8>(GuestAddress(0x1000)).is_err()));
}
