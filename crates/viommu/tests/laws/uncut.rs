//! Who could not be cut off: what is taken away where it was is not over before it is cut off after all.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Wake, Waker};

use viommu::subscribe::{Bound, Reach};
use viommu::{
    Access, BlockerKind, Completion, Domain, Extent, Incident, Iommu, Medium, ResetKind, Subscription,
    Tables, WaitError,
};

use crate::support::*;

#[track_caller]
fn stuck(done: Completion) {
    drop(stuck_now(done));
}

/// It waits for somebody who could not be cut off, and for nothing else. To be looked at again.
#[track_caller]
fn stuck_now(mut done: Completion) -> Completion {
    assert!(done.is_stuck(), "before it is polled");
    assert!(!done.is_complete() && done.is_stuck());
    let blockers = done.blockers();
    assert!(blockers.iter().all(|b| b.kind == BlockerKind::FenceFailed), "{blockers:?}");
    assert!(matches!(done.wait_timeout(std::time::Duration::ZERO), Err(WaitError::FenceFailed)));
    done
}

/// A unit whose endpoint 8 is in domain 1, where pages 0 to 9 are mapped; its mirror has failed to unmap the first one,
/// and could not be cut off. With the completion of that.
fn uncut() -> (Iommu, viommu::Endpoint, Domain, (Subscription, Handle), Completion) {
    let (iommu, endpoint, domain) = attached();
    let mirror = mirror_at(&endpoint, Reach::default());
    (0..10).for_each(|page| over(domain.map(rw(page, page, page)).unwrap()));
    let done = stuck_now(fail(&mirror.1, &domain, 0));
    (iommu, endpoint, domain, mirror, done)
}

/// A removal at which the mirror fails, and cannot be cut off.
fn fail(mirror: &Handle, domain: &Domain, page: u64) -> Completion {
    mirror.refuse_nth(1, 1, is_unmap);
    mirror.lock().fence_fails = true;
    domain.unmap(pages(page, page)).unwrap()
}

#[test]
fn every_later_removal_in_the_domain_is_stuck_and_what_only_adds_goes_on() {
    let (_iommu, _endpoint, domain, _mirror, _) = uncut();
    stuck(domain.unmap(pages(1, 1)).unwrap());
    stuck(domain.unmap(pages(2, 3)).unwrap());
    stuck(domain.replace(rw(4, 4, 20)).unwrap());
    stuck(domain.batch().unmap(pages(5, 5)).map(rw(30, 30, 1)).commit().unwrap());
    let mut burst = domain.burst().unwrap();
    burst.map(rw(31, 31, 1)).unwrap();
    burst.unmap(pages(6, 6)).unwrap();
    stuck(burst.finish());
    over(domain.map(rw(0, 1, 40)).unwrap());
    over(domain.batch().map(rw(32, 32, 1)).map(rw(33, 33, 1)).commit().unwrap());
    assert_eq!(domain.len(), 9, "the record is not held up");
}

#[test]
fn what_is_gone_already_is_stuck_when_it_is_asked_for_again() {
    let (_iommu, _endpoint, domain, _mirror, _) = uncut();
    stuck(domain.unmap(pages(0, 0)).unwrap());
    stuck(domain.batch().unmap(pages(0, 0)).commit().unwrap());
    let mut burst = domain.burst().unwrap();
    assert_eq!(burst.unmap(pages(0, 0)).unwrap(), 0);
    stuck(burst.finish());
}

#[test]
fn other_domains_and_other_endpoints_go_on() {
    let (iommu, _endpoint, domain, _mirror, _) = uncut();
    let (second, third) = (endpoint(&iommu, 9), endpoint(&iommu, 10));
    let other = iommu.create_domain(2, Tables::Owned).unwrap();
    over(second.attach(2).unwrap());
    let (_s, m) = mirror_at(&second, Reach::default());
    over(other.map(rw(0, 9, 50)).unwrap());
    over(other.unmap(pages(0, 9)).unwrap());
    over(second.attach(1).unwrap());
    assert_eq!(m.held().len(), 9);
    over(domain.map(rw(20, 20, 1)).unwrap());
    over(third.attach(1).unwrap());
    over(second.detach().unwrap());
    over(third.remove().unwrap());
    over(other.unmap(pages(0, 9)).unwrap());
    over(iommu.destroy_domain(2).unwrap());
}

#[test]
fn its_endpoint_leaves_and_its_domain_ends_when_it_is_cut_off() {
    let (iommu, endpoint, _domain, mirror, failed) = uncut();
    let left = stuck_now(endpoint.detach().unwrap());
    let ended = stuck_now(iommu.destroy_domain(1).unwrap());
    // Nowhere to be seen any more, and still there.
    let reset = stuck_now(iommu.reset(ResetKind::Device).unwrap().completion);
    mirror.1.lock().fence_fails = false;
    over(iommu.reset(ResetKind::Device).unwrap().completion);
    [failed, left, ended, reset].into_iter().for_each(over);
}

#[test]
fn backing_is_in_use_until_it_is_cut_off() {
    let (iommu, _endpoint, _domain, mirror, _) = uncut();
    over(iommu.add_backing(Extent { range: gpas(0x50000, 0x50000), medium: Medium::Ram }).unwrap());
    let gone = stuck_now(iommu.remove_backing(gpas(0, 0x3ffff)).unwrap());
    mirror.1.lock().fence_fails = false;
    over(mirror.0.leave());
    over(gone);
}

/// Counts its wakes.
#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_fence_that_holds_at_last_wakes_who_waits() {
    type Cut = fn(&Iommu, &viommu::Endpoint, Subscription) -> Completion;
    let ways: [Cut; 4] = [
        |_, _, subscription| subscription.leave(),
        |_, _, subscription| {
            drop(subscription);
            Completion::ready()
        },
        |iommu, _, subscription| {
            let reset = iommu.reset(ResetKind::System).unwrap();
            over(subscription.leave());
            reset.completion
        },
        |_, endpoint, _subscription| endpoint.clone().remove().unwrap(),
    ];
    for cut in ways {
        let (iommu, incidents) = unit();
        let endpoint = endpoint(&iommu, 8);
        let domain = iommu.create_domain(1, Tables::Owned).unwrap();
        over(endpoint.attach(1).unwrap());
        let (subscription, m) = mirror_at(&endpoint, Reach::default());
        (0..2).for_each(|page| over(domain.map(rw(page, page, page)).unwrap()));
        let mut awaited = [fail(&m, &domain, 0), domain.unmap(pages(1, 1)).unwrap()];
        let counts = [Arc::new(Count::default()), Arc::new(Count::default())];
        for (done, count) in awaited.iter_mut().zip(&counts) {
            let waker = Waker::from(count.clone());
            assert!(Pin::new(done).poll(&mut Context::from_waker(&waker)).is_pending());
        }
        m.lock().fence_fails = false;
        over(cut(&iommu, &endpoint, subscription));
        counts.iter().for_each(|count| assert_eq!(count.0.load(Ordering::SeqCst), 1));
        awaited.into_iter().for_each(over);
        assert!(m.lock().dropped);
        let incidents = incidents.lock().unwrap();
        assert!(
            matches!(incidents[..], [Incident::FenceFailed { .. }, Incident::Fenced { .. }]),
            "{incidents:?}"
        );
    }
}

#[test]
fn the_way_back_is_a_new_mirror() {
    let (iommu, endpoint, domain, mirror, failed) = uncut();
    mirror.1.lock().fence_fails = false;
    over(mirror.0.leave());
    over(failed);
    let (_s, m) = mirror_at(&endpoint, Reach::default());
    assert!(!endpoint.is_fenced() && m.held().len() == 9);
    over(domain.unmap(pages(0, 9)).unwrap());
    assert!(m.held().is_empty() && iommu.outstanding() == 0);
}

#[test]
fn who_leaves_and_cannot_be_cut_off_even_then_is_in_use_for_good() {
    let (iommu, endpoint, domain, mirror, mut failed) = uncut();
    stuck(mirror.0.leave());
    assert!(mirror.1.lock().dropped);
    assert!(!failed.is_complete());
    stuck(domain.unmap(pages(1, 1)).unwrap());
    stuck(endpoint.detach().unwrap());
    stuck(iommu.reset(ResetKind::System).unwrap().completion);
}

#[test]
fn a_mirror_that_moved_on_before_it_failed_holds_what_it_has_not_given_back() {
    let (iommu, endpoint, first) = attached();
    let second = iommu.create_domain(2, Tables::Owned).unwrap();
    (0..3).for_each(|page| over(first.map(rw(page, page, page)).unwrap()));
    (0..3).for_each(|page| over(second.map(rw(page, page, page)).unwrap()));
    let (_s, m) = mirror_at(&endpoint, Reach::default());
    m.lock().pending = true;
    m.lock().fence_fails = true;
    let mut moved = endpoint.attach(2).unwrap();
    assert!(!moved.is_complete());
    // What it was to drop, and what it was to take.
    let resolvers = core::mem::take(&mut m.lock().resolvers);
    drop(resolvers);
    assert!(!moved.is_complete() && moved.is_stuck());
    stuck(first.unmap(pages(0, 0)).unwrap());
    stuck(second.unmap(pages(0, 0)).unwrap());
    let third = iommu.create_domain(3, Tables::Owned).unwrap();
    over(third.map(rw(0, 0, 1)).unwrap());
    over(third.unmap(pages(0, 0)).unwrap());
    m.lock().fence_fails = false;
    over(iommu.reset(ResetKind::Device).unwrap().completion);
    over(moved);
}

#[test]
fn an_answer_that_fails_after_nobody_waits_for_it_holds_up_later_steps_too() {
    let (_iommu, endpoint, domain) = attached();
    let (_s, m) = mirror_at(&endpoint, Reach::default());
    (0..3).for_each(|page| over(domain.map(rw(page, page, page)).unwrap()));
    m.lock().pending = true;
    m.lock().fence_fails = true;
    drop(domain.unmap(pages(0, 0)).unwrap());
    m.lock().pending = false;
    // Not under its lock: it is fenced by whoever answers.
    let resolvers = core::mem::take(&mut m.lock().resolvers);
    drop(resolvers);
    stuck(domain.unmap(pages(1, 1)).unwrap());
}

#[test]
fn a_cache_that_cannot_be_cut_off_holds_up_its_domain() {
    let (iommu, endpoint, domain) = attached();
    (0..3).for_each(|page| over(domain.map(rw(page, page, page)).unwrap()));
    let (cache, c) = cache_at(&endpoint);
    cache.fill(at(0), Access::READ).unwrap();
    c.lock().pending = true;
    c.lock().fence_fails = true;
    let mut done = domain.unmap(pages(0, 0)).unwrap();
    assert!(!done.is_complete());
    c.lock().resolvers.clear();
    assert!(!done.is_complete());
    let later = stuck_now(domain.unmap(pages(1, 1)).unwrap());
    let left = stuck_now(endpoint.detach().unwrap());
    c.lock().fence_fails = false;
    over(cache.leave());
    [done, later, left].into_iter().for_each(over);
    over(iommu.destroy_domain(1).unwrap());
}

#[test]
fn a_domains_own_mirror_holds_up_the_domain_and_not_who_leaves_it() {
    let (iommu, endpoint, domain) = attached();
    let (_s, m) = mirror_on(&iommu, 1, Reach::default());
    (0..3).for_each(|page| over(domain.map(rw(page, page, page)).unwrap()));
    stuck(fail(&m, &domain, 0));
    stuck(domain.unmap(pages(1, 1)).unwrap());
    over(endpoint.detach().unwrap());
    m.lock().fence_fails = false;
    over(iommu.destroy_domain(1).unwrap());
    assert!(m.lock().dropped);
}

/// A bound endpoint in domain 1, with pages 0 to 2 mapped.
fn bound() -> (Iommu, Hosts, viommu::Endpoint, Domain, viommu::BindingHandle) {
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    (0..3).for_each(|page| over(domain.map(rw(page, page, page)).unwrap()));
    let hosts = Hosts::default();
    let binding = iommu.add_binding(Box::new(hosts.clone()));
    let endpoint = endpoint(&iommu, 8);
    over(endpoint.bind_with(&binding).unwrap());
    over(endpoint.attach(1).unwrap());
    (iommu, hosts, endpoint, domain, binding)
}

#[test]
fn a_bound_mirror_that_nobody_is_switched_to_any_more_is_tried_again() {
    let (_iommu, hosts, endpoint, domain, _binding) = bound();
    let m = hosts.0.lock().unwrap().made[0].2.clone();
    let failed = stuck_now(fail(&m, &domain, 0));
    m.lock().fence_fails = false;
    over(endpoint.detach().unwrap());
    assert!(m.lock().dropped);
    over(failed);
    over(domain.unmap(pages(1, 1)).unwrap());
}

#[test]
fn an_endpoint_that_its_host_cannot_cut_off_holds_up_where_it_was() {
    for again in [false, true] {
        let (iommu, hosts, e, domain, binding) = bound();
        hosts.0.lock().unwrap().refuse = Some(Bound::Blocked);
        hosts.0.lock().unwrap().fence_fails = true;
        let gone = stuck_now(e.remove().unwrap());
        let later = stuck_now(domain.unmap(pages(0, 0)).unwrap());
        let other = iommu.create_domain(2, Tables::Owned).unwrap();
        over(other.map(rw(0, 0, 1)).unwrap());
        over(other.unmap(pages(0, 0)).unwrap());
        stuck(iommu.reset(ResetKind::Device).unwrap().completion);
        hosts.0.lock().unwrap().fence_fails = false;
        if again {
            // Switched: what it used before is out of its reach.
            hosts.0.lock().unwrap().refuse = None;
            let e = endpoint(&iommu, 8);
            over(e.bind_with(&binding).unwrap());
        } else {
            over(iommu.reset(ResetKind::Device).unwrap().completion);
        }
        [gone, later].into_iter().for_each(over);
        assert!(iommu.domain(1).is_none());
    }
}
