//! Our VT-d unit beside QEMU's own: random tables, invalidations and accesses, with no guest at all.

mod case;
mod machine;
mod model;
mod qtest;
mod random;
mod tables;

use std::{path::Path, time::Instant};

use anyhow::Context as _;

use self::{
    case::{DEVIATIONS, Tally},
    machine::Machine,
};
use crate::setup::Qemu;

/// Plays `cases` cases, the seeds of which begin with `seed`; a note for the reader.
///
/// # Errors
///
/// If the units differ: with the case's seed and steps.
pub(crate) fn run(qemu: &Qemu, folder: &Path, seed: u64, cases: u64) -> anyhow::Result<String> {
    let begun = Instant::now();
    let mut machine = Machine::start(qemu, &folder.join("qemu.log"))?;
    let mut all = Tally::default();
    for seed in seed..seed.saturating_add(cases) {
        let tally = case::play(&mut machine, seed).with_context(|| {
            format!("one case again: cargo xtask guest --case vtd-differential --seed {seed} --cases 1")
        })?;
        all.add(&tally);
    }
    let mut note = format!(
        "{cases} cases from seed {seed} in {:.0} s: {} accesses ({} blocked, {} with more than one right answer), {} \
         invalidations, {} queue errors",
        begun.elapsed().as_secs_f64(),
        all.accesses,
        all.blocked,
        all.stale,
        all.invalidations,
        all.queue_errors
    );
    for (name, count) in DEVIATIONS.iter().zip(all.deviations).filter(|(_, count)| *count > 0) {
        note.push_str(&format!("; QEMU: {name}: {count}"));
    }
    Ok(note)
}
