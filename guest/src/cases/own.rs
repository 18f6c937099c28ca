//! QEMU's own virtio-iommu and devices: what these tests see of a guest is right before it is held against viommu.

use std::path::Path;

use anyhow::{Context as _, ensure};

use crate::{
    lab::Run,
    live,
    vm::{Config, expect},
};

/// Where its devices are.
const PLACES: &str = "unit=virtio iommu.strict=1 blk=00:02.0 rng=00:03.0";

fn devices(disk: &Path) -> [String; 8] {
    [
        "-device".to_owned(),
        "virtio-iommu-pci,addr=1".to_owned(),
        "-drive".to_owned(),
        format!("file={},if=none,id=disk,format=raw,cache=unsafe", disk.display()),
        "-device".to_owned(),
        "virtio-blk-pci,drive=disk,addr=2,disable-legacy=on,iommu_platform=on".to_owned(),
        "-device".to_owned(),
        "virtio-rng-pci,addr=3,disable-legacy=on,iommu_platform=on".to_owned(),
    ]
}

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let disk = run.disk("disk.img", 16)?;
    let config = Config::new("io").append(PLACES).arguments(devices(&disk));
    let mut vm = run.start(&config, "io")?;
    vm.wait("QUIET")?;
    vm.tell("go")?;
    vm.wait("UNBOUND")?;
    vm.tell("go")?;
    vm.wait("DONE")?;
    vm.wait_end()?;

    expect("groups", vm.said_lines("GROUP"), vec!["00:02.0 DMA".to_owned(), "00:03.0 DMA".to_owned()])?;
    let replayed = live::replay(&vm.trace())?;
    let quiet = replayed.at_mark.get("quiet").context("the guest has left no mark")?;
    let rings = quiet.get("00:02.0").map_or(0, Vec::len);
    ensure!(rings > 0, "the guest has a disk, but nothing is mapped for it: {quiet:x?}");
    let left: Vec<_> = replayed.at_end.iter().filter(|(_, mappings)| !mappings.is_empty()).collect();
    ensure!(left.is_empty(), "mapped after the drivers were gone: {left:x?}");

    let config = Config::new("probe").append(PLACES).arguments(devices(&disk));
    let mut vm = run.start(&config, "probe")?;
    vm.wait("PROBED")?;
    vm.wait_console("page fault from EP 24 at 0x800000")?;
    vm.tell("go")?;
    vm.wait("KERNEL_AGAIN")?;
    vm.tell("go")?;
    vm.wait("DONE")?;
    vm.wait_end()?;
    Ok(format!("{} maps and {} unmaps", replayed.maps, replayed.unmaps))
}
