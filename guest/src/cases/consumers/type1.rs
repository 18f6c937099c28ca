//! The type1 mirror on the guest's own VFIO, with QEMU's `edu` device behind one of QEMU's IOMMUs.

use anyhow::Context as _;

use super::{Program, Unit};
use crate::lab::Run;

const EDU: &str = "00:04.0";

/// The seed of the steps.
const SEED: &str = "1";

pub(in crate::cases) fn intel(run: &Run<'_>) -> anyhow::Result<String> {
    under(Unit::Intel, run)
}

pub(in crate::cases) fn virtio(run: &Run<'_>) -> anyhow::Result<String> {
    under(Unit::Virtio, run)
}

pub(in crate::cases) fn amd(run: &Run<'_>) -> anyhow::Result<String> {
    under(Unit::Amd, run)
}

fn under(unit: Unit, run: &Run<'_>) -> anyhow::Result<String> {
    let bdf = format!("0000:{EDU}");
    let program = Program {
        unit,
        processors: 1,
        devices: &["-device", "edu,addr=4,dma_mask=0xffffffffffff"],
        modules: &["vfio_iommu_type1", "vfio_pci"],
        vfio: &[EDU],
        words: &["type1", &bdf, SEED],
    };
    let vm = program.run(run)?;
    let said = vm.said_lines("TYPE1");
    let part = |name: &str| said.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    for name in ["info", "calls", "locked", "dma", "windows", "entries", "dirty", "steps", "fence"] {
        part(name).with_context(|| format!("the guest has said nothing of {name}"))?;
    }
    Ok(part("cost").context("the guest has said nothing of what it costs")?.to_owned())
}
