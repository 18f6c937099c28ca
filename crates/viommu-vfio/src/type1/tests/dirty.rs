//! Dirty pages, by guest physical address.

use super::*;
use crate::software::DirtyScope;

fn rig(dirty: DirtyScope) -> Rig {
    let mut rig = Rig::with(|config| Config { dirty, ..config }, |c| c);
    // It does not track, so all that it unmaps would count as written.
    over(rig.other.take().unwrap().leave());
    rig.domain.dirty_start();
    rig.handle.dirty_start().unwrap();
    rig
}

fn write(rig: &Rig, page: u64) {
    assert!(rig.fake.lock().container.device_wrote(page * PAGE, 8));
}

#[test]
fn pages_are_told_once_and_by_guest_address() {
    let rig = rig(DirtyScope::Written);
    over(rig.domain.map(rw(100, 109, 12)).unwrap());
    over(rig.domain.map(map_of(200, 201, 0, Access::READ)).unwrap());
    [100, 103, 104, 109].into_iter().for_each(|page| write(&rig, page));
    assert_eq!(rig.handle.dirty().unwrap(), [gpas(12, 12), gpas(15, 16), gpas(21, 21)]);
    assert_eq!(rig.handle.dirty().unwrap(), []);
    assert_eq!(rig.domain.dirty_take(), Some(vec![]));
}

#[test]
fn pages_of_mappings_that_are_gone_are_in_the_domain() {
    let rig = rig(DirtyScope::Written);
    over(rig.domain.map(rw(100, 109, 12)).unwrap());
    over(rig.domain.map(rw(120, 120, 0)).unwrap());
    write(&rig, 100);
    write(&rig, 109);
    over(rig.domain.unmap(pages(100, 120)).unwrap());
    let calls = rig.fake.take_calls();
    let unmaps =
        calls.iter().filter(|call| matches!(call, Call::Unmap(u) if u.flags == UnmapFlags::GET_DIRTY_BITMAP));
    assert_eq!(unmaps.count(), 3, "one a piece");
    assert_eq!(rig.handle.dirty().unwrap(), []);
    assert_eq!(rig.domain.dirty_take(), Some(vec![gpas(12, 12), gpas(21, 21)]));
    rig.check();
}

#[test]
fn devices_that_cannot_tell_have_written_to_what_they_may() {
    let rig = rig(DirtyScope::AllPages);
    over(rig.domain.map(rw(100, 109, 12)).unwrap());
    over(rig.domain.map(map_of(200, 201, 64, Access::READ)).unwrap());
    for _ in 0..2 {
        assert_eq!(rig.handle.dirty().unwrap(), [gpas(12, 21)]);
    }
    over(rig.domain.unmap(pages(200, 201)).unwrap());
    over(rig.domain.unmap(pages(100, 109)).unwrap());
    assert_eq!(rig.domain.dirty_take(), Some(vec![gpas(12, 21)]));
}

#[test]
fn bits_that_were_read_before_an_error_are_told_by_the_next_call() {
    let rig = rig(DirtyScope::Written);
    over(rig.domain.map(rw(100, 101, 0)).unwrap());
    over(rig.domain.map(rw(110, 111, 8)).unwrap());
    write(&rig, 100);
    write(&rig, 111);
    rig.fake.fail(Kind::Dirty, 1, Errno::ENOMEM);
    assert_eq!(rig.handle.dirty(), Err(Errno::ENOMEM));
    rig.fake.heal();
    assert_eq!(rig.handle.dirty().unwrap(), [gpas(0, 0), gpas(9, 9)]);
}

#[test]
fn unmap_without_a_bitmap_counts_all_as_written() {
    let rig = rig(DirtyScope::Written);
    over(rig.domain.map(rw(100, 101, 0)).unwrap());
    over(rig.domain.map(rw(110, 111, 8)).unwrap());
    // The kernel does not track any more, and so gives no bitmap; without one, the call goes through.
    rig.fake.lock().container.dirty_stop().unwrap();
    over(rig.domain.unmap(pages(100, 111)).unwrap());
    assert!(!rig.subscription.is_fenced());
    assert_eq!(rig.domain.dirty_take(), Some(vec![gpas(0, 1), gpas(8, 9)]));
    rig.check();
}

#[test]
fn tracking_is_an_error_where_there_is_none_or_none_is_on() {
    let rig = Rig::new();
    assert_eq!(rig.handle.dirty(), Err(Errno::EINVAL));
    rig.handle.dirty_start().unwrap();
    rig.handle.dirty_start().unwrap();
    rig.handle.dirty_stop().unwrap();
    assert_eq!(rig.handle.dirty(), Err(Errno::EINVAL));
    rig.fake.lock().tracks = false;
    rig.handle.refresh().unwrap();
    assert_eq!(rig.handle.dirty_start(), Err(Errno::EOPNOTSUPP));
    assert!(!rig.fake.lock().container.is_tracking());
}
