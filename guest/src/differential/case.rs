//! One case: random tables, and steps that change them, tell of it or not, and let devices come.

use std::fmt::Write as _;

use anyhow::{bail, ensure};
use viommu_vtd::spec::register as r;

use super::{
    machine::{Machine, PATTERN, RAM, Record, SOURCES, Seen},
    model::{Model, Outcome, Request, Words as _},
    random::Random,
    tables::{CONTEXTS, INDICES, LEVELS, TABLE_BYTES, TABLES},
};

const QUEUE: u64 = 0x110_0000;
const STATUS: u64 = 0x110_8000;

/// What QEMU does otherwise, each with its name in the documentation.
pub(super) const DEVIATIONS: [&str; 3] = [
    "a kept page denies, unrecorded",
    "a page that touches the interrupts is blocked whole",
    "an entry of all ones is unreadable",
];

/// What a case, or many, did.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    pub(super) accesses: u64,
    pub(super) blocked: u64,
    /// Accesses for which more than one answer was right.
    pub(super) stale: u64,
    pub(super) invalidations: u64,
    pub(super) queue_errors: u64,
    pub(super) deviations: [u64; DEVIATIONS.len()],
}

impl Tally {
    pub(super) fn add(&mut self, other: &Tally) {
        self.accesses += other.accesses;
        self.blocked += other.blocked;
        self.stale += other.stale;
        self.invalidations += other.invalidations;
        self.queue_errors += other.queue_errors;
        for (own, more) in self.deviations.iter_mut().zip(other.deviations) {
            *own += more;
        }
    }
}

/// What a read by QEMU's device may have got.
struct Read {
    device: usize,
    values: Vec<u64>,
    line: String,
}

pub(super) struct Case<'m> {
    machine: &'m mut Machine,
    random: Random,
    model: Model,
    /// By the queue, or by registers.
    queued: bool,
    tail: u64,
    waits: u64,
    /// A record that was left where it is, and by whom.
    pending: Option<(u16, Option<Record>, Option<Record>)>,
    /// Addresses that come again and again.
    hot: Vec<u64>,
    reads: Vec<Read>,
    tally: Tally,
    log: String,
}

/// Plays a case.
///
/// # Errors
///
/// If the units differ, with all steps so far; or if QEMU fails.
pub(super) fn play(machine: &mut Machine, seed: u64) -> anyhow::Result<Tally> {
    let random = Random::new(seed);
    let mut case = Case {
        machine,
        random,
        model: Model::new(&SOURCES),
        queued: false,
        tail: 0,
        waits: 0,
        pending: None,
        hot: Vec::new(),
        reads: Vec::new(),
        tally: Tally::default(),
        log: String::new(),
    };
    match case.run() {
        Ok(()) => Ok(case.tally),
        Err(error) => Err(error.context(format!("seed {seed}:\n{}", case.log))),
    }
}

impl Case<'_> {
    fn note(&mut self, line: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.log, "    {line}");
    }

    fn run(&mut self) -> anyhow::Result<()> {
        let caching_mode = self.random.percent(60);
        let queued = self.random.percent(70);
        self.queued = queued;
        self.note(format_args!("caching mode {caching_mode}, queue {queued}"));
        self.machine.reset(caching_mode, &[(TABLES, TABLE_BYTES), (QUEUE, 0x9000)])?;
        self.make_tables()?;
        for _ in 0..4 {
            let iova = self.random.iova();
            self.hot.push(iova);
        }
        if self.queued {
            self.machine.write64(r::QUEUE_TAIL, 0)?;
            self.machine.write64(r::QUEUE_ADDRESS, QUEUE)?;
            self.command(0)?;
        }
        self.set_root()?;
        self.switch(true)?;
        for _ in 0..self.random.below(8) + 4 {
            self.step()?;
        }
        // Translation ends; then the queue, which is empty and ends with a wait.
        self.clear_record()?;
        self.switch(false)?;
        if self.queued {
            self.submit(Vec::new())?;
            self.machine.write32(r::GLOBAL_COMMAND, 0)?;
        }
        let (theirs, ours) = self.machine.read32(r::GLOBAL_STATUS)?;
        ensure!(theirs == ours, "global status: QEMU {theirs:#x}, ours {ours:#x}");
        let reads = std::mem::take(&mut self.reads);
        for device in [1, 2] {
            if !reads.iter().any(|read| read.device == device) {
                continue;
            }
            let got = self.machine.read_back(device, reads.len() as u64)?;
            for (read, got) in reads.iter().zip(got).filter(|(read, _)| read.device == device) {
                ensure!(
                    read.values.contains(&got),
                    "QEMU read {got:#x}, not one of {:x?}: {}",
                    read.values,
                    read.line
                );
            }
        }
        Ok(())
    }

    fn poke(&mut self, at: u64, value: u64) -> anyhow::Result<()> {
        self.note(format_args!("[{at:#x}] = {value:#x}"));
        self.machine.poke(at, value)
    }

    fn make_tables(&mut self) -> anyhow::Result<()> {
        for root in [TABLES, TABLES + 0x1000] {
            let entry = self.random.root_entry();
            self.poke(root, entry[0])?;
            self.poke(root + 8, entry[1])?;
        }
        for table in [CONTEXTS, CONTEXTS + 0x1000] {
            for source in SOURCES {
                let at = table + u64::from(source) * 16;
                let entry = self.random.context_entry();
                self.poke(at + 8, entry[1])?;
                self.poke(at, entry[0])?;
            }
        }
        for (level, (first, count)) in (1..).zip(LEVELS) {
            for table in 0..count {
                for index in INDICES[level - 1] {
                    let entry = self.random.entry(level);
                    if entry != 0 {
                        self.poke(first + table * 0x1000 + index * 8, entry)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn step(&mut self) -> anyhow::Result<()> {
        match self.random.below(100) {
            0..=39 => self.access(None),
            40..=79 => {
                let device = self.random.index(SOURCES.len());
                let iova = self.random.one(&self.hot);
                self.access(Some((device, iova)))?;
                self.change(SOURCES[device], iova)?;
                // It is told, or not.
                if self.random.percent(60) {
                    self.tell(SOURCES[device], iova)?;
                }
                self.access(Some((device, iova)))
            }
            80..=93 => {
                let (source, iova) = (self.random.one(&SOURCES), self.random.iova());
                self.tell(source, iova)
            }
            94..=96 => self.set_root(),
            _ => {
                self.clear_record()?;
                self.switch(false)?;
                if self.random.percent(50) {
                    self.access(None)?;
                    self.clear_record()?;
                }
                self.switch(true)
            }
        }
    }

    /// Changes an entry, mostly on the way of an address.
    fn change(&mut self, source: u16, iova: u64) -> anyhow::Result<()> {
        let memory = self.machine.memory.clone();
        match self.random.below(10) {
            0 => {
                let at = TABLES + 0x1000 * self.random.below(2);
                let entry = self.random.root_entry();
                self.poke(at + 8, entry[1])?;
                self.poke(at, entry[0])
            }
            1 | 2 => {
                let at = CONTEXTS + 0x1000 * self.random.below(2) + u64::from(source) * 16;
                let entry = self.random.context_entry();
                self.poke(at + 8, entry[1])?;
                self.poke(at, entry[0])
            }
            3 => {
                let level = 1 + self.random.index(4);
                let index = self.random.one(INDICES[level - 1]);
                let (table, entry) = (self.random.table(level), self.random.entry(level));
                self.poke(table + index * 8, entry)
            }
            _ => {
                let way = self.model.way(&*memory, source, iova);
                if way.is_empty() {
                    return Ok(());
                }
                let (level, at) = self.random.one(&way);
                let entry = self.random.entry(usize::try_from(level)?);
                if at + 8 > TABLES + TABLE_BYTES || at < TABLES {
                    return Ok(());
                }
                self.poke(at, entry)
            }
        }
    }

    /// Tells the units of a change, or of more than has changed, or of something else.
    fn tell(&mut self, source: u16, iova: u64) -> anyhow::Result<()> {
        self.tally.invalidations += 1;
        let did = 1 + self.random.below(3);
        let order = self.random.one(&[0, 0, 0, 1, 4, 9, 18]);
        let (context, pages) = match self.random.below(8) {
            0 => (Some(1), Some(1)),
            1 => (None, Some(1)),
            2 => (Some(2), Some(2)),
            3 => (Some(3), Some(2)),
            4 => (None, Some(2)),
            5 => (Some(3), Some(3)),
            _ => (None, Some(3)),
        };
        if self.queued {
            let mut list = Vec::new();
            if let Some(kind) = context {
                let mask = self.random.one(&[0, 0, 1, 2, 3]);
                list.push([1 | kind << 4 | did << 16 | u64::from(source) << 32 | mask << 48, 0]);
            }
            if let Some(kind) = pages {
                let address = (iova & !0xfff) | order | self.random.one(&[0, 1 << 6]);
                let drain = self.random.one(&[0, 0xc0]);
                list.push([2 | kind << 4 | drain | did << 16, if kind == 3 { address } else { 0 }]);
            }
            if self.random.percent(6) {
                let at = self.random.index(list.len() + 1);
                let bad = self.malformed();
                list.insert(at, bad);
            }
            return self.submit(list);
        }
        if let Some(kind) = context {
            let kind = if self.random.percent(3) { 0 } else { kind };
            let mask = self.random.one(&[0, 0, 1, 2, 3]);
            let command = 1 << 63 | kind << 61 | mask << 32 | u64::from(source) << 16 | did;
            self.note(format_args!("CCMD {command:#x}"));
            self.machine.write64(r::CONTEXT_COMMAND, command)?;
            self.invalidated_contexts(kind, source, mask);
            let (theirs, ours) = self.machine.read64(r::CONTEXT_COMMAND)?;
            let what = |word: u64| (word >> 63, word >> 59 & 3 == 0);
            ensure!(what(theirs) == what(ours), "CCMD: QEMU {theirs:#x}, ours {ours:#x}");
        }
        if let Some(kind) = pages {
            let kind = if self.random.percent(3) { 0 } else { kind };
            let order = if self.random.percent(3) { 19 + self.random.below(20) } else { order };
            let command = 1 << 63 | kind << 60 | did << 32;
            let address = (iova & !0xfff) | order;
            self.note(format_args!("IVA {address:#x}, IOTLB {command:#x}"));
            self.machine.write64(r::INVALIDATE_ADDRESS, address)?;
            self.machine.write64(r::IOTLB_COMMAND, command)?;
            self.invalidated_pages(kind, did, address);
            let (theirs, ours) = self.machine.read64(r::IOTLB_COMMAND)?;
            let what = |word: u64| (word >> 63, word >> 57 & 3);
            ensure!(what(theirs) == what(ours), "IOTLB: QEMU {theirs:#x}, ours {ours:#x}");
        }
        Ok(())
    }

    fn malformed(&mut self) -> [u64; 2] {
        match self.random.below(8) {
            0 => [0, 0],
            1 => [15, 0],
            2 => [1, 0],
            3 => [2, 0],
            4 => [2 | 3 << 4 | 1 << 16, 19 + self.random.below(40)],
            5 => [1 | 1 << 4, 1 << self.random.below(64)],
            6 => [2 | 1 << 4 | 1 << (32 + self.random.below(32)), 0],
            _ => [5 | 1 << 5, STATUS + 1 + self.random.below(3)],
        }
    }

    fn invalidated_contexts(&mut self, kind: u64, source: u16, mask: u64) {
        let memory = self.machine.memory.clone();
        let mask = match mask {
            0 => !0,
            1 => !4,
            2 => !6,
            _ => !7,
        };
        match kind {
            1 | 2 => self.model.forget_contexts(&*memory, 0, 0),
            3 => self.model.forget_contexts(&*memory, source, mask),
            _ => {}
        }
    }

    fn invalidated_pages(&mut self, kind: u64, did: u64, address: u64) {
        let did = half(did);
        match (kind, address & 0x3f) {
            (1, _) => self.model.forget_pages(None, (0, u64::MAX)),
            (2, _) => self.model.forget_pages(Some(did), (0, u64::MAX)),
            (3, order @ 0..=18) => {
                let last = (0x1000_u64 << order) - 1;
                self.model.forget_pages(Some(did), (address & !last, address | last));
            }
            _ => {}
        }
    }

    /// A descriptor has been done, if it is one.
    fn done(&mut self, [low, high]: [u64; 2]) {
        let kind = low >> 4 & 3;
        match low & 0xf {
            1 => self.invalidated_contexts(kind, half(low >> 32), low >> 48 & 3),
            2 => self.invalidated_pages(kind, low >> 16 & 0xffff, high),
            _ => {}
        }
    }

    /// Puts descriptors and a wait into the queue. A malformed one, where both must stop, is replaced by a wait.
    fn submit(&mut self, mut list: Vec<[u64; 2]>) -> anyhow::Result<()> {
        self.waits += 1;
        list.push([5 | 1 << 5 | self.waits << 32, STATUS]);
        let begin = self.tail;
        let place = |at: usize| QUEUE + (begin + at as u64 * 16) % 4096;
        for (at, [low, high]) in list.iter().enumerate() {
            self.note(format_args!("descriptor {low:#x} {high:#x}"));
            self.machine.poke(place(at), *low)?;
            self.machine.poke(place(at) + 8, *high)?;
        }
        self.tail = (begin + list.len() as u64 * 16) % 4096;
        self.machine.write64(r::QUEUE_TAIL, self.tail)?;
        let mut next = 0;
        loop {
            let (theirs, ours) = self.machine.read64(r::QUEUE_HEAD)?;
            let (their_status, our_status) = self.machine.read32(r::FAULT_STATUS)?;
            let what = |status: u32| status & 0xff;
            ensure!(
                theirs == ours && what(their_status) == what(our_status),
                "queue: QEMU's head {theirs:#x} and fault status {their_status:#x}, ours {ours:#x} and {our_status:#x}"
            );
            let stopped = usize::try_from(theirs.wrapping_sub(begin) % 4096 / 16)?;
            for descriptor in &list[next..stopped] {
                self.done(*descriptor);
            }
            next = stopped;
            if ours == self.tail {
                ensure!(ours_is_clear(our_status), "a queue error, but nothing is left");
                break;
            }
            ensure!(!ours_is_clear(our_status), "the queue stands without an error");
            self.tally.queue_errors += 1;
            self.note(format_args!("... which stops at {stopped}"));
            list[stopped] = [5 | 1 << 5, STATUS];
            self.machine.poke(place(stopped), 5 | 1 << 5)?;
            self.machine.poke(place(stopped) + 8, STATUS)?;
            self.machine.write32(r::FAULT_STATUS, 1 << 4)?;
            self.machine.write64(r::QUEUE_TAIL, self.tail)?;
        }
        let word = self.machine.peek(&[STATUS])?[0];
        ensure!(word == (self.waits, self.waits), "the wait's status: {word:x?} of {}", self.waits);
        Ok(())
    }

    fn command(&mut self, bits: u32) -> anyhow::Result<()> {
        let queue = if self.queued { 1 << 26 } else { 0 };
        let translation = if self.model.translates { 1 << 31 } else { 0 };
        self.machine.write32(r::GLOBAL_COMMAND, queue | translation | bits)?;
        let (theirs, ours) = self.machine.read32(r::GLOBAL_STATUS)?;
        // QEMU's unit is not as new for each case: it has had a root table before.
        let theirs = theirs & !(1 << 30) | ours & 1 << 30;
        ensure!(theirs == ours, "global status: QEMU {theirs:#x}, ours {ours:#x}");
        Ok(())
    }

    fn set_root(&mut self) -> anyhow::Result<()> {
        let elsewhere = self.random.nowhere();
        let table = match self.random.below(20) {
            0 => elsewhere,
            1..=5 => TABLES + 0x1000,
            _ => TABLES,
        };
        self.note(format_args!("root table {table:#x}"));
        self.machine.write64(r::ROOT_TABLE, table)?;
        self.model.root_table = table;
        self.command(1 << 30)?;
        self.model.forget_all(&*self.machine.memory.clone());
        Ok(())
    }

    fn switch(&mut self, on: bool) -> anyhow::Result<()> {
        self.note(format_args!("translation {on}"));
        self.model.translates = on;
        self.command(0)?;
        self.model.forget_all(&*self.machine.memory.clone());
        Ok(())
    }

    fn clear_record(&mut self) -> anyhow::Result<()> {
        if self.pending.take().is_none() { Ok(()) } else { self.machine.clear_records() }
    }

    /// An access by a device to a page, or by any to any.
    fn access(&mut self, chosen: Option<(usize, u64)>) -> anyhow::Result<()> {
        let mut device = chosen.map_or_else(|| self.random.index(SOURCES.len()), |(device, _)| device);
        if let Some((source, ..)) = self.pending {
            // Of another one it would be recorded beside it, for which QEMU has no room.
            device = SOURCES.iter().position(|other| *other == source).unwrap_or(0);
        }
        let base = match chosen {
            Some((_, iova)) => iova,
            None if self.random.percent(80) => self.random.one(&self.hot),
            None => self.random.iova(),
        };
        let request = Request {
            source: SOURCES[device],
            iova: base + self.random.below(512) * 8,
            is_write: device == 0 || self.random.percent(50),
        };
        let memory = self.machine.memory.clone();
        let allowed = self.model.allowed(&*memory, request);
        let has_memory = |gpa: &u64| *gpa + 8 <= RAM;
        let mut places: Vec<u64> = Vec::new();
        for outcome in &allowed {
            if let Outcome::Reaches(gpa) = outcome
                && has_memory(gpa)
            {
                places.push(*gpa);
            }
        }
        let is_table =
            |at: u64| (TABLES..TABLES + TABLE_BYTES).contains(&at) || (QUEUE..STATUS + 0x1000).contains(&at);
        for (at, place) in places.iter().enumerate() {
            let mark = 0x5a5a_0000_0000_0000 | self.tally.accesses << 8 | (at as u64) << 4;
            // Told apart; tables stay as they are, but for what a device has written there before.
            match is_table(*place) {
                true if memory.word(*place) == Some(PATTERN) => self.machine.poke(*place, 0)?,
                true => {}
                false => self.machine.poke(*place, mark)?,
            }
        }
        if self.model.allowed(&*memory, request) != allowed {
            return Ok(());
        }
        let before = self.machine.peek(&places)?;
        let keeps = self.random.percent(10);
        let slot = self.reads.len() as u64;
        let line = format!("{request:x?} may be {allowed:x?}");
        self.note(format_args!("{line}"));
        let denies = self.model.may_be_denied_by_a_kept_page(&*memory, request);
        let walks = self.model.walks(&*memory, request);
        // Before: a write may reach the tables themselves.
        self.model.note(&*memory, request);
        let (theirs, ours) = self.machine.access(device, request, &places, slot, keeps)?;
        self.tally.accesses += 1;
        self.tally.stale += u64::from(allowed.len() > 1);
        self.tally.blocked += u64::from(ours.record.is_some());
        if !request.is_write {
            let value = |outcome: &Outcome| match outcome {
                Outcome::Reaches(gpa) => places.iter().position(|at| at == gpa).map_or(0, |at| before[at].1),
                Outcome::Blocked { .. } => 0,
            };
            let mut values: Vec<u64> = allowed.iter().map(value).collect();
            if theirs.record.is_some()
                || denies
                || walks.iter().any(|walk| walk.page.is_some_and(|page| page.touches_interrupts()))
            {
                values.push(0);
            }
            self.reads.push(Read { device, values, line: line.clone() });
        }
        let fits = |seen: &Seen, pending: Option<Option<Record>>, is_theirs: bool| {
            allowed.iter().any(|outcome| fits(seen, *outcome, request, pending, is_theirs))
        };
        let (their_pending, our_pending) = match &self.pending {
            Some((_, theirs, ours)) => (Some(*theirs), Some(*ours)),
            None => (None, None),
        };
        ensure!(fits(&ours, our_pending, false), "ours: {ours:x?}; QEMU: {theirs:x?}");
        if !fits(&theirs, their_pending, true) {
            let new = their_pending
                .is_none_or(|pending| pending != theirs.record)
                .then_some(theirs.record)
                .flatten();
            let reason = new.map(|(_, reason, _, _)| reason);
            let touches = |walk: &super::model::Walk| walk.page.is_some_and(|page| page.touches_interrupts());
            let deviation = match reason {
                None if theirs.reached.is_empty() && denies => 0,
                Some(0xe) if theirs.reached.is_empty() && walks.iter().any(touches) => 1,
                Some(3 | 7) if theirs.reached.is_empty() && walks.iter().any(|walk| walk.has_all_ones) => 2,
                _ => bail!("QEMU: {theirs:x?}; ours: {ours:x?}"),
            };
            self.tally.deviations[deviation] += 1;
        }
        self.pending = keeps.then_some((request.source, theirs.record, ours.record));
        if theirs.record != ours.record {
            self.clear_record()?;
        }
        // Where both may differ, they are made the same again.
        if allowed.len() > 1 || theirs.reached != ours.reached {
            for place in places.iter().filter(|_| request.is_write) {
                self.machine.poke(*place, 0)?;
            }
        }
        Ok(())
    }
}

fn ours_is_clear(status: u32) -> bool {
    status & 1 << 4 == 0
}

fn half(word: u64) -> u16 {
    u16::try_from(word & 0xffff).unwrap_or(0)
}

/// Whether what is seen of an access is that outcome.
fn fits(
    seen: &Seen,
    outcome: Outcome,
    request: Request,
    pending: Option<Option<Record>>,
    is_theirs: bool,
) -> bool {
    let record = match outcome {
        Outcome::Blocked { reason, is_quiet: false } => {
            Some((request.source, reason, request.iova & !0xfff, !request.is_write))
        }
        _ => None,
    };
    // One that is pending already hides another of the same source.
    let record = pending.flatten().or(record);
    let reached = match outcome {
        Outcome::Reaches(gpa) if gpa + 8 <= RAM => vec![gpa],
        _ => Vec::new(),
    };
    let reached = if is_theirs && !request.is_write { Vec::new() } else { reached };
    let status = if record.is_some() { 2 } else { 0 };
    seen.record == record && seen.reached == reached && seen.status == status
}
