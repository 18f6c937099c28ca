//! The server is killed amid writes: QEMU lives on, what was flushed is on the disk, and a new server serves it again.

use std::{thread, time::Duration};

use anyhow::Context as _;
use serde_json::json;
use viommu_guest_inside::pattern::Pattern;

use super::blk;
use crate::{
    disk::{self, Part},
    lab::Run,
    vm::expect,
};

const BLK: &str = "00:02.0";
const THREADS: u64 = 4;
const BLOCKS: u64 = 256;

/// What QEMU 11.1 says when it is hit by that.
const ASSERTION: &str = "Assertion `*errp == NULL' failed";

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let image = run.disk("disk.img", 16)?;
    let server = run.serve(&blk(BLK, &image), "first")?;
    let config = |writes: u64| {
        run.config("load")
            .append(&format!("disks={BLK} threads={THREADS} blocks={BLOCKS} writes={writes} seconds=0"))
    };
    let mut vm = run.start_with(&server, config(0), "first")?;
    for _ in 0..3 * THREADS {
        vm.wait("FLUSHED")?;
    }
    server.kill()?;
    // Lines that were on their way come from writes that had been answered before.
    thread::sleep(Duration::from_millis(500));
    // QEMU's own reader of messages may fall over an assertion when a socket ends while it waits for an answer; that
    // is the one end that the guest's machine may come to.
    let state = if vm.is_running()? {
        let state = vm.qmp()?.run("query-status", json!({}))?;
        state["status"].as_str().unwrap_or("nothing").to_owned()
    } else if vm.log().contains(ASSERTION) {
        "ended by an assertion of its own".to_owned()
    } else {
        return Err(vm.failure("expected that QEMU lives on, seen that it has ended"));
    };

    let flushed = disk::flushed(&vm.said_lines("FLUSHED"))?;
    expect("threads that have flushed", flushed.len() as u64, THREADS)?;
    let safe: u64 = flushed.values().sum();
    for ((_, thread), flushed) in flushed {
        disk::check(&image, Part { thread, pattern: Pattern::new(thread, BLOCKS), flushed })?;
    }
    if vm.is_running()? {
        vm.qmp()?.run("quit", json!({})).context("after the server was killed")?;
        vm.wait_end()?;
    }

    let server = run.serve(&blk(BLK, &image), "second")?;
    let mut vm = run.start_with(&server, config(40), "second")?;
    vm.wait("LOADED")?;
    expect("faults", server.status()?.faults()?, 0)?;
    vm.tell("go")?;
    vm.wait("DONE")?;
    vm.wait_end()?;
    server.stop()?;
    Ok(format!("{safe} writes were safe, QEMU was {state}"))
}
