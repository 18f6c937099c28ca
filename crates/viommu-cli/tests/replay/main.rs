//! Replays of the built-in history and of small logs.

#[path = "../common/mod.rs"]
mod common;
mod model;
mod real;
mod vtd;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Cursor, Write};

use common::qemu::{MMIO, Qemu, READ, WRITE};
use common::{num, replay, viommu, write};
use serde_json::Value;
use viommu_trace::{Event, History};

const RW: u32 = READ | WRITE;
const BUILT_IN: &[u8] = include_bytes!("../../data/builtin.viommu.xz");

/// What the built-in history should come to, by a plain map of mappings.
#[derive(Default)]
struct Plain {
    maps: BTreeMap<(u32, u64), (u64, u64)>,
    place: BTreeMap<u32, u32>,
    map: u64,
    unmap: u64,
    attach: u64,
    resets: u64,
    records: u64,
    removed: u64,
    answers: u64,
    wrong: u64,
    accesses: u64,
}

impl Plain {
    fn of(history: &mut History) -> Self {
        let mut plain = Self::default();
        while let Some(entry) = history.next().unwrap() {
            plain.records += 1;
            plain.take(entry.event);
        }
        plain
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Attach { domain, endpoint, .. } => {
                self.attach += 1;
                self.place.insert(endpoint, domain);
            }
            Event::Reset(_) => self.resets += 1,
            Event::Map { domain, range, gpa, .. } => {
                self.map += 1;
                self.maps.insert((domain, range.start().0), (range.last().0, gpa.0));
            }
            Event::Unmap { domain, range } => {
                self.unmap += 1;
                let inside = self.maps.range((domain, range.start().0)..=(domain, range.last().0));
                let gone: Vec<_> = inside.map(|(key, _)| *key).collect();
                self.removed += gone.len() as u64;
                self.maps.retain(|key, _| !gone.contains(key));
            }
            Event::Access { .. } => self.accesses += 1,
            Event::Translated { endpoint, iova, gpa } => {
                self.answers += 1;
                let domain = self.place[&endpoint];
                let found = self.maps.range(..=(domain, iova.0)).next_back();
                let ours = found.filter(|((d, _), (last, _))| *d == domain && *last >= iova.0);
                let ours = ours.map(|((_, start), (_, to))| to + (iova.0 - start));
                self.wrong += u64::from(ours != Some(gpa.0));
            }
            _ => {}
        }
    }
}

/// One endpoint in one domain, and two mappings.
fn small() -> Qemu {
    let mut qemu = Qemu { bypass: true, notified: vec![16], ..Qemu::default() };
    qemu.get_config();
    qemu.attach(1, 16);
    qemu.map(1, 0x1000, 0x2fff, 0x8000, RW);
    qemu.map(1, 0x4000, 0x4fff, 0x20000, READ);
    qemu.access(16, 0x1008, WRITE);
    qemu.access(16, 0x4ff8, READ);
    qemu
}

#[test]
fn the_built_in_history_agrees_and_is_counted_as_a_plain_map_counts_it() {
    let plain = Plain::of(&mut History::from_reader(Cursor::new(BUILT_IN), "test").unwrap());
    assert_eq!(plain.wrong, 0);
    assert!(plain.map > 6000 && plain.answers > 40_000);
    let run = viommu(&["replay", "--format", "json"], b"");
    assert_eq!(run.status, 0, "{}", run.err);
    let json = run.json();
    assert_eq!(json["history"]["source"], "built-in");
    assert_eq!(json["history"]["format"], "viommu");
    for (path, count) in [
        ("/history/lines", plain.records),
        ("/history/operations", plain.attach + plain.map + plain.unmap + plain.resets),
        ("/history/attach", plain.attach),
        ("/history/detach", 0),
        ("/history/map", plain.map),
        ("/history/unmap", plain.unmap),
        ("/history/removed", plain.removed),
        ("/history/deviations", 0),
        ("/translations/recorded", plain.answers),
        ("/translations/agree", plain.answers),
        ("/translations/silent/msi", plain.accesses - plain.answers),
        ("/translations/silent/differ", 0),
        ("/audits/failed", 0),
    ] {
        assert_eq!(num(&json, path), count, "{path}");
    }
    assert!(num(&json, "/audits/run") >= 12 * plain.place.len() as u64);
    let mut live: BTreeMap<u32, u64> = plain.place.values().map(|domain| (*domain, 0)).collect();
    plain.maps.keys().for_each(|(domain, _)| *live.entry(*domain).or_default() += 1);
    let domains = json["record"]["domains"].as_array().unwrap();
    let ours: BTreeMap<u32, u64> =
        domains.iter().map(|d| (u32::try_from(num(d, "/id")).unwrap(), num(d, "/mappings"))).collect();
    assert_eq!(ours, live);
    let endpoints: Vec<u64> =
        json["record"]["endpoints"].as_array().unwrap().iter().map(|e| num(e, "/id")).collect();
    assert_eq!(endpoints, plain.place.keys().map(|id| u64::from(*id)).collect::<Vec<_>>());
    let maps: u64 = json["mirrors"].as_array().unwrap().iter().map(|m| num(m, "/map")).sum();
    assert_eq!(maps, plain.map, "each domain with mappings has one endpoint there");
}

#[test]
fn the_json_has_the_promised_fields_in_their_shape() {
    let json = viommu(&["replay", "--format=json"], b"").json();
    let keys = |path: &str| -> BTreeSet<String> {
        json.pointer(path).unwrap().as_object().unwrap().keys().cloned().collect()
    };
    let has = |path: &str, names: &str| {
        let there = keys(path);
        names.split(' ').for_each(|name| assert!(there.contains(name), "{path}/{name}"));
    };
    has("", "model history record translations notifications mirrors caches audits seconds");
    has("/history", "source format lines operations attach detach map unmap removed deviations");
    has("/record/domains/0", "id mappings pages");
    has("/record/endpoints/0", "id view domain");
    has("/translations", "recorded agree differ unanswered silent");
    has("/translations/silent", "msi bypass fault differ");
    has("/notifications", "recorded agree differ unanswered");
    has("/mirrors/0", "endpoint domain map unmap replace held refused fenced");
    has("/caches/0", "endpoint domain fills hits invalidations held");
    has("/audits", "run failed");
    assert!(json["seconds"].as_f64().unwrap() > 0.0);
}

#[test]
fn mirrors_that_fail_leave_lines_unanswered_and_the_rest_as_it_was() {
    let whole = viommu(&["replay", "--format", "json"], b"").json();
    for args in [
        &["--fail-map", "10"][..],
        &["--fail-unmap", "50"],
        &["--fail-unmap", "50", "--unfence"],
        &["--fail-map", "7", "--fail-unmap", "13", "--unfence"],
        &["--limit-entries", "10"],
        &["--limit-entries", "1"],
    ] {
        let all: Vec<&str> = ["replay", "--format", "json"].iter().chain(args).copied().collect();
        let run = viommu(&all, b"");
        assert_eq!(run.status, 0, "{args:?}: {}", run.err);
        let json = run.json();
        assert_eq!(num(&json, "/audits/failed"), 0);
        assert_eq!(num(&json, "/translations/differ"), 0);
        let (agree, unanswered) = (num(&json, "/translations/agree"), num(&json, "/translations/unanswered"));
        assert_eq!(agree + unanswered, num(&whole, "/translations/recorded"));
        let mirrors = json["mirrors"].as_array().unwrap();
        let fenced = mirrors.iter().filter(|m| m["fenced"] == true).count();
        let refused: u64 = mirrors.iter().map(|m| num(m, "/refused")).sum();
        let unfence = args.contains(&"--unfence");
        assert_eq!(fenced > 0, args.contains(&"--fail-unmap") && !unfence, "{args:?}");
        assert!(refused > 0, "{args:?}");
        // With a successor for each fenced mirror nothing is lost but what was refused.
        assert_eq!(unanswered == 0, unfence && !args.contains(&"--fail-map"), "{args:?}");
        if args == ["--fail-map", "10"] {
            for m in mirrors {
                assert_eq!(num(m, "/refused"), (num(m, "/map") + num(m, "/refused")) / 10);
            }
        }
        if args[0] == "--limit-entries" {
            let limit: u64 = args[1].parse().unwrap();
            assert!(mirrors.iter().all(|m| num(m, "/held") <= limit));
        }
    }
}

#[test]
fn every_prefix_and_every_compression_reads_the_same() {
    let plain = small().log;
    let expected = replay(&plain, &[]).json();
    assert_eq!(num(&expected, "/translations/agree"), 2);
    assert_eq!(num(&expected, "/notifications/agree"), 2);
    let same = |mut json: Value| {
        json["seconds"] = 0.into();
        json["history"]["source"] = "".into();
        json
    };
    let expected = same(expected);
    for prefix in
        ["4711@1700000000.123456:", "2026-11-22T06:37:19.882540Z ", "2026-11-22T06:37:19.882540Z 12@1.5:"]
    {
        let log: String = plain.lines().map(|line| format!("{prefix}{line}\r\n")).collect();
        assert_eq!(same(replay(&log, &[]).json()), expected, "{prefix}");
    }
    let options = lzma_rust2::XzOptions::with_preset(1);
    let mut xz = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    xz.write_all(plain.as_bytes()).unwrap();
    let path = write("small.log.xz", xz.finish().unwrap());
    let run = viommu(&["replay", path.to_str().unwrap(), "--format", "json"], b"");
    assert_eq!(same(run.json()), expected);
}

#[test]
fn a_changed_address_is_a_difference_with_file_and_line() {
    let log = small().log.replace("-> 0x8008", "-> 0x9008");
    let line = log.lines().position(|l| l.contains("-> 0x9008")).unwrap() + 1;
    let path = write("differs.log", &log);
    let name = path.to_str().unwrap();
    let text = viommu(&["replay", name], b"");
    assert_eq!(text.status, 1);
    let words: String = text.out.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains(&format!("{name}:{line}:")), "{}", text.out);
    let json = viommu(&["replay", name, "--format", "json"], b"");
    assert_eq!(json.status, 1);
    assert!(json.err.contains(&format!("{name}:{line}:")), "{}", json.err);
    assert_eq!(num(&json.json(), "/translations/differ"), 1);
}

#[test]
fn at_most_ten_differences_are_printed_and_all_counted() {
    let mut qemu = small();
    (0..40).for_each(|_| qemu.access(16, 0x1010, READ));
    let run = replay(&qemu.log.replace("0x1010 -> 0x8010", "0x1010 -> 0x18010"), &[]);
    assert_eq!(run.status, 1);
    assert_eq!(run.err.lines().count(), 10);
    assert_eq!(num(&run.json(), "/translations/differ"), 40);
    assert_eq!(num(&run.json(), "/differences"), 40);
}

#[test]
fn each_kind_of_line_that_says_otherwise_is_found() {
    let log = || {
        let mut qemu = small();
        qemu.unmap(1, 0x1000, 0x4fff);
        qemu.access(16, 0x1008, READ);
        qemu.map(1, 0x9000, 0x9fff, 0x9000, RW);
        qemu.log
    };
    assert_eq!(replay(&log(), &[]).status, 0);
    let without = |what: &str| -> String {
        let text = log();
        assert!(text.contains(what));
        text.lines().filter(|l| !l.contains(what)).map(|l| format!("{l}\n")).collect()
    };
    for (changed, field) in [
        (without("translate_out 0x1008"), "/translations/silent/differ"),
        (
            log()
                .replace("flag=2", "flag=2 ")
                .replace("flag=2 ", "flag=3")
                .replace("addr=0x4ff8 flag=1", "addr=0x4ff8 flag=2"),
            "/translations/differ",
        ),
        (
            log().replacen(
                "notify_map mr=virtio-iommu-memory-region-2-16 virt_start=0x1000",
                "notify_map mr=virtio-iommu-memory-region-2-16 virt_start=0x0",
                1,
            ),
            "/notifications/differ",
        ),
        (
            log().replace(
                "phys_start=0x20000 flags=1\nvirtio_iommu_notify",
                "phys_start=0x21000 flags=1\nvirtio_iommu_notify",
            ),
            "/notifications/differ",
        ),
        (without("notify_unmap mr=virtio-iommu-memory-region-2-16 virt_start=0x4000"), "/differences"),
        (without("unmap_done domain=1 virt_start=0x1000"), "/differences"),
        (
            log().replace(
                "unmap_done domain=1 virt_start=0x1000 virt_end=0x2fff",
                "unmap_done domain=1 virt_start=0x1000 virt_end=0x1fff",
            ),
            "/differences",
        ),
        (
            log().replace("unmap domain=1 virt_start=0x1000", "unmap domain=1 virt_start=0x2000"),
            "/differences",
        ),
    ] {
        let run = replay(&changed, &[]);
        assert_eq!(run.status, 1, "{field}: {changed}");
        assert!(num(&run.json(), field) > 0, "{field}: {}\n{changed}", run.out);
    }
}

#[test]
fn what_our_device_would_do_otherwise_is_followed_counted_and_named() {
    let kinds = |qemu: &Qemu| -> (u64, Vec<String>) {
        let run = replay(&qemu.log, &[]);
        assert_eq!(run.status, 0, "{}\n{}", run.err, qemu.log);
        let json = run.json();
        let names = json["history"]["deviation_kinds"].as_array().unwrap();
        let names = names.iter().map(|k| k["what"].as_str().unwrap().to_owned()).collect();
        let (domains, ours) = (qemu.domains.values(), json["record"]["domains"].as_array().unwrap());
        let lacked = num(&json, "/history/deviations") - qemu.counts.deviations;
        for (theirs, ours) in domains.zip(ours) {
            assert!(theirs.maps.len() as u64 - num(ours, "/mappings") <= lacked);
        }
        (num(&json, "/history/deviations"), names)
    };
    let mut again = small();
    again.attach(1, 16);
    again.access(16, 0x1008, READ);
    assert_eq!(kinds(&again).0, 1);
    assert!(kinds(&again).1[0].contains("attach"));

    let mut shared = small();
    shared.attach(1, 24);
    shared.attach(1, 16);
    shared.access(16, 0x1008, READ);
    assert_eq!(kinds(&shared), (0, vec![]));

    let mut cut = small();
    cut.unmap(1, 0, 0x1fff);
    cut.unmap(1, 0x2000, 0x4fff);
    cut.access(16, 0x4000, READ);
    assert_eq!(kinds(&cut).0, cut.counts.deviations);
    assert_eq!(cut.counts.removed, 1);
    assert!(kinds(&cut).1[0].contains("cut"));

    let mut part = small();
    part.map(1, 0x10_0000, 0x10_0009, 0x5000, RW);
    part.access(16, 0x10_0004, READ);
    part.unmap(1, 0x10_0000, 0x10_0009);
    part.access(16, 0x10_0004, READ);
    let run = replay(&part.log, &[]);
    assert_eq!((run.status, num(&run.json(), "/translations/unanswered")), (0, 1), "{}", run.err);
    assert_eq!(num(&run.json(), "/history/deviations"), 1);

    let mut over = small();
    over.line(format_args!("fill_resv_property dev= 16, type=1 start=0xfee00000 end=0xfeefffff"));
    over.map(1, 0xfed0_0000, 0xfef0_0fff, 0x10_0000, RW);
    over.access(16, 0xfed0_0000, READ);
    let run = replay(&over.log, &[]);
    assert_eq!((run.status, num(&run.json(), "/history/deviations")), (0, 1), "{}", run.err);

    let mut past = small();
    past.line(format_args!(
        "map domain=1 virt_start=0x7000 virt_end=0x8fff phys_start=0xfffffffffffff000 flags=3"
    ));
    let run = replay(&past.log, &[]);
    assert_eq!((run.status, num(&run.json(), "/history/deviations")), (0, 1), "{}", run.err);
}

#[test]
fn an_assumed_region_gives_way_to_a_map_over_it() {
    let mut qemu = small();
    qemu.map(1, 0xfed0_0000, 0xfef0_0fff, 0x10_0000, RW);
    qemu.access(16, 0xfed0_0123, READ);
    let run = replay(&qemu.log, &[]);
    let json = run.json();
    assert_eq!((run.status, num(&json, "/history/deviations")), (0, 0), "{}", run.err);
    assert_eq!(num(&json, "/translations/agree"), 3);
    assert_eq!(num(&json, "/record/domains/0/mappings"), 3);
}

#[test]
fn maps_that_overlap_or_name_a_dead_domain_are_refused_by_both() {
    let mut qemu = small();
    assert!(!qemu.map(1, 0x2000, 0x5fff, 0x9000, RW));
    qemu.detach(1, 16);
    assert!(!qemu.map(1, 0x9000, 0x9fff, 0x9000, RW));
    qemu.unmap(1, 0, 0xffff);
    qemu.access(16, 0x1008, READ);
    let run = replay(&qemu.log, &[]);
    let json = run.json();
    assert_eq!((run.status, num(&json, "/history/refused_by_both")), (0, 2), "{}", run.err);
    assert_eq!(num(&json, "/history/deviations"), 0);
    assert_eq!(num(&json, "/translations/silent/bypass"), 1);
    assert_eq!(json["record"]["domains"].as_array().unwrap().len(), 0);
    assert_eq!(json["record"]["endpoints"][0]["view"], "identity");
}

#[test]
fn a_bypass_domain_shows_by_the_switch_of_its_endpoint() {
    let mut qemu = Qemu { bypass: false, ..Qemu::default() };
    qemu.get_config();
    qemu.attach(5, 16);
    let log = qemu.log.replace("(iommu enabled=1)", "(iommu enabled=0)");
    let log =
        format!("{log}virtio_iommu_translate mr=virtio-iommu-memory-region-2-16 rid=16 addr=0x5000 flag=1\n");
    let run = replay(&log, &[]);
    let json = run.json();
    assert_eq!(run.status, 0);
    assert_eq!(json["record"]["endpoints"][0]["view"], "identity");
    assert_eq!(num(&json, "/translations/silent/bypass"), 1);
}

#[test]
fn registers_and_mappings_without_rights_are_in_the_record_and_in_no_mirror() {
    let mut qemu = Qemu { bypass: true, notified: vec![16], ..Qemu::default() };
    qemu.attach(1, 16);
    qemu.map(1, 0x1000, 0x1fff, 0x8000, RW | MMIO);
    qemu.map(1, 0x2000, 0x2fff, 0x9000, 0);
    qemu.access(16, 0x1000, WRITE);
    qemu.access(16, 0x2000, READ);
    qemu.access(16, 0x2000, 0);
    qemu.map(1, u64::MAX - 0xfff, u64::MAX, 0xffff_ffff_ffff_f000, RW);
    qemu.access(16, u64::MAX, READ);
    let json = replay(&qemu.log, &[]).json();
    assert_eq!(num(&json, "/translations/agree"), qemu.counts.translated);
    assert_eq!(num(&json, "/translations/silent/fault"), 1);
    assert_eq!((num(&json, "/record/domains/0/mappings"), num(&json, "/mirrors/0/held")), (3, 1));
    qemu.unmap(1, 0, u64::MAX);
    let run = replay(&qemu.log, &[]);
    assert_eq!(run.status, 0, "{}", run.err);
    assert_eq!(num(&run.json(), "/history/removed"), 3);
    assert_eq!(num(&run.json(), "/notifications/agree"), qemu.counts.notified);
}

#[test]
fn a_history_that_begins_in_the_middle_says_so_and_finds_its_endpoints() {
    let mut qemu = small();
    qemu.map(1, 0x7000, 0x7fff, 0x30000, RW);
    qemu.access(16, 0x7004, READ);
    qemu.access(16, 0x1004, READ);
    qemu.unmap(1, 0x1000, 0x2fff);
    let begin = qemu.log.find("virtio_iommu_map domain=1 virt_start=0x7000").unwrap();
    let rest = &qemu.log[begin..];
    let run = replay(rest, &[]);
    assert_eq!(run.status, 0, "{}", run.err);
    let json = run.json();
    assert_eq!(num(&json, "/history/from_before/0/domain"), 1);
    assert_eq!(num(&json, "/history/found_endpoints/0/endpoint"), 16);
    assert_eq!((num(&json, "/translations/agree"), num(&json, "/translations/unanswered")), (1, 1));
    assert_eq!((num(&json, "/notifications/agree"), num(&json, "/notifications/unanswered")), (1, 1));
    assert_eq!(json["mirrors"][0]["endpoint"], 16);
    assert!(viommu(&["replay", "-"], rest.as_bytes()).out.contains("begins in the middle"));

    // Without anything that names an endpoint, mirror and cache stay on the domain.
    let alone = "virtio_iommu_map domain=5 virt_start=0x1000 virt_end=0x1fff phys_start=0x8000 flags=3\n";
    let json = replay(alone, &[]).json();
    assert!(json["mirrors"][0]["endpoint"].is_null());
    assert_eq!((num(&json, "/mirrors/0/domain"), num(&json, "/mirrors/0/held")), (5, 1));
    assert_eq!(json["record"]["endpoints"].as_array().unwrap().len(), 0);
}

#[test]
fn input_that_cannot_be_read_is_told_at_its_place_after_what_came_before() {
    let log = small().log;
    let lines = log.lines().count();
    for (bad, place) in [
        (format!("{log}virtio_iommu_map domain=1 virt_start=0x9000\n"), lines + 1),
        (format!("{log}virtio_iommu_map domain=1 virt_sta"), lines + 1),
    ] {
        let path = write("bad.log", &bad);
        let run = viommu(&["replay", path.to_str().unwrap(), "--format", "json"], b"");
        assert_eq!(run.status, 2);
        assert!(run.err.contains(&format!("{}: line {place}: ", path.display())), "{}", run.err);
        assert_eq!(num(&run.json(), "/translations/agree"), 2);
        assert_eq!(num(&run.json(), "/history/map"), 2);
    }
    for input in [&b""[..], b"hello\nworld\n", &BUILT_IN[..BUILT_IN.len() / 2][..20]] {
        let run = viommu(&["replay", "-"], input);
        assert_eq!(run.status, 2);
        assert!(run.err.starts_with("viommu: -: "), "{}", run.err);
    }
    let half = viommu(&["replay", "-", "--format", "json"], &BUILT_IN[..BUILT_IN.len() / 2]);
    assert_eq!(half.status, 2);
    assert!(num(&half.json(), "/history/operations") > 100);
    assert_eq!(num(&half.json(), "/differences"), 0, "{}", half.err);
    for args in
        [&["replay", "/does/not/exist"][..], &["replay", "--format", "xml"], &["replay", "--fail-map", "0"]]
    {
        let run = viommu(args, b"");
        assert_eq!(run.status, 2, "{args:?}");
        assert!(!run.err.is_empty());
    }
}

#[test]
fn the_text_fits_its_columns_and_has_no_colour_in_a_pipe() {
    let long = format!("{}/{}.log", std::env::temp_dir().display(), "long".repeat(40));
    std::fs::write(&long, small().log.replace("-> 0x8008", "-> 0x9008")).unwrap();
    let run = viommu(&["replay", &long], b"");
    std::fs::remove_file(&long).unwrap();
    assert_eq!(run.status, 1);
    for text in [run.out, viommu(&["replay"], b"").out] {
        assert!(!text.contains('\u{1b}'));
        // A path cannot be broken.
        assert!(text.lines().all(|l| l.chars().count() <= 100 || l.contains("longlong")), "{text}");
    }
}

#[test]
fn the_report_is_one_page_that_needs_nothing_else() {
    let path = common::scratch("report.html");
    let run = viommu(&["replay", "--report", path.to_str().unwrap()], b"");
    assert_eq!(run.status, 0);
    let page = std::fs::read_to_string(&path).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"));
    for outside in ["http:", "https:", "src=", "<script", "<link", "url(", "@import"] {
        assert!(!page.contains(outside), "{outside}");
    }
    for part in
        ["Live mappings", "Rate", "Addresses over time", "domain 4", "Reuse", "Endpoints", "What was checked"]
    {
        assert!(page.contains(part), "{part}");
    }
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    assert!(page.len() < 2_000_000);
    let nowhere = viommu(&["replay", "--report", "/does/not/exist.html"], b"");
    assert_eq!(nowhere.status, 2);
}

#[test]
fn a_converted_history_is_the_same_history() {
    let from = write("convert.log", small().log);
    let to = common::scratch("convert.viommu");
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    let run = viommu(&["convert", from, to], b"");
    assert_eq!(run.status, 0, "{}", run.err);
    let events = |path: &str| {
        let mut history = History::open(path).unwrap();
        let mut all = Vec::new();
        while let Some(entry) = history.next().unwrap() {
            all.push(entry);
        }
        all
    };
    assert_eq!(events(from), events(to));
    assert!(run.out.contains(&format!("{} events", events(from).len())), "{}", run.out);
    let piped = std::process::Command::new(env!("CARGO_BIN_EXE_viommu"))
        .args(["convert", from, "-"])
        .output()
        .unwrap();
    assert_eq!(piped.stdout, std::fs::read(to).unwrap());
    let same = |path: &str| {
        let mut json = viommu(&["replay", path, "--format", "json"], b"").json();
        for field in ["source", "format", "lines", "passed_over"] {
            json["history"][field] = 0.into();
        }
        json["seconds"] = 0.into();
        json
    };
    assert_eq!(same(from), same(to));
    assert_eq!(viommu(&["convert", "/does/not/exist", to], b"").status, 2);
}

#[test]
fn who_stops_reading_the_output_causes_no_panic() {
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_viommu"))
        .arg("replay")
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty());
}
