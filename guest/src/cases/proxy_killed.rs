//! The process of a device is killed amid writes: the guest waits for its disk, all else goes on, and the device can be
//! plugged anew while the guest runs.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use viommu_guest_inside::pattern::Pattern;

use super::{blk, endpoint};
use crate::{
    disk::{self, Part},
    lab::Run,
    status::Status,
    vm::{Vm, expect},
};

const BLK: &str = "00:02.0";
const LOCAL: &str = "00:03.0";
const PLACE: &str = "01:00.0";
const THREADS: u64 = 2;
const BLOCKS: u64 = 256;
/// How long something may take that must happen.
const LIMIT: Duration = Duration::from_secs(20);

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let (image, local) = (run.disk("disk.img", 16)?, run.disk("local.img", 16)?);
    let (upstream, sockets) = run.serve_plainly(&options_of(&image), "upstream")?;
    let proxy = format!("proxy:{}", sockets.join("00-02.0.sock").display());
    let options =
        [endpoint(BLK, &proxy), blk(LOCAL, &local), endpoint("01:00.0-01:00.7", "hotplug")].concat();
    let server = run.serve(&options, "server")?;
    let words = format!("blk={BLK} local={LOCAL} place={PLACE} threads={THREADS} blocks={BLOCKS}");
    let mut vm = run.start_with(&server, run.config("proxy-killed").append(&words), "vm")?;
    eventually("both disks are written to", || Ok(flushes(&vm, "0") > THREADS && flushes(&vm, "1") > 0))?;
    upstream.kill()?;
    // Lines that were on their way come from writes that had been answered before.
    thread::sleep(Duration::from_millis(500));

    // It is seen to be gone before anybody asks it for something.
    let counter = |status: &Status, at: &str, name: &str| {
        let counters = &status.endpoint(at)?["counters"];
        counters[name].as_u64().with_context(|| format!("no {name}: {counters}"))
    };
    expect("whether it is there", counter(&server.status()?, BLK, "upstream_connected")?, 0)?;
    vm.tell("killed")?;
    expect("what configuration space has then", vm.wait("CONFIG")?.as_str(), "ff ff ff ff")?;
    // The guest's next step cuts it off, and nobody else.
    eventually("the device is cut off", || Ok(server.status()?.endpoint(BLK)?["fenced"] == true))?;
    let goes_on = flushes(&vm, "1");
    eventually("the other disk goes on", || Ok(flushes(&vm, "1") > goes_on + 3))?;
    let cut_off = server.status()?;
    expect("whether the other disk is cut off", cut_off.endpoint(LOCAL)?["fenced"] == true, false)?;
    if !run.iommu.is_vtd() {
        expect("answers that the guest waits for", cut_off.malformed_and_outstanding()?.1, 0)?;
    }
    expect("faults", cut_off.faults()?, 0)?;

    let flushed = disk::flushed(&vm.said_lines("FLUSHED"))?;
    let safe: Vec<(u64, u64)> =
        flushed.into_iter().filter(|((disk, _), _)| *disk == 0).map(|((_, t), write)| (t, write)).collect();
    expect("threads that have flushed", safe.len() as u64, THREADS)?;
    for (thread, flushed) in &safe {
        let pattern = Pattern::new(*thread, BLOCKS);
        disk::check(&image, Part { thread: *thread, pattern, flushed: *flushed })?;
    }

    // Another process serves the disk again. The device that was there stays gone; a new one is plugged in.
    let (upstream, _) = run.serve_plainly(&options_of(&image), "upstream")?;
    expect("whether it is there", counter(&server.status()?, BLK, "upstream_connected")?, 0)?;
    let said = server.run("plug", &[&format!("{PLACE}={proxy}")])?;
    let line = said.lines().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("expected what QEMU is to be told, seen {said:?}"))?;
    let line: Value = serde_json::from_str(line)?;
    vm.qmp()?.run(line["execute"].as_str().context("no command")?, line["arguments"].clone())?;
    vm.tell("plugged")?;
    expect("the disk's sum", vm.wait("AGAIN")?, disk::md5(&image)?)?;
    let again = server.status()?;
    expect("whether the new one is there", counter(&again, PLACE, "upstream_connected")?, 1)?;
    ensure!(counter(&again, PLACE, "upstream_windows")? > 0, "it has no windows: {}", again.endpoint(PLACE)?);
    expect("faults", again.faults()?, 0)?;

    vm.qmp()?.run("quit", json!({}))?;
    vm.wait_end()?;
    server.stop()?;
    upstream.stop()?;
    Ok(format!("{} writes were safe", safe.iter().map(|(_, write)| write).sum::<u64>()))
}

/// The process hangs instead of dying: nobody knows what it still reaches, so the guest stands still, until it ends.
pub(super) fn hung(run: &Run<'_>) -> anyhow::Result<String> {
    let (image, local) = (run.disk("disk.img", 16)?, run.disk("local.img", 16)?);
    let (mut upstream, sockets) = run.serve_plainly(&options_of(&image), "upstream")?;
    let proxy = format!("proxy:{}", sockets.join("00-02.0.sock").display());
    let server = run.serve(&[endpoint(BLK, &proxy), blk(LOCAL, &local)].concat(), "server")?;
    let words = format!("blk={BLK} local={LOCAL} place={PLACE} threads={THREADS} blocks={BLOCKS}");
    let mut vm = run.start_with(&server, run.config("proxy-killed").append(&words), "vm")?;
    eventually("both disks are written to", || Ok(flushes(&vm, "0") > THREADS && flushes(&vm, "1") > 0))?;
    upstream.hang()?;
    let windows = |status: &Status| {
        let counters = &status.endpoint(BLK)?["counters"];
        counters["upstream_windows"].as_u64().with_context(|| format!("no windows: {counters}"))
    };
    eventually("the device is cut off", || Ok(server.status()?.endpoint(BLK)?["fenced"] == true))?;
    ensure!(windows(&server.status()?)? > 0, "it is cut off, though it hangs");
    thread::sleep(Duration::from_secs(1));
    let stands = flushes(&vm, "1");
    thread::sleep(Duration::from_secs(2));
    expect("writes while nobody knows what it reaches", flushes(&vm, "1"), stands)?;
    upstream.kill()?;
    eventually("the other disk goes on", || Ok(flushes(&vm, "1") > stands + 3))?;
    expect("windows that are left", windows(&server.status()?)?, 0)?;
    vm.qmp()?.run("quit", json!({}))?;
    vm.wait_end()?;
    server.stop()?;
    Ok(format!("{stands} writes before, and more after"))
}

/// What serves the disk, without an IOMMU of its own.
fn options_of(image: &std::path::Path) -> Vec<String> {
    [&["--no-iommu", "--access-platform"].map(str::to_owned)[..], &blk(BLK, image)].concat()
}

/// Flushes that a disk has told of.
fn flushes(vm: &Vm, disk: &str) -> u64 {
    vm.said_lines("FLUSHED").iter().filter(|line| line.split(' ').next() == Some(disk)).count() as u64
}

/// Waits until something is so.
fn eventually(what: &str, is_so: impl Fn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let until = Instant::now() + LIMIT;
    while !is_so()? {
        ensure!(Instant::now() < until, "{what}: not after {LIMIT:?}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
