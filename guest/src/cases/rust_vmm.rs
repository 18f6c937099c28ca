//! A device behind the IOMMU that has nothing of ours: its server is of rust-vmm's `vfio_user` crate.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use super::endpoint;
use crate::{lab::Run, vm::expect};

const OTHER: &str = "00:02.0";
/// How long it may take to be ready, and to see that its client has gone.
const LIMIT: Duration = Duration::from_secs(10);

/// The server; killed when it goes out of scope.
struct Upstream<'a> {
    child: Child,
    run: &'a Run<'a>,
}

impl<'a> Upstream<'a> {
    fn start(run: &'a Run<'_>, socket: &Path) -> anyhow::Result<Upstream<'a>> {
        let output = File::create(run.folder.join("device.txt"))?;
        let mut command = Command::new(&run.lab.rust_vmm_device);
        command.arg(socket).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().context("the device does not start")?;
        let mut upstream = Upstream { child, run };
        upstream.wait("ready", 1)?;
        Ok(upstream)
    }

    fn said(&self) -> String {
        fs::read_to_string(self.run.folder.join("device.txt")).unwrap_or_default()
    }

    /// Waits for so many lines that begin so; the lines.
    fn wait(&mut self, begin: &str, count: u64) -> anyhow::Result<Vec<String>> {
        let until = Instant::now() + LIMIT;
        loop {
            let said = self.said();
            let lines: Vec<&str> = said.lines().filter(|line| line.starts_with(begin)).collect();
            if lines.len() as u64 >= count {
                return Ok(lines.into_iter().map(str::to_owned).collect());
            }
            ensure!(self.child.try_wait()?.is_none(), "the device ended: {said}");
            ensure!(Instant::now() < until, "the device has not said {begin:?}: {said}");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Upstream<'_> {
    fn drop(&mut self) {
        // One that has ended already is what is wanted.
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let sockets = tempfile::Builder::new().prefix("viommu-guest-").tempdir()?;
    let socket = sockets.path().join("device.sock");
    let mut upstream = Upstream::start(run, &socket)?;
    let mut options = endpoint(OTHER, &format!("proxy:{}", socket.display())).to_vec();
    if !run.iommu.is_vtd() {
        // Before VFIO maps something, the device reaches nothing.
        options.extend(["--bypass", "off"].map(str::to_owned));
    }
    let server = run.serve(&options, "server")?;
    let config = run.config("rust-vmm").append(&format!("other={OTHER}"));
    let mut vm = run.start_with(&server, config, "vm")?;
    for seen in ["registers", "bar", "dma", "unmapped"] {
        let said = vm.wait("SAW")?;
        expect("what the guest has seen", said.as_str(), seen)?;
    }
    vm.wait("DONE")?;
    vm.wait_end()?;
    expect("identity", vm.said_lines("IDENTITY"), vec!["0x1b36 0x10f0 0xff0000".to_owned()])?;
    let sizes = vm.said_lines("SIZES").concat();
    let sizes: Vec<u64> = sizes
        .split(' ')
        .map(|number| u64::from_str_radix(number.trim_start_matches("0x"), 16))
        .collect::<Result<_, _>>()
        .with_context(|| sizes.clone())?;
    ensure!(matches!(sizes[..], [a, b, _, c, d, _] if b - a == 0xfff && d - c == 0x3fff), "BARs: {sizes:x?}");

    // What the guest has mapped is what the device was given, and is given no more.
    let status = server.status()?;
    let counters = &status.endpoint(OTHER)?["counters"];
    let connections = counters["upstream_connections"].as_u64().with_context(|| format!("{counters}"))?;
    for line in upstream.wait("Gone", connections)? {
        expect("what is left there", line.as_str(), "Gone, with 0 windows")?;
    }
    let said = upstream.said();
    let maps: Vec<&str> = said.lines().filter(|line| line.starts_with("Map ")).collect();
    let at = |flags: u32, address: u64, size: u64| {
        let same = |line: &&&str| {
            line.starts_with(&format!("Map {{ flags: {flags}, file: true, "))
                && line.ends_with(&format!("address: {address}, size: {size} }}"))
        };
        maps.iter().find(same).map(|_| ()).with_context(|| format!("no window at {address:#x}: {maps:#?}"))
    };
    at(1, 0x90_0000, 0x1000)?;
    // Two pages of a process need not lie side by side in the guest's memory.
    at(3, 0x80_0000, 0x2000).or_else(|_| at(3, 0x80_0000, 0x1000).and_then(|()| at(3, 0x80_1000, 0x1000)))?;
    let unmaps = said.lines().filter(|line| line.starts_with("Unmap ")).count();
    expect("windows that were taken away", unmaps, maps.len())?;
    server.stop()?;
    Ok(format!("{} windows given and taken", maps.len()))
}
