//! A device, its driver and its endpoints; the steps that bytes stand for; and what must hold after each.

mod bytes;
mod subscribers;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use viommu::ack::Resolver;
use viommu::{
    Access, Completion, Extent, FaultReason, Gpa, GpaRange, Iommu, Iova, IovaRange, Medium, Place, Reader,
    Target, View,
};
use viommu_virtio::driver::{Driver, FILL, Request, Split, Token};
use viommu_virtio::spec::Features;
use viommu_virtio::spec::config::BYPASS_OFFSET;
use viommu_virtio::{Config, EventLimits, RequestQueue, VirtioIommu};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::reference::{self, Fault, Model, Reached, Verdict};
use bytes::{Choices, ENDPOINTS, HIGH, windows};
use subscribers::Sub;

const QUEUE: u16 = 128;
const PROBE_SIZE: u32 = 128;
/// What lies at guest physical addresses, in units: first, last, what.
const LAYOUT: [(u64, u64, Medium); 5] = [
    (0, 7, Medium::Ram),
    (8, 9, Medium::Ram),
    (10, 11, Medium::Rom),
    (14, 19, Medium::Ram),
    (20, 23, Medium::Mmio),
];

type Memory = Arc<GuestMemoryMmap>;

pub(crate) struct World {
    device: VirtioIommu,
    driver: Driver<Memory>,
    queue: RequestQueue<Memory>,
    memory: Memory,
    model: Model,
    accepted: Features,
    unit: u64,
    readers: BTreeMap<u32, Reader>,
    subs: Vec<Sub>,
    /// The page that picky mirrors refuse; 2^64-1: none.
    poison: Arc<AtomicU64>,
    /// In which way they do. All in one: whose word is heard first is not specified.
    word: u8,
}

/// Any bytes are legal.
///
/// # Panics
/// When the device does not do what the specification says, or a copy is not what the record says.
pub(crate) fn play(data: &[u8]) {
    let mut choices = Choices(data);
    let mut world = World::new(&mut choices);
    world.check();
    for _ in 0..256 {
        if choices.is_over() {
            break;
        }
        world.step(&mut choices);
        world.check();
    }
}

impl World {
    fn new(choices: &mut Choices<'_>) -> Self {
        let (how, more) = (choices.byte(), choices.byte());
        let unit = if how & 1 != 0 { 0x2000 } else { 0x1000 };
        let bypass = how & 2 != 0;
        let mut features = Config::default().features;
        match how >> 2 & 7 {
            0 => features -= Features::BYPASS_CONFIG,
            1 => features = (features - Features::BYPASS_CONFIG) | Features::BYPASS,
            2 => features -= Features::PROBE,
            3 => features -= Features::MMIO,
            _ => {}
        }
        let mut accepted = Features::all();
        match how >> 5 {
            0 => accepted -= Features::BYPASS_CONFIG,
            1 => accepted -= Features::MMIO,
            2 => accepted -= Features::BYPASS,
            _ => {}
        }
        let input = if more & 1 != 0 { (2 * unit, HIGH + 12 * unit - 1) } else { (0, u64::MAX) };
        let domains = if more & 2 != 0 { (1, 3) } else { (0, u32::MAX) };
        let config = Config {
            features,
            page_size_mask: unit.wrapping_neg(),
            input_range: IovaRange::new(Iova(input.0), Iova(input.1)).unwrap(),
            domain_range: domains.0..=domains.1,
            probe_size: PROBE_SIZE,
            bypass,
            events: EventLimits::default(),
        };
        let small = more & 4 != 0;
        let (in_domain, in_all, most_domains) = if small { (4, 6, 2) } else { (1000, 1000, 1000) };
        let mut builder = Iommu::builder().domain_mappings(in_domain).mappings(in_all).domains(most_domains);
        let mut extents = Vec::new();
        for (first, last, medium) in LAYOUT {
            let (start, end) = (first * unit, last * unit + (unit - 1));
            let range = GpaRange::new(Gpa(start), Gpa(end)).unwrap();
            builder = builder.backing(Extent { range, medium });
            let (rom, mmio) = (medium == Medium::Rom, medium == Medium::Mmio);
            extents.push(reference::Extent { start, end, rom, mmio });
        }
        let device = VirtioIommu::new(builder, config).unwrap();
        let offered = features.bits();
        let model = Model {
            granule: unit,
            input,
            domain_range: domains,
            probe_size: PROBE_SIZE,
            offered,
            negotiated: 0,
            bypass,
            initial_bypass: bypass,
            endpoints: BTreeMap::new(),
            domains: BTreeMap::new(),
            mirrors: Vec::new(),
            memory: extents,
            poison: None,
            most_in_domain: in_domain.try_into().unwrap(),
            most_in_all: in_all.try_into().unwrap(),
            most_domains,
        };
        let bytes = Driver::<Memory>::bytes(QUEUE, PROBE_SIZE).try_into().unwrap();
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0x1000), bytes)]).unwrap());
        let driver = Driver::new(memory.clone(), 0x1000, QUEUE, PROBE_SIZE).unwrap();
        let queue = device.request_queue(driver.request_queue().unwrap(), memory.clone(), || {});
        let mut world = Self {
            device,
            driver,
            queue,
            memory,
            model,
            accepted,
            unit,
            readers: BTreeMap::new(),
            subs: Vec::new(),
            poison: Arc::new(AtomicU64::new(u64::MAX)),
            word: more >> 6,
        };
        for id in &ENDPOINTS[..3] {
            world.add_endpoint(choices, *id);
        }
        world.negotiate();
        world
    }

    fn negotiate(&mut self) {
        let done = self.device.negotiate(self.accepted);
        self.complete(done);
        self.model.negotiated = self.accepted.bits() & self.model.offered;
    }

    /// Ends a step: acks that are due come, then it must be over.
    fn complete(&mut self, mut done: Completion) {
        self.resolve();
        assert!(done.is_complete(), "still waiting for {:?}", done.blockers());
    }

    /// Gives the acks that are due. Whether there were any.
    fn resolve(&mut self) -> bool {
        let mut resolvers = Vec::new();
        for sub in &self.subs {
            resolvers.append(&mut sub.handle.lock().resolvers);
        }
        let any = !resolvers.is_empty();
        resolvers.into_iter().for_each(Resolver::done);
        any
    }

    fn step(&mut self, choices: &mut Choices<'_>) {
        match choices.below(32) {
            0..=16 => self.kick(choices),
            17..=20 => self.subscribe(choices),
            21 => self.unsubscribe(choices),
            22..=24 => self.meddle(choices),
            25..=27 => self.fill(choices),
            28 => {
                let value = choices.byte() % 4;
                let done = self.device.write_config(BYPASS_OFFSET as u64, &[value]);
                self.complete(done);
                self.model.write_bypass(value);
            }
            29 => {
                let id = ENDPOINTS[usize::from(choices.byte() % 4)];
                self.add_endpoint(choices, id);
            }
            30 => self.remove_endpoint(ENDPOINTS[usize::from(choices.byte() % 4)]),
            _ => self.reset(choices.byte() & 3 == 0),
        }
    }

    fn remove_endpoint(&mut self, id: u32) {
        self.readers.remove(&id);
        let outcome = self.device.remove_endpoint(id);
        if self.model.endpoints.contains_key(&id) {
            self.complete(outcome.unwrap());
        } else {
            assert!(outcome.is_err());
        }
        self.subs.retain(|sub| sub.endpoint != id);
        self.model.remove_endpoint(id);
    }

    fn reset(&mut self, system: bool) {
        let reset = if system { self.device.system_reset() } else { self.device.reset() };
        assert_eq!((reset.refused, reset.inside), (None, vec![]));
        self.complete(reset.completion);
        let pending = self.queue.reset();
        self.complete(pending);
        self.driver.reset().unwrap();
        let queue = self.driver.request_queue().unwrap();
        self.queue = self.device.request_queue(queue, self.memory.clone(), || {});
        if system {
            self.model.system_reset()
        } else {
            self.model.device_reset()
        }
        self.check();
        self.negotiate();
    }

    /// Some requests at once, perhaps while a device is in the middle of something.
    fn kick(&mut self, choices: &mut Choices<'_>) {
        let how = choices.byte();
        // Where somebody is about to be cut off, one at a time: the model is told behind each.
        let count = if self.model.mirrors.iter().any(|m| m.armed) { 1 } else { how % 16 + 1 };
        let mut due: Vec<(Request, Token, Verdict)> = Vec::new();
        let inside = ENDPOINTS[usize::from(how >> 4) % 4];
        let inside = self.model.view(inside).filter(|_| how >= 0xc0).map(|view| (inside, view));
        let live: Vec<u32> = self.model.domains.keys().copied().collect();
        for _ in 0..count {
            let (request, split) = bytes::request(choices, self.unit, PROBE_SIZE, &live);
            let token = match self.driver.push_split(&request, &split) {
                Ok(token) => token,
                // Too long for a table, or for what is left of the ring.
                Err(_) if due.is_empty() => self.driver.push_split(&request, &Split::default()).unwrap(),
                Err(_) => break,
            };
            let verdict = self.model.request(&request.to_bytes(), request.writable(PROBE_SIZE));
            due.push((request, token, verdict));
        }
        let mut reader = inside.and_then(|(id, _)| self.device.endpoint(id)?.reader("inside"));
        let guard = reader.as_mut().map(Reader::enter);
        self.queue.process().unwrap();
        let moves =
            |r: &Request| !matches!(r, Request::Map { .. } | Request::Unmap { .. } | Request::Probe { .. });
        let lost = |id: u32| due.iter().any(|(.., v)| v.lost == Some(id));
        // Who is cut off sees nothing, so nothing of it is in the way.
        if let Some((endpoint, reference::View::Domain(id))) = inside
            && !self.model.endpoints[&endpoint].fenced
            && lost(id)
            && !due.iter().any(|(r, ..)| moves(r))
        {
            assert_eq!(self.queue.pending(), due.len(), "answered while a device was inside");
            assert_eq!(self.driver.next_answer().unwrap(), None);
        }
        let waits = self.subs.iter().any(|sub| !sub.handle.lock().resolvers.is_empty());
        if waits {
            assert_eq!(self.queue.pending(), due.len(), "answered before the acks");
        } else if inside.is_none() {
            assert_eq!(self.queue.pending(), 0, "nothing to wait for");
        }
        drop(guard);
        self.resolve();
        self.queue.wait(Duration::from_secs(10)).unwrap();
        let answers = self.driver.complete().unwrap();
        assert_eq!(answers.len(), due.len());
        for ((request, token, verdict), answer) in due.iter().zip(answers) {
            assert_eq!(answer.token, *token, "out of order");
            let status = answer.status().filter(|_| answer.used_len != 0).map(|status| status.0);
            assert_eq!((answer.used_len, status), (verdict.used, verdict.status), "{request:?}");
            if let Some(tail) = answer.tail.filter(|_| answer.used_len != 0) {
                assert_eq!(tail.reserved, [0; 3]);
            }
            if let Request::Raw { writable, .. } = request {
                check_untouched(&answer.properties, *writable, verdict);
            } else if let Some(properties) = &verdict.properties {
                assert_eq!(&answer.properties, properties, "{request:?}");
            }
        }
    }

    fn check(&mut self) {
        self.check_subscribers();
        self.check_record();
        self.check_bypass();
        let ids: Vec<u32> = self.model.endpoints.keys().copied().collect();
        for id in ids {
            self.check_endpoint(id);
        }
    }

    fn check_bypass(&self) {
        let mut byte = [7];
        self.device.read_config(BYPASS_OFFSET as u64, &mut byte);
        let offered = self.model.offered & reference::BYPASS_CONFIG != 0;
        assert_eq!(byte, [u8::from(offered && self.model.bypass)]);
    }

    fn check_record(&self) {
        let iommu = self.device.iommu();
        let there: Vec<u32> = iommu.domains().iter().map(|(id, _)| *id).collect();
        let due = self.model.domains.iter().filter(|(_, d)| !d.bypass);
        assert_eq!(there, due.clone().map(|(id, _)| *id).collect::<Vec<_>>());
        for (id, domain) in due {
            let mut record = Vec::new();
            iommu.domain(*id).unwrap().for_each(IovaRange::ALL, |m| {
                let mut flags = u32::from(m.access.bits());
                flags |= if m.target == Target::Mmio { 4 } else { 0 };
                let (start, end) = (m.range.start().0, m.range.last().0);
                record.push(reference::Mapping { start, end, phys: m.gpa.0, flags });
                ControlFlow::Continue(())
            });
            let mut mappings = domain.mappings.clone();
            mappings.sort_unstable();
            assert_eq!(record, mappings, "domain {id}");
        }
        let endpoints: Vec<u32> = iommu.endpoints().iter().map(|(id, _)| id.requester).collect();
        assert_eq!(endpoints, self.model.endpoints.keys().copied().collect::<Vec<_>>());
    }

    fn check_endpoint(&mut self, id: u32) {
        let view = match self.model.view(id).unwrap() {
            reference::View::Nothing => View::Blocked,
            reference::View::Identity => View::Identity,
            reference::View::Domain(domain) => View::Domain(domain),
        };
        assert_eq!(self.device.endpoint(id).unwrap().view(), Some(view), "endpoint {id}");
        let guard = self.readers.get_mut(&id).unwrap().enter();
        for window in windows(self.unit) {
            for at in 0..16 {
                let iova = window + at * self.unit + (at << 4);
                for (access, write) in [(Access::READ, false), (Access::WRITE, true)] {
                    let answer = match guard.probe(Iova(iova), access) {
                        Ok(t) => Ok(match t.place {
                            Place::Ram => Reached::Memory(t.gpa.0),
                            Place::Rom => Reached::Rom(t.gpa.0),
                            Place::Mmio => Reached::Registers(t.gpa.0),
                            Place::Msi => Reached::Interrupt,
                        }),
                        Err(fault) => Err(match fault.reason {
                            FaultReason::Blocked => Fault::Blocked,
                            FaultReason::Unmapped => Fault::Unmapped,
                            FaultReason::Permission => Fault::Permission,
                            FaultReason::Reserved => Fault::Reserved,
                            FaultReason::NoBacking => Fault::NoBacking,
                            FaultReason::Fenced => Fault::Fenced,
                            other => panic!("not foreseen: {other}"),
                        }),
                    };
                    let due = self.model.access(id, iova, write);
                    assert_eq!(answer, due, "{access:?} of {iova:#x} at {id}");
                }
            }
        }
    }
}

/// A writable part of any size is touched where the answer goes, and nowhere else.
fn check_untouched(written: &[u8], writable: u32, verdict: &Verdict) {
    assert_eq!(written.len(), writable as usize);
    let mut due = vec![FILL; written.len()];
    if let Some(status) = verdict.status {
        let used = verdict.used as usize;
        if let Some(properties) = &verdict.properties {
            due[..properties.len()].copy_from_slice(properties);
        }
        due[used - 4..used].copy_from_slice(&[status, 0, 0, 0]);
    }
    assert_eq!(written, due, "{verdict:?}");
}
