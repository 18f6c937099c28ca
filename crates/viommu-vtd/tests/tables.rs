//! Tables that a real driver built: this unit's walk of them is the recorded one.
#![expect(clippy::cast_possible_truncation, reason = "numbers of the tests' own")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use viommu::fuzzing::recording::{Event, RecordingMirror};
use viommu::subscribe::{Interest, Reach};
use viommu::{Access, Gpa, Iommu, Iova, Mapping};
use viommu_vtd::spec::register as r;
use viommu_vtd::{Config, Vtd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const ROOT: u64 = 0x6cc_d000;
const RAM: u64 = 512 << 20;

fn unpack(file: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    lzma_rust2::XzReader::new(file, false).read_to_end(&mut bytes).unwrap();
    bytes
}

fn memory() -> Arc<GuestMemoryMmap<()>> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    let records = unpack(include_bytes!("data/tables.bin.xz"));
    assert!(records.len().is_multiple_of(4104));
    for record in records.chunks_exact(4104) {
        let (at, page) = record.split_at(8);
        let at = u64::from_le_bytes(at.try_into().unwrap());
        memory.write_slice(page, GuestAddress(at)).unwrap();
    }
    Arc::new(memory)
}

/// By requester, ascending.
fn recorded() -> BTreeMap<u16, Vec<Mapping>> {
    let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    let mut leaves: BTreeMap<u16, Vec<Mapping>> = BTreeMap::new();
    let text = String::from_utf8(unpack(include_bytes!("data/walk.txt.xz"))).unwrap();
    for line in text.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [requester, iova, gpa, bytes, access] = fields[..] else { panic!("{line}") };
        let parts: Vec<u64> = requester.split([':', '.']).map(hex).collect();
        let requester = (parts[0] << 8 | parts[1] << 3 | parts[2]) as u16;
        let mut allowed = Access::empty();
        allowed.set(Access::READ, access.contains('r'));
        allowed.set(Access::WRITE, access.contains('w'));
        let leaf = Mapping::new(Iova(hex(iova)), hex(bytes), Gpa(hex(gpa)), allowed).unwrap();
        leaves.entry(requester).or_default().push(leaf);
    }
    leaves.values_mut().for_each(|leaves| leaves.sort());
    leaves
}

fn start(vtd: &Vtd) {
    for (at, value) in
        [(r::ROOT_TABLE, ROOT as u32), (r::GLOBAL_COMMAND, 1 << 30), (r::GLOBAL_COMMAND, 1 << 31)]
    {
        vtd.write(at, &value.to_le_bytes());
        vtd.wait(Duration::from_secs(10)).unwrap();
    }
}

#[test]
fn sync_from_empty_delivers_exactly_the_recorded_leaves() {
    let recorded = recorded();
    let vtd = Vtd::new(Iommu::builder().ram(0, RAM), memory(), Config::default()).unwrap();
    let mirrors: Vec<_> = recorded
        .keys()
        .map(|requester| {
            let endpoint = vtd.add_endpoint(*requester).unwrap();
            let (mirror, handle) = RecordingMirror::new(Reach::default());
            let subscription = endpoint.subscribe_mirror(mirror, Interest::MIRROR).unwrap();
            // What it held while translation was off.
            handle.take();
            (*requester, subscription, handle)
        })
        .collect();
    start(&vtd);
    let mut pages = BTreeSet::new();
    for (requester, subscription, handle) in &mirrors {
        let leaves = &recorded[requester];
        assert_eq!(handle.held(), *leaves, "{requester:#x}");
        // Each of them once, in order, and nothing else but that what lay there before went.
        let came: Vec<_> = handle.take().into_iter().filter(|event| matches!(event, Event::Map(_))).collect();
        assert_eq!(came, leaves.iter().map(|leaf| Event::Map(*leaf)).collect::<Vec<_>>());
        assert!(subscription.audit().unwrap().is_clean());
        // The functions of the ISA bridge's device share theirs.
        let space = if requester >> 3 == 0x1f { 0x1f << 3 } else { *requester };
        let small = leaves.iter().flat_map(|leaf| {
            let last = leaf.range.last().0;
            (leaf.range.start().0..=last).step_by(4096).map(move |at| (space, at))
        });
        pages.extend(small);
    }
    assert_eq!(pages.len(), 5544);
}

#[test]
fn devices_reach_exactly_what_was_recorded() {
    for caching_mode in [true, false] {
        let config = Config { caching_mode, ..Config::default() };
        let vtd = Vtd::new(Iommu::builder().ram(0, RAM), memory(), config).unwrap();
        let recorded = recorded();
        let endpoints: Vec<_> =
            recorded.keys().map(|requester| vtd.add_endpoint(*requester).unwrap()).collect();
        start(&vtd);
        for ((requester, leaves), endpoint) in recorded.iter().zip(&endpoints) {
            let mut reader = endpoint.reader("test").unwrap();
            let guard = reader.enter();
            for leaf in leaves {
                for at in [leaf.range.start(), leaf.range.last()] {
                    for wanted in [Access::READ, Access::WRITE] {
                        let reached = guard.probe(at, wanted).map(|found| found.gpa);
                        match leaf.access.contains(wanted) {
                            true => assert_eq!(reached, Ok(leaf.translate(at)), "{requester:#x} {at}"),
                            false => assert!(reached.is_err(), "{requester:#x} {at}"),
                        }
                    }
                }
                // The page behind it, where that is none.
                let behind = leaf.range.next().unwrap();
                if !leaves.iter().any(|other| other.range.contains(behind)) {
                    assert!(guard.probe(behind, Access::empty()).is_err(), "{requester:#x} {behind}");
                }
            }
        }
        // One that the tables do not know.
        let other = vtd.add_endpoint(0x1f8).unwrap();
        assert!(other.reader("test").unwrap().enter().probe(Iova(0xffff_f000), Access::READ).is_err());
    }
}
