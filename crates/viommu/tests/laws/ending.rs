//! The end of a unit: who drops everything gets everything back, and no device keeps its reach.

use std::sync::{Arc, Mutex};

use viommu::subscribe::{Bound, Observer, Reach};
use viommu::{Access, Builder, Change, Incident, Interest, Iommu, Kinds, Space, Subscription, Tables};

use crate::support::*;

/// A unit, and what is there as long as anything of it is.
fn traced_unit(with: impl FnOnce(Builder) -> Builder) -> (Iommu, Incidents) {
    let incidents = Incidents::default();
    let alarm = incidents.clone();
    let builder = Iommu::builder().ram(0, 1 << 30);
    let builder = builder.alarm(move |incident| alarm.lock().unwrap().push(incident.clone()));
    (with(builder).build().unwrap(), incidents)
}

#[track_caller]
fn nothing_is_left(incidents: &Incidents) {
    assert_eq!(Arc::strong_count(incidents), 1, "something of the unit is left");
}

#[track_caller]
fn is_given_back(mirror: &Handle) {
    assert_eq!(mirror.held(), [], "emptied");
    assert!(mirror.lock().dropped, "and dropped");
}

/// Three bound endpoints, two of them in domain 1 and one in an identity view.
fn bound(iommu: &Iommu, hosts: &Hosts) -> Vec<viommu::Endpoint> {
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    over(domain.map(rw(0, 9, 1)).unwrap());
    let binding = iommu.add_binding(Box::new(hosts.clone()));
    let endpoints: Vec<_> = (8..11).map(|id| endpoint(iommu, id)).collect();
    endpoints.iter().for_each(|e| over(e.bind_with(&binding).unwrap()));
    endpoints[..2].iter().for_each(|e| over(e.attach(1).unwrap()));
    endpoints
}

#[test]
fn bound_endpoints_are_switched_to_nothing_and_their_mirrors_emptied() {
    for endpoints_first in [false, true] {
        let (iommu, incidents) = traced_unit(|b| b.bypass(true));
        let hosts = Hosts::default();
        let endpoints = bound(&iommu, &hosts);
        let mirrors: Vec<_> = hosts.0.lock().unwrap().made.iter().map(|made| made.2.clone()).collect();
        assert_eq!(mirrors.iter().map(|m| m.held().len()).collect::<Vec<_>>(), [1, 1]);
        hosts.0.lock().unwrap().bound.clear();
        if endpoints_first {
            drop(endpoints);
            drop(iommu);
        } else {
            drop(iommu);
            drop(endpoints);
        }
        let bound = hosts.0.lock().unwrap().bound.clone();
        let blocked: Vec<_> = (8..11).map(|id| (viommu::EndpointId::new(id), Bound::Blocked)).collect();
        assert_eq!(bound, blocked);
        mirrors.iter().for_each(is_given_back);
        nothing_is_left(&incidents);
        assert_eq!(Arc::strong_count(&hosts.0), 1, "the binding too");
    }
}

#[test]
fn a_host_that_cannot_switch_cuts_off_and_one_that_cannot_even_do_that_is_told_of() {
    for fence_fails in [false, true] {
        let (iommu, incidents) = traced_unit(|b| b.bypass(true));
        let hosts = Hosts::default();
        let endpoints = bound(&iommu, &hosts);
        hosts.0.lock().unwrap().refuse = Some(Bound::Blocked);
        hosts.0.lock().unwrap().fence_fails = fence_fails;
        drop((iommu, endpoints));
        assert_eq!(hosts.0.lock().unwrap().fenced.len(), 3);
        let failed = |incident: &&Incident| matches!(incident, Incident::FenceFailed { .. });
        assert_eq!(incidents.lock().unwrap().iter().filter(failed).count(), if fence_fails { 3 } else { 0 });
        hosts.0.lock().unwrap().made.iter().for_each(|made| assert!(made.2.lock().dropped));
        nothing_is_left(&incidents);
    }
}

/// Somebody of each kind, at an endpoint and at its domain.
fn everybody(iommu: &Iommu, endpoint: &viommu::Endpoint) -> (Vec<Subscription>, Vec<Handle>) {
    let observed = Interest::all_of(Kinds::MAP | Kinds::UNMAP);
    let (cache, c) = RecordingCache::new();
    let everywhere = iommu.subscribe_cache(Space::Domain(1), cache, Interest::CACHE).unwrap();
    let (observer, o) = RecordingObserver::new();
    let looks_on = endpoint.subscribe_observer(observer, observed).unwrap();
    let others =
        [mirror_at(endpoint, Reach::default()), mirror_on(iommu, 1, Reach::default()), cache_at(endpoint)];
    let others = others.into_iter().chain([(everywhere, c), (looks_on, o)]);
    others.unzip()
}

#[test]
fn whatever_is_dropped_first_nothing_is_left() {
    for parked in [false, true] {
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 1, 3], [1, 3, 0, 2]] {
            let (iommu, incidents) = traced_unit(|b| b);
            let domain = iommu.create_domain(1, Tables::Owned).unwrap();
            over(domain.map(rw(0, 9, 1)).unwrap());
            let e = endpoint(&iommu, 8);
            over(e.attach(1).unwrap());
            let (subscriptions, handles) = everybody(&iommu, &e);
            for cache in [&subscriptions[2], &subscriptions[3]] {
                cache.fill(at(3), Access::READ).unwrap();
            }
            assert!(handles[..4].iter().all(|h| h.held().len() == 1));
            if parked {
                over(e.detach().unwrap());
            }
            let (mut iommu, mut e) = (Some(iommu), Some(e));
            let (mut domain, mut subscriptions) = (Some(domain), Some(subscriptions));
            for which in order {
                match which {
                    0 => drop(iommu.take()),
                    1 => drop(e.take()),
                    2 => drop(subscriptions.take()),
                    _ => drop(domain.take()),
                }
            }
            handles[..2].iter().for_each(is_given_back);
            nothing_is_left(&incidents);
        }
    }
}

#[test]
fn a_domain_and_a_reader_outlive_their_unit() {
    let (iommu, incidents) = traced_unit(|b| b);
    let hosts = Hosts::default();
    let endpoints = bound(&iommu, &hosts);
    let other = endpoint(&iommu, 20);
    over(other.attach(1).unwrap());
    let domain = iommu.domain(1).unwrap();
    let (mut switched, mut plain) = (endpoints[0].reader("bound").unwrap(), other.reader("plain").unwrap());
    let (inside, still) = (switched.enter(), plain.enter());
    drop((iommu, endpoints, other));
    is_given_back(&hosts.0.lock().unwrap().made[0].2);
    assert!(inside.probe(at(0), Access::READ).is_err(), "its device has lost it too");
    assert!(still.probe(at(0), Access::READ).is_ok());
    drop(inside);
    let mut gone = domain.unmap(pages(0, 9)).unwrap();
    assert!(!gone.is_complete(), "a guard is held");
    drop(still);
    over(gone);
    over(domain.map(rw(0, 0, 1)).unwrap());
    drop((domain, switched, plain));
    nothing_is_left(&incidents);
}

#[test]
fn the_last_handle_may_be_dropped_inside_a_callback() {
    let (iommu, incidents) = traced_unit(|b| b);
    let hosts = Hosts::default();
    drop(bound(&iommu, &hosts));
    let domain = iommu.domain(1).unwrap();
    let m = hosts.0.lock().unwrap().made[0].2.clone();
    let seen = m.clone();
    let mut last = Some(iommu);
    m.lock().inside = Some(Box::new(move |event| {
        drop(last.take());
        assert!(!is_map(event) || !seen.lock().dropped, "in the middle of its step");
    }));
    over(domain.map(rw(20, 20, 1)).unwrap());
    is_given_back(&m);
    m.lock().inside = None;
    drop(domain);
    nothing_is_left(&incidents);
}

/// Has its own subscription, and the last handle with it.
#[derive(Default)]
struct Own(Arc<Mutex<Option<Subscription>>>);

impl Observer for Own {
    fn changed(&mut self, _: Space, _: &Change) {
        drop(self.0.lock().unwrap().take());
    }
}

#[test]
fn the_last_subscription_may_be_dropped_inside_a_callback() {
    let (iommu, incidents) = traced_unit(|b| b);
    let hosts = Hosts::default();
    drop(bound(&iommu, &hosts));
    let domain = iommu.domain(1).unwrap();
    let own = Own::default();
    let place = own.0.clone();
    let observed = Interest::all_of(Kinds::MAP | Kinds::UNMAP);
    let subscription = iommu.subscribe_observer(Space::Domain(1), Box::new(own), observed).unwrap();
    *place.lock().unwrap() = Some(subscription);
    drop(iommu);
    over(domain.map(rw(20, 20, 1)).unwrap());
    is_given_back(&hosts.0.lock().unwrap().made[0].2);
    drop(domain);
    nothing_is_left(&incidents);
}

#[test]
fn who_has_not_answered_at_the_end_is_there_until_it_has() {
    for done in [true, false] {
        let (iommu, incidents) = traced_unit(|b| b);
        let hosts = Hosts::default();
        let endpoints = bound(&iommu, &hosts);
        let m = hosts.0.lock().unwrap().made[0].2.clone();
        m.lock().pending = true;
        drop((iommu, endpoints));
        assert!(!m.lock().dropped);
        let resolvers = core::mem::take(&mut m.lock().resolvers);
        resolvers.into_iter().for_each(if done {
            viommu::ack::Resolver::done
        } else {
            viommu::ack::Resolver::failed
        });
        assert!(m.lock().dropped);
        assert_eq!(m.lock().fenced, !done);
        let told = incidents.lock().unwrap().len();
        assert_eq!(told, usize::from(!done), "the alarm outlives the unit");
        nothing_is_left(&incidents);
    }
}

#[test]
fn a_unit_in_which_somebody_panicked_is_dropped_without_another_panic() {
    let (iommu, _) = traced_unit(|b| b);
    let hosts = Hosts::default();
    let endpoints = bound(&iommu, &hosts);
    let domain = iommu.domain(1).unwrap();
    let m = hosts.0.lock().unwrap().made[0].2.clone();
    m.lock().inside = Some(Box::new(|_| panic!("told to")));
    let step = std::thread::spawn(move || domain.map(rw(20, 20, 1)).map(drop));
    assert!(step.join().is_err());
    drop((iommu, endpoints));
}
