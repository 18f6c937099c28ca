//! A device in two guises: the kernel's, and user space's through VFIO.

use anyhow::{Context as _, ensure};

use super::endpoint;
use crate::{lab::Run, vm::expect};

const RNG: &str = "00:03.0";

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let server = run.serve(&endpoint(RNG, "rng"), "server")?;
    let config = run.config("probe").append(&format!("rng={RNG}"));
    let mut vm = run.start_with(&server, config, "vm")?;
    vm.wait("KERNEL")?;
    expect("faults of the kernel's driver", server.status()?.faults()?, 0)?;
    vm.wait("PROBED")?;
    if run.iommu.is_vtd() {
        // The unit has sent it, and the guest's driver has read the fault registers because of it.
        let interrupts: u64 =
            vm.said_lines("DMAR").concat().trim().parse().context("the interrupts of the unit")?;
        ensure!(interrupts > 0, "expected an interrupt of the unit for its faults, seen none");
    }
    let probed = server.status()?;
    let faults = probed.faults()?;
    ensure!(faults >= 2, "expected a fault after the unmap and one of the read-only page, seen {faults}");
    for fault in probed.recent_faults() {
        let at_buffer = fault["iova"] == "0x800000" && fault["access"] == "w" && fault["endpoint"] == 24;
        ensure!(at_buffer, "expected faults of endpoint 24 that writes to 0x800000, seen {fault}");
    }
    // The guest has heard of it by the IOMMU itself, and Linux says so.
    vm.wait_console(&run.iommu.blocked_write(RNG, 0x80_0000))?;
    vm.tell("go")?;
    vm.wait("KERNEL_AGAIN")?;
    expect("faults after the probe", server.status()?.faults()?, faults)?;
    vm.tell("go")?;
    vm.wait("DONE")?;
    vm.wait_end()?;
    server.stop()?;
    Ok(format!("{faults} faults, as they must be"))
}
