//! Save and restore: windows and entries. Backing, buses, endpoints and subscribers are the embedder's to bring back
//! first.

use core::ops::ControlFlow;

use viommu::{Completion, IovaRange, Mapping, StepErrorKind};

use crate::bus::{Bus, Merge, Spapr};
use crate::window::Window;

/// The version that [`Spapr::save`] writes. [`Spapr::restore`] takes this and all before it.
pub const STATE_VERSION: u32 = 1;

/// What a guest has programmed. Serialisable with feature `serde`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Saved {
    /// [`STATE_VERSION`] of who saved it.
    pub version: u32,
    /// In order of number.
    pub buses: Vec<SavedBus>,
}

/// One bus.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SavedBus {
    /// Its number.
    pub number: u32,
    /// The windows that are there.
    pub windows: Vec<Window>,
    /// Ascending and disjoint.
    pub entries: Vec<Mapping>,
}

/// The tables cannot be saved now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// Answers to the guest are still out: let them resolve first.
    #[error("{0} answers are pending")]
    Pending(usize),
}

/// The state cannot be restored. Nothing of it is left: all buses are as after a reset.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// It was saved by a later version. Nothing has changed.
    #[error("state of version {0}; this is version {STATE_VERSION}")]
    Version(u32),
    /// A bus is on one side alone, or is named twice. Nothing has changed.
    #[error("bus {0} is not on both sides")]
    Bus(u32),
    /// A window that cannot be on that bus, or two that overlap. Nothing has changed.
    #[error("bus {number}: {window:?} cannot be there")]
    Window {
        /// The bus's number.
        number: u32,
        /// The window.
        window: Window,
    },
    /// An entry that hypercalls could not have made. Nothing has changed.
    #[error("bus {number}: no hypercall makes {mapping:?}")]
    Entry {
        /// The bus's number.
        number: u32,
        /// The entry.
        mapping: Mapping,
    },
    /// An entry is refused here.
    #[error("bus {number}: {kind}")]
    Refused {
        /// The bus's number.
        number: u32,
        /// Why.
        kind: StepErrorKind,
    },
}

impl Spapr {
    /// Saves windows and entries. The virtual machine is stopped, and all answers have been given.
    ///
    /// # Errors
    /// [`SaveError::Pending`].
    pub fn save(&self) -> Result<Saved, SaveError> {
        let pending = self.iommu().outstanding();
        if pending != 0 {
            return Err(SaveError::Pending(pending));
        }
        let numbers = self.buses();
        let buses = numbers.iter().filter_map(|number| {
            let bus = self.bus(*number)?;
            let mut entries = Vec::new();
            bus.domain().for_each(IovaRange::ALL, |m| {
                entries.push(m);
                ControlFlow::Continue(())
            });
            Some(SavedBus { number: *number, windows: bus.windows(), entries })
        });
        Ok(Saved { version: STATE_VERSION, buses: buses.collect() })
    }

    /// Restores windows and entries, before the guest runs, into tables with the same buses. Nothing in the state is
    /// trusted; subscribers are filled the ordinary way. What was there before is gone.
    ///
    /// # Errors
    /// See [`RestoreError`]: all or nothing.
    pub fn restore(&self, saved: &Saved) -> Result<Completion, RestoreError> {
        let Saved { version, buses } = saved;
        if *version > STATE_VERSION {
            return Err(RestoreError::Version(*version));
        }
        let mut missing = self.buses();
        for saved in buses {
            let at = missing.iter().position(|number| *number == saved.number);
            missing.swap_remove(at.ok_or(RestoreError::Bus(saved.number))?);
            let bus = self.bus(saved.number).ok_or(RestoreError::Bus(saved.number))?;
            check(&bus, saved, self.0.merge)?;
        }
        if let Some(number) = missing.first() {
            return Err(RestoreError::Bus(*number));
        }
        let mut done = Completion::ready();
        for saved in buses {
            let number = saved.number;
            let bus = self.bus(number).ok_or(RestoreError::Bus(number))?;
            if let Err(kind) = fill(&bus, saved, &mut done) {
                // Whoever was filled is emptied again. The guest has not run, so nobody waits for that.
                drop(self.reset());
                return Err(RestoreError::Refused { number, kind });
            }
        }
        Ok(done)
    }
}

/// Whether hypercalls could have made it.
fn check(bus: &Bus, saved: &SavedBus, merge: Merge) -> Result<(), RestoreError> {
    let number = saved.number;
    for (at, window) in saved.windows.iter().enumerate() {
        let mut others = saved.windows.iter().skip(at.saturating_add(1));
        let clash = others.any(|w| w.liobn == window.liobn || w.range.overlaps(window.range));
        if clash || !bus.config().admits(window) {
            return Err(RestoreError::Window { number, window: *window });
        }
    }
    let mut last: Option<Mapping> = None;
    for mapping in &saved.entries {
        let window = saved.windows.iter().find(|window| window.could_hold(mapping));
        let single = |window: &Window| mapping.range.bytes() == window.page().into();
        let fits = window.is_some_and(|window| merge == Merge::Hypercall || single(window));
        if !fits || last.is_some_and(|last| last.range.last() >= mapping.range.start()) {
            return Err(RestoreError::Entry { number, mapping: *mapping });
        }
        last = Some(*mapping);
    }
    Ok(())
}

fn fill(bus: &Bus, saved: &SavedBus, done: &mut Completion) -> Result<(), StepErrorKind> {
    done.merge(bus.reset().map_err(|error| error.kind)?);
    bus.set_windows(&saved.windows);
    let mut burst = bus.domain().burst().map_err(|error| error.kind)?;
    let outcome = saved.entries.iter().try_for_each(|mapping| burst.map(*mapping));
    done.merge(burst.finish());
    outcome
}
