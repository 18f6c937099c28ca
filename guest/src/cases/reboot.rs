//! The guest starts anew amid writes: by a reset, and by kexec without one. No old mapping is of use to the new kernel's
//! devices.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::blk;
use crate::{lab::Run, live, vm::expect};

const BLK: &str = "00:02.0";

/// QEMU's own disks, not behind the IOMMU, that hold what kexec starts.
const KERNEL: &str = "00:11.0";
const INITRAMFS: &str = "00:12.0";

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let image = run.disk("disk.img", 16)?;
    let server = run.serve(&blk(BLK, &image), "server")?;
    let mut config = run.config("reboot").append(&format!("blk={BLK} kernel={KERNEL} initramfs={INITRAMFS}"));
    config.reboots = true;
    // Three boots, of which one unpacks a kernel under emulation.
    config.limit = Duration::from_secs(120);
    for (name, path, address) in
        [("kernel", run.kernel.image.as_path(), KERNEL), ("initramfs", run.initramfs(), INITRAMFS)]
    {
        let slot = address.trim_start_matches("00:");
        config = config.arguments([
            "-drive".to_owned(),
            format!("file={},if=none,id={name},format=raw,readonly=on", path.display()),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive={name},addr={slot}"),
        ]);
    }
    let mut vm = run.start_with(&server, config, "vm")?;

    let mut notes = Vec::new();
    for (came_by, next) in [("power-on", "reboot"), ("reboot", "kexec"), ("kexec", "end")] {
        vm.wait("EARLY")?;
        let early = server.status()?;
        let view = &early.endpoint(BLK)?["view"];
        if run.iommu.is_vtd() {
            // Its driver is a part of the kernel, and has put the disk into a domain of its own.
            expect(&format!("mappings before the disk's driver, after {came_by}"), early.live()?, 0)?;
            ensure!(early.domain(BLK)?.is_some(), "after {came_by}: expected a domain, seen {view}");
        } else if came_by != "kexec" {
            expect(&format!("mappings before any driver, after {came_by}"), early.live()?, 0)?;
            expect(&format!("the view before any driver, after {came_by}"), view.clone(), "identity".into())?;
        }
        notes.push(format!("{} mapped after {came_by}", early.live()?));
        let faults = early.faults()?;
        vm.tell("go")?;

        vm.wait("QUIET")?;
        let quiet = server.status()?;
        vm.tell("go")?;
        vm.wait("TRACED")?;
        // The trace of an earlier kernel comes before this one's.
        let trace = vm.trace();
        let begun = trace.rfind("# tracer").context("no trace")?;
        let replayed = live::replay(&trace[begun..])?;
        let guest = replayed.at_mark.get("quiet").and_then(|live| live.get(BLK)).context("no mark")?;
        let ours = quiet.mappings()?;
        let ours = ours.get(BLK).context("expected that the disk is in a domain")?;
        let differences = live::differences(guest, ours);
        ensure!(
            differences.is_empty(),
            "after {came_by}: expected what this kernel has mapped, seen\n{}",
            differences.join("\n")
        );
        expect(&format!("faults of the kernel after {came_by}"), quiet.faults()?, faults)?;
        vm.wait("WRITING")?;
        vm.tell(next)?;
    }
    vm.wait("DONE")?;
    vm.wait_end()?;
    server.stop()?;
    Ok(notes.join(", "))
}
