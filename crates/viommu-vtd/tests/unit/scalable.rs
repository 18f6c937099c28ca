//! Scalable mode: the second stage, the first stage, and PASIDs.

use viommu::subscribe::{Interest, Reach};
use viommu::{Access, View};
use viommu_vtd::spec::register as r;
use viommu_vtd::{Config, ConfigError, Stage, Vtd, Width};

use crate::rig::*;

const SECOND: Config = second(true);

const fn second(caching_mode: bool) -> Config {
    Config {
        caching_mode,
        scalable: Some(Stage::Second),
        width: Width::Bits48,
        host_bits: 48,
        pass_through: true,
        device_tlb: false,
        walk_entries: 1 << 20,
    }
}

const fn first(width: Width) -> Config {
    Config { scalable: Some(Stage::First), width, ..second(true) }
}

#[test]
fn the_capabilities_say_which_stage_there_is() {
    let extended = |config| Rig::new(config).read64(r::EXTENDED_CAPABILITY);
    let both = 1 << 43 | 1 << 48 | 1 << 49 | 1 << 40 | 19 << 35;
    let legacy = extended(Config::default());
    assert_eq!(legacy >> 35, 0);
    assert_eq!(extended(SECOND), legacy | both | 1 << 46);
    assert_eq!(extended(first(Width::Bits48)), legacy | both | 1 << 47);
    let capability = |config| Rig::new(config).read64(r::CAPABILITY) >> 56;
    assert_eq!((capability(SECOND), capability(first(Width::Bits48))), (0, 1));
    assert_eq!(capability(first(Width::Bits57)), 1 | 1 << 4);
    let memory = Rig::new(SECOND).memory;
    let outcome = Vtd::new(viommu::Iommu::builder(), memory, first(Width::Bits39));
    assert!(matches!(outcome, Err(ConfigError::Limits(_))));
}

#[test]
fn second_stage_tables_of_a_pasid_entry_are_mirrored_as_those_of_legacy_mode() {
    let (mut rig, endpoint) = Rig::started(SECOND);
    let (_subscription, handle) = mirror(&endpoint);
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    assert_eq!(handle.take(), [mapped(0x1000, 0x1000, 0x8000)]);
    rig.map(root, 0x1000, 0xa000, RW);
    rig.map_large(root, 0x20_0000, 2, 0x40_0000, RW);
    rig.submit(&[pages(1, 0x1000, 0)]);
    assert_eq!(handle.take(), [unmapped(0x1000, 0x1000), mapped(0x1000, 0x1000, 0xa000)]);
    rig.submit(&[pasid_pages(0, 1, 0x20_0000, 9)]);
    assert_eq!(handle.take(), [mapped(0x20_0000, 0x20_0000, 0x40_0000)]);
    // Other tables under a live entry: what is the same in both is not touched.
    let other = rig.table();
    rig.map(other, 0x1000, 0xa000, RW);
    rig.attach(DEVICE, 2, other);
    rig.announce(DEVICE, 2);
    assert_eq!(handle.take(), [unmapped(0x20_0000, 0x20_0000)]);
    // It passes; it vanishes.
    let at = rig.pasid_at(DEVICE, 0);
    rig.poke(at, 4 << 6 | 1);
    rig.submit(&[pasid_entry(0, 2)]);
    assert_eq!(endpoint.view(), Some(View::Identity));
    rig.poke(at, 0);
    rig.submit(&[pasid_entry(0, 2)]);
    assert_eq!((endpoint.view(), handle.held()), (Some(View::Blocked), vec![]));
}

#[test]
fn without_caching_mode_an_entry_is_seen_when_the_device_comes() {
    for config in [second(false), first(Width::Bits48)] {
        let (mut rig, endpoint) = Rig::started(config);
        let mut reader = reader(&endpoint);
        assert!(access(&mut reader, 0x1000, Access::READ).is_err());
        let (root, other) = (rig.table(), rig.table());
        rig.map(root, 0x1000, 0x8000, FIRST_RW);
        rig.map(other, 0x1000, 0x9000, FIRST_RW);
        rig.attach(DEVICE, 1, root);
        assert_eq!(access(&mut reader, 0x1004, Access::WRITE), Ok(0x8004));
        // Other tables are seen when the entry is invalidated; another target when its page is.
        rig.attach(DEVICE, 1, other);
        rig.submit(&[pasid_entry(0, 1), whole_pasid(0, 1)]);
        assert_eq!(access(&mut reader, 0x1000, Access::WRITE), Ok(0x9000));
        rig.map(other, 0x1000, 0xa000, FIRST_RW);
        rig.submit(&[pasid_pages(0, 1, 0x1000, 0)]);
        assert_eq!(access(&mut reader, 0x1000, Access::WRITE), Ok(0xa000));
        rig.unmap(other, 0x1000);
        rig.submit(&[domain(1)]);
        assert!(access(&mut reader, 0x1000, Access::WRITE).is_err());
    }
}

#[test]
fn a_unit_with_a_first_stage_refuses_mirrors_whatever_caching_mode_says() {
    for caching_mode in [true, false] {
        let config = Config { caching_mode, ..first(Width::Bits48) };
        assert!(!config.announces());
        let (rig, endpoint) = Rig::started(config);
        let pasid = rig.vtd.add_pasid(DEVICE, 5).unwrap();
        for endpoint in [&endpoint, &pasid] {
            let (mirror, _handle) = viommu::fuzzing::recording::RecordingMirror::new(Reach::default());
            assert!(endpoint.subscribe_mirror(mirror, Interest::MIRROR).is_err());
        }
        // The register says what was asked for all the same: drivers choose by it.
        assert_eq!(rig.read64(r::CAPABILITY) >> 7 & 1, u64::from(caching_mode));
    }
    assert!(SECOND.announces() && !second(false).announces());
}

#[test]
fn legacy_mode_is_there_as_well() {
    for config in [SECOND, first(Width::Bits48)] {
        let (mut rig, endpoint) = Rig::started_in_legacy_mode(config);
        let root = rig.table();
        rig.map(root, 0x1000, 0x8000, RW);
        rig.attach(DEVICE, 1, root);
        rig.announce(DEVICE, 1);
        assert_eq!(access(&mut reader(&endpoint), 0x1000, Access::WRITE), Ok(0x8000));
        let pasid = rig.vtd.add_pasid(DEVICE, 5).unwrap();
        assert!(access(&mut reader(&pasid), 0x1000, Access::WRITE).is_err());
        assert_eq!(rig.fault_with_pasid(), Some((Some(5), 0x31)));
    }
}

#[test]
fn devices_of_the_upper_half_of_a_bus_have_a_table_of_their_own() {
    let (mut rig, _endpoint) = Rig::started(SECOND);
    let upper = rig.vtd.add_endpoint(0x1f9).unwrap();
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, RW);
    rig.attach(0x1f9, 1, root);
    rig.announce(0x1f9, 1);
    assert_eq!(rig.peek(ROOT + 16) & 1, 0);
    assert_eq!(access(&mut reader(&upper), 0x1000, Access::WRITE), Ok(0x8000));
}

#[test]
fn requests_without_pasid_have_the_one_that_the_context_entry_names() {
    let (mut rig, endpoint) = Rig::started(SECOND);
    let (zero, other) = (rig.table(), rig.table());
    rig.map(zero, 0x1000, 0x8000, RW);
    rig.map(other, 0x1000, 0x9000, RW);
    rig.attach_pasid(DEVICE, 0, 1, zero);
    rig.attach_pasid(DEVICE, 8191, 2, other);
    let context = rig.context_at(DEVICE);
    rig.poke(context + 8, 8191);
    rig.submit(&[device_context(DEVICE)]);
    assert_eq!(access(&mut reader(&endpoint), 0x1000, Access::READ), Ok(0x9000));
    rig.poke(context + 8, 8192);
    rig.submit(&[device_context(DEVICE)]);
    assert!(access(&mut reader(&endpoint), 0x1000, Access::READ).is_err());
    assert_eq!(rig.fault(), Some((DEVICE, 0x43, 0x1000, true)));
}

#[test]
fn each_pasid_sees_its_own_tables_and_hears_of_its_own_invalidations() {
    for config in [SECOND, second(false), first(Width::Bits48)] {
        let (mut rig, endpoint) = Rig::started(config);
        let ids = [1_u64, 64, 8191];
        let endpoints: Vec<_> = ids.map(|id| rig.vtd.add_pasid(DEVICE, id as u32).unwrap()).into();
        let mut readers: Vec<_> = endpoints.iter().map(reader).collect();
        let mut roots = Vec::new();
        for (number, id) in (0..).zip(ids) {
            let root = rig.table();
            rig.map(root, 0x1000, 0x8000 + number * 0x1000, FIRST_RW);
            rig.attach_pasid(DEVICE, id, 10 + number, root);
            rig.announce_pasid(id, 10 + number);
            roots.push(root);
        }
        for (number, reader) in (0..).zip(&mut readers) {
            assert_eq!(access(reader, 0x1000, Access::WRITE), Ok(0x8000 + number * 0x1000));
        }
        // The device's requests without PASID see none of them.
        assert!(access(&mut reader(&endpoint), 0x1000, Access::READ).is_err());
        assert_eq!(rig.fault_with_pasid(), Some((None, 0x59)));
        // One page of one of them goes, then all of another, then the third as a whole.
        rig.unmap(roots[0], 0x1000);
        rig.submit(&[pasid_pages(ids[0], 10, 0x1000, 0)]);
        assert!(access(&mut readers[0], 0x1000, Access::READ).is_err());
        assert_eq!(access(&mut readers[1], 0x1000, Access::READ), Ok(0x9000));
        rig.unmap(roots[1], 0x1000);
        rig.submit(&[whole_pasid(ids[1], 11)]);
        assert!(access(&mut readers[1], 0x1000, Access::READ).is_err());
        let at = rig.pasid_at(DEVICE, ids[2]);
        rig.poke(at, 0);
        rig.submit(&[pasid_entry(ids[2], 12)]);
        assert!(access(&mut readers[2], 0x1000, Access::READ).is_err());
        let mut faults: Vec<_> = std::iter::from_fn(|| rig.fault_with_pasid()).collect();
        faults.sort_unstable();
        let absent = if config.scalable == Some(Stage::First) { 0x71 } else { 0x79 };
        assert_eq!(faults, [(Some(1), absent), (Some(64), absent), (Some(8191), 0x59)]);
    }
}

#[test]
fn a_pasids_mirror_hears_of_its_tables_alone() {
    let (mut rig, endpoint) = Rig::started(SECOND);
    let pasid = rig.vtd.add_pasid(DEVICE, 3).unwrap();
    let (_one, whole) = mirror(&endpoint);
    let (_two, process) = mirror(&pasid);
    let (zero, three) = (rig.table(), rig.table());
    rig.map(zero, 0x1000, 0x8000, RW);
    rig.map(three, 0x1000, 0x9000, RW);
    rig.attach(DEVICE, 1, zero);
    rig.attach_pasid(DEVICE, 3, 2, three);
    rig.announce(DEVICE, 1);
    rig.announce_pasid(3, 2);
    assert_eq!(whole.take(), [mapped(0x1000, 0x1000, 0x8000)]);
    assert_eq!(process.take(), [mapped(0x1000, 0x1000, 0x9000)]);
    rig.unmap(three, 0x1000);
    rig.unmap(zero, 0x1000);
    rig.submit(&[pasid_pages(3, 2, 0x1000, 0)]);
    assert_eq!((whole.take(), process.take()), (vec![], vec![unmapped(0x1000, 0x1000)]));
    // The device goes, and its PASIDs with it.
    rig.vtd.remove_endpoint(DEVICE).unwrap().wait().unwrap();
    assert!(rig.vtd.iommu().domains().is_empty());
    assert!(rig.vtd.remove_pasid(DEVICE, 3).is_err());
}

#[test]
fn interrupts_are_ordinary_addresses_for_a_pasid_and_no_target_for_anybody() {
    for config in [SECOND, first(Width::Bits48)] {
        let (mut rig, endpoint) = Rig::started(config);
        let pasid = rig.vtd.add_pasid(DEVICE, 3).unwrap();
        let root = rig.table();
        rig.map(root, 0xfee0_0000, 0x8000, FIRST_RW);
        rig.map(root, 0x1000, 0xfee0_0000, FIRST_RW);
        rig.attach(DEVICE, 1, root);
        rig.attach_pasid(DEVICE, 3, 1, root);
        rig.announce(DEVICE, 1);
        rig.announce_pasid(3, 1);
        let (mut one, mut two) = (reader(&endpoint), reader(&pasid));
        assert_eq!(access(&mut one, 0xfee0_0010, Access::WRITE), Ok(0xfee0_0010));
        assert_eq!(access(&mut two, 0xfee0_0010, Access::WRITE), Ok(0x8010));
        assert!(access(&mut one, 0x1000, Access::WRITE).is_err());
        assert_eq!(rig.fault_with_pasid(), Some((None, 0x87)));
        assert!(access(&mut two, 0x1000, Access::WRITE).is_err());
        assert_eq!(rig.fault_with_pasid(), Some((Some(3), 0x87)));
    }
}

#[test]
fn add_pasid_where_there_can_be_none_refuses() {
    let (rig, _endpoint) = Rig::started(SECOND);
    assert!(rig.vtd.add_pasid(0x999, 1).is_err());
    assert!(rig.vtd.add_pasid(DEVICE, 1 << 20).is_err());
    let _one = rig.vtd.add_pasid(DEVICE, 1).unwrap();
    assert!(rig.vtd.add_pasid(DEVICE, 1).is_err());
    rig.vtd.remove_pasid(DEVICE, 1).unwrap().wait().unwrap();
    assert!(rig.vtd.add_pasid(DEVICE, 1).is_ok());
    let (legacy, _endpoint) = Rig::started(Config::default());
    assert!(legacy.vtd.add_pasid(DEVICE, 1).is_err());
}

#[test]
fn first_stage_pages_of_every_size_and_both_halves_are_translated() {
    for (width, top) in [(Width::Bits48, 47), (Width::Bits57, 56)] {
        let (mut rig, endpoint) = Rig::started(first(width));
        let root = rig.table();
        let upper = u64::MAX << top;
        rig.map(root, 0x1000, 0x8000, FIRST_READ);
        rig.map(root, upper, 0x9000, FIRST_RW);
        // A large page's bit 12 is none of its address.
        rig.map_large(root, 0x20_0000, 2, 0x40_0000 | 1 << 12, FIRST_RW);
        rig.map_large(root, 1 << 30, 3, 0, FIRST_RW | 1 << 63);
        rig.attach(DEVICE, 1, root);
        rig.announce(DEVICE, 1);
        let mut reader = reader(&endpoint);
        for _ in 0..2 {
            assert_eq!(access(&mut reader, 0x1008, Access::READ), Ok(0x8008));
            assert_eq!(access(&mut reader, upper + 8, Access::WRITE), Ok(0x9008));
            assert_eq!(access(&mut reader, 0x20_1234, Access::WRITE), Ok(0x40_1234));
            assert_eq!(access(&mut reader, (1 << 30) + 0x12_3456, Access::WRITE), Ok(0x12_3456));
        }
        assert!(access(&mut reader, 0x1000, Access::WRITE).is_err());
        assert_eq!(rig.fault(), Some((DEVICE, 0x85, 0x1000, false)));
        for hole in [1 << top, upper - 0x1000] {
            assert!(access(&mut reader, hole, Access::READ).is_err());
            assert_eq!(rig.fault(), Some((DEVICE, 0x80, hole, true)));
        }
    }
}

#[test]
fn first_stage_with_four_levels_where_there_could_be_five_is_what_the_entry_says() {
    let (mut rig, endpoint) = Rig::started(first(Width::Bits57));
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, FIRST_RW);
    rig.attach(DEVICE, 1, root);
    // The table that the first entry of the root has, with four levels.
    let below = rig.peek(root) & !0xfff;
    let at = rig.pasid_at(DEVICE, 0);
    rig.poke(at + 16, below);
    rig.announce(DEVICE, 1);
    assert_eq!(access(&mut reader(&endpoint), 0x1000, Access::WRITE), Ok(0x8000));
    assert!(access(&mut reader(&endpoint), 1 << 48, Access::WRITE).is_err());
    assert_eq!(rig.fault().unwrap().1, 0x80);
}

#[test]
fn first_stage_entries_are_marked_before_a_translation_is_used() {
    const ACCESSED: u64 = 1 << 5;
    const DIRTY: u64 = 1 << 6;
    let (mut rig, endpoint) = Rig::started(first(Width::Bits48));
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, FIRST_RW);
    rig.map(root, 0x2000, 0x9000, FIRST_READ);
    rig.map(root, 0x3000, 0xa000, FIRST_RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    let mut reader = reader(&endpoint);
    let entry = |rig: &mut Rig, iova, level| {
        let at = rig.entry(root, iova, level);
        rig.peek(at) & (ACCESSED | DIRTY)
    };
    // As for a device's TLB: a translation that allows writes marks the page as written.
    assert!(access(&mut reader, 0x1000, Access::READ).is_ok());
    assert_eq!(entry(&mut rig, 0x1000, 1), ACCESSED | DIRTY);
    assert!(access(&mut reader, 0x2000, Access::READ).is_ok());
    assert_eq!(entry(&mut rig, 0x2000, 1), ACCESSED);
    assert_eq!(entry(&mut rig, 0x3000, 1), 0, "not used");
    for level in 2..=4 {
        assert_eq!(entry(&mut rig, 0x1000, level), ACCESSED, "level {level}");
    }
    // What is refused marks nothing.
    let at = rig.entry(root, 0x3000, 1);
    rig.poke(at, 0xa000 | 3);
    assert!(access(&mut reader, 0x3000, Access::READ).is_err());
    assert_eq!((entry(&mut rig, 0x3000, 1), rig.fault().unwrap().1), (0, 0x81));
    // Cleared marks come back after an invalidation.
    let at = rig.entry(root, 0x1000, 1);
    rig.poke(at, 0x8000 | FIRST_RW);
    rig.submit(&[pasid_pages(0, 1, 0x1000, 0)]);
    assert!(access(&mut reader, 0x1000, Access::WRITE).is_ok());
    assert_eq!(entry(&mut rig, 0x1000, 1), ACCESSED | DIRTY);
    // Second-stage entries have no such bits.
    let (mut rig, endpoint) = Rig::started(SECOND);
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    assert!(access(&mut crate::rig::reader(&endpoint), 0x1000, Access::WRITE).is_ok());
    let at = rig.entry(root, 0x1000, 1);
    assert_eq!(rig.peek(at), 0x8000 | RW);
}

#[test]
fn what_the_unit_writes_is_in_the_dirty_bitmap_of_guest_memory_and_nothing_else() {
    for levels in [4, 5] {
        let (mut rig, endpoint) =
            Rig::started(first(if levels == 5 { Width::Bits57 } else { Width::Bits48 }));
        let root = rig.table();
        rig.map(root, 0x1000, 0x8000, FIRST_RW);
        rig.attach(DEVICE, 1, root);
        rig.announce(DEVICE, 1);
        let mut tables: Vec<u64> =
            (1..=levels).map(|level| rig.entry(root, 0x1000, level) & !0xfff).collect();
        tables.sort_unstable();
        rig.written();
        // Marks, in each table on the way.
        assert!(access(&mut reader(&endpoint), 0x1000, Access::READ).is_ok());
        assert_eq!(rig.written(), tables);
        // They are there already; and what is refused leaves none.
        rig.write64(r::IOTLB_COMMAND, 1 << 63 | 1 << 60);
        rig.settle();
        assert!(access(&mut reader(&endpoint), 0x1000, Access::READ).is_ok());
        assert!(access(&mut reader(&endpoint), 0x5000, Access::READ).is_err());
        assert!(rig.written().is_empty());
    }
    // A wait descriptor's status.
    let (mut rig, _endpoint) = Rig::started(SECOND);
    rig.push(&[]);
    rig.written();
    rig.settle();
    assert_eq!(rig.written(), [STATUS]);
}

#[test]
fn first_stage_marks_while_the_driver_changes_entries_are_never_lost_nor_put_on_another() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let (mut rig, endpoint) = Rig::started(first(Width::Bits48));
    let root = rig.table();
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    let at = rig.entry(root, 0x1000, 1);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (endpoint, stop) = (&endpoint, &stop);
        scope.spawn(move || {
            let mut reader = reader(endpoint);
            while !stop.load(Ordering::Relaxed) {
                if let Ok(gpa) = access(&mut reader, 0x1000, Access::WRITE) {
                    assert!(matches!(gpa, 0x8000 | 0x9000), "{gpa:#x}");
                }
            }
        });
        for round in 0..2000_u64 {
            let new = 0x8000 + round % 2 * 0x1000;
            rig.poke(at, new | FIRST_RW);
            rig.submit(&[pasid_pages(0, 1, 0x1000, 0)]);
            let now = rig.peek(at);
            assert!(now & !0x60 == new | FIRST_RW, "{now:#x}");
            // Gone: nothing may come back by a mark.
            rig.poke(at, 0);
            rig.submit(&[pasid_pages(0, 1, 0x1000, 0)]);
            assert_eq!(rig.peek(at), 0);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn device_tlb_descriptors_reach_the_pasid_they_name() {
    use viommu::fuzzing::recording::RecordingCache;
    let (mut rig, endpoint) = Rig::started(Config { device_tlb: true, ..SECOND });
    let pasids = [3, 4].map(|id| rig.vtd.add_pasid(DEVICE, id).unwrap());
    let root = rig.table();
    rig.attach(DEVICE, 1, root);
    (3..5).for_each(|id| rig.attach_pasid(DEVICE, id, 1, root));
    rig.global_invalidation();
    let interest = Interest { kinds: viommu::Kinds::DEVICE_TLB, ..Interest::CACHE };
    let caches: Vec<_> = [&endpoint, &pasids[0], &pasids[1]]
        .map(|endpoint| {
            let (cache, handle) = RecordingCache::new();
            (endpoint.subscribe_cache(cache, interest).unwrap(), handle)
        })
        .into();
    let heard = || caches.iter().map(|(_, handle)| handle.take().len()).collect::<Vec<_>>();
    heard();
    let source = u64::from(DEVICE);
    rig.submit(&[(3 | source << 32, 0x1000)]);
    assert_eq!(heard(), [1, 0, 0]);
    rig.submit(&[(8 | source << 16 | 4 << 32, 0x1000)]);
    assert_eq!(heard(), [0, 0, 1]);
    rig.submit(&[(8 | source << 16 | 9 << 32, 0x1000 | 1 << 11)]);
    assert_eq!(heard(), [0, 0, 0], "a PASID that is not there");
    rig.submit(&[(8 | source << 16 | 4 << 32, 0x1000 | 1)]);
    assert_eq!(heard(), [0, 1, 1], "every PASID");
}

#[test]
fn wide_descriptors_that_are_none_stop_the_queue() {
    for (words, is_good) in [
        ([7 | 3 << 4, 0, 0, 0], true),
        ([7, 0, 0, 0], true),
        ([7 | 1 << 4, 0, 0, 0], true),
        ([7 | 2 << 4, 0, 0, 0], false),
        ([7 | 3 << 4, 1, 0, 0], false),
        ([7 | 3 << 4 | 1 << 6, 0, 0, 0], false),
        ([7 | 3 << 4 | 1 << 52, 0, 0, 0], false),
        ([7 | 3 << 4, 0, 1, 0], false),
        ([7 | 3 << 4, 0, 0, 1], false),
        ([6 | 2 << 4, 0, 0, 0], true),
        ([6 | 3 << 4, 18, 0, 0], true),
        ([6 | 3 << 4, 19, 0, 0], false),
        ([6 | 1 << 4, 0, 0, 0], false),
        ([6, 0, 0, 0], false),
        ([6 | 2 << 4, 0x80, 0, 0], false),
        ([6 | 2 << 4 | 1 << 12, 0, 0, 0], false),
        ([8, 1 << 11, 0, 0], true),
        ([8, 2, 0, 0], false),
        ([9, 0, 0, 0], false),
        ([1 | 1 << 4, 0, 0, 0], true),
    ] {
        let (rig, _endpoint) = Rig::started(SECOND);
        let tail = rig.read64(r::QUEUE_TAIL);
        for (at, word) in (0..).step_by(8).zip(words) {
            rig.poke(QUEUE + tail + at, word);
        }
        rig.write64(r::QUEUE_TAIL, tail + 32);
        rig.settle();
        assert_eq!(rig.read32(r::FAULT_STATUS), if is_good { 0 } else { 1 << 4 }, "{words:x?}");
        assert_eq!(rig.read64(r::QUEUE_HEAD), tail + if is_good { 32 } else { 0 });
    }
    // A tail inside a descriptor.
    let (rig, _endpoint) = Rig::started(SECOND);
    rig.write64(r::QUEUE_TAIL, rig.read64(r::QUEUE_TAIL) + 16);
    rig.settle();
    assert_eq!(rig.read32(r::FAULT_STATUS), 1 << 4);
    // Wide ones, where there is no scalable mode.
    let (rig, _endpoint) = Rig::started(Config::default());
    rig.command(1 << 31);
    rig.write64(r::QUEUE_TAIL, 0);
    rig.write64(r::QUEUE_ADDRESS, QUEUE | 1 << 11);
    rig.command(1 << 31 | 1 << 26);
    rig.write64(r::QUEUE_TAIL, 32);
    rig.settle();
    assert_eq!(rig.read32(r::FAULT_STATUS), 1 << 4);
}
