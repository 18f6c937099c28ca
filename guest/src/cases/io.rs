//! A file system behind the IOMMU: what is written is read back, and our record is the guest's own.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{blk, endpoint};
use crate::{
    disk,
    lab::Run,
    live::{self, Live},
    vm::expect,
};

const BLK: &str = "00:02.0";
const RNG: &str = "00:03.0";

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let image = run.disk("disk.img", 16)?;
    let mut options = [blk(BLK, &image), endpoint(RNG, "rng")].concat();
    let record = run.iommu.records().then(|| run.folder.join("record.viommu"));
    if let Some(record) = &record {
        options.extend(["--record".to_owned(), record.display().to_string()]);
    }
    let server = run.serve(&options, "server")?;
    let config = run.config("io").append(&format!("blk={BLK} rng={RNG}"));
    let mut vm = run.start_with(&server, config, "vm")?;

    vm.wait("QUIET")?;
    let quiet = server.status()?;
    expect("the disk's sum", vm.said_lines("DISK"), vec![disk::md5(&image)?])?;
    vm.tell("go")?;
    vm.wait("UNBOUND")?;
    let unbound = server.status()?;
    vm.tell("go")?;
    vm.wait("DONE")?;
    vm.wait_end()?;

    let group = run.iommu.group();
    expect("groups", vm.said_lines("GROUP"), vec![format!("{BLK} {group}"), format!("{RNG} {group}")])?;
    let replayed = live::replay(&vm.trace())?;
    let guest = replayed.at_mark.get("quiet").context("the guest has left no mark")?;
    let mut pages = 0;
    if record.is_some() {
        pages = compare("the record", guest, &quiet.recorded()?)?;
    }
    if run.iommu.is_vtd() {
        pages = compare("a walk of the guest's tables", guest, &quiet.tables()?)?;
    }
    ensure!(pages > 0, "expected rings that are mapped, seen nothing mapped at all");

    expect("mappings after the drivers were gone", unbound.live()?, 0)?;
    let left: Vec<_> = replayed.at_end.iter().filter(|(_, mappings)| !mappings.is_empty()).collect();
    ensure!(left.is_empty(), "expected that the guest has unmapped all, seen {left:x?}");
    expect("faults", unbound.faults()?, 0)?;
    expect(
        "requests that could not be read, and without an answer",
        unbound.malformed_and_outstanding()?,
        (0, 0),
    )?;
    let (maps, refused) = unbound.answers("MAP");
    server.stop()?;
    let Some(record) = record else {
        return Ok(format!("{} maps, {pages} pages compared", replayed.maps));
    };
    let recorded = replay(run, &record)?;
    if run.iommu.is_vtd() {
        // Each page that the guest has mapped or unmapped, once, and nothing else.
        let all = (replayed.mapped_pages, replayed.unmapped_pages);
        expect("pages mapped and unmapped in the history", recorded, all)?;
    } else {
        expect("refused MAPs", refused, 0)?;
        // A map of several sizes of pages is a request for each.
        ensure!(maps >= replayed.maps, "expected {} MAPs or more, seen {maps}", replayed.maps);
        expect("maps in the history", recorded.0, maps)?;
    }
    Ok(format!("{} maps, {pages} pages compared, the recording agrees", recorded.0))
}

/// Holds what is mapped against what the guest says; the number of pages.
fn compare(what: &str, guest: &Live, ours: &Live) -> anyhow::Result<u64> {
    let mut pages = 0;
    for address in [BLK, RNG] {
        let (guest, ours) = (guest.get(address), ours.get(address));
        let (guest, ours) = (guest.map_or(&[][..], Vec::as_slice), ours.map_or(&[][..], Vec::as_slice));
        let differences = live::differences(guest, ours);
        ensure!(
            differences.is_empty(),
            "{what} of {address}: expected what the guest has mapped, seen\n{}",
            differences.join("\n")
        );
        pages += guest.iter().map(|mapping| (mapping.end - mapping.start) / 4096 + 1).sum::<u64>();
    }
    Ok(pages)
}

/// What was recorded is replayed without a complaint; how many mappings came, and how many went.
fn replay(run: &Run<'_>, record: &Path) -> anyhow::Result<(u64, u64)> {
    let output = Command::new(&run.lab.viommu).args(["replay", "--format", "json"]).arg(record).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    fs::write(run.folder.join("replay.json"), said.as_bytes())?;
    ensure!(
        output.status.success(),
        "viommu replay {}: {}: {}",
        record.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let report: Value = serde_json::from_str(&said).with_context(|| said.to_string())?;
    expect("differences to the history", report["differences"].as_u64(), Some(0))?;
    let count = |name: &str| report["history"][name].as_u64().with_context(|| format!("no {name}: {report}"));
    Ok((count("map")?, count("removed")?))
}
