//! Devices of another process behind our IOMMU: what the guest maps is what that process can reach, and nothing else. The
//! other process is a second server, without an IOMMU of its own.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};

use super::{blk, endpoint};
use crate::{disk, lab::Run, live, server::Server, status::Status, vm::expect};

const BLK: &str = "00:02.0";
const RNG: &str = "00:03.0";

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let image = run.disk("disk.img", 16)?;
    let mut options = ["--no-iommu", "--access-platform"].map(str::to_owned).to_vec();
    options.extend([blk(BLK, &image), endpoint(RNG, "rng")].concat());
    let (upstream, sockets) = run.serve_plainly(&options, "upstream")?;
    let at = |address: &str| {
        let socket = sockets.join(format!("{}.sock", address.replace(':', "-")));
        endpoint(address, &format!("proxy:{}", socket.display()))
    };
    let mut options = [at(BLK), at(RNG)].concat();
    if !run.iommu.is_vtd() {
        // Before its driver comes, and after it has gone, a device reaches nothing.
        options.extend(["--bypass", "off"].map(str::to_owned));
    }
    let server = run.serve(&options, "server")?;
    let config = run.config("io").append(&format!("blk={BLK} rng={RNG}"));
    let mut vm = run.start_with(&server, config, "vm")?;

    vm.wait("QUIET")?;
    let quiet = server.status()?;
    expect("the disk's sum", vm.said_lines("DISK"), vec![disk::md5(&image)?])?;
    let mut windows = 0;
    for address in [BLK, RNG] {
        windows += same(&quiet, &upstream, address)?;
    }
    ensure!(windows > 0, "expected rings that the other process reaches, seen none");
    let replayed_pages: u64 =
        quiet.recorded()?.values().flatten().map(|m| (m.end - m.start) / 4096 + 1).sum();
    vm.tell("go")?;
    vm.wait("UNBOUND")?;
    let unbound = server.status()?;
    expect("mappings after the drivers were gone", unbound.live()?, 0)?;
    for address in [BLK, RNG] {
        expect("what the other process reaches then", held(&upstream.status()?, address)?, (0, 0))?;
    }
    vm.tell("go")?;
    vm.wait("DONE")?;
    vm.wait_end()?;

    let replayed = live::replay(&vm.trace())?;
    let guest = replayed.at_mark.get("quiet").context("the guest has left no mark")?;
    for address in [BLK, RNG] {
        let ours = quiet.recorded()?;
        let (guest, ours) = (guest.get(address), ours.get(address));
        let (guest, ours) = (guest.map_or(&[][..], Vec::as_slice), ours.map_or(&[][..], Vec::as_slice));
        let differences = live::differences(guest, ours);
        ensure!(differences.is_empty(), "the record of {address}: {}", differences.join("\n"));
    }
    expect("faults", unbound.faults()?, 0)?;
    expect("faults of the other process", fenced(&unbound)?, 0)?;
    server.stop()?;
    upstream.stop()?;
    Ok(format!("{} maps, {windows} windows and {replayed_pages} pages compared", replayed.maps))
}

/// Windows and bytes that a server's device has been given.
fn held(status: &Status, address: &str) -> anyhow::Result<(u64, u64)> {
    let memory = &status.endpoint(address)?["memory"];
    let number = |name: &str| memory[name].as_u64().with_context(|| format!("no {name}: {memory}"));
    expect("windows that were refused", number("refused")?, 0)?;
    Ok((number("windows")?, number("bytes")?))
}

/// Endpoints that have been cut off.
fn fenced(status: &Status) -> anyhow::Result<usize> {
    let fenced =
        [BLK, RNG].map(|address| Ok::<_, anyhow::Error>(status.endpoint(address)?["fenced"] == true));
    fenced.into_iter().try_fold(0, |sum, fenced| Ok(sum + usize::from(fenced?)))
}

/// What the other process reaches has the size of what the record says that the device does; the number of windows.
fn same(proxy: &Status, upstream: &Server, address: &str) -> anyhow::Result<u64> {
    let recorded = proxy.recorded()?;
    let recorded = recorded.get(address).map_or(&[][..], Vec::as_slice);
    let bytes: u64 = recorded.iter().map(|mapping| mapping.end - mapping.start + 1).sum();
    let (mut windows, mut there) = held(&upstream.status()?, address)?;
    // The random numbers' driver asks for more whenever it has got some.
    for _ in 0..20 {
        if there == bytes {
            break;
        }
        thread::sleep(Duration::from_millis(50));
        (windows, there) = held(&upstream.status()?, address)?;
    }
    expect(&format!("bytes that the other process reaches for {address}"), there, bytes)?;
    Ok(windows)
}
