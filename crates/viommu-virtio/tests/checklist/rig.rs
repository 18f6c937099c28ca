//! A device with two endpoints and a driver, and short words for requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use viommu::endpoint::RegionKind;
use viommu::{Access, Builder, FaultReason, Iommu, Iova, IovaRange, Mapping, Target, Translation};
use viommu_virtio::driver::{Answer, Driver, Request};
use viommu_virtio::spec::Features;
use viommu_virtio::spec::config::BYPASS_OFFSET;
use viommu_virtio::spec::request::{AttachFlags, MapFlags, Status};
use viommu_virtio::{Config, EndpointPlan, EventQueue, RequestQueue, VirtioIommu};
use vm_memory::{GuestAddress, GuestMemoryMmap};

pub(crate) const PAGE: u64 = 0x1000;
/// An endpoint without regions.
pub(crate) const A: u32 = 8;
/// One with a reserved region (pages 0x100 to 0x10f) and the MSI doorbell of x86.
pub(crate) const B: u32 = 9;
pub(crate) const RESERVED: (u64, u64) = (0x10_0000, 0x10_ffff);
pub(crate) const MSI: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);

pub(crate) const R: u32 = 1;
pub(crate) const W: u32 = 2;
pub(crate) const RW: u32 = 3;

pub(crate) const QUEUE: u16 = 1024;

pub(crate) type Memory = Arc<GuestMemoryMmap>;

pub(crate) struct Rig {
    pub(crate) device: VirtioIommu,
    pub(crate) driver: Driver<Memory>,
    pub(crate) queue: RequestQueue<Memory>,
    pub(crate) events: EventQueue<Memory>,
    pub(crate) memory: Memory,
    pub(crate) interrupts: Arc<AtomicUsize>,
}

pub(crate) fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(start), Iova(last)).unwrap()
}

/// Bypass is off at first.
pub(crate) fn config() -> Config {
    Config { bypass: false, ..Config::default() }
}

pub(crate) fn rig() -> Rig {
    rig_with(config(), |builder| builder)
}

/// A device with all that it offers negotiated, and 64 MiB of memory in the record.
pub(crate) fn rig_with(config: Config, with: impl FnOnce(Builder) -> Builder) -> Rig {
    let probe_size = config.probe_size;
    let has_regions = config.features.contains(Features::PROBE);
    let builder = with(Iommu::builder().ram(0, 64 << 20));
    let device = VirtioIommu::new(builder, config).unwrap();
    device.add_endpoint(A, EndpointPlan::default()).unwrap();
    let mut plan = EndpointPlan::default();
    if has_regions {
        plan = plan.region(range(RESERVED.0, RESERVED.1), RegionKind::Reserved);
        plan = plan.region(range(MSI.0, MSI.1), RegionKind::Msi);
    }
    device.add_endpoint(B, plan).unwrap();
    over(device.negotiate(Features::all()));
    let bytes = Driver::<Memory>::bytes(QUEUE, probe_size);
    let ranges = [(GuestAddress(0x1000), bytes.try_into().unwrap())];
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let driver = Driver::new(memory.clone(), 0x1000, QUEUE, probe_size).unwrap();
    let interrupts = Arc::new(AtomicUsize::new(0));
    let count = interrupts.clone();
    let interrupt = move || {
        count.fetch_add(1, Ordering::Relaxed);
    };
    let queue = device.request_queue(driver.request_queue().unwrap(), memory.clone(), interrupt);
    let events = device.event_queue(driver.event_queue().unwrap(), memory.clone(), || {});
    Rig { device, driver, queue, events, memory, interrupts }
}

/// It is over, now.
#[track_caller]
pub(crate) fn over(mut done: viommu::Completion) {
    assert!(done.is_complete(), "still waits for {:?}", done.blockers());
}

pub(crate) fn attach(domain: u32, endpoint: u32) -> Request {
    Request::Attach { domain, endpoint, flags: AttachFlags::empty() }
}

pub(crate) fn attach_bypass(domain: u32, endpoint: u32) -> Request {
    Request::Attach { domain, endpoint, flags: AttachFlags::BYPASS }
}

pub(crate) fn detach(domain: u32, endpoint: u32) -> Request {
    Request::Detach { domain, endpoint }
}

/// Bytes `start` to `end`, both inclusive.
pub(crate) fn map_bytes(domain: u32, start: u64, end: u64, phys: u64, flags: u32) -> Request {
    let flags = MapFlags::from_bits_retain(flags);
    Request::Map { domain, virt_start: start, virt_end: end, phys_start: phys, flags }
}

/// Pages `first` to `last`, both inclusive, at the page `phys`.
pub(crate) fn map(domain: u32, first: u64, last: u64, phys: u64) -> Request {
    map_bytes(domain, first * PAGE, last * PAGE + (PAGE - 1), phys * PAGE, RW)
}

pub(crate) fn unmap_bytes(domain: u32, start: u64, end: u64) -> Request {
    Request::Unmap { domain, virt_start: start, virt_end: end }
}

pub(crate) fn unmap(domain: u32, first: u64, last: u64) -> Request {
    unmap_bytes(domain, first * PAGE, last * PAGE + (PAGE - 1))
}

/// `request` with some of its bytes changed, and the same writable part.
pub(crate) fn raw(request: &Request, change: impl FnOnce(&mut Vec<u8>)) -> Request {
    let mut bytes = request.to_bytes();
    change(&mut bytes);
    Request::Raw { bytes, writable: request.writable(512) }
}

impl Rig {
    /// One request, alone.
    #[track_caller]
    pub(crate) fn ask(&mut self, request: &Request) -> Answer {
        let token = self.driver.push(request).unwrap();
        self.serve();
        let answer = self.driver.next_answer().unwrap().expect("an answer");
        assert_eq!(answer.token, token);
        answer
    }

    #[track_caller]
    pub(crate) fn serve(&mut self) {
        self.queue.process().unwrap();
        self.queue.wait(Duration::from_secs(10)).unwrap();
    }

    /// One request with a status: the used length is right too.
    #[track_caller]
    pub(crate) fn says(&mut self, request: &Request) -> Status {
        let answer = self.ask(request);
        let due = match request {
            Request::Probe { .. } => 516,
            Request::Raw { bytes, writable } if bytes[0] == 5 => *writable,
            _ => 4,
        };
        assert_eq!(answer.used_len, due, "{request:?}");
        answer.status().unwrap()
    }

    #[track_caller]
    pub(crate) fn ok(&mut self, request: &Request) {
        assert_eq!(self.says(request), Status::OK, "{request:?}");
    }

    /// The record of a domain.
    pub(crate) fn record(&self, domain: u32) -> Vec<Mapping> {
        let mut list = Vec::new();
        if let Some(domain) = self.device.iommu().domain(domain) {
            domain.for_each(IovaRange::ALL, |m| {
                list.push(m);
                core::ops::ControlFlow::Continue(())
            });
        }
        list
    }

    /// Its pages: first and last of each mapping.
    pub(crate) fn pages(&self, domain: u32) -> Vec<(u64, u64)> {
        let pages = |m: &Mapping| (m.range.start().0 / PAGE, m.range.last().0 / PAGE);
        self.record(domain).iter().map(pages).collect()
    }

    /// An access by an endpoint, as its device makes it: a fault is reported.
    pub(crate) fn access(
        &self,
        endpoint: u32,
        iova: u64,
        access: Access,
    ) -> Result<Translation, FaultReason> {
        let mut reader = self.device.endpoint(endpoint).unwrap().reader("test").unwrap();
        reader.enter().translate(Iova(iova), access).map_err(|fault| fault.reason)
    }

    pub(crate) fn reads(&self, endpoint: u32, iova: u64) -> Result<u64, FaultReason> {
        self.access(endpoint, iova, Access::READ).map(|t| t.gpa.0)
    }

    pub(crate) fn writes(&self, endpoint: u32, iova: u64) -> Result<u64, FaultReason> {
        self.access(endpoint, iova, Access::WRITE).map(|t| t.gpa.0)
    }

    pub(crate) fn bypass_byte(&self) -> u8 {
        let mut byte = [0xff];
        self.device.read_config(BYPASS_OFFSET as u64, &mut byte);
        byte[0]
    }

    pub(crate) fn write_bypass(&self, value: u8) {
        over(self.device.write_config(BYPASS_OFFSET as u64, &[value]));
    }

    pub(crate) fn target(&self, domain: u32) -> Vec<Target> {
        self.record(domain).iter().map(|m| m.target).collect()
    }
}
