//! The cache on the guest's own vhost-net, whose packets come out at a tap in the guest, and on its vhost-vsock, whose
//! packets come from its own sockets. The machine's IOMMU plays no part.

use anyhow::Context as _;

use super::{Program, Unit};
use crate::lab::Run;

/// The seed of the steps, and how many there are.
const SEED: &str = "1";
const STEPS: &str = "2000";
const ALL_STEPS: &str = "10000";

pub(in crate::cases) fn net(run: &Run<'_>) -> anyhow::Result<String> {
    let parts = ["miss", "packets", "fence net", "fence owner", "steps InStep", "steps ByWorker"];
    device(run, &["vhost_net", "tun"], "vhost-net", &parts, "cost")
}

pub(in crate::cases) fn vsock(run: &Run<'_>) -> anyhow::Result<String> {
    let parts = ["miss", "fence vsock", "steps InStep", "steps ByWorker"];
    device(run, &["vhost_vsock"], "vhost-vsock", &parts, "packets")
}

/// Runs `inside` with that word; it must speak of all `parts`, and what it says of `result` is the result.
fn device(
    run: &Run<'_>,
    modules: &[&str],
    word: &str,
    parts: &[&str],
    result: &str,
) -> anyhow::Result<String> {
    let steps = if run.lab.full { ALL_STEPS } else { STEPS };
    let program = Program {
        unit: Unit::Virtio,
        processors: 2,
        devices: &[],
        modules,
        vfio: &[],
        words: &[word, SEED, steps],
    };
    let vm = program.run(run)?;
    let said = vm.said_lines("VHOST");
    let part = |name: &str| said.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    for name in parts {
        part(name).with_context(|| format!("the guest has said nothing of {name}"))?;
    }
    Ok(part(result).with_context(|| format!("the guest has said nothing of {result}"))?.to_owned())
}
