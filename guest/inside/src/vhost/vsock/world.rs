//! A record with one endpoint, whose device is the kernel's vhost-vsock: its rings, and what the kernel writes into buffers.

use std::{
    io::Write,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use viommu::{Access, Domain, Endpoint, EndpointConfig, Interest, Iommu, Iova, Subscription, Tables};
use viommu_vhost::kernel::{Device, Handle, Protocol};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

use super::super::{
    sys::{RX, TX, VSOCK_FEATURES, Vhost, event, wait},
    world::{Outcome, PAGE, over, page},
};

/// Pages of the guest's memory, and those from which on buffers are.
pub(super) const MEMORY: u64 = 512;
pub(super) const FIRST_BUFFER: u64 = 16;

/// Descriptors of a ring. A buffer is one of them, in its own part of a page.
pub(super) const SLOTS: u16 = 64;
pub(super) const SLOT: usize = 64;

/// The parts of the rings, pages of memory and of the device's addresses: descriptors, available, used.
const RECEIVE: [(u64, u64); 3] = [(1, 0x5001), (2, 0x5003), (3, 0x5005)];
const SEND: [(u64, u64); 3] = [(4, 0x6001), (5, 0x6003), (6, 0x6005)];
/// What is sent.
pub(super) const OUT: (u64, u64) = (7, 0x6007);

/// Bytes of a packet's header, and the parts that are looked at.
pub(super) const HEADER: usize = 44;
pub(super) const REQUEST: u16 = 1;
pub(super) const RESPONSE: u16 = 2;
pub(super) const RST: u16 = 3;
pub(super) const RW: u16 = 5;
const STREAM: u16 = 1;
const HOST: u64 = 2;

/// What lies in a buffer that nothing was written to, and in one that was taken from the device.
pub(super) const FRESH: u8 = 0xf5;
pub(super) const TAKEN: u8 = 0x7a;

/// A packet, as the kernel has written it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) operation: u16,
    /// The host's port, and the guest's.
    pub(super) ports: (u32, u32),
    pub(super) body: Vec<u8>,
}

impl Packet {
    /// Nothing if this is none of the host's to that guest.
    pub(super) fn parse(bytes: &[u8], cid: u64) -> Option<Self> {
        let wide = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let word = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let half = |at: usize| Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        if (wide(0)?, wide(8)?, half(28)?) != (HOST, cid, STREAM) {
            return None;
        }
        let body = bytes.get(HEADER..)?.get(..usize::try_from(word(24)?).ok()?)?.to_vec();
        Some(Self { operation: half(30)?, ports: (word(16)?, word(20)?), body })
    }
}

pub(super) struct World {
    pub(super) iommu: Iommu,
    pub(super) endpoint: Endpoint,
    pub(super) domain: Domain,
    pub(super) memory: Arc<GuestMemoryMmap<()>>,
    pub(super) handle: Handle,
    pub(super) subscription: Arc<Subscription>,
    pub(super) vhost: Vhost,
    pub(super) cid: u64,
    /// What kicks the rings.
    kicks: [OwnedFd; 2],
    /// Buffers that were given to the receiving ring, and those whose packet was looked at.
    pub(super) given: u64,
    pub(super) heard: u64,
    /// Packets that were put into the sending ring.
    sent: u64,
}

impl World {
    /// With the rings' pages mapped and nothing else, and the device running.
    pub(super) fn new(cid: u64, settings: impl FnOnce(Device, &Vhost) -> Outcome<Device>) -> Outcome<Self> {
        let size = MEMORY * PAGE;
        let half = size / 2;
        let bytes = usize::try_from(half)?;
        let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[
            (GuestAddress(0), bytes),
            (GuestAddress(half), bytes),
        ])?);
        let iommu = Iommu::builder().ram(0, size).table_bytes(16 << 20).build()?;
        let domain = iommu.create_domain(1, Tables::Owned)?;
        let endpoint = iommu.add_endpoint(8, EndpointConfig::default())?;
        over(endpoint.attach(1)?)?;

        let vhost = Vhost::open("/dev/vhost-vsock")?;
        vhost.set_guest_cid(cid)?;
        let host = |gpa: u64| Outcome::Ok(memory.get_host_address(GuestAddress(gpa))?.addr() as u64);
        vhost.set_memory([[0, half, host(0)?, 0], [half, half, host(half)?, 0]])?;
        let protocol = Protocol::negotiate(&vhost.0)?;
        if !protocol.is_v2() {
            return Err("vhost-vsock offers no second version of messages".into());
        }
        let device = settings(Device::new(vhost.duplicate()?, protocol)?, &vhost)?;
        let (cache, handle) = device.cache(memory.clone());
        let subscription = Arc::new(endpoint.subscribe_cache(Box::new(cache), Interest::CACHE)?);
        vhost.set_features(VSOCK_FEATURES)?;
        handle.start()?;

        let kicks = [event()?, event()?];
        for ((index, ring), kick) in [(RX, RECEIVE), (TX, SEND)].into_iter().zip(&kicks) {
            for (memory, at) in ring {
                over(domain.map(page(at, memory, Access::RW)?)?)?;
            }
            vhost.set_ring(index, SLOTS, ring.map(|(_, at)| at * PAGE), kick)?;
        }
        // The kernel writes to the used rings when it starts, and waits for nobody then.
        if vhost.set_running(true).is_ok() {
            return Err("the used rings were written to without an entry".into());
        }
        for [.., (_, used)] in [RECEIVE, SEND] {
            subscription.fill(Iova(used * PAGE), Access::RW)?;
        }
        // Where a worker does all the writing, that is told now.
        if handle.flush().waits {
            return Err("vhost-vsock takes no message".into());
        }
        vhost.set_running(true)?;
        let (given, heard, sent) = (0, 0, 0);
        Ok(Self {
            iommu,
            endpoint,
            domain,
            memory,
            handle,
            subscription,
            vhost,
            cid,
            kicks,
            given,
            heard,
            sent,
        })
    }

    /// Fills a page of memory.
    pub(super) fn paint(&self, memory: u64, byte: u8) -> Outcome<()> {
        let bytes = vec![byte; usize::try_from(PAGE)?];
        Ok(self.memory.write_slice(&bytes, GuestAddress(memory * PAGE))?)
    }

    /// A page of memory.
    pub(super) fn read(&self, memory: u64) -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(PAGE)?];
        self.memory.read_slice(&mut bytes, GuestAddress(memory * PAGE))?;
        Ok(bytes)
    }

    fn kick(&self, ring: u32) -> Outcome<()> {
        let kick = self.kicks.get(usize::try_from(ring)?).ok_or("no such ring")?;
        Ok((&std::fs::File::from(kick.try_clone()?)).write_all(&1_u64.to_ne_bytes())?)
    }

    /// Puts a descriptor into a ring as its `number`th, and kicks.
    fn put(&self, ring: u32, number: u64, address: u64, length: usize) -> Outcome<()> {
        let [(descriptors, _), (available, _), _] = if ring == RX { RECEIVE } else { SEND };
        let slot = number % u64::from(SLOTS);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&u32::try_from(length)?.to_le_bytes());
        bytes[12..14].copy_from_slice(&if ring == RX { 2_u16 } else { 0 }.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(descriptors * PAGE + slot * 16))?;
        let place = GuestAddress(available * PAGE + 4 + slot * 2);
        self.memory.write_slice(&u16::try_from(slot)?.to_le_bytes(), place)?;
        let next = u16::try_from((number + 1) & 0xffff)?.to_le();
        self.memory.store(next, GuestAddress(available * PAGE + 2), Ordering::SeqCst)?;
        self.kick(ring)
    }

    /// Gives the receiving ring a buffer in a page of the device's. There must be room.
    pub(super) fn give(&mut self, at: u64) -> Outcome<()> {
        let offset = self.given % u64::from(SLOTS) * SLOT as u64;
        self.put(RX, self.given, at * PAGE + offset, SLOT)?;
        self.given += 1;
        Ok(())
    }

    /// Puts an answer to a packet into the sending ring.
    pub(super) fn answer(&mut self, packet: &Packet, operation: u16) -> Outcome<()> {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&self.cid.to_le_bytes());
        header[8..16].copy_from_slice(&HOST.to_le_bytes());
        header[16..20].copy_from_slice(&packet.ports.1.to_le_bytes());
        header[20..24].copy_from_slice(&packet.ports.0.to_le_bytes());
        header[28..30].copy_from_slice(&STREAM.to_le_bytes());
        header[30..32].copy_from_slice(&operation.to_le_bytes());
        // As much as ever will be sent.
        header[36..40].copy_from_slice(&0x4000_0000_u32.to_le_bytes());
        let offset = self.sent % u64::from(SLOTS) * SLOT as u64;
        self.memory.write_slice(&header, GuestAddress(OUT.0 * PAGE + offset))?;
        self.put(TX, self.sent, OUT.1 * PAGE + offset, HEADER)?;
        self.sent += 1;
        Ok(())
    }

    /// Fills all that a ring needs for that page, and kicks it: Linux 7.3 does not ask again for what it was not answered.
    pub(super) fn fill_and_kick(&self, ring: u32, at: u64) -> Outcome<()> {
        let [(_, descriptors), (_, available), (_, used)] = if ring == RX { RECEIVE } else { SEND };
        let body = if ring == RX { Access::WRITE } else { Access::READ };
        for (at, access) in
            [(descriptors, Access::READ), (available, Access::READ), (used, Access::RW), (at, body)]
        {
            self.subscription.fill(Iova(at * PAGE), access)?;
        }
        self.kick(ring)
    }

    /// Buffers that the device has given back, as it says itself.
    pub(super) fn given_back(&self) -> Outcome<u64> {
        let used: u16 = self.memory.load(GuestAddress(RECEIVE[2].0 * PAGE + 2), Ordering::Acquire)?;
        let more = u16::from_le(used).wrapping_sub(u16::try_from(self.heard & 0xffff)?);
        Ok(self.heard + u64::from(more))
    }

    /// Serves the device until that is so, or was not for so long; says whether it is.
    pub(super) fn serve_until(
        &self,
        limit: Duration,
        mut so: impl FnMut(&Self) -> Outcome<bool>,
    ) -> Outcome<bool> {
        let end = Instant::now() + limit;
        loop {
            while self.handle.serve(&self.subscription)?.more {}
            if so(self)? {
                return Ok(true);
            }
            if Instant::now() > end {
                return Ok(false);
            }
            wait([self.vhost.0.as_raw_fd(); 2], 2)?;
        }
    }

    /// What lies in the buffer that was given as the `number`th, in a page of memory.
    pub(super) fn buffer(&self, number: u64, memory: u64) -> Outcome<Vec<u8>> {
        let offset = usize::try_from(number % u64::from(SLOTS))? * SLOT;
        Ok(self.read(memory)?.get(offset..offset + SLOT).ok_or("no such buffer")?.to_vec())
    }
}
