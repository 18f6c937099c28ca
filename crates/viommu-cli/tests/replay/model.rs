//! Through a device model it comes to the same.

use std::collections::BTreeSet;
use std::io::Read;

use crate::common::qemu::{MMIO, READ, WRITE};
use crate::common::{num, replay, viommu, without_model};
use crate::{RW, small};
use serde_json::Value;

/// With mirrors that fail, and that are small.
const ARGUMENTS: [&[&str]; 5] = [
    &[],
    &["--fail-map", "10"],
    &["--fail-unmap", "50"],
    &["--fail-map", "7", "--fail-unmap", "13", "--unfence"],
    &["--limit-entries", "10"],
];

/// The built-in history through a model.
fn with(model: &str, args: &[&str]) -> Value {
    let all = [&["replay", "--format=json", "--model", model], args].concat();
    let run = viommu(&all, b"");
    assert_eq!(run.status, 0, "{all:?}: {}", run.err);
    run.json()
}

#[test]
fn a_device_comes_to_the_same_in_the_built_in_history() {
    for args in ARGUMENTS {
        let (direct, device) = (with("direct", args), with("virtio-iommu", args));
        assert_eq!(without_model(direct.clone()), without_model(device.clone()), "{args:?}");
        assert_eq!(
            (&direct["model"]["name"], &device["model"]["name"]),
            (&"direct".into(), &"virtio-iommu".into())
        );
        let answers = |request: &str, status: Option<&str>| -> u64 {
            let lines = device["model"]["statuses"].as_array().unwrap().iter();
            let wanted = |l: &&Value| l["request"] == request && status.is_none_or(|s| l["status"] == s);
            lines.filter(wanted).map(|l| num(l, "/count")).sum()
        };
        for (request, path) in
            [("ATTACH", "/history/attach"), ("MAP", "/history/map"), ("UNMAP", "/history/unmap")]
        {
            // Nothing was held back: what was refused here was refused by the device.
            let all = answers(request, None);
            assert!(all >= num(&direct, path) || !args.is_empty(), "{request}: {all}");
        }
        if args.is_empty() {
            assert_eq!(answers("MAP", Some("OK")), num(&direct, "/history/map"));
            assert_eq!(answers("UNMAP", Some("OK")), num(&direct, "/history/unmap"));
            assert_eq!(answers("PROBE", Some("OK")), direct["mirrors"].as_array().unwrap().len() as u64);
        }
        if args.contains(&"--fail-map") || args.contains(&"--limit-entries") {
            let refused = answers("MAP", Some("NOMEM")) + answers("ATTACH", Some("NOMEM"));
            assert_eq!(refused, num(&direct, "/history/refused_here"));
        }
        let accesses = |how: &str| num(&device, &format!("/model/accesses/{how}"));
        assert!(accesses("moved") >= num(&direct, "/translations/agree"), "{}", device["model"]);
    }
}

#[test]
fn a_device_comes_to_the_same_where_the_log_does_otherwise() {
    let mut qemu = small();
    qemu.attach(1, 24);
    qemu.attach(1, 16);
    qemu.attach(2, 24);
    qemu.map(2, 0xfed0_0000, 0xfef0_0fff, 0x10_0000, RW);
    qemu.map(1, 0x2000, 0x5fff, 0x9000, RW);
    qemu.unmap(1, 0, 0x1fff);
    qemu.map(1, 0x10_0000, 0x10_0009, 0x5000, RW);
    qemu.unmap(1, 0x10_0000, 0x10_0009);
    qemu.map(1, u64::MAX - 0xfff, u64::MAX, 0xffff_ffff_ffff_f000, RW | MMIO);
    qemu.access(16, u64::MAX, READ);
    qemu.access(16, 0x77_0000, WRITE);
    qemu.access(16, 0xfee0_0000, WRITE);
    qemu.detach(7, 16);
    qemu.detach(1, 16);
    qemu.map(1, 0x9000, 0x9fff, 0x9000, RW);
    qemu.unmap(1, 0, 0xffff);
    qemu.access(16, 0x1008, READ);
    qemu.bypass = false;
    qemu.line(format_args!("set_config bypass=0x0"));
    qemu.access(16, 0x1008, READ);
    qemu.reset();
    qemu.attach(3, 16);
    qemu.access(16, 0x1008, READ);
    let (direct, device) = (replay(&qemu.log, &[]), replay(&qemu.log, &["--model", "virtio-iommu"]));
    assert_eq!((direct.status, device.status), (0, 0), "{}{}", direct.err, device.err);
    let model = &device.json()["model"];
    assert_eq!(without_model(direct.json()), without_model(device.json()));
    let statuses: BTreeSet<(String, String)> = model["statuses"]
        .as_array()
        .unwrap()
        .iter()
        .map(|l| (l["request"].as_str().unwrap().into(), l["status"].as_str().unwrap().into()))
        .collect();
    for (request, status) in [
        ("ATTACH", "OK"),
        ("DETACH", "OK"),
        ("DETACH", "INVAL"),
        ("MAP", "OK"),
        ("MAP", "INVAL"),
        ("MAP", "RANGE"),
        ("MAP", "NOENT"),
        ("UNMAP", "RANGE"),
        ("UNMAP", "NOENT"),
        ("PROBE", "OK"),
    ] {
        assert!(statuses.contains(&(request.into(), status.into())), "{request} {status}: {model}");
    }
    assert_eq!(num(model, "/events"), qemu.counts.fault);
    assert_eq!((num(model, "/bypass_writes"), num(model, "/resets")), (1, 1));
}

#[test]
fn tce_tables_come_to_the_same_in_the_built_in_history() {
    for args in ARGUMENTS {
        let (direct, tables) = (with("direct", args), with("spapr-tce", args));
        assert_eq!(without_model(direct.clone()), without_model(tables.clone()), "{args:?}");
        assert_eq!(tables["model"]["name"], "spapr-tce");
        let answers = |calls: &[&str], code: &str| -> u64 {
            let lines = tables["model"]["codes"].as_array().unwrap().iter();
            let wanted = |l: &&Value| calls.iter().any(|call| l["hypercall"] == *call) && l["code"] == code;
            lines.filter(wanted).map(|l| num(l, "/count")).sum()
        };
        let puts = ["H_PUT_TCE", "H_PUT_TCE_INDIRECT", "H_STUFF_TCE"];
        let (done, refused) = (answers(&puts, "H_SUCCESS"), answers(&puts, "H_RESOURCE"));
        assert_eq!(answers(&puts, "H_PARAMETER") + answers(&puts, "H_HARDWARE"), 0);
        if args.is_empty() {
            // One hypercall for each, and two reads of what it came to.
            assert_eq!(done, num(&direct, "/history/map") + num(&direct, "/history/unmap"));
            assert_eq!(answers(&["H_GET_TCE"], "H_SUCCESS"), 2 * done);
            assert!(answers(&["H_PUT_TCE_INDIRECT"], "H_SUCCESS") > 500);
        }
        assert!(refused <= num(&direct, "/history/refused_here"));
        assert_eq!(refused > 0, args.contains(&"--fail-map") || args.contains(&"--limit-entries"));
    }
}

#[test]
fn tce_tables_come_to_the_same_in_a_linux_trace_without_its_largest_maps() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../viommu-trace/testdata/linux-dma.trace.xz");
    let mut text = String::new();
    let file = std::io::BufReader::new(std::fs::File::open(path).unwrap());
    lzma_rust2::XzReader::new(file, true).read_to_string(&mut text).unwrap();
    let too_large = replay(&text, &["--model", "spapr-tce"]);
    assert_eq!((too_large.status, too_large.err.contains("one list")), (2, true), "{}", too_large.err);

    let size = |line: &str| line.split_once(" map: ")?.1.split_once("size=")?.1.trim().parse::<u64>().ok();
    let small: String =
        text.split_inclusive('\n').filter(|line| size(line).is_none_or(|size| size <= 512 << 12)).collect();
    let (direct, tables) = (replay(&small, &[]), replay(&small, &["--model", "spapr-tce"]));
    assert_eq!((direct.status, tables.status), (0, 0), "{}{}", direct.err, tables.err);
    assert_eq!(without_model(direct.json()), without_model(tables.json()));
    assert!(num(&direct.json(), "/history/map") > 700);
}

#[test]
fn what_tces_have_no_word_for_ends_the_replay_and_is_said() {
    type Make = fn(&mut crate::common::qemu::Qemu);
    let cases: [(&str, Make); 7] = [
        ("device registers", |q| {
            q.map(1, 0x10_0000, 0x10_0fff, 0x9000, RW | MMIO);
        }),
        ("without access", |q| {
            q.map(1, 0x10_0000, 0x10_0fff, 0x9000, 0);
        }),
        ("not whole pages", |q| {
            q.map(1, 0x10_0000, 0x10_0009, 0x9000, RW);
        }),
        ("more pages than one list", |q| {
            q.map(1, 0x10_0000, 0x10_0000 + (513 << 12) - 1, 0x9000, RW);
        }),
        ("replaced", |q| {
            q.map(1, 0x1000, 0x1fff, 0x9_9000, RW);
        }),
        ("cut a mapping", |q| {
            q.map(1, 0x10_0000, 0x10_1fff, 0x9000, RW);
            q.unmap(1, 0x10_0000, 0x10_0fff);
        }),
        ("not whole pages", |q| {
            q.unmap(1, 0x20_0000, 0x20_0009);
        }),
    ];
    for (what, make) in cases {
        let mut qemu = small();
        make(&mut qemu);
        assert_eq!(replay(&qemu.log, &[]).status, 0, "{what}");
        let run = replay(&qemu.log, &["--model", "spapr-tce"]);
        assert_eq!((run.status, run.out.as_str()), (2, ""), "{what}: {}", run.err);
        assert!(run.err.contains(what) && run.err.contains("--model direct"), "{what}: {}", run.err);
    }
}

#[test]
fn a_trace_whose_unmaps_may_cut_is_not_for_a_device() {
    let trace =
        "insmod-105 [000] ..... 2.909081: add_device_to_group: IOMMU: groupID=0 device=0000:00:00.0\n";
    assert_eq!(viommu(&["replay", "-"], trace.as_bytes()).status, 0);
    let run = viommu(&["replay", "-", "--model", "virtio-iommu"], trace.as_bytes());
    assert_eq!((run.status, run.out.as_str()), (2, ""));
    assert!(run.err.contains("may cut") && run.err.contains("--model direct"), "{}", run.err);
}
