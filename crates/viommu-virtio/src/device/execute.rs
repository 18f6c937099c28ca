//! Requests, one after the other: parameters, then the record, then the answer.

use viommu::domain::Burst;
use viommu::endpoint::RegionKind;
use viommu::{AttachError, Completion, IovaRange, Mapping, StepErrorKind, Tables, View};
use vm_memory::GuestMemoryBackend;
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::device::limits::Limits;
use crate::device::{Control, GuestDomain, Kind, VirtioIommu, status};
use crate::journal::Entry;
use crate::log;
use crate::queue::chain::Frame;
use crate::queue::near::Near;
use crate::spec::request::{self, Attach, Detach, Map, Probe, Status, Tail, Unmap};
use crate::spec::{Features, property};
use crate::sync::MutexGuard;

/// Where requests come from and where their answers go.
pub(crate) trait Requests {
    /// Reads the next one into `frame`: its head, and whether there is anything to read. `None`: there is none.
    fn next(&mut self, frame: &mut Frame) -> Option<(u16, bool)>;
    /// The request of that head is executed and answered, with that used length.
    fn answer(&mut self, head: u16, used: u32);
}

/// Executes requests while it has the device.
pub(crate) struct Executor<'d> {
    device: &'d VirtioIommu,
    control: MutexGuard<'d, Control>,
    limits: Limits,
    done: Completion,
    unmaps: u64,
}

/// A change of one domain's mappings, its parameters looked at.
enum Change {
    Map(Result<Mapping, Status>),
    Unmap(Result<IovaRange, Status>),
}

const TAIL: usize = size_of::<Tail>();

impl<'d> Executor<'d> {
    pub(crate) fn new(device: &'d VirtioIommu) -> Self {
        let control = device.lock();
        let limits = device.limits(&control);
        Self { device, control, limits, done: Completion::ready(), unmaps: 0 }
    }

    /// Executes all of `requests`. Gives what their answers wait for, and how many UNMAPs there were.
    pub(crate) fn run(
        mut self,
        memory: &Near<'_, impl GuestMemoryBackend>,
        requests: &mut impl Requests,
        frame: &mut Frame,
    ) -> (Completion, u64) {
        let mut item = requests.next(frame);
        while let Some((head, readable)) = item {
            if let Some((domain, change)) = readable.then(|| self.change(memory, frame)).flatten() {
                item = self.burst(memory, domain, (head, change), requests, frame);
                continue;
            }
            let used = if readable { self.single(memory, frame) } else { None };
            if used.is_none() {
                self.device.counters().malformed();
            }
            requests.answer(head, used.unwrap_or(0));
            item = requests.next(frame);
        }
        (self.done, self.unmaps)
    }

    /// The request in `frame`, if it is a MAP or an UNMAP that can be answered.
    fn change(&self, memory: &Near<'_, impl GuestMemoryBackend>, frame: &Frame) -> Option<(u32, Change)> {
        let bytes = frame.request();
        let (domain, change) = match *bytes.first()? {
            request::MAP => {
                let (map, _) = Map::ref_from_prefix(bytes).ok()?;
                (map.domain.get(), Change::Map(self.limits.map(map)))
            }
            request::UNMAP => {
                let (unmap, _) = Unmap::ref_from_prefix(bytes).ok()?;
                (unmap.domain.get(), Change::Unmap(self.limits.unmap(unmap)))
            }
            _ => return None,
        };
        frame.can_write(memory, 0, TAIL).then_some((domain, change))
    }

    /// Executes changes of one domain, as many as follow each other, under one taking of its lock. Gives the request
    /// behind them.
    fn burst(
        &mut self,
        memory: &Near<'_, impl GuestMemoryBackend>,
        domain: u32,
        (mut head, mut change): (u16, Change),
        requests: &mut impl Requests,
        frame: &mut Frame,
    ) -> Option<(u16, bool)> {
        let target = match self.control.domains.get(&domain).map(|domain| &domain.kind) {
            None => Err(Status::NOENT),
            Some(Kind::Bypass) => Err(Status::INVAL),
            Some(Kind::Paged(domain)) => Ok(domain.clone()),
        };
        let mut burst = match &target {
            Ok(domain) => domain.burst().map_err(|error| status::of_step(&error.kind)),
            Err(status) => Err(*status),
        };
        let item = loop {
            let kind = frame.request().first().copied().unwrap_or_default();
            let outcome = match change {
                Change::Map(mapping) => mapping.and_then(|mapping| {
                    step(kind, &mut burst, |burst| burst.map(mapping))?;
                    self.device.note(|| Entry::Map { domain, mapping });
                    Ok(())
                }),
                Change::Unmap(range) => {
                    self.unmaps = self.unmaps.saturating_add(1);
                    range.and_then(|range| {
                        let removed = step(kind, &mut burst, |burst| burst.unmap(range))?;
                        self.device.note(|| Entry::Unmap { domain, range, removed });
                        Ok(())
                    })
                }
            };
            let used = self.answer(memory, frame, kind, 0, outcome);
            requests.answer(head, used.unwrap_or(0));
            let item = requests.next(frame);
            let Some((next, true)) = item else { break item };
            match self.change(memory, frame) {
                Some((same, following)) if same == domain => (head, change) = (next, following),
                _ => break item,
            }
        };
        if let Ok(burst) = burst {
            self.done.merge(burst.finish());
        }
        item
    }

    /// Any other request. Gives the used length; `None`: it cannot be read or answered, and was not executed.
    fn single(&mut self, memory: &Near<'_, impl GuestMemoryBackend>, frame: &Frame) -> Option<u32> {
        let bytes = frame.request();
        let kind = *bytes.first()?;
        match kind {
            request::ATTACH | request::DETACH => {
                let attach = Attach::ref_from_prefix(bytes).ok()?.0;
                let detach = Detach::ref_from_prefix(bytes).ok()?.0;
                if !frame.can_write(memory, 0, TAIL) {
                    return None;
                }
                let outcome = if kind == request::ATTACH { self.attach(attach) } else { self.detach(detach) };
                self.answer(memory, frame, kind, 0, outcome)
            }
            request::PROBE if self.device.features().contains(Features::PROBE) => {
                let probe = Probe::ref_from_prefix(bytes).ok()?.0;
                self.probe(memory, frame, probe)
            }
            _ => None,
        }
    }

    /// Writes the tail at `offset`. Gives the used length.
    fn answer(
        &self,
        memory: &Near<'_, impl GuestMemoryBackend>,
        frame: &Frame,
        kind: u8,
        offset: u64,
        outcome: Result<(), Status>,
    ) -> Option<u32> {
        let status = outcome.err().unwrap_or(Status::OK);
        let tail = Tail { status: status.0, ..Tail::default() };
        frame.write(memory, offset, tail.as_bytes()).ok()?;
        self.device.counters().answered(kind, status);
        u32::try_from(offset.checked_add(u64::try_from(TAIL).ok()?)?).ok()
    }

    fn attach(&mut self, request: &Attach) -> Result<(), Status> {
        let (domain, bypass) = self.limits.attach(request)?;
        let endpoint = request.endpoint.get();
        if !self.control.members.contains_key(&endpoint) {
            return Err(Status::NOENT);
        }
        let known = self.control.domains.get(&domain).map(|domain| matches!(domain.kind, Kind::Bypass));
        if known.is_some_and(|known| known != bypass) {
            return Err(Status::INVAL);
        }
        if self.control.attached.get(&endpoint) == Some(&domain) {
            return Ok(());
        }
        let iommu = self.device.iommu();
        if known.is_none() {
            let kind = if bypass {
                Kind::Bypass
            } else {
                let created = iommu.create_domain(domain, Tables::Owned);
                Kind::Paged(created.map_err(|error| self.refused(request::ATTACH, error))?)
            };
            self.control.domains.insert(domain, GuestDomain { kind, endpoints: 0 });
        }
        let view = if bypass { View::Identity } else { View::Domain(domain) };
        match iommu.set_views(&[(endpoint.into(), Some(view))]) {
            Ok(completion) => {
                self.done.merge(completion);
                if let Some(domain) = self.control.domains.get_mut(&domain) {
                    domain.endpoints = domain.endpoints.saturating_add(1);
                }
                self.device.note(|| Entry::Attach { endpoint, domain, bypass });
                let old = self.control.attached.insert(endpoint, domain);
                self.device.left(&mut self.control, old, &mut self.done);
                Ok(())
            }
            Err(error) => {
                let blocked = !error.blocked.is_empty();
                let status = self.refused(request::ATTACH, error);
                if blocked {
                    let old = self.control.attached.remove(&endpoint);
                    if let Some(domain) = old {
                        self.device.note(|| Entry::Detach { endpoint, domain });
                    }
                    self.device.left(&mut self.control, old, &mut self.done);
                }
                self.device.drop_if_unused(&mut self.control, domain, &mut self.done);
                Err(status)
            }
        }
    }

    /// Afterwards the endpoint is attached to nothing, whoever refuses: if it cannot bypass then, it is blocked.
    fn detach(&mut self, request: &Detach) -> Result<(), Status> {
        let (domain, endpoint) = (request.domain.get(), request.endpoint.get());
        let Some(handle) = self.device.iommu().endpoint(endpoint) else { return Err(Status::NOENT) };
        if self.control.attached.get(&endpoint) != Some(&domain) {
            return Err(Status::INVAL);
        }
        let outcome = match handle.detach() {
            Ok(completion) => {
                self.done.merge(completion);
                Ok(())
            }
            Err(error) => {
                let status = self.refused(request::DETACH, error);
                match handle.block() {
                    Ok(completion) => self.done.merge(completion),
                    Err(error) => self.done.merge(error.completion),
                }
                Err(status)
            }
        };
        self.device.note(|| Entry::Detach { endpoint, domain });
        let old = self.control.attached.remove(&endpoint);
        self.device.left(&mut self.control, old, &mut self.done);
        outcome
    }

    fn refused(&mut self, kind: u8, error: AttachError) -> Status {
        let status = status::of_attach(&error.kind);
        log::refused(kind, status.0, &error.kind);
        self.done.merge(error.completion);
        status
    }

    fn probe(
        &self,
        memory: &Near<'_, impl GuestMemoryBackend>,
        frame: &Frame,
        request: &Probe,
    ) -> Option<u32> {
        let size = u64::from(self.device.config().probe_size);
        let tail = u64::try_from(TAIL).ok()?;
        if frame.room() < size.checked_add(tail)? {
            // No property is written (VIRTIO, "PROBE request"). The tail is where this buffer ends.
            let offset = frame.room().checked_sub(tail)?;
            if !frame.can_write(memory, offset, TAIL) {
                return None;
            }
            return self.answer(memory, frame, request::PROBE, offset, Err(Status::INVAL));
        }
        let mut properties = vec![0_u8; usize::try_from(size).ok()?];
        let outcome = match self.control.members.get(&request.endpoint.get()) {
            None => Err(Status::NOENT),
            Some(member) => {
                // They fit: it was checked when the endpoint came.
                let rooms = properties.chunks_exact_mut(property::RESV_MEM_SIZE);
                for (room, region) in rooms.zip(&member.regions) {
                    let subtype = match region.kind {
                        RegionKind::Reserved => property::RESV_RESERVED,
                        RegionKind::Msi => property::RESV_MSI,
                    };
                    let head =
                        property::PropertyHead { kind: U16::new(property::RESV_MEM), length: U16::new(20) };
                    let (start, end) = (U64::new(region.range.start().0), U64::new(region.range.last().0));
                    let written = property::ResvMem { head, subtype, reserved: [0; 3], start, end };
                    room.copy_from_slice(written.as_bytes());
                }
                Ok(())
            }
        };
        if !frame.can_write(memory, 0, properties.len().checked_add(TAIL)?) {
            return None;
        }
        frame.write(memory, 0, &properties).ok()?;
        self.answer(memory, frame, request::PROBE, size, outcome)
    }
}

/// One step of a burst, if there is a domain for it.
fn step<'b, T>(
    kind: u8,
    burst: &mut Result<Burst<'b>, Status>,
    make: impl FnOnce(&mut Burst<'b>) -> Result<T, StepErrorKind>,
) -> Result<T, Status> {
    let burst = burst.as_mut().map_err(|status| *status)?;
    make(burst).map_err(|refusal| {
        let status = status::of_step(&refusal);
        log::refused(kind, status.0, &refusal);
        status
    })
}
