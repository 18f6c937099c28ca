//! What one entry can become in one hypercall, and who hears what of it.

use viommu::fuzzing::recording::Event;
use viommu_spapr::spec::Code;

use crate::rig::{A, B, RO, RW, Rig, WO, invalidate, map, page, replacing, type1, unmap};

const AT: u64 = 0x5000;

/// Sets an entry to `old`, then to `new`: what a mirror like type1, one that replaces, and a cache with the old entry hear
/// of the second.
fn becomes(old: u64, new: u64) -> [Vec<Event>; 3] {
    let mut rig = Rig::new();
    assert_eq!(rig.put(AT, old), Code::Success);
    let (plain, in_place, cache) = (rig.mirror(type1()), rig.mirror(replacing()), rig.cache(&[AT]));
    assert_eq!(rig.put(AT + 0xfff, new), Code::Success);
    rig.check();
    assert_eq!(rig.get(AT), if new & RW == 0 { 0 } else { new });
    [plain.take(), in_place.take(), cache.take()]
}

#[test]
fn none_to_mapped_is_a_map_and_nothing_for_a_cache() {
    assert_eq!(becomes(0, A | RW), [vec![map(AT, A | RW)], vec![map(AT, A | RW)], vec![]]);
    assert_eq!(becomes(0, A | WO), [vec![map(AT, A | WO)], vec![map(AT, A | WO)], vec![]]);
}

#[test]
fn mapped_to_none_is_an_unmap_for_all() {
    let gone = vec![unmap(AT, 0x1000)];
    let invalidated = vec![invalidate(AT, 0x1000)];
    assert_eq!(becomes(A | RW, 0), [gone.clone(), gone.clone(), invalidated.clone()]);
    assert_eq!(becomes(A | RW, 0xdead_beef_f000), [gone.clone(), gone, invalidated]);
}

#[test]
fn the_same_again_is_no_event() {
    assert_eq!(becomes(A | RW, A | RW), [vec![], vec![], vec![]]);
    assert_eq!(becomes(0, 0), [vec![], vec![], vec![]]);
}

#[test]
fn another_page_is_unmap_and_map_or_one_replace_and_an_unmap_for_a_cache() {
    assert_eq!(
        becomes(A | RW, B | RW),
        [
            vec![unmap(AT, 0x1000), map(AT, B | RW)],
            vec![Event::Replace(page(AT, A | RW), page(AT, B | RW))],
            vec![invalidate(AT, 0x1000)]
        ]
    );
}

#[test]
fn less_access_is_unmap_and_map_or_one_replace_and_an_unmap_for_a_cache() {
    assert_eq!(
        becomes(A | RW, A | RO),
        [
            vec![unmap(AT, 0x1000), map(AT, A | RO)],
            vec![Event::Replace(page(AT, A | RW), page(AT, A | RO))],
            vec![invalidate(AT, 0x1000)]
        ]
    );
}

#[test]
fn more_access_is_unmap_and_map_or_one_replace_and_an_unmap_for_a_cache() {
    assert_eq!(
        becomes(A | RO, A | RW),
        [
            vec![unmap(AT, 0x1000), map(AT, A | RW)],
            vec![Event::Replace(page(AT, A | RO), page(AT, A | RW))],
            vec![invalidate(AT, 0x1000)]
        ]
    );
}

#[test]
fn a_cache_that_was_filled_before_a_change_holds_nothing_of_it_after() {
    let mut rig = Rig::new();
    rig.put(AT, A | RW);
    let cache = rig.cache(&[AT]);
    assert_eq!(cache.held(), [page(AT, A | RW)]);
    rig.put(AT, A | RO);
    assert_eq!(cache.held(), []);
}
