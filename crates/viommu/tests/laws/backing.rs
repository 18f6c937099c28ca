//! L12: what lies at the guest's addresses comes and goes.

use viommu::subscribe::Reach;
use viommu::{Access, Extent, FaultReason, Interest, Medium, Place, Space, StepErrorKind, Tables};

use crate::support::*;

fn extent(first: u64, last: u64, medium: Medium) -> Extent {
    Extent { range: gpas(first, last), medium }
}

#[test]
fn extents_come_and_go_under_mappings() {
    let (iommu, _) = unit_with(|b| b);
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let e = endpoint(&iommu, 8);
    over(e.attach(1).unwrap());
    let (s, m) = mirror_at(&e, Reach::default());
    let (registers, r) = mirror_at(&e, Reach { mmio: true, ..Reach::default() });
    over(domain.map(rw(0, 29, 0)).unwrap());
    assert_eq!(m.take(), []);
    let check = |mirror: &[viommu::Mapping]| {
        assert_eq!(m.held(), mirror);
        assert!(s.audit().unwrap().is_clean() && registers.audit().unwrap().is_clean());
    };
    over(iommu.add_backing(extent(0, 9, Medium::Ram)).unwrap());
    check(&[rw(0, 9, 0)]);
    over(iommu.add_backing(extent(10, 14, Medium::Rom)).unwrap());
    check(&[rw(0, 9, 0), map_of(10, 14, 10, Access::READ)]);
    over(iommu.add_backing(extent(20, 24, Medium::Mmio)).unwrap());
    check(&[rw(0, 9, 0), map_of(10, 14, 10, Access::READ)]);
    assert_eq!(r.held().len(), 3);
    assert_eq!(m.take().len(), 2, "neighbours stay untouched (I13)");
    assert_eq!(translate(&e, 3, Access::WRITE).unwrap().place, Place::Ram);
    assert_eq!(translate(&e, 10, Access::READ).unwrap().place, Place::Rom);
    assert_eq!(translate(&e, 10, Access::WRITE).unwrap_err().reason, FaultReason::Permission);
    assert_eq!(translate(&e, 15, Access::READ).unwrap_err().reason, FaultReason::NoBacking);
    assert_eq!(translate(&e, 20, Access::RW).unwrap().place, Place::Mmio);
    over(iommu.remove_backing(gpas(0, 9)).unwrap());
    check(&[map_of(10, 14, 10, Access::READ)]);
    assert_eq!(m.take(), [Event::Unmap(pages(0, 9))]);
    assert_eq!(translate(&e, 3, Access::READ).unwrap_err().reason, FaultReason::NoBacking);
    assert_eq!(domain.len(), 1, "the record is the guest's");
    over(iommu.add_backing(extent(0, 9, Medium::Rom)).unwrap());
    check(&[map_of(0, 9, 0, Access::READ), map_of(10, 14, 10, Access::READ)]);
}

#[test]
fn backing_is_refused_whole() {
    let (iommu, _) = unit_with(|b| b.ram(0, 10 * PAGE));
    let kind = |outcome: Result<_, viommu::StepError>| outcome.map(over).unwrap_err().kind;
    assert!(matches!(kind(iommu.add_backing(extent(9, 12, Medium::Ram))), StepErrorKind::Backing { .. }));
    assert!(matches!(kind(iommu.remove_backing(gpas(0, 4))), StepErrorKind::Backing { .. }));
    assert_eq!(iommu.backing(), [extent(0, 9, Medium::Ram)]);
}

#[test]
fn identity_follows_ram_with_holes() {
    let (iommu, _) = unit_with(|b| b.ram(0, 10 * PAGE).ram(20 * PAGE, 10 * PAGE).bypass(true));
    let e = endpoint(&iommu, 8);
    let (s, m) = mirror_at(&e, Reach { wide_unmap: false, ..Reach::default() });
    assert_eq!(m.held(), [rw(0, 9, 0), rw(20, 29, 20)]);
    over(iommu.add_backing(extent(10, 19, Medium::Ram)).unwrap());
    over(iommu.remove_backing(gpas(0, 9)).unwrap());
    assert_eq!(m.held(), [rw(10, 19, 10), rw(20, 29, 20)]);
    assert_eq!(translate(&e, 5, Access::READ).unwrap_err().reason, FaultReason::Unmapped);
    assert!(s.audit().unwrap().is_clean());
}

#[test]
fn accesses_in_this_process_stop_before_memory_may_go() {
    let (iommu, _) = unit_with(|b| b.ram(0, 10 * PAGE));
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    over(domain.map(rw(0, 0, 5)).unwrap());
    let e = endpoint(&iommu, 8);
    over(e.attach(1).unwrap());
    let mut reader = e.reader("worker").unwrap();
    let guard = reader.enter();
    guard.probe(at(0), Access::READ).unwrap();
    let mut done = iommu.remove_backing(gpas(0, 9)).unwrap();
    assert!(!done.is_complete());
    assert_eq!(guard.probe(at(0), Access::READ).unwrap_err().reason, FaultReason::NoBacking);
    drop(guard);
    over(done);
}

#[test]
fn a_guard_whose_domain_is_gone_still_keeps_the_memory() {
    let (iommu, e, domain) = attached();
    over(domain.map(rw(0, 0, 5)).unwrap());
    let mut reader = e.reader("worker").unwrap();
    let guard = reader.enter();
    guard.probe(at(0), Access::READ).unwrap();
    let mut detached = e.detach().unwrap();
    let mut destroyed = iommu.destroy_domain(1).unwrap();
    let mut removed = iommu.remove_backing(gpas(0, (1 << 18) - 1)).unwrap();
    assert!(!detached.is_complete() && !destroyed.is_complete());
    assert!(!removed.is_complete(), "the memory may go, and a batch is still using it");
    drop(guard);
    over(detached);
    over(destroyed);
    over(removed);
}

#[test]
fn caches_hear_of_backing() {
    for at_space in [false, true] {
        let (iommu, _) = unit_with(|b| b.ram(0, 10 * PAGE));
        let domain = iommu.create_domain(1, Tables::Owned).unwrap();
        over(domain.map(rw(0, 9, 0)).unwrap());
        let e = endpoint(&iommu, 8);
        over(e.attach(1).unwrap());
        let (cache, c) = RecordingCache::new();
        let cache = if at_space {
            iommu.subscribe_cache(Space::Domain(1), cache, Interest::CACHE).unwrap()
        } else {
            e.subscribe_cache(cache, Interest::CACHE).unwrap()
        };
        cache.fill(at(3), Access::WRITE).unwrap();
        over(iommu.remove_backing(gpas(0, 9)).unwrap());
        assert_eq!(c.held(), []);
        assert!(cache.fill(at(3), Access::READ).is_err(), "filled with memory that is gone");
        over(iommu.add_backing(extent(0, 9, Medium::Rom)).unwrap());
        assert_eq!(cache.fill(at(3), Access::READ).unwrap().access, Access::READ);
        assert!(cache.audit().unwrap().is_clean());
    }
}

#[test]
fn a_question_about_nothing_allowed_is_a_fault() {
    let (iommu, _) = unit_with(|b| b.backing(extent(0, 9, Medium::Rom)));
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    over(domain.map(map_of(0, 0, 0, Access::WRITE)).unwrap());
    let e = endpoint(&iommu, 8);
    over(e.attach(1).unwrap());
    assert_eq!(translate(&e, 0, Access::empty()).unwrap_err().reason, FaultReason::Permission);
    let (cache, c) = cache_at(&e);
    cache.fill(at(0), Access::empty()).unwrap_err();
    assert_eq!(c.held(), []);
}
