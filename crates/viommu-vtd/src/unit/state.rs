//! Save and restore: what lies in the registers. Tables and the queue's descriptors lie in the guest's memory, which the
//! embedder brings back first, with endpoints, their PASIDs and subscribers. What was known of the tables is not saved:
//! they are read again, as hardware with empty caches does.

use core::sync::atomic::Ordering;

use viommu::{AttachErrorKind, Completion, EndpointId};

use super::jobs::Task;
use super::registers::Registers;
use super::{Control, Reset, Vtd};
use crate::faults::{self, Event, RECORDS};
use crate::metrics::Metrics;
use crate::spec::fault as record;
use crate::spec::register::{EventControl, FaultStatus, Global, context_command, iotlb_command};

/// The version that [`Vtd::save`] writes. [`Vtd::restore`] takes this and all before it.
pub const STATE_VERSION: u32 = 1;

/// Where a queue's head and tail have bits.
const QUEUE_OFFSET: u64 = 0x7_fff0;

/// What a guest's driver has programmed and may know. Serialisable with feature `serde`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Saved {
    /// [`STATE_VERSION`] of who saved it.
    pub version: u32,
    /// CAP and ECAP, which the driver has read.
    pub capabilities: [u64; 2],
    /// [`Config::host_bits`](crate::Config::host_bits).
    pub host_bits: u32,
    /// Those of commands, the queue and its event.
    pub registers: SavedRegisters,
    /// Those of faults.
    pub faults: SavedFaults,
}

/// Registers of commands, of the invalidation queue and of its event.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SavedRegisters {
    /// GSTS.
    pub global_status: u32,
    /// RTADDR.
    pub root_table: u64,
    /// RTADDR as it was at the last GCMD.SRTP: the one that is used.
    pub root_in_use: u64,
    /// CCMD.
    pub context_command: u64,
    /// IVA.
    pub invalidate_address: u64,
    /// IOTLB.
    pub iotlb_command: u64,
    /// IQA.
    pub queue_address: u64,
    /// IQH.
    pub queue_head: u64,
    /// IQT.
    pub queue_tail: u64,
    /// ICS.
    pub wait_status: u32,
    /// The invalidation event.
    pub wait_event: SavedEvent,
}

/// Registers of faults.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SavedFaults {
    /// FSTS without what the records say: its bits 15 to 8, and bit 1.
    pub status: u32,
    /// The fault event.
    pub event: SavedEvent,
    /// The fault records.
    pub records: [[u64; 2]; RECORDS],
    /// Which of them the next fault goes to.
    pub next: u32,
}

/// Registers of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SavedEvent {
    /// Whether it is masked, and whether an interrupt is held back.
    pub control: u32,
    /// The interrupt's data.
    pub data: u32,
    /// The interrupt's address.
    pub address: u64,
}

/// The unit cannot be saved now: let what it does for the driver come to its end first ([`Vtd::wait`]).
pub use viommu::SaveError;

/// The state cannot be restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// It was saved by a later version. Nothing has changed.
    #[error("state of version {0}; this is version {STATE_VERSION}")]
    Version(u32),
    /// The driver was offered something else. Nothing has changed.
    #[error("{what} is {saved:#x} in the state, and {here:#x} here")]
    Differs {
        /// What differs.
        what: &'static str,
        /// In the state.
        saved: u64,
        /// Of this unit.
        here: u64,
    },
    /// No unit can have saved it. Nothing has changed.
    #[error("no unit has {0}")]
    Invalid(&'static str),
    /// An endpoint cannot see what its context entry says. The unit is as after a reset.
    #[error("an endpoint cannot see what its context entry says{}", of(.0))]
    View(Option<AttachErrorKind>),
    /// A mirror could not hold what the tables map, and has been fenced. The unit is as after a reset.
    #[error("a mirror of {0} cannot hold what the guest's tables map")]
    Mirror(EndpointId),
    /// The guest's tables have more than the record may. The unit is as after a reset.
    #[error("the guest's tables have more than the record may")]
    Cap,
}

fn of(kind: &Option<AttachErrorKind>) -> String {
    kind.as_ref().map_or_else(String::new, |kind| format!(": {kind}"))
}

impl Vtd {
    /// Saves what the driver has programmed and may know. The virtual machine is stopped. Descriptors that have not been
    /// begun stay in the queue, and are done after the restore.
    ///
    /// # Errors
    /// [`SaveError::Pending`]: something that the driver has asked for is not over.
    pub fn save(&self) -> Result<Saved, SaveError> {
        let control = self.lock();
        let pending = control.jobs.len().saturating_add(self.iommu().outstanding());
        if pending != 0 {
            return Err(SaveError::Pending(pending));
        }
        let config = self.config();
        let Control { registers, .. } = &*control;
        Ok(Saved {
            version: STATE_VERSION,
            capabilities: [config.capability(), config.extended_capability()],
            host_bits: config.host_bits,
            registers: SavedRegisters {
                global_status: registers.status.bits(),
                root_table: registers.root_table,
                root_in_use: self.0.shared.root_table.load(Ordering::Acquire),
                context_command: registers.context_command,
                invalidate_address: registers.invalidate_address,
                iotlb_command: registers.iotlb_command,
                queue_address: registers.queue_address,
                queue_head: registers.head,
                queue_tail: registers.tail,
                wait_status: registers.wait_status,
                wait_event: save_event(&registers.wait_event),
            },
            faults: self.0.faults.with(|faults| SavedFaults {
                status: faults.status.bits(),
                event: save_event(&faults.event),
                records: faults.records,
                next: u32::try_from(faults.next).unwrap_or(0),
            }),
        })
    }

    /// Restores what a driver had programmed, before the guest runs and with its memory back in place. Endpoints see what
    /// the tables say now, and their mirrors are filled, the ordinary way, before this returns. What was there before is
    /// gone. Nothing in the state is trusted. [`Vtd::process`] is due afterwards, as after a write.
    ///
    /// Blocks for as long as it takes to read the guest's tables, under the unit's lock.
    ///
    /// # Errors
    /// See [`RestoreError`]: all or nothing.
    pub fn restore(&self, saved: &Saved) -> Result<Completion, RestoreError> {
        // Taken apart without `..`: a field that a later version adds must be thought of here.
        let Saved { version, capabilities: [capability, extended], host_bits, registers, faults } = saved;
        if *version > STATE_VERSION {
            return Err(RestoreError::Version(*version));
        }
        let config = self.config();
        for (what, saved, here) in [
            ("CAP", *capability, config.capability()),
            ("ECAP", *extended, config.extended_capability()),
            ("the width of a host address", u64::from(*host_bits), u64::from(config.host_bits)),
        ] {
            if saved != here {
                return Err(RestoreError::Differs { what, saved, here });
            }
        }
        let root_in_use = registers.root_in_use;
        let registers = check_registers(registers)?;
        let faults = check_faults(faults)?;

        let mut control = self.lock();
        let is_fenced = |id: &EndpointId| self.iommu().endpoint(*id).is_some_and(|own| own.is_fenced());
        let able: Vec<_> = control.members.keys().copied().filter(|id| !is_fenced(id)).collect();
        let Reset { completion: mut done, refused, .. } = self.0.reset(&mut control);
        let before = self.metrics();
        control.registers = registers;
        self.0.faults.with(|own| *own = faults);
        self.0.shared.root_table.store(root_in_use, Ordering::Release);
        let is_translating = control.registers.is_translating();
        let switch = is_translating.then_some(Task::Switch);
        done.merge(self.0.run_all(&mut control, switch));
        // While translation is off all is seen as it is.
        let refused = refused.filter(|_| !is_translating);
        let fenced = able.into_iter().find(is_fenced);
        let Some(error) = what_failed(&before, &self.metrics(), refused, fenced) else { return Ok(done) };
        // Whoever was filled is emptied again. The guest has not run, so nobody waits for that.
        drop(self.0.reset(&mut control).completion);
        Err(error)
    }
}

fn what_failed(
    before: &Metrics,
    after: &Metrics,
    refused: Option<AttachErrorKind>,
    fenced: Option<EndpointId>,
) -> Option<RestoreError> {
    if refused.is_some() || after.refused_views != before.refused_views {
        return Some(RestoreError::View(refused));
    }
    if let Some(id) = fenced {
        return Some(RestoreError::Mirror(id));
    }
    let has_room = (after.syncs_capped, after.syncs_failed) == (before.syncs_capped, before.syncs_failed);
    (!has_room).then_some(RestoreError::Cap)
}

fn save_event(event: &Event) -> SavedEvent {
    let Event { masked: _, pending: _, data, address, upper } = *event;
    SavedEvent { control: event.control(), data, address: u64::from(upper) << 32 | u64::from(address) }
}

/// `has_cause`: there is something to tell, so that an interrupt may be held back.
fn check_event(saved: &SavedEvent, has_cause: bool) -> Result<Event, RestoreError> {
    let SavedEvent { control, data, address } = *saved;
    let invalid = || RestoreError::Invalid("such an event");
    let control = EventControl::from_bits(control).ok_or_else(invalid)?;
    let masked = control.contains(EventControl::MASKED);
    let pending = control.contains(EventControl::PENDING);
    if pending && !(masked && has_cause) || data > 0xffff || address & 3 != 0 {
        return Err(invalid());
    }
    let [address, upper] = faults::halves(address);
    Ok(Event { masked, pending, data, address, upper })
}

/// Whether a driver can have brought a unit there, with nothing under way.
fn check_registers(saved: &SavedRegisters) -> Result<Registers, RestoreError> {
    let SavedRegisters {
        global_status,
        root_table,
        root_in_use,
        context_command,
        invalidate_address,
        iotlb_command,
        queue_address,
        queue_head,
        queue_tail,
        wait_status,
        ref wait_event,
    } = *saved;
    let lasting = Global::TRANSLATION | Global::QUEUE | Global::ROOT_TABLE;
    let status = Global::from_bits(global_status).filter(|status| lasting.contains(*status));
    let status = status.ok_or(RestoreError::Invalid("such a global status"))?;
    if root_in_use != 0 && !status.contains(Global::ROOT_TABLE) {
        return Err(RestoreError::Invalid("a root table in use that was never set"));
    }
    if context_command & context_command::INVALIDATE != 0 || iotlb_command & iotlb_command::INVALIDATE != 0 {
        return Err(RestoreError::Invalid("a command under way when it is saved"));
    }
    if (queue_head | queue_tail) & !QUEUE_OFFSET != 0 || wait_status > 1 {
        return Err(RestoreError::Invalid("such a queue"));
    }
    Ok(Registers {
        status,
        wanted: status,
        root_table,
        context_command,
        invalidate_address,
        iotlb_command,
        queue_address,
        head: queue_head,
        tail: queue_tail,
        wait_status,
        wait_event: check_event(wait_event, wait_status == 1)?,
        ..Registers::default()
    })
}

/// Whether faults can have left the registers so.
fn check_faults(saved: &SavedFaults) -> Result<faults::Registers, RestoreError> {
    const WORD_1: u64 = 0xffff
        | record::RECORD_HAS_PASID
        | 0xff << record::RECORD_REASON
        | 0xf_ffff << record::RECORD_PASID
        | record::RECORD_READ
        | record::RECORD_PENDING;
    let SavedFaults { status, event, records, next } = saved;
    let status = FaultStatus::from_bits(*status);
    // A unit sets no others.
    let status = status.filter(|status| (FaultStatus::OVERFLOW | FaultStatus::QUEUE_ERROR).contains(*status));
    let next = usize::try_from(*next).ok().filter(|next| *next < RECORDS);
    let is_record = |[low, high]: &[u64; 2]| low & 0xfff == 0 && high & !WORD_1 == 0;
    let (Some(status), Some(next), true) = (status, next, records.iter().all(is_record)) else {
        return Err(RestoreError::Invalid("such fault registers"));
    };
    let mut registers = faults::Registers { status, event: Event::RESET, records: *records, next };
    registers.event = check_event(event, !registers.is_quiet())?;
    Ok(registers)
}
