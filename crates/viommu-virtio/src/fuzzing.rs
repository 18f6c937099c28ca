//! Any bytes, read as what a hostile guest does to the device: ring memory, descriptors, requests, configuration space,
//! resets, DMA. Recording mirrors check every call they get; afterwards copies, record and the device's own table must
//! agree. For fuzzing and tests alone; nothing here is stable.

use std::sync::Arc;
use std::time::Duration;

use viommu::endpoint::{Region, RegionKind};
use viommu::fuzzing::recording::{Event, Handle, RecordingCache, RecordingMirror};
use viommu::subscribe::Reach;
use viommu::{Access, Endpoint, Interest, Iommu, Iova, IovaRange, Reader, Subscription, View};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

use crate::spec::Features;
use crate::spec::request::{self, Head};
use crate::{Config, EndpointPlan, EventLimits, EventQueue, RequestQueue, VirtioIommu};

const MEMORY: u64 = 1 << 16;
const ENTRIES: u16 = 16;
/// Where each queue's rings lie: descriptors, available, used.
const REQUEST_RINGS: [u32; 3] = [0, 0x100, 0x200];
const EVENT_RINGS: [u32; 3] = [0x400, 0x500, 0x600];
/// Where well-formed requests are put, and their answers.
const REQUESTS: u64 = 0x1000;
const ANSWERS: u64 = 0x2000;
const ROOM: u64 = 0x80;
const PROBE_SIZE: u32 = 64;
const ENDPOINTS: [u32; 3] = [8, 9, 0x1_0000];
const PAGE: u64 = 4096;

type Memory = Arc<GuestMemoryMmap>;

struct Member {
    endpoint: Endpoint,
    reader: Reader,
    /// Who drops one, leaves.
    subscriptions: Vec<Subscription>,
    mirror: Handle,
}

struct World {
    memory: Memory,
    device: VirtioIommu,
    requests: RequestQueue<Memory>,
    events: EventQueue<Memory>,
    members: [Option<Member>; 3],
}

/// Bytes to take from.
struct Input<'d>(&'d [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn bytes(&mut self, count: usize) -> &[u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }
}

fn queue(rings: [u32; 3]) -> Queue {
    let mut queue = Queue::new(ENTRIES).expect("a power of two");
    let [table, avail, used] = rings;
    queue.set_size(ENTRIES);
    queue.set_desc_table_address(Some(table), Some(0));
    queue.set_avail_ring_address(Some(avail), Some(0));
    queue.set_used_ring_address(Some(used), Some(0));
    queue.set_ready(true);
    queue
}

fn device() -> VirtioIommu {
    let builder = Iommu::builder().ram(0, 32 * PAGE).table_bytes(1 << 20).domain_mappings(12).domains(3);
    let events = EventLimits { pending: 4, per_endpoint: 3, per_second: 1000 };
    let config = Config { probe_size: PROBE_SIZE, bypass: false, events, ..Config::default() };
    VirtioIommu::new(builder, config).expect("a configuration of this crate's own")
}

fn member(device: &VirtioIommu, at: usize, shape: u8) -> Option<Member> {
    let reach = Reach {
        apertures: if shape & 1 == 0 {
            vec![IovaRange::ALL]
        } else {
            IovaRange::new(Iova(0), Iova(64 * PAGE - 1)).into_iter().collect()
        },
        entries: (shape & 2 != 0).then_some(4),
        replace: shape & 4 != 0,
        batches: shape & 8 != 0,
        wide_unmap: shape & 16 == 0,
        mmio: shape & 32 != 0,
        ..Reach::default()
    };
    let (mirror, handle) = RecordingMirror::new(reach);
    let (cache, _) = RecordingCache::new();
    let region = IovaRange::new(Iova(6 * PAGE), Iova(7 * PAGE - 1))?;
    let plan = EndpointPlan::default().region(region, RegionKind::Msi);
    let plan = plan.mirror(mirror, Interest::MIRROR).cache(cache, Interest::CACHE);
    let added = device.add_endpoint(ENDPOINTS[at], plan).ok()?;
    let reader = added.endpoint.reader("fuzz")?;
    Some(Member { endpoint: added.endpoint, reader, subscriptions: added.subscriptions, mirror: handle })
}

impl World {
    fn new() -> Self {
        let ranges = [(GuestAddress(0), usize::try_from(MEMORY).expect("small"))];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("64 KiB"));
        Self::over(memory, device())
    }

    fn over(memory: Memory, device: VirtioIommu) -> Self {
        let requests = device.request_queue(queue(REQUEST_RINGS), memory.clone(), || {});
        let events = device.event_queue(queue(EVENT_RINGS), memory.clone(), || {});
        let members = [member(&device, 0, 0), member(&device, 1, 0x2f), None];
        Self { memory, device, requests, events, members }
    }

    fn write(&self, bytes: &[u8], at: u64) {
        // Outside memory there is nothing to write to.
        let _ = self.memory.write_slice(bytes, GuestAddress(at));
    }

    fn entry(&self, table: u64, index: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let mut entry = addr.to_le_bytes().to_vec();
        entry.extend(len.to_le_bytes());
        entry.extend(flags.to_le_bytes());
        entry.extend(next.to_le_bytes());
        self.write(&entry, table + 16 * u64::from(index));
    }

    /// Makes a chain available.
    fn offer(&self, rings: [u32; 3], head: u16) {
        let avail = u64::from(rings[1]);
        let index: u16 = self.memory.read_obj(GuestAddress(avail + 2)).unwrap_or(0);
        self.write(&head.to_le_bytes(), avail + 4 + 2 * u64::from(index % ENTRIES));
        self.write(&index.wrapping_add(1).to_le_bytes(), avail + 2);
    }

    /// A request of a known kind with small numbers, laid over two or three descriptors.
    fn request(&self, input: &mut Input<'_>) {
        let slot = u16::from(input.byte()) % (ENTRIES / 4);
        let (kind, domain) = (input.byte() % 7, u32::from(input.byte() % 5));
        let endpoint = ENDPOINTS[usize::from(input.byte()) % 3];
        let (page, pages, gpa) = (u64::from(input.byte() % 80), u64::from(input.byte() % 8), input.byte());
        let flags = u32::from(input.byte() & 0x17);
        let start = if page == 79 { u64::MAX - 3 * PAGE + 1 } else { page * PAGE };
        let end = start.saturating_add((pages + 1) * PAGE - 1);
        let head = Head { kind, reserved: [0; 3] };
        let mut bytes = match kind {
            request::ATTACH => request::Attach {
                head,
                domain: domain.into(),
                endpoint: endpoint.into(),
                flags: (flags & 3).into(),
                ..Default::default()
            }
            .as_bytes()
            .to_vec(),
            request::DETACH => request::Detach {
                head,
                domain: domain.into(),
                endpoint: endpoint.into(),
                ..Default::default()
            }
            .as_bytes()
            .to_vec(),
            request::MAP => request::Map {
                head,
                domain: domain.into(),
                virt_start: start.into(),
                virt_end: end.into(),
                phys_start: (u64::from(gpa % 40) * PAGE).into(),
                flags: flags.into(),
            }
            .as_bytes()
            .to_vec(),
            request::UNMAP => request::Unmap {
                head,
                domain: domain.into(),
                virt_start: start.into(),
                virt_end: end.into(),
                ..Default::default()
            }
            .as_bytes()
            .to_vec(),
            _ => request::Probe { head, endpoint: endpoint.into(), ..Default::default() }.as_bytes().to_vec(),
        };
        // Sometimes a byte of it is something else, or the end is missing.
        let twist = input.byte();
        if twist & 0x80 != 0 {
            let at = usize::from(input.byte()) % bytes.len();
            bytes[at] = input.byte();
        }
        if twist & 0x40 != 0 {
            bytes.truncate(usize::from(input.byte()) % (bytes.len() + 1));
        }
        let writable = if kind == request::PROBE { PROBE_SIZE + 4 } else { 4 };
        let writable = if twist & 0x20 != 0 { u32::from(input.byte() % 80) } else { writable };
        let (at, to) = (REQUESTS + ROOM * u64::from(slot), ANSWERS + ROOM * u64::from(slot));
        self.write(&bytes, at);
        let len = u32::try_from(bytes.len()).expect("a request");
        let cut = u32::from(twist & 0x1f).min(len);
        let first = slot * 4;
        self.entry(0, first, (at, cut, 1, first + 1));
        self.entry(0, first + 1, (at + u64::from(cut), len - cut, 1, first + 2));
        self.entry(0, first + 2, (to, writable, 2, 0));
        self.offer(REQUEST_RINGS, first);
    }

    fn kick(&mut self) {
        if self.requests.process().is_err() {
            // The device needs a reset; the driver gives it one.
            self.reset(false);
            return;
        }
        self.requests.wait(Duration::from_secs(5)).expect("nobody holds a guard");
        assert_eq!(self.requests.pending(), 0);
    }

    fn reset(&mut self, system: bool) {
        let mut reset = if system { self.device.system_reset() } else { self.device.reset() };
        reset.completion.merge(self.requests.reset());
        self.events.reset();
        reset.completion.wait().expect("nobody holds a guard");
        assert!(self.device.iommu().domains().is_empty(), "domains after a reset");
        for rings in [REQUEST_RINGS, EVENT_RINGS] {
            self.write(&[0; 64], u64::from(rings[1]));
        }
        *self.requests.queue_mut() = queue(REQUEST_RINGS);
        *self.events.queue_mut() = queue(EVENT_RINGS);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 16 {
            0..=4 => self.request(input),
            5..=6 => self.kick(),
            7 => {
                let (at, count) = (u64::from(input.word()), usize::from(input.byte() % 32));
                let bytes = input.bytes(count).to_vec();
                self.write(&bytes, at);
            }
            8 => {
                let index = u16::from(input.byte()) % ENTRIES;
                let (addr, len) = (u64::from(input.word()), u32::from(input.word()) % 96);
                let (flags, next) = (u16::from(input.byte()) & 7, u16::from(input.byte()) % (ENTRIES + 1));
                self.entry(0, index, (addr, len, flags, next));
                self.offer(REQUEST_RINGS, index);
            }
            9 => {
                let (offset, value) = (u64::from(input.byte() % 48), input.byte());
                let done = self.device.write_config(offset, &[value & 3, value >> 6]);
                done.wait().expect("nobody holds a guard");
                let mut bypass = [9];
                self.device.read_config(36, &mut bypass);
                assert!(bypass[0] < 2, "D4: bypass reads {}", bypass[0]);
            }
            10 => {
                let bits = u64::from(input.byte()) | 0x47;
                let done = self.device.negotiate(Features::from_bits_retain(bits));
                done.wait().expect("nobody holds a guard");
            }
            11 => match input.byte() {
                how @ 0..16 => self.reset(how & 1 != 0),
                16..128 => self.plug(input),
                _ => {}
            },
            12..=13 => {
                let at = usize::from(input.byte()) % 3;
                let (page, write) = (u64::from(input.byte() % 80), input.byte() & 1 != 0);
                let access = if write { Access::WRITE } else { Access::READ };
                if let Some(member) = &mut self.members[at] {
                    let _ = member.reader.enter().translate(Iova(page * PAGE + 8), access);
                }
            }
            14 => {
                let index = u16::from(input.byte()) % ENTRIES;
                let len = u32::from(input.byte() % 48);
                self.entry(u64::from(EVENT_RINGS[0]), index, (0x3000 + 64 * u64::from(index), len, 2, 0));
                self.offer(EVENT_RINGS, index);
                if self.events.process().is_err() {
                    self.reset(false);
                }
            }
            _ => {
                let (at, nth) = (usize::from(input.byte()) % 3, usize::from(input.byte() % 4) + 1);
                let unmaps = input.byte() > 240;
                if let Some(member) = &self.members[at] {
                    let of: fn(&Event) -> bool = if unmaps {
                        |event| matches!(event, Event::Unmap(_))
                    } else {
                        |event| matches!(event, Event::Map(_) | Event::Replace(..))
                    };
                    member.mirror.refuse_nth(nth, 1, of);
                }
            }
        }
    }

    /// Endpoints come and go.
    fn plug(&mut self, input: &mut Input<'_>) {
        let at = usize::from(input.byte()) % 3;
        match self.members[at].take() {
            Some(member) => {
                drop(member.reader);
                let done = self.device.remove_endpoint(ENDPOINTS[at]).expect("it is there");
                done.wait().expect("nobody holds a guard");
            }
            None => self.members[at] = member(&self.device, at, input.byte()),
        }
    }

    fn check(&self) {
        self.device.assert_consistent();
        for member in self.members.iter().flatten() {
            for subscription in &member.subscriptions {
                if let Some(audit) = subscription.audit().filter(|_| !subscription.is_fenced()) {
                    assert!(audit.is_clean(), "L16: {audit:?}");
                }
            }
            let regions: Vec<Region> = member.endpoint.regions();
            assert!(regions.len() * 24 <= usize::try_from(PROBE_SIZE).unwrap_or(0));
        }
    }

    /// What is saved can be restored into a device with the same endpoints, and is the same there.
    fn move_away(self) {
        let Self { device, memory, members, .. } = self;
        let saved = device.save().expect("nothing is pending");
        if members.iter().flatten().any(|member| member.endpoint.is_fenced()) {
            return;
        }
        let other = World::over(memory, self::device());
        let mut other = ManuallyMoved(other);
        other.match_members(&members);
        match other.0.device.restore(&saved) {
            Ok(done) => {
                done.wait().expect("nobody holds a guard");
                other.0.check();
                assert_eq!(other.0.device.save().expect("nothing is pending"), saved);
            }
            // Mirrors here hold fewer entries, say.
            Err(_) => other.0.device.assert_consistent(),
        }
    }
}

/// The other side of a migration.
struct ManuallyMoved(World);

impl ManuallyMoved {
    /// Has the endpoints that there are on this side.
    fn match_members(&mut self, members: &[Option<Member>; 3]) {
        for (at, wanted) in members.iter().enumerate() {
            match (wanted.is_some(), self.0.members[at].is_some()) {
                (false, true) => {
                    self.0.members[at] = None;
                    let done = self.0.device.remove_endpoint(ENDPOINTS[at]).expect("it is there");
                    done.wait().expect("nobody holds a guard");
                }
                (true, false) => self.0.members[at] = member(&self.0.device, at, 0),
                _ => {}
            }
        }
    }
}

impl VirtioIommu {
    /// The device's own table says what the record says.
    fn assert_consistent(&self) {
        let control = self.lock();
        for (id, view) in self.iommu().endpoints() {
            let attached = control.attached_to(id.requester);
            let endpoint = self.iommu().endpoint(id).expect("it is there");
            match (attached, endpoint.attached()) {
                (None, None | Some(View::Blocked)) => {}
                (Some((_, true)), Some(View::Identity)) => {}
                (Some((domain, false)), Some(View::Domain(seen))) if domain == seen => {}
                (ours, seen) => panic!("{id} is attached to {ours:?} and sees {seen:?} ({view:?})"),
            }
        }
        for (id, _) in self.iommu().domains() {
            assert!(!self.iommu().endpoints_in(id).is_empty(), "domain {id} has no endpoint");
        }
    }
}

/// Plays the bytes. Any input is legal.
///
/// # Panics
/// When the device, the record or a copy is wrong.
pub fn fuzz_ring(data: &[u8]) {
    // Left where it is when something is wrong: a unit that panicked inside a step cannot be taken apart.
    let mut world = core::mem::ManuallyDrop::new(World::new());
    let mut input = Input(data);
    for _ in 0..256 {
        if input.0.is_empty() {
            break;
        }
        world.step(&mut input);
        world.check();
    }
    world.kick();
    world.check();
    core::mem::ManuallyDrop::into_inner(world).move_away();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fuzz target's body on inputs that are the same everywhere.
    #[test]
    fn seeded_inputs_keep_every_law() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..3_000 {
            let len = next() % 512;
            let bytes: Vec<u8> = (0..len).map(|_| next().to_le_bytes()[3]).collect();
            fuzz_ring(&bytes);
        }
    }
}
