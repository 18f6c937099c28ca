//! More mappings are asked for than there may be: requests wait or fail, and nothing is corrupt.

use anyhow::ensure;
use viommu_guest_inside::pattern::Pattern;

use super::blk;
use crate::{
    disk::{self, Part},
    lab::Run,
    vm::{Config, expect},
};

const BLK: &str = "00:02.0";
const THREADS: u64 = 16;
const BLOCKS: u64 = 64;
const WRITES: u64 = 60;

/// Enough for the rings and for some of the threads' requests, of three mappings each, but not for all.
const MOST: u64 = 24;

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let image = run.disk("disk.img", 16)?;
    let limit = ["--max-mappings".to_owned(), MOST.to_string()];
    let server = run.serve(&[blk(BLK, &image), limit].concat(), "server")?;
    let config = Config::new("load").append(&format!(
        "iommu.strict=1 disks={BLK} threads={THREADS} blocks={BLOCKS} writes={WRITES} seconds=0"
    ));
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
    expect("faults", status.faults()?, 0)?;
    let said = vm.said_lines("LOAD");
    let errors: u64 = said.iter().filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum();
    if errors == 0 {
        for thread in 0..THREADS {
            let pattern = Pattern::new(thread, BLOCKS);
            disk::check(&image, Part { thread, pattern, flushed: WRITES })?;
        }
    }
    Ok(format!("{refused} of {maps} maps refused, {errors} I/O errors"))
}
