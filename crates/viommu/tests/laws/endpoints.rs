//! Views, attach and detach, isolation sets, regions, bindings, fencing and the way back, reset.

use viommu::endpoint::{Region, RegionKind};
use viommu::subscribe::{Bound, Reach};
use viommu::{
    Access, AttachErrorKind, BlockerKind, EndpointConfig, EndpointId, FaultReason, Gpa, Interest, Iommu,
    Mapping, Place, ResetKind, Space, StepErrorKind, Tables, View,
};

use crate::support::*;

fn reason(e: &viommu::Endpoint, page: u64, access: Access) -> FaultReason {
    translate(e, page, access).unwrap_err().reason
}

fn with_regions(iommu: &Iommu, id: u32) -> viommu::Endpoint {
    let region = |first, last, kind| Region { range: pages(first, last), kind };
    let regions = vec![region(20, 21, RegionKind::Msi), region(10, 11, RegionKind::Reserved)];
    iommu.add_endpoint(id, EndpointConfig { regions }).unwrap()
}

#[test]
fn views_answer_as_they_should() {
    let (iommu, _) = unit_with(|b| b.ram(0, 16 << 20));
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let e = with_regions(&iommu, 8);
    over(domain.map(map_of(0, 0, 5, Access::READ)).unwrap());
    over(domain.map(rw(1, 1, 0x5000).mmio()).unwrap());
    assert_eq!(reason(&e, 0, Access::READ), FaultReason::Blocked);
    let in_every_view = |e: &viommu::Endpoint| {
        assert_eq!(reason(e, 10, Access::READ), FaultReason::Reserved);
        assert_eq!(reason(e, 20, Access::READ), FaultReason::Reserved);
        let msi = translate(e, 21, Access::WRITE).unwrap();
        assert_eq!((msi.gpa, msi.place), (Gpa(21 * PAGE), Place::Msi));
    };
    in_every_view(&e);
    over(e.attach_identity().unwrap());
    in_every_view(&e);
    let hit = translate(&e, 9, Access::RW).unwrap();
    assert_eq!((hit.gpa, hit.last), (Gpa(9 * PAGE), pages(9, 9).last()), "up to the region");
    assert_eq!(reason(&e, 0x5000, Access::READ), FaultReason::Unmapped);
    over(e.attach(1).unwrap());
    in_every_view(&e);
    assert_eq!(translate(&e, 0, Access::READ).unwrap().gpa, Gpa(5 * PAGE));
    assert_eq!(reason(&e, 0, Access::WRITE), FaultReason::Permission);
    assert_eq!(reason(&e, 1, Access::WRITE), FaultReason::NoBacking);
    assert_eq!(reason(&e, 2, Access::READ), FaultReason::Unmapped);
    let extent = viommu::Extent { range: gpas(0x5000, 0x5000), medium: viommu::Medium::Mmio };
    over(iommu.add_backing(extent).unwrap());
    assert_eq!(translate(&e, 1, Access::WRITE).unwrap().place, Place::Mmio);
}

#[test]
fn attach_detach_and_bypass_move_what_follows() {
    let (iommu, _) = unit_with(|b| b.ram(0, 16 * PAGE).bypass(true));
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    over(domain.map(rw(5, 5, 6)).unwrap());
    let e = endpoint(&iommu, 8);
    let (s, m) = mirror_at(&e, Reach::default());
    assert_eq!(m.take(), [Event::Map(rw(0, 15, 0))]);
    over(e.attach(1).unwrap());
    assert_eq!(m.take(), [Event::Unmap(pages(0, 15)), Event::Map(rw(5, 5, 6))]);
    over(e.attach(1).unwrap());
    assert_eq!(m.take(), [], "attaching where it is changes nothing");
    over(iommu.set_bypass(false).unwrap());
    assert_eq!(m.take(), [], "who is attached has nothing to do with it");
    over(e.detach().unwrap());
    assert_eq!(m.take(), [Event::Unmap(pages(5, 5))]);
    over(iommu.set_bypass(true).unwrap());
    assert_eq!(m.take(), [Event::Map(rw(0, 15, 0))]);
    assert_eq!((e.view(), e.attached()), (Some(View::Identity), None));
    assert!(s.audit().unwrap().is_clean());
}

#[test]
fn pasids_are_detached_with_their_endpoint() {
    let (iommu, _) = unit_with(|b| b.ram(0, 16 * PAGE).bypass(true));
    iommu.create_domain(1, Tables::Owned).unwrap();
    let e = endpoint(&iommu, 8);
    let p = iommu.add_endpoint(EndpointId::new(8).with_pasid(3), EndpointConfig::default()).unwrap();
    assert_eq!((e.view(), p.view()), (Some(View::Identity), Some(View::Blocked)));
    over(e.attach(1).unwrap());
    over(p.attach(1).unwrap());
    over(e.detach().unwrap());
    assert_eq!((e.view(), p.view()), (Some(View::Identity), Some(View::Blocked)));
    over(p.attach(1).unwrap());
    over(p.detach().unwrap());
    assert_eq!(p.view(), Some(View::Blocked));
    over(p.attach(1).unwrap());
    over(iommu.reset(ResetKind::Device).unwrap().completion);
    assert_eq!(p.view(), Some(View::Blocked), "bypass is for requests without PASID");
    over(e.remove().unwrap());
    assert!(iommu.endpoints().is_empty() && p.view().is_none());
}

#[test]
fn hot_plug_and_unplug() {
    let (iommu, e, domain) = attached();
    over(domain.map(rw(0, 0, 1)).unwrap());
    let (s, m) = mirror_at(&e, Reach::default());
    let mut reader = e.reader("worker").unwrap();
    let guard = reader.enter();
    guard.probe(at(0), Access::READ).unwrap();
    let mut done = e.clone().remove().unwrap();
    assert!(!done.is_complete(), "its device is inside");
    assert_eq!(guard.probe(at(0), Access::READ).unwrap_err().reason, FaultReason::Blocked);
    drop(guard);
    over(done);
    assert_eq!((m.held(), m.lock().dropped), (vec![], true));
    assert_eq!((e.view(), s.counts().map), (None, 0));
    assert!(matches!(e.attach(1).unwrap_err().kind, AttachErrorKind::NoEndpoint(_)));
    over(domain.map(rw(2, 2, 1)).unwrap());
    let again = endpoint(&iommu, 8);
    over(again.attach(1).unwrap());
    assert!(matches!(
        iommu.add_endpoint(8, EndpointConfig::default()).unwrap_err().kind,
        AttachErrorKind::Exists(_)
    ));
    over(s.leave());
}

#[test]
fn a_fenced_endpoint_can_be_unplugged_and_leaves_nothing() {
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let e = with_regions(&iommu, 8);
    over(e.attach(1).unwrap());
    let (s, m) = mirror_at(&e, Reach::default());
    over(domain.map(rw(0, 0, 1)).unwrap());
    m.refuse_nth(1, 1, is_unmap);
    over(domain.unmap(pages(0, 0)).unwrap());
    assert!(e.is_fenced() && s.is_fenced());
    over(e.remove().unwrap());
    assert!(m.lock().dropped, "the domain keeps the mirror of an endpoint that is gone");
    // Its regions are gone with it.
    over(domain.map(rw(10, 21, 1)).unwrap());
}

#[test]
fn a_fenced_endpoint_goes_along_with_the_bypass_switch() {
    let (iommu, _) = unit_with(|b| b.ram(0, 16 * PAGE).bypass(true));
    let e = endpoint(&iommu, 8);
    let (s, m) = mirror_at(&e, Reach::default());
    m.refuse_nth(1, 1, is_unmap);
    over(iommu.remove_backing(gpas(0, 15)).unwrap());
    assert!(e.is_fenced());
    over(iommu.set_bypass(false).unwrap());
    over(s.leave());
    assert!(m.lock().dropped, "a fenced mirror is left in the identity view");
}

#[test]
fn the_way_back_from_a_fence_is_a_new_subscription() {
    let (iommu, e, domain) = attached();
    let (s, m) = mirror_at(&e, Reach::default());
    over(domain.map(rw(0, 0, 1)).unwrap());
    over(domain.map(rw(2, 2, 1)).unwrap());
    m.refuse_nth(1, 1, is_unmap);
    over(domain.unmap(pages(0, 0)).unwrap());
    assert_eq!(reason(&e, 2, Access::READ), FaultReason::Fenced);
    iommu.create_domain(2, Tables::Owned).unwrap();
    assert!(matches!(e.attach(2).unwrap_err().kind, AttachErrorKind::Fenced(_)));
    let (early, _) = mirror_at(&e, Reach::default());
    assert!(e.is_fenced(), "what was fenced still hangs on it");
    over(early.leave());
    over(s.leave());
    assert!(e.is_fenced());
    let (_new, n) = mirror_at(&e, Reach::default());
    assert!(!e.is_fenced());
    assert_eq!(n.held(), [rw(2, 2, 1)]);
    assert!(translate(&e, 2, Access::READ).is_ok());
    over(e.attach(2).unwrap());
}

#[test]
fn a_set_moves_as_a_whole() {
    let (iommu, _) = unit();
    iommu.create_domain(1, Tables::Owned).unwrap();
    let (a, b) = (endpoint(&iommu, 1), endpoint(&iommu, 2));
    iommu.isolate_together(&[a.id(), b.id()]).unwrap();
    let error = a.attach(1).unwrap_err();
    assert!(matches!(error.kind, AttachErrorKind::SplitsSet { .. }));
    assert_eq!((a.view(), b.view()), (Some(View::Blocked), Some(View::Blocked)));
    let to = Some(View::Domain(1));
    over(iommu.set_views(&[(a.id(), to), (b.id(), to)]).unwrap());
    assert!(matches!(a.detach().unwrap_err().kind, AttachErrorKind::SplitsSet { .. }));
    over(iommu.reset(ResetKind::Device).unwrap().completion);
    assert_eq!((a.view(), b.view()), (Some(View::Blocked), Some(View::Blocked)));
    over(a.remove().unwrap());
    iommu.create_domain(1, Tables::Owned).unwrap();
    over(b.attach(1).unwrap());
}

#[test]
fn regions_are_refused_on_both_ways() {
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let e = with_regions(&iommu, 8);
    over(e.attach(1).unwrap());
    for m in [rw(9, 10, 1), rw(21, 22, 1), rw(0, 99, 1)] {
        assert!(matches!(domain.map(m).unwrap_err().kind, StepErrorKind::Reserved { .. }));
        assert!(matches!(domain.replace(m).unwrap_err().kind, StepErrorKind::Reserved { .. }));
    }
    over(e.detach().unwrap());
    over(domain.map(rw(9, 10, 1)).unwrap());
    assert!(matches!(e.attach(1).unwrap_err().kind, AttachErrorKind::Reserved { .. }));
    // A refused attach leaves none of its regions behind.
    over(domain.map(rw(20, 20, 1)).unwrap());
    let wrong = vec![Region { range: pages(0, 3), kind: RegionKind::Msi }; 2];
    let wrong = iommu.add_endpoint(9, EndpointConfig { regions: wrong });
    assert!(matches!(wrong.unwrap_err().kind, AttachErrorKind::Regions(_)));
}

#[test]
fn a_refused_attach_leaves_no_regions_behind() {
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let e = with_regions(&iommu, 8);
    let (_s, m) = mirror_at(&e, Reach::default());
    over(domain.map(rw(0, 0, 1)).unwrap());
    m.refuse_nth(1, 1, is_map);
    e.attach(1).unwrap_err();
    over(domain.map(rw(10, 10, 1)).unwrap());
}

#[test]
fn a_refused_mirror_leaves_the_regions_of_its_endpoint() {
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let e = with_regions(&iommu, 8);
    over(e.attach(1).unwrap());
    over(domain.map(rw(0, 0, 1)).unwrap());
    let (mirror, m) = RecordingMirror::new(Reach::default());
    m.refuse_nth(1, 1, is_map);
    e.subscribe_mirror(mirror, Interest::MIRROR).unwrap_err();
    assert!(matches!(domain.map(rw(10, 10, 1)).unwrap_err().kind, StepErrorKind::Reserved { .. }));
}

fn bound(n: u32) -> (Iommu, Hosts, Vec<viommu::Endpoint>, [viommu::Domain; 2]) {
    let (iommu, _) = unit_with(|b| b.ram(0, 1 << 20));
    let domains = [1, 2].map(|id| iommu.create_domain(id, Tables::Owned).unwrap());
    over(domains[0].map(rw(0, 9, 1)).unwrap());
    over(domains[1].map(rw(5, 9, 30)).unwrap());
    let hosts = Hosts::default();
    let binding = iommu.add_binding(Box::new(hosts.clone()));
    let endpoints: Vec<_> = (1..=n).map(|id| endpoint(&iommu, id)).collect();
    for e in &endpoints {
        over(e.bind_with(&binding).unwrap());
        over(e.attach(1).unwrap());
    }
    (iommu, hosts, endpoints, domains)
}

fn made(hosts: &Hosts, at: usize) -> Handle {
    hosts.0.lock().unwrap().made[at].2.clone()
}

#[test]
fn bound_endpoints_share_a_copy_and_switch_in_one_act() {
    let (_iommu, hosts, endpoints, domains) = bound(3);
    let first = made(&hosts, 0);
    assert_eq!(first.take(), [Event::Map(rw(0, 9, 1))]);
    over(endpoints[0].attach(2).unwrap());
    assert_eq!(first.take(), [], "the others are still there");
    let second = made(&hosts, 1);
    assert_eq!(second.take(), [Event::Map(rw(5, 9, 30))]);
    over(endpoints[1].attach(2).unwrap());
    over(endpoints[2].attach(2).unwrap());
    assert_eq!(second.take(), [], "no map-all for a copy that is there");
    let all: Vec<_> =
        hosts.0.lock().unwrap().bound.iter().map(|b| b.1).filter(|b| *b != Bound::Blocked).collect();
    let to = |d| Bound::Space(Space::Domain(d));
    assert_eq!(all, [to(1), to(1), to(1), to(2), to(2), to(2)]);
    assert!(first.lock().dropped && first.held().is_empty(), "the last one has left");
    over(domains[1].map(rw(50, 50, 1)).unwrap());
    assert_eq!(second.held().len(), 2);
}

#[test]
fn a_binding_that_refuses_leaves_all_as_it_was() {
    let (_iommu, hosts, endpoints, domains) = bound(1);
    hosts.0.lock().unwrap().refuse = Some(Bound::Space(Space::Domain(2)));
    assert!(matches!(endpoints[0].attach(2).unwrap_err().kind, AttachErrorKind::Refused(_)));
    assert_eq!(endpoints[0].view(), Some(View::Domain(1)));
    assert!(made(&hosts, 1).lock().dropped);
    hosts.0.lock().unwrap().refuse = None;
    hosts.0.lock().unwrap().mirrors_refuse = true;
    assert!(matches!(endpoints[0].attach(2).unwrap_err().kind, AttachErrorKind::Refused(_)));
    over(domains[0].map(rw(40, 40, 2)).unwrap());
    assert_eq!(made(&hosts, 0).held().len(), 2);
}

#[test]
fn a_binding_that_cannot_let_go_is_fenced_at_unplug() {
    let (_iommu, hosts, mut endpoints, _domains) = bound(1);
    hosts.0.lock().unwrap().refuse = Some(Bound::Blocked);
    let e = endpoints.remove(0);
    let id = e.id();
    over(e.remove().unwrap());
    assert_eq!(hosts.0.lock().unwrap().fenced, [id]);
    assert!(made(&hosts, 0).lock().dropped);
}

#[test]
fn fencing_a_shared_mirror_fences_all_that_it_serves_and_nobody_is_put_on_it() {
    let (iommu, hosts, endpoints, domains) = bound(2);
    made(&hosts, 0).refuse_nth(1, 1, is_unmap);
    over(domains[0].unmap(pages(0, 9)).unwrap());
    assert!(endpoints.iter().all(viommu::Endpoint::is_fenced));
    let late = endpoint(&iommu, 7);
    let binding = iommu.add_binding(Box::new(Hosts::default()));
    over(late.bind_with(&binding).unwrap());
    over(late.attach(1).unwrap());
    assert!(!late.is_fenced(), "another host's copy");
}

#[test]
fn nobody_is_put_on_a_fenced_shared_mirror() {
    let (iommu, _) = unit();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    over(domain.map(rw(0, 9, 1)).unwrap());
    let hosts = Hosts::default();
    let binding = iommu.add_binding(Box::new(hosts.clone()));
    let (a, b) = (endpoint(&iommu, 1), endpoint(&iommu, 2));
    over(a.bind_with(&binding).unwrap());
    over(b.bind_with(&binding).unwrap());
    over(a.attach(1).unwrap());
    made(&hosts, 0).refuse_nth(1, 1, is_unmap);
    over(domain.unmap(pages(0, 9)).unwrap());
    assert!(a.is_fenced());
    let error = b.attach(1).unwrap_err();
    assert!(matches!(error.kind, AttachErrorKind::Refused(_)), "{error}");
    // The way back: off the dead copy, the device reset, bound again.
    over(a.detach().unwrap());
    assert!(a.is_fenced() && made(&hosts, 0).lock().dropped);
    over(a.bind_with(&binding).unwrap());
    assert!(!a.is_fenced());
    over(a.attach(1).unwrap());
    over(b.attach(1).unwrap());
    over(domain.map(rw(3, 3, 1)).unwrap());
    assert_eq!(made(&hosts, 1).held(), [rw(3, 3, 1)]);
}

#[test]
fn a_fenced_bound_endpoint_is_switched_to_nothing_only() {
    let (iommu, _) = unit_with(|b| b.ram(0, 1 << 20).bypass(true));
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    over(domain.map(rw(0, 9, 1)).unwrap());
    let hosts = Hosts::default();
    let binding = iommu.add_binding(Box::new(hosts.clone()));
    let a = endpoint(&iommu, 1);
    over(a.bind_with(&binding).unwrap());
    over(a.attach(1).unwrap());
    let first = hosts.0.lock().unwrap().made.last().unwrap().2.clone();
    first.refuse_nth(1, 1, is_unmap);
    over(domain.unmap(pages(0, 9)).unwrap());
    assert!(a.is_fenced());
    over(a.detach().unwrap());
    assert_eq!(hosts.0.lock().unwrap().bound.last(), Some(&(a.id(), Bound::Blocked)));
}

#[test]
fn a_bound_identity_is_clipped_to_the_regions_of_its_first_endpoint() {
    let (iommu, _) = unit_with(|b| b.ram(0, 64 * PAGE).bypass(true));
    let hosts = Hosts::default();
    let binding = iommu.add_binding(Box::new(hosts.clone()));
    let (first, second) = (with_regions(&iommu, 8), endpoint(&iommu, 9));
    over(first.bind_with(&binding).unwrap());
    over(second.bind_with(&binding).unwrap());
    assert_eq!(made(&hosts, 0).held(), [rw(0, 9, 0), rw(12, 19, 12), rw(22, 63, 22)]);
    let host = hosts.0.lock().unwrap();
    assert_eq!(host.made.iter().map(|m| (m.0, m.1)).collect::<Vec<_>>(), [(Space::Identity, first.id())]);
    assert_eq!(host.bound.len(), 2);
}

#[test]
fn identity_is_clipped_to_reach_and_regions() {
    let (iommu, _) = unit_with(|b| b.ram(0, 64 * PAGE).bypass(true));
    let e = with_regions(&iommu, 8);
    let (s, m) = mirror_at(&e, Reach { apertures: vec![pages(0, 29), pages(40, 49)], ..Reach::default() });
    assert_eq!(m.held(), [rw(0, 9, 0), rw(12, 19, 12), rw(22, 29, 22), rw(40, 49, 40)]);
    assert!(s.audit().unwrap().is_clean());
    // To the host's pages too.
    let (s, m) = mirror_at(&e, Reach { page_sizes: !0x3fff, ..Reach::default() });
    assert_eq!(m.held(), [rw(0, 7, 0), rw(12, 19, 12), rw(24, 63, 24)]);
    assert!(s.audit().unwrap().is_clean());
}

#[test]
fn identity_with_an_offset_is_not_lost() {
    let (iommu, _) = unit_with(|b| b.ram(0, 64 * PAGE).bypass(true));
    let e = endpoint(&iommu, 8);
    let (mirror, m) = RecordingMirror::new(Reach::default());
    let interest = Interest::MIRROR.within(pages(0, 31)).with_offset(100 * PAGE);
    let _s = e.subscribe_mirror(mirror, interest).unwrap();
    assert_eq!(m.held(), [rw(100, 131, 0)]);
}

#[test]
fn reset_takes_everything_back_and_names_who_is_inside() {
    let (iommu, _) = unit_with(|b| b.ram(0, 64 * PAGE).bypass(true));
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    over(domain.map(rw(0, 0, 1)).unwrap());
    let e = endpoint(&iommu, 8);
    over(e.attach(1).unwrap());
    let (_s, m) = mirror_at(&e, Reach::default());
    over(iommu.set_bypass(false).unwrap());
    let mut reader = e.reader("virtqueue 3").unwrap();
    let guard = reader.enter();
    guard.probe(at(0), Access::READ).unwrap();
    let mut reset = iommu.reset(ResetKind::Device).unwrap();
    assert_eq!(reset.inside, [(e.id(), "virtqueue 3".to_owned())]);
    assert!(!reset.completion.is_complete());
    let blockers = reset.completion.blockers();
    assert!(blockers.iter().any(|b| b.kind == BlockerKind::Guard && b.label == "virtqueue 3"));
    drop(guard);
    over(reset.completion);
    assert_eq!((e.view(), iommu.bypass(), m.held()), (Some(View::Blocked), false, vec![]));
    assert!(iommu.domains().is_empty());
    assert!(matches!(domain.map(rw(1, 1, 1)).unwrap_err().kind, StepErrorKind::Gone(_)));
    over(iommu.reset(ResetKind::System).unwrap().completion);
    assert_eq!((e.view(), iommu.bypass()), (Some(View::Identity), true));
    assert_eq!(m.held(), [rw(0, 63, 0)]);
}

#[test]
fn a_domain_is_destroyed_only_when_nobody_sees_it() {
    let (iommu, e, domain) = attached();
    over(domain.map(rw(0, 0, 1)).unwrap());
    let (s, m) = mirror_on(&iommu, 1, Reach::default());
    assert!(matches!(iommu.destroy_domain(1).unwrap_err().kind, AttachErrorKind::InUse(1)));
    over(e.detach().unwrap());
    over(iommu.destroy_domain(1).unwrap());
    assert_eq!((m.held(), m.lock().dropped, iommu.domain(1).is_none()), (vec![], true, true));
    assert!(matches!(iommu.destroy_domain(1).unwrap_err().kind, AttachErrorKind::NoDomain(1)));
    assert!(matches!(e.attach(1).unwrap_err().kind, AttachErrorKind::NoDomain(1)));
    over(s.leave());
}

#[test]
fn caps_on_mappings_do_not_drift() {
    let (iommu, _) = unit_with(|b| b.ram(0, 1 << 20).mappings(3));
    let domain = iommu.create_domain(1, Tables::OwnedCut).unwrap();
    let (_s, m) = mirror_on(&iommu, 1, Reach::default());
    for _ in 0..10 {
        over(domain.map(rw(0, 9, 1)).unwrap());
        m.refuse_nth(1, 1, is_map);
        domain.map(rw(20, 20, 1)).unwrap_err();
        m.refuse_nth(2, 1, is_map);
        domain.replace(rw(3, 4, 50)).unwrap_err();
        m.lock().refuse = None;
        domain.map(rw(5, 5, 1)).unwrap_err();
        over(domain.replace(rw(3, 4, 50)).unwrap());
        assert!(matches!(domain.map(rw(20, 20, 1)).unwrap_err().kind, StepErrorKind::Cap(_)));
        over(domain.replace(rw(0, 9, 70)).unwrap());
        over(domain.unmap(pages(4, 5)).unwrap());
        over(domain.unmap(pages(0, 9)).unwrap());
    }
    let full: Vec<Mapping> = (0..3).map(|p| rw(p, p, p)).collect();
    full.iter().for_each(|m| over(domain.map(*m).unwrap()));
    over(iommu.destroy_domain(1).unwrap());
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    full.iter().for_each(|m| over(domain.map(*m).unwrap()));
}

#[test]
fn batches_count_guards_of_readers_that_are_there_and_that_were() {
    let (iommu, _) = unit_with(|b| b.ram(0, 16 * PAGE).bypass(true));
    let e = endpoint(&iommu, 8);
    assert_eq!(e.batches(), 0);
    let mut first = e.reader("first").unwrap();
    let mut second = first.clone();
    for _ in 0..3 {
        let guard = first.enter();
        guard.translate(viommu::Iova(0), Access::READ).unwrap();
        guard.translate(viommu::Iova(PAGE), Access::READ).unwrap();
    }
    let guard = second.enter();
    assert_eq!(e.batches(), 4);
    drop(guard);
    drop(second);
    assert_eq!(e.batches(), 4);
    drop(first);
    assert_eq!((e.batches(), e.batches()), (4, 4));
    drop(e.reader("third").unwrap().enter());
    assert_eq!(e.batches(), 5);
    over(e.clone().remove().unwrap());
    assert_eq!(e.batches(), 0);
}
