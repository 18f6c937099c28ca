//! L8, L9: what an unmap waits for.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use viommu::{Access, BlockerKind, FaultReason, Iommu, Tables, WaitError};

use crate::support::*;

#[test]
fn a_guard_keeps_its_batch_and_names_itself() {
    let (_iommu, e, domain) = attached();
    over(domain.map(rw(0, 9, 1)).unwrap());
    let mut reader = e.reader("queue 7").unwrap();
    let guard = reader.enter();
    let mut done = domain.unmap(pages(0, 9)).unwrap();
    assert!(!done.is_complete());
    let blockers = done.blockers();
    assert_eq!((blockers.len(), blockers[0].endpoint), (1, Some(e.id())));
    assert_eq!((blockers[0].label.as_str(), blockers[0].kind), ("queue 7", BlockerKind::Guard));
    assert!(matches!(done.wait_timeout(Duration::ZERO), Err(WaitError::HoldingGuard)));
    drop(guard);
    // A later batch never delays it.
    let _later = reader.enter();
    over(done);
}

#[test]
fn guards_of_other_domains_are_not_waited_for() {
    let (iommu, e, domain) = attached();
    let other = iommu.create_domain(2, Tables::Owned).unwrap();
    over(domain.map(rw(0, 9, 1)).unwrap());
    over(other.map(rw(0, 9, 1)).unwrap());
    let mut reader = e.reader("worker").unwrap();
    let _guard = reader.enter();
    over(other.unmap(pages(0, 9)).unwrap());
}

#[test]
fn a_guard_whose_endpoint_has_left_is_waited_for() {
    let (iommu, e, domain) = attached();
    let other = iommu.create_domain(2, Tables::Owned).unwrap();
    over(domain.map(rw(0, 9, 1)).unwrap());
    over(other.map(rw(0, 9, 1)).unwrap());
    let mut reader = e.reader("worker").unwrap();
    let guard = reader.enter();
    guard.probe(at(0), Access::READ).unwrap();
    let mut moved = e.attach(2).unwrap();
    assert!(!moved.is_complete());
    let mut done = domain.unmap(pages(0, 9)).unwrap();
    let mut both = other.unmap(pages(0, 9)).unwrap();
    assert!(!done.is_complete() && !both.is_complete());
    drop(guard);
    over(done);
    over(both);
    over(moved);
}

#[test]
fn a_completion_wakes_who_waits() {
    let (_iommu, e, domain) = attached();
    over(domain.map(rw(0, 9, 1)).unwrap());
    let inside = Arc::new(AtomicBool::new(false));
    let let_go = Arc::new(AtomicBool::new(false));
    let worker = std::thread::spawn({
        let (e, inside, let_go) = (e.clone(), inside.clone(), let_go.clone());
        move || {
            let mut reader = e.reader("worker").unwrap();
            let _guard = reader.enter();
            inside.store(true, Ordering::Release);
            while !let_go.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
        }
    });
    while !inside.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
    let mut done = domain.unmap(pages(0, 9)).unwrap();
    assert!(matches!(done.wait_timeout(Duration::from_millis(1)), Err(WaitError::TimedOut(_))));
    let waiter = std::thread::spawn(move || done.wait());
    std::thread::sleep(Duration::from_millis(5));
    let_go.store(true, Ordering::Release);
    waiter.join().unwrap().unwrap();
    worker.join().unwrap();
}

#[test]
fn completions_merge_and_dropped_ones_are_counted() {
    let (iommu, e, domain) = attached();
    over(domain.map(rw(0, 0, 1)).unwrap());
    over(domain.map(rw(1, 1, 1)).unwrap());
    let mut reader = e.reader("worker").unwrap();
    let guard = reader.enter();
    let mut one = domain.unmap(pages(0, 0)).unwrap();
    assert!(!one.is_complete());
    one.merge(domain.unmap(pages(1, 1)).unwrap());
    assert_eq!(iommu.outstanding(), 1);
    let before = Iommu::dropped();
    drop(one);
    assert!(Iommu::dropped() > before);
    assert_eq!((iommu.outstanding(), domain.len()), (0, 0));
    drop(guard);
}

#[test]
fn stuck_stays_stuck_when_merged() {
    let (iommu, _, domain) = attached();
    over(domain.map(rw(0, 0, 1)).unwrap());
    let (_s, m) = mirror_on(&iommu, 1, viommu::subscribe::Reach::default());
    m.refuse_nth(1, 1, is_unmap);
    m.lock().fence_fails = true;
    let mut all = viommu::Completion::ready();
    all.merge(domain.unmap(pages(0, 0)).unwrap());
    assert!(all.is_stuck() && !all.is_complete());
}

#[test]
fn a_lease_is_taken_back_by_callback() {
    let (_iommu, e, domain) = attached();
    over(domain.map(rw(0, 9, 1)).unwrap());
    over(domain.map(rw(20, 29, 1)).unwrap());
    let mut reader = e.reader("worker").unwrap();
    let guard = reader.enter();
    let asked = Arc::new(AtomicU64::new(0));
    let hold = Arc::new(Mutex::new(None));
    let lease = guard
        .lease(pages(2, 3), Access::RW, "disk", {
            let asked = asked.clone();
            move || {
                asked.fetch_add(1, Ordering::Relaxed);
            }
        })
        .unwrap();
    assert_eq!(lease.pieces().len(), 1);
    let quick = guard
        .lease(pages(4, 4), Access::RW, "net", {
            let hold = hold.clone();
            move || drop(hold.lock().unwrap().take())
        })
        .unwrap();
    *hold.lock().unwrap() = Some(quick);
    guard.lease(pages(9, 10), Access::READ, "x", || ()).unwrap_err();
    drop(guard);
    over(domain.unmap(pages(20, 29)).unwrap());
    assert_eq!(asked.load(Ordering::Relaxed), 0, "another range");
    let mut done = domain.unmap(pages(0, 9)).unwrap();
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    assert!(hold.lock().unwrap().is_none());
    assert!(!done.is_complete());
    let blockers = done.blockers();
    assert_eq!((blockers.len(), blockers[0].label.as_str()), (1, "disk"));
    assert_eq!((blockers[0].kind, blockers[0].endpoint), (BlockerKind::Lease, Some(e.id())));
    std::thread::spawn(move || drop(lease)).join().unwrap();
    over(done);
}

#[test]
fn a_lease_is_waited_for_when_its_endpoint_leaves() {
    let (iommu, e, domain) = attached();
    over(domain.map(rw(0, 9, 1)).unwrap());
    let mut reader = e.reader("worker").unwrap();
    let lease = reader.enter().lease(pages(2, 3), Access::RW, "disk", || ()).unwrap();
    let mut done = e.detach().unwrap();
    assert!(!done.is_complete());
    let mut gone = iommu.destroy_domain(1).unwrap();
    assert!(!gone.is_complete());
    drop(lease);
    over(done);
    over(gone);
}

#[test]
fn a_burst_reads_the_readers_once() {
    let (_iommu, e, domain) = attached();
    let mut reader = e.reader("worker").unwrap();
    let mut burst = domain.burst().unwrap();
    for p in 0..10 {
        burst.map(rw(p, p, p)).unwrap();
    }
    let guard = reader.enter();
    guard.probe(at(3), Access::READ).unwrap();
    assert_eq!(burst.unmap(pages(0, 4)).unwrap(), 5);
    assert!(burst.map(rw(9, 9, 1)).is_err());
    let mut done = burst.finish();
    assert!(!done.is_complete());
    drop(guard);
    over(done);
    assert_eq!(domain.len(), 5);
}

#[test]
fn a_burst_that_holds_the_domain_can_look_at_completions_with_failed_acks() {
    let (iommu, _, domain) = attached();
    let (s, m) = mirror_on(&iommu, 1, viommu::subscribe::Reach::default());
    m.lock().pending = true;
    let mut done = domain.map(rw(0, 0, 1)).unwrap();
    m.lock().resolvers.clear();
    let burst = domain.burst().unwrap();
    // Fencing takes the lock that the burst holds.
    assert!(!done.is_complete());
    over(burst.finish());
    over(done);
    assert!(s.is_fenced());
}

#[test]
fn a_span_is_of_one_state() {
    let (_iommu, e, domain) = attached();
    over(domain.map(rw(0, 0, 100)).unwrap());
    over(domain.map(rw(1, 1, 150)).unwrap());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut reader = e.reader("worker").unwrap();
            let mut pieces = Vec::new();
            for _ in 0..2_000 {
                pieces.clear();
                let guard = reader.enter();
                let read = guard.span(pages(0, 1), Access::READ, &mut pieces);
                match read {
                    Ok(()) => {
                        let gpas: Vec<_> = pieces.iter().map(|p| p.gpa.0 / PAGE).collect();
                        assert!(gpas == [100, 150] || gpas == [200, 250], "{gpas:?}");
                    }
                    Err(fault) => assert_eq!(fault.reason, FaultReason::Unmapped),
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        let mut base = 100;
        while !stop.load(Ordering::Relaxed) {
            base = 300 - base;
            let batch = domain.batch().replace(rw(0, 0, base)).replace(rw(1, 1, base + 50));
            batch.commit().unwrap().wait().unwrap();
        }
    });
}

/// A guest that frees a page and uses it for something else; a device that writes a mark into what it translated. With
/// the wait the mark never lands in the page's next life.
fn reused(wait: bool, rounds: u64) -> u64 {
    let (_iommu, e, domain) = attached();
    // The page's life: even while it is the device's, odd in its next use.
    let life = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let late = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut reader = e.reader("device").unwrap();
            while !stop.load(Ordering::Relaxed) {
                let guard = reader.enter();
                if guard.probe(at(0), Access::WRITE).is_ok() {
                    for _ in 0..20 {
                        std::thread::yield_now(); // in the middle of its DMA
                        if life.load(Ordering::Acquire) % 2 == 1 {
                            late.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            }
        });
        for _ in 0..rounds {
            domain.map(rw(0, 0, 1)).unwrap().wait().unwrap();
            std::thread::yield_now();
            let done = domain.unmap(pages(0, 0)).unwrap();
            if wait {
                done.wait().unwrap();
            }
            life.fetch_add(1, Ordering::AcqRel);
            std::thread::yield_now();
            life.fetch_add(1, Ordering::AcqRel);
        }
        stop.store(true, Ordering::Relaxed);
    });
    late.into_inner()
}

#[test]
fn with_the_wait_no_access_lands_in_a_reused_page() {
    assert_eq!(reused(true, 2_000), 0);
}

#[test]
fn without_the_wait_one_would() {
    let landed = (0..50).any(|_| reused(false, 500) > 0);
    assert!(landed, "the test of the wait could not fail");
}

#[test]
fn caches_filled_beside_unmaps_are_never_stale() {
    let (_iommu, e, domain) = attached();
    let (cache, c) = cache_at(&e);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = cache.fill(at(0), Access::READ);
                let _ = cache.fill(at(1), Access::READ);
            }
        });
        for round in 0..2_000 {
            domain.map(rw(0, 1, 1 + round % 50)).unwrap().wait().unwrap();
            domain.replace(rw(1, 1, 100)).unwrap().wait().unwrap();
            let stale =
                c.held().into_iter().find(|m| m.clip(pages(1, 1)).is_some_and(|m| m.gpa.0 != 100 * PAGE));
            assert_eq!(stale, None);
            domain.unmap(pages(0, 1)).unwrap().wait().unwrap();
            assert_eq!(c.held(), []);
        }
        stop.store(true, Ordering::Relaxed);
    });
}
