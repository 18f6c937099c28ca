//! A hostile front end, and our back end.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::time::Duration;

use viommu::{Access, Iova};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, Permissions};
use zerocopy::{FromBytes, IntoBytes};

use super::{Input, PAGE, PAGES, PLACES, Peer, STEPS, files, pair};
use crate::spec::{IotlbMsg, VIRTIO_F_ACCESS_PLATFORM, kind};
use crate::user::backend::{Backend, BackendOptions, DeviceMemory};
use crate::user::spec::{MemoryRegion, MemoryTable, backend_request, flag, protocol, request};

/// Entries of an IOTLB that gets full.
const FEW: u64 = 3;
/// Where the front end says that it has its memory.
const USER: u64 = 0x7000_0000_0000;

#[derive(Clone, Copy, PartialEq)]
enum View {
    Nothing,
    Identity,
    Translated,
}

/// A region, and which of the files it is in.
#[derive(Clone, Copy)]
struct Region {
    guest: u64,
    size: u64,
    user: u64,
    offset: u64,
    file: usize,
}

enum Verdict {
    Answer(u64),
    /// As it was, to the daemon.
    Forward,
    /// An answer if one is asked for.
    Taken,
    Ends,
}

struct World {
    backend: Backend,
    space: DeviceMemory,
    main: Peer,
    daemon: Peer,
    channel: Option<Peer>,
    /// MISSes on the channel that are not answered.
    asked: usize,
    replies: bool,
    /// Of the next channel.
    replies_next: bool,
    few: bool,
    open: bool,
    regions: Vec<Region>,
    /// Page by page: where, and what may be done.
    entries: BTreeMap<u64, (u64, u8)>,
    view: View,
    /// What the last UPDATE gave, or nothing, until it has been looked at.
    latest: Option<(u64, u64)>,
}

fn options(few: bool) -> BackendOptions {
    let entries = if few { FEW } else { 1 << 16 };
    BackendOptions { patience: Duration::ZERO, limit: Duration::ZERO, entries, allow_unsealed: false }
}

fn region(said: &MemoryRegion, file: usize) -> Region {
    let (guest, size) = (said.guest.get(), said.size.get());
    Region { guest, size, user: said.user.get(), offset: said.offset.get(), file }
}

/// Whether these can be a memory table.
fn sane(regions: &[Region]) -> bool {
    let wide = |start: u64, size: u64| (u128::from(start), u128::from(start) + u128::from(size));
    let meet = |a: (u128, u128), b: (u128, u128)| a.0 < b.1 && b.0 < a.1;
    regions.iter().enumerate().all(|(at, r)| {
        let whole = [r.guest, r.size, r.user, r.offset].iter().all(|number| number % PAGE == 0);
        let ends = [wide(r.guest, r.size), wide(r.user, r.size)].iter().all(|(_, end)| *end <= 1 << 64);
        let in_file = r.file < 2 && wide(r.offset, r.size).1 <= u128::from(PAGES * PAGE);
        let alone = regions[..at].iter().all(|o| {
            !meet(wide(r.guest, r.size), wide(o.guest, o.size))
                && !meet(wide(r.user, r.size), wide(o.user, o.size))
        });
        r.size != 0 && whole && ends && in_file && alone
    })
}

impl World {
    fn new(few: bool) -> Self {
        let (main, theirs) = pair();
        let (backend, daemon) = Backend::new(theirs, options(few)).expect("descriptors");
        let space = backend.memory().expect("it is open");
        let (main, daemon) = (Peer::new(main), Peer::new(daemon));
        let (channel, asked, replies, open) = (None, 0, false, true);
        let (regions, entries, view) = (Vec::new(), BTreeMap::new(), View::Nothing);
        Self {
            backend,
            space,
            main,
            daemon,
            channel,
            asked,
            replies,
            replies_next: false,
            few,
            open,
            regions,
            entries,
            view,
            latest: None,
        }
    }

    /// What a front end says before the device runs.
    fn begin(&mut self) {
        let flags = flag::VERSION;
        let protocol = protocol::REPLY_ACK | protocol::BACKEND_REQ;
        self.tell(request::SET_PROTOCOL_FEATURES, flags, protocol.as_bytes(), &[]);
        self.tell(request::SET_BACKEND_REQ_FD, flags, &[], &[0]);
        self.tell(request::SET_FEATURES, flags, VIRTIO_F_ACCESS_PLATFORM.as_bytes(), &[]);
        for (nth, file) in [(0, 0), (1, 1)] {
            let (guest, user) = (nth << 20, USER + (nth << 20));
            let said = Region { guest, size: 12 * PAGE, user, offset: nth * PAGE, file }.said();
            self.tell(request::ADD_MEM_REG, flags, &[&[0; 8], said.as_bytes()].concat(), &[file]);
        }
    }

    fn guest_of(&self, user: u64, size: u64) -> Option<u64> {
        let wide = |start: u64, size: u64| u128::from(start) + u128::from(size);
        let inside = |r: &&Region| user >= r.user && wide(user, size) <= wide(r.user, r.size);
        self.regions.iter().find(inside).map(|r| user - r.user + r.guest)
    }

    fn drop_range(&mut self, first: u64, last: u64) {
        self.entries.retain(|page, _| *page + (PAGE - 1) < first || *page > last);
    }

    /// What an IOTLB message does; what it has put there.
    fn iotlb(&mut self, payload: &[u8]) -> Verdict {
        if payload.len() < 26 || payload.len() > 32 {
            return Verdict::Ends;
        }
        let whole = [payload, &[0; 32][payload.len()..]].concat();
        let body = IotlbMsg::read_from_bytes(&whole).expect("its size");
        let Some(last) = body.size.checked_sub(1).and_then(|rest| body.iova.checked_add(rest)) else {
            return Verdict::Answer(1);
        };
        match (body.kind, body.perm) {
            (kind::INVALIDATE, _) | (kind::UPDATE, 0) => {
                self.drop_range(body.iova, last);
                self.latest = Some((1, 0));
                Verdict::Answer(0)
            }
            (kind::UPDATE, 1..=3) => {
                let guest = self.guest_of(body.uaddr, body.size);
                let Some(guest) = guest.filter(|guest| (guest | body.iova | body.size) % PAGE == 0) else {
                    return Verdict::Answer(1);
                };
                for at in (0..body.size).step_by(4096) {
                    self.entries.insert(body.iova + at, (guest + at, body.perm));
                }
                self.latest = Some((body.iova, last));
                Verdict::Answer(0)
            }
            (kind::UPDATE, _) => Verdict::Answer(1),
            _ => Verdict::Ends,
        }
    }

    /// What a message does, other than an IOTLB message.
    fn other(&mut self, request: u32, payload: &[u8], kinds: &[usize]) -> Verdict {
        let number = u64::read_from_bytes(payload);
        match request {
            request::SET_BACKEND_REQ_FD if kinds.is_empty() => return Verdict::Ends,
            request::SET_BACKEND_REQ_FD => return Verdict::Taken,
            request::SET_FEATURES => {
                let Ok(features) = number else { return Verdict::Ends };
                let translated = features & VIRTIO_F_ACCESS_PLATFORM != 0;
                self.view = if translated { View::Translated } else { View::Identity };
                self.entries.clear();
            }
            request::SET_PROTOCOL_FEATURES => {
                self.replies_next = number.unwrap_or(0) & protocol::REPLY_ACK != 0;
            }
            request::SET_MEM_TABLE => {
                let Ok((head, rest)) = MemoryTable::read_from_prefix(payload) else { return Verdict::Ends };
                let count = usize::try_from(head.regions.get()).unwrap_or(usize::MAX);
                if count != kinds.len() || rest.len() < count * 32 {
                    return Verdict::Ends;
                }
                let said = rest.chunks_exact(32).zip(kinds);
                let said =
                    said.map(|(r, file)| region(&MemoryRegion::read_from_bytes(r).expect("its size"), *file));
                return self.table(said.collect());
            }
            request::ADD_MEM_REG | request::REM_MEM_REG => {
                let rest = payload.get(8..).unwrap_or_default();
                let Ok((said, _)) = MemoryRegion::read_from_prefix(rest) else { return Verdict::Ends };
                let mut regions = self.regions.clone();
                if request == request::ADD_MEM_REG {
                    let Some(file) = kinds.last() else { return Verdict::Ends };
                    regions.push(region(&said, *file));
                } else {
                    let gone = region(&said, 0);
                    regions.retain(|r| (r.guest, r.size, r.user) != (gone.guest, gone.size, gone.user));
                    if regions.len() == self.regions.len() {
                        return Verdict::Ends;
                    }
                }
                return self.table(regions);
            }
            _ => {}
        }
        Verdict::Forward
    }

    fn table(&mut self, regions: Vec<Region>) -> Verdict {
        if !sane(&regions) {
            return Verdict::Ends;
        }
        self.regions = regions;
        self.entries.clear();
        Verdict::Forward
    }

    /// Sends a message, has it served, and looks at what comes of it.
    fn tell(&mut self, request: u32, flags: u32, payload: &[u8], kinds: &[usize]) {
        let mut verdict = match request {
            _ if flags & flag::VERSION_MASK != flag::VERSION => Verdict::Ends,
            request::IOTLB_MSG => self.iotlb(payload),
            _ => self.other(request, payload, kinds),
        };
        let mut fds: Vec<OwnedFd> =
            kinds.iter().map(|kind| files()[*kind % 4].try_clone().expect("some").into()).collect();
        // Its end would be the connection's, until there is another.
        let _old = matches!(verdict, Verdict::Taken).then(|| self.channel.take());
        if matches!(verdict, Verdict::Taken) {
            if kinds.last() == Some(&0) {
                let (ours, theirs) = pair();
                fds.push(theirs.into());
                (self.channel, self.asked, self.replies) = (Some(Peer::new(ours)), 0, self.replies_next);
            } else {
                verdict = Verdict::Ends; // no socket
            }
        }
        self.main.say(request, flags, payload, fds);
        let outcome = self.backend.process();
        assert_eq!(outcome.is_err(), matches!(verdict, Verdict::Ends), "{request} {payload:x?}: {outcome:?}");
        self.open = outcome.is_ok();
        let answer = match verdict {
            Verdict::Answer(value) => Some(value),
            Verdict::Taken => (flags & flag::NEED_REPLY != 0).then_some(0),
            Verdict::Forward | Verdict::Ends => None,
        };
        let heard = self.main.heard();
        // That a channel is none is found when it is read, after the answer.
        if self.open || request != request::SET_BACKEND_REQ_FD {
            let heard = heard.map(|message| (message.request, message.number()));
            assert_eq!(heard, answer.map(|value| (request, Some(value))));
        }
        let passed = self.daemon.heard();
        assert_eq!(passed.is_some(), matches!(verdict, Verdict::Forward), "{request}");
        if let Some(passed) = passed {
            assert_eq!((passed.request, passed.flags, &passed.payload[..]), (request, flags, payload));
            assert!(passed.fds.len() <= kinds.len());
        }
    }

    fn seen(&self, page: u64) -> Option<(u64, u8)> {
        match self.view {
            _ if !self.open => None,
            View::Nothing => None,
            View::Identity => {
                let there = |r: &&Region| page >= r.guest && page - r.guest < r.size;
                self.regions.iter().find(there).map(|_| (page, 3))
            }
            View::Translated => self.entries.get(&page).copied(),
        }
    }

    /// The word that lies at the start of a page of guest memory.
    fn word(&self, guest: u64) -> u64 {
        let there = |r: &&Region| guest >= r.guest && guest - r.guest < r.size;
        let r = self.regions.iter().find(there).expect("it is mapped");
        let tag = u64::try_from(r.file).expect("small") + 1;
        (tag << 32) + (guest - r.guest + r.offset) / PAGE
    }

    fn pages() -> impl Iterator<Item = u64> {
        PLACES.into_iter().flat_map(|place| (0..32).map(move |page| place + page * PAGE))
    }

    fn check(&mut self) {
        let guard = self.space.memory();
        let found = |page| {
            let read = guard.translator().probe(Iova(page), Access::READ).ok().map(|hit| hit.gpa.0);
            let write = guard.translator().probe(Iova(page), Access::WRITE).ok().map(|hit| hit.gpa.0);
            let perm = u8::from(read.is_some()) | u8::from(write.is_some()) << 1;
            read.or(write).map(|gpa| (gpa, perm))
        };
        if let Some((first, last)) = self.latest.take().filter(|_| self.few)
            && self
                .entries
                .iter()
                .any(|(page, entry)| Self::pages().any(|p| p == *page) && found(*page) != Some(*entry))
            && self.view == View::Translated
        {
            // It was full, and has dropped all before.
            self.entries.retain(|page, _| (first..=last).contains(page));
        }
        for page in Self::pages() {
            let seen = self.seen(page);
            assert_eq!(found(page), seen, "{page:#x}");
            if let Some((guest, perm)) = seen
                && perm & 1 != 0
            {
                assert_eq!(
                    guard.read_obj::<u64>(GuestAddress(page)).ok(),
                    Some(self.word(guest)),
                    "{page:#x}"
                );
            }
        }
        assert!(!self.few || self.backend.entries() <= 3);
    }

    /// An access of the device's, which waits for nothing.
    fn access(&mut self, at: u64, bytes: u64, write: bool) {
        let access = if write { Permissions::Write } else { Permissions::Read };
        let last = at.checked_add(bytes - 1);
        let bit = if write { 2 } else { 1 };
        let all = last.is_some_and(|last| {
            (at & !(PAGE - 1)..=last)
                .step_by(4096)
                .all(|page| self.seen(page).is_some_and(|(_, perm)| perm & bit != 0))
        });
        let bytes = usize::try_from(bytes).expect("small");
        assert_eq!(self.space.memory().check_range(GuestAddress(at), bytes, access), all);
        self.misses();
    }

    fn misses(&mut self) {
        let mut pages = Vec::new();
        if let Some(channel) = &mut self.channel {
            while let Some(message) = channel.heard() {
                assert_eq!(
                    (message.request, message.wants_answer()),
                    (backend_request::IOTLB_MSG, self.replies)
                );
                let body = IotlbMsg::read_from_bytes(&message.payload).expect("its size");
                assert_eq!((body.kind, body.iova % PAGE), (kind::MISS, 0));
                pages.push((body.iova, body.perm));
            }
        }
        self.asked += if self.replies { pages.len() } else { 0 };
        for (page, perm) in pages {
            assert!(self.seen(page).is_none_or(|(_, has)| has & perm != perm), "{page:#x} is there");
        }
    }

    fn answer(&mut self, request: u32, payload: &[u8]) {
        let Some(channel) = &mut self.channel else { return };
        channel.say(request, flag::VERSION | flag::REPLY, payload, Vec::new());
        let good = request == backend_request::IOTLB_MSG && payload.len() == 8 && self.asked > 0;
        self.asked = self.asked.saturating_sub(1);
        self.open = self.backend.process().is_ok();
        assert_eq!(self.open, good);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let flags = match input.byte() {
            0..0x70 => flag::VERSION | flag::NEED_REPLY,
            0x70..0xf8 => flag::VERSION,
            other => u32::from(other & 15),
        };
        match input.byte() % 16 {
            0..6 => {
                let mut body = IotlbMsg { iova: input.address(), size: input.size(), ..IotlbMsg::default() };
                let user = self.regions.get(usize::from(input.byte()) % 4).map_or(USER, |r| r.user);
                body.uaddr = user.wrapping_add(u64::from(input.byte()) % 16 * PAGE);
                match input.byte() {
                    0..0xf0 => {}
                    0xf0 => body.uaddr = u64::MAX,
                    0xf1 => body.uaddr |= 0x800,
                    _ => body.uaddr = input.address(),
                }
                let how = input.byte();
                body.kind = if how < 0xf8 { kind::UPDATE + u8::from(how & 7 > 4) } else { how & 7 };
                body.perm = if input.byte() < 0xf0 { how >> 3 & 3 } else { how };
                let cut = match input.byte() {
                    0..0xf0 => 32,
                    cut => 20 + usize::from(cut & 15),
                };
                let bytes = [body.as_bytes(), &[0; 8]].concat();
                self.tell(request::IOTLB_MSG, flags, &bytes[..cut], &[]);
            }
            6..8 => self.add(input, flags),
            8 => {
                let at = usize::from(input.byte()) % 4;
                let Some(gone) = self.regions.get(at).copied() else { return self.add(input, flags) };
                let size = if input.byte() < 0xf0 { gone.size } else { input.size() };
                let said = Region { size, ..gone }.said();
                self.tell(request::REM_MEM_REG, flags, &[&[0; 8], said.as_bytes()].concat(), &[]);
            }
            9 => {
                let count = input.byte() % 4;
                let (said, kinds): (Vec<_>, Vec<_>) =
                    (0..count).map(|nth| Region::from(input, nth)).map(|r| (r.said(), r.file)).unzip();
                let regions = u32::from(if input.byte() < 0xf0 { count } else { input.byte() });
                let head = MemoryTable { regions: regions.into(), ..MemoryTable::default() };
                let spare = usize::from(input.byte() / 0xf8);
                let payload = [head.as_bytes(), said.as_bytes()].concat();
                self.tell(request::SET_MEM_TABLE, flags, &payload[spare..], &kinds);
            }
            10 => {
                let features = if input.byte() < 0xc0 { VIRTIO_F_ACCESS_PLATFORM } else { 0 };
                let count = if input.byte() < 0xf8 { 8 } else { 4 };
                self.tell(request::SET_FEATURES, flags, &features.as_bytes()[..count], &[]);
            }
            11 => {
                let features = u64::from(input.byte());
                self.tell(request::SET_PROTOCOL_FEATURES, flags, features.as_bytes(), &[]);
                if self.open {
                    let kinds: &[usize] = match input.byte() {
                        0..0xf0 => &[0],
                        0xf0..0xf8 => &[3],
                        _ => &[],
                    };
                    self.tell(request::SET_BACKEND_REQ_FD, flags, &[], kinds);
                }
            }
            12..14 => {
                let (at, bytes) = (input.address(), u64::from(input.byte()) * 64 + 1);
                self.access(at, bytes, input.byte() & 1 != 0);
            }
            14 if self.asked > 0 || input.byte() > 0xf0 => {
                let (count, value) = (if input.byte() < 0xf0 { 8 } else { 7 }, u64::from(input.byte() & 1));
                let request = u32::from(input.byte() / 0xf0) + 1;
                self.answer(request, &value.as_bytes()[..count]);
            }
            _ => {
                let (request, count) = (u32::from(input.byte() % 48), usize::from(input.byte()));
                let kinds: Vec<_> = (0..input.byte() % 3).map(|_| usize::from(input.byte() & 3)).collect();
                let payload = input.bytes(count);
                self.tell(request, flags, &payload, &kinds);
            }
        }
    }

    fn add(&mut self, input: &mut Input<'_>, flags: u32) {
        let nth = input.byte() % 32;
        let r = Region::from(input, nth);
        self.tell(request::ADD_MEM_REG, flags, &[&[0; 8], r.said().as_bytes()].concat(), &[r.file]);
    }
}

impl Region {
    /// Mostly one that can be.
    fn from(input: &mut Input<'_>, nth: u8) -> Self {
        let nth = u64::from(nth);
        let offset = u64::from(input.byte()) % 4 * PAGE;
        let mut r = Self { guest: nth << 20, size: 12 * PAGE, user: USER + (nth << 20), offset, file: 0 };
        r.file = usize::from(input.byte() & 1);
        match input.byte() {
            0..0xe0 => {}
            0xe0..0xe8 => r.file += 2,
            0xe8 => r.size = input.size(),
            0xe9 => r.user = input.address(),
            0xea => r.offset = input.address(),
            _ => (r.guest, r.size) = (input.address(), input.size()),
        }
        r
    }

    fn said(&self) -> MemoryRegion {
        MemoryRegion {
            guest: self.guest.into(),
            size: self.size.into(),
            user: self.user.into(),
            offset: self.offset.into(),
        }
    }
}

pub(super) fn play(input: &mut Input<'_>, few: bool, ready: bool) {
    let mut world = World::new(few);
    if ready {
        world.begin();
    }
    for _ in 0..STEPS {
        if input.0.is_empty() || !world.open {
            break;
        }
        world.step(input);
        world.check();
    }
    world.backend.close();
    world.open = false;
    world.check();
}

/// Any bytes, and the end.
pub(super) fn stream(bytes: &[u8]) {
    let mut world = World::new(true);
    // What one socket holds, so that nobody waits.
    (&world.main.socket).write_all(&bytes[..bytes.len().min(16384)]).expect("there is room");
    world.main.socket.shutdown(Shutdown::Write).expect("a socket");
    while world.backend.process().is_ok() {
        while world.daemon.heard().is_some() {}
    }
    world.open = false;
    world.check();
}
