//! More mappings are asked for than there may be: requests wait or fail, and nothing is corrupt.

use anyhow::ensure;
use viommu_guest_inside::pattern::Pattern;

use super::blk;
use crate::{
    disk::{self, Part},
    lab::Run,
};

const BLK: &str = "00:02.0";
const THREADS: u64 = 16;
const BLOCKS: u64 = 64;
/// Enough for the rings and for some of the threads' requests, of three mappings each, but not for all.
const MOST: u64 = 10;

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let image = run.disk("disk.img", 16)?;
    let limit = ["--max-mappings".to_owned(), MOST.to_string()];
    let server = run.serve(&[blk(BLK, &image), limit].concat(), "server")?;
    let config = run
        .config("load")
        .append(&format!("disks={BLK} threads={THREADS} blocks={BLOCKS} writes=0 seconds=6 patience=4"));
    let mut vm = run.start_with(&server, config, "vm")?;
    vm.wait("LOADED")?;
    let status = server.status()?;
    vm.tell("go")?;
    vm.wait("DONE")?;
    vm.wait_end()?;
    server.stop()?;

    let (maps, refused) = status.answers("MAP");
    ensure!(refused > 0, "expected that some of {maps} MAPs are refused, seen none");
    ensure!(status.live()? <= MOST, "expected {MOST} mappings at most, seen {}", status.live()?);
    let errors: u64 =
        vm.said_lines("LOAD").iter().filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum();
    // What was flushed is on the disk, whatever was refused.
    for ((_, thread), flushed) in disk::flushed(&vm.said_lines("FLUSHED"))? {
        disk::check(&image, Part { thread, pattern: Pattern::new(thread, BLOCKS), flushed })?;
    }
    let stuck = if vm.said_lines("STUCK").is_empty() { "" } else { ", some never answered" };
    Ok(format!("{refused} of {maps} maps refused, {errors} I/O errors{stuck}"))
}
