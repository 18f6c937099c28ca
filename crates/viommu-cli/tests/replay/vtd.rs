//! Through tables in guest memory and a VT-d unit it comes to the same.

use std::io::Cursor;

use serde_json::Value;
use viommu::{Iova, IovaRange};
use viommu_trace::{Entry, Event, History, Writer};

use crate::common::qemu::{MMIO, READ, WRITE};
use crate::common::{num, replay, viommu, without_model, write};
use crate::{BUILT_IN, RW, small};

/// What the tables' pages have no part in: all but how many extents a mirror has been given, and what a cache has heard and
/// kept, since it is told more than what has changed.
fn but_extents(json: &Value) -> Value {
    let mut json = without_model(json.clone());
    assert!(json.as_object_mut().unwrap().remove("caches").is_some());
    for mirror in json["mirrors"].as_array_mut().unwrap() {
        for field in ["map", "held"] {
            assert!(mirror.as_object_mut().unwrap().remove(field).is_some());
        }
    }
    json
}

/// Mirrors' `map` and `held`, in order.
fn extents(json: &Value) -> Vec<(u64, u64)> {
    json["mirrors"].as_array().unwrap().iter().map(|m| (num(m, "/map"), num(m, "/held"))).collect()
}

fn run(file: Option<&str>, model: &str) -> Value {
    let args = ["replay", "--format=json", "--model", model];
    let run = viommu(&args.into_iter().chain(file).collect::<Vec<_>>(), b"");
    assert!(run.status < 2, "{file:?}, {model}: {}", run.err);
    run.json()
}

#[test]
fn tables_come_to_the_same_in_every_capture() {
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/../viommu-trace/testdata/");
    let captures = [
        "qemu-iso.log",
        "qemu-plain.log",
        "qemu-notify.log",
        "linux-dma.trace.xz",
        "linux-cache-tags.trace.xz",
        "linux-bare.trace",
    ];
    let files: Vec<String> = captures.iter().map(|name| format!("{data}{name}")).collect();
    for file in files.iter().map(|file| Some(file.as_str())).chain([None]) {
        let (direct, tables) = (run(file, "direct"), run(file, "vtd"));
        assert_eq!(but_extents(&direct), but_extents(&tables), "{file:?}");
        let sent = |what: &str| num(&tables, &format!("/model/descriptors/{what}"));
        assert_eq!(tables["model"]["name"], "vtd");
        let changes = num(&direct, "/history/map") + num(&direct, "/history/unmap");
        assert!(sent("pages") + sent("domains") >= changes, "{file:?}: one for each, of what changed");
        assert!(sent("waits") > changes && sent("contexts") > num(&direct, "/history/attach"));
    }
}

/// The built-in history with each map cut into the pages that tables have: no more than 4 KiB are aligned in it.
fn in_pages() -> Vec<u8> {
    let mut history = History::from_reader(Cursor::new(BUILT_IN), "test").unwrap();
    let mut writer = Writer::new(Vec::new()).unwrap();
    while let Some(entry) = history.next().unwrap() {
        let Event::Map { range, gpa, .. } = entry.event else {
            writer.write(&entry).unwrap();
            continue;
        };
        for at in (range.start().0..=range.last().0).step_by(4096) {
            let mut page = entry;
            let Event::Map { range: own, gpa: to, .. } = &mut page.event else { unreachable!() };
            assert!(at % (2 << 20) != 0 || range.bytes() < 2 << 20);
            *own = IovaRange::new(Iova(at), Iova(at + 4095)).unwrap();
            to.0 = gpa.0 + (at - range.start().0);
            writer.write(&Entry { ..page }).unwrap();
        }
    }
    writer.finish().unwrap()
}

#[test]
fn mirrors_get_exactly_the_pages_of_the_built_in_history() {
    let path = write("pages.viommu", in_pages());
    let path = path.to_str().unwrap();
    let (direct, tables) = (run(Some(path), "direct"), run(Some(path), "vtd"));
    let pages = extents(&direct);
    assert!(pages.iter().any(|(map, _)| *map > 10_000));
    // Field by field, where there is one page in a map; and as many where there are more.
    let without_caches = |json: &Value| {
        let mut json = without_model(json.clone());
        json.as_object_mut().unwrap().remove("caches");
        json
    };
    assert_eq!(without_caches(&direct), without_caches(&tables));
    assert_eq!(extents(&run(None, "vtd")), pages);
    std::fs::remove_file(path).unwrap();
}

#[test]
fn large_pages_are_used_where_they_fit_and_tables_in_their_place_go() {
    let mut qemu = small();
    // A page where the large one will be, a large one, and one that begins and ends with small ones.
    qemu.map(1, 0x20_0000, 0x20_0fff, 0x50_0000, RW);
    qemu.unmap(1, 0x20_0000, 0x20_0fff);
    qemu.map(1, 0x20_0000, 0x3f_ffff, 0x4020_0000, RW);
    qemu.access(16, 0x3f_f008, READ);
    qemu.map(1, 0x5f_f000, 0x80_0fff, 0x5f_f000, RW);
    qemu.map(1, 1 << 30, (2 << 30) - 1, 0, RW);
    qemu.access(16, 0x7fff_fff8, READ);
    qemu.unmap(1, 0x20_0000, 0x3f_ffff);
    qemu.map(1, 0x20_1000, 0x20_1fff, 0x9000, RW);
    qemu.access(16, 0x20_1008, READ);
    qemu.access(16, 0x20_0008, READ);
    qemu.unmap(1, 0, u64::MAX);
    qemu.map(1, 0xffff_ffff_f000, 0xffff_ffff_ffff, 0x9000, RW);
    qemu.reset();
    qemu.attach(2, 16);
    qemu.map(2, 0x1000, 0x1fff, 0x9000, READ);
    qemu.access(16, 0x1008, WRITE);
    let (direct, tables) = (replay(&qemu.log, &[]), replay(&qemu.log, &["--model", "vtd"]));
    assert_eq!((direct.status, tables.status), (0, 0), "{}{}", direct.err, tables.err);
    assert_eq!(but_extents(&direct.json()), but_extents(&tables.json()));
    // 2 + 1, 1 for a moment, 1 large, 1 + 1 large + 1, 1 GiB, 1, 1 at the end; after the reset 1.
    assert_eq!(extents(&tables.json()), [(12, 1)]);
}

#[test]
fn domains_with_numbers_that_a_domain_id_has_not_and_bypass_come_to_the_same() {
    let mut qemu = small();
    for (domain, endpoint) in [(0, 24), (65_535, 32), (1 << 20, 40), (65_534, 48), (1, 56)] {
        qemu.attach(domain, endpoint);
        qemu.map(domain, 0x7000, 0x8fff, 0x3_0000, RW);
        qemu.access(endpoint, 0x7008, READ);
    }
    qemu.access(16, 0x7008, READ);
    qemu.attach(0, 16);
    qemu.access(16, 0x7008, READ);
    qemu.access(16, 0x1008, READ);
    qemu.detach(1, 56);
    qemu.access(56, 0x1_2340, READ);
    qemu.bypass = false;
    qemu.line(format_args!("set_config bypass=0x0"));
    qemu.access(56, 0x1_2340, READ);
    qemu.access(32, 0x8008, READ);
    qemu.reset();
    let (direct, tables) = (replay(&qemu.log, &[]), replay(&qemu.log, &["--model", "vtd"]));
    assert_eq!((direct.status, tables.status), (0, 0), "{}{}", direct.err, tables.err);
    assert_eq!(but_extents(&direct.json()), but_extents(&tables.json()));
}

#[test]
fn what_tables_have_no_word_for_ends_the_replay_and_is_said() {
    type Make = fn(&mut crate::common::qemu::Qemu);
    let cases: [(&str, Make); 10] = [
        ("device registers", |q| {
            q.map(1, 0x10_0000, 0x10_0fff, 0x9000, RW | MMIO);
        }),
        ("without access", |q| {
            q.map(1, 0x10_0000, 0x10_0fff, 0x9000, 0);
        }),
        ("not whole pages", |q| {
            q.map(1, 0x10_0000, 0x10_0009, 0x9000, RW);
        }),
        ("more than 48 bits", |q| {
            q.map(1, 1 << 48, (1 << 48) + 0xfff, 0x9000, RW);
        }),
        ("a target of more than 51 bits", |q| {
            q.map(1, 0x10_0000, 0x10_0fff, 1 << 51, RW);
        }),
        ("over x86's interrupts", |q| {
            q.map(1, 0xfedf_f000, 0xfee0_0fff, 0x9000, RW);
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
        ("more than 16 bits", |q| {
            q.line(format_args!("attach domain=1 endpoint=65536"));
        }),
    ];
    for (what, make) in cases {
        let mut qemu = small();
        make(&mut qemu);
        assert!(replay(&qemu.log, &[]).status < 2, "{what}");
        let run = replay(&qemu.log, &["--model", "vtd"]);
        assert_eq!((run.status, run.out.as_str()), (2, ""), "{what}: {}", run.err);
        assert!(run.err.contains(what) && run.err.contains("--model direct"), "{what}: {}", run.err);
    }
}

#[test]
fn mirrors_that_refuse_are_not_for_tables() {
    for option in ["--fail-map", "--fail-unmap", "--limit-entries"] {
        let run = viommu(&["replay", "--model", "vtd", option, "5"], b"");
        assert_eq!((run.status, run.out.as_str()), (2, ""));
        assert!(run.err.contains("other models") && run.err.lines().count() == 1, "{}", run.err);
    }
}
