//! Bypass: identity domains for all, and a group that changes its mind.

use anyhow::{Context as _, ensure};

use super::{blk, endpoint};
use crate::{disk, lab::Run, live, vm::expect};

const BLK: &str = "00:02.0";
const RNG: &str = "00:03.0";

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    all(run)?;
    switched(run)
}

/// `iommu.passthrough=1`: no device is ever mapped anything.
fn all(run: &Run<'_>) -> anyhow::Result<()> {
    let image = run.disk("all.img", 16)?;
    let server = run.serve(&[blk(BLK, &image), endpoint(RNG, "rng")].concat(), "all")?;
    let config = run.config("io").append(&format!("iommu.passthrough=1 blk={BLK} rng={RNG}"));
    let mut vm = run.start_with(&server, config, "all")?;
    vm.wait("QUIET")?;
    let quiet = server.status()?;
    expect("the disk's sum", vm.said_lines("DISK"), vec![disk::md5(&image)?])?;
    vm.tell("go")?;
    vm.wait("UNBOUND")?;
    vm.tell("go")?;
    vm.wait("DONE")?;
    vm.wait_end()?;
    expect("groups", vm.said_lines("GROUP"), vec![format!("{BLK} identity"), format!("{RNG} identity")])?;
    expect("the guest's maps", live::replay(&vm.trace())?.maps, 0)?;
    expect("MAPs", quiet.answers("MAP"), (0, 0))?;
    for address in [BLK, RNG] {
        expect("the view", quiet.endpoint(address)?["view"].clone(), "identity".into())?;
    }
    expect("faults", quiet.faults()?, 0)?;
    server.stop()
}

/// A group is translated, then not, then translated again.
fn switched(run: &Run<'_>) -> anyhow::Result<String> {
    let image = run.disk("switched.img", 16)?;
    let server = run.serve(&blk(BLK, &image), "switched")?;
    let config = run.config("switch").append(&format!("blk={BLK}"));
    let mut vm = run.start_with(&server, config, "switched")?;
    let mut maps = 0;
    for kind in ["DMA", "identity", "DMA"] {
        expect("the group", vm.wait("NOW")?.as_str(), kind)?;
        let status = server.status()?;
        let domain = status.domain(BLK)?;
        let (answers, _) = status.answers("MAP");
        if kind == "DMA" {
            domain.context("expected a domain")?;
            ensure!(answers > maps, "expected MAPs in a translated group, seen none");
        } else {
            expect("the view", status.endpoint(BLK)?["view"].clone(), "identity".into())?;
            // The disk was read meanwhile: no map was for it.
            expect("MAPs, of which the new domain needs none", answers, maps)?;
            expect("mappings", status.live()?, 0)?;
        }
        maps = answers;
        expect("faults", status.faults()?, 0)?;
        vm.tell("go")?;
    }
    vm.wait("DONE")?;
    vm.wait_end()?;
    server.stop()?;
    Ok(format!("{maps} maps in the translated group"))
}
