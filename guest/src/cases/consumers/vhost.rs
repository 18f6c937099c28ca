//! The cache on the guest's own vhost-net, whose packets come out at a tap in the guest. The machine's IOMMU plays no part.

use anyhow::Context as _;

use super::{Program, Unit};
use crate::lab::Run;

/// The seed of the steps, and how many there are.
const SEED: &str = "1";
const STEPS: &str = "2000";
const ALL_STEPS: &str = "10000";

pub(in crate::cases) fn net(run: &Run<'_>) -> anyhow::Result<String> {
    let steps = if run.lab.full { ALL_STEPS } else { STEPS };
    let program = Program {
        unit: Unit::Virtio,
        processors: 2,
        devices: &[],
        modules: &["vhost_net", "tun"],
        vfio: &[],
        words: &["vhost-net", SEED, steps],
    };
    let vm = program.run(run)?;
    let said = vm.said_lines("VHOST");
    let part = |name: &str| said.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    for name in ["miss", "packets", "fence net", "fence owner", "steps InStep", "steps ByWorker"] {
        part(name).with_context(|| format!("the guest has said nothing of {name}"))?;
    }
    Ok(part("cost").context("the guest has said nothing of what it costs")?.to_owned())
}
