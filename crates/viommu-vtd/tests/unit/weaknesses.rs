//! What other models of units with tables in guest memory got wrong, some of it still open: each that a VT-d unit can have
//! has a test. Where another file has it already, the table says so.
//!
//! | weakness | test |
//! | --- | --- |
//! | an unmap is told twice where a page is split by the interrupts | `a_page_split_by_the_interrupts_goes_once_in_each_part` |
//! | every flush unmaps and maps again, so that DMA finds a gap | `a_flush_of_what_is_the_same_tells_nothing` |
//! | tables are walked although nobody but caches listens | `caches_alone_cost_no_walk` |
//! | an invalidation meets a context entry that is not present | `an_invalidation_of_an_entry_that_is_not_there_is_harmless` |
//! | a removal of everything is rounded up and takes the neighbour's mappings | `a_removal_of_everything_stays_inside_each_window` |
//! | a device-TLB invalidation of all addresses is more than a window, or than 64 bits | `a_device_tlb_invalidation_of_everything_is_clipped_to_the_window` |
//! | a device's TLB is switched on under a listener | `device_tlbs_that_come_and_go_lose_no_invalidation` |
//! | a domain, a global or a PASID's flush is not told to caches | `a_flush_of_any_width_reaches_caches` |
//! | a replay for one unmaps, or maps twice, at another | `a_replay_for_one_mirror_is_silent_for_all_others` |
//! | the machine's reset while devices do DMA | `a_reset_names_the_devices_that_were_not_stopped` |
//! | an endpoint that goes leaves a pointer behind | `registers::endpoints_that_come_and_go_see_what_their_entries_say` |
//! | a page cropped to a window keeps its old target | `a_page_over_a_windows_start_moves_its_target_along` |
//! | a cropped range is no power of two | `a_page_over_a_windows_start_moves_its_target_along` |
//! | a replay forgets what is cleared and not yet invalidated | `mirrors::a_mirror_that_comes_late_is_filled_and_forgets_nothing_that_is_pending` |
//! | an unmap has the size of the new entry, not of the old | `mirrors::a_large_page_that_becomes_small_ones_goes_whole_and_comes_back_whole` |
//! | entries that are wrong or unreadable are passed over, and the old mapping stays | `mirrors::entries_that_are_wrong_or_unreadable_are_not_mapped_and_hide_nothing_else` |
//! | context entries that are wrong leave everything mapped | `an_entry_that_is_wrong_in_any_way_unmaps_everything` |
//! | a directory entry over several pages goes, and the model aborts or leaves some | `a_table_that_goes_takes_all_its_pages_and_no_other` |
//! | a change in place is told as a map alone | `mirrors::pages_that_come_change_and_go_are_told_exactly` |
//! | a change of an entry cannot be one act, whatever the host could do | `an_entry_that_changes_in_place_is_one_replace_for_a_mirror_that_can` |
//! | an IOTLB that a read has filled lets a write to a read-only page pass | `a_read_that_fills_an_iotlb_allows_no_write_to_a_read_only_page` |
//! | a large page over two pieces of memory is not reachable | `a_large_page_over_two_pieces_of_memory_is_reachable_as_a_whole` |
//! | a subscriber that goes while its region goes is called later | `a_subscriber_may_leave_while_its_tables_go` |
//! | who asks for all kinds of events is refused, or hears less, since one kind is new | `a_subscriber_that_asks_for_all_kinds_hears_all_of_them` |
//! | the last byte of a page finds the next one | `the_bytes_around_a_page_are_not_in_it` |
//! | a large page is handed out one small page at a time | `a_large_page_is_one_translation` |
//! | a replay probes every page of the address space | `a_replay_costs_what_is_mapped` |
//! | a replay, or a cache's question, reports faults to the guest | `a_replay_reports_no_faults` |
//! | a subscriber's error goes nowhere | `mirrors::a_mirror_that_cannot_follow_is_fenced_and_the_driver_goes_on` |
//! | each device walks and holds the same tables for itself | `mirrors::endpoints_with_one_table_share_one_domain_and_part_one_by_one` |
//! | a mirror is taken though the driver announces nothing | `lazy::mirrors_are_refused_at_subscribe_wherever_the_endpoint_is`, `scalable::a_unit_with_a_first_stage_refuses_mirrors_whatever_caching_mode_says` |
//!
//! Those of virtio-iommu's requests, of hypercalls, of address masks in consumers and of dirty logs are none of this model.

use viommu::fuzzing::recording::{Event, RecordingCache, RecordingMirror};
use viommu::subscribe::{Interest, Reach};
use viommu::{
    Access, Endpoint, Extent, Gpa, GpaRange, Iova, IovaRange, Kinds, Mapping, Medium, Subscription,
};
use viommu_vtd::{Config, Stage, Width};

use crate::rig::*;

const CACHED: Config = Config {
    caching_mode: true,
    scalable: None,
    width: Width::Bits48,
    host_bits: 48,
    pass_through: true,
    device_tlb: true,
    walk_entries: 1 << 20,
};

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(start), Iova(last)).unwrap()
}

fn mirror_of(
    endpoint: &Endpoint,
    start: u64,
    last: u64,
) -> (Subscription, viommu::fuzzing::recording::Handle) {
    let (mirror, handle) = RecordingMirror::new(Reach::default());
    let interest = Interest::MIRROR.within(range(start, last));
    (endpoint.subscribe_mirror(mirror, interest).unwrap(), handle)
}

/// A unit with a device that has one page at 0x1000.
fn with_page(config: Config) -> (Rig, Endpoint, u64) {
    let (mut rig, endpoint) = Rig::started(config);
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, FIRST_RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    (rig, endpoint, root)
}

#[test]
fn a_page_split_by_the_interrupts_goes_once_in_each_part() {
    let mut rig = Rig::with(CACHED, viommu::Iommu::builder().ram(0, 1 << 30));
    let endpoint = rig.vtd.add_endpoint(DEVICE).unwrap();
    rig.start();
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, RW);
    rig.attach(DEVICE, 1, root);
    rig.map_large(root, 3 << 30, 3, 0, RW);
    rig.announce(DEVICE, 1);
    let (_subscription, handle) = mirror(&endpoint);
    rig.settle();
    handle.take();
    let at = rig.entry(root, 3 << 30, 3);
    rig.poke(at, 0);
    rig.submit(&[domain(1)]);
    let gone = handle.take();
    let unmaps: Vec<_> =
        gone.iter().filter_map(|e| if let Event::Unmap(r) = e { Some(*r) } else { None }).collect();
    assert_eq!(unmaps.len(), gone.len(), "{gone:?}");
    let apart = |(n, a): (usize, &IovaRange)| unmaps.iter().skip(n + 1).all(|b| !a.overlaps(*b));
    assert!(unmaps.iter().enumerate().all(apart), "{unmaps:?}");
    for iova in [3 << 30, 0xfedf_ffff, 0xfef0_0000, u64::from(u32::MAX)] {
        assert!(unmaps.iter().any(|r| r.covers(range(iova, iova))), "{iova:#x}");
    }
    assert_eq!(handle.held(), [extent(0x1000, 0x1000, 0x8000)]);
}

#[test]
fn a_flush_of_what_is_the_same_tells_nothing() {
    let (mut rig, endpoint, _root) = with_page(CACHED);
    let (_subscription, handle) = mirror(&endpoint);
    rig.settle();
    handle.take();
    rig.submit(&[(2 | 1 << 4, 0), domain(1), pages(1, 0, 18), device_context(DEVICE), (1 | 1 << 4, 0)]);
    rig.command(1 << 31 | 1 << 30 | 1 << 26);
    assert_eq!(handle.take(), []);
}

#[test]
fn caches_alone_cost_no_walk() {
    let (mut rig, endpoint, _root) = with_page(CACHED);
    let (cache, _handle) = RecordingCache::new();
    let _subscription = endpoint.subscribe_cache(cache, Interest::CACHE).unwrap();
    rig.submit(&[(2 | 1 << 4, 0), domain(1), pages(1, 0, 18)]);
    assert_eq!((rig.vtd.metrics().sync_slices, rig.vtd.metrics().walks), (0, 0));
}

#[test]
fn an_invalidation_of_an_entry_that_is_not_there_is_harmless() {
    for scalable in [None, Some(Stage::Second), Some(Stage::First)] {
        let (mut rig, endpoint) = Rig::started(Config { scalable, ..CACHED });
        rig.submit(&[device_context(DEVICE), device_context(0xfff8), domain(0), pages(9, 0, 0)]);
        rig.submit(&[(3 | u64::from(DEVICE) << 32, 0x1000), (3 | 0xfff8 << 32, 0x1000)]);
        assert!(access(&mut reader(&endpoint), 0x1000, Access::READ).is_err());
        assert_eq!(rig.fault().map(|f| f.1), Some(if scalable.is_some() { 0x39 } else { 1 }));
    }
}

#[test]
fn a_removal_of_everything_stays_inside_each_window() {
    let (mut rig, endpoint, root) = with_page(CACHED);
    let other = rig.vtd.add_endpoint(0x18).unwrap();
    let second = rig.table();
    rig.map(second, 0x1000, 0xb000, RW);
    rig.attach(0x18, 2, second);
    rig.announce(0x18, 2);
    rig.map(root, 0x2000, 0x9000, RW);
    rig.submit(&[domain(1)]);
    let (_one, low) = mirror_of(&endpoint, 0, 0x1fff);
    let (_two, high) = mirror_of(&endpoint, 0x2000, u64::MAX);
    let (_three, neighbour) = mirror(&other);
    rig.settle();
    for handle in [&low, &high, &neighbour] {
        handle.take();
    }
    rig.context(DEVICE, 0, 0);
    rig.submit(&[device_context(DEVICE)]);
    assert_eq!(low.take(), [unmapped(0x1000, 0x1000)]);
    assert_eq!(high.take(), [unmapped(0x2000, 0x1000)]);
    assert_eq!((neighbour.take(), neighbour.held().len()), (vec![], 1));
}

#[test]
fn a_device_tlb_invalidation_of_everything_is_clipped_to_the_window() {
    let (mut rig, endpoint, _root) = with_page(CACHED);
    let (cache, handle) = RecordingCache::new();
    let interest = Interest::all_of(Kinds::DEVICE_TLB).within(range(0x1000, 0xfed_ffff));
    let subscription = endpoint.subscribe_cache(cache, interest).unwrap();
    subscription.fill(Iova(0x1000), Access::READ).unwrap();
    handle.take();
    rig.submit(&[(3 | u64::from(DEVICE) << 32, 0x7fff_ffff_ffff_f001)]);
    assert_eq!((handle.take(), handle.held()), (vec![Event::Invalidate(range(0x1000, 0xfed_ffff))], vec![]));
}

#[test]
fn device_tlbs_that_come_and_go_lose_no_invalidation() {
    let (mut rig, endpoint, root) = with_page(CACHED);
    let (cache, plain) = RecordingCache::new();
    let plain_subscription = endpoint.subscribe_cache(cache, Interest::CACHE).unwrap();
    let (cache, device) = RecordingCache::new();
    let device_subscription = endpoint.subscribe_cache(cache, Interest::all_of(Kinds::DEVICE_TLB)).unwrap();
    for kind in [1_u64, 0, 1] {
        // The translation type: with a device TLB, without, with.
        rig.context(DEVICE, root | 1 | kind << 2, 1 << 8 | 2);
        rig.submit(&[device_context(DEVICE), domain(1)]);
        plain_subscription.fill(Iova(0x1000), Access::READ).unwrap();
        device_subscription.fill(Iova(0x1000), Access::READ).unwrap();
        rig.submit(&[pages(1, 0x1000, 0), (3 | u64::from(DEVICE) << 32, 0x1000)]);
        assert_eq!((plain.held(), device.held()), (vec![], vec![]));
    }
}

#[test]
fn a_flush_of_any_width_reaches_caches() {
    let legacy: &[(u64, u64)] = &[(2 | 1 << 4, 0), domain(1), pages(1, 0x1000, 0)];
    let scalable: &[(u64, u64)] =
        &[(2 | 1 << 4, 0), domain(1), pages(1, 0x1000, 0), whole_pasid(0, 1), pasid_pages(0, 1, 0x1000, 0)];
    let all = [(None, legacy), (Some(Stage::Second), scalable), (Some(Stage::First), scalable)];
    for (kind, flushes) in all {
        for caching_mode in [true, false] {
            let (mut rig, endpoint, _root) = with_page(Config { caching_mode, scalable: kind, ..CACHED });
            let (cache, handle) = RecordingCache::new();
            let subscription = endpoint.subscribe_cache(cache, Interest::CACHE).unwrap();
            for flush in flushes {
                subscription.fill(Iova(0x1000), Access::READ).unwrap();
                assert_eq!(handle.held().len(), 1);
                rig.submit(&[*flush]);
                assert_eq!(handle.held(), [], "{flush:x?}, {kind:?}, caching mode {caching_mode}");
            }
        }
    }
}

#[test]
fn a_replay_for_one_mirror_is_silent_for_all_others() {
    let (rig, endpoint, _root) = with_page(CACHED);
    let (_one, first) = mirror(&endpoint);
    rig.settle();
    first.take();
    for _ in 0..3 {
        let (_late, late) = mirror(&endpoint);
        rig.settle();
        assert_eq!((late.take(), first.take()), (vec![mapped(0x1000, 0x1000, 0x8000)], vec![]));
    }
    assert_eq!(first.take(), [], "nor when one leaves");
}

#[test]
fn a_reset_names_the_devices_that_were_not_stopped() {
    let (rig, endpoint, _root) = with_page(CACHED);
    let mut reader = reader(&endpoint);
    let guard = reader.enter();
    guard.translate(Iova(0x1000), Access::READ).unwrap();
    let mut reset = rig.vtd.reset();
    assert!(!reset.completion.is_complete());
    assert_eq!(reset.inside, [(viommu::EndpointId::new(DEVICE.into()), "test".to_owned())]);
    drop(guard);
    assert!(reset.completion.is_complete());
}

#[test]
fn a_page_over_a_windows_start_moves_its_target_along() {
    let (mut rig, endpoint, root) = with_page(CACHED);
    rig.map_large(root, 0x20_0000, 2, 0x40_0000, RW);
    rig.submit(&[domain(1)]);
    let (_subscription, handle) = mirror_of(&endpoint, 0x20_3000, 0x2f_4fff);
    rig.settle();
    assert_eq!(handle.take(), [mapped(0x20_3000, 0xf_2000, 0x40_3000)]);
    let at = rig.entry(root, 0x20_0000, 2);
    rig.poke(at, 0);
    rig.submit(&[pages(1, 0x20_0000, 0)]);
    assert_eq!(handle.take(), [unmapped(0x20_3000, 0xf_2000)]);
}

#[test]
fn an_entry_that_is_wrong_in_any_way_unmaps_everything() {
    let legacy: &[fn(&mut Rig)] = &[
        |rig| rig.context(DEVICE, 0x20_0011, 2),
        |rig| rig.context(DEVICE, 0x20_0001, 3),
        |rig| rig.context(DEVICE, 0x20_0001 | 3 << 2, 2),
        |rig| rig.poke(ROOT, RAM | 1),
        |rig| rig.poke(ROOT, 0),
        |rig| rig.poke(ROOT, 0x20_0003),
        |rig| rig.attach(DEVICE, 1, RAM),
    ];
    let scalable: &[fn(&mut Rig)] = &[
        |rig| {
            let at = rig.pasid_at(DEVICE, 0);
            rig.poke(at, 1 | 3 << 6);
        },
        |rig| {
            let at = rig.pasid_at(DEVICE, 0);
            rig.poke(at + 8, 1 << 16);
        },
        |rig| {
            let at = rig.context_at(DEVICE);
            rig.poke(at, RAM | 1);
        },
        |rig| {
            let at = rig.context_at(DEVICE);
            rig.poke(at + 8, 0xf_ffff);
        },
        |rig| {
            let at = rig.context_at(DEVICE);
            rig.poke(rig.peek(at) & !0xfff, RAM | 1);
        },
        |rig| rig.poke(ROOT, RAM | 1),
    ];
    for (kind, cases) in [(None, legacy), (Some(Stage::Second), scalable)] {
        for (number, case) in cases.iter().enumerate() {
            let (mut rig, endpoint, _root) = with_page(Config { scalable: kind, ..CACHED });
            let (subscription, handle) = mirror(&endpoint);
            rig.settle();
            assert_eq!(handle.take(), [mapped(0x1000, 0x1000, 0x8000)]);
            case(&mut rig);
            rig.global_invalidation();
            assert_eq!(handle.take(), [unmapped(0x1000, 0x1000)], "{number}");
            assert!(!subscription.is_fenced());
        }
    }
}

#[test]
fn a_table_that_goes_takes_all_its_pages_and_no_other() {
    let (mut rig, endpoint, root) = with_page(CACHED);
    for page in [0x20_0000, 0x20_5000, 0x3f_f000, 0x40_0000] {
        rig.map(root, page, 0x8000, RW);
    }
    rig.submit(&[domain(1)]);
    let (_subscription, handle) = mirror(&endpoint);
    rig.settle();
    let at = rig.entry(root, 0x20_0000, 2);
    rig.poke(at, 0);
    rig.submit(&[pages(1, 0x20_0000, 9)]);
    assert_eq!(handle.held(), [extent(0x1000, 0x1000, 0x8000), extent(0x40_0000, 0x1000, 0x8000)]);
    // The whole address space, likewise.
    rig.poke(root, 0);
    rig.submit(&[(2 | 1 << 4, 0)]);
    assert_eq!(handle.held(), []);
}

#[test]
fn the_bytes_around_a_page_are_not_in_it() {
    for scalable in [None, Some(Stage::Second), Some(Stage::First)] {
        let (_rig, endpoint, _root) = with_page(Config { scalable, ..CACHED });
        let mut reader = reader(&endpoint);
        for _ in 0..2 {
            assert!(access(&mut reader, 0xfff, Access::READ).is_err());
            assert_eq!(access(&mut reader, 0x1000, Access::READ), Ok(0x8000));
            assert_eq!(access(&mut reader, 0x1fff, Access::READ), Ok(0x8fff));
            assert!(access(&mut reader, 0x2000, Access::READ).is_err());
        }
    }
}

#[test]
fn a_large_page_is_one_translation() {
    for scalable in [None, Some(Stage::Second), Some(Stage::First)] {
        let (mut rig, endpoint, root) = with_page(Config { scalable, ..CACHED });
        rig.map_large(root, 0x20_0000, 2, 0x40_0000, FIRST_RW);
        rig.submit(&[domain(1)]);
        let mut reader = reader(&endpoint);
        for _ in 0..2 {
            let guard = reader.enter();
            let found = guard.translate(Iova(0x20_1000), Access::WRITE).unwrap();
            assert_eq!((found.gpa.0, found.last), (0x40_1000, Iova(0x3f_ffff)));
        }
        let (cache, handle) = RecordingCache::new();
        let subscription = endpoint.subscribe_cache(cache, Interest::CACHE).unwrap();
        subscription.fill(Iova(0x20_0000), Access::READ).unwrap();
        assert_eq!(handle.held(), [extent(0x20_0000, 0x20_0000, 0x40_0000)]);
    }
}

#[test]
fn a_replay_costs_what_is_mapped() {
    let (mut rig, endpoint) = Rig::started(Config { width: Width::Bits57, ..CACHED });
    let root = rig.table();
    rig.map(root, (1 << 57) - 0x1000, 0x8000, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    let (_subscription, handle) = mirror(&endpoint);
    rig.settle();
    assert_eq!(handle.held().len(), 1);
    assert!(rig.vtd.metrics().sync_entries <= 5 * 512);
}

#[test]
fn a_replay_reports_no_faults() {
    let (mut rig, endpoint, root) = with_page(CACHED);
    rig.map(root, 0x2000, 1 << 50, RW);
    let (_subscription, _handle) = mirror(&endpoint);
    rig.submit(&[domain(1)]);
    let mut reader = reader(&endpoint);
    assert!(reader.enter().probe(Iova(0x2000), Access::READ).is_err());
    assert_eq!(rig.fault(), None);
    let metrics = rig.vtd.metrics();
    assert_eq!((metrics.faults, metrics.faults_quiet), (0, 0));
}

#[test]
fn an_entry_that_changes_in_place_is_one_replace_for_a_mirror_that_can() {
    for kind in [None, Some(Stage::Second)] {
        let (mut rig, endpoint, root) = with_page(Config { scalable: kind, ..CACHED });
        let (mirror, in_place) = RecordingMirror::new(Reach { replace: true, ..Reach::default() });
        let _in_place = endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap();
        let (_plain, plain) = crate::rig::mirror(&endpoint);
        rig.settle();
        for handle in [&in_place, &plain] {
            handle.take();
        }
        let (old, new) = (extent(0x1000, 0x1000, 0x8000), extent(0x1000, 0x1000, 0x9000));
        rig.map(root, 0x1000, 0x9000, RW);
        rig.submit(&[pages(1, 0x1000, 0)]);
        assert_eq!(in_place.take(), [Event::Replace(old, new)]);
        assert_eq!(plain.take(), [unmapped(0x1000, 0x1000), mapped(0x1000, 0x1000, 0x9000)]);
        // Less access is a change, too.
        let less = Mapping { access: Access::READ, ..new };
        rig.map(root, 0x1000, 0x9000, READ);
        rig.submit(&[pages(1, 0x1000, 0)]);
        assert_eq!(in_place.take(), [Event::Replace(new, less)]);
        assert_eq!(plain.take(), [unmapped(0x1000, 0x1000), Event::Map(less)]);
    }
}

#[test]
fn a_read_that_fills_an_iotlb_allows_no_write_to_a_read_only_page() {
    for scalable in [None, Some(Stage::Second), Some(Stage::First)] {
        for caching_mode in [true, false] {
            let (mut rig, endpoint, root) = with_page(Config { scalable, caching_mode, ..CACHED });
            let allowed = if scalable == Some(Stage::First) { FIRST_READ } else { READ };
            rig.map(root, 0x2000, 0x9000, allowed);
            rig.submit(&[domain(1)]);
            let (cache, handle) = RecordingCache::new();
            let subscription = endpoint.subscribe_cache(cache, Interest::CACHE).unwrap();
            let mut reader = reader(&endpoint);
            for _ in 0..3 {
                assert_eq!(access(&mut reader, 0x2000, Access::READ), Ok(0x9000));
                assert!(access(&mut reader, 0x2000, Access::WRITE).is_err());
            }
            subscription.fill(Iova(0x2000), Access::READ).unwrap();
            assert_eq!(handle.held().iter().map(|m| m.access).collect::<Vec<_>>(), [Access::READ]);
        }
    }
}

#[test]
fn a_large_page_over_two_pieces_of_memory_is_reachable_as_a_whole() {
    let mut rig = Rig::with(CACHED, viommu::Iommu::builder().ram(0, 0x50_0000));
    let rest = GpaRange::from_len(Gpa(0x50_0000), RAM - 0x50_0000).unwrap();
    rig.vtd.iommu().add_backing(Extent { range: rest, medium: Medium::Ram }).unwrap().wait().unwrap();
    let endpoint = rig.vtd.add_endpoint(DEVICE).unwrap();
    rig.start();
    let root = rig.table();
    rig.map_large(root, 0x20_0000, 2, 0x40_0000, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    let (subscription, handle) = mirror(&endpoint);
    rig.settle();
    let bytes: u128 = handle.held().iter().map(|m| m.range.bytes()).sum();
    assert_eq!((handle.held().len(), bytes), (2, 2 << 20));
    assert!(subscription.audit().unwrap().is_clean());
    let mut reader = reader(&endpoint);
    for at in [0x20_0000, 0x2f_ffff, 0x30_0000, 0x3f_ffff] {
        assert_eq!(access(&mut reader, at, Access::WRITE), Ok(at + 0x20_0000));
    }
}

#[test]
fn a_subscriber_may_leave_while_its_tables_go() {
    let (mut rig, endpoint, _root) = with_page(CACHED);
    let (subscription, handle) = mirror(&endpoint);
    rig.settle();
    // Its own callback lets it go.
    let slot = std::sync::Mutex::new(Some(subscription));
    handle.lock().inside = Some(Box::new(move |_| drop(slot.lock().unwrap().take())));
    rig.context(DEVICE, 0, 0);
    rig.submit(&[device_context(DEVICE)]);
    handle.lock().inside = None;
    assert_eq!(handle.held(), []);
    assert!(handle.lock().dropped);
    assert_eq!(rig.vtd.iommu().outstanding(), 0);
    // Nobody is called for what comes later.
    let root = rig.table();
    rig.map(root, 0x1000, 0xa000, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    assert_eq!(access(&mut reader(&endpoint), 0x1000, Access::READ), Ok(0xa000));
}

#[test]
fn a_subscriber_that_asks_for_all_kinds_hears_all_of_them() {
    for device_tlb in [true, false] {
        let (mut rig, endpoint, _root) = with_page(Config { device_tlb, ..CACHED });
        let (cache, handle) = RecordingCache::new();
        let interest = Interest::all_of(Interest::CACHE.kinds | Kinds::DEVICE_TLB);
        let subscription = endpoint.subscribe_cache(cache, interest).unwrap();
        for descriptor in [pages(1, 0x1000, 0), (3 | u64::from(DEVICE) << 32, 0x1000)] {
            subscription.fill(Iova(0x1000), Access::READ).unwrap();
            assert_eq!(handle.held().len(), 1);
            rig.submit(&[descriptor]);
            assert_eq!(handle.held(), [], "{descriptor:x?}");
        }
        // A mirror beside it is not disturbed by what is a device's alone.
        let (_mirror, mirrored) = mirror(&endpoint);
        rig.settle();
        mirrored.take();
        rig.submit(&[(3 | u64::from(DEVICE) << 32, 0x1000)]);
        assert_eq!((mirrored.take(), mirrored.held().len()), (vec![], 1));
    }
}
