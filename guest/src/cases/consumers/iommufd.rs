//! The iommufd binding on the guest's own iommufd: with the mock IOMMU of its self-test, and with QEMU's `edu` device behind
//! QEMU's VT-d.

use anyhow::Context as _;

use super::{Program, Unit};
use crate::lab::Run;

const EDU: &str = "00:04.0";

/// The seed of the steps.
const SEED: &str = "1";

pub(in crate::cases) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let bdf = format!("0000:{EDU}");
    let program = Program {
        unit: Unit::Intel,
        processors: 1,
        devices: &["-device", "edu,addr=4,dma_mask=0xffffffffffff"],
        modules: &[],
        vfio: &[EDU],
        words: &["iommufd", &bdf, SEED],
    };
    let vm = program.run(run)?;
    let said = vm.said_lines("IOMMUFD");
    let part = |name: &str| said.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    for name in ["limits", "errors", "dirty", "kinds", "steps", "dma", "fence"] {
        part(name).with_context(|| format!("the guest has said nothing of {name}"))?;
    }
    Ok(part("cost").context("the guest has said nothing of what it costs")?.to_owned())
}
