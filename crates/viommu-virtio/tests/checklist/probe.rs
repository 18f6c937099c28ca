//! PROBE and the regions that it tells of (D34 to D43).

use viommu::endpoint::RegionKind;
use viommu::fuzzing::recording::RecordingMirror;
use viommu::subscribe::Reach;
use viommu::{FaultReason, Interest, Iova, Place};
use viommu_virtio::driver::{FILL, Request};
use viommu_virtio::spec::Features;
use viommu_virtio::spec::property::{RESV_MEM, RESV_MSI, RESV_RESERVED, ResvMem};
use viommu_virtio::spec::request::Status;
use viommu_virtio::{Config, EndpointPlan, TopologyError};

use crate::rig::*;

const PROBE: Request = Request::Probe { endpoint: B };

/// Subtype, start and end of each.
fn told(regions: &[ResvMem]) -> Vec<(u8, u64, u64)> {
    regions.iter().map(|r| (r.subtype, r.start.get(), r.end.get())).collect()
}

#[test]
fn d34_reserved_of_probe_is_ignored() {
    let mut rig = rig();
    let plain = rig.ask(&PROBE);
    let answer =
        rig.ask(&Request::Raw { bytes: [&PROBE.to_bytes()[..8], &[0xff; 64]].concat(), writable: 516 });
    assert_eq!((answer.used_len, answer.status()), (516, Some(Status::OK)));
    assert_eq!(answer.properties[..512], plain.properties);
}

#[test]
fn d35_probe_of_no_endpoint_is_noent_and_tells_nothing() {
    let answer = rig().ask(&Request::Probe { endpoint: 77 });
    assert_eq!((answer.used_len, answer.status()), (516, Some(Status::NOENT)));
    assert_eq!(answer.properties, [0; 512]);
}

#[test]
fn d36_probe_is_not_answered_where_it_is_not_offered() {
    let features = Config::default().features - Features::PROBE;
    let mut rig = rig_with(Config { features, ..config() }, |b| b);
    let answer = rig.ask(&Request::Raw { bytes: Request::Probe { endpoint: A }.to_bytes(), writable: 516 });
    assert_eq!((answer.used_len, &answer.properties[..]), (0, &[FILL; 516][..]));
}

#[test]
fn d37_lengths_of_properties_are_those_behind_their_heads() {
    let answer = rig().ask(&PROBE);
    let regions = answer.resv_mem();
    assert_eq!(told(&regions), [(RESV_RESERVED, RESERVED.0, RESERVED.1), (RESV_MSI, MSI.0, MSI.1)]);
    for (at, region) in regions.iter().enumerate() {
        assert_eq!((region.head.kind.get(), region.head.length.get()), (RESV_MEM, 20), "reserved bits are 0");
        assert_eq!(answer.properties[24 * at..][..4], [1, 0, 20, 0]);
    }
}

#[test]
fn d38_probe_with_too_little_room_is_invalid_and_tells_nothing() {
    let mut rig = rig();
    for writable in [4, 5, 8, 28, 512, 515] {
        let answer = rig.ask(&Request::Raw { bytes: PROBE.to_bytes(), writable });
        assert_eq!((answer.used_len, answer.status()), (writable, Some(Status::INVAL)));
        let before = &answer.properties[..writable as usize - 4];
        assert!(before.iter().all(|byte| *byte == FILL), "nothing but the tail is written");
    }
    for writable in 0..4 {
        let answer = rig.ask(&Request::Raw { bytes: PROBE.to_bytes(), writable });
        assert_eq!(answer.used_len, 0);
        assert!(answer.properties.iter().all(|byte| *byte == FILL));
    }
    // More is no harm: the tail is where it always is.
    let answer = rig.ask(&Request::Raw { bytes: PROBE.to_bytes(), writable: 600 });
    assert_eq!((answer.used_len, answer.properties[512]), (516, 0));
    assert_eq!(answer.properties[516..], [FILL; 84]);
}

#[test]
fn d39_the_rest_of_the_properties_is_zero() {
    let mut rig = rig();
    assert_eq!(rig.ask(&PROBE).properties[48..], [0; 464]);
    assert_eq!(rig.ask(&Request::Probe { endpoint: A }).properties, [0; 512], "no region at all");
}

#[test]
fn d40_reserved_of_a_region_is_zero() {
    for region in rig().ask(&PROBE).resv_mem() {
        assert_eq!(region.reserved, [0; 3]);
    }
}

#[test]
fn d41_an_endpoint_has_one_msi_region_at_most() {
    let rig = rig();
    let plan = EndpointPlan::default()
        .region(range(MSI.0, MSI.1), RegionKind::Msi)
        .region(range(0x800_0000, 0x80f_ffff), RegionKind::Msi);
    assert!(matches!(rig.device.add_endpoint(10, plan), Err(TopologyError::TwoMsi)));
    assert!(rig.device.endpoint(10).is_none(), "nothing of it is left");
}

#[test]
fn d42_regions_of_an_endpoint_do_not_overlap() {
    let mut rig = rig();
    let twice = EndpointPlan::default()
        .region(range(0x1000, 0x2fff), RegionKind::Reserved)
        .region(range(0x2000, 0x3fff), RegionKind::Msi);
    assert!(rig.device.add_endpoint(10, twice).is_err());
    // What a host cannot map becomes a region, but for the doorbell, which lies in it.
    let apertures = vec![range(0, 0xfedf_ffff), range(0xff00_0000, 0xff_ffff_ffff)];
    let (mirror, _) = RecordingMirror::new(Reach { apertures, ..Reach::default() });
    let plan =
        EndpointPlan::default().region(range(MSI.0, MSI.1), RegionKind::Msi).mirror(mirror, Interest::MIRROR);
    rig.device.add_endpoint(10, plan).unwrap();
    let regions = told(&rig.ask(&Request::Probe { endpoint: 10 }).resv_mem());
    let due = [
        (RESV_MSI, MSI.0, MSI.1),
        (RESV_RESERVED, 0xfef0_0000, 0xfeff_ffff),
        (RESV_RESERVED, 0x100_0000_0000, u64::MAX),
    ];
    assert_eq!(regions, due);
}

#[test]
fn d43_accesses_to_regions_reach_nobody() {
    let mut rig = rig();
    let check = |rig: &Rig| {
        for at in [RESERVED.0, RESERVED.1, MSI.0, MSI.1] {
            assert_eq!(rig.reads(B, at), Err(FaultReason::Reserved));
        }
        assert_eq!(rig.writes(B, RESERVED.0), Err(FaultReason::Reserved));
        let mut reader = rig.device.endpoint(B).unwrap().reader("test").unwrap();
        let doorbell = reader.enter().translate(Iova(MSI.0), viommu::Access::WRITE).unwrap();
        assert_eq!((doorbell.place, doorbell.gpa.0), (Place::Msi, MSI.0), "an interrupt");
    };
    check(&rig);
    rig.ok(&attach(1, B));
    check(&rig);
    rig.ok(&attach_bypass(2, B));
    check(&rig);
    rig.ok(&detach(2, B));
    rig.write_bypass(1);
    check(&rig);
}

#[test]
fn all_regions_fit_the_probe_or_the_endpoint_is_refused() {
    let mut rig = rig_with(Config { probe_size: 72, ..config() }, |b| b);
    let plan = |count: u64| {
        (0..count).fold(EndpointPlan::default(), |plan, at| {
            plan.region(range(at * 0x10_0000, at * 0x10_0000 + 0xfff), RegionKind::Reserved)
        })
    };
    assert!(matches!(
        rig.device.add_endpoint(10, plan(4)),
        Err(TopologyError::Regions { regions: 4, probe_size: 72 })
    ));
    rig.device.add_endpoint(10, plan(3)).unwrap();
    let answer = rig.ask(&Request::Probe { endpoint: 10 });
    assert_eq!((answer.used_len, answer.resv_mem().len()), (76, 3));
}
