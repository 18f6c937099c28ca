//! Feature bits, configuration, bypass (D1 to D5), and what every request has (D6 to D9).

use viommu::FaultReason;
use viommu_virtio::driver::{FILL, Request};
use viommu_virtio::spec::Features;
use viommu_virtio::spec::config::{BYPASS_OFFSET, SIZE};
use viommu_virtio::spec::request::{Status, Tail};
use viommu_virtio::{Config, ConfigError, EndpointPlan, VirtioIommu};

use crate::rig::*;

fn make(config: Config) -> Result<VirtioIommu, ConfigError> {
    VirtioIommu::new(viommu::Iommu::builder(), config)
}

fn u64_at(rig: &Rig, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    rig.device.read_config(offset, &mut bytes);
    u64::from_le_bytes(bytes)
}

fn u32_at(rig: &Rig, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    rig.device.read_config(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

#[test]
fn d1_map_unmap_is_offered() {
    assert!(rig().device.features().contains(Features::MAP_UNMAP));
    let without = Config::default().features - Features::MAP_UNMAP;
    assert!(make(Config { features: without, ..config() }).is_err());
}

#[test]
fn d2_bypass_is_not_offered_with_bypass_config_or_by_default() {
    assert!(!Config::default().features.contains(Features::BYPASS));
    let both = Config::default().features | Features::BYPASS;
    assert!(matches!(make(Config { features: both, ..config() }), Err(ConfigError::Features(_))));
    let unknown = Config::default().features | Features::from_bits_retain(1 << 7);
    assert!(make(Config { features: unknown, ..config() }).is_err());
}

#[test]
fn d3_page_size_mask_has_a_bit() {
    assert!(make(Config { page_size_mask: 0, ..config() }).is_err());
    assert_eq!(u64_at(&rig(), 0), !0xfff);
    let rig = rig_with(Config { page_size_mask: 1 << 16, ..config() }, |b| b);
    assert_eq!(u64_at(&rig, 0), 1 << 16);
}

#[test]
fn d4_bypass_reads_0_or_1_whatever_is_written() {
    let rig = rig();
    for (value, due) in [(1, 1), (2, 1), (0xff, 1), (0, 0), (3, 0), (0x80, 0), (1, 1)] {
        rig.write_bypass(value);
        assert_eq!(rig.bypass_byte(), due, "after a write of {value}");
    }
}

#[test]
fn d5_bypass_survives_a_device_reset_and_is_restored_on_a_system_reset() {
    for initial in [false, true] {
        let rig = rig_with(Config { bypass: initial, ..Config::default() }, |b| b);
        assert_eq!(rig.bypass_byte(), u8::from(initial), "may start as 1");
        let other = u8::from(!initial);
        rig.write_bypass(other);
        over(rig.device.reset().completion);
        assert_eq!(rig.bypass_byte(), other);
        assert_eq!(rig.reads(A, 0x5000).is_ok(), other == 1);
        over(rig.device.system_reset().completion);
        assert_eq!(rig.bypass_byte(), u8::from(initial));
        assert_eq!(rig.reads(A, 0x5000).is_ok(), initial);
    }
}

#[test]
fn d5_bypass_applies_also_to_a_driver_that_did_not_accept_it() {
    let device = make(Config { bypass: true, ..Config::default() }).unwrap();
    device.add_endpoint(A, EndpointPlan::default()).unwrap();
    over(device.negotiate(Features::MAP_UNMAP));
    assert_eq!(device.endpoint(A).unwrap().view(), Some(viommu::View::Identity));
    // It cannot write it then.
    over(device.write_config(BYPASS_OFFSET as u64, &[0]));
    let mut byte = [9];
    device.read_config(BYPASS_OFFSET as u64, &mut byte);
    assert_eq!(byte, [1]);
}

#[test]
fn d6_success_is_ok() {
    let mut rig = rig();
    for request in
        [attach(1, A), map(1, 0, 9, 3), Request::Probe { endpoint: A }, unmap(1, 0, 9), detach(1, A)]
    {
        rig.ok(&request);
    }
}

#[test]
fn d7_unknown_types_are_not_answered() {
    let mut rig = rig();
    for kind in (0..=255).filter(|kind| !(1..=5).contains(kind)) {
        let answer = rig.ask(&Request::Raw { bytes: [vec![kind], vec![0; 71]].concat(), writable: 64 });
        assert_eq!((answer.used_len, &answer.properties[..]), (0, &[FILL; 64][..]), "type {kind}");
    }
}

#[test]
fn d8_reserved_of_the_head_is_ignored_and_of_the_tail_is_zero() {
    let mut rig = rig();
    let wrong = detach(7, A);
    for request in [attach(1, A), map(1, 0, 9, 3), Request::Probe { endpoint: A }, unmap(1, 0, 9), wrong] {
        let answer = rig.ask(&raw(&request, |bytes| bytes[1..4].fill(0xff)));
        let tail = Tail { status: answer.status().unwrap().0, reserved: [0; 3] };
        assert_eq!(answer.tail, Some(tail), "{request:?}");
        let due = if request == detach(7, A) { Status::INVAL } else { Status::OK };
        assert_eq!(answer.status(), Some(due), "{request:?}");
    }
}

#[test]
fn d9_unattached_endpoints_reach_nothing_without_bypass() {
    let mut rig = rig();
    assert_eq!(rig.reads(A, 0x5000), Err(FaultReason::Blocked));
    assert_eq!(rig.writes(A, 0x5000), Err(FaultReason::Blocked));
    rig.ok(&attach(1, A));
    rig.ok(&detach(1, A));
    assert_eq!(rig.reads(A, 0x5000), Err(FaultReason::Blocked));
    rig.write_bypass(1);
    assert_eq!(rig.reads(A, 0x5008), Ok(0x5008));
}

#[test]
fn legacy_bypass_counts_when_it_is_negotiated() {
    let features = (Config::default().features - Features::BYPASS_CONFIG) | Features::BYPASS;
    let rig = rig_with(Config { features, ..Config::default() }, |b| b);
    assert_eq!(rig.reads(A, 0x5000), Ok(0x5000));
    assert_eq!(rig.bypass_byte(), 0, "the field is BYPASS_CONFIG's");
    over(rig.device.reset().completion);
    assert_eq!(rig.reads(A, 0x5000), Err(FaultReason::Blocked));
    over(rig.device.negotiate(features - Features::BYPASS));
    assert_eq!(rig.reads(A, 0x5000), Err(FaultReason::Blocked));
}

#[test]
fn configuration_space_has_the_layout_of_the_specification() {
    let config = Config {
        input_range: range(0x1000, 0xffff_ffff),
        domain_range: 5..=0x10,
        probe_size: 128,
        bypass: true,
        ..Config::default()
    };
    let rig = rig_with(config, |b| b);
    assert_eq!((u64_at(&rig, 8), u64_at(&rig, 16)), (0x1000, 0xffff_ffff));
    assert_eq!((u32_at(&rig, 24), u32_at(&rig, 28), u32_at(&rig, 32)), (5, 0x10, 128));
    assert_eq!(u32_at(&rig, 36), 1, "bypass, and three bytes of zero");
    // Byte by byte it is the same, and behind its end there is nothing.
    let mut all = [0xee; SIZE + 8];
    rig.device.read_config(0, &mut all);
    for (at, byte) in all.iter().enumerate() {
        let mut one = [0xee];
        rig.device.read_config(at as u64, &mut one);
        assert_eq!(one[0], *byte);
    }
    assert_eq!(all[SIZE..], [0; 8]);
    let mut far = [0xee; 4];
    rig.device.read_config(u64::MAX - 1, &mut far);
    assert_eq!(far, [0; 4]);
}

#[test]
fn r1_writes_to_other_fields_change_nothing() {
    let rig = rig();
    let mut before = [0; SIZE];
    rig.device.read_config(0, &mut before);
    for offset in (0..BYPASS_OFFSET as u64).chain([37, 38, 39, 40, 1 << 32, u64::MAX]) {
        over(rig.device.write_config(offset, &[0x5a]));
    }
    over(rig.device.write_config(0, &[0x5a; 36]));
    over(rig.device.write_config(36, &[]));
    let mut after = [0; SIZE];
    rig.device.read_config(0, &mut after);
    assert_eq!(before, after);
}

#[test]
fn limits_of_the_builder_do_not_contradict_what_the_driver_is_told() {
    let mut rig = rig_with(config(), |builder| builder.page_size(1 << 16).aperture(range(0, 0xffff)));
    rig.ok(&attach(1, A));
    rig.ok(&map(1, 0x11, 0x11, 3));
}
