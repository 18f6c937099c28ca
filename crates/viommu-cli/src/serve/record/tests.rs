use std::collections::BTreeSet;
use std::io::Cursor;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use viommu::endpoint::RegionKind;
use viommu::{Access, Iova, IovaRange};
use viommu_trace::History;
use viommu_virtio::driver::{Driver, Request};
use viommu_virtio::spec::config::BYPASS_OFFSET;
use viommu_virtio::spec::request::{AttachFlags, MapFlags, Status};
use viommu_virtio::{Config, EndpointPlan, EventQueue, RequestQueue, VirtioIommu};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::args::Model;
use crate::judge::{Judge, Options, Read, Reals, Summary};

type Memory = Arc<GuestMemoryMmap>;

const PAGE: u64 = 0x1000;

/// A guest in front of a device whose history is written.
struct Guest {
    device: VirtioIommu,
    driver: Driver<Memory>,
    requests: RequestQueue<Memory>,
    events: EventQueue<Memory>,
    recording: Arc<Recording<Vec<u8>>>,
    /// Operations that did something.
    operations: u64,
}

/// What a guest does.
#[derive(Clone, Debug)]
enum Deed {
    Attach { domain: u32, endpoint: u32, bypass: bool },
    Detach { domain: u32, endpoint: u32 },
    Map { domain: u32, page: u64, pages: u64, flags: u32 },
    Unmap { domain: u32, start: u64, bytes: u64 },
    Bypass(bool),
    Reset { system: bool },
    Plug(u32),
    Unplug(u32),
    Access { endpoint: u32, page: u64 },
}

fn plan(id: u32) -> EndpointPlan {
    let range = |start, last| IovaRange::new(Iova(start), Iova(last)).unwrap();
    let plan = EndpointPlan::default().region(range(0xfee0_0000, 0xfeef_ffff), RegionKind::Msi);
    if id == 9 { plan.region(range(0xe000, 0xefff), RegionKind::Reserved) } else { plan }
}

impl Guest {
    fn new(bypass: bool) -> Self {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let builder = viommu::Iommu::builder().ram(0, 1 << 30).table_bytes(16 << 20);
        let device = VirtioIommu::new(builder, Config { bypass, ..Config::default() }).unwrap();
        device.add_endpoint(8, plan(8)).unwrap();
        device.add_endpoint(9, plan(9)).unwrap();
        let driver = Driver::new(memory.clone(), 0, 16, 512).unwrap();
        let requests = device.request_queue(driver.request_queue().unwrap(), memory.clone(), || {});
        let events = device.event_queue(driver.event_queue().unwrap(), memory, || {});
        let recording = Recording::new(Vec::new(), |why| panic!("{why}")).unwrap();
        assert!(device.journal(recording.clone()));
        let mut guest = Self { device, driver, requests, events, recording, operations: 0 };
        guest.start();
        guest
    }

    fn start(&mut self) {
        self.device.negotiate(self.device.features()).wait().unwrap();
        self.driver.fill_events().unwrap();
    }

    /// A request; whether it was taken.
    fn ask(&mut self, request: &Request) -> bool {
        self.driver.push(request).unwrap();
        self.requests.process().unwrap();
        self.driver.complete().unwrap()[0].status() == Some(Status::OK)
    }

    fn attached(&self, endpoint: u32) -> Option<u32> {
        self.device.save().unwrap().members.iter().find(|member| member.endpoint == endpoint)?.domain
    }

    fn does(&mut self, deed: &Deed) {
        match *deed {
            Deed::Attach { domain, endpoint, bypass } => {
                let flags = if bypass { AttachFlags::BYPASS } else { AttachFlags::empty() };
                let there = self.attached(endpoint) == Some(domain);
                let done = self.ask(&Request::Attach { domain, endpoint, flags });
                self.operations += u64::from(done && !there);
            }
            Deed::Detach { domain, endpoint } => {
                self.operations += u64::from(self.ask(&Request::Detach { domain, endpoint }));
            }
            Deed::Map { domain, page, pages, flags } => {
                let (virt_start, phys_start) = (page * PAGE, (page + 0x100) * PAGE);
                let virt_end = virt_start + (pages * PAGE - 1);
                let flags = MapFlags::from_bits_retain(flags);
                let map = Request::Map { domain, virt_start, virt_end, phys_start, flags };
                self.operations += u64::from(self.ask(&map));
            }
            Deed::Unmap { domain, start, bytes } => {
                let unmap = Request::Unmap { domain, virt_start: start, virt_end: start + (bytes - 1) };
                self.operations += u64::from(self.ask(&unmap));
            }
            Deed::Bypass(on) => {
                self.device.write_config(BYPASS_OFFSET as u64, &[u8::from(on)]).wait().unwrap();
            }
            Deed::Reset { system } => {
                let reset = if system { self.device.system_reset() } else { self.device.reset() };
                reset.completion.wait().unwrap();
                self.requests.reset().wait().unwrap();
                self.events.reset();
                self.driver.reset().unwrap();
                *self.requests.queue_mut() = self.driver.request_queue().unwrap();
                *self.events.queue_mut() = self.driver.event_queue().unwrap();
                self.start();
                self.operations += 1;
            }
            Deed::Plug(id) => drop(self.device.add_endpoint(id, plan(id))),
            Deed::Unplug(id) => {
                if let Ok(done) = self.device.remove_endpoint(id) {
                    done.wait().unwrap();
                }
            }
            Deed::Access { endpoint, page } => {
                if let Some(mut reader) = self.device.endpoint(endpoint).and_then(|e| e.reader("test")) {
                    let _ = reader.enter().translate(Iova(page * PAGE), Access::WRITE);
                }
                self.events.process().unwrap();
                self.driver.events().unwrap();
                self.driver.fill_events().unwrap();
            }
        }
    }

    /// Domains that endpoints are attached to, with the number of their mappings: none in one of bypass.
    fn domains(&self) -> Vec<(u32, u64)> {
        let members = self.device.save().unwrap().members;
        let used: BTreeSet<u32> = members.iter().filter_map(|member| member.domain).collect();
        let len = |id| self.device.iommu().domain(id).map_or(0, |domain| domain.len() as u64);
        used.into_iter().map(|id| (id, len(id))).collect()
    }

    /// Endpoints that are in a domain.
    fn placed(&self) -> Vec<(u32, u32)> {
        let all = self.device.iommu().endpoints();
        let domain = |view| if let viommu::View::Domain(domain) = view { Some(domain) } else { None };
        all.iter().filter_map(|(id, view)| Some((id.requester, domain(*view)?))).collect()
    }
}

pub(super) fn replay(history: &[u8], model: Model) -> Summary {
    let mut history = History::from_reader(Cursor::new(history.to_vec()), "recorded").unwrap();
    let mut judge =
        Judge::new(Options { model, ..Options::default() }, Reals::none(), history.format(), None).unwrap();
    while let Some(entry) = history.next().unwrap() {
        judge.take(&entry);
    }
    judge.end();
    let (source, lines) = (history.source().to_owned(), history.lines());
    judge.summary(Read { source, lines, passed_over: 0, attribution: None, error: None, seconds: 0.0 })
}

/// A guest's deeds, recorded, and the same of the replay in both models.
fn compare(bypass: bool, deeds: &[Deed]) -> Result<(), TestCaseError> {
    let mut guest = Guest::new(bypass);
    deeds.iter().for_each(|deed| guest.does(deed));
    let history = guest.recording.finish().unwrap();
    for model in [Model::Direct, Model::VirtioIommu] {
        let summary = replay(&history, model);
        let h = &summary.history;
        let said: Vec<_> =
            summary.first_differences.iter().map(|d| format!("{}: {}", d.line, d.what)).collect();
        prop_assert_eq!(summary.differences, 0, "{:?}", said);
        prop_assert_eq!(h.operations, guest.operations);
        let odd =
            (h.refused_by_both, h.refused_here, h.deviations, h.from_before.len(), h.found_endpoints.len());
        prop_assert_eq!(odd, (0, 0, 0, 0, 0), "{:?}", h.deviation_kinds);
        let domains: Vec<_> = summary.record.domains.iter().map(|d| (d.id, d.mappings)).collect();
        prop_assert_eq!(domains, guest.domains());
        let endpoints = summary.record.endpoints.iter();
        let placed: Vec<_> = endpoints.filter_map(|e| Some((e.id, e.domain?))).collect();
        prop_assert_eq!(placed, guest.placed());
    }
    Ok(())
}

#[test]
fn a_recorded_guest_is_replayed_in_both_models_with_the_same_operations() {
    let mut deeds = vec![
        Deed::Attach { domain: 1, endpoint: 8, bypass: false },
        Deed::Attach { domain: 1, endpoint: 9, bypass: false },
    ];
    let map = |page, pages, flags| Deed::Map { domain: 1, page, pages, flags };
    deeds.extend((0..6).map(|n| map(2 * n, 1, 3)));
    deeds.extend([
        map(0x20, 16, 1),
        map(0x40, 1, 0),
        map(0x50, 1, 7),
        map(0, 1, 3),
        map(0xe, 1, 3),
        Deed::Unmap { domain: 1, start: 0, bytes: PAGE },
        Deed::Unmap { domain: 1, start: 0x1234, bytes: 3 * PAGE },
        Deed::Unmap { domain: 1, start: 0x20 * PAGE, bytes: PAGE },
        Deed::Access { endpoint: 8, page: 0x999 },
        Deed::Attach { domain: 1, endpoint: 8, bypass: false },
        Deed::Attach { domain: 2, endpoint: 8, bypass: false },
        Deed::Map { domain: 2, page: 0, pages: 1, flags: 3 },
        Deed::Attach { domain: 3, endpoint: 8, bypass: true },
        Deed::Detach { domain: 3, endpoint: 8 },
        Deed::Bypass(true),
        Deed::Bypass(false),
        Deed::Unplug(9),
        Deed::Plug(9),
        Deed::Attach { domain: 1, endpoint: 9, bypass: false },
        Deed::Reset { system: false },
        Deed::Attach { domain: 1, endpoint: 8, bypass: false },
        Deed::Reset { system: true },
        Deed::Attach { domain: 5, endpoint: 8, bypass: false },
        Deed::Map { domain: 5, page: 7, pages: 2, flags: 3 },
    ]);
    compare(false, &deeds).unwrap();
    compare(true, &deeds).unwrap();
}

fn deed() -> impl Strategy<Value = Deed> {
    let (domain, endpoint, page) = (|| 1_u32..4, || 8_u32..11, || 0_u64..24);
    prop_oneof![
        4 => (domain(), endpoint(), proptest::bool::weighted(0.2))
            .prop_map(|(domain, endpoint, bypass)| Deed::Attach { domain, endpoint, bypass }),
        2 => (domain(), endpoint()).prop_map(|(domain, endpoint)| Deed::Detach { domain, endpoint }),
        12 => (domain(), page(), 1_u64..5, 0_u32..8)
            .prop_map(|(domain, page, pages, flags)| Deed::Map { domain, page, pages, flags }),
        6 => (domain(), page(), 1_u64..8)
            .prop_map(|(domain, page, pages)| Deed::Unmap { domain, start: page * PAGE, bytes: pages * PAGE }),
        1 => (domain(), 0_u64..24 * PAGE, 1_u64..8 * PAGE)
            .prop_map(|(domain, start, bytes)| Deed::Unmap { domain, start, bytes }),
        1 => any::<bool>().prop_map(Deed::Bypass),
        1 => any::<bool>().prop_map(|system| Deed::Reset { system }),
        1 => endpoint().prop_map(Deed::Plug),
        1 => endpoint().prop_map(Deed::Unplug),
        2 => (endpoint(), page()).prop_map(|(endpoint, page)| Deed::Access { endpoint, page }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_recorded_guest_is_replayed_in_both_models(
        bypass in any::<bool>(),
        deeds in proptest::collection::vec(deed(), 0..60),
    ) {
        compare(bypass, &deeds)?;
    }
}

/// A disk that is full after so many bytes.
struct Full {
    room: usize,
}

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.room);
        self.room -= count;
        if count == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(count) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_disk_is_told_once_and_the_rest_goes_on() {
    let told = Arc::new(AtomicUsize::new(0));
    let count = told.clone();
    let trouble = move |why: &io::Error| {
        assert_eq!(why.kind(), io::ErrorKind::StorageFull);
        count.fetch_add(1, Ordering::Relaxed);
    };
    let recording = Recording::new(Full { room: 20_000 }, trouble).unwrap();
    for _ in 0..100_000 {
        recording.note(&Entry::Bypass { on: true });
    }
    assert_eq!(told.load(Ordering::Relaxed), 1);
    assert!(recording.finish().is_none());
    assert_eq!(told.load(Ordering::Relaxed), 1);
    // One that is full only at its end says so then.
    let told_at_end = told.clone();
    let trouble = move |_: &io::Error| {
        told_at_end.fetch_add(1, Ordering::Relaxed);
    };
    let recording = Recording::new(Full { room: 20 }, trouble).unwrap();
    recording.note(&Entry::Bypass { on: true });
    assert!(recording.finish().is_none());
    assert_eq!(told.load(Ordering::Relaxed), 2);
}

#[test]
fn create_where_no_file_can_be_is_an_error() {
    assert!(Recording::create(Path::new("/nowhere/history")).is_err());
}
