//! Faults: from the accesses that are blocked to the fault registers and their interrupt.

use core::sync::atomic::{AtomicBool, Ordering};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use viommu::reader::FaultSink;
use viommu::{Access, EndpointId, FaultReason};

use crate::context::{Abilities, Context};
use crate::log;
use crate::memory::TableMemory;
use crate::metrics::{Counters, bump};
use crate::paging::Rules;
use crate::spec::fault::{self, Reason};
use crate::spec::register::{EventControl, FaultStatus};
use crate::sync::{Mutex, lock};

/// Fault records.
pub(crate) const RECORDS: usize = 8;

/// Faults that are remembered for a reader.
const RECENT: usize = 16;

/// A fault, recorded or not, for a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecentFault {
    /// When it happened.
    pub at: Instant,
    /// What was blocked.
    pub fault: viommu::Fault,
    /// The reason's number in the specification; `None` for one that has none there.
    pub reason: Option<u8>,
}

/// An interrupt to send: a write of `data` to `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Where.
    pub address: u64,
    /// What.
    pub data: u32,
}

pub(crate) type Sender = Arc<dyn Fn(Msi) + Send + Sync>;

/// The registers of one kind of event: control, data, address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub(crate) masked: bool,
    pub(crate) pending: bool,
    pub(crate) data: u32,
    pub(crate) address: u32,
    pub(crate) upper: u32,
}

impl Event {
    pub(crate) const RESET: Self = Self { masked: true, pending: false, data: 0, address: 0, upper: 0 };

    pub(crate) fn control(&self) -> u32 {
        let mut control = EventControl::empty();
        control.set(EventControl::MASKED, self.masked);
        control.set(EventControl::PENDING, self.pending);
        control.bits()
    }

    /// There is something to say: an interrupt, or none while they are masked.
    #[must_use]
    pub(crate) fn raise(&mut self) -> Option<Msi> {
        self.pending = self.masked;
        (!self.masked).then_some(self.msi())
    }

    /// The control register is written: what was held back comes now.
    #[must_use]
    pub(crate) fn write_control(&mut self, value: u32) -> Option<Msi> {
        self.masked = value & EventControl::MASKED.bits() != 0;
        (!self.masked && core::mem::take(&mut self.pending)).then_some(self.msi())
    }

    fn msi(&self) -> Msi {
        Msi { address: u64::from(self.upper) << 32 | u64::from(self.address), data: self.data }
    }
}

/// The fault registers.
pub(crate) struct Registers {
    /// All but PENDING, which the records say.
    pub(crate) status: FaultStatus,
    pub(crate) event: Event,
    pub(crate) records: [[u64; 2]; RECORDS],
    /// Where the next fault goes.
    pub(crate) next: usize,
}

impl Default for Registers {
    fn default() -> Self {
        Self { status: FaultStatus::empty(), event: Event::RESET, records: [[0; 2]; RECORDS], next: 0 }
    }
}

impl Registers {
    fn first_pending(&self) -> Option<usize> {
        let is_pending = |record: &[u64; 2]| record[1] & fault::RECORD_PENDING != 0;
        // In the order in which they were recorded.
        let order = (0..RECORDS).map(|after| self.next.wrapping_add(after) % RECORDS);
        order.into_iter().find(|at| self.records.get(*at).is_some_and(is_pending))
    }

    pub(crate) fn status(&self) -> u32 {
        let first = self.first_pending();
        let mut status = self.status;
        status.set(FaultStatus::PENDING, first.is_some());
        status.bits() | first.and_then(|at| u32::try_from(at).ok()).unwrap_or(0) << 8
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.status.is_empty() && self.first_pending().is_none()
    }

    pub(crate) fn has(&self, status: FaultStatus) -> bool {
        self.status.contains(status)
    }

    /// Sets a bit of the status; an interrupt comes with the first only.
    #[must_use]
    pub(crate) fn set(&mut self, status: FaultStatus) -> Option<Msi> {
        let first = self.is_quiet();
        self.status |= status;
        if first { self.event.raise() } else { None }
    }

    /// The status register is written: bits that are one are cleared.
    pub(crate) fn write_status(&mut self, value: u32) {
        self.status &= !FaultStatus::from_bits_truncate(value);
        self.settle();
    }

    fn settle(&mut self) {
        if self.is_quiet() {
            self.event.pending = false;
        }
    }

    /// Half `half` (0 to 3) of a record.
    pub(crate) fn record(&self, at: usize, half: usize) -> u32 {
        let word = self.records.get(at).and_then(|record| record.get(half / 2)).copied().unwrap_or(0);
        let [low, high] = halves(word);
        if half.is_multiple_of(2) { low } else { high }
    }

    /// The last half of a record is written: it is not pending any more if the bit is one.
    pub(crate) fn clear_record(&mut self, at: usize, value: u32) {
        let [_, pending] = halves(fault::RECORD_PENDING);
        if let Some(record) = self.records.get_mut(at).filter(|_| value & pending != 0) {
            record[1] &= !fault::RECORD_PENDING;
        }
        self.settle();
    }

    /// Records a fault. Gives what became of it, and the interrupt that is due.
    fn push(&mut self, word0: u64, word1: u64) -> (Outcome, Option<Msi>) {
        const SOURCE: u64 = 0xffff | fault::RECORD_HAS_PASID | 0xf_ffff << fault::RECORD_PASID;
        if self.status.contains(FaultStatus::OVERFLOW) {
            return (Outcome::Lost, None);
        }
        let same =
            |record: &[u64; 2]| record[1] & fault::RECORD_PENDING != 0 && (record[1] ^ word1) & SOURCE == 0;
        if self.records.iter().any(same) {
            return (Outcome::Collapsed, None);
        }
        let first = self.is_quiet();
        let Some(record) = self.records.get_mut(self.next) else { return (Outcome::Lost, None) };
        if record[1] & fault::RECORD_PENDING != 0 {
            return (Outcome::Lost, self.set(FaultStatus::OVERFLOW));
        }
        *record = [word0, word1 | fault::RECORD_PENDING];
        self.next = self.next.wrapping_add(1) % RECORDS;
        (Outcome::Recorded, if first { self.event.raise() } else { None })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Recorded,
    Collapsed,
    Lost,
}

/// Low and high half.
pub(crate) fn halves(word: u64) -> [u32; 2] {
    let half = |word: u64| u32::try_from(word & 0xffff_ffff).unwrap_or(0);
    [half(word), half(word >> 32)]
}

/// Collects faults on the threads of the devices; takes no lock but its own, and reads tables.
pub(crate) struct Faults {
    memory: Arc<dyn TableMemory>,
    abilities: Abilities,
    counters: Arc<Counters>,
    registers: Mutex<Registers>,
    /// Without translation there are no faults: who goes nowhere then has what any memory controller has for it.
    translates: AtomicBool,
    /// What the unit knows of each endpoint. Without caching mode, what its walker knows.
    contexts: RwLock<BTreeMap<EndpointId, Known>>,
    sender: RwLock<Option<Sender>>,
    /// The last ones, oldest first.
    recent: Mutex<VecDeque<RecentFault>>,
}

/// What is known of an endpoint: the context itself, or who looks it up.
#[derive(Clone)]
pub(crate) enum Known {
    Context(Context),
    Walker(Arc<crate::space::EndpointWalker>),
}

impl Faults {
    pub(crate) fn new(memory: Arc<dyn TableMemory>, abilities: Abilities, counters: Arc<Counters>) -> Self {
        Self {
            memory,
            abilities,
            counters,
            registers: Mutex::default(),
            translates: AtomicBool::new(false),
            contexts: RwLock::default(),
            sender: RwLock::default(),
            recent: Mutex::default(),
        }
    }

    pub(crate) fn recent(&self) -> Vec<RecentFault> {
        lock(&self.recent).iter().copied().collect()
    }

    fn remember(&self, fault: &viommu::Fault, reason: Option<Reason>) {
        let mut recent = lock(&self.recent);
        if recent.len() >= RECENT {
            recent.pop_front();
        }
        recent.push_back(RecentFault {
            at: Instant::now(),
            fault: *fault,
            reason: reason.map(|Reason(r)| r),
        });
    }

    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut Registers) -> R) -> R {
        f(&mut lock(&self.registers))
    }

    pub(crate) fn know(&self, id: EndpointId, known: Option<Known>) {
        let mut contexts = self.contexts.write().unwrap_or_else(PoisonError::into_inner);
        match known {
            Some(known) => contexts.insert(id, known),
            None => contexts.remove(&id),
        };
    }

    pub(crate) fn set_translates(&self, on: bool) {
        self.translates.store(on, Ordering::SeqCst);
    }

    pub(crate) fn set_sender(&self, sender: Sender) {
        *self.sender.write().unwrap_or_else(PoisonError::into_inner) = Some(sender);
    }

    pub(crate) fn send(&self, msi: Option<Msi>) {
        let Some(msi) = msi else { return };
        bump(&self.counters.interrupts);
        let sender = self.sender.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(sender) = sender {
            sender(msi);
        }
    }

    /// The reason of a fault, if there is one to record.
    fn reason(&self, fault: &viommu::Fault, context: &Context) -> Option<Reason> {
        match (fault.reason, context) {
            (FaultReason::Blocked | FaultReason::Unmapped, Context::Blocked(reason, _)) => Some(*reason),
            (FaultReason::Unmapped, Context::Paging { paging, .. }) => {
                let rules = &self.abilities.rules;
                // Tables that say otherwise by now: the translation was not there when it was asked for.
                let now = rules.blocks(&*self.memory, *paging, fault.iova, fault.access);
                Some(now.unwrap_or_else(|| Rules::denied(paging.format, fault.access)))
            }
            (FaultReason::Permission, Context::Paging { paging, .. }) => {
                Some(Rules::denied(paging.format, fault.access))
            }
            _ => None,
        }
    }
}

impl FaultSink for Faults {
    fn fault(&self, fault: &viommu::Fault) {
        let translated = fault.endpoint.filter(|_| self.translates.load(Ordering::SeqCst));
        let known = translated.and_then(|id| {
            self.contexts
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .get(&id)
                .cloned()
                .map(|known| (id, known))
        });
        let context = known.map(|(id, known)| match known {
            Known::Context(context) => (id, context),
            Known::Walker(walker) => (id, walker.context().0),
        });
        let reason = context.as_ref().and_then(|(id, context)| {
            let source = u16::try_from(id.requester).ok()?;
            Some((source, id.pasid, self.reason(fault, context)?))
        });
        self.remember(fault, reason.map(|(_, _, reason)| reason));
        let is_quiet = context.is_some_and(|(_, context)| context.is_quiet());
        let Some((source, pasid, reason)) = reason.filter(|_| !is_quiet) else {
            bump(&self.counters.faults_quiet);
            return;
        };
        log::fault(fault, reason.0);
        let read = if fault.access.contains(Access::WRITE) { 0 } else { fault::RECORD_READ };
        let pasid =
            pasid.map_or(0, |pasid| u64::from(pasid) << fault::RECORD_PASID | fault::RECORD_HAS_PASID);
        let word1 = u64::from(source) | pasid | u64::from(reason.0) << fault::RECORD_REASON | read;
        let (outcome, msi) = self.with(|registers| registers.push(fault.iova.0 & !0xfff, word1));
        bump(match outcome {
            Outcome::Recorded => &self.counters.faults,
            Outcome::Collapsed => &self.counters.faults_collapsed,
            Outcome::Lost => &self.counters.faults_lost,
        });
        self.send(msi);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word1(source: u16) -> u64 {
        u64::from(source) | 5 << fault::RECORD_REASON
    }

    fn unmasked() -> Registers {
        let event = Event { data: 0x41, address: 0xfee0_0000, ..Event::RESET };
        let mut registers = Registers { event, ..Registers::default() };
        assert_eq!(registers.event.write_control(0), None);
        registers
    }

    #[test]
    fn push_when_it_is_the_first_sends_one_interrupt_until_all_is_cleared() {
        let mut registers = unmasked();
        let (outcome, msi) = registers.push(0x1000, word1(8));
        assert_eq!((outcome, msi), (Outcome::Recorded, Some(Msi { address: 0xfee0_0000, data: 0x41 })));
        assert_eq!(registers.push(0x2000, word1(9)), (Outcome::Recorded, None));
        assert_eq!(registers.push(0x3000, word1(8)), (Outcome::Collapsed, None));
        assert_eq!(registers.status(), FaultStatus::PENDING.bits());
        registers.clear_record(0, 1 << 31);
        assert_eq!(registers.status(), FaultStatus::PENDING.bits() | 1 << 8);
        assert_eq!(registers.record(1, 0), 0x2000);
        registers.clear_record(1, 1 << 31);
        assert_eq!(registers.status(), 0);
        assert!(registers.push(0, word1(8)).1.is_some());
        assert_eq!(registers.status(), FaultStatus::PENDING.bits() | 2 << 8);
    }

    #[test]
    fn push_when_no_record_is_free_says_overflow_until_it_is_cleared() {
        let mut registers = unmasked();
        for source in 0..8 {
            assert_eq!(registers.push(0, word1(source)).0, Outcome::Recorded);
        }
        assert_eq!(registers.push(0, word1(8)), (Outcome::Lost, None));
        assert_eq!(registers.status() & 3, 3);
        registers.clear_record(0, 1 << 31);
        assert_eq!(registers.push(0, word1(8)), (Outcome::Lost, None), "until the driver has seen it");
        registers.write_status(1);
        assert_eq!(registers.push(0, word1(8)), (Outcome::Recorded, None));
    }

    #[test]
    fn events_when_masked_are_held_back_until_unmasked_or_served() {
        let mut registers = Registers::default();
        assert_eq!(registers.push(0, word1(8)), (Outcome::Recorded, None));
        assert_eq!(registers.event.control(), 3 << 30);
        assert!(registers.event.write_control(0).is_some());
        assert_eq!(registers.event.control(), 0);
        assert_eq!(registers.event.write_control(1 << 31), None);
        registers.clear_record(0, 1 << 31);
        assert_eq!(registers.push(0, word1(8)), (Outcome::Recorded, None));
        registers.clear_record(1, 1 << 31);
        assert_eq!(registers.event.write_control(0), None, "served by polling");
    }
}
