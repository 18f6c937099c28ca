//! Many entries in one hypercall.

use viommu::fuzzing::recording::Event;
use viommu::subscribe::Reach;
use viommu::{Gpa, Iova, Mapping, StepErrorKind};
use viommu_spapr::Merge;
use viommu_spapr::spec::Code;

use crate::rig::{
    A, B, RO, RW, Rig, access, builder, code, invalidate, map, page, range, replacing, type1, unmap,
};

fn in_a_row(gpa: u64, count: u64) -> Vec<u64> {
    (0..count).map(|at| (gpa + at * 0x1000) | RW).collect()
}

#[test]
fn a_list_of_changes_is_one_step_with_removals_joined_and_first() {
    let mut rig = Rig::new();
    rig.put_list(0x1000, &in_a_row(A, 4));
    let (plain, cache) = (rig.mirror(type1()), rig.cache(&[0x1000, 0x2000, 0x3000, 0x4000]));
    assert_eq!(rig.put_list(0x1000, &[B | RW, 0, (A + 0x2000) | RO, B | RO, B | RW]), Code::Success);
    let maps = [(0x1000, B | RW), (0x3000, (A + 0x2000) | RO), (0x4000, B | RO), (0x5000, B | RW)];
    let expected: Vec<Event> =
        core::iter::once(unmap(0x1000, 0x4000)).chain(maps.map(|(at, tce)| map(at, tce))).collect();
    assert_eq!(plain.take(), expected);
    assert_eq!(cache.take(), [invalidate(0x1000, 0x4000)]);
    rig.check();
    assert_eq!(rig.get(0x2000), 0);
}

#[test]
fn entries_of_a_list_that_stay_the_same_are_left_alone() {
    let mut rig = Rig::new();
    rig.put_list(0, &in_a_row(A, 4));
    let (plain, in_place) = (rig.mirror(type1()), rig.mirror(replacing()));
    let mut list = in_a_row(A, 4);
    list[2] = B | RW;
    assert_eq!(rig.put_list(0, &list), Code::Success);
    assert_eq!(plain.take(), [unmap(0x2000, 0x1000), map(0x2000, B | RW)]);
    assert_eq!(in_place.take(), [Event::Replace(page(0x2000, (A + 0x2000) | RW), page(0x2000, B | RW))]);
    assert_eq!(rig.spapr.metrics().unchanged, 3);
    rig.check();
}

#[test]
fn a_full_list_of_512_entries_is_set() {
    let mut rig = Rig::new();
    let mirror = rig.mirror(type1());
    assert_eq!(rig.put_list(0x10_0000, &in_a_row(A, 512)), Code::Success);
    assert_eq!(mirror.held().len(), 512);
    assert_eq!(rig.get(0x10_0000 + 511 * 0x1000), (A + 511 * 0x1000) | RW);
    rig.check();
}

#[test]
fn stuffing_a_whole_window_is_one_unmap_and_costs_what_is_live() {
    let mut rig = Rig::new();
    for at in [0, 0x20_0000, 0x3fff_f000] {
        rig.put(at, A | RW);
    }
    let mirror = rig.mirror(type1());
    assert_eq!(rig.stuff(0, 1 << 18), Code::Success);
    assert_eq!(mirror.take(), [unmap(0, 1 << 30)]);
    assert_eq!(rig.stuff(0, 1 << 18), Code::Success);
    assert_eq!(mirror.take(), []);
    assert!(rig.bus.domain().is_empty());
    rig.check();
}

#[test]
fn stuffing_a_part_leaves_the_neighbours() {
    let mut rig = Rig::new();
    rig.put_list(0, &in_a_row(A, 5));
    let mirror = rig.mirror(type1());
    assert_eq!(rig.stuff(0x1000, 3), Code::Success);
    assert_eq!(mirror.take(), [unmap(0x1000, 0x3000)]);
    assert_eq!((rig.get(0), rig.get(0x1000), rig.get(0x4000)), (A | RW, 0, (A + 0x4000) | RW));
    rig.check();
}

#[test]
fn a_change_that_a_mirror_refuses_leaves_the_entry_empty_everywhere() {
    for reach in [type1(), replacing()] {
        let mut rig = Rig::new();
        rig.put(0x1000, A | RW);
        let (other, refuses, cache) = (rig.mirror(type1()), rig.mirror(reach), rig.cache(&[0x1000]));
        refuses.refuse_nth(1, 1, |event| matches!(event, Event::Map(_) | Event::Replace(..)));
        assert_eq!(rig.put(0x1000, B | RW), Code::Resource);
        assert_eq!(rig.get(0x1000), 0);
        assert_eq!((other.held(), refuses.held(), cache.held()), (vec![], vec![], vec![]));
        rig.check();
        assert_eq!(rig.put(0x1000, B | RW), Code::Success, "there is nothing left in the way");
        assert_eq!((other.held(), refuses.held()), (vec![page(0x1000, B | RW)], vec![page(0x1000, B | RW)]));
        assert_eq!((rig.spapr.metrics().lost, rig.spapr.metrics().answers(0x20, Code::Resource)), (1, 1));
    }
}

#[test]
fn a_list_that_a_mirror_refuses_half_way_leaves_none_of_its_changes() {
    for reach in [type1(), replacing()] {
        let mut rig = Rig::new();
        rig.put_list(0, &in_a_row(A, 3));
        let (other, refuses) = (rig.mirror(replacing()), rig.mirror(reach));
        refuses.refuse_nth(2, 1, |event| matches!(event, Event::Map(_) | Event::Replace(..)));
        // The first stays as it is, the second goes, the third changes, the others are new.
        let list = [A | RW, 0, B | RW, B | RO, B | RO];
        assert_eq!(rig.put_list(0, &list), Code::Resource);
        let left = vec![page(0, A | RW)];
        assert_eq!((other.held(), refuses.held()), (left.clone(), left));
        assert_eq!([0, 0x1000, 0x2000, 0x3000, 0x4000].map(|at| rig.get(at)), [A | RW, 0, 0, 0, 0]);
        rig.check();
    }
}

#[test]
fn a_change_that_is_known_to_have_no_room_leaves_the_entry_empty_too() {
    let few = Reach { entries: Some(2), ..Reach::default() };
    let mut rig = Rig::new();
    let mirror = rig.mirror(few);
    rig.put(0, A | RW);
    assert_eq!(rig.put_list(0, &in_a_row(B, 3)), Code::Resource);
    assert_eq!((mirror.held(), rig.get(0)), (vec![], 0));
    rig.check();

    let rig = Rig::with(builder().domain_mappings(2), Merge::Never);
    rig.put(0, A | RW);
    assert_eq!(rig.put_list(0, &in_a_row(B, 3)), Code::Resource);
    assert!(rig.bus.domain().is_empty());
    assert_eq!(rig.put(0, B | RW), Code::Success);
    rig.check();
}

#[test]
fn a_clear_is_never_refused_and_a_mirror_that_cannot_is_cut_off() {
    let mut rig = Rig::new();
    rig.put(0, A | RW);
    let (other, broken) = (rig.mirror(type1()), rig.mirror(type1()));
    broken.refuse_nth(1, 1, |event| matches!(event, Event::Unmap(_)));
    assert_eq!(rig.stuff(0, 1), Code::Success);
    assert!(broken.lock().fenced && rig.endpoint.is_fenced());
    assert_eq!((other.held(), rig.get(0)), (vec![], 0));
}

#[test]
fn without_merging_every_entry_goes_alone() {
    let mut rig = Rig::new();
    rig.put_list(0, &in_a_row(A, 3));
    let mirror = rig.mirror(type1());
    rig.put(0x1000, 0);
    assert_eq!(mirror.take(), [unmap(0x1000, 0x1000)]);
}

#[test]
fn merged_entries_are_one_extent_until_one_of_them_goes_alone() {
    let mut rig = Rig::with(builder(), Merge::Hypercall);
    let mirror = rig.mirror(type1());
    let mut list = in_a_row(A, 4);
    list.extend([B | RW, (B + 0x1000) | RO]);
    assert_eq!(rig.put_list(0, &list), Code::Success);
    let whole = |at: u64, pages: u64, tce: u64| {
        Event::Map(Mapping::new(Iova(at), pages * 0x1000, Gpa(tce & !3), access(tce)).unwrap())
    };
    assert_eq!(mirror.take(), [whole(0, 4, A | RW), map(0x4000, B | RW), map(0x5000, (B + 0x1000) | RO)]);
    assert_eq!(rig.put_list(0, &list), Code::Success);
    assert_eq!(mirror.take(), [], "the same again");
    assert_eq!(rig.put(0x2000, 0), Code::Success);
    assert_eq!(mirror.take(), [unmap(0, 0x4000), whole(0, 2, A | RW), map(0x3000, (A + 0x3000) | RW)]);
    assert_eq!([0x1000, 0x2000, 0x3000].map(|at| rig.get(at)), [(A + 0x1000) | RW, 0, (A + 0x3000) | RW]);
    assert_eq!(rig.put(0x1000, B | RW), Code::Success);
    assert_eq!(mirror.take(), [unmap(0, 0x2000), map(0, A | RW), map(0x1000, B | RW)]);
    rig.check();
}

#[test]
fn a_clear_of_merged_entries_whose_rests_have_no_room_takes_them_along() {
    let mut rig = Rig::with(builder().domain_mappings(1), Merge::Hypercall);
    let mirror = rig.mirror(type1());
    assert_eq!(rig.put_list(0, &in_a_row(A, 4)), Code::Success);
    assert!(matches!(rig.bus.domain().unmap(range(0x1000, 0x1000)).unwrap_err().kind, StepErrorKind::Cap(_)));
    assert_eq!(rig.stuff(0x1000, 1), Code::Resource);
    assert_eq!(mirror.held(), []);
    assert!(rig.bus.domain().is_empty());
    rig.check();
}

#[test]
fn an_answer_is_kept_back_while_a_device_uses_what_went() {
    let rig = Rig::new();
    rig.put(0x1000, A | RW);
    let mut reader = rig.endpoint.reader("queue 0").unwrap();
    for change in [B | RW, B | RO, 0] {
        let guard = reader.enter();
        let mut pending = rig.liobn.put_tce(0x1000, change);
        assert_eq!(pending.poll(), None);
        assert_eq!(pending.blockers().len(), 1);
        drop(guard);
        assert_eq!(pending.poll().map(|answer| answer.code), Some(Code::Success));
    }
    // Where nothing went, nobody waits.
    let guard = reader.enter();
    assert!(rig.liobn.put_tce(0x1000, A | RW).poll().is_some());
    drop(guard);
}

#[test]
fn an_answer_is_kept_back_until_every_mirror_has_acknowledged() {
    let mut rig = Rig::new();
    rig.put_list(0, &in_a_row(A, 2));
    let mirror = rig.mirror(type1());
    mirror.lock().pending = true;
    rig.write_list(&[B | RW, 0]);
    let mut pending = rig.liobn.put_tce_indirect(0, crate::rig::LIST, 2, &rig.memory);
    assert_eq!(pending.poll(), None);
    let resolvers = core::mem::take(&mut mirror.lock().resolvers);
    assert!(!resolvers.is_empty());
    for resolver in resolvers {
        resolver.done();
    }
    assert_eq!(code(pending), Code::Success);
    rig.check();
}
