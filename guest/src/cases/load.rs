//! Three disks, two of them in one group, and random numbers, on two processors under load, looked at all the time.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use viommu_guest_inside::pattern::Pattern;

use super::{blk, endpoint};
use crate::{
    disk::{self, Part},
    iommu::Iommu,
    lab::Run,
    live,
    server::Server,
    status::Status,
    vm::{MEMORY, expect},
};

/// The first two are functions of one PCI device, without access control between them.
const DISKS: [&str; 3] = ["00:04.0", "00:04.1", "00:05.0"];
const RNG: &str = "00:06.0";

/// Threads on each disk, and the blocks of each thread.
const THREADS: u64 = 2;
const BLOCKS: u64 = 512;

/// Where RAM can be that a mapping leads to: the machine has no other below 4 GiB.
const RAM_END: u64 = (MEMORY as u64) << 20;

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let seconds = if run.lab.full { 60 } else { 20 };
    let images =
        DISKS.iter().map(|name| run.disk(&name.replace(':', "-"), 8)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut options: Vec<String> = endpoint(RNG, "rng").into();
    for (address, image) in DISKS.iter().zip(&images) {
        options.extend(blk(address, image));
    }
    if run.iommu.is_vtd() && run.iommu.records() {
        // So that the record follows the guest's tables.
        options.extend(["--record".to_owned(), run.folder.join("record.viommu").display().to_string()]);
    }
    let mut server = run.serve(&options, "server")?;
    let mut config = run.config("load").append(&format!(
        "disks={} rng={RNG} threads={THREADS} blocks={BLOCKS} writes=0 seconds={seconds}",
        DISKS.join(",")
    ));
    config.processors = 2;
    config.limit = Duration::from_secs(seconds + 60);
    let mut vm = run.start_with(&server, config, "vm")?;
    vm.wait("LOADING")?;

    let mut audits = 0;
    let mut most = 0;
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        let status = server.status()?;
        audit(&status, run.iommu).with_context(|| format!("audit {audits}"))?;
        audits += 1;
        most = most.max(status.live()?);
        server.ensure_alive()?;
        thread::sleep(Duration::from_millis(500));
    }
    vm.wait("LOADED")?;
    let status = settled(&server)?;
    audit(&status, run.iommu)?;
    if run.iommu.is_vtd() && run.iommu.records() {
        let (recorded, tables) = (status.recorded()?, status.tables()?);
        for (address, tables) in &tables {
            let differences = live::differences(tables, recorded.get(address).map_or(&[], Vec::as_slice));
            ensure!(
                differences.is_empty(),
                "{address}: expected what is in the guest's tables, seen\n{}",
                differences.join("\n")
            );
        }
        expect("domains with tables", tables.len(), DISKS.len() + 1)?;
    }
    vm.tell("go")?;
    vm.wait("DONE")?;
    vm.wait_end()?;

    let groups = vm.said_lines("GROUP");
    let group = |address: &str| groups.iter().find_map(|line| line.strip_prefix(address)).context("no group");
    expect("the group of both functions", group(DISKS[0])?, group(DISKS[1])?)?;
    ensure!(group(DISKS[0])? != group(DISKS[2])?, "expected different groups, seen {groups:?}");

    let (mut writes, mut parts) = (0, 0);
    for line in vm.said_lines("LOAD") {
        let words: Vec<&str> = line.split_whitespace().collect();
        writes += words.get(2).context("no number of writes")?.parse::<u64>()?;
        expect("requests that a disk refused", words.last().copied(), Some("0"))?;
    }
    for ((index, thread), flushed) in disk::flushed(&vm.said_lines("FLUSHED"))? {
        let pattern = Pattern::new(index * 100 + thread, BLOCKS);
        let image = images.get(usize::try_from(index)?).context("no such disk")?;
        disk::check(image, Part { thread, pattern, flushed })?;
        parts += 1;
    }
    expect("parts of disks that were looked at", parts, DISKS.len() as u64 * THREADS)?;
    server.stop()?;
    let told = if run.iommu.is_vtd() { "pages" } else { "MAP" };
    let count = status.answers(told).0;
    Ok(format!("{writes} writes, told {count} times of {told}, {audits} audits, {most} mapped at most"))
}

/// What must be true at any time.
fn audit(status: &Status, iommu: Iommu) -> anyhow::Result<()> {
    expect("faults", status.faults()?, 0)?;
    expect("requests that could not be read", status.malformed_and_outstanding()?.0, 0)?;
    expect("refused MAPs", status.answers("MAP").1, 0)?;
    expect("refused UNMAPs", status.answers("UNMAP").1, 0)?;
    let domains = DISKS.iter().map(|address| status.domain(address)).collect::<anyhow::Result<Vec<_>>>()?;
    let [first, second, third] = domains[..] else { anyhow::bail!("{domains:?}") };
    ensure!(
        first.is_some() && second.is_some() && third.is_some() && first != third,
        "expected domains, and another one for the last: {domains:?}"
    );
    ensure!(
        (first == second) == iommu.shares(),
        "expected {} domain for the first two: {domains:?}",
        if iommu.shares() { "one" } else { "another" }
    );
    for (address, mappings) in status.mappings()? {
        for mapping in &mappings {
            let end = mapping.gpa + (mapping.end - mapping.start);
            ensure!(end < RAM_END, "{address}: expected mappings of RAM, seen {mapping:x?}");
        }
        for pair in mappings.windows(2) {
            ensure!(pair[0].end < pair[1].start, "{address}: expected no overlap, seen {pair:x?}");
        }
    }
    Ok(())
}

/// The state once all is answered.
fn settled(server: &Server) -> anyhow::Result<Status> {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let status = server.status()?;
        if status.malformed_and_outstanding()? == (0, 0) {
            return Ok(status);
        }
        ensure!(
            Instant::now() < until,
            "requests without an answer: {:?}",
            status.malformed_and_outstanding()?
        );
        thread::sleep(Duration::from_millis(20));
    }
}
