//! QEMU's own virtio-iommu and devices: what these tests see of a guest is right before it is held against viommu.

use anyhow::{Context as _, ensure};

use crate::{
    lab::Run,
    live,
    vm::{Config, expect},
};

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let disk = run.disk("disk.img", 16)?;
    let config = Config::new("io").append("iommu.strict=1 blk=00:02.0 rng=00:03.0").arguments([
        "-device".to_owned(),
        "virtio-iommu-pci,addr=1".to_owned(),
        "-drive".to_owned(),
        format!("file={},if=none,id=disk,format=raw,cache=unsafe", disk.display()),
        "-device".to_owned(),
        "virtio-blk-pci,drive=disk,addr=2,disable-legacy=on,iommu_platform=on".to_owned(),
        "-device".to_owned(),
        "virtio-rng-pci,addr=3,disable-legacy=on,iommu_platform=on".to_owned(),
    ]);
    let mut vm = run.start(&config, "vm")?;
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
    Ok(format!("{} maps and {} unmaps", replayed.maps, replayed.unmaps))
}
