//! A hostile back end, and our front end.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use viommu::{
    Access, Completion, Domain, Endpoint, EndpointConfig, Gpa, Interest, Iommu, Iova, IovaRange, Mapping,
    Subscription, Tables,
};
use viommu_memory::ram_extents;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

use super::{Input, PAGE, PAGES, Peer, STEPS, files, pair};
use crate::spec::{IotlbMsg, VIRTIO_F_ACCESS_PLATFORM, kind};
use crate::user::frontend::{Frontend, FrontendError};
use crate::user::spec::{backend_request, flag, protocol, request};

/// Guest memory: two regions, one behind the other.
const END: u64 = 2 * PAGES * PAGE;

struct World {
    endpoint: Endpoint,
    domain: Domain,
    frontend: Frontend,
    subscription: Subscription,
    _iommu: Iommu,
    embedder: Peer,
    main: Peer,
    back: Peer,
    cut_off: Arc<AtomicU32>,
    active: bool,
    open: bool,
    ended: Option<FrontendError>,
    /// What the guest has mapped, page by page.
    record: BTreeMap<u64, (u64, u8)>,
    /// What the back end was told: page by page, user address and permission.
    told: BTreeMap<u64, (u64, u8)>,
    /// IOTLB messages that came, and the failures among the answers.
    came: usize,
    answered: Vec<u64>,
    /// Unmaps, and the message that each must wait for.
    unmaps: Vec<(Completion, usize)>,
    /// What must be answered on the channel: the request, and the answer where there can be only one.
    asked: VecDeque<(u32, Option<u64>)>,
}

fn memory() -> &'static Arc<GuestMemoryMmap> {
    static MEMORY: OnceLock<Arc<GuestMemoryMmap>> = OnceLock::new();
    MEMORY.get_or_init(|| {
        let bytes = usize::try_from(PAGES * PAGE).expect("small");
        let ranges = [(GuestAddress(0), bytes), (GuestAddress(PAGES * PAGE), bytes)];
        Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("some pages"))
    })
}

fn user(gpa: u64) -> u64 {
    let host = memory().get_host_address(GuestAddress(gpa)).expect("it is memory");
    u64::try_from(host.addr()).expect("64 bits")
}

fn bits(access: Access) -> u8 {
    u8::from(access.contains(Access::READ)) | u8::from(access.contains(Access::WRITE)) << 1
}

impl World {
    fn new() -> Self {
        let extents = ram_extents(&**memory()).expect("it is whole");
        let builder = extents.into_iter().fold(Iommu::builder(), |b, extent| b.backing(extent));
        let iommu = builder.build().expect("it can be");
        let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).expect("room");
        let domain = iommu.create_domain(1, Tables::Owned).expect("room");
        let _nothing = endpoint.attach(1).expect("it is there");
        let (main, theirs) = pair();
        // Nothing here waits for so long.
        let (frontend, embedder) =
            Frontend::new(theirs, Duration::from_secs(3600), None).expect("descriptors");
        let cut_off = Arc::new(AtomicU32::new(0));
        let count = cut_off.clone();
        let cut = move || {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        let cache = frontend.cache(memory().clone(), Box::new(cut));
        let subscription = endpoint.subscribe_cache(Box::new(cache), Interest::CACHE).expect("room");
        let (mut embedder, mut main) = (Peer::new(embedder), Peer::new(main));
        let wanted = protocol::REPLY_ACK | protocol::BACKEND_REQ;
        embedder.say(request::SET_PROTOCOL_FEATURES, flag::VERSION, wanted.as_bytes(), Vec::new());
        embedder.say(request::SET_FEATURES, flag::VERSION, VIRTIO_F_ACCESS_PLATFORM.as_bytes(), Vec::new());
        frontend.process(&subscription).expect("it is what it wants");
        let _protocol = main.heard().expect("the protocol features");
        let mut channel = main.heard().expect("the channel");
        let back = Peer::new(UnixStream::from(channel.fds.pop().expect("a descriptor")));
        assert_eq!(main.heard().map(|message| message.request), Some(request::SET_FEATURES));
        main.say(request::SET_BACKEND_REQ_FD, flag::VERSION | flag::REPLY, 0_u64.as_bytes(), Vec::new());
        let (record, told) = (BTreeMap::new(), BTreeMap::new());
        let (came, answered, unmaps, asked) = (0, Vec::new(), Vec::new(), VecDeque::new());
        let (active, open, _iommu) = (true, true, iommu);
        Self {
            endpoint,
            domain,
            frontend,
            subscription,
            _iommu,
            embedder,
            main,
            back,
            cut_off,
            active,
            open,
            record,
            told,
            ended: None,
            came,
            answered,
            unmaps,
            asked,
        }
    }

    fn turn(&mut self) -> bool {
        self.ended = self.frontend.process(&self.subscription).err();
        self.open = self.ended.is_none();
        self.open
    }

    /// Reads what came for the back end, each against the record as it is.
    fn hear(&mut self) {
        while let Some(message) = self.main.heard() {
            if message.request != request::IOTLB_MSG {
                continue; // the embedder's
            }
            assert_eq!(message.flags, flag::VERSION | flag::NEED_REPLY);
            let body = IotlbMsg::read_from_bytes(&message.payload).expect("its size");
            self.came += 1;
            match body.kind {
                kind::UPDATE => {
                    assert_eq!((body.iova | body.size | body.uaddr) % PAGE, 0);
                    for at in (0..body.size).step_by(4096) {
                        let (gpa, perm) = *self.record.get(&(body.iova + at)).expect("what is not mapped");
                        assert_eq!((user(gpa), perm), (body.uaddr + at, body.perm));
                        self.told.insert(body.iova + at, (body.uaddr + at, perm));
                    }
                }
                kind::INVALIDATE => {
                    let last = body.size.checked_sub(1).and_then(|rest| body.iova.checked_add(rest));
                    let last = last.expect("a range that back ends take");
                    self.told.retain(|page, _| *page + (PAGE - 1) < body.iova || *page > last);
                }
                other => panic!("{other}"),
            }
        }
        while let Some(message) = self.back.heard() {
            let (request, only) = self.asked.pop_front().expect("an answer to nothing");
            let value = message.number().expect("a number");
            assert_eq!((message.request, message.flags), (request, flag::VERSION | flag::REPLY));
            assert!(only.map_or(value < 2, |only| only == value), "{request}: {value}");
        }
        while self.embedder.heard().is_some() {}
    }

    fn check(&mut self) {
        self.hear();
        if self.active && self.open {
            for (page, (uaddr, perm)) in &self.told {
                let there = self.record.get(page).map(|(gpa, perm)| (user(*gpa), *perm));
                assert_eq!(there, Some((*uaddr, *perm)), "{page:#x} is with the back end");
            }
        }
        let (answered, endpoint) = (&self.answered, &self.endpoint);
        let (open, cut_off) = (self.open, &self.cut_off);
        self.unmaps.retain_mut(|(done, after)| {
            let over = done.is_complete();
            let was_answered = answered.len() >= *after;
            assert!(over || open && !was_answered, "complete and not told so");
            let good = was_answered && (*after == 0 || answered[*after - 1] == 0);
            assert!(!over || good || endpoint.is_fenced(), "complete with no answer");
            assert!(!endpoint.is_fenced() || cut_off.load(Ordering::Relaxed) > 0);
            !over
        });
        // A fence closes it.
        self.open &= !self.frontend.is_closed();
        assert!(!self.open || !self.endpoint.is_fenced());
        if !self.endpoint.is_fenced() {
            assert!(self.subscription.audit().is_none_or(|audit| audit.is_clean()));
        }
        if self.open && self.answered.len() == self.came {
            assert!(self.asked.is_empty(), "nothing is to come");
        }
    }

    fn unmap(&mut self, range: IovaRange) {
        let Ok(done) = self.domain.unmap(range) else { return };
        let inside = |page: &u64| range.contains(Iova(*page));
        let had = self.active && self.told.keys().any(inside);
        self.record.retain(|page, _| !inside(page));
        self.hear();
        assert!(!self.open || !self.active || !self.told.keys().any(inside), "not taken back");
        self.unmaps.push((done, if had { self.came } else { 0 }));
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 16 {
            0..3 => {
                let (iova, pages) = (input.address() & !(PAGE - 1), u64::from(input.byte() % 4) + 1);
                let gpa = u64::from(input.byte() % 32) * PAGE;
                let access = [Access::RW, Access::READ, Access::WRITE][usize::from(input.byte()) % 3];
                let Some(mapping) = Mapping::new(Iova(iova), pages * PAGE, Gpa(gpa), access) else { return };
                if gpa + pages * PAGE > END || self.domain.map(mapping).is_err() {
                    return;
                }
                for page in 0..pages {
                    self.record.insert(iova + page * PAGE, (gpa + page * PAGE, bits(access)));
                }
            }
            3..5 => {
                // What the guest has mapped can be taken back as it was mapped, or not at all.
                let first =
                    self.record.keys().nth(usize::from(input.byte()) % self.record.len().max(1)).copied();
                let first = first.unwrap_or_else(|| input.address() & !(PAGE - 1));
                let bytes = (u64::from(input.byte() % 8) + 1) * PAGE;
                if let Some(range) = IovaRange::from_len(Iova(first), bytes) {
                    self.unmap(range);
                }
            }
            5 => self.unmap(IovaRange::ALL),
            6..10 => {
                let known =
                    self.record.keys().nth(usize::from(input.byte()) % self.record.len().max(1)).copied();
                let iova = if input.byte() < 0xc0 { known.unwrap_or(0) + 5 } else { input.address() };
                let how = input.byte();
                let perm = if how < 0xfc { how % 3 + 1 } else { how };
                let asks = input.byte() & 1 != 0;
                let flags = flag::VERSION | if asks { flag::NEED_REPLY } else { 0 };
                let body = IotlbMsg { iova, perm, kind: kind::MISS, ..IotlbMsg::default() };
                let entry = self.record.get(&(iova & !(PAGE - 1)));
                let given = self.active && entry.is_some_and(|(_, has)| has & perm == perm);
                self.request(
                    backend_request::IOTLB_MSG,
                    flags,
                    body.as_bytes(),
                    (!given).then_some(1),
                    perm < 4,
                );
            }
            10..13 => {
                let value = u64::from(input.byte() / 0xf0);
                self.main.say(request::IOTLB_MSG, flag::VERSION | flag::REPLY, value.as_bytes(), Vec::new());
                if self.answered.len() < self.came {
                    self.answered.push(value);
                    assert!(self.turn(), "{:?}", self.ended);
                } else {
                    assert!(!self.turn(), "an answer to nothing");
                }
            }
            13 => {
                // Another answer, and its descriptors: the embedder's.
                let request = u32::from(input.byte() % 20) + 1;
                let count = usize::from(input.byte() % 16);
                let fds = (0..input.byte() % 3)
                    .map(|at| files()[usize::from(at)].try_clone().expect("some").into());
                let fds = fds.collect();
                self.main.say(request, flag::VERSION | flag::REPLY, &input.bytes(count), fds);
                assert_eq!(self.turn(), request != request::SET_BACKEND_REQ_FD);
            }
            14 => match input.byte() {
                0..0x60 => {
                    let features = if input.byte() & 1 == 0 { VIRTIO_F_ACCESS_PLATFORM } else { 0 };
                    let active = features != 0;
                    if active != self.active {
                        self.told.clear();
                    }
                    self.active = active;
                    self.embedder.say(request::SET_FEATURES, flag::VERSION, features.as_bytes(), Vec::new());
                    assert!(self.turn(), "{:?}", self.ended);
                }
                0x60..0xa0 => {
                    let body = IotlbMsg { kind: kind::ACCESS_FAIL, ..IotlbMsg::default() };
                    let flags = flag::VERSION | flag::NEED_REPLY;
                    self.request(backend_request::IOTLB_MSG, flags, body.as_bytes(), Some(0), true);
                }
                0xa0..0xe0 => {
                    let request = u32::from(input.byte()) + 2;
                    let flags = flag::VERSION | flag::NEED_REPLY;
                    self.request(request, flags, &input.bytes(9), Some(1), true);
                }
                0xe0..0xf0 => {
                    let ours = [&self.main, &self.back][usize::from(input.byte() & 1)];
                    ours.socket.shutdown(Shutdown::Write).expect("a socket");
                    assert!(!self.turn());
                }
                _ => {
                    let count = usize::from(input.byte() % 40);
                    let (request, flags) = (u32::from(input.byte() & 3), u32::from(input.byte() & 15));
                    let peer = if input.byte() & 1 == 0 { &mut self.main } else { &mut self.back };
                    peer.say(request, flags, &input.bytes(count), Vec::new());
                    // Whatever it was, and whatever is answered, is the last.
                    let _ends = self.turn();
                    while self.back.heard().is_some() {}
                    self.frontend.close();
                    self.open = false;
                }
            },
            _ => {
                let request = u32::from(input.byte() % 20) + 41;
                self.embedder.say(request, flag::VERSION, &input.bytes(8), Vec::new());
                assert!(self.turn(), "{:?}", self.ended);
            }
        }
    }

    fn request(&mut self, request: u32, flags: u32, payload: &[u8], only: Option<u64>, good: bool) {
        if flags & flag::NEED_REPLY != 0 && good {
            self.asked.push_back((request, only));
        }
        self.back.say(request, flags, payload, Vec::new());
        assert_eq!(self.turn(), good, "{:?}", self.ended);
    }
}

pub(super) fn play(input: &mut Input<'_>) {
    let mut world = World::new();
    for _ in 0..STEPS {
        if input.0.is_empty() || !world.open {
            break;
        }
        world.step(input);
        world.check();
    }
    world.frontend.close();
    world.open = false;
    world.check();
}

/// Any bytes on both sockets, and the end.
pub(super) fn stream(bytes: &[u8]) {
    let mut world = World::new();
    let page = Mapping::new(Iova(0), PAGE, Gpa(0), Access::RW).expect("a page");
    world.domain.map(page).map(drop).expect("room");
    world.record.insert(0, (0, 3));
    // What one socket holds, so that nobody waits.
    let (back, main) = bytes[..bytes.len().min(8192)].split_at(bytes.len().min(8192) / 2);
    (&world.back.socket).write_all(back).expect("there is room");
    (&world.main.socket).write_all(main).expect("there is room");
    world.main.socket.shutdown(Shutdown::Write).expect("a socket");
    while world.turn() {}
    assert!(world.domain.unmap(IovaRange::ALL).expect("it can be").is_complete());
}
