use std::sync::Arc;
use std::time::Instant;

use viommu_virtio::driver::{Driver, Request};
use viommu_virtio::spec::request::{AttachFlags, MapFlags};
use viommu_virtio::{Config, EndpointPlan, VirtioIommu};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;

fn histogram(classes: &[(usize, u64)], longest_ns: u64) -> Histogram {
    let mut all = vec![0; 32];
    classes.iter().for_each(|(class, count)| all[*class] = *count);
    Histogram { classes: all, longest_ns }
}

fn function(address: &str, device: &str) -> Function {
    Function {
        address: address.into(),
        device: device.into(),
        socket: format!("/run/vm/{}.sock", address.replace(':', "-")),
        connected: true,
        connections: 1,
        driver_ready: true,
        features: Hex(0x1_0000_0077),
        memory: Windows { windows: 3, bytes: 512 << 20, refused: 1 },
        request_times: None,
        counters: BTreeMap::new(),
    }
}

/// A state as a guest makes it.
pub(crate) fn sample() -> Snapshot {
    let requests = |request: &str, status: &str, count| Requests {
        request: request.into(),
        status: status.into(),
        count,
    };
    let iommu = Iommu {
        function: Function {
            request_times: Some(histogram(&[(12, 9000), (14, 700), (17, 3)], 90_000)),
            ..function("00:01.0", "virtio-iommu")
        },
        bypass: true,
        domains: vec![
            Domain { id: 0, endpoints: vec![0x10], live: 1432, table_bytes: 20_480, ..Domain::default() },
            Domain { id: 1, endpoints: vec![0x18], live: 12, table_bytes: 4096, ..Domain::default() },
        ],
        requests: vec![
            requests("ATTACH", "OK", 2),
            requests("MAP", "OK", 5321),
            requests("MAP", "NOMEM", 4),
            requests("UNMAP", "OK", 3877),
            requests("PROBE", "OK", 2),
        ],
        malformed: 0,
        unmap_times: histogram(&[(13, 3800), (17, 70), (21, 7)], 1_900_000),
        outstanding: 1,
        faults: Faults {
            domain: 0,
            mapping: 2,
            unknown: 0,
            pending: 0,
            reported: 2,
            lost: 0,
            recent: (0..2)
                .map(|n| Fault {
                    at_ns: 61_500_000_000 + n * 700_000_000,
                    endpoint: 0x10,
                    iova: Hex(0xffff_f000 - n * 0x1000),
                    access: Access::Write,
                    reason: "unmapped".into(),
                })
                .collect(),
        },
        table_bytes: 24_576,
        vtd: None,
    };
    let blk = Function {
        request_times: Some(histogram(&[(15, 1000), (18, 200)], 200_000)),
        counters: [("reads".into(), 900), ("writes".into(), 300)].into(),
        ..function("00:02.0", "blk:/srv/images/debian.img")
    };
    Snapshot {
        version: "0.1.0".into(),
        pid: 4711,
        uptime_ns: 83_250_000_000,
        iommu: Some(iommu),
        endpoints: vec![
            Endpoint { function: blk, id: 0x10, view: View::Domain(0), fenced: false, batches: 24_000 },
            Endpoint {
                function: function("00:03.0", "rng"),
                id: 0x18,
                view: View::Domain(1),
                fenced: false,
                batches: 12,
            },
            Endpoint {
                function: Function {
                    connected: false,
                    connections: 0,
                    driver_ready: false,
                    features: Hex(0),
                    memory: Windows::default(),
                    ..function("01:00.0", "rng")
                },
                id: 0x100,
                view: View::Identity,
                fenced: false,
                batches: 0,
            },
        ],
    }
}

#[test]
fn a_snapshot_is_read_as_it_was_written() {
    let mut snapshot = sample();
    let mapping = Mapping {
        start: Hex(u64::MAX - 0xfff),
        last: Hex(u64::MAX),
        gpa: Hex(0x1000),
        access: Access::Both,
        mmio: false,
    };
    snapshot.iommu.as_mut().unwrap().domains[0].mappings =
        Some(vec![mapping, Mapping { mmio: true, ..mapping }]);
    let text = serde_json::to_string(&snapshot).unwrap();
    assert!(text.contains(
        r#"{"start":"0xfffffffffffff000","last":"0xffffffffffffffff","gpa":"0x1000","access":"rw"}"#
    ));
    assert_eq!(serde_json::from_str::<Snapshot>(&text).unwrap(), snapshot);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json.pointer("/endpoints/0/view/domain"), Some(&0.into()));
    assert_eq!(json.pointer("/endpoints/2/view"), Some(&"identity".into()));
    assert_eq!(json.pointer("/endpoints/0/address"), Some(&"00:02.0".into()));
    assert_eq!(json.pointer("/iommu/domains/1/mappings"), None);
}

#[test]
fn hex_of_no_number_is_refused() {
    for text in ["\"12\"", "\"0x\"", "\"0xg\"", "\"0x10000000000000000\"", "12"] {
        assert!(serde_json::from_str::<Hex>(text).is_err(), "{text}");
    }
}

#[test]
fn sums_are_over_statuses_and_domains() {
    let iommu = sample().iommu.unwrap();
    assert_eq!((iommu.answers("MAP"), iommu.refusals("MAP"), iommu.answers("DETACH")), (5325, 4, 0));
    assert_eq!((iommu.live(), iommu.faults.total()), (1444, 2));
    assert_eq!(sample().name_of(0x18), "00:03.0");
    assert_eq!((sample().name_of(0xff), sample().name_of(0x1_0000)), ("00:1f.7".into(), "65536".into()));
}

#[test]
fn of_a_device_gives_what_a_driver_has_done() {
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap());
    let builder = viommu::Iommu::builder().ram(0, 16 << 20).table_bytes(1 << 20);
    let device = VirtioIommu::new(builder, Config { bypass: false, ..Config::default() }).unwrap();
    let endpoint = device.add_endpoint(0x10, EndpointPlan::default()).unwrap().endpoint;
    device.add_endpoint(0x18, EndpointPlan::default()).unwrap();
    let mut driver = Driver::new(memory.clone(), 0x8000, 64, 512).unwrap();
    device.negotiate(device.features()).wait().unwrap();
    let mut requests = device.request_queue(driver.request_queue().unwrap(), memory, || {});
    let started = Instant::now();
    driver.push(&Request::Attach { domain: 7, endpoint: 0x10, flags: AttachFlags::empty() }).unwrap();
    driver.push(&Request::Attach { domain: 8, endpoint: 0x18, flags: AttachFlags::BYPASS }).unwrap();
    let map = |virt_start: u64, flags| Request::Map {
        domain: 7,
        virt_start,
        virt_end: virt_start + 0xfff,
        phys_start: 0x20_0000,
        flags,
    };
    driver.push(&map(0x2000, MapFlags::READ)).unwrap();
    driver.push(&map(0x1000, MapFlags::WRITE | MapFlags::MMIO)).unwrap();
    driver.push(&map(0x1000, MapFlags::READ)).unwrap();
    driver.push(&Request::Unmap { domain: 7, virt_start: 0x9000, virt_end: 0x9fff }).unwrap();
    requests.process().unwrap();
    let mut reader = endpoint.reader("queue 0").unwrap();
    assert!(reader.enter().translate(viommu::Iova(0x2004), viommu::Access::WRITE).is_err());

    let iommu = Iommu::of(&device, function("00:01.0", "virtio-iommu"), started, true);
    let mapping = |start: u64, access, mmio| Mapping {
        start: Hex(start),
        last: Hex(start + 0xfff),
        gpa: Hex(0x20_0000),
        access,
        mmio,
    };
    let list = vec![mapping(0x1000, Access::Write, true), mapping(0x2000, Access::Read, false)];
    assert_eq!(iommu.domains.len(), 1, "a bypass domain has no record");
    let domain = &iommu.domains[0];
    assert_eq!((domain.id, domain.live, &domain.endpoints), (7, 2, &vec![0x10]));
    assert_eq!(domain.mappings.as_ref(), Some(&list));
    assert!(domain.table_bytes > 0 && iommu.table_bytes >= domain.table_bytes);
    let rows = ["ATTACH OK 2", "MAP OK 2", "MAP INVAL 1", "UNMAP OK 1"];
    let found: Vec<_> =
        iommu.requests.iter().map(|row| format!("{} {} {}", row.request, row.status, row.count)).collect();
    assert_eq!(found, rows);
    assert_eq!((iommu.unmap_times.count(), iommu.function.request_times.unwrap().count()), (1, 6));
    assert_eq!((iommu.faults.mapping, iommu.faults.pending, iommu.faults.recent.len()), (1, 1, 1));
    let fault = &iommu.faults.recent[0];
    assert_eq!((fault.endpoint, fault.iova, fault.access), (0x10, Hex(0x2004), Access::Write));
    assert_eq!(fault.reason, "permission");
    assert!(fault.at_ns > 0 && fault.at_ns <= nanos(started.elapsed()));
    let short = Iommu::of(&device, Function::default(), started, false);
    assert_eq!((short.domains[0].live, &short.domains[0].mappings), (2, &None));

    let seen = |id| Endpoint::of(Some(device.iommu()), id, Function::default());
    assert_eq!((seen(0x10).view, seen(0x10).batches, seen(0x18).view), (View::Domain(7), 1, View::Identity));
    assert_eq!(Endpoint::of(None, 0x10, Function::default()).view, View::Untranslated);
}
