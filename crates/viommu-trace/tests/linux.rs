//! Linux trace text of real guests: what is attributed is right, the rest is counted.

#[expect(dead_code, reason = "not every test uses all of it")]
mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{corpus, drain, kinds};
use viommu_trace::{Entry, Event, History};

fn open(name: &str) -> (History, Vec<Entry>) {
    let mut history = History::open(corpus(name)).unwrap();
    let (entries, error) = drain(&mut history);
    assert!(error.is_none(), "{name}: {error:?}");
    (history, entries)
}

type Endpoints = BTreeMap<u32, BTreeSet<u32>>;
type Pages = BTreeMap<(u32, u64), u64>;

/// What is mapped at the end: endpoints by domain, and pages of (domain, iova) with their target.
fn replay(entries: &[Entry]) -> (Endpoints, Pages) {
    let (mut endpoints, mut pages) = (Endpoints::new(), Pages::new());
    for entry in entries {
        match entry.event {
            Event::Attach { domain, endpoint, .. } => {
                endpoints.values_mut().for_each(|set| {
                    set.remove(&endpoint);
                });
                endpoints.entry(domain).or_default().insert(endpoint);
            }
            Event::Map { domain, range, gpa, .. } => {
                for (n, page) in (range.start().0..=range.last().0).step_by(4096).enumerate() {
                    let old = pages.insert((domain, page), gpa.0 + 4096 * n as u64);
                    assert_eq!(old, None, "line {}: mapped twice", entry.line);
                }
            }
            Event::Unmap { domain, range } => {
                for page in (range.start().0..=range.last().0).step_by(4096) {
                    assert!(pages.remove(&(domain, page)).is_some(), "line {}: not mapped", entry.line);
                }
            }
            _ => {}
        }
    }
    (endpoints, pages)
}

#[cfg(feature = "compression")]
#[test]
fn what_dma_events_attribute_is_what_the_guests_tables_hold() {
    let (history, entries) = open("linux-dma.trace.xz");
    let counts = history.attribution().unwrap();
    assert_eq!((counts.maps, counts.unmaps), (2073, 398));
    assert!(counts.maps_attributed >= 786 && counts.unmaps_attributed >= 382, "{counts:?}");
    assert_eq!(counts.unmaps_inferred, 0);
    let (endpoints, pages) = replay(&entries);

    let mut walk = BTreeMap::new();
    let mut text = String::new();
    let file = std::fs::File::open(corpus("linux-dma.walk.xz")).unwrap();
    let mut reader = lzma_rust2::XzReader::new(std::io::BufReader::new(file), true);
    std::io::Read::read_to_string(&mut reader, &mut text).unwrap();
    for line in text.lines() {
        let mut words = line.split(' ');
        let bdf: Vec<u32> =
            words.next().unwrap().split([':', '.']).map(|n| u32::from_str_radix(n, 16).unwrap()).collect();
        let mut numbers = words.take(3).map(|n| u64::from_str_radix(&n[2..], 16).unwrap());
        let (iova, gpa, size) = (numbers.next().unwrap(), numbers.next().unwrap(), numbers.next().unwrap());
        for at in (0..size).step_by(4096) {
            walk.insert((bdf[0] << 8 | bdf[1] << 3 | bdf[2], iova + at), gpa + at);
        }
    }
    assert!(pages.len() > 4000);
    for ((domain, iova), gpa) in pages {
        for endpoint in &endpoints[&domain] {
            assert_eq!(walk.get(&(*endpoint, iova)), Some(&gpa), "{endpoint:#x} {iova:#x}");
        }
    }
}

#[cfg(feature = "compression")]
#[test]
fn domain_ids_of_flushes_attribute_every_map() {
    let (history, entries) = open("linux-cache-tags.trace.xz");
    let counts = history.attribution().unwrap();
    assert_eq!((counts.maps, counts.unmaps), (35, 23));
    assert_eq!((counts.maps, counts.unmaps), (counts.maps_attributed, counts.unmaps_attributed));
    let (endpoints, _) = replay(&entries);
    assert_eq!(endpoints[&1], BTreeSet::from([8]));
    assert_eq!(endpoints[&6], BTreeSet::from([0xf8, 0xfa, 0xfb]));
}

#[test]
fn maps_that_nothing_names_are_counted_and_left_out() {
    let (history, entries) = open("linux-bare.trace");
    let counts = history.attribution().unwrap();
    assert!(counts.maps > 10);
    assert_eq!((counts.maps_attributed, counts.unmaps_attributed), (0, 0));
    let found = kinds(&entries);
    assert_eq!(found.get("Attach"), Some(&9));
    assert_eq!(found.get("Map"), None);
    assert_eq!(found.get("Unmap"), None);
}

fn read(text: &str) -> (Vec<Entry>, viommu_trace::Attribution) {
    let mut history =
        History::from_reader(std::io::Cursor::new(text.to_owned().into_bytes()), "test").unwrap();
    let (entries, error) = drain(&mut history);
    assert!(error.is_none(), "{error:?}");
    (entries, history.attribution().unwrap())
}

const MAP: &str = "IOMMU: iova=0x1000 - 0x2000 paddr=0x9000 size=4096";
const UNMAP: &str = "IOMMU: iova=0x1000 - 0x2000 size=4096 unmapped_size=4096";

#[test]
fn two_tasks_at_the_same_address_are_told_apart() {
    let (entries, counts) = read(&format!(
        "a-1 [000] ..... 1.0: map: {MAP}\n\
         b-2 [001] ..... 1.1: map: {MAP}\n\
         b-2 [001] ..... 1.2: dma_map_phys: 0000:00:02.0 dir=TO_DEVICE dma_addr=1010 size=16 phys_addr=9010 attrs=\n\
         a-1 [000] ..... 1.3: dma_map_phys: 0000:00:01.0 dir=FROM_DEVICE dma_addr=1020 size=16 phys_addr=9020 attrs=MMIO\n\
         b-2 [001] ..... 1.4: unmap: {UNMAP}\n\
         b-2 [001] ..... 1.5: dma_unmap_phys: 0000:00:02.0 dir=TO_DEVICE dma_addr=1010 size=16 attrs=\n\
         a-1 [001] ..... 1.6: unmap: {UNMAP}\n"
    ));
    assert_eq!((counts.maps_attributed, counts.unmaps_attributed), (2, 2));
    let told: Vec<String> = entries
        .iter()
        .map(|e| match e.event {
            Event::Attach { endpoint, .. } => format!("{} attach {endpoint}", e.line),
            Event::Map { access, target, .. } => format!("{} map {access:?} {target:?}", e.line),
            Event::Unmap { .. } => format!("{} unmap", e.line),
            other => format!("{other:?}"),
        })
        .collect();
    let expected = [
        "1 attach 8",
        "1 map Access(WRITE) Mmio",
        "2 attach 16",
        "2 map Access(READ) Ram",
        "5 unmap",
        "7 unmap",
    ];
    assert_eq!(told, expected);
    let domains = |at: usize| match entries[at].event {
        Event::Map { domain, .. } | Event::Unmap { domain, .. } => domain,
        _ => panic!("{at}"),
    };
    assert_ne!(domains(1), domains(3));
    assert_eq!((domains(4), domains(5)), (domains(3), domains(1)));
}

#[test]
fn an_ambiguous_unmap_is_left_out_and_inferred_at_the_next_map() {
    let dma = |bdf: &str| {
        format!("dma_map_page: {bdf} dir=BIDIRECTIONAL dma_addr=1000 size=4096 phys_addr=9000 attrs=")
    };
    let one = dma("0000:00:01.0");
    let two = dma("0000:00:02.0");
    let (entries, counts) = read(&format!(
        "a-1 [000] ..... 1.0: map: {MAP}\na-1 [000] ..... 1.1: {one}\n\
         a-1 [000] ..... 1.2: map: {MAP}\na-1 [000] ..... 1.3: {two}\n\
         a-1 [000] ..... 1.4: unmap: {UNMAP}\n\
         a-1 [000] ..... 1.5: map: {MAP}\na-1 [000] ..... 1.6: {two}\n"
    ));
    assert_eq!((counts.maps_attributed, counts.unmaps, counts.unmaps_attributed), (3, 1, 0));
    assert_eq!(counts.unmaps_inferred, 1);
    assert_eq!(kinds(&entries).get("Unmap"), Some(&1));
    replay(&entries);
}

#[test]
fn a_device_that_is_attached_anew_gets_an_empty_domain() {
    let map = "dma_map_page: 0000:01:02.3 dir=BIDIRECTIONAL dma_addr=1000 size=4096 phys_addr=9000 attrs=";
    let attach = "attach_device_to_domain: IOMMU: device=0000:01:02.3";
    let (entries, counts) = read(&format!(
        "a-1 [000] ..... 1.0: add_device_to_group: IOMMU: groupID=5 device=0000:01:02.3\n\
         a-1 [000] ..... 1.0: {attach}\n\
         a-1 [000] ..... 1.0: map: {MAP}\na-1 [000] ..... 1.1: {map}\n\
         a-1 [000] ..... 1.2: {attach}\n\
         a-1 [000] ..... 1.3: map: {MAP}\na-1 [000] ..... 1.4: {map}\n"
    ));
    assert_eq!((counts.maps_attributed, counts.unmaps_inferred), (2, 0));
    let attached: Vec<_> = entries
        .iter()
        .filter_map(|e| match e.event {
            Event::Attach { domain, endpoint, .. } => Some((domain, endpoint)),
            _ => None,
        })
        .collect();
    assert_eq!(attached, [(5, 0x113), (0x1_0005, 0x113)]);
}
