//! The type1 mirror on the guest's own VFIO, with QEMU's `edu` device behind each of QEMU's IOMMUs.

use anyhow::ensure;

use super::{Program, Unit};
use crate::lab::Run;

const EDU: &str = "00:04.0";

/// The seed of the steps.
const SEED: &str = "1";

pub(in crate::cases) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let mut notes = Vec::new();
    for unit in Unit::ALL {
        let bdf = format!("0000:{EDU}");
        let program = Program {
            unit,
            devices: &["-device", "edu,addr=4,dma_mask=0xffffffffffff"],
            modules: &["vfio_iommu_type1", "vfio_pci"],
            vfio: &[EDU],
            words: &["type1", &bdf, SEED],
        };
        let vm = program.run(run)?;
        let said = vm.said_lines("TYPE1");
        for part in ["info", "calls", "dma", "windows", "entries", "dirty", "cost", "steps", "fence"] {
            let prefix = format!("{part}: ");
            ensure!(
                said.iter().any(|line| line.starts_with(&prefix)),
                "the guest has said nothing of {part}"
            );
        }
        notes.extend(
            said.iter()
                .filter_map(|line| line.strip_prefix("cost: "))
                .map(|cost| format!("{}: {cost}", unit.name())),
        );
    }
    Ok(notes.join("; "))
}
