//! A guard with its reader inside counts as any other, however it ends.

use std::time::Duration;

use viommu::{
    Access, Completion, Domain, Endpoint, EndpointConfig, Gpa, Iommu, Iova, Mapping, Tables, WaitError,
};

fn mapped() -> (Iommu, Endpoint, Domain, Mapping) {
    let iommu = Iommu::builder().ram(0, 1 << 20).build().unwrap();
    let endpoint = iommu.add_endpoint(16, EndpointConfig::default()).unwrap();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    endpoint.attach(1).unwrap().wait().unwrap();
    let mapping = Mapping::new(Iova(0x1000), 0x1000, Gpa(0x8000), Access::RW).unwrap();
    domain.map(mapping).unwrap().wait().unwrap();
    (iommu, endpoint, domain, mapping)
}

fn holds_a_guard(done: &mut Completion) -> bool {
    matches!(done.wait_timeout(Duration::ZERO), Err(WaitError::HoldingGuard))
}

#[test]
fn owned_guard_delays_the_unmap_until_it_leaves_and_gives_its_reader_back() {
    let (_iommu, endpoint, domain, mapping) = mapped();
    let guard = endpoint.reader("worker").unwrap().into_guard();
    assert_eq!(guard.translate(Iova(0x1010), Access::WRITE).unwrap().gpa, Gpa(0x8010));
    let mut done = domain.unmap(mapping.range).unwrap();
    assert!(!done.is_complete());
    assert_eq!(done.blockers()[0].label, "worker");
    assert!(holds_a_guard(&mut done));
    let mut reader = guard.leave();
    assert!(done.is_complete());
    domain.map(mapping).unwrap().wait().unwrap();
    let guard = reader.enter();
    assert!(guard.translate(Iova(0x1010), Access::READ).is_ok());
}

#[test]
fn owned_guard_that_is_dropped_ends_like_one_that_leaves() {
    let (_iommu, endpoint, domain, mapping) = mapped();
    let guard = endpoint.reader("worker").unwrap().into_guard();
    let mut done = domain.unmap(mapping.range).unwrap();
    assert!(holds_a_guard(&mut done));
    drop(guard);
    done.wait().unwrap();
}

#[test]
fn clone_of_a_reader_has_guards_of_its_own() {
    let (_iommu, endpoint, domain, mapping) = mapped();
    let first = endpoint.reader("worker").unwrap();
    let (second, first) = (first.clone().into_guard(), first.into_guard());
    let mut done = domain.unmap(mapping.range).unwrap();
    drop(first);
    assert!(!done.is_complete());
    drop(second);
    assert!(done.is_complete());
}
