//! What QEMU's notifiers got wrong, or get wrong still, each as a test of ours.

use viommu::domain::{Found, Walk};
use viommu::reader::Walker;
use viommu::subscribe::{OutOfReach, Reach, Unreachable};
use viommu::{
    Access, FillError, Gpa, Interest, Iova, IovaRange, Mapping, Space, StepErrorKind, SubscribeError, Tables,
};

use crate::support::*;

#[test]
fn clipping_moves_the_target_with_the_start() {
    let (iommu, _, domain) = attached();
    let (mirror, handle) = RecordingMirror::new(Reach::default());
    // A 2 MiB page across the start of a window.
    let window = pages(300, 1000);
    let _s = iommu.subscribe_mirror(Space::Domain(1), mirror, Interest::MIRROR.within(window)).unwrap();
    over(domain.map(rw(256, 767, 1024)).unwrap());
    assert_eq!(handle.take(), [Event::Map(rw(300, 767, 1024 + 44))]);
}

#[test]
fn clipped_ranges_need_no_power_of_two() {
    let (iommu, _, domain) = attached();
    let (mirror, handle) = RecordingMirror::new(Reach::default());
    let window = pages(0, 12);
    let _s = iommu.subscribe_mirror(Space::Domain(1), mirror, Interest::MIRROR.within(window)).unwrap();
    over(domain.map(rw(0, 15, 64)).unwrap());
    over(domain.unmap(pages(0, 15)).unwrap());
    assert_eq!(handle.take(), [Event::Map(rw(0, 12, 64)), Event::Unmap(pages(0, 12))]);
}

#[test]
fn an_unmap_of_everything_stays_inside_each_window() {
    let (iommu, _, domain) = attached();
    let hole = 0xfee00;
    let mut kept = Vec::new();
    for window in [pages(0, hole - 1), pages(hole + 256, (1 << 52) - 1)] {
        let (mirror, handle) = RecordingMirror::new(Reach::default());
        let interest = Interest::MIRROR.within(window);
        kept.push((iommu.subscribe_mirror(Space::Domain(1), mirror, interest).unwrap(), handle));
    }
    over(domain.map(rw(hole - 8, hole - 1, 10)).unwrap());
    over(domain.map(rw(hole + 256, hole + 263, 20)).unwrap());
    kept.iter().for_each(|(_, handle)| drop(handle.take()));
    over(domain.unmap(IovaRange::ALL).unwrap());
    assert_eq!(kept[0].1.take(), [Event::Unmap(pages(hole - 8, hole - 1))]);
    assert_eq!(kept[1].1.take(), [Event::Unmap(pages(hole + 256, hole + 263))]);
}

#[test]
fn replay_does_not_forget_a_pending_unmap() {
    let guest = Guest::default();
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, guest.tables()).unwrap();
    let (first, m1) = mirror_on(&iommu, 1, Reach::default());
    guest.set(&[rw(0, 0, 5), rw(1, 1, 6)]);
    guest.sync(&domain, pages(0, 15));
    // Cleared and not yet invalidated; then a second container comes, and the first is replayed.
    guest.set(&[rw(1, 1, 6)]);
    let (_second, m2) = mirror_on(&iommu, 1, Reach::default());
    over(first.replay().unwrap());
    guest.sync(&domain, pages(0, 0));
    assert_eq!((m1.held(), m2.held()), (vec![rw(1, 1, 6)], vec![rw(1, 1, 6)]));
}

#[test]
fn a_large_page_that_becomes_small_ones_and_back() {
    let guest = Guest::default();
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, guest.tables()).unwrap();
    let (_s, m) = mirror_on(&iommu, 1, Reach { wide_unmap: false, ..Reach::default() });
    let large = rw(512, 1023, 2048);
    guest.set(&[large]);
    guest.sync(&domain, pages(512, 1023));
    assert_eq!(m.take(), [Event::Map(large)]);
    // Small pages, two of them elsewhere; the guest invalidates one page of it.
    let small: Vec<Mapping> =
        (512..1024).map(|p| rw(p, p, if p < 514 { 5000 + p } else { 2048 + p - 512 })).collect();
    guest.set(&small);
    guest.sync(&domain, pages(700, 700));
    assert_eq!(m.held(), small);
    assert_eq!(m.take()[0], Event::Unmap(large.range), "whole extents go first");
    guest.set(&[large]);
    guest.sync(&domain, pages(600, 600));
    assert_eq!(m.held(), [large]);
}

#[test]
fn an_entry_with_reserved_bits_is_unmapped() {
    let guest = Guest::default();
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, guest.tables()).unwrap();
    let (_s, m) = mirror_on(&iommu, 1, Reach::default());
    guest.set(&[rw(0, 0, 5)]);
    guest.sync(&domain, pages(0, 0));
    // A walk says "not mapped" of what it cannot read; one that gives nonsense is not believed either.
    let nonsense = Mapping { gpa: Gpa(5 * PAGE + 8), ..rw(0, 0, 5) };
    let progress = domain.sync(pages(0, 0), &mut |_, _| Some(nonsense), 10).unwrap();
    over(progress.completion);
    assert_eq!((m.held(), domain.len()), (vec![], 0));
}

#[test]
fn an_entry_that_is_gone_takes_all_small_ones_under_it() {
    let guest = Guest::default();
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, guest.tables()).unwrap();
    let (_s, m) = mirror_on(&iommu, 1, Reach::default());
    let small: Vec<Mapping> = (0..512).map(|p| rw(p, p, 600 - p)).collect();
    guest.set(&small);
    guest.sync(&domain, pages(0, 511));
    guest.set(&[]);
    guest.sync(&domain, pages(0, 511));
    assert_eq!((m.held(), domain.len()), (vec![], 0));
}

#[test]
fn all_of_2_64_is_an_ordinary_range() {
    let (iommu, _) = unit_with(|b| b.ram(0, 1 << 30).ram(u64::MAX - 0xfff, 0x1000));
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let (s, m) = mirror_on(&iommu, 1, Reach::default());
    let (cache, c) = RecordingCache::new();
    let cache = iommu.subscribe_cache(Space::Domain(1), cache, Interest::CACHE).unwrap();
    let all = Mapping::over(IovaRange::ALL, Gpa(0), Access::RW).unwrap();
    over(domain.map(all).unwrap());
    let top = (1 << 52) - 1;
    assert_eq!(m.held(), [rw(0, (1 << 18) - 1, 0), rw(top, top, top)]);
    cache.fill(at(top), Access::READ).unwrap();
    assert!(s.audit().unwrap().is_clean() && cache.audit().unwrap().is_clean());
    over(domain.unmap(IovaRange::ALL).unwrap());
    assert_eq!((m.held(), c.held(), domain.len()), (vec![], vec![], 0));
}

#[test]
fn replay_is_of_extents_and_to_one_subscriber() {
    let (iommu, _, domain) = attached();
    let (_first, m1) = mirror_on(&iommu, 1, Reach::default());
    // 1 GiB that a page-by-page replay would take 262,144 questions for, far up.
    over(domain.map(rw(1 << 40, (1 << 40) + (1 << 18) - 1, 0)).unwrap());
    m1.take();
    let (second, m2) = mirror_on(&iommu, 1, Reach::default());
    assert_eq!(m2.take().len(), 1);
    over(second.replay().unwrap());
    assert_eq!(m2.take().len(), 2);
    assert_eq!(m1.take(), []);
}

#[test]
fn a_consumers_refusal_reaches_the_guest() {
    let (iommu, _, domain) = attached();
    let (_s, m) = mirror_on(&iommu, 1, Reach::default());
    m.refuse_nth(1, 1, is_map);
    assert!(matches!(domain.map(rw(0, 0, 1)).unwrap_err().kind, StepErrorKind::Refused { .. }));
    assert!(domain.is_empty());
}

#[test]
fn a_fill_carries_the_true_permission() {
    let (_iommu, endpoint, domain) = attached();
    let (cache, c) = cache_at(&endpoint);
    over(domain.map(map_of(0, 3, 5, Access::READ)).unwrap());
    assert_eq!(cache.fill(at(1), Access::READ).unwrap().access, Access::READ);
    assert_eq!(cache.fill(at(1), Access::empty()).unwrap().access, Access::READ);
    assert!(matches!(cache.fill(at(1), Access::WRITE), Err(FillError::Fault(_))));
    assert!(c.held().iter().all(|e| e.access == Access::READ));
}

#[test]
fn a_fill_is_of_the_extent_and_never_of_its_neighbour() {
    let (_iommu, endpoint, domain) = attached();
    let (cache, _) = cache_at(&endpoint);
    over(domain.map(rw(4, 600, 5)).unwrap());
    let entry = cache.fill(at(5), Access::READ).unwrap();
    assert!(entry.range.covers(pages(5, 500)), "one entry a page would be slow: {entry:?}");
    // The last byte of an unmapped page.
    let last = Iova(4 * PAGE - 1);
    assert!(matches!(cache.fill(last, Access::READ), Err(FillError::Fault(_))));
}

#[test]
fn an_unmap_that_would_cut_removes_nothing() {
    let (_iommu, endpoint, domain) = attached();
    let (_s, m) = mirror_at(&endpoint, Reach::default());
    over(domain.map(rw(0, 3, 5)).unwrap());
    over(domain.map(rw(4, 7, 20)).unwrap());
    m.take();
    let error = domain.unmap(pages(0, 5)).unwrap_err();
    assert!(matches!(error.kind, StepErrorKind::Cut { .. }));
    assert_eq!((m.take(), domain.len()), (vec![], 2));
}

#[test]
fn map_checks_alignment_range_and_regions() {
    let aperture = pages(0, 99);
    let (iommu, _) = unit_with(|b| b.ram(0, 1 << 30).aperture(aperture).page_size(8192));
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let kind = |m| domain.map(m).unwrap_err().kind;
    assert!(matches!(kind(rw(1, 2, 4)), StepErrorKind::Unaligned { .. }));
    assert!(matches!(kind(rw(2, 3, 5)), StepErrorKind::Unaligned { .. }));
    assert!(matches!(kind(rw(98, 101, 4)), StepErrorKind::OutOfRange { .. }));
    over(domain.map(rw(98, 99, 4)).unwrap());
}

#[test]
fn neighbours_of_one_domain_share_a_bound_mirror() {
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let hosts = Hosts::default();
    let binding = iommu.add_binding(Box::new(hosts.clone()));
    for id in 1..=4 {
        let e = endpoint(&iommu, id);
        over(e.bind_with(&binding).unwrap());
        over(e.attach(1).unwrap());
    }
    over(domain.map(rw(0, 9, 5)).unwrap());
    let host = hosts.0.lock().unwrap();
    assert_eq!(host.made.len(), 1, "one mirror, one pinning for four devices");
    assert_eq!(host.made[0].2.take(), [Event::Map(rw(0, 9, 5))]);
}

#[test]
fn no_translation_has_side_effects_on_replay() {
    let faults = std::sync::Arc::new(Faults::default());
    let sink = faults.clone();
    let (iommu, _) = unit_with(|b| b.ram(0, 1 << 20).faults(sink));
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let e = endpoint(&iommu, 8);
    over(e.attach(1).unwrap());
    over(domain.map(rw(10, 10, 1)).unwrap());
    let (_s, _) = mirror_at(&e, Reach::default());
    assert_eq!(faults.0.load(std::sync::atomic::Ordering::Relaxed), 0);
}

#[derive(Default)]
struct Faults(std::sync::atomic::AtomicUsize);

impl viommu::reader::FaultSink for Faults {
    fn fault(&self, _: &viommu::Fault) {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }
}

#[test]
fn a_source_without_map_refuses_a_mirror() {
    let (iommu, _) = unit();
    let walker: std::sync::Arc<dyn Walker> = std::sync::Arc::new(Guest::default());
    iommu.create_domain(1, Tables::Walked { walker, caching_mode: false }).unwrap();
    let (mirror, _) = RecordingMirror::new(Reach::default());
    let error = iommu.subscribe_mirror(Space::Domain(1), mirror, Interest::MIRROR).unwrap_err();
    assert!(matches!(error, SubscribeError::NotProduced { .. }));
    let (cache, _) = RecordingCache::new();
    drop(iommu.subscribe_cache(Space::Domain(1), cache, Interest::CACHE).unwrap());
}

#[test]
fn no_more_entries_is_said_before_the_host_says_so() {
    let (iommu, _, domain) = attached();
    let (_s, m) = mirror_on(&iommu, 1, Reach { entries: Some(2), ..Reach::default() });
    over(domain.map(rw(0, 0, 1)).unwrap());
    over(domain.map(rw(2, 2, 1)).unwrap());
    m.take();
    let kind = domain.map(rw(4, 4, 1)).unwrap_err().kind;
    assert!(matches!(kind, StepErrorKind::Unreachable { why: Unreachable::Entries, .. }));
    assert_eq!(m.take(), []);
    over(domain.unmap(pages(0, 0)).unwrap());
    over(domain.map(rw(4, 4, 1)).unwrap());
}

#[test]
fn an_entry_that_a_replacement_frees_is_free_before_it_is_taken() {
    let (iommu, _, domain) = attached();
    let (_s, m) = mirror_on(&iommu, 1, Reach { entries: Some(2), replace: true, ..Reach::default() });
    over(domain.map(rw(2, 2, 1)).unwrap());
    over(domain.map(rw(6, 6, 2)).unwrap());
    // The mirror holds nothing of the successor, and one extent more in front of it.
    over(domain.batch().map(rw(0, 0, 3)).replace(rw(6, 6, 2).mmio()).commit().unwrap());
    assert_eq!(m.held(), [rw(0, 0, 3), rw(2, 2, 1)]);
}

#[test]
fn an_unmap_may_end_anywhere_in_a_hole_and_nowhere_else() {
    let bytes = |start, last| IovaRange::new(Iova(start), Iova(last)).unwrap();
    for tables in [Tables::Owned, Tables::OwnedCut] {
        let (iommu, _) = unit();
        let domain = iommu.create_domain(1, tables).unwrap();
        let (_s, m) = mirror_on(&iommu, 1, Reach::default());
        over(domain.map(rw(2, 3, 1)).unwrap());
        for (start, last) in [(0x2800, 0x4fff), (0, 0x2000), (0x3fff, 0x3fff), (0x2001, 0x3ffe)] {
            let error = domain.unmap(bytes(start, last)).unwrap_err();
            assert!(matches!(error.kind, StepErrorKind::Cut { .. }), "{:?}", error.kind);
        }
        over(domain.unmap(bytes(0x123, 0x456)).unwrap());
        over(domain.unmap(bytes(0x4001, u64::MAX - 1)).unwrap());
        assert_eq!(m.held(), [rw(2, 3, 1)]);
        over(domain.unmap(bytes(0x1234, 0x4321)).unwrap());
        assert!(domain.is_empty() && m.held().is_empty());
    }
}

#[test]
fn a_cap_does_not_keep_what_the_guest_took_away() {
    let guest = Guest::default();
    let (iommu, _) = unit_with(|b| b.ram(0, 1 << 30).domain_mappings(2));
    let domain = iommu.create_domain(1, guest.tables()).unwrap();
    let (_s, m) = mirror_on(&iommu, 1, Reach::default());
    guest.set(&[rw(0, 0, 1), rw(1, 1, 2)]);
    guest.sync(&domain, pages(0, 9));
    // One goes, two come: one too many. The one must be gone all the same.
    guest.set(&[rw(1, 1, 2), rw(2, 2, 3), rw(3, 3, 4)]);
    let error = domain.sync(pages(0, 9), &mut |f, l| guest.next(f, l), 100).unwrap_err();
    assert!(matches!(error.kind, StepErrorKind::Cap(_)));
    assert_eq!(m.held(), [rw(1, 1, 2)]);
}

#[test]
fn out_of_reach_in_tables_fences_or_is_left_out_as_declared() {
    let guest = Guest::default();
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, guest.tables()).unwrap();
    let reach = Reach { apertures: vec![pages(0, 9)], ..Reach::default() };
    let (fenced, f) = mirror_on(&iommu, 1, reach.clone());
    let (left, l) = mirror_on(&iommu, 1, Reach { out_of_reach: OutOfReach::LeaveOut, ..reach });
    guest.set(&[rw(5, 5, 1), rw(20, 20, 2)]);
    guest.sync(&domain, pages(0, 99));
    assert!(fenced.is_fenced() && f.lock().fenced);
    assert!(!left.is_fenced());
    assert_eq!(l.held(), [rw(5, 5, 1)]);
}

#[test]
fn a_large_page_of_which_only_a_part_stays_keeps_that_part() {
    let guest = Guest::default();
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, guest.tables()).unwrap();
    let (_s, m) = mirror_on(&iommu, 1, Reach::default());
    guest.set(&[rw(0, 511, 0)]);
    guest.sync(&domain, pages(0, 511));
    // Nothing is left at the page that is invalidated, some is behind it.
    guest.set(&[rw(5, 6, 700)]);
    guest.sync(&domain, pages(0, 0));
    assert_eq!(m.held(), [rw(5, 6, 700)]);
}

#[test]
fn small_pages_that_become_a_large_one_are_not_cut_at_its_end() {
    let guest = Guest::default();
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, guest.tables()).unwrap();
    let (_s, m) = mirror_on(&iommu, 1, Reach::default());
    guest.set(&[rw(10, 14, 0)]);
    guest.sync(&domain, pages(10, 14));
    guest.set(&[rw(0, 11, 100)]);
    guest.sync(&domain, pages(0, 1));
    assert_eq!(m.held(), [rw(0, 11, 100)]);
}

/// A walk that looks at 4 pages at a time, and counts.
struct Short<'g>(&'g Guest, usize);

impl Walk for Short<'_> {
    fn next(&mut self, from: Iova, last: Iova) -> Found {
        self.1 += 1;
        let pause = Iova((from.0 / 0x4000 + 1) * 0x4000);
        match self.0.next(from, last.min(Iova(pause.0 - 1))) {
            Some(m) => Found::Extent(m),
            None if pause > last => Found::Nothing,
            None => Found::NotYet(pause),
        }
    }
}

#[test]
fn a_walk_that_pauses_ends_the_call_and_nothing_behind_the_pause_is_touched() {
    let guest = Guest::default();
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, guest.tables()).unwrap();
    let (_s, m) = mirror_on(&iommu, 1, Reach::default());
    guest.set(&[rw(2, 9, 0), rw(40, 41, 100), rw(60, 60, 200)]);
    guest.sync(&domain, pages(0, 99));
    // The first crosses two pauses and goes, the second stays, the third has another target.
    guest.set(&[rw(40, 41, 100), rw(60, 60, 300)]);
    let mut rest = Some(pages(0, 99));
    let mut calls = Vec::new();
    while let Some(range) = rest {
        let mut walk = Short(&guest, 0);
        let progress = domain.sync(range, &mut walk, 100).unwrap();
        over(progress.completion);
        rest = progress.rest;
        calls.push((m.held().len(), walk.1));
        assert!(calls.len() < 100);
    }
    assert_eq!(calls[0], (2, 2), "one question for the start, one up to the pause");
    assert!(calls.iter().all(|(held, asked)| *held == 2 && *asked <= 4), "{calls:?}");
    assert_eq!(m.held(), [rw(40, 41, 100), rw(60, 60, 300)]);
}
