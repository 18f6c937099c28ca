//! A record with one endpoint, whose device is the kernel's vhost-net: its ring, its packets, and where they arrive.

use std::{
    error::Error,
    io::Write,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use viommu::{
    Access, Completion, Domain, Endpoint, EndpointConfig, Gpa, Interest, Iommu, Iova, IovaRange, Mapping,
    Subscription, Tables,
};
use viommu_vhost::kernel::{Device, Handle, Protocol};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

use super::sys::{ETHERTYPE, FEATURES, TX, Tap, Vhost, event, wait};

pub(super) type Outcome<T> = Result<T, Box<dyn Error>>;

pub(super) const PAGE: u64 = 4096;

/// Pages of the guest's memory, in two regions of as many.
pub(super) const REGION: u64 = 256;

/// Chains of the ring that are used, of two descriptors each; the ring has twice as many.
pub(super) const SLOTS: u16 = 64;

/// Where the ring's parts and the packets' heads are: pages of memory, and of the device's addresses.
const DESCRIPTORS: (u64, u64) = (1, 0x5001);
const AVAILABLE: (u64, u64) = (2, 0x5003);
const USED: (u64, u64) = (3, 0x5005);
const HEADS: (u64, u64) = (4, 0x5007);

/// Memory from this page on is for packets' bodies.
pub(super) const FIRST_BODY: u64 = 16;

/// Bytes of a slot of heads: virtio-net's header, Ethernet's, and what tells the packet.
const SLOT: u64 = 64;
const NET_HEADER: usize = 12;
const HEAD: usize = NET_HEADER + 14 + 16;

/// Bytes of a body: what lies in a page of memory.
const BODY: usize = 32;

/// What lies in a page that a device may see, and in one that was taken from it.
const LIVE: u64 = 0x6c69_7665_6c69_7665;
const TAKEN: u64 = 0x7461_6b65_6e21_2121;

/// What a packet says: which it is, the page that it was to be of, and what lay there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) number: u64,
    pub(super) page: u64,
    pub(super) body: Body,
}

/// What lies in a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Body {
    pub(super) taken: bool,
    /// The device's page that it is mapped at.
    pub(super) at: u64,
    /// The page of memory.
    pub(super) memory: u64,
    /// Counts up.
    pub(super) generation: u64,
}

impl Body {
    fn bytes(self) -> [u8; BODY] {
        let mut bytes = [0; BODY];
        let words = [if self.taken { TAKEN } else { LIVE }, self.at, self.memory, self.generation];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u64::from_ne_bytes(*bytes.get(at * 8..)?.first_chunk()?));
        let taken = match word(0)? {
            LIVE => false,
            TAKEN => true,
            _ => return None,
        };
        Some(Self { taken, at: word(1)?, memory: word(2)?, generation: word(3)? })
    }
}

pub(super) fn pages(first: u64, last: u64) -> Outcome<IovaRange> {
    Ok(IovaRange::new(Iova(first * PAGE), Iova(last * PAGE + (PAGE - 1))).ok_or("no such range")?)
}

pub(super) fn page(at: u64, memory: u64, access: Access) -> Outcome<Mapping> {
    Ok(Mapping::over(pages(at, at)?, Gpa(memory * PAGE), access).ok_or("no such mapping")?)
}

/// It is over, at once or within a while.
pub(super) fn over(mut done: Completion) -> Outcome<()> {
    Ok(done.wait_timeout(Duration::from_secs(20))?)
}

pub(super) struct World {
    pub(super) iommu: Iommu,
    pub(super) endpoint: Endpoint,
    pub(super) domain: Domain,
    pub(super) memory: Arc<GuestMemoryMmap<()>>,
    pub(super) handle: Handle,
    /// Shared with whoever serves the device.
    pub(super) subscription: Arc<Subscription>,
    pub(super) vhost: Vhost,
    pub(super) tap: Tap,
    kick: OwnedFd,
    /// Packets that were put into the ring.
    pub(super) put: u64,
    /// Packets that arrived.
    pub(super) heard: u64,
}

impl World {
    /// With the ring's pages mapped and nothing else, and the device running.
    pub(super) fn new(tap: &str, settings: impl FnOnce(Device, &Vhost) -> Outcome<Device>) -> Outcome<Self> {
        let bytes = usize::try_from(REGION * PAGE)?;
        let regions = [(GuestAddress(0), bytes), (GuestAddress(REGION * PAGE), bytes)];
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&regions)?);
        // The guest has little memory to promise.
        let iommu = Iommu::builder().ram(0, 2 * REGION * PAGE).table_bytes(16 << 20).build()?;
        let domain = iommu.create_domain(1, Tables::Owned)?;
        let endpoint = iommu.add_endpoint(8, EndpointConfig::default())?;
        over(endpoint.attach(1)?)?;

        let vhost = Vhost::open("/dev/vhost-net")?;
        let host =
            |gpa: u64| Ok::<u64, Box<dyn Error>>(memory.get_host_address(GuestAddress(gpa))?.addr() as u64);
        let size = REGION * PAGE;
        vhost.set_memory([[0, size, host(0)?, 0], [size, size, host(size)?, 0]])?;
        let protocol = Protocol::negotiate(&vhost.0)?;
        if !protocol.is_v2() {
            return Err("vhost-net offers no second version of messages".into());
        }
        let device = settings(Device::new(vhost.duplicate()?, protocol)?, &vhost)?;
        let (cache, handle) = device.cache(memory.clone());
        let subscription = Arc::new(endpoint.subscribe_cache(Box::new(cache), Interest::CACHE)?);
        // No features yet, so no IOTLB.
        if handle.start().map_err(|error| error.raw_os_error()) != Err(Some(libc::EFAULT)) {
            return Err("a device without an IOTLB takes an INVALIDATE".into());
        }
        vhost.set_features(FEATURES)?;
        handle.start()?;

        let kick = event()?;
        for (memory, at) in [DESCRIPTORS, AVAILABLE, USED, HEADS] {
            over(domain.map(page(at, memory, Access::RW)?)?)?;
        }
        let addresses = [DESCRIPTORS, AVAILABLE, USED].map(|(_, at)| at * PAGE);
        vhost.set_ring(TX, SLOTS * 2, addresses, &kick)?;
        let tap = Tap::new(tap)?;
        // The kernel writes to the used ring when it gets its back-end, and waits for nobody then.
        if vhost.set_backend(&tap.file).is_ok() {
            return Err("the used ring was written to without an entry".into());
        }
        subscription.fill(Iova(USED.1 * PAGE), Access::RW)?;
        // Where a worker does all the writing, that is told now.
        if handle.flush().waits {
            return Err("vhost-net takes no message".into());
        }
        vhost.set_backend(&tap.file)?;
        Ok(Self { iommu, endpoint, domain, memory, handle, subscription, vhost, tap, kick, put: 0, heard: 0 })
    }

    /// Writes what a page of memory is for.
    pub(super) fn mark(&self, body: Body) -> Outcome<()> {
        Ok(self.memory.write_slice(&body.bytes(), GuestAddress(body.memory * PAGE))?)
    }

    /// Packets in the ring that have not been sent.
    pub(super) fn under_way(&self) -> Outcome<u64> {
        let used: u16 = self.memory.load(GuestAddress(USED.0 * PAGE + 2), Ordering::Acquire)?;
        let put = u16::try_from(self.put & 0xffff)?;
        Ok(put.wrapping_sub(used).into())
    }

    /// Puts a packet into the ring whose body is in a page of the device's, and kicks. There must be room.
    pub(super) fn send(&mut self, at: u64) -> Outcome<()> {
        let slot = self.put % u64::from(SLOTS);
        let mut head = [0; HEAD];
        head[NET_HEADER..NET_HEADER + 6].fill(0xff);
        head[NET_HEADER + 6] = 2; // an address that somebody has given by hand
        head[NET_HEADER + 12..NET_HEADER + 14].copy_from_slice(&ETHERTYPE.to_be_bytes());
        head[NET_HEADER + 14..NET_HEADER + 22].copy_from_slice(&self.put.to_ne_bytes());
        head[NET_HEADER + 22..].copy_from_slice(&at.to_ne_bytes());
        self.memory.write_slice(&head, GuestAddress(HEADS.0 * PAGE + slot * SLOT))?;
        let index = slot * 2;
        let describe = |number: u64, address: u64, length: usize, flags: u16, next: u64| -> Outcome<()> {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&u32::try_from(length)?.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&u16::try_from(next)?.to_le_bytes());
            Ok(self.memory.write_slice(&bytes, GuestAddress(DESCRIPTORS.0 * PAGE + number * 16))?)
        };
        describe(index, HEADS.1 * PAGE + slot * SLOT, HEAD, 1, index + 1)?;
        describe(index + 1, at * PAGE, BODY, 0, 0)?;
        let available = AVAILABLE.0 * PAGE;
        let place = available + 4 + self.put % u64::from(SLOTS * 2) * 2;
        self.memory.write_slice(&u16::try_from(index)?.to_le_bytes(), GuestAddress(place))?;
        self.put += 1;
        let next = u16::try_from(self.put & 0xffff)?.to_le();
        self.memory.store(next, GuestAddress(available + 2), Ordering::SeqCst)?;
        self.kick()
    }

    pub(super) fn kick(&self) -> Outcome<()> {
        let kick = std::fs::File::from(self.kick.try_clone()?);
        Ok((&kick).write_all(&1_u64.to_ne_bytes())?)
    }

    /// Fills all that a packet of that page is of, and kicks. Linux 7.3 does not ask again for what it was not answered: the ring
    /// waits until it is told.
    pub(super) fn fill_and_kick(&self, at: u64) -> Outcome<()> {
        for at in [DESCRIPTORS.1, AVAILABLE.1, USED.1, HEADS.1, at] {
            let access = if at == USED.1 { Access::RW } else { Access::READ };
            self.subscription.fill(Iova(at * PAGE), access)?;
        }
        self.kick()
    }

    /// The next packet that has arrived, if there is one.
    pub(super) fn hear(&mut self) -> Outcome<Option<Packet>> {
        let mut frame = [0; 256];
        let Some(length) = self.tap.hear(&mut frame)? else { return Ok(None) };
        let frame = frame.get(..length).ok_or("a long frame")?;
        let word = |at: usize| Some(u64::from_ne_bytes(*frame.get(at..)?.first_chunk()?));
        let packet = (|| {
            let body = Body::parse(frame.get(30..)?)?;
            Some(Packet { number: word(14)?, page: word(22)?, body })
        })();
        let packet = packet.ok_or_else(|| format!("a packet that nobody has sent: {frame:x?}"))?;
        if packet.number != self.heard {
            return Err(format!("{packet:?} instead of number {}", self.heard).into());
        }
        self.heard += 1;
        Ok(Some(packet))
    }

    /// Serves the device until a packet arrives, or nothing has for so long.
    pub(super) fn serve_until_heard(&mut self, limit: Duration) -> Outcome<Option<Packet>> {
        let end = Instant::now() + limit;
        loop {
            while self.handle.serve(&self.subscription)?.more {}
            if let Some(packet) = self.hear()? {
                return Ok(Some(packet));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            wait([self.vhost.0.as_raw_fd(), self.tap.socket()], i32::try_from(left.as_millis())?.max(1))?;
        }
    }
}
