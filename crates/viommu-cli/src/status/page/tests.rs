use super::*;
use crate::serve::snapshot::tests::sample;
use crate::serve::snapshot::{Domain, Hex};

/// Two states, a second apart.
pub(in crate::status) fn two_states() -> History {
    let mut history = History::default();
    history.push(sample());
    let mut later = sample();
    later.uptime_ns += 1_000_000_000;
    let iommu = later.iommu.as_mut().unwrap();
    iommu.requests[1].count += 1234;
    iommu.requests[3].count += 617;
    later.endpoints[0].batches += 24_310;
    history.push(later);
    history
}

fn texts(lines: &[Line]) -> Vec<String> {
    lines.iter().map(|line| line.text().trim_end().to_owned()).collect()
}

#[test]
fn page_of_one_state_has_no_rates() {
    let mut history = History::default();
    history.push(sample());
    let page = texts(&page("/run/vm", &history, 60));
    assert_eq!(page, include_str!("one.txt").lines().collect::<Vec<_>>());
}

#[test]
fn page_fits_any_terminal() {
    let mut snapshot = sample();
    snapshot.version = "99.99.99".into();
    for n in 0..40 {
        let mut more = snapshot.endpoints[0].clone();
        (more.id, more.function.address) = (0x200 + n, format!("02:00.{n}"));
        more.function.device = "blk:".to_owned() + &"x".repeat(200);
        snapshot.endpoints.push(more);
    }
    let iommu = snapshot.iommu.as_mut().unwrap();
    (iommu.malformed, iommu.faults.lost) = (99_999_999, 99_999_999);
    for id in 2..30 {
        let endpoints = (0x200..0x228).collect();
        let (live, table_bytes) = (1 << 30, u64::MAX);
        let id = u32::MAX - id;
        iommu.domains.push(Domain { id, endpoints, live, table_bytes, ..Domain::default() });
    }
    let mut fault = iommu.faults.recent[0].clone();
    (fault.iova, fault.at_ns) = (Hex(u64::MAX), 0);
    iommu.faults.recent = vec![fault; 16];
    let mut history = two_states();
    history.push(Snapshot { uptime_ns: snapshot.uptime_ns + 2_000_000_000, ..snapshot });
    let long = format!("/{}", "d".repeat(100));
    for height in 0..100 {
        let lines = page(&long, &history, height);
        assert!(lines.len() <= height, "{height}: {}", lines.len());
        for line in texts(&lines) {
            assert!(line.chars().count() <= WIDTH, "{height}: {line:?}");
        }
    }
    let lines = texts(&page(&long, &history, 24));
    assert_eq!(lines.len(), 24);
    for what in
        ["more functions", "more domains", "more faults", "UNMAP", "function", "domain", "last faults"]
    {
        assert!(lines.iter().any(|line| line.contains(what)), "{what}: {lines:#?}");
    }
    let all = texts(&page(&long, &history, 1000));
    assert!(!all.iter().any(|line| line.contains("more")), "{all:#?}");
}

#[test]
fn page_without_an_iommu_shows_the_devices() {
    let mut snapshot = sample();
    snapshot.iommu = None;
    for endpoint in &mut snapshot.endpoints {
        endpoint.view = View::Untranslated;
    }
    let mut history = History::default();
    history.push(snapshot);
    let page = texts(&page("/run/vm", &history, 24));
    assert_eq!(page.len(), 6, "{page:#?}");
    assert!(page[3].contains("no IOMMU"), "{page:#?}");
}

#[test]
fn page_before_there_is_a_state_is_empty() {
    assert!(page("/run/vm", &History::default(), 24).is_empty());
}
