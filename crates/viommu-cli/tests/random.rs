//! Random requests to a small QEMU: our record agrees with every line of its log.

#[expect(dead_code, reason = "each test uses a part")]
mod common;

use common::qemu::{MMIO, Qemu, READ, WRITE};
use common::{num, replay, without_model};
use proptest::prelude::*;
use serde_json::Value;

#[derive(Clone, Copy, Debug)]
enum Request {
    Attach(u32, u32),
    Detach(u32, u32),
    Map { domain: u32, page: u64, pages: u64, flags: u32 },
    Unmap { domain: u32, page: u64, pages: u64 },
    Access { endpoint: u32, page: u64, flag: u32 },
    Interrupt(u32),
    Bypass(bool),
    Reset,
}

const ENDPOINTS: [u32; 3] = [8, 0x110, 0x21b];
/// Where pages lie: low, below 4 GiB, and at the very end.
const BASES: [u64; 3] = [0x10_0000, 0xffff_0000, u64::MAX - 0xffff];

fn address(page: u64) -> u64 {
    BASES[usize::try_from(page / 16).unwrap()] + page % 16 * 4096
}

fn last(page: u64, pages: u64) -> u64 {
    let end = (page % 16 + pages).min(16);
    BASES[usize::try_from(page / 16).unwrap()] + (end * 4096 - 1)
}

fn request() -> impl Strategy<Value = Request> {
    let domain = 1..4_u32;
    let endpoint = prop::sample::select(&ENDPOINTS[..]);
    let page = 0..48_u64;
    let flags = prop_oneof![
        8 => Just(READ | WRITE),
        2 => Just(READ),
        1 => Just(WRITE),
        1 => Just(0),
        1 => Just(READ | WRITE | MMIO),
    ];
    prop_oneof![
        3 => (domain.clone(), endpoint.clone()).prop_map(|(d, e)| Request::Attach(d, e)),
        1 => (domain.clone(), endpoint.clone()).prop_map(|(d, e)| Request::Detach(d, e)),
        20 => (domain.clone(), page.clone(), 1..5_u64, flags)
            .prop_map(|(domain, page, pages, flags)| Request::Map { domain, page, pages, flags }),
        10 => (domain, page.clone(), 1..8_u64)
            .prop_map(|(domain, page, pages)| Request::Unmap { domain, page, pages }),
        20 => (endpoint.clone(), page, 0..4_u32)
            .prop_map(|(endpoint, page, flag)| Request::Access { endpoint, page, flag }),
        2 => endpoint.prop_map(Request::Interrupt),
        1 => any::<bool>().prop_map(Request::Bypass),
        1 => Just(Request::Reset),
    ]
}

fn play(requests: &[Request], bypass: bool, notified: &[u32]) -> Qemu {
    let mut qemu = Qemu { bypass, clock: 1, notified: notified.to_vec(), ..Qemu::default() };
    qemu.get_config();
    // Every domain has been there, so that none seems to be from before the log; every region's requester is known.
    for endpoint in ENDPOINTS {
        (1..4).for_each(|domain| qemu.attach(domain, endpoint));
        qemu.access(endpoint, 0xfee0_0000, WRITE);
    }
    let mut gpa = 0x4000_0000;
    for request in requests {
        match *request {
            Request::Attach(domain, endpoint) => qemu.attach(domain, endpoint),
            Request::Detach(domain, endpoint) => qemu.detach(domain, endpoint),
            Request::Map { domain, page, pages, flags } => {
                gpa += 0x10_0000;
                qemu.map(domain, address(page), last(page, pages), gpa, flags);
            }
            Request::Unmap { domain, page, pages } => qemu.unmap(domain, address(page), last(page, pages)),
            Request::Access { endpoint, page, flag } => qemu.access(endpoint, address(page) + 0x10, flag),
            Request::Interrupt(endpoint) => qemu.access(endpoint, 0xfee0_0010, WRITE),
            Request::Bypass(on) => {
                qemu.bypass = on;
                qemu.line(format_args!("set_config bypass={:#x}", u8::from(on)));
            }
            Request::Reset => qemu.reset(),
        }
    }
    qemu
}

/// Every count of the JSON against those of the small QEMU.
fn check(qemu: &Qemu, json: &Value) {
    let c = qemu.counts;
    let expected = [
        ("/history/lines", qemu.log.lines().count() as u64),
        ("/history/attach", c.attach),
        ("/history/detach", c.detach),
        ("/history/map", c.map),
        ("/history/unmap", c.unmap),
        ("/history/operations", c.attach + c.detach + c.map + c.unmap + c.resets),
        ("/history/removed", c.removed),
        ("/history/deviations", c.deviations),
        ("/translations/recorded", c.translated),
        ("/translations/agree", c.translated),
        ("/translations/differ", 0),
        ("/translations/unanswered", 0),
        ("/translations/silent/msi", c.msi),
        ("/translations/silent/bypass", c.bypass),
        ("/translations/silent/fault", c.fault),
        ("/translations/silent/differ", 0),
        ("/notifications/recorded", c.notified),
        ("/notifications/agree", c.notified),
        ("/notifications/differ", 0),
        ("/notifications/unanswered", 0),
        ("/audits/failed", 0),
    ];
    for (path, count) in expected {
        assert_eq!(num(json, path), count, "{path}: {json}");
    }
    let domains: Vec<(u64, u64, u64)> = json["record"]["domains"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| (num(d, "/id"), num(d, "/mappings"), num(d, "/pages")))
        .collect();
    let theirs: Vec<(u64, u64, u64)> = qemu
        .domains
        .iter()
        .map(|(id, d)| {
            let pages = d.maps.iter().map(|(start, m)| (m.last - start) / 4096 + 1).sum();
            (u64::from(*id), d.maps.len() as u64, pages)
        })
        .collect();
    assert_eq!(domains, theirs);
    for endpoint in json["record"]["endpoints"].as_array().unwrap() {
        let id = u32::try_from(num(endpoint, "/id")).unwrap();
        let domain = qemu.endpoints.get(&id).copied().flatten();
        let view = if domain.is_some() {
            "domain"
        } else if qemu.bypass {
            "identity"
        } else {
            "blocked"
        };
        assert_eq!(endpoint["view"], view, "{json}");
        assert_eq!(endpoint["domain"].as_u64(), domain.map(u64::from));
    }
    let held = |domain: u32| {
        let backed = |m: &&common::qemu::Map| m.flags & 3 != 0 && m.flags & MMIO == 0;
        qemu.domains[&domain].maps.values().filter(backed).count() as u64
    };
    for mirror in json["mirrors"].as_array().unwrap() {
        if let Some(domain) = mirror["domain"].as_u64() {
            assert_eq!(num(mirror, "/held"), held(u32::try_from(domain).unwrap()));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn our_record_agrees_with_every_line(
        requests in prop::collection::vec(request(), 1..400),
        bypass in any::<bool>(),
        notified in prop::sample::subsequence(&ENDPOINTS[..], 0..=3),
    ) {
        let qemu = play(&requests, bypass, &notified);
        let run = replay(&qemu.log, &[]);
        prop_assert_eq!(run.status, 0, "{}\n{}", run.err, qemu.log);
        check(&qemu, &run.json());
    }

    #[test]
    fn a_device_comes_to_the_same_as_the_record(
        requests in prop::collection::vec(request(), 1..400),
        bypass in any::<bool>(),
        notified in prop::sample::subsequence(&ENDPOINTS[..], 0..=3),
        options in prop::sample::select(vec![
            vec![], vec!["--fail-map", "3"], vec!["--fail-map", "5", "--fail-unmap", "7"],
            vec!["--fail-unmap", "4", "--unfence"], vec!["--limit-entries", "1"], vec!["--limit-entries", "4"],
            vec!["--fail-map", "4", "--fail-unmap", "9", "--unfence", "--limit-entries", "6"],
        ]),
        from in 0..2_usize,
    ) {
        let qemu = play(&requests, bypass, &notified);
        // From its beginning, or from the middle.
        let lines: Vec<&str> = qemu.log.lines().collect();
        let log = lines[lines.len() / 3 * from..].join("\n") + "\n";
        let direct = replay(&log, &options);
        let all: Vec<&str> = ["--model", "virtio-iommu"].into_iter().chain(options.clone()).collect();
        let device = replay(&log, &all);
        prop_assert_eq!(device.status, direct.status, "{:?} {}\n{}", options, device.err, log);
        let [direct, device] = [direct, device].map(|run| without_model(run.json()));
        prop_assert_eq!(direct, device, "{:?}\n{}", options, log);
    }

    #[test]
    fn failing_mirrors_leave_clean_audits(
        requests in prop::collection::vec(request(), 1..400),
        map in 1..20_u32,
        unmap in 1..20_u32,
        more in prop::sample::select(vec![
            vec![], vec!["--unfence"], vec!["--limit-entries", "4"], vec!["--unfence", "--limit-entries", "7"],
        ]),
        which in 0..3_u8,
    ) {
        let qemu = play(&requests, true, &ENDPOINTS[..2]);
        let (map, unmap) = (map.to_string(), unmap.to_string());
        let mut args = more;
        if which != 0 { args.extend(["--fail-map", &map]); }
        if which != 1 { args.extend(["--fail-unmap", &unmap]); }
        let run = replay(&qemu.log, &args);
        prop_assert_eq!(run.status, 0, "{:?} {}\n{}", args, run.err, qemu.log);
        let json = run.json();
        prop_assert_eq!(num(&json, "/audits/failed"), 0);
        let t = |name: &str| num(&json, &format!("/translations/{name}"));
        prop_assert_eq!(t("agree") + t("unanswered"), qemu.counts.translated);
        let n = |name: &str| num(&json, &format!("/notifications/{name}"));
        prop_assert_eq!(n("agree") + n("unanswered"), qemu.counts.notified);
    }
}
