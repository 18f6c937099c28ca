//! Operations as requests: a small driver writes them into a ring in guest memory, the device handles them.

use serde::Serialize;
use viommu::endpoint::{Region, RegionKind};
use viommu::{
    Access, Completion, Endpoint, Fault, FaultReason, Gpa, Iommu, Iova, IovaRange, Mapping, Reader, Target,
    Translation,
};
use viommu_memory::EndpointMemory;
use viommu_virtio::driver::{self, Driver, Request};
use viommu_virtio::spec::config::BYPASS_OFFSET;
use viommu_virtio::spec::event::{self, FaultFlags};
use viommu_virtio::spec::property::{RESV_MSI, RESV_RESERVED};
use viommu_virtio::spec::request::{ATTACH, AttachFlags, DETACH, MAP, MapFlags, PROBE, UNMAP};
use viommu_virtio::{Config, EndpointPlan, EventLimits, EventQueue, RequestQueue, VirtioIommu};

use super::memory::{self, Eyes, RINGS, Ram, Sparse};
use super::reply::{Answer, REQUESTS, Reply, STATUSES};
use super::tce::TablesLine;
use super::vtd::UnitLine;
use super::{PATIENCE, settle};

type Error = Box<dyn std::error::Error>;

/// Entries of the queues. One request is there at a time.
const ENTRIES: u16 = 16;
/// Bytes of an endpoint's properties: of up to 170 regions.
const PROBE_SIZE: u32 = 4096;
/// A device, its driver, and the memory between them.
pub(crate) struct Virtio {
    device: VirtioIommu,
    driver: Driver<Ram>,
    requests: RequestQueue<Ram>,
    events: EventQueue<Ram>,
    memory: Sparse,
    /// Endpoints of our own that stand in for unknown ones, and do not now.
    idle: Vec<u32>,
    stand_ins: u32,
    /// Answers by request and status.
    answers: [[u64; STATUSES.len()]; REQUESTS.len()],
    bypass_writes: u64,
    resets: u64,
    faults: u64,
    /// Operations that were not made requests.
    pub(super) withheld: u64,
    pub(super) complaints: Vec<String>,
}

/// What the JSON says of the model.
#[derive(Debug, Serialize)]
pub(crate) struct ModelLine {
    pub(crate) name: &'static str,
    #[serde(flatten)]
    pub(crate) device: Option<DeviceLine>,
    #[serde(flatten)]
    pub(crate) tables: Option<TablesLine>,
    #[serde(flatten)]
    pub(crate) unit: Option<UnitLine>,
}

/// What went between driver and device.
#[derive(Debug, Serialize)]
pub(crate) struct DeviceLine {
    /// Requests with an answer.
    pub(crate) requests: u64,
    pub(crate) statuses: Vec<StatusLine>,
    /// Operations of the history that were not made requests: the recorded VMM refused them for a mapping that our
    /// record lacks.
    pub(crate) withheld: u64,
    pub(crate) bypass_writes: u64,
    pub(crate) resets: u64,
    /// Endpoints that the history does not have, for domains from before it.
    pub(crate) stand_ins: u32,
    /// Fault reports on the event queue, each compared with its access.
    pub(crate) events: u64,
    pub(crate) accesses: AccessLine,
    /// Bytes of guest memory from 0 on; only what is touched takes memory.
    pub(crate) memory_bytes: u64,
}

/// Requests of one kind with one status.
#[derive(Debug, Serialize)]
pub(crate) struct StatusLine {
    pub(crate) request: &'static str,
    pub(crate) status: &'static str,
    pub(crate) count: u64,
}

/// Accesses that did not fault, by how far they went.
#[derive(Debug, Serialize)]
pub(crate) struct AccessLine {
    /// Bytes were read or written through the endpoint's view.
    pub(crate) moved: u64,
    /// The host address was compared.
    pub(crate) compared: u64,
    /// There is no such memory, or no right was named: translated.
    pub(crate) translated: u64,
}

impl ModelLine {
    pub(crate) fn direct() -> Self {
        Self { name: "direct", device: None, tables: None, unit: None }
    }
}

impl Virtio {
    /// # Errors
    /// There is no memory for tables or rings.
    pub(crate) fn new() -> Result<Self, Error> {
        let events = EventLimits { pending: 256, per_endpoint: 256, per_second: u32::MAX };
        let config = Config { probe_size: PROBE_SIZE, events, ..Config::default() };
        let device = VirtioIommu::new(super::builder(), config)?;
        let rings = Driver::<Ram>::bytes(ENTRIES, PROBE_SIZE).next_multiple_of(4096);
        let memory = Sparse::new(rings)?;
        let driver = Driver::new(memory.ram().clone(), RINGS, ENTRIES, PROBE_SIZE)?;
        let requests = device.request_queue(driver.request_queue()?, memory.ram().clone(), || {});
        let events = device.event_queue(driver.event_queue()?, memory.ram().clone(), || {});
        let mut virtio = Self {
            device,
            driver,
            requests,
            events,
            memory,
            idle: Vec::new(),
            stand_ins: 0,
            answers: Default::default(),
            bypass_writes: 0,
            resets: 0,
            faults: 0,
            withheld: 0,
            complaints: Vec::new(),
        };
        virtio.start();
        Ok(virtio)
    }

    pub(super) fn iommu(&self) -> &Iommu {
        self.device.iommu()
    }

    /// What a driver does before its first request.
    fn start(&mut self) {
        let done = self.device.negotiate(self.device.features());
        settle(done, &mut self.complaints);
        if let Err(why) = self.driver.fill_events() {
            self.complaints.push(format!("event buffers: {why}"));
        }
    }

    pub(super) fn line(&self) -> ModelLine {
        let statuses = self.answers.iter().zip(REQUESTS).flat_map(|(row, request)| {
            row.iter()
                .zip(STATUSES)
                .filter(|(count, _)| **count != 0)
                .map(move |(count, status)| StatusLine { request, status, count: *count })
        });
        let Sparse { moved, compared, translated, bytes, .. } = self.memory;
        ModelLine {
            name: "virtio-iommu",
            tables: None,
            unit: None,
            device: Some(DeviceLine {
                requests: self.answers.iter().flatten().sum(),
                statuses: statuses.collect(),
                withheld: self.withheld,
                bypass_writes: self.bypass_writes,
                resets: self.resets,
                stand_ins: self.stand_ins,
                events: self.faults,
                accesses: AccessLine { moved, compared, translated },
                memory_bytes: bytes,
            }),
        }
    }

    /// What the device says it has answered and reported, against what came.
    pub(super) fn compare_counts(&mut self) {
        let metrics = self.device.metrics();
        if metrics.requests != self.answers || metrics.malformed != 0 {
            let what =
                format!("the device has answered {:?}, the driver has {:?}", metrics.requests, self.answers);
            self.complaints.push(what);
        }
        let lost = metrics.events_dropped_full + metrics.events_dropped_rate + metrics.events_pending as u64;
        if metrics.events_sent != self.faults || lost != 0 {
            self.complaints.push(format!(
                "the device has reported {} faults and lost {lost}, the driver has heard of {}",
                metrics.events_sent, self.faults
            ));
        }
    }

    pub(super) fn add_endpoint(&mut self, id: u32, regions: Vec<Region>) -> Option<Endpoint> {
        let plan = regions.iter().fold(EndpointPlan::default(), |plan, r| plan.region(r.range, r.kind));
        match self.device.add_endpoint(id, plan) {
            Ok(added) => Some(added.endpoint),
            Err(why) => {
                self.complaints.push(format!("the device does not take endpoint {id}: {why}"));
                None
            }
        }
    }

    pub(super) fn remove_endpoint(&mut self, id: u32) -> Result<Completion, String> {
        self.device.remove_endpoint(id).map_err(|error| error.to_string())
    }

    pub(super) fn eyes(&self, reader: Reader) -> Eyes {
        Eyes::Memory(EndpointMemory::new(reader, self.memory.ram().clone()))
    }

    pub(super) fn look(
        &mut self,
        endpoint: u32,
        eyes: &mut EndpointMemory<Ram>,
        iova: Iova,
        access: Access,
    ) -> Result<Translation, Fault> {
        let guard = eyes.enter();
        let answer = guard.translator().probe(iova, access);
        let outcome = match &answer {
            Ok(hit) => self.memory.access(&guard, iova, access, hit).map(|()| None),
            Err(fault) => memory::fault(&guard, fault).map(|made| made.then_some(fault)),
        };
        drop(guard);
        match outcome {
            Ok(None) => {}
            Ok(Some(fault)) => self.expect_report(endpoint, fault),
            Err(why) => self.complaints.push(format!("endpoint {endpoint} at {iova}: {why}")),
        }
        answer
    }

    /// The one report on the event queue is that of `fault`.
    fn expect_report(&mut self, endpoint: u32, fault: &Fault) {
        let reason = match fault.reason {
            FaultReason::Blocked => event::DOMAIN,
            FaultReason::Unmapped | FaultReason::Permission | FaultReason::Reserved => event::MAPPING,
            _ => event::UNKNOWN,
        };
        let mut flags = FaultFlags::ADDRESS;
        flags.set(FaultFlags::READ, fault.access.contains(Access::READ));
        flags.set(FaultFlags::WRITE, fault.access.contains(Access::WRITE));
        let due = event::Fault {
            reason,
            flags: flags.bits().into(),
            endpoint: endpoint.into(),
            address: fault.iova.0.into(),
            ..event::Fault::default()
        };
        match self.reports() {
            Ok(reports) => {
                self.faults += reports.len() as u64;
                if reports != [due] {
                    self.complaints.push(format!("the event queue has {reports:?}, where {due:?} is due"));
                }
            }
            Err(why) => self.complaints.push(format!("event queue: {why}")),
        }
    }

    fn reports(&mut self) -> Result<Vec<event::Fault>, Error> {
        self.events.process()?;
        let reports = self.driver.events()?;
        self.driver.fill_events()?;
        Ok(reports)
    }

    /// Writes a request into the ring, has it handled, and takes the answer.
    fn exchange(&mut self, request: &Request) -> Result<driver::Answer, Error> {
        let token = self.driver.push(request)?;
        self.requests.process()?;
        self.requests.wait(PATIENCE)?;
        let answer = self.driver.next_answer()?.ok_or("no answer")?;
        if answer.token != token || self.driver.outstanding() != 0 {
            return Err("the answer is that of another request".into());
        }
        Ok(answer)
    }

    fn ask(&mut self, kind: u8, request: &Request) -> (Reply, Option<driver::Answer>) {
        let due = request.writable(PROBE_SIZE);
        match self.exchange(request) {
            Ok(answer) => {
                let status = answer.status();
                let row = self.answers.get_mut(usize::from(kind));
                let counter = row.zip(status).and_then(|(row, status)| row.get_mut(usize::from(status.0)));
                if let Some(counter) = counter {
                    *counter += 1;
                }
                (Reply { kind, status, used: answer.used_len, due }, Some(answer))
            }
            Err(why) => {
                self.complaints.push(format!("request queue: {why}"));
                (Reply { kind, status: None, used: 0, due }, None)
            }
        }
    }

    /// A request that must be accepted.
    fn insist(&mut self, kind: u8, request: &Request) -> Option<driver::Answer> {
        let (reply, answer) = self.ask(kind, request);
        match reply.check(&Ok(())) {
            Ok(()) => answer,
            Err(why) => {
                self.complaints.push(why);
                None
            }
        }
    }

    /// The regions that the driver is told are those of the endpoint.
    pub(super) fn probe(&mut self, id: u32) {
        let Some(answer) = self.insist(PROBE, &Request::Probe { endpoint: id }) else { return };
        let told: Vec<_> =
            answer.resv_mem().iter().map(|r| (r.start.get(), r.end.get(), r.subtype)).collect();
        let regions = self.device.endpoint(id).map(|endpoint| endpoint.regions()).unwrap_or_default();
        let regions = regions.iter().map(|region| {
            let subtype = match region.kind {
                RegionKind::Reserved => RESV_RESERVED,
                RegionKind::Msi => RESV_MSI,
            };
            (region.range.start().0, region.range.last().0, subtype)
        });
        if !regions.eq(told.iter().copied()) {
            self.complaints.push(format!("PROBE of endpoint {id} tells of {told:x?}"));
        }
    }

    pub(super) fn attach(&mut self, endpoint: u32, domain: u32, bypass: bool) -> Answer {
        let flags = if bypass { AttachFlags::BYPASS } else { AttachFlags::empty() };
        Answer::Device(self.ask(ATTACH, &Request::Attach { domain, endpoint, flags }).0)
    }

    pub(super) fn detach(&mut self, endpoint: u32, domain: u32) -> Answer {
        Answer::Device(self.ask(DETACH, &Request::Detach { domain, endpoint }).0)
    }

    pub(super) fn map(&mut self, domain: u32, mapping: &Mapping) -> Answer {
        let mut flags = MapFlags::empty();
        flags.set(MapFlags::READ, mapping.access.contains(Access::READ));
        flags.set(MapFlags::WRITE, mapping.access.contains(Access::WRITE));
        flags.set(MapFlags::MMIO, mapping.target == Target::Mmio);
        let Gpa(phys_start) = mapping.gpa;
        let (virt_start, virt_end) = (mapping.range.start().0, mapping.range.last().0);
        Answer::Device(self.ask(MAP, &Request::Map { domain, virt_start, virt_end, phys_start, flags }).0)
    }

    pub(super) fn unmap(&mut self, domain: u32, range: IovaRange) -> Answer {
        let (virt_start, virt_end) = (range.start().0, range.last().0);
        Answer::Device(self.ask(UNMAP, &Request::Unmap { domain, virt_start, virt_end }).0)
    }

    pub(super) fn set_bypass(&mut self, on: bool) {
        self.bypass_writes += 1;
        let offset = BYPASS_OFFSET as u64;
        let done = self.device.write_config(offset, &[u8::from(on)]);
        settle(done, &mut self.complaints);
        let mut reads = [0xff];
        self.device.read_config(offset, &mut reads);
        if reads != [u8::from(self.iommu().bypass())] {
            self.complaints.push(format!("bypass reads as {reads:?}"));
        }
    }

    pub(super) fn reset(&mut self) {
        self.resets += 1;
        let pending = self.requests.reset();
        settle(pending, &mut self.complaints);
        self.events.reset();
        // What refuses to bypass is blocked.
        let reset = self.device.reset();
        settle(reset.completion, &mut self.complaints);
        if let Err(why) = self.restart_rings() {
            self.complaints.push(format!("queues after a reset: {why}"));
        }
        self.start();
    }

    fn restart_rings(&mut self) -> Result<(), Error> {
        self.driver.reset()?;
        *self.requests.queue_mut() = self.driver.request_queue()?;
        *self.events.queue_mut() = self.driver.event_queue()?;
        Ok(())
    }

    /// Attaches an endpoint of our own to a domain.
    pub(super) fn stand_in(&mut self, domain: u32) -> Option<u32> {
        let id = match self.idle.pop() {
            Some(id) => id,
            None => {
                let id =
                    (0..=u32::MAX - self.stand_ins).rev().find(|id| self.device.endpoint(*id).is_none())?;
                self.add_endpoint(id, Vec::new())?;
                self.stand_ins += 1;
                id
            }
        };
        let flags = AttachFlags::empty();
        let attached = self.insist(ATTACH, &Request::Attach { domain, endpoint: id, flags });
        if attached.is_none() {
            self.idle.push(id);
        }
        attached.map(|_| id)
    }

    pub(super) fn dismiss(&mut self, stand_in: u32, domain: u32) {
        self.insist(DETACH, &Request::Detach { domain, endpoint: stand_in });
        self.idle.push(stand_in);
    }

    /// It is in no domain any more.
    pub(super) fn free(&mut self, stand_in: u32) {
        self.idle.push(stand_in);
    }
}
