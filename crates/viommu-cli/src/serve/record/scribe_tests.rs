use std::io::Cursor;
use std::time::Duration;

use viommu::{Access, EndpointId, Gpa, Iova, IovaRange, Target};
use viommu_trace::{History, Scribe};
use viommu_vtd::spec::register as r;
use viommu_vtd::{Config, Vtd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::args::Model;
use crate::serve::record::tests::replay;

const ROOT: u64 = 0x1000;
const CONTEXTS: u64 = 0x2000;
const TABLES: u64 = 0x3000;

/// A driver that does all by registers.
struct Guest {
    memory: Arc<GuestMemoryMmap>,
    vtd: Vtd,
}

impl Guest {
    fn new() -> Self {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let builder = viommu::Iommu::builder().ram(0, 1 << 20);
        let vtd = Vtd::new(builder, memory.clone(), Config::default()).unwrap();
        let guest = Self { memory, vtd };
        guest.put(ROOT, CONTEXTS | 1);
        // Three tables on the way, and one for the first two megabytes.
        for table in 0..3 {
            guest.put(TABLES + table * 0x1000, (TABLES + (table + 1) * 0x1000) | 3);
        }
        guest
    }

    fn put(&self, at: u64, word: u64) {
        self.memory.write_obj(word, GuestAddress(at)).unwrap();
    }

    fn register(&self, at: u64, value: u64) {
        self.vtd.write(at, &value.to_le_bytes());
        self.vtd.wait(Duration::from_secs(5)).unwrap();
    }

    fn command(&self, value: u32) {
        self.vtd.write(r::GLOBAL_COMMAND, &value.to_le_bytes());
        self.vtd.wait(Duration::from_secs(5)).unwrap();
    }

    fn start(&self) {
        self.register(r::ROOT_TABLE, ROOT);
        self.command(1 << 30);
        self.command(1 << 31);
    }

    /// Gives an endpoint the tables, or nothing.
    fn context(&self, requester: u64, present: bool) {
        self.put(CONTEXTS + requester * 16 + 8, 7 << 8 | 2);
        self.put(CONTEXTS + requester * 16, if present { TABLES | 1 } else { 0 });
        self.register(r::CONTEXT_COMMAND, 1 << 63 | 1 << 61);
    }

    fn page(&self, page: u64, entry: u64) {
        self.put(TABLES + 0x3000 + page * 8, entry);
        self.register(r::IOTLB_COMMAND, 1 << 63 | 1 << 60);
    }
}

#[test]
fn what_a_driver_writes_into_its_tables_is_in_the_history_once_and_is_replayed() {
    let guest = Guest::new();
    let recording = Recording::new(Vec::new(), |why| panic!("{why}")).unwrap();
    let writing = recording.clone();
    let scribe = Scribe::new(move |event| writing.write(event));
    let follow = |requester: u16| {
        let endpoint = guest.vtd.add_endpoint(requester).unwrap();
        scribe.follow(&endpoint).unwrap()
    };
    let (_first, second) = (follow(0x10), follow(0x18));
    guest.start();
    guest.page(1, 0x8003);
    guest.context(0x10, true);
    guest.context(0x18, true);
    guest.page(2, 0x9001);
    guest.page(1, 0xa003);
    guest.context(0x10, false);
    // The other one speaks now.
    guest.page(2, 0);
    // One that comes when all is there.
    guest.context(0x20, true);
    let third = follow(0x20);
    guest.vtd.wait(Duration::from_secs(5)).unwrap();
    drop(second);
    guest.vtd.remove_endpoint(0x18).unwrap().wait().unwrap();
    scribe.forget(EndpointId::new(0x18));
    let _ = guest.vtd.reset();
    drop(third);

    let bytes = recording.finish().unwrap();
    let mut history = History::from_reader(Cursor::new(bytes.clone()), "recorded").unwrap();
    let events: Vec<Event> =
        core::iter::from_fn(|| history.next().unwrap()).map(|entry| entry.event).collect();
    let range = IovaRange::new(Iova(0xfee0_0000), Iova(0xfeef_ffff)).unwrap();
    let added = |endpoint| {
        [Event::EndpointAdded { endpoint }, Event::ReservedRegion { endpoint, kind: Reserved::Msi, range }]
    };
    let pass = |endpoint| Event::Attach { domain: Scribe::PASS, endpoint, bypass: true };
    let attach = |endpoint| Event::Attach { domain: 7, endpoint, bypass: false };
    let page = |at: u64| IovaRange::new(Iova(at), Iova(at + 0xfff)).unwrap();
    let map = |at, gpa, access| Event::Map {
        domain: 7,
        range: page(at),
        gpa: Gpa(gpa),
        access,
        target: Target::Ram,
    };
    let unmap = |at| Event::Unmap { domain: 7, range: page(at) };
    let mut expected = vec![Event::Config { page_sizes: !0xfff, input: IovaRange::ALL, bypass: false }];
    expected.extend([&added(0x10)[..], &[pass(0x10)], &added(0x18), &[pass(0x18)]].concat());
    expected.extend([
        Event::Detach { domain: Scribe::PASS, endpoint: 0x10 },
        Event::Detach { domain: Scribe::PASS, endpoint: 0x18 },
        attach(0x10),
        map(0x1000, 0x8000, Access::RW),
        attach(0x18),
        map(0x2000, 0x9000, Access::READ),
        unmap(0x1000),
        map(0x1000, 0xa000, Access::RW),
        Event::Detach { domain: 7, endpoint: 0x10 },
        unmap(0x2000),
    ]);
    expected.extend([&added(0x20)[..], &[attach(0x20)]].concat());
    expected.extend([Event::EndpointRemoved { endpoint: 0x18 }, pass(0x10), pass(0x20)]);
    assert_eq!(events, expected);

    for model in [Model::Direct, Model::VirtioIommu] {
        let summary = replay(&bytes, model);
        assert_eq!(
            (summary.differences, summary.history.refused_here),
            (0, 0),
            "{:?}",
            summary.first_differences
        );
    }
}
