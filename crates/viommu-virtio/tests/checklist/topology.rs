//! What the driver is told of the hosts behind: regions and page sizes.

use viommu::endpoint::RegionKind;
use viommu::fuzzing::recording::RecordingMirror;
use viommu::subscribe::Reach;
use viommu::{Interest, Iommu, Iova, IovaRange};
use viommu_virtio::spec::request::Status;
use viommu_virtio::{EndpointPlan, TopologyError, VirtioIommu};

use crate::rig::{MSI, attach, config, map, over, range, rig};

fn device() -> VirtioIommu {
    VirtioIommu::new(Iommu::builder().ram(0, 64 << 20), config()).unwrap()
}

fn mirror(reach: Reach) -> Box<RecordingMirror> {
    RecordingMirror::new(reach).0
}

/// What a VFIO host on x86 can map: not its MSI range, and not above 39 bits.
fn host() -> Reach {
    Reach { apertures: vec![range(0, 0xfedf_ffff), range(0xfef0_0000, (1 << 39) - 1)], ..Reach::default() }
}

fn mask(device: &VirtioIommu) -> u64 {
    let mut bytes = [0; 8];
    device.read_config(0, &mut bytes);
    u64::from_le_bytes(bytes)
}

fn regions(device: &VirtioIommu, id: u32) -> Vec<(u64, u64, RegionKind)> {
    let regions = device.regions(id).unwrap();
    regions.iter().map(|r| (r.range.start().0, r.range.last().0, r.kind)).collect()
}

#[test]
fn holes_of_a_host_are_reserved_regions() {
    let device = device();
    let plan = EndpointPlan::default().mirror(mirror(host()), Interest::MIRROR);
    let _added = device.add_endpoint(8, plan).unwrap();
    let reserved = RegionKind::Reserved;
    assert_eq!(regions(&device, 8), [(MSI.0, MSI.1, reserved), (1 << 39, u64::MAX, reserved)]);
}

#[test]
fn holes_of_a_host_are_not_said_twice_where_a_region_is_given() {
    let device = device();
    let plan = EndpointPlan::default().region(range(MSI.0, MSI.1), RegionKind::Msi);
    let low = Reach { apertures: vec![range(0x1000, (1 << 39) - 1)], ..Reach::default() };
    let plan = plan.mirror(mirror(host()), Interest::MIRROR).mirror(mirror(low), Interest::MIRROR);
    let _added = device.add_endpoint(8, plan).unwrap();
    let reserved = RegionKind::Reserved;
    let wanted = [(0, 0xfff, reserved), (MSI.0, MSI.1, RegionKind::Msi), (1 << 39, u64::MAX, reserved)];
    assert_eq!(regions(&device, 8), wanted);
}

#[test]
fn holes_are_in_the_domains_addresses_and_inside_the_interest() {
    let device = device();
    let interest = Interest::MIRROR.within(range(0x10_0000, 0x1f_ffff)).with_offset(0x4000_0000);
    let reach = Reach { apertures: vec![range(0x4010_0000, 0x4017_ffff)], ..Reach::default() };
    let _added = device.add_endpoint(8, EndpointPlan::default().mirror(mirror(reach), interest)).unwrap();
    assert_eq!(regions(&device, 8), [(0x18_0000, 0x1f_ffff, RegionKind::Reserved)]);
}

#[test]
fn the_driver_that_keeps_to_the_regions_is_never_refused_for_reach() {
    let mut rig = rig();
    let plan = EndpointPlan::default().mirror(mirror(host()), Interest::MIRROR);
    let added = rig.device.add_endpoint(20, plan).unwrap();
    rig.ok(&attach(1, 20));
    rig.ok(&map(1, 1, 1, 1));
    rig.ok(&map(1, 0xfedff, 0xfedff, 2));
    assert_eq!(rig.says(&map(1, 0xfee00, 0xfee00, 3)), Status::INVAL);
    assert_eq!(added.subscriptions[0].counts().held, 2);
}

#[test]
fn page_sizes_are_what_all_hosts_can_do() {
    let device = device();
    let pages = |page_sizes| {
        EndpointPlan::default().mirror(mirror(Reach { page_sizes, ..Reach::default() }), Interest::MIRROR)
    };
    let _a = device.add_endpoint(8, pages(1 << 12 | 1 << 21 | 1 << 30)).unwrap();
    let _b = device.add_endpoint(9, pages(1 << 16 | 1 << 21)).unwrap();
    assert_eq!(mask(&device), 1 << 16 | 1 << 21);
    // Read: it stays.
    let error = device.add_endpoint(10, pages(1 << 21)).unwrap_err();
    assert!(matches!(error, TopologyError::PageSize { wanted: 0x20_0000, granule: 0x1_0000 }));
    assert!(device.endpoint(10).is_none());
    let _c = device.add_endpoint(10, pages(1 << 12)).unwrap();
    assert_eq!(mask(&device), 1 << 16 | 1 << 21);
    over(device.system_reset().completion);
    let _d = device.add_endpoint(11, pages(1 << 21)).unwrap();
    assert_eq!(mask(&device), 1 << 21);
}

#[test]
fn an_endpoint_that_is_refused_leaves_the_page_sizes() {
    let device = device();
    let plan = EndpointPlan::default()
        .mirror(mirror(Reach { page_sizes: 1 << 21, ..Reach::default() }), Interest::MIRROR);
    let plan = plan.region(range(0, 0xfff), RegionKind::Msi).region(range(0x2000, 0x2fff), RegionKind::Msi);
    assert!(matches!(device.add_endpoint(8, plan).unwrap_err(), TopologyError::TwoMsi));
    assert_eq!(mask(&device), !0xfff);
}

#[test]
fn a_later_mirror_must_fit_what_the_driver_knows() {
    let device = device();
    device.add_endpoint(8, EndpointPlan::default().region(range(MSI.0, MSI.1), RegionKind::Msi)).unwrap();
    let narrow = Reach { apertures: vec![range(0, (1 << 39) - 1)], ..Reach::default() };
    let error = device.subscribe_mirror(8, mirror(narrow), Interest::MIRROR).unwrap_err();
    let above = IovaRange::new(Iova(1 << 39), Iova(u64::MAX)).unwrap();
    assert!(matches!(error, TopologyError::Unreachable(hole) if hole == above));
    let around =
        Reach { apertures: vec![range(0, MSI.0 - 1), range(MSI.1 + 1, u64::MAX)], ..Reach::default() };
    let subscription = device.subscribe_mirror(8, mirror(around), Interest::MIRROR).unwrap();
    assert!(!subscription.is_fenced());
    mask(&device);
    let large = Reach { page_sizes: 1 << 16, ..Reach::default() };
    let error = device.subscribe_mirror(8, mirror(large), Interest::MIRROR).unwrap_err();
    assert!(matches!(error, TopologyError::PageSize { .. }));
    assert!(matches!(
        device.subscribe_mirror(77, mirror(host()), Interest::MIRROR).unwrap_err(),
        TopologyError::Endpoint(_)
    ));
}

#[test]
fn an_endpoint_that_goes_takes_its_domain_along_if_it_was_the_last() {
    let mut rig = rig();
    rig.device.add_endpoint(20, EndpointPlan::default()).unwrap();
    rig.ok(&attach(5, 20));
    rig.ok(&map(5, 1, 1, 1));
    over(rig.device.remove_endpoint(20).unwrap());
    assert!(rig.device.iommu().domain(5).is_none());
    assert_eq!(rig.says(&map(5, 2, 2, 2)), Status::NOENT);
    assert_eq!(rig.says(&attach(5, 20)), Status::NOENT);
    assert!(matches!(rig.device.remove_endpoint(20).unwrap_err(), TopologyError::Endpoint(_)));
}
