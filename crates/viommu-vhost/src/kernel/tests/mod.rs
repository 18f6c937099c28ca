//! The cache over a device in software, which takes nothing and fails when it is told to.

mod faults;
mod fd;
mod fencing;
mod misses;
mod random;
mod waiting;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::io::Errno;
use viommu::fuzzing::recording::{self, RecordingCache};
use viommu::reader::FaultSink;
use viommu::{
    Access, Completion, Domain, Endpoint, EndpointConfig, Extent, Fault, Gpa, GpaRange, Incident, Interest,
    Iommu, Iova, Medium, Subscription, Tables,
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::software::{Iotlb, Lookup};
use crate::spec::{IotlbMsg, Message, VERSION_2, VIRTIO_F_ACCESS_PLATFORM, backend, kind, perm};

const PAGE: u64 = 0x1000;

/// A device: what it was told, and what it asks. Entries have host addresses.
#[derive(Clone)]
struct Peer(Arc<Mutex<PeerState>>);

struct PeerState {
    iotlb: Iotlb,
    /// Not read yet.
    asked: VecDeque<Message>,
    /// Every message that it took.
    told: Vec<IotlbMsg>,
    /// It takes nothing.
    stalled: bool,
    /// Messages of this kind fail, after so many that do not.
    fails: Option<(u8, usize, Errno)>,
    read_fails: Option<Errno>,
}

impl Peer {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(PeerState {
            iotlb: Iotlb::default(),
            asked: VecDeque::new(),
            told: Vec::new(),
            stalled: false,
            fails: None,
            read_fails: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, PeerState> {
        self.0.lock().unwrap()
    }

    /// An access of the device's: where it comes out, by host address. It asks where it has no entry.
    fn reach(&self, iova: u64, access: Access) -> Lookup {
        let mut peer = self.lock();
        let found = peer.iotlb.lookup(Iova(iova), access);
        if found == Lookup::Miss {
            peer.asked.push_back(miss(iova, access));
        }
        found
    }

    /// The messages since the last time.
    fn take_told(&self) -> Vec<IotlbMsg> {
        std::mem::take(&mut self.lock().told)
    }

    fn stall(&self, on: bool) {
        self.lock().stalled = on;
    }
}

fn message(kind: u8, iova: u64, perm: u8) -> Message {
    let iotlb = IotlbMsg { iova, perm, kind, ..IotlbMsg::default() };
    Message { version: VERSION_2, iotlb, ..Message::default() }
}

fn miss(iova: u64, access: Access) -> Message {
    message(kind::MISS, iova, access.bits())
}

/// What a back-end does with a message, by the kernel's rules.
fn obey(iotlb: &mut Iotlb, message: &IotlbMsg) -> Result<(), Errno> {
    match message.kind {
        kind::UPDATE => {
            let access = Access::from_bits(message.perm).ok_or(Errno::FAULT)?;
            let entry = Mapping::new(Iova(message.iova), message.size, Gpa(message.uaddr), access);
            iotlb.update(&entry.ok_or(Errno::INVAL)?).map_err(|_| Errno::FAULT)?;
            assert_eq!(iotlb.overlaps(), 0, "an entry over a live one: {message:?}");
        }
        kind::INVALIDATE => {
            let range = IovaRange::from_len(Iova(message.iova), message.size).ok_or(Errno::INVAL)?;
            iotlb.invalidate(range);
        }
        kind::BATCH_BEGIN | kind::BATCH_END => {}
        _ => return Err(Errno::FAULT),
    }
    Ok(())
}

impl Line for Peer {
    fn read(&self) -> Result<Message, Errno> {
        let mut peer = self.lock();
        match peer.read_fails {
            Some(errno) => Err(errno),
            None => peer.asked.pop_front().ok_or(Errno::AGAIN),
        }
    }

    fn write(&self, message: &Message) -> Result<(), Errno> {
        let mut peer = self.lock();
        if peer.stalled {
            return Err(Errno::AGAIN);
        }
        if let Some((of, good, errno)) = &mut peer.fails
            && *of == message.iotlb.kind
        {
            match good.checked_sub(1) {
                Some(left) => *good = left,
                None => return Err(*errno),
            }
        }
        obey(&mut peer.iotlb, &message.iotlb)?;
        peer.told.push(message.iotlb);
        Ok(())
    }
}

/// Regions of the guest's memory, in pages: first and count. The first two are neighbours.
const REGIONS: [(u64, u64); 3] = [(0, 16), (16, 16), (64, 16)];
/// Pages of read-only memory, in the last region.
const ROM: (u64, u64) = (72, 79);
/// Pages of device registers.
const BAR: (u64, u64) = (256, 263);

fn memory() -> Arc<GuestMemoryMmap<()>> {
    let ranges: Vec<_> = REGIONS
        .iter()
        .map(|(first, count)| (GuestAddress(first * PAGE), usize::try_from(count * PAGE).unwrap()))
        .collect();
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

fn pages(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first * PAGE), Iova(last * PAGE + (PAGE - 1))).unwrap()
}

fn map_of(first: u64, last: u64, gpa: u64, access: Access) -> Mapping {
    Mapping::over(pages(first, last), Gpa(gpa * PAGE), access).unwrap()
}

fn rw(first: u64, last: u64, gpa: u64) -> Mapping {
    map_of(first, last, gpa, Access::RW)
}

fn extent((first, last): (u64, u64), medium: Medium) -> Extent {
    let range = GpaRange::new(Gpa(first * PAGE), Gpa(last * PAGE + (PAGE - 1))).unwrap();
    Extent { range, medium }
}

/// What lies where: the first two regions of memory are one extent.
fn backing() -> [Extent; 4] {
    [
        extent((0, 31), Medium::Ram),
        extent((64, 71), Medium::Ram),
        extent(ROM, Medium::Rom),
        extent(BAR, Medium::Mmio),
    ]
}

fn protocol() -> Protocol {
    Protocol::of(VIRTIO_F_ACCESS_PLATFORM, backend::IOTLB_MSG_V2).unwrap()
}

#[track_caller]
fn over(mut done: Completion) {
    assert!(done.is_complete(), "still waits for {:?}", done.blockers());
}

#[derive(Default)]
struct Sink(Mutex<Vec<Fault>>);

impl FaultSink for Sink {
    fn fault(&self, fault: &Fault) {
        self.0.lock().unwrap().push(*fault);
    }
}

/// A unit with an endpoint (8) in a domain (1), our cache at the endpoint, and another at the domain.
struct Rig {
    iommu: Iommu,
    endpoint: Endpoint,
    domain: Domain,
    memory: Arc<GuestMemoryMmap<()>>,
    peer: Peer,
    handle: Handle,
    subscription: Subscription,
    other: recording::Handle,
    other_subscription: Subscription,
    faults: Arc<Sink>,
    incidents: Arc<Mutex<Vec<Incident>>>,
}

impl Rig {
    fn new() -> Self {
        Self::with(protocol(), |device| device)
    }

    /// Where the device is cut off by its IOTLB being taken away.
    fn fenced_by_action() -> Self {
        let peer = Peer::new();
        let cut = peer.clone();
        Self::over(peer, protocol(), |device| {
            device.fence(move || {
                cut.lock().iotlb.fence();
                Ok(())
            })
        })
    }

    fn with(protocol: Protocol, device: impl FnOnce(Device) -> Device) -> Self {
        Self::over(Peer::new(), protocol, device)
    }

    fn over(peer: Peer, protocol: Protocol, device: impl FnOnce(Device) -> Device) -> Self {
        let memory = memory();
        let incidents = Arc::new(Mutex::new(Vec::new()));
        let alarm = incidents.clone();
        let builder = Iommu::builder().alarm(move |incident| alarm.lock().unwrap().push(incident.clone()));
        let builder = backing().into_iter().fold(builder, viommu::Builder::backing);
        let iommu = builder.build().unwrap();
        let domain = iommu.create_domain(1, Tables::Owned).unwrap();
        let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
        over(endpoint.attach(1).unwrap());
        let faults = Arc::new(Sink::default());
        let made = Device::over(Arc::new(peer.clone()), protocol).faults(faults.clone());
        let (cache, handle) = device(made).cache(memory.clone());
        let subscription = endpoint.subscribe_cache(Box::new(cache), Interest::CACHE).unwrap();
        let (other, other_handle) = RecordingCache::new();
        let other_subscription = iommu.subscribe_cache(domain.space(), other, Interest::CACHE).unwrap();
        handle.start().unwrap();
        peer.take_told();
        Self {
            iommu,
            endpoint,
            domain,
            memory,
            peer,
            handle,
            subscription,
            other: other_handle,
            other_subscription,
            faults,
            incidents,
        }
    }

    fn serve(&self) -> Turn {
        self.handle.serve(&self.subscription).unwrap()
    }

    /// The device asks for the address, and is answered if there is an answer.
    #[track_caller]
    fn fill(&self, iova: u64, access: Access) {
        assert_eq!(self.peer.reach(iova, access), Lookup::Miss);
        assert_eq!(self.serve(), Turn::default());
    }

    /// Where a guest physical page lies in this process.
    fn host(&self, page: u64) -> Gpa {
        let address = self.memory.get_host_address(GuestAddress(page * PAGE)).unwrap();
        Gpa(address.addr() as u64)
    }

    #[track_caller]
    fn check_audits(&self) {
        for subscription in [&self.subscription, &self.other_subscription] {
            if let Some(audit) = subscription.audit() {
                assert!(audit.is_clean(), "{audit:?}");
            }
        }
        assert!(!self.other_subscription.is_fenced());
    }

    #[track_caller]
    fn check_fenced(&self) {
        assert!(self.subscription.is_fenced() && self.handle.is_fenced());
        for page in 0..32 {
            assert_ne!(self.peer.lock().iotlb.lookup(Iova(page * PAGE), Access::READ), Lookup::Hit(Gpa(0)));
        }
        assert_eq!(self.peer.lock().iotlb.len(), 0, "the device still reaches something");
        assert!(matches!(self.handle.serve(&self.subscription), Err(ServeError::Fenced)));
        self.check_audits();
        let incidents = self.incidents.lock().unwrap();
        assert!(incidents.iter().any(|i| matches!(i, Incident::Fenced { .. })), "{incidents:?}");
    }
}

/// INVALIDATE of those pages, as it is told.
fn invalidate(first: u64, last: u64) -> IotlbMsg {
    let size = (last - first + 1) * PAGE;
    IotlbMsg { iova: first * PAGE, size, kind: kind::INVALIDATE, ..IotlbMsg::default() }
}

/// UPDATE of those pages.
fn update(first: u64, last: u64, host: Gpa, perm: u8) -> IotlbMsg {
    IotlbMsg { uaddr: host.0, perm, kind: kind::UPDATE, ..invalidate(first, last) }
}
