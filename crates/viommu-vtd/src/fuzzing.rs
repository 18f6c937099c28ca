//! Any bytes, read as what a hostile guest does to the unit: registers, descriptors, bytes of tables, resets; endpoints and
//! PASIDs come and go, with mirrors that refuse. Whenever all is announced and over, each mirror holds what a plain
//! reading of the tables says, and devices reach it. For fuzzing and tests alone; nothing here is stable.

use core::sync::atomic::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use viommu::fuzzing::recording::{Event, Handle, RecordingMirror};
use viommu::subscribe::Reach;
use viommu::{Access, Endpoint, Gpa, Interest, Iommu, Iova, Reader, Subscription, View};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::context::{Context, look_up};
use crate::memory::TableMemory;
use crate::paging::{Format, Paging};
use crate::spec::register as r;
use crate::{Config, Progress, Stage, Vtd, Width};

/// Pages of memory: a queue, a root table, tables of contexts, of PASIDs, and page tables.
const PAGES: u64 = 32;
const QUEUE: u64 = 0;
const ROOT: u64 = 1 << 12;
const CONTEXTS: u64 = 2 << 12;
const DIRECTORY: u64 = 3 << 12;
const PASIDS: u64 = 4 << 12;
const TABLES: u64 = 5;
const STATUS: u64 = 0x1_f000;
const IDS: [u16; 3] = [0x10, 0x18, 0x19];
const STEPS: usize = 64;
/// Entries that an invalidation may read, and that the plain reading may: it reads those that are not present too.
const WALK: u64 = 1 << 12;
const READING: usize = 1 << 14;
const HOST_BITS: u32 = 40;

/// Bytes to take from.
struct Input<'d>(&'d [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn below(&mut self, end: u64) -> u64 {
        u64::from(self.byte()) % end
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(core::array::from_fn(|_| self.byte()))
    }
}

/// An endpoint, or a process address space of one.
struct Member {
    id: u16,
    pasid: Option<u32>,
    endpoint: Endpoint,
    reader: Reader,
    mirror: Option<(Subscription, Handle)>,
}

struct World {
    memory: Arc<GuestMemoryMmap<()>>,
    vtd: Vtd,
    members: Vec<Member>,
    waits: u64,
}

/// Target page and access by page.
type Pages = BTreeMap<u64, (u64, u8)>;

fn config(header: u8) -> Config {
    let scalable = match header >> 2 & 3 {
        0 | 1 => None,
        2 => Some(Stage::Second),
        _ => Some(Stage::First),
    };
    let width = if header & 1 == 0 && scalable != Some(Stage::First) { Width::Bits39 } else { Width::Bits48 };
    let caching_mode = header >> 4 & 3 != 0;
    Config { caching_mode, scalable, width, host_bits: HOST_BITS, walk_entries: WALK, ..Config::default() }
}

fn unit(header: u8, memory: &Arc<GuestMemoryMmap<()>>) -> Vtd {
    let builder = Iommu::builder().ram(0, PAGES << 12);
    let builder = if header & 0x40 == 0 { builder } else { builder.domain_mappings(24) };
    Vtd::new(builder, memory.clone(), config(header)).expect("a small one")
}

impl World {
    fn new(header: u8) -> Self {
        let size = usize::try_from(PAGES << 12).expect("small");
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).expect("128 KiB"));
        let vtd = unit(header, &memory);
        let mut world = Self { memory, vtd, members: Vec::new(), waits: 0 };
        world.plug(IDS[0], None, 0);
        world.plug(IDS[1], None, 4);
        // A driver that has come up.
        for id in IDS {
            world.attach(id, u64::from(id & 1), TABLES, 0);
        }
        world.start();
        world
    }

    fn scalable(&self) -> Option<Stage> {
        self.vtd.config().scalable
    }

    fn levels(&self) -> u64 {
        if self.vtd.config().width == Width::Bits39 { 3 } else { 4 }
    }

    fn poke(&self, at: u64, value: u64) {
        let _ = self.memory.write_obj(value, GuestAddress(at));
    }

    fn write32(&self, at: u64, value: u32) {
        self.vtd.write(at, &value.to_le_bytes());
    }

    fn write64(&self, at: u64, value: u64) {
        self.vtd.write(at, &value.to_le_bytes());
    }

    /// Does what is asked for. Whether that is all.
    fn settle(&self) -> bool {
        for _ in 0..4096 {
            match self.vtd.process() {
                Progress::Idle => return true,
                Progress::More => {}
                Progress::Waiting => panic!("nobody holds a guard or answers late"),
            }
        }
        false
    }

    fn start(&self) {
        let (mode, wide) = if self.scalable().is_some() { (1 << 10, 1 << 11) } else { (0, 0) };
        self.write64(r::QUEUE_TAIL, 0);
        self.write64(r::QUEUE_ADDRESS, QUEUE | wide);
        self.write64(r::ROOT_TABLE, ROOT | mode);
        for command in [1 << 26, 1 << 26 | 1 << 30, 1 << 26 | 1 << 31] {
            self.write32(r::GLOBAL_COMMAND, command);
            self.settle();
        }
    }

    /// Gives a requester tables, as a driver does.
    fn attach(&self, id: u16, did: u64, table: u64, shape: u64) {
        let (quiet, root) = (shape & 2, table << 12);
        let function = u64::from(id & 0xff);
        match self.scalable() {
            None => {
                self.poke(ROOT, CONTEXTS | 1);
                let kind = if shape & 0x30 == 0x30 { 2 << 2 } else { 0 };
                let at = CONTEXTS + function * 16;
                self.poke(at + 8, did << 8 | (self.levels() - 2));
                self.poke(at, root | 1 | quiet | kind);
            }
            Some(stage) => {
                self.poke(ROOT, CONTEXTS | 1);
                let at = CONTEXTS + function * 32;
                // Each function has a RID_PASID of its own, in one directory.
                let pasid = function & 7;
                self.poke(at + 8, pasid);
                self.poke(at, DIRECTORY | 1 | quiet | 1 << 3);
                self.poke(DIRECTORY, PASIDS | 1);
                let at = PASIDS + pasid * 64;
                self.poke(at + 8, did);
                if stage == Stage::Second {
                    let kind = if shape & 0x30 == 0x30 { 4 << 6 } else { 2 << 6 };
                    self.poke(at, root | kind | (self.levels() - 2) << 2 | 1);
                } else {
                    self.poke(at + 16, root);
                    self.poke(at, 1 << 6 | 1);
                }
            }
        }
    }

    fn plug(&mut self, id: u16, pasid: Option<u32>, shape: u8) {
        let made = match pasid {
            None => self.vtd.add_endpoint(id),
            Some(pasid) => self.vtd.add_pasid(id, pasid),
        };
        let Ok(endpoint) = made else { return };
        let reach = Reach {
            entries: (shape & 2 != 0).then_some(12),
            replace: shape & 4 != 0,
            batches: shape & 8 != 0,
            wide_unmap: shape & 16 == 0,
            ..Reach::default()
        };
        let mirror = (shape & 0x80 == 0).then(|| {
            let (mirror, handle) = RecordingMirror::new(reach);
            endpoint.subscribe_mirror(mirror, Interest::MIRROR).map(|subscription| (subscription, handle))
        });
        let mirror = match mirror {
            Some(Ok(mirror)) => Some(mirror),
            Some(Err(_)) => {
                let may_refuse = shape & 2 != 0 || !self.vtd.config().announces();
                assert!(may_refuse, "a mirror without limits is refused");
                None
            }
            None => None,
        };
        let reader = endpoint.reader("fuzz").expect("it is there");
        self.members.push(Member { id, pasid, endpoint, reader, mirror });
    }

    fn unplug(&mut self, at: usize) {
        let Member { id, pasid, .. } = self.members.remove(at);
        let gone = match pasid {
            None => self.vtd.remove_endpoint(id),
            Some(pasid) => self.vtd.remove_pasid(id, pasid),
        };
        gone.expect("it is there").wait().expect("nobody holds a guard");
        if pasid.is_none() {
            self.members.retain(|member| member.id != id);
        }
    }

    /// An entry of a table: good, mostly.
    fn entry(input: &mut Input<'_>) -> u64 {
        let (kind, access) = (input.byte(), u64::from(input.byte() & 7));
        // Mostly all is allowed, of either stage.
        let access = if kind & 0x10 == 0 { 7 } else { access };
        match kind % 8 {
            0 => 0,
            1..=3 => (TABLES + input.below(12)) << 12 | access & !4 | access & 4,
            4 | 5 => input.below(PAGES + 4) << 12 | access,
            6 => input.below(3) << 21 | 1 << 7 | access,
            _ => (TABLES + input.below(12)) << 12 | access | 1 << (input.byte() & 63),
        }
    }

    /// Where devices come, and tables have entries.
    fn iova(&self, input: &mut Input<'_>) -> u64 {
        let mut iova = 0;
        for level in 0..self.levels() {
            let index = input.byte();
            let index =
                if level == 3 || index & 0x80 == 0 { u64::from(index & 3) } else { u64::from(index) << 1 };
            iova |= index << (12 + 9 * level);
        }
        iova
    }

    fn submit(&mut self, descriptors: &[[u64; 2]]) {
        self.waits += 1;
        let wait = [5 | 1 << 5 | self.waits << 32, STATUS];
        let mut data = [0; 8];
        self.vtd.read(r::QUEUE_TAIL, &mut data);
        let mut tail = u64::from_le_bytes(data) % 4096;
        for [low, high] in descriptors.iter().chain([&wait]) {
            self.poke(QUEUE + tail, *low);
            self.poke(QUEUE + tail + 8, *high);
            tail = (tail + 16) % 4096;
            if self.scalable().is_some() {
                self.poke(QUEUE + tail, 0);
                self.poke(QUEUE + tail + 8, 0);
                tail = (tail + 16) % 4096;
            }
        }
        self.write64(r::QUEUE_TAIL, tail);
        self.settle();
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 20 {
            0..=5 => {
                let (table, index) = (TABLES + input.below(12), input.byte());
                let index = if index & 0x80 == 0 { u64::from(index & 3) } else { u64::from(index) << 1 };
                let entry = Self::entry(input);
                self.poke(table << 12 | index << 3, entry);
            }
            6 => {
                let at = input.below(PAGES) << 12 | input.below(256) << 3;
                let value = input.long();
                self.poke(at, value);
            }
            7 => {
                let id = IDS[usize::from(input.byte() % 3)];
                let (did, table, shape) = (input.below(4), TABLES + input.below(4), u64::from(input.byte()));
                self.attach(id, did, table, shape);
            }
            8..=10 => {
                let (kind, id, did) = (input.byte(), input.below(3), input.below(4));
                let source = u64::from(IDS[usize::try_from(id).expect("small")]);
                let address = self.iova(input) | u64::from(kind >> 4);
                let descriptor = match kind % 8 {
                    0 => [1 | 3 << 4 | source << 32 | u64::from(kind >> 6) << 48, 0],
                    1 => [1 | 1 << 4, 0],
                    2 => [2 | 1 << 4, 0],
                    3 => [2 | 2 << 4 | did << 16, 0],
                    4 | 5 => [2 | 3 << 4 | did << 16, address],
                    6 => [6 | 3 << 4 | did << 16 | (source & 7) << 32, address],
                    _ => [7 | u64::from(kind >> 6) << 4 | did << 16 | (source & 7) << 32, 0],
                };
                self.submit(&[descriptor]);
            }
            11 => {
                let descriptor = [input.long(), input.long()];
                self.submit(&[descriptor]);
            }
            12 => {
                let at = u64::from(input.byte()) << 2 | u64::from(input.byte() & 3) << 10;
                let value = input.long();
                if at & 4 == 0 && value & 1 == 0 {
                    self.write64(at, value);
                } else {
                    self.write32(at, u32::try_from(value >> 32).expect("32 bits"));
                }
                self.settle();
            }
            13 => {
                let command = u32::from(input.byte()) << 24;
                self.write32(r::GLOBAL_COMMAND, command);
                self.settle();
            }
            14 => {
                let (at, pasid, shape) = (input.below(3), input.byte(), input.byte());
                let id = IDS[usize::try_from(at).expect("small")];
                let pasid = (pasid & 0x80 != 0).then_some(u32::from(pasid & 7));
                let there = self.members.iter().position(|member| (member.id, member.pasid) == (id, pasid));
                match there {
                    Some(at) => self.unplug(at),
                    None => self.plug(id, pasid, shape),
                }
                self.settle();
            }
            15 => {
                let (at, nth) = (usize::from(input.byte()), usize::from(input.byte() % 4) + 1);
                let unmaps = input.byte() > 240;
                let mirrors: Vec<&Handle> =
                    self.members.iter().filter_map(|m| m.mirror.as_ref()).map(|(_, handle)| handle).collect();
                if let Some(handle) = mirrors.get(at % mirrors.len().max(1)) {
                    handle.refuse_nth(
                        nth,
                        1,
                        match unmaps {
                            true => |event| matches!(event, Event::Unmap(_)),
                            false => |event| matches!(event, Event::Map(_) | Event::Replace(..)),
                        },
                    );
                }
            }
            16 if input.byte() > 200 => {
                self.vtd.reset().completion.wait().expect("nobody holds a guard");
                assert!(!self.vtd.is_translating());
                self.start();
            }
            17 => {
                let mut data = [0; 8];
                self.vtd.read(u64::from(input.byte()) << 3, &mut data);
                self.access(input, None);
            }
            18 => self.access(input, None),
            _ => self.announce(input),
        }
    }

    /// An access; with `wanted` it must be what those pages say.
    fn access(&mut self, input: &mut Input<'_>, wanted: Option<(usize, &Pages)>) {
        let iova = self.iova(input) | u64::from(input.byte());
        let write = input.byte() & 1 == 1;
        let access = if write { Access::WRITE } else { Access::READ };
        let any = usize::from(input.byte()) % self.members.len().max(1);
        let at = wanted.map_or(any, |(at, _)| at);
        let Some(member) = self.members.get_mut(at) else { return };
        let reached = member.reader.enter().translate(Iova(iova), access).ok().map(|hit| hit.gpa.0);
        let Some((_, pages)) = wanted.filter(|_| !member.endpoint.is_fenced()) else { return };
        let page = pages.get(&(iova >> 12)).filter(|(_, allowed)| allowed & access.bits() != 0);
        assert_eq!(
            reached,
            page.map(|(target, _)| target << 12 | iova & 0xfff),
            "a device comes to {iova:#x}"
        );
    }

    /// All is announced: mirrors have what the tables say, and devices reach that.
    fn announce(&mut self, input: &mut Input<'_>) {
        let before = self.vtd.metrics();
        self.write64(r::CONTEXT_COMMAND, 1 << 63 | 1 << 61);
        self.write64(r::IOTLB_COMMAND, 1 << 63 | 1 << 60);
        if !self.settle() {
            return;
        }
        let after = self.vtd.metrics();
        // What is left out at a cap, or not read any more, is not there; what is there must be right.
        let is_whole = (before.syncs_cut, before.syncs_capped, before.syncs_failed)
            == (after.syncs_cut, after.syncs_capped, after.syncs_failed);
        if after.refused_views != before.refused_views {
            return;
        }
        for at in 0..self.members.len() {
            let Some(wanted) = self.wanted(at) else { continue };
            // Whose mirror has refused what it was to see stays blocked until there is something else to see.
            if after.refused_views > 0 && self.members[at].endpoint.view() == Some(View::Blocked) {
                continue;
            }
            if let Some((subscription, handle)) = &self.members[at].mirror
                && !subscription.is_fenced()
            {
                let held = held(handle);
                if is_whole {
                    assert_eq!(held, wanted, "a mirror and the tables");
                } else {
                    let is_right = |(page, entry): (&u64, &(u64, u8))| wanted.get(page) == Some(entry);
                    assert!(held.iter().all(is_right), "{held:x?} is not in {wanted:x?}");
                }
                assert!(subscription.audit().is_none_or(|audit| audit.is_clean()));
            }
            for _ in 0..2 {
                self.access(input, Some((at, &wanted)));
            }
        }
    }

    /// What a plain reading says of an endpoint; `None` where that is more than can be read.
    fn wanted(&self, at: usize) -> Option<Pages> {
        let member = &self.members[at];
        let shared = &self.vtd.0.shared;
        if !self.vtd.is_translating() {
            return Some(if member.pasid.is_none() { identity() } else { Pages::new() });
        }
        let root = shared.root_table.load(Ordering::Acquire);
        match look_up(&*shared.memory, &shared.abilities, root, member.endpoint.id()) {
            Context::Pass => Some(identity()),
            Context::Blocked(..) => Some(Pages::new()),
            Context::Paging { paging, .. } => {
                let mut reading =
                    Reading { memory: &*shared.memory, paging, pages: Pages::new(), left: READING };
                reading.table(paging.root.0, paging.levels, 0, 3).then_some(reading.pages)
            }
        }
    }

    /// What is saved can be restored, and is the same there.
    fn finish(self, header: u8) {
        if !self.settle() {
            return;
        }
        let saved = self.vtd.save().expect("nothing is under way");
        let other = unit(header, &self.memory);
        for member in self.members.iter().filter(|member| member.pasid.is_none()) {
            other.add_endpoint(member.id).expect("it is not there");
        }
        // Without mirrors nothing stands in the way.
        other.restore(&saved).expect("what was saved").wait().expect("nobody looks");
        assert_eq!(other.save().expect("nothing is under way"), saved);
    }
}

fn identity() -> Pages {
    (0..PAGES).map(|page| (page, (page, 3))).collect()
}

fn held(handle: &Handle) -> Pages {
    let mut pages = Pages::new();
    for mapping in handle.held() {
        let count = u64::try_from(mapping.range.bytes() >> 12).expect("no more than there is memory");
        for page in 0..count {
            let entry = ((mapping.gpa.0 >> 12) + page, mapping.access.bits());
            assert!(pages.insert((mapping.range.start().0 >> 12) + page, entry).is_none());
        }
    }
    pages
}

/// Tables, entry by entry.
struct Reading<'m> {
    memory: &'m dyn TableMemory,
    paging: Paging,
    pages: Pages,
    left: usize,
}

impl Reading<'_> {
    /// Reads a table for the addresses from `iova` on, of which so much is allowed. Whether there were not too many.
    fn table(&mut self, at: u64, level: u32, iova: u64, allowed: u64) -> bool {
        let mut entries = [0; 512];
        let Some(left) = self.left.checked_sub(entries.len()) else { return false };
        self.left = left;
        if !self.memory.read(Gpa(at), &mut entries) {
            return true;
        }
        for (index, raw) in (0..).zip(entries).filter(|(_, raw)| *raw != 0) {
            let shift = 3 + 9 * level;
            let iova = iova | index << shift;
            let access = match self.paging.format {
                Format::First if raw & 5 == 5 => 1 | raw & 2,
                Format::First => 0,
                Format::Legacy | Format::Second => raw & 3,
            } & allowed;
            let is_page = level == 1 || level <= 3 && raw & 1 << 7 != 0;
            if access == 0 || raw & reserved(self.paging.format, level, is_page) != 0 {
                continue;
            }
            let next = raw & ((1 << HOST_BITS) - 1) & !0xfff;
            if is_page {
                self.page(iova, next & !((1 << shift) - 1), shift, access);
            } else if !self.table(next, level - 1, iova, access) {
                return false;
            }
        }
        true
    }

    /// As far as there is memory behind it.
    fn page(&mut self, iova: u64, gpa: u64, shift: u32, access: u64) {
        let count = (1 << (shift - 12)).min(PAGES.saturating_sub(gpa >> 12));
        for page in 0..count {
            let number = (iova >> 12) + page;
            if self.paging.has_pasid || !(0xfee00..=0xfeeff).contains(&number) {
                let access = u8::try_from(access).expect("two bits");
                self.pages.insert(number, ((gpa >> 12) + page, access));
            }
        }
    }
}

fn reserved(format: Format, level: u32, is_page: bool) -> u64 {
    let beyond = ((1 << 52) - 1) & !((1_u64 << HOST_BITS) - 1);
    let inside = ((1_u64 << (3 + 9 * level)) - 1) & !0xfff;
    let large = if level > 3 { 1 << 7 } else { 0 };
    match (format, is_page) {
        (Format::First, true) => beyond | inside & !(1 << 12),
        (Format::First, false) => beyond | large,
        (_, true) => beyond | inside | 1 << 62,
        (_, false) => beyond | 1 << 11 | 1 << 62 | large,
    }
}

/// Plays the bytes. Any input is legal.
///
/// # Panics
/// When something is wrong.
pub fn fuzz_unit(data: &[u8]) {
    let mut input = Input(data);
    let header = input.byte();
    // Left where it is when something is wrong: a unit that panicked inside a step cannot be taken apart.
    let mut world = core::mem::ManuallyDrop::new(World::new(header));
    for _ in 0..STEPS {
        if input.0.is_empty() {
            break;
        }
        world.step(&mut input);
    }
    world.announce(&mut input);
    core::mem::ManuallyDrop::into_inner(world).finish(header);
}
