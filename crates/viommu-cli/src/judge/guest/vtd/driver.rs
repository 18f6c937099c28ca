//! A small driver of a VT-d unit with caching mode: tables and a queue in guest memory, and invalidations as Linux sends
//! them. It leaves nothing in the queue: each call returns when the unit has answered.

use core::sync::atomic::Ordering;
use std::sync::Arc;

use serde::Serialize;
use viommu::{Access, IovaRange, Mapping};
use viommu_vtd::Vtd;
use viommu_vtd::spec::descriptor as d;
use viommu_vtd::spec::register::{self as r, Global};
use viommu_vtd::spec::table::{ADDRESS, context, second};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::PATIENCE;

pub(super) type Memory = Arc<GuestMemoryMmap>;

pub(super) const PAGE: u64 = 4096;
const PAGE_BITS: u32 = 12;
const TABLE_BITS: u32 = 9;
/// Levels of tables: 48 bits.
pub(super) const LEVELS: u32 = 4;
/// Where the driver's memory is: above what a history can map.
pub(super) const BASE: u64 = 1 << 51;
/// Bytes of it. Only what is touched takes memory.
pub(super) const BYTES: u64 = 1 << 30;
const QUEUE: u64 = BASE;
const STATUS: u64 = BASE + PAGE;
const ROOT: u64 = BASE + 2 * PAGE;
/// Tables come from here on.
const TABLES: u64 = BASE + 3 * PAGE;
/// The most pages of one page-selective invalidation, as an exponent (CAP.MAMV).
const MAX_MASK: u32 = 18;

/// A descriptor's two words.
type Descriptor = [u64; 2];

/// What a context entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Context {
    Tables { did: u16, root: u64 },
    Pass,
}

/// Domain id of context entries that pass.
pub(super) const PASS_DID: u16 = 0xffff;

impl Context {
    fn did(self) -> u16 {
        match self {
            Self::Tables { did, .. } => did,
            Self::Pass => PASS_DID,
        }
    }

    fn words(self) -> Descriptor {
        let (root, kind) = match self {
            Self::Tables { root, .. } => (root, context::TRANSLATE),
            Self::Pass => (0, context::PASS),
        };
        let low = root | kind << context::TYPE | context::PRESENT;
        [low, u64::from(self.did()) << context::DOMAIN | u64::from(LEVELS - 2)]
    }
}

/// Descriptors that were sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Sent {
    pub(crate) contexts: u64,
    pub(crate) pages: u64,
    pub(crate) domains: u64,
    pub(crate) global: u64,
    pub(crate) waits: u64,
}

pub(super) struct Driver {
    pub(super) vtd: Vtd,
    memory: Memory,
    /// Tables that are free, and where there has never been one.
    free: Vec<u64>,
    fresh: u64,
    tail: u64,
    pub(super) sent: Sent,
    pub(super) complaints: Vec<String>,
}

impl Driver {
    /// Starts the unit.
    pub(super) fn new(vtd: Vtd, memory: Memory) -> Self {
        let mut driver = Self {
            vtd,
            memory,
            free: Vec::new(),
            fresh: TABLES,
            tail: 0,
            sent: Sent::default(),
            complaints: Vec::new(),
        };
        driver.write_register(r::ROOT_TABLE, ROOT);
        driver.write_register(r::QUEUE_TAIL, 0);
        driver.write_register(r::QUEUE_ADDRESS, QUEUE);
        driver.command(Global::QUEUE);
        driver.command(Global::QUEUE | Global::ROOT_TABLE);
        driver.flush_everything();
        driver.command(Global::QUEUE | Global::TRANSLATION);
        driver
    }

    fn complain(&mut self, what: String) {
        self.complaints.push(what);
    }

    fn write_register(&self, at: u64, value: u64) {
        self.vtd.write(at, &value.to_le_bytes());
    }

    fn read_register(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.vtd.read(at, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn command(&mut self, bits: Global) {
        self.vtd.write(r::GLOBAL_COMMAND, &bits.bits().to_le_bytes());
        self.settle();
        let status = self.read_register(r::GLOBAL_COMMAND) >> 32;
        if status & u64::from(bits.bits()) != u64::from(bits.bits()) {
            self.complain(format!("the unit's status is {status:#x} after the command {bits:?}"));
        }
    }

    /// Lets the unit do what is due, also for a subscriber that has come.
    pub(super) fn settle(&mut self) {
        if let Err(why) = self.vtd.wait(PATIENCE) {
            self.complain(format!("the unit has not answered: {why}"));
        }
    }

    fn store(&mut self, at: u64, value: u64) {
        if let Err(why) = self.memory.store(value.to_le(), GuestAddress(at), Ordering::Release) {
            self.complain(format!("the driver's memory at {at:#x}: {why}"));
        }
    }

    fn load(&self, at: u64) -> u64 {
        // What cannot be read was not written either, and that has been said.
        self.memory.load::<u64>(GuestAddress(at), Ordering::Acquire).map_or(0, u64::from_le)
    }

    /// Sends descriptors, and one that waits for them; returns when its status has been written.
    fn submit(&mut self, descriptors: &[Descriptor]) {
        self.sent.waits += 1;
        let value = self.sent.waits & 0xffff_ffff;
        let wait = [u64::from(d::WAIT) | d::WAIT_STATUS | value << d::WAIT_DATA, STATUS];
        for [low, high] in descriptors.iter().chain([&wait]) {
            self.store(QUEUE + self.tail, *low);
            self.store(QUEUE + self.tail + 8, *high);
            self.tail = (self.tail + 16) % PAGE;
        }
        self.write_register(r::QUEUE_TAIL, self.tail);
        self.settle();
        let (status, head) = (self.load(STATUS) & 0xffff_ffff, self.read_register(r::QUEUE_HEAD));
        if status != value || head != self.tail {
            let faults = self.read_register(r::FAULT_STATUS & !7) >> 32;
            self.complain(format!("the queue stands at {head:#x}, status {status}, FSTS {faults:#x}"));
        }
    }

    fn context_descriptor(granularity: u8, did: u16, requester: u16) -> Descriptor {
        let low = u64::from(d::CONTEXT) | u64::from(granularity) << d::GRANULARITY;
        [low | u64::from(did) << d::DOMAIN_ID | u64::from(requester) << d::SOURCE, 0]
    }

    fn iotlb_descriptor(granularity: u8, did: u16, pages: u64) -> Descriptor {
        let low = u64::from(d::IOTLB) | u64::from(granularity) << d::GRANULARITY;
        [low | u64::from(did) << d::DOMAIN_ID, pages]
    }

    fn flush_everything(&mut self) {
        (self.sent.contexts, self.sent.global) = (self.sent.contexts + 1, self.sent.global + 1);
        self.submit(&[Self::context_descriptor(d::GLOBAL, 0, 0), Self::iotlb_descriptor(d::GLOBAL, 0, 0)]);
    }

    /// A context entry has changed: that of the requester, and translations of the domain id.
    fn flush_context(&mut self, requester: u16, cached: u16, did: u16) {
        (self.sent.contexts, self.sent.domains) = (self.sent.contexts + 1, self.sent.domains + 1);
        self.submit(&[
            Self::context_descriptor(d::SELECTIVE, cached, requester),
            Self::iotlb_descriptor(d::DOMAIN, did, 0),
        ]);
    }

    /// Translations of a range have changed: the least aligned power of two of pages that holds it, or the whole domain.
    /// `hint`: nothing but last entries has.
    pub(super) fn flush(&mut self, did: u16, range: IovaRange, hint: bool) {
        let (first, last) = (range.start().0 >> PAGE_BITS, range.last().0 >> PAGE_BITS);
        let order = u64::BITS - (first ^ last).leading_zeros();
        if order > MAX_MASK {
            self.sent.domains += 1;
            return self.submit(&[Self::iotlb_descriptor(d::DOMAIN, did, 0)]);
        }
        self.sent.pages += 1;
        let hint = if hint { 1 << 6 } else { 0 };
        let address = first >> order << order << PAGE_BITS;
        self.submit(&[Self::iotlb_descriptor(d::SELECTIVE, did, address | hint | u64::from(order))]);
    }

    /// An empty table; `None`: the memory for them is used up.
    pub(super) fn table(&mut self) -> Option<u64> {
        let at = match self.free.pop() {
            Some(at) => at,
            None if self.fresh < BASE + BYTES => {
                self.fresh += PAGE;
                return Some(self.fresh - PAGE);
            }
            None => return None,
        };
        (0..PAGE).step_by(8).for_each(|word| self.store(at + word, 0));
        Some(at)
    }

    pub(super) fn give_back(&mut self, tables: Vec<u64>) {
        self.free.extend(tables);
    }

    /// Tables that are in use.
    pub(super) fn tables_in_use(&self) -> u64 {
        (self.fresh - TABLES) / PAGE - self.free.len() as u64
    }

    /// Whose context entry it is: where it lies. `None`: no memory for its table.
    fn context_at(&mut self, requester: u16) -> Option<u64> {
        let root = ROOT + u64::from(requester >> 8) * 16;
        if self.load(root) & 1 == 0 {
            let table = self.table()?;
            self.store(root, table | 1);
        }
        Some((self.load(root) & ADDRESS) + u64::from(requester & 0xff) * 16)
    }

    /// Gives a requester another context entry, whatever it had: one that is there is taken away first.
    pub(super) fn set_context(&mut self, requester: u16, old: Option<Context>, new: Option<Context>) -> bool {
        let Some(at) = self.context_at(requester) else { return false };
        if let Some(old) = old {
            self.store(at, 0);
            self.store(at + 8, 0);
            self.flush_context(requester, old.did(), old.did());
        }
        if let Some(new) = new {
            let [low, high] = new.words();
            self.store(at + 8, high);
            self.store(at, low);
            // An entry that was not there may be known as such, under domain id 0.
            self.flush_context(requester, 0, new.did());
        }
        true
    }

    /// Gives all of these their context entries anew, in one go.
    pub(super) fn reset_contexts(&mut self, entries: &[(u16, Option<Context>)]) -> bool {
        for (requester, entry) in entries {
            let Some(at) = self.context_at(*requester) else { return false };
            self.store(at, 0);
            let [low, high] = entry.map_or([0, 0], Context::words);
            self.store(at + 8, high);
            self.store(at, low);
        }
        self.flush_everything();
        true
    }

    /// Writes entries for a mapping whose place is free, the largest pages that fit if `large`. Tables that were in their
    /// place come to `freed`. `false`: no memory for tables.
    pub(super) fn map(&mut self, root: u64, m: &Mapping, large: bool, freed: &mut Vec<u64>) -> bool {
        let mut allowed = 0;
        for (right, bit) in [(Access::READ, second::READ), (Access::WRITE, second::WRITE)] {
            allowed |= if m.access.contains(right) { bit } else { 0 };
        }
        let (mut at, last) = (m.range.start().0, m.range.last().0);
        loop {
            let gpa = m.translate(viommu::Iova(at)).0;
            let fits = |level: &u32| (at | gpa) & mask(*level) == 0 && last - at >= mask(*level);
            let level = if large { (1..=3).rev().find(fits).unwrap_or(1) } else { 1 };
            let mut table = root;
            for above in (level + 1..=LEVELS).rev() {
                let entry = place(table, at, above);
                if self.load(entry) & (second::READ | second::WRITE) == 0 {
                    let Some(new) = self.table() else { return false };
                    self.store(entry, new | second::READ | second::WRITE);
                }
                table = self.load(entry) & ADDRESS;
            }
            let entry = place(table, at, level);
            let old = self.load(entry);
            if level > 1 && old != 0 && old & second::LARGE == 0 {
                self.collect(old & ADDRESS, level - 1, freed);
            }
            let size = if level > 1 { second::LARGE } else { 0 };
            self.store(entry, gpa | allowed | size);
            match (at | mask(level)).checked_add(1).filter(|next| *next <= last) {
                Some(next) => at = next,
                None => return true,
            }
        }
    }

    /// Takes entries away. Tables of which all is in the range come to `freed`.
    pub(super) fn unmap(
        &mut self,
        table: u64,
        level: u32,
        base: u64,
        range: IovaRange,
        freed: &mut Vec<u64>,
    ) {
        let (first, last) = (range.start().0.max(base), range.last().0.min(base | mask(level + 1)));
        let mut at = first;
        loop {
            let (entry, start) = (place(table, at, level), at & !mask(level));
            let end = start | mask(level);
            let old = self.load(entry);
            if old != 0 {
                let is_leaf = level == 1 || old & second::LARGE != 0;
                let is_whole = start >= first && end <= last;
                if is_leaf || is_whole {
                    self.store(entry, 0);
                }
                match (is_leaf, is_whole) {
                    (true, _) => {}
                    (false, true) => self.collect(old & ADDRESS, level - 1, freed),
                    (false, false) => self.unmap(old & ADDRESS, level - 1, start, range, freed),
                }
            }
            match end.checked_add(1).filter(|next| *next <= last) {
                Some(next) => at = next,
                None => return,
            }
        }
    }

    /// A table, and all below it.
    pub(super) fn collect(&self, table: u64, level: u32, freed: &mut Vec<u64>) {
        freed.push(table);
        if level == 1 {
            return;
        }
        for entry in (0..PAGE).step_by(8) {
            let old = self.load(table + entry);
            if old != 0 && old & second::LARGE == 0 {
                self.collect(old & ADDRESS, level - 1, freed);
            }
        }
    }
}

/// The last bytes of what an entry of `level` covers, as a mask.
pub(super) fn mask(level: u32) -> u64 {
    (1 << (PAGE_BITS + TABLE_BITS * (level - 1))) - 1
}

/// Where the entry of an address is in its table of `level`.
fn place(table: u64, iova: u64, level: u32) -> u64 {
    table + (iova >> (PAGE_BITS + TABLE_BITS * (level - 1)) & ((1 << TABLE_BITS) - 1)) * 8
}
