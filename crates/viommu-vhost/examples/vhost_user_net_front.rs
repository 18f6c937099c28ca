//! A VMM's end of a network device in another process, and its guest: `vhost_user_net_front SOCKET` connects to a back end that
//! sends each packet back with its two addresses exchanged, and checks that it does, through mappings that come and go. Says at
//! its end what went through the device's IOTLB. DPDK's testpmd is such a back end:
//! ```text
//! dpdk-testpmd --no-huge -m 128 --no-pci --vdev net_vhost0,iface=SOCKET,iommu-support=1,queues=1 --
//!     --forward-mode=macswap --auto-start --no-mlockall --total-num-mbufs=4096
//! ```
//! The vhost-user code is the `vhost` crate's `Frontend`; viommu's is between it and the socket.

use std::error::Error;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vhost::vhost_user::{
    Frontend as VhostFrontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use viommu::{Access, Domain, EndpointConfig, Gpa, Interest, Iommu, Iova, IovaRange, Mapping, Tables};
use viommu_memory::ram_extents;
use viommu_vhost::spec::VIRTIO_F_ACCESS_PLATFORM;
use viommu_vhost::user::frontend::{Frontend, Peer};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

type Outcome<T> = Result<T, Box<dyn Error>>;

const PAGE: u64 = 4096;
const MEMORY: u64 = 4 << 20;
const SIZE: u16 = 128;
/// Where the device sees the rings, and the buffers: each page of those is a mapping of its own.
const RINGS: u64 = 1 << 32;
const BUFFERS: u64 = 2 << 32;
/// The guest physical addresses of buffers, the first and the second time.
const PLACES: [u64; 2] = [1 << 20, 2 << 20];
const PACKETS: u16 = 32;
const LIMIT: Duration = Duration::from_secs(10);
/// Before each frame, since VIRTIO_F_VERSION_1 was negotiated.
const HEADER: u64 = 12;
const FRAME: u64 = 64;

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let [socket] = &words[..] else {
        eprintln!("error: it takes a socket's path");
        return ExitCode::from(2);
    };
    match run(socket) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(socket: &str) -> Outcome<()> {
    let memory = Arc::new(memory()?);
    let builder = ram_extents(&*memory)?.into_iter().fold(Iommu::builder(), |b, extent| b.backing(extent));
    let iommu = builder.build()?;
    let endpoint = iommu.add_endpoint(8, EndpointConfig::default())?;
    let domain = iommu.create_domain(1, Tables::Owned)?;
    endpoint.attach(1)?.wait()?;

    let main = UnixStream::connect(socket)?;
    let peer = Peer::of(&main)?;
    let (frontend, inner) = Frontend::new(main, LIMIT, None)?;
    let cache = frontend.cache(memory.clone(), Box::new(move || peer.kill(LIMIT)));
    let subscription = endpoint.subscribe_cache(Box::new(cache), Interest::CACHE)?;

    thread::scope(|scope| {
        let loop_of_it = scope.spawn(|| frontend.serve(&subscription));
        // Its end would end the connection.
        let mut guest = Guest::new(&memory, &domain, inner);
        let outcome = match &mut guest {
            Ok(guest) => guest.run(&frontend).and_then(|sent| guest.stop().map(|()| sent)),
            Err(error) => Err(error.to_string().into()),
        };
        let audit = subscription.audit();
        // It holds nothing any more, so nobody has to be cut off when the connection ends.
        let emptied = subscription.replay().map_err(|error| error.to_string());
        let emptied =
            emptied.and_then(|mut done| done.wait_timeout(LIMIT).map_err(|error| error.to_string()));
        frontend.close();
        let ended = loop_of_it.join().map_err(|_| "the loop has panicked")?;
        let (sent, lost) = outcome.map_err(|error| format!("{error}; the connection: {ended}"))?;
        emptied?;
        if endpoint.is_fenced() {
            return Err(format!("the device was cut off; the connection: {ended}").into());
        }
        if !audit.as_ref().is_some_and(|audit| audit.is_clean()) {
            return Err(format!("the back end may hold what is not mapped: {audit:?}").into());
        }
        let counts = frontend.counts();
        println!(
            "iotlb packets={sent} lost={lost} misses={} refused={} updates={} invalidates={}",
            counts.misses, counts.misses_refused, counts.updates, counts.invalidates
        );
        Ok(())
    })
}

fn memory() -> Outcome<GuestMemoryMmap> {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, MEMORY)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK)?;
    let file = Some(FileOffset::new(File::from(fd), 0));
    let region = GuestRegionMmap::from_range(GuestAddress(0), usize::try_from(MEMORY)?, file)?;
    Ok(GuestMemoryMmap::from_regions(vec![region])?)
}

/// A split ring in guest memory: three pages from `start` on.
struct Ring {
    start: u64,
    posted: u16,
    seen: u16,
}

impl Ring {
    /// Posts one buffer; descriptor and buffer are those of `slot`.
    fn post(
        &mut self,
        memory: &GuestMemoryMmap,
        slot: u16,
        iova: u64,
        len: u32,
        writable: bool,
    ) -> Outcome<()> {
        let descriptor = self.start + u64::from(slot) * 16;
        memory.write_obj(iova, GuestAddress(descriptor))?;
        memory.write_obj(len, GuestAddress(descriptor + 8))?;
        memory.write_obj(if writable { 2_u16 } else { 0 }, GuestAddress(descriptor + 12))?;
        let available = self.start + PAGE;
        memory.write_obj(slot, GuestAddress(available + 4 + u64::from(self.posted % SIZE) * 2))?;
        self.posted = self.posted.wrapping_add(1);
        memory.store(self.posted, GuestAddress(available + 2), Ordering::Release)?;
        Ok(())
    }

    /// The next used slot and its bytes; `None` when there is none yet.
    fn used(&mut self, memory: &GuestMemoryMmap) -> Outcome<Option<(u16, u32)>> {
        let used = self.start + 2 * PAGE;
        let index: u16 = memory.load(GuestAddress(used + 2), Ordering::Acquire)?;
        if index == self.seen {
            return Ok(None);
        }
        let element = used + 4 + u64::from(self.seen % SIZE) * 8;
        let (slot, len): (u32, u32) =
            (memory.read_obj(GuestAddress(element))?, memory.read_obj(GuestAddress(element + 4))?);
        self.seen = self.seen.wrapping_add(1);
        Ok(Some((u16::try_from(slot)?, len)))
    }
}

struct Guest<'a> {
    memory: &'a GuestMemoryMmap,
    domain: &'a Domain,
    /// What the guest receives into, and what it sends from.
    rings: [Ring; 2],
    /// Receive buffers that are not posted.
    free: Vec<u16>,
    /// Packets that have not come back: a device may drop some while it asks for its buffers.
    lost: u32,
    kick: EventFd,
    vhost: VhostFrontend,
}

impl<'a> Guest<'a> {
    /// Maps the rings and starts the device.
    fn new(memory: &'a GuestMemoryMmap, domain: &'a Domain, inner: UnixStream) -> Outcome<Self> {
        domain.map(Mapping::new(Iova(RINGS), 6 * PAGE, Gpa(0), Access::RW).ok_or("no range")?)?.wait()?;
        let mut vhost = VhostFrontend::from_stream(inner, 2);
        vhost.set_owner()?;
        let offered = vhost.get_features()?;
        let wanted = VIRTIO_F_ACCESS_PLATFORM | 1 << 32 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if offered & wanted != wanted {
            return Err(format!("the back end offers {offered:#x}").into());
        }
        let wanted_too = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::BACKEND_REQ;
        if !vhost.get_protocol_features()?.contains(wanted_too) {
            return Err("the back end has no REPLY_ACK or no BACKEND_REQ".into());
        }
        vhost.set_protocol_features(wanted_too)?;
        vhost.set_features(wanted)?;
        vhost.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        let table: Result<Vec<_>, _> =
            memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect();
        vhost.set_mem_table(&table?)?;
        let kick = EventFd::new(0)?;
        for index in 0..2_usize {
            let start = RINGS + u64::try_from(index)? * 3 * PAGE;
            vhost.set_vring_num(index, SIZE)?;
            vhost.set_vring_base(index, 0)?;
            let rings = VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                flags: 0,
                desc_table_addr: start,
                avail_ring_addr: start + PAGE,
                used_ring_addr: start + 2 * PAGE,
                log_addr: None,
            };
            vhost.set_vring_addr(index, &rings)?;
            vhost.set_vring_call(index, &EventFd::new(0)?)?;
            vhost.set_vring_kick(index, &kick)?;
        }
        for index in 0..2 {
            vhost.set_vring_enable(index, true)?;
        }
        let ring = |start| Ring { start, posted: 0, seen: 0 };
        Ok(Self {
            memory,
            domain,
            rings: [ring(0), ring(3 * PAGE)],
            free: (0..PACKETS).collect(),
            lost: 0,
            kick,
            vhost,
        })
    }

    fn stop(&mut self) -> Outcome<()> {
        for index in 0..2 {
            self.vhost.get_vring_base(index)?;
        }
        Ok(())
    }

    fn iova(slot: u16, receive: bool) -> u64 {
        BUFFERS + (u64::from(slot) * 2 + u64::from(receive)) * PAGE
    }

    /// The guest physical address of a buffer that lies at one of the [`PLACES`], in an order of its own.
    fn gpa(place: u64, slot: u16, receive: bool) -> u64 {
        place + (u64::from(PACKETS - 1 - slot) * 2 + u64::from(receive)) * PAGE
    }

    /// Sends the same packets through mappings to one place, then to another, then through none. Packets that
    /// came back, and those that were lost and sent again.
    fn run(&mut self, frontend: &Frontend) -> Outcome<(u32, u32)> {
        let mut sent = 0;
        for (round, place) in (0_u8..).zip(PLACES) {
            for slot in 0..PACKETS {
                for receive in [false, true] {
                    // The device may only read what is sent.
                    let access = if receive { Access::RW } else { Access::READ };
                    let gpa = Gpa(Self::gpa(place, slot, receive));
                    let mapping =
                        Mapping::new(Iova(Self::iova(slot, receive)), PAGE, gpa, access).ok_or("no range")?;
                    self.domain.map(mapping)?.wait()?;
                }
            }
            for _ in 0..4 {
                self.packets(place, round)?;
                sent += u32::from(PACKETS);
            }
            // Buffers go while the rings stay.
            let buffers =
                IovaRange::from_len(Iova(BUFFERS), u64::from(PACKETS) * 2 * PAGE).ok_or("no range")?;
            let mut done = self.domain.unmap(buffers)?;
            done.wait_timeout(LIMIT)?;
        }
        // Nothing is mapped: what is posted now reaches nothing, and memory stays as it is.
        let place = PLACES[1];
        for slot in 0..PACKETS {
            for receive in [false, true] {
                self.memory.write_slice(&[0xaa; 4096], GuestAddress(Self::gpa(place, slot, receive)))?;
            }
        }
        let before = frontend.counts().misses_refused;
        let all: Vec<u16> = (0..PACKETS).collect();
        self.post(&all)?;
        let until = Instant::now() + LIMIT;
        while frontend.counts().misses_refused == before {
            if Instant::now() > until {
                return Err("the device does not ask for what is not mapped".into());
            }
            thread::sleep(Duration::from_millis(10));
        }
        thread::sleep(Duration::from_millis(300));
        if self.rings[0].used(self.memory)?.is_some() {
            return Err("a packet was received into what is not mapped".into());
        }
        for slot in 0..PACKETS {
            let mut page = [0; 4096];
            self.memory.read_slice(&mut page, GuestAddress(Self::gpa(place, slot, true)))?;
            if page.iter().any(|byte| *byte != 0xaa) {
                return Err(format!("the buffer {slot} was written after its unmap").into());
            }
        }
        Ok((sent, self.lost))
    }

    /// Posts all receive buffers that are free, and the packets of these slots.
    fn post(&mut self, packets: &[u16]) -> Outcome<()> {
        for slot in self.free.drain(..) {
            self.rings[0].post(self.memory, slot, Self::iova(slot, true), u32::try_from(PAGE)?, true)?;
        }
        for slot in packets {
            let len = u32::try_from(HEADER + FRAME)?;
            self.rings[1].post(self.memory, *slot, Self::iova(*slot, false), len, false)?;
        }
        self.kick.write(1)?;
        Ok(())
    }

    /// Sends a packet from each buffer and receives them all.
    fn packets(&mut self, place: u64, round: u8) -> Outcome<()> {
        let frame = |slot: u16| {
            let mut frame = [0_u8; 64];
            frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
            frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
            frame[12..14].copy_from_slice(&[0x88, 0xb5]);
            let number = slot.to_be_bytes();
            frame[14..].iter_mut().enumerate().for_each(|(n, byte)| *byte = number[n % 2] ^ round);
            frame
        };
        for slot in 0..PACKETS {
            let at = Self::gpa(place, slot, false);
            self.memory.write_slice(&[0; 12], GuestAddress(at))?;
            self.memory.write_slice(&frame(slot), GuestAddress(at + HEADER))?;
            self.memory.write_slice(&[0; 128], GuestAddress(Self::gpa(place, slot, true)))?;
        }
        let until = Instant::now() + LIMIT;
        let mut left: Vec<u16> = (0..PACKETS).collect();
        self.post(&left)?;
        let mut quiet = Instant::now();
        while !left.is_empty() || self.rings[1].seen != self.rings[1].posted {
            if Instant::now() > until {
                return Err(format!("{} packets of {PACKETS} have not come back", left.len()).into());
            }
            let given_back = self.rings[1].used(self.memory)?.is_some();
            let Some((slot, len)) = self.rings[0].used(self.memory)? else {
                if given_back {
                    quiet = Instant::now();
                } else if self.rings[1].seen == self.rings[1].posted
                    && quiet.elapsed() > Duration::from_millis(200)
                {
                    self.lost += u32::try_from(left.len())?;
                    self.post(&left)?;
                    quiet = Instant::now();
                } else {
                    thread::sleep(Duration::from_millis(1));
                }
                continue;
            };
            quiet = Instant::now();
            self.free.push(slot);
            let mut got = [0_u8; 64];
            self.memory.read_slice(&mut got, GuestAddress(Self::gpa(place, slot, true) + HEADER))?;
            if u64::from(len) != HEADER + FRAME {
                return Err(format!("a packet of {len} bytes").into());
            }
            got[..12].rotate_left(6);
            let which = left.iter().position(|sent| frame(*sent) == got);
            let which = which.ok_or_else(|| format!("a packet that was not sent: {got:x?}"))?;
            left.swap_remove(which);
        }
        Ok(())
    }
}
