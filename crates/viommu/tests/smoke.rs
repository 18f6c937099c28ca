//! The way from a unit to a translated access, and what an unmap waits for.

use viommu::{Access, EndpointConfig, FaultReason, Gpa, Iommu, Iova, Mapping, Place, Tables, WaitError};

#[test]
fn device_translates_until_the_unmap_completes() {
    let iommu = Iommu::builder().ram(0, 1 << 30).build().unwrap();
    let endpoint = iommu.add_endpoint(16, EndpointConfig::default()).unwrap();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    endpoint.attach(1).unwrap().wait().unwrap();
    let mapping = Mapping::new(Iova(0x1000), 0x2000, Gpa(0x8000), Access::RW).unwrap();
    domain.map(mapping).unwrap().wait().unwrap();

    let mut reader = endpoint.reader("worker").unwrap();
    let guard = reader.enter();
    let hit = guard.translate(Iova(0x2010), Access::READ).unwrap();
    assert_eq!((hit.gpa, hit.place), (Gpa(0x9010), Place::Ram));
    let mut done = domain.unmap(mapping.range).unwrap();
    assert!(!done.is_complete(), "a guard is inside");
    assert!(matches!(done.wait_timeout(std::time::Duration::ZERO), Err(WaitError::HoldingGuard)));
    assert_eq!(guard.translate(Iova(0x2010), Access::READ).unwrap_err().reason, FaultReason::Unmapped);
    drop(guard);
    done.wait().unwrap();
}
