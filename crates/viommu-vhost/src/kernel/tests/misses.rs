//! What a device asks and is told.

use super::*;

#[test]
fn miss_is_answered_with_the_extent_and_its_permission() {
    let rig = Rig::new();
    over(rig.domain.map(map_of(4, 7, 8, Access::READ)).unwrap());
    rig.fill(5 * PAGE + 0x123, Access::READ);
    assert_eq!(rig.peer.take_told(), [update(5, 7, rig.host(9), perm::READ)]);
    assert_eq!(rig.peer.reach(7 * PAGE + 4, Access::READ), Lookup::Hit(Gpa(rig.host(11).0 + 4)));
    assert_eq!(rig.peer.reach(7 * PAGE, Access::WRITE), Lookup::Denied);
    assert_eq!(rig.handle.held(), [map_of(5, 7, 9, Access::READ)]);
    assert_eq!(rig.handle.counts(), Counts { misses: 1, updates: 1, ..Counts::default() });
    rig.check_audits();
}

#[test]
fn miss_of_what_is_not_mapped_is_counted_and_told_to_the_model() {
    let rig = Rig::new();
    over(rig.domain.map(map_of(4, 7, 8, Access::READ)).unwrap());
    rig.fill(4 * PAGE, Access::WRITE);
    rig.fill(8 * PAGE, Access::READ);
    over(rig.endpoint.block().unwrap());
    rig.fill(4 * PAGE, Access::READ);
    assert_eq!(rig.peer.take_told(), []);
    assert_eq!((rig.handle.counts().misses, rig.handle.counts().denied), (3, 3));
    use viommu::FaultReason::{Blocked, Permission, Unmapped};
    let reasons: Vec<_> = rig.faults.0.lock().unwrap().iter().map(|fault| fault.reason).collect();
    assert_eq!(reasons, [Permission, Unmapped, Blocked]);
}

#[test]
fn answer_is_cut_to_the_region_of_memory() {
    let rig = Rig::new();
    over(rig.domain.map(rw(100, 107, 12)).unwrap());
    rig.fill(101 * PAGE, Access::WRITE);
    rig.fill(104 * PAGE, Access::WRITE);
    let told = rig.peer.take_told();
    assert_eq!(told, [update(101, 103, rig.host(13), 3), update(104, 107, rig.host(16), 3)]);
    rig.check_audits();
}

#[test]
fn read_only_memory_is_never_entered_writable() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 0, ROM.0)).unwrap());
    rig.fill(0, Access::WRITE);
    assert_eq!(rig.handle.counts().denied, 1);
    rig.fill(0, Access::READ);
    assert_eq!(rig.peer.take_told(), [update(0, 0, rig.host(ROM.0), perm::READ)]);
}

#[test]
fn device_registers_are_no_answer() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 0, BAR.0)).unwrap());
    rig.fill(0, Access::READ);
    assert_eq!(rig.peer.take_told(), []);
    assert_eq!((rig.handle.counts().no_memory, rig.handle.counts().denied), (1, 0));
    assert_eq!(rig.handle.held(), []);
}

#[test]
fn unmap_is_over_when_the_device_was_told() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    over(rig.domain.map(rw(4, 4, 4)).unwrap());
    rig.fill(0, Access::READ);
    rig.peer.take_told();
    over(rig.domain.unmap(pages(0, 3)).unwrap());
    assert_eq!(rig.peer.take_told(), [invalidate(0, 3)]);
    assert_eq!(rig.peer.reach(0, Access::READ), Lookup::Miss);
}

#[test]
fn unmap_of_what_the_device_never_heard_of_writes_nothing() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 3, 0)).unwrap());
    over(rig.domain.unmap(pages(0, 3)).unwrap());
    assert_eq!(rig.peer.take_told(), []);
    assert_eq!(rig.handle.counts().unheard, 1);
}

#[test]
fn change_in_place_is_dropped_before_it_is_asked_again() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 0, 0)).unwrap());
    rig.fill(0, Access::READ);
    over(rig.domain.replace(map_of(0, 0, 0, Access::READ)).unwrap());
    rig.fill(0, Access::READ);
    over(rig.domain.replace(map_of(0, 0, 5, Access::RW)).unwrap());
    rig.fill(0, Access::READ);
    let (a, b) = (rig.host(0), rig.host(5));
    let told =
        [update(0, 0, a, 3), invalidate(0, 0), update(0, 0, a, 1), invalidate(0, 0), update(0, 0, b, 3)];
    assert_eq!(rig.peer.take_told(), told);
}

#[test]
fn page_asked_for_twice_is_one_entry() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 7, 0)).unwrap());
    let mut peer = rig.peer.lock();
    peer.asked.extend([miss(4 * PAGE, Access::READ), miss(PAGE, Access::WRITE), miss(PAGE, Access::READ)]);
    drop(peer);
    assert_eq!(rig.serve(), Turn::default());
    let (all, later) = (update(1, 7, rig.host(1), 3), update(4, 7, rig.host(4), 3));
    assert_eq!(rig.peer.take_told(), [later, invalidate(1, 7), all, invalidate(1, 7), all]);
    assert_eq!((rig.peer.lock().iotlb.len(), rig.handle.counts().displaced), (1, 2));
}

#[test]
fn oldest_entry_makes_room() {
    let rig = Rig::with(protocol(), |device| device.entries(NonZero::new(2).unwrap()));
    for page in 0..3 {
        over(rig.domain.map(rw(page, page, page)).unwrap());
        rig.fill(page * PAGE, Access::READ);
    }
    assert_eq!(rig.handle.held(), [rw(1, 1, 1), rw(2, 2, 2)]);
    assert_eq!(rig.peer.take_told()[2], invalidate(0, 0));
    assert_eq!((rig.peer.lock().iotlb.len(), rig.handle.counts().evicted), (2, 1));
}

#[test]
fn view_that_changes_and_memory_that_goes_are_dropped() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 3, 64)).unwrap());
    rig.fill(0, Access::READ);
    over(rig.iommu.remove_backing(extent((64, 71), Medium::Ram).range).unwrap());
    assert_eq!(rig.peer.reach(0, Access::READ), Lookup::Miss);
    assert_eq!(rig.serve(), Turn::default());
    assert_eq!(rig.handle.counts().denied, 1);
    over(rig.iommu.add_backing(extent((64, 71), Medium::Ram)).unwrap());
    rig.fill(0, Access::READ);
    rig.peer.take_told();
    over(rig.endpoint.block().unwrap());
    assert_eq!(rig.peer.reach(0, Access::READ), Lookup::Miss);
    let told = rig.peer.take_told();
    assert_eq!(told.iter().map(|m| m.size).collect::<Vec<_>>(), [1 << 63, 1 << 63]);
}

#[test]
fn messages_that_belong_together_are_a_batch_of_the_address_space() {
    let protocol = Protocol::of(VIRTIO_F_ACCESS_PLATFORM, Protocol::WANTED).unwrap().asid(3).unwrap();
    let rig = Rig::with(protocol, |device| device);
    over(rig.domain.map(rw(0, 0, 0)).unwrap());
    let asked = [miss(0, Access::READ), Message { asid: 3, ..miss(0, Access::READ) }];
    rig.peer.lock().asked.extend([asked[0], asked[1], asked[1]]);
    assert_eq!(rig.serve(), Turn::default());
    let kinds: Vec<_> = rig.peer.take_told().iter().map(|m| m.kind).collect();
    assert_eq!(kinds, [2, 5, 3, 2, 6]);
    // One was of another address space.
    assert_eq!((rig.handle.counts().misses, rig.handle.counts().odd), (2, 1));
}

#[test]
fn what_makes_no_sense_is_counted() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 0, 0)).unwrap());
    let old = Message { version: 1, ..miss(0, Access::READ) };
    let odd = [old, message(kind::MISS, 0, 0), message(kind::MISS, 0, 9), message(kind::UPDATE, 0, 3)];
    rig.peer.lock().asked.extend(odd);
    rig.peer.lock().asked.extend([message(kind::ACCESS_FAIL, 0, perm::WRITE), message(77, 0, 1)]);
    assert_eq!(rig.serve(), Turn::default());
    assert_eq!(rig.peer.take_told(), []);
    assert_eq!(rig.handle.counts(), Counts { odd: 5, access_fails: 1, ..Counts::default() });
}

#[test]
fn flood_of_misses_is_served_in_pieces() {
    let rig = Rig::new();
    rig.peer.lock().asked.extend([miss(0, Access::READ); 100]);
    assert!(rig.serve().more);
    assert!(!rig.serve().more);
    assert_eq!(rig.handle.counts().misses, 100);
}

#[test]
fn stopped_device_is_told_nothing_and_asks_in_vain() {
    let rig = Rig::new();
    over(rig.domain.map(rw(0, 0, 0)).unwrap());
    rig.fill(0, Access::READ);
    rig.handle.stop();
    rig.peer.lock().iotlb.reset();
    rig.peer.take_told();
    rig.peer.lock().asked.push_back(miss(0, Access::READ));
    assert_eq!(rig.serve(), Turn::default());
    over(rig.domain.unmap(pages(0, 0)).unwrap());
    assert_eq!((rig.peer.take_told(), rig.handle.held()), (vec![], vec![]));
    rig.handle.start().unwrap();
    over(rig.domain.map(rw(0, 0, 1)).unwrap());
    rig.fill(0, Access::READ);
    assert_eq!(rig.peer.reach(0, Access::READ), Lookup::Hit(rig.host(1)));
}
