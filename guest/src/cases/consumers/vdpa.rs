//! The vhost-vDPA mirror on the guest's own simulators.

use anyhow::Context as _;

use super::{Program, Unit};
use crate::lab::Run;

/// The seed of the steps.
const SEED: &str = "1";

pub(in crate::cases) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let program = Program {
        unit: Unit::Intel,
        processors: 1,
        devices: &[],
        modules: &[],
        vfio: &[],
        words: &["vdpa", SEED],
    };
    let vm = program.run(run)?;
    let said = vm.said_lines("VDPA");
    let part = |name: &str| said.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    for name in ["info", "data", "limit", "refused", "spaces", "fence"] {
        part(name).with_context(|| format!("the guest has said nothing of {name}"))?;
    }
    Ok(part("steps").context("the guest has said nothing of its steps")?.to_owned())
}
