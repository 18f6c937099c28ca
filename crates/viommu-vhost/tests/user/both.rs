//! Our front end against our back end.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use viommu::{Access, Gpa, Iova, IovaRange, Mapping};
use viommu_vhost::user::backend::{BackendOptions, DeviceMemory, Ring};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, IommuMemory, Permissions};

use super::support::{Device, LIMIT, PAGE, Vmm, memory, wait};

fn both(options: BackendOptions) -> (Vmm, Device) {
    let (front, back) = UnixStream::pair().unwrap();
    let device = Device::new(back, options);
    let mut vmm = Vmm::new(front, memory(&[(0, 64 * PAGE), (1 << 20, 64 * PAGE)]), LIMIT, || Ok(()));
    vmm.negotiate();
    (vmm, device)
}

fn page(iova: u64, pages: u64, gpa: u64, access: Access) -> Mapping {
    Mapping::new(Iova(iova), pages * PAGE, Gpa(gpa), access).unwrap()
}

#[test]
fn access_is_translated_with_a_miss_and_ends_with_the_unmap() {
    let (vmm, device) = both(BackendOptions::default());
    let mapping = page(0xffff_f000, 1, 0x5000, Access::RW);
    wait(vmm.domain.map(mapping).unwrap());
    let space = device.backend.memory().unwrap();
    space.memory().write_obj(0x1234_5678_u32, GuestAddress(0xffff_f010)).unwrap();
    assert_eq!(vmm.memory.read_obj::<u32>(GuestAddress(0x5010)).unwrap(), 0x1234_5678);
    assert_eq!(space.memory().read_obj::<u32>(GuestAddress(0xffff_f010)).unwrap(), 0x1234_5678);
    let counts = device.backend.counts();
    assert_eq!((counts.misses, counts.updates, counts.invalidates), (1, 1, 0));
    assert!(vmm.subscription.audit().unwrap().is_clean());

    wait(vmm.domain.unmap(mapping.range).unwrap());
    assert_eq!(device.backend.entries(), 0);
    space.memory().read_obj::<u32>(GuestAddress(0xffff_f010)).unwrap_err();
    let counts = vmm.frontend.counts();
    assert_eq!((counts.misses, counts.misses_refused, counts.invalidates), (2, 1, 1));
    // What the back end never had is not taken back.
    wait(vmm.domain.map(page(0x1000, 1, 0x5000, Access::RW)).unwrap());
    wait(vmm.domain.unmap(IovaRange::ALL).unwrap());
    assert_eq!(vmm.frontend.counts().invalidates, 1);
    device.end();
}

#[test]
fn fill_has_the_true_permission_and_a_piece_for_each_region() {
    let (vmm, device) = both(BackendOptions::default());
    wait(vmm.domain.map(page(0x1000, 2, 0x1000, Access::READ)).unwrap());
    let space = device.backend.memory().unwrap();
    space.memory().read_obj::<u8>(GuestAddress(0x1000)).unwrap();
    space.memory().write_obj(1_u8, GuestAddress(0x1000)).unwrap_err();
    assert_eq!(vmm.frontend.counts().misses_refused, 1);
    // The second page came with the first.
    space.memory().read_obj::<u8>(GuestAddress(0x2fff)).unwrap();
    assert_eq!(device.backend.counts().updates, 1);
    // Two mappings in two regions: one access, two misses.
    wait(vmm.domain.map(page(0x1_0000, 1, 63 * PAGE, Access::RW)).unwrap());
    wait(vmm.domain.map(page(0x1_1000, 1, 1 << 20, Access::RW)).unwrap());
    space.memory().write_obj(u64::MAX, GuestAddress(0x1_0ffc)).unwrap();
    assert_eq!(vmm.memory.read_obj::<u32>(GuestAddress(64 * PAGE - 4)).unwrap(), u32::MAX);
    assert_eq!(vmm.memory.read_obj::<u32>(GuestAddress(1 << 20)).unwrap(), u32::MAX);
    assert!(vmm.subscription.audit().unwrap().is_clean());
    device.end();
}

#[test]
fn last_page_of_all_is_an_ordinary_one() {
    let (vmm, device) = both(BackendOptions::default());
    let last = page(u64::MAX - 0xfff, 1, 0x3000, Access::RW);
    wait(vmm.domain.map(last).unwrap());
    let space = device.backend.memory().unwrap();
    space.memory().write_obj(5_u8, GuestAddress(u64::MAX)).unwrap();
    assert_eq!(vmm.memory.read_obj::<u8>(GuestAddress(0x3fff)).unwrap(), 5);
    wait(vmm.domain.unmap(IovaRange::ALL).unwrap());
    assert_eq!(device.backend.entries(), 0);
    device.end();
}

#[test]
fn unmap_waits_for_the_guard_of_the_other_process() {
    let (vmm, device) = both(BackendOptions::default());
    let mapping = page(0x1000, 1, 0x5000, Access::RW);
    wait(vmm.domain.map(mapping).unwrap());
    let space = device.backend.memory().unwrap();
    let guard = space.memory();
    let slice =
        guard.get_slices(GuestAddress(0x1000), 4, Permissions::Write).unwrap().next().unwrap().unwrap();
    let mut done = vmm.domain.unmap(mapping.range).unwrap();
    assert!(done.wait_timeout(Duration::from_millis(200)).is_err());
    slice.write_obj(7_u32, 0).unwrap(); // it is in the middle of it, and may
    assert_eq!(vmm.memory.read_obj::<u32>(GuestAddress(0x5000)).unwrap(), 7);
    drop(guard);
    wait(done);
    space.memory().read_obj::<u32>(GuestAddress(0x1000)).unwrap_err();
    device.end();
}

#[test]
fn entries_when_full_are_dropped_and_asked_for_again() {
    let mut options = BackendOptions::default();
    options.entries = 4;
    let (vmm, device) = both(options);
    for n in 0..16 {
        // Not neighbours, so that each is an entry of its own.
        wait(vmm.domain.map(page(n * 2 * PAGE, 1, n * PAGE, Access::RW)).unwrap());
    }
    let space = device.backend.memory().unwrap();
    for _ in 0..2 {
        for n in 0..16_u64 {
            space.memory().write_obj(n, GuestAddress(n * 2 * PAGE)).unwrap();
            assert!(device.backend.entries() <= 4);
        }
    }
    for n in 0..16_u64 {
        assert_eq!(vmm.memory.read_obj::<u64>(GuestAddress(n * PAGE)).unwrap(), n);
    }
    assert!(device.backend.counts().misses > 16);
    device.end();
}

#[test]
fn device_in_bypass_reaches_guest_physical_addresses() {
    let (mut vmm, device) = both(BackendOptions::default());
    let space = device.backend.memory().unwrap();
    vmm.caller.features(1 << 32);
    space.memory().write_obj(9_u8, GuestAddress(0x2000)).unwrap();
    assert_eq!(vmm.memory.read_obj::<u8>(GuestAddress(0x2000)).unwrap(), 9);
    let ring = super::support::user(&vmm.memory, 0x2000);
    assert_eq!(device.backend.ring_address(ring), Some(GuestAddress(0x2000)));
    space.memory().read_obj::<u8>(GuestAddress(0x4000_0000)).unwrap_err();
    assert_eq!(device.backend.counts().misses, 0);
    device.end();
}

#[test]
fn vm_memorys_own_iommu_memory_misses_and_translates() {
    let (vmm, device) = both(BackendOptions::default());
    wait(vmm.domain.map(page(0x1000, 1, 0x5000, Access::RW)).unwrap());
    let iommu = device.backend.iommu().unwrap();
    let physical = device.backend.physical();
    let space = IommuMemory::new((*physical.memory()).clone(), iommu, true, ());
    space.write_obj(3_u32, GuestAddress(0x1100)).unwrap();
    assert_eq!(vmm.memory.read_obj::<u32>(GuestAddress(0x5100)).unwrap(), 3);
    wait(vmm.domain.unmap(IovaRange::ALL).unwrap());
    space.read_obj::<u32>(GuestAddress(0x1100)).unwrap_err();
    device.end();
}

#[test]
fn batch_when_prepared_misses_nothing() {
    const SIZE: u16 = 8;
    let (vmm, device) = both(BackendOptions::default());
    // Everything at a page of its own, with no neighbour.
    let at = |n: u64| n * 16 * PAGE;
    for n in 1..9 {
        wait(vmm.domain.map(page(at(n), 1, n * PAGE, Access::RW)).unwrap());
    }
    let guest = &vmm.memory;
    let descriptor = |table: u64, n: u64, address: u64, len: u32, flags: u16, next: u16| {
        let at = GuestAddress(table + n * 16);
        guest.write_obj(address, at).unwrap();
        guest.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
        guest.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        guest.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    };
    // Pages: 1 descriptors, 2 available, 3 used, 4 to 6 buffers, 7 an indirect table, 8 a buffer of it.
    descriptor(PAGE, 0, at(4), 100, 1, 5);
    descriptor(PAGE, 5, at(5), 100, 2, 0);
    descriptor(PAGE, 1, at(7), 32, 4, 0);
    descriptor(7 * PAGE, 0, at(8), 10, 1, 1);
    descriptor(7 * PAGE, 1, at(6), 10, 2, 0);
    for (slot, head) in [(7_u64, 0_u16), (0, 1)] {
        guest.write_obj(head, GuestAddress(2 * PAGE + 4 + slot * 2)).unwrap();
    }
    guest.write_obj(9_u16, GuestAddress(2 * PAGE + 2)).unwrap();
    let ring = Ring {
        descriptors: GuestAddress(at(1)),
        available: GuestAddress(at(2)),
        used: GuestAddress(at(3)),
        size: SIZE,
        next: 7,
    };
    let space = device.backend.memory().unwrap();
    space.prepare_ring(&ring, SIZE).unwrap();
    let misses = device.backend.counts().misses;
    let guard = space.memory();
    for n in 1..9 {
        assert!(guard.check_range(GuestAddress(at(n)), 16, Permissions::Read), "{n}");
    }
    for n in [3, 5, 6] {
        assert!(guard.check_range(GuestAddress(at(n)), 16, Permissions::Write), "{n}");
    }
    drop(guard);
    assert_eq!(device.backend.counts().misses, misses);
    // One that points where nothing is says so.
    descriptor(PAGE, 0, at(40), 100, 0, 0);
    space.prepare_ring(&ring, SIZE).unwrap_err();
    device.end();
}

/// One page as its mapper and the devices see it: odd when an unmap of it has completed and no map has begun.
#[derive(Default)]
struct Seen(AtomicU64);

const PAGES: u64 = 8;

/// A device: accesses, each of which must not succeed where all of it was after a completed unmap.
fn device(space: &DeviceMemory, pages: &[Seen], stop: &AtomicBool, successes: &AtomicU32, seed: u64) {
    let mut random = seed | 1;
    while !stop.load(Ordering::Relaxed) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let n = random % PAGES;
        let page = &pages[usize::try_from(n).unwrap()].0;
        let before = page.load(Ordering::SeqCst);
        let at = GuestAddress(n * PAGE + 8 * (seed % 16));
        let outcome = match random >> 32 & 3 {
            0 => space.prepare(|guard| guard.check_range(at, 8, Permissions::Write)).is_ok_and(|found| found),
            _ => space.memory().write_obj(random, at).is_ok(),
        };
        let after = page.load(Ordering::SeqCst);
        if outcome {
            successes.fetch_add(1, Ordering::Relaxed);
            assert!(before != after || before & 1 == 0, "page {n} was reached after its unmap");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 0, ..ProptestConfig::default() })]

    /// Maps and unmaps of one thread, accesses of three: none succeeds after a completed unmap, and no byte of a page
    /// changes while it is not mapped.
    #[test]
    fn nobody_reaches_what_was_unmapped(
        steps in prop::collection::vec((0..PAGES, 0..16_u64, 0..4_u32), 60..120)
    ) {
        let (vmm, back) = both(BackendOptions::default());
        let pages: Arc<Vec<Seen>> = Arc::new((0..PAGES).map(|_| Seen(AtomicU64::new(1))).collect());
        let (stop, successes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let devices: Vec<_> = (1..4_u64).map(|seed| {
            let space = back.backend.memory().unwrap();
            let (pages, stop, successes) = (pages.clone(), stop.clone(), successes.clone());
            thread::spawn(move || device(&space, &pages, &stop, &successes, seed))
        }).collect();
        let mut mapped = [None; 8];
        let mut marks: Vec<(u64, u64)> = Vec::new();
        for (n, target, pause) in steps {
            let (at, page) = (usize::try_from(n).unwrap(), &pages[usize::try_from(n).unwrap()].0);
            match mapped[at] {
                None => {
                    // Each page of memory has one user at a time.
                    if mapped.contains(&Some(target)) {
                        continue;
                    }
                    if let Some(at) = marks.iter().position(|(marked, _)| *marked == target) {
                        let (_, mark) = marks.swap_remove(at);
                        for word in 0..512 {
                            let found = vmm.memory.read_obj::<u64>(GuestAddress(target * PAGE + word * 8)).unwrap();
                            prop_assert_eq!(found, mark, "written after the unmap");
                        }
                    }
                    page.fetch_add(1, Ordering::SeqCst);
                    wait(vmm.domain.map(self::page(n * PAGE, 1, target * PAGE, Access::RW)).unwrap());
                    mapped[at] = Some(target);
                }
                Some(target) => {
                    wait(vmm.domain.unmap(IovaRange::from_len(Iova(n * PAGE), PAGE).unwrap()).unwrap());
                    page.fetch_add(1, Ordering::SeqCst);
                    mapped[at] = None;
                    let mark = 0x00ff_00ff_0000_0000 | n;
                    for word in 0..512 {
                        vmm.memory.write_obj(mark, GuestAddress(target * PAGE + word * 8)).unwrap();
                    }
                    marks.push((target, mark));
                }
            }
            let until = Instant::now() + Duration::from_micros(u64::from(pause) * 300);
            while Instant::now() < until {
                thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
        for device in devices {
            device.join().unwrap();
        }
        prop_assert!(vmm.subscription.audit().unwrap().is_clean());
        prop_assert!(!vmm.subscription.is_fenced());
        prop_assert!(successes.load(Ordering::Relaxed) > 0);
        back.end();
    }
}
