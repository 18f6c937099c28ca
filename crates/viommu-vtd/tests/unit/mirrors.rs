//! Caching mode: what mirrors hear.

use viommu::fuzzing::recording::Event;
use viommu::{Access, Extent, Gpa, GpaRange, Iommu, Medium, Space, View};
use viommu_vtd::{Config, Progress};

use crate::rig::*;

#[test]
fn pages_that_come_change_and_go_are_told_exactly() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let (_subscription, handle) = mirror(&endpoint);
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    assert_eq!(handle.take(), [mapped(0x1000, 0x1000, 0x8000)]);
    // A superset of what has changed is compared; what is the same is not told again.
    rig.map(root, 0x2000, 0x9000, RW);
    rig.submit(&[pages(1, 0, 4)]);
    assert_eq!(handle.take(), [mapped(0x2000, 0x1000, 0x9000)]);
    // In place: another target.
    rig.map(root, 0x1000, 0xa000, RW);
    rig.submit(&[pages(1, 0x1000, 0)]);
    assert_eq!(handle.take(), [unmapped(0x1000, 0x1000), mapped(0x1000, 0x1000, 0xa000)]);
    // In place: less is allowed.
    rig.map(root, 0x1000, 0xa000, READ);
    rig.submit(&[pages(1, 0x1000, 0)]);
    let read_only = viommu::Mapping { access: Access::READ, ..extent(0x1000, 0x1000, 0xa000) };
    assert_eq!(handle.take(), [unmapped(0x1000, 0x1000), Event::Map(read_only)]);
    // An invalidation of another domain id is none of ours.
    rig.unmap(root, 0x2000);
    rig.submit(&[domain(2)]);
    assert_eq!(handle.take(), []);
    rig.submit(&[domain(1)]);
    assert_eq!(handle.take(), [unmapped(0x2000, 0x1000)]);
    rig.submit(&[domain(1)]);
    assert_eq!(handle.take(), []);
}

#[test]
fn a_large_page_that_becomes_small_ones_goes_whole_and_comes_back_whole() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let (_subscription, handle) = mirror(&endpoint);
    let root = rig.table();
    rig.map_large(root, 0x20_0000, 2, 0x40_0000, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    assert_eq!(handle.take(), [mapped(0x20_0000, 0x20_0000, 0x40_0000)]);
    // The page's entry now points to a table, and only one of its pages is invalidated.
    let at = rig.entry(root, 0x20_0000, 2);
    rig.poke(at, 0);
    rig.map(root, 0x20_3000, 0x9000, RW);
    rig.map(root, 0x3f_f000, 0xa000, RW);
    rig.submit(&[pages(1, 0x20_3000, 0)]);
    let small = [mapped(0x20_3000, 0x1000, 0x9000), mapped(0x3f_f000, 0x1000, 0xa000)];
    assert_eq!(handle.take(), [&[unmapped(0x20_0000, 0x20_0000)], &small[..]].concat());
    rig.poke(at, 0);
    rig.map_large(root, 0x20_0000, 2, 0x60_0000, RW);
    rig.submit(&[pages(1, 0x20_3000, 0)]);
    assert_eq!(handle.held(), [extent(0x20_0000, 0x20_0000, 0x60_0000)]);
    assert!(handle.take().contains(&mapped(0x20_0000, 0x20_0000, 0x60_0000)));
}

#[test]
fn entries_that_are_wrong_or_unreadable_are_not_mapped_and_hide_nothing_else() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let (_subscription, handle) = mirror(&endpoint);
    let root = rig.table();
    for page in 0..4 {
        rig.map(root, page * 0x1000, 0x8000 + page * 0x1000, RW);
    }
    rig.map(root, 0x4000_0000, 0x8000, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    assert_eq!(handle.held().len(), 5);
    // Reserved bits in one, a table that is no memory for another gigabyte.
    rig.map(root, 0x1000, 1 << 50, RW);
    let at = rig.entry(root, 0x4000_0000, 2);
    rig.poke(at, RAM | RW);
    rig.submit(&[domain(1)]);
    let pages = |list: &[u64]| list.iter().map(|p| extent(p * 0x1000, 0x1000, 0x8000 + p * 0x1000)).collect();
    let left: Vec<_> = pages(&[0, 2, 3]);
    assert_eq!(handle.held(), left);
}

#[test]
fn contexts_that_appear_change_and_vanish_take_the_mirror_along() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let (subscription, handle) = mirror(&endpoint);
    assert_eq!(endpoint.view(), Some(View::Blocked));
    let (one, two) = (rig.table(), rig.table());
    for (root, gpa) in [(one, 0x8000), (two, 0xa000)] {
        rig.map(root, 0x1000, 0x7000, RW);
        rig.map(root, 0x2000, gpa, RW);
    }
    rig.attach(DEVICE, 1, one);
    // Nothing is seen before it is announced, as caching mode says.
    assert_eq!(handle.take(), []);
    rig.announce(DEVICE, 1);
    assert_eq!(handle.held(), [extent(0x1000, 0x1000, 0x7000), extent(0x2000, 0x1000, 0x8000)]);
    handle.take();
    // Other tables under a live context: what is the same in both is not touched.
    rig.attach(DEVICE, 1, two);
    rig.submit(&[device_context(DEVICE), domain(1)]);
    assert_eq!(handle.take(), [unmapped(0x2000, 0x1000), mapped(0x2000, 0x1000, 0xa000)]);
    // Another domain id with the same tables: nothing at all.
    rig.attach(DEVICE, 7, two);
    rig.submit(&[device_context(DEVICE), domain(7)]);
    assert_eq!(handle.take(), []);
    rig.unmap(two, 0x2000);
    rig.submit(&[domain(7)]);
    assert_eq!(handle.take(), [unmapped(0x2000, 0x1000)]);
    // It passes.
    rig.context(DEVICE, 1 | 2 << 2, 2 | 7 << 8);
    rig.submit(&[device_context(DEVICE)]);
    assert_eq!(endpoint.view(), Some(View::Identity));
    assert!(handle.held().iter().all(|m| m.range.start().0 == m.gpa.0) && !handle.held().is_empty());
    // It vanishes.
    rig.context(DEVICE, 0, 0);
    rig.submit(&[device_context(DEVICE)]);
    assert_eq!((handle.held(), endpoint.view()), (vec![], Some(View::Blocked)));
    assert!(rig.vtd.iommu().domains().is_empty());
    assert!(!subscription.is_fenced());
}

#[test]
fn endpoints_with_one_table_share_one_domain_and_part_one_by_one() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let other = rig.vtd.add_endpoint(0x18).unwrap();
    let (_one, first) = mirror(&endpoint);
    let (_two, second) = mirror(&other);
    let (root, new) = (rig.table(), rig.table());
    rig.map(root, 0x1000, 0x8000, RW);
    rig.map(new, 0x1000, 0x8000, RW);
    rig.attach(DEVICE, 3, root);
    rig.attach(0x18, 3, root);
    rig.global_invalidation();
    assert_eq!(rig.vtd.iommu().domains().len(), 1);
    assert_eq!(
        (first.take(), second.take()),
        (vec![mapped(0x1000, 0x1000, 0x8000)], vec![mapped(0x1000, 0x1000, 0x8000)])
    );
    // One of two moves to other tables, with the same domain id: two domains, both of which the id means.
    rig.attach(0x18, 3, new);
    rig.submit(&[device_context(0x18)]);
    assert_eq!(rig.vtd.iommu().domains().len(), 2);
    assert_eq!(first.take(), []);
    second.take();
    rig.unmap(root, 0x1000);
    rig.unmap(new, 0x1000);
    rig.submit(&[pages(3, 0x1000, 0)]);
    assert_eq!(
        (first.take(), second.take()),
        (vec![unmapped(0x1000, 0x1000)], vec![unmapped(0x1000, 0x1000)])
    );
}

#[test]
fn a_page_over_the_interrupts_keeps_the_rest() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let (_subscription, handle) = mirror(&endpoint);
    let root = rig.table();
    rig.map_large(root, 0xfee0_0000, 2, 0x20_0000, RW);
    rig.map(root, 0xfeef_f000 + 0x11_0000, 0x8000, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    let expected = [extent(0xfef0_0000, 0x10_0000, 0x30_0000), extent(0xff00_f000, 0x1000, 0x8000)];
    assert_eq!(handle.held(), expected);
}

#[test]
fn a_mirror_that_comes_late_is_filled_and_forgets_nothing_that_is_pending() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, RW);
    rig.map(root, 0x2000, 0x9000, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    let due = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let told = due.clone();
    rig.vtd.notify_subscribers(move || {
        told.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    });
    let (_one, first) = mirror(&endpoint);
    assert_eq!(due.load(std::sync::atomic::Ordering::Relaxed), 1);
    rig.settle();
    assert_eq!(first.held().len(), 2);
    // The driver has cleared an entry and not said so: a second mirror's replay must not make the first forget it.
    rig.unmap(root, 0x1000);
    let (two, second) = mirror(&endpoint);
    rig.settle();
    rig.submit(&[pages(1, 0x1000, 0)]);
    let left = [extent(0x2000, 0x1000, 0x9000)];
    assert_eq!((first.held(), second.held()), (left.to_vec(), left.to_vec()));
    drop((two, _one));
    // Nobody listens: nothing is compared, and the record says nothing.
    let slices = rig.vtd.metrics().sync_slices;
    rig.submit(&[domain(1)]);
    assert_eq!(rig.vtd.metrics().sync_slices, slices);
    assert!(rig.vtd.iommu().domain(1).unwrap().is_empty());
}

#[test]
fn a_mirror_that_answers_later_holds_up_the_wait() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let (_subscription, handle) = mirror(&endpoint);
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    handle.lock().pending = true;
    rig.unmap(root, 0x1000);
    let status = rig.push(&[pages(1, 0x1000, 0)]);
    assert_eq!(rig.process(), Progress::Waiting);
    assert_ne!(rig.status(), status);
    let resolvers = std::mem::take(&mut handle.lock().resolvers);
    assert!(!resolvers.is_empty());
    resolvers.into_iter().for_each(|resolver| resolver.done());
    assert_eq!(rig.process(), Progress::Idle);
    assert_eq!(rig.status(), status);
}

#[test]
fn a_mirror_that_cannot_follow_is_fenced_and_the_driver_goes_on() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let (subscription, handle) = mirror(&endpoint);
    let root = rig.table();
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    handle.refuse_nth(1, 1, |event| matches!(event, Event::Map(_)));
    rig.map(root, 0x1000, 0x8000, RW);
    rig.submit(&[pages(1, 0x1000, 0)]);
    assert!(subscription.is_fenced());
    assert!(access(&mut reader(&endpoint), 0x1000, Access::READ).is_err());
}

#[test]
fn a_cap_leaves_out_what_is_new_and_keeps_nothing_that_went() {
    let mut rig = Rig::with(Config::default(), Iommu::builder().ram(0, RAM).domain_mappings(8));
    let endpoint = rig.vtd.add_endpoint(DEVICE).unwrap();
    rig.start();
    let (_subscription, handle) = mirror(&endpoint);
    let root = rig.table();
    (0..6).for_each(|page| rig.map(root, page * 0x1000, 0x8000, RW));
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    assert_eq!(handle.held().len(), 6);
    (0..3).for_each(|page| rig.unmap(root, page * 0x1000));
    (100..200).for_each(|page| rig.map(root, page * 0x1000, 0x8000, RW));
    rig.submit(&[domain(1)]);
    let held = handle.held();
    assert!((3..=8).contains(&held.len()));
    assert!(held.iter().all(|m| m.range.start().0 >= 0x3000));
    assert!(rig.vtd.metrics().syncs_capped > 0);
}

#[test]
fn memory_that_goes_is_unmapped_and_comes_back_without_the_driver() {
    let (mut rig, endpoint) = Rig::started(Config::default());
    let (_subscription, handle) = mirror(&endpoint);
    let root = rig.table();
    rig.map(root, 0x1000, RAM, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    assert_eq!(handle.held(), []);
    let range = GpaRange::from_len(Gpa(RAM), 1 << 20).unwrap();
    rig.vtd.iommu().add_backing(Extent { range, medium: Medium::Ram }).unwrap().wait().unwrap();
    assert_eq!(handle.held(), [extent(0x1000, 0x1000, RAM)]);
}

#[test]
fn the_record_is_what_the_tables_say_for_a_mirror_of_the_space_too() {
    let (mut rig, _endpoint) = Rig::started(Config::default());
    let root = rig.table();
    rig.map(root, 0x1000, 0x8000, RW);
    rig.attach(DEVICE, 1, root);
    rig.announce(DEVICE, 1);
    let (mirror, handle) =
        viommu::fuzzing::recording::RecordingMirror::new(viommu::subscribe::Reach::default());
    let _subscription =
        rig.vtd.iommu().subscribe_mirror(Space::Domain(1), mirror, viommu::Interest::MIRROR).unwrap();
    rig.settle();
    assert_eq!(handle.held(), [extent(0x1000, 0x1000, 0x8000)]);
}
