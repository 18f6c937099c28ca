//! The vectors of the contract's section 8, by number; its granule is our page.

use viommu::subscribe::Reach;
use viommu::{Access, Domain, FillError, Interest, Iommu, IovaRange, StepErrorKind, Subscription, Tables};

use crate::support::*;

struct Scene {
    iommu: Iommu,
    endpoint: viommu::Endpoint,
    domain: Domain,
    m: Handle,
    c: Handle,
    _subscriptions: [Subscription; 2],
}

/// `mapped`, a mirror, and a cache that has cached all of it.
fn scene(mapped: &[viommu::Mapping], tables: Tables, window: IovaRange) -> Scene {
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, tables).unwrap();
    let endpoint = endpoint(&iommu, 8);
    over(endpoint.attach(1).unwrap());
    for m in mapped {
        over(domain.map(*m).unwrap());
    }
    let (mirror, m) = RecordingMirror::new(Reach::default());
    let mirror = endpoint.subscribe_mirror(mirror, Interest::MIRROR.within(window)).unwrap();
    let (cache, c) = cache_at(&endpoint);
    for m in mapped {
        cache.fill(m.range.start(), Access::READ).unwrap();
    }
    (m.take(), c.take());
    Scene { iommu, endpoint, domain, m, c, _subscriptions: [mirror, cache] }
}

fn plain(mapped: &[viommu::Mapping]) -> Scene {
    scene(mapped, Tables::OwnedCut, IovaRange::ALL)
}

#[test]
fn vector_01_map_of_nothing() {
    let s = plain(&[]);
    over(s.domain.map(rw(0, 9, 100)).unwrap());
    assert_eq!(s.m.take(), [Event::Map(rw(0, 9, 100))]);
    assert_eq!(s.c.take(), []);
}

#[test]
fn vector_02_replace_of_all() {
    let s = plain(&[rw(0, 9, 100)]);
    over(s.domain.replace(rw(0, 9, 200)).unwrap());
    assert_eq!(s.m.take(), [Event::Unmap(pages(0, 9)), Event::Map(rw(0, 9, 200))]);
    assert_eq!(s.c.take(), [Event::Invalidate(pages(0, 9))]);
}

#[test]
fn vector_03_weaker_permission() {
    let s = plain(&[rw(0, 9, 100)]);
    let weaker = map_of(0, 9, 100, Access::READ);
    over(s.domain.replace(weaker).unwrap());
    assert_eq!(s.m.take(), [Event::Unmap(pages(0, 9)), Event::Map(weaker)]);
    assert_eq!(s.c.take(), [Event::Invalidate(pages(0, 9))]);
}

#[test]
fn vector_04_the_same_again() {
    let s = plain(&[rw(0, 9, 100)]);
    over(s.domain.replace(rw(0, 9, 100)).unwrap());
    assert_eq!((s.m.take(), s.c.take()), (vec![], vec![]));
}

#[test]
fn vector_05_replace_inside() {
    let s = plain(&[rw(0, 9, 100)]);
    over(s.domain.replace(rw(3, 4, 200)).unwrap());
    let maps = [rw(0, 2, 100), rw(3, 4, 200), rw(5, 9, 105)].map(Event::Map);
    assert_eq!(s.m.take(), [&[Event::Unmap(pages(0, 9))][..], &maps].concat());
    assert_eq!(s.c.take(), [Event::Invalidate(pages(0, 9))]);
}

#[test]
fn vector_06_clear_of_two() {
    let s = plain(&[rw(0, 4, 100), rw(5, 9, 200)]);
    over(s.domain.unmap(pages(0, 9)).unwrap());
    assert_eq!(s.m.take(), [Event::Unmap(pages(0, 9))]);
    assert_eq!(s.c.take(), [Event::Invalidate(pages(0, 9))]);
}

#[test]
fn vector_07_clear_of_nothing() {
    let s = plain(&[rw(0, 9, 100)]);
    over(s.domain.unmap(pages(20, 29)).unwrap());
    assert_eq!((s.m.take(), s.c.take()), (vec![], vec![]));
}

#[test]
fn vector_08_window() {
    let s = scene(&[rw(0, 9, 100)], Tables::OwnedCut, pages(5, 20));
    assert_eq!(s.m.held(), [rw(5, 9, 105)]);
    over(s.domain.unmap(pages(0, 9)).unwrap());
    assert_eq!(s.m.take(), [Event::Unmap(pages(5, 9))]);
    assert_eq!(s.c.take(), [Event::Invalidate(pages(0, 9))]);
}

#[test]
fn vector_09_superset_invalidation() {
    let guest = Guest::default();
    guest.set(&[rw(0, 9, 100)]);
    let s = scene(&[], guest.tables(), IovaRange::ALL);
    guest.sync(&s.domain, pages(0, 63));
    assert_eq!(s.m.take(), [Event::Map(rw(0, 9, 100))]);
    s.c.take();
    guest.sync(&s.domain, pages(0, 63));
    assert_eq!(s.m.take(), []);
    assert_eq!(s.c.take(), [Event::Invalidate(pages(0, 63))]);
}

#[test]
fn vector_10_second_mirror() {
    let s = plain(&[rw(0, 9, 100)]);
    let (_second, m2) = mirror_at(&s.endpoint, Reach::default());
    assert_eq!(m2.take(), [Event::Map(rw(0, 9, 100))]);
    assert_eq!((s.m.take(), s.c.take()), (vec![], vec![]));
}

#[test]
fn vector_11_attach_elsewhere() {
    let s = plain(&[rw(0, 9, 100)]);
    let second = s.iommu.create_domain(2, Tables::Owned).unwrap();
    over(second.map(rw(5, 9, 300)).unwrap());
    over(s.endpoint.attach(2).unwrap());
    assert_eq!(s.m.take(), [Event::Unmap(pages(0, 9)), Event::Map(rw(5, 9, 300))]);
    assert_eq!(s.c.held(), []);
    let told = s.c.take();
    assert!(matches!(told[..], [Event::Invalidate(r)] if r.covers(pages(0, 9))), "{told:?}");
}

#[test]
fn vector_12_refused_map() {
    let s = plain(&[]);
    let (_other, other) = mirror_at(&s.endpoint, Reach::default());
    let (_late, late) = mirror_at(&s.endpoint, Reach::default());
    other.refuse_nth(1, 1, is_map);
    let error = s.domain.map(rw(0, 9, 100)).unwrap_err();
    assert!(matches!(error.kind, StepErrorKind::Refused { .. }), "{error}");
    assert_eq!(other.take(), [Event::Map(rw(0, 9, 100))]);
    assert_eq!(s.m.take(), [Event::Map(rw(0, 9, 100)), Event::Unmap(pages(0, 9))]);
    assert_eq!((late.take(), s.c.take(), s.domain.len()), (vec![], vec![], 0));
}

#[test]
fn vector_13_fill_racing_with_clear() {
    let s = plain(&[]);
    let cache = &s._subscriptions[1];
    for _ in 0..300 {
        over(s.domain.map(rw(0, 9, 100)).unwrap());
        s.m.take();
        std::thread::scope(|scope| {
            let filling = scope.spawn(|| match cache.fill(at(3), Access::READ) {
                Ok(entry) => assert_eq!(entry.translate(at(3)), viommu::Gpa(103 * PAGE)),
                Err(FillError::Fault(_)) => {}
                Err(error) => panic!("{error}"),
            });
            s.domain.unmap(pages(0, 9)).unwrap().wait().unwrap();
            filling.join().unwrap();
        });
        assert_eq!(s.m.take(), [Event::Unmap(pages(0, 9))]);
        assert_eq!(s.c.held(), [], "I11");
    }
}
