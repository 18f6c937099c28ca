//! The register page.

use viommu::Gpa;

use super::jobs::{After, Task};
use super::queue::{MAX_MASK, NARROW, WIDE, contexts, place, translations};
use super::views::Which;
use super::{Config, Control, Inner, Stage, Width};
use crate::faults::{Event, Msi, RECORDS, halves};
use crate::log;
use crate::spec::register as r;
use crate::spec::register::Global;

use viommu::IovaRange;

/// Bytes of a fault record.
const RECORD: u64 = 16;
/// Bits of a PASID.
pub(crate) const PASID_BITS: u32 = 20;

/// A register that reads as busy until what it asked for is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pending {
    Contexts,
    /// Those of pages more than one invalidation may have are not invalidated.
    Translations {
        is_refused: bool,
    },
}

/// What the registers hold, but for those of faults.
#[derive(Debug)]
pub(crate) struct Registers {
    pub(super) status: Global,
    /// What the status will be when all commands are done.
    pub(super) wanted: Global,
    /// A command that came while another was under way.
    pub(super) command: Option<u32>,
    pub(super) busy: bool,
    pub(super) root_table: u64,
    pub(super) context_command: u64,
    pub(super) invalidate_address: u64,
    pub(super) iotlb_command: u64,
    pub(super) queue_address: u64,
    pub(super) head: u64,
    pub(super) tail: u64,
    pub(super) wait_status: u32,
    pub(super) wait_event: Event,
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            status: Global::empty(),
            wanted: Global::empty(),
            command: None,
            busy: false,
            root_table: 0,
            context_command: 0,
            invalidate_address: 0,
            iotlb_command: 0,
            queue_address: 0,
            head: 0,
            tail: 0,
            wait_status: 0,
            wait_event: Event::RESET,
        }
    }
}

fn set_half(word: &mut u64, high: bool, value: u32) {
    let [low_was, high_was] = halves(*word);
    let (low, high) = if high { (low_was, value) } else { (value, high_was) };
    *word = u64::from(high) << 32 | u64::from(low);
}

impl Registers {
    /// As commands have been given, whether the status says so already or not.
    pub(super) fn is_translating(&self) -> bool {
        self.wanted.contains(Global::TRANSLATION)
    }

    fn queue_bytes(&self) -> u64 {
        let order = u32::try_from(self.queue_address & r::queue_address::SIZE).unwrap_or(0);
        4096_u64.checked_shl(order).unwrap_or(4096)
    }

    /// Where the next descriptor is, if there is one: `Some(None)` for one that can be nowhere.
    pub(super) fn next_descriptor(&self) -> Option<Option<Gpa>> {
        if !self.status.contains(Global::QUEUE) || self.head == self.tail {
            return None;
        }
        // A tail behind the end, or inside a descriptor, is never reached.
        let bytes = self.descriptor_bytes();
        let fits = self.tail.is_multiple_of(bytes) && self.head.is_multiple_of(bytes);
        let there = self.tail < self.queue_bytes() && fits;
        Some(place(self.queue_address & !0xfff, self.head).filter(|_| there))
    }

    pub(super) fn has_wide_queue(&self) -> bool {
        self.queue_address & r::queue_address::WIDE != 0
    }

    fn descriptor_bytes(&self) -> u64 {
        if self.has_wide_queue() { WIDE } else { NARROW }
    }

    /// A descriptor is done.
    pub(super) fn advance(&mut self) {
        let next = self.head.saturating_add(self.descriptor_bytes());
        self.head = if next >= self.queue_bytes() { 0 } else { next };
    }

    /// A wait descriptor wants an interrupt.
    pub(super) fn wait_is_over(&mut self) -> Option<Msi> {
        if core::mem::replace(&mut self.wait_status, 1) == 1 {
            return None;
        }
        self.wait_event.raise()
    }

    pub(super) fn answer_command(&mut self, bits: Global, on: bool) {
        self.status.set(bits, on);
        self.busy = false;
        if bits == Global::QUEUE {
            self.head = 0;
        }
    }

    pub(super) fn answer(&mut self, pending: Pending) {
        // What was asked for is what was performed.
        match pending {
            Pending::Contexts => {
                let granularity = self.context_command >> r::context_command::REQUESTED & 3;
                self.context_command &=
                    !(r::context_command::INVALIDATE | 3 << r::context_command::PERFORMED);
                self.context_command |= granularity << r::context_command::PERFORMED;
            }
            Pending::Translations { is_refused } => {
                let requested = self.iotlb_command >> r::iotlb_command::REQUESTED & 3;
                let granularity = if is_refused { 0 } else { requested };
                self.iotlb_command &= !(r::iotlb_command::INVALIDATE | 3 << r::iotlb_command::PERFORMED);
                self.iotlb_command |= granularity << r::iotlb_command::PERFORMED;
            }
        }
    }
}

impl Config {
    /// CAP.
    pub(super) fn capability(&self) -> u64 {
        use crate::spec::register::capability as c;
        let (widths, bits): (u64, u64) = match self.width {
            Width::Bits39 => (0b010, 39),
            Width::Bits48 => (0b110, 48),
            Width::Bits57 => (0b1110, 57),
        };
        let records = u64::try_from(RECORDS).unwrap_or(1).saturating_sub(1);
        let caching = if self.caching_mode { c::CACHING_MODE } else { 0 };
        let first = match (self.scalable, self.width) {
            (Some(Stage::First), Width::Bits57) => c::FIRST_STAGE_1G | c::FIVE_LEVELS,
            (Some(Stage::First), _) => c::FIRST_STAGE_1G,
            (Some(Stage::Second) | None, _) => 0,
        };
        6 << c::DOMAINS
            | caching
            | widths << c::WIDTHS
            | bits.saturating_sub(1) << c::MAX_WIDTH
            | (r::FAULT_RECORDS / RECORD) << c::FAULT_OFFSET
            | 3 << c::LARGE_PAGES
            | c::PAGE_SELECTIVE
            | records << c::FAULT_RECORDS
            | u64::from(MAX_MASK) << c::MAX_MASK
            | c::WRITE_DRAIN
            | c::READ_DRAIN
            | first
    }

    /// ECAP.
    pub(super) fn extended_capability(&self) -> u64 {
        use crate::spec::register::extended as e;
        let pass = if self.pass_through { e::PASS_THROUGH } else { 0 };
        let device_tlb = if self.device_tlb { e::DEVICE_TLB } else { 0 };
        let bits = u64::from(PASID_BITS).saturating_sub(1) << e::PASID_BITS;
        let both = e::SCALABLE | e::SCALABLE_COHERENT | e::RID_PASID | e::PASID | bits;
        let scalable = match self.scalable {
            None => 0,
            Some(Stage::Second) => e::SECOND_STAGE | both,
            Some(Stage::First) => e::FIRST_STAGE | both,
        };
        e::COHERENT
            | e::QUEUE
            | e::SNOOP_CONTROL
            | pass
            | device_tlb
            | scalable
            | (r::INVALIDATE_ADDRESS / 16) << e::IOTLB_OFFSET
    }
}

impl Inner {
    pub(super) fn read(&self, control: &Control, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let last = u64::try_from(data.len()).unwrap_or(u64::MAX);
        let end = offset.saturating_add(last).min(r::PAGE);
        let mut word_at = offset & !7;
        while word_at < end {
            let bytes = self.word(control, word_at).to_le_bytes();
            for (place, byte) in (word_at..).zip(bytes) {
                let at = place.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
                if let Some(to) = at.and_then(|at| data.get_mut(at)) {
                    *to = byte;
                }
            }
            word_at = word_at.saturating_add(8);
        }
    }

    /// The 8 bytes at `at`.
    fn word(&self, control: &Control, at: u64) -> u64 {
        let both = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let registers = &control.registers;
        let wait = &registers.wait_event;
        match at {
            r::VERSION => 0x10,
            r::CAPABILITY => self.config.capability(),
            r::EXTENDED_CAPABILITY => self.config.extended_capability(),
            r::GLOBAL_COMMAND => both(0, registers.status.bits()),
            r::ROOT_TABLE => registers.root_table,
            r::CONTEXT_COMMAND => registers.context_command,
            0x30 => both(0, self.faults.with(|faults| faults.status())),
            r::FAULT_CONTROL => self.faults.with(|f| both(f.event.control(), f.event.data)),
            r::FAULT_ADDRESS => self.faults.with(|f| both(f.event.address, f.event.upper)),
            r::QUEUE_HEAD => registers.head,
            r::QUEUE_TAIL => registers.tail,
            r::QUEUE_ADDRESS => registers.queue_address,
            0x98 => both(0, registers.wait_status),
            r::WAIT_CONTROL => both(wait.control(), wait.data),
            r::WAIT_ADDRESS => both(wait.address, wait.upper),
            r::INVALIDATE_ADDRESS => 0,
            r::IOTLB_COMMAND => registers.iotlb_command,
            _ => match record(at) {
                Some((number, half)) => self.faults.with(|faults| {
                    both(faults.record(number, half), faults.record(number, half.saturating_add(1)))
                }),
                None => 0,
            },
        }
    }

    pub(super) fn write(&self, control: &mut Control, offset: u64, data: &[u8]) {
        match *data {
            [a, b, c, d] if offset.is_multiple_of(4) => {
                self.write_half(control, offset, u32::from_le_bytes([a, b, c, d]));
            }
            [a, b, c, d, e, f, g, h] if offset.is_multiple_of(8) => {
                self.write_half(control, offset, u32::from_le_bytes([a, b, c, d]));
                self.write_half(control, offset.saturating_add(4), u32::from_le_bytes([e, f, g, h]));
            }
            _ => log::odd("a write of a register with an odd size or place", offset),
        }
    }

    fn write_half(&self, control: &mut Control, at: u64, value: u32) {
        let registers = &mut control.registers;
        let is_high = at & 4 != 0;
        match at {
            r::GLOBAL_COMMAND => self.command(control, value),
            0x20 | 0x24 => set_half(&mut registers.root_table, is_high, value),
            0x28 => set_half(&mut registers.context_command, false, value),
            0x2c => self.context_command(control, value),
            r::FAULT_STATUS => self.faults.with(|faults| faults.write_status(value)),
            r::FAULT_CONTROL => {
                let msi = self.faults.with(|faults| faults.event.write_control(value));
                self.faults.send(msi);
            }
            r::FAULT_DATA => self.faults.with(|faults| faults.event.data = value & 0xffff),
            r::FAULT_ADDRESS => self.faults.with(|faults| faults.event.address = value & !3),
            r::FAULT_UPPER => self.faults.with(|faults| faults.event.upper = value),
            r::QUEUE_TAIL => registers.tail = u64::from(value) & 0x7_fff0,
            0x90 | 0x94 => set_half(&mut registers.queue_address, is_high, value),
            r::WAIT_STATUS if value & 1 != 0 => {
                registers.wait_status = 0;
                registers.wait_event.pending = false;
            }
            r::WAIT_CONTROL => {
                let msi = registers.wait_event.write_control(value);
                self.faults.send(msi);
            }
            r::WAIT_DATA => registers.wait_event.data = value & 0xffff,
            r::WAIT_ADDRESS => registers.wait_event.address = value & !3,
            r::WAIT_UPPER => registers.wait_event.upper = value,
            0xf0 | 0xf4 => set_half(&mut registers.invalidate_address, is_high, value),
            0xf8 => set_half(&mut registers.iotlb_command, false, value),
            0xfc => self.iotlb_command(control, value),
            _ => {
                // The last quarter has the bit.
                if let Some((number, 3)) = record(at) {
                    self.faults.with(|faults| faults.clear_record(number, value));
                }
            }
        }
    }

    /// The global command: the whole state that is wanted, with one change.
    fn command(&self, control: &mut Control, value: u32) {
        if control.registers.busy {
            control.registers.command = Some(value);
            return;
        }
        let command = Global::from_bits_truncate(value);
        let changed = (command ^ control.registers.wanted) & (Global::TRANSLATION | Global::QUEUE);
        if command.contains(Global::ROOT_TABLE) {
            let table = control.registers.root_table;
            self.shared.root_table.store(table, core::sync::atomic::Ordering::Release);
            let tasks = [Task::Contexts(Which::All), Task::Translations { did: None, range: IovaRange::ALL }];
            self.begin(control, tasks, Global::ROOT_TABLE, true);
        } else if changed.contains(Global::QUEUE) {
            self.begin(control, [], Global::QUEUE, command.contains(Global::QUEUE));
        } else if changed.contains(Global::TRANSLATION) {
            self.begin(control, [Task::Switch], Global::TRANSLATION, command.contains(Global::TRANSLATION));
        }
        if control.registers.busy
            && (command ^ control.registers.wanted).intersects(Global::TRANSLATION | Global::QUEUE)
        {
            // More than one change: the others follow.
            control.registers.command = Some(value & !Global::ROOT_TABLE.bits());
        }
    }

    fn begin(&self, control: &mut Control, tasks: impl IntoIterator<Item = Task>, bits: Global, on: bool) {
        control.registers.busy = true;
        control.registers.wanted.set(bits, on);
        control.jobs.push(tasks, After::Global { bits, on });
    }

    /// A command is done; one that came meanwhile begins.
    pub(super) fn next_command(&self, control: &mut Control) {
        if let Some(value) = control.registers.command.take() {
            self.command(control, value);
        }
    }

    fn context_command(&self, control: &mut Control, value: u32) {
        use crate::spec::register::context_command as c;
        let registers = &mut control.registers;
        let was_busy = registers.context_command & c::INVALIDATE != 0;
        if was_busy {
            return;
        }
        set_half(&mut registers.context_command, true, value);
        let command = registers.context_command;
        if command & c::INVALIDATE == 0 {
            return;
        }
        let byte = |word: u64| u8::try_from(word & 3).unwrap_or(0);
        let source = u16::try_from(command >> c::SOURCE & 0xffff).unwrap_or(0);
        let granularity = byte(command >> c::REQUESTED);
        let task = contexts(granularity, source, byte(command >> c::FUNCTION_MASK));
        self.count(task.as_ref());
        control.jobs.push(task, After::Register(Pending::Contexts));
    }

    fn iotlb_command(&self, control: &mut Control, value: u32) {
        use crate::spec::register::iotlb_command as c;
        let registers = &mut control.registers;
        let was_busy = registers.iotlb_command & c::INVALIDATE != 0;
        if was_busy {
            return;
        }
        set_half(&mut registers.iotlb_command, true, value);
        let command = registers.iotlb_command;
        if command & c::INVALIDATE == 0 {
            return;
        }
        let granularity = u8::try_from(command >> c::REQUESTED & 3).unwrap_or(0);
        let did = u16::try_from(command >> c::DOMAIN & 0xffff).unwrap_or(0);
        let task = translations(granularity, did, registers.invalidate_address);
        self.count(task.as_ref());
        let is_refused = task.is_none();
        control.jobs.push(task, After::Register(Pending::Translations { is_refused }));
    }
}

/// The fault record at an offset, and which quarter of it.
fn record(at: u64) -> Option<(usize, usize)> {
    let inside = usize::try_from(at.checked_sub(r::FAULT_RECORDS)?).ok()?;
    let (number, half) = (inside / 16, inside % 16 / 4);
    (number < RECORDS).then_some((number, half))
}
