//! A device that others wrote: DPDK's testpmd is the back end, our front end gives it what is mapped. There is no guest.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::lab::Run;

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(60);

/// testpmd; killed when it goes out of scope.
struct Testpmd(Child);

impl Testpmd {
    fn start(root: &Path, socket: &Path, output: File) -> anyhow::Result<Testpmd> {
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        let drivers = fs::read_dir(libraries.join("dpdk"))?.filter_map(|entry| Some(entry.ok()?.path()));
        let drivers = drivers.into_iter().find(|path| path.to_string_lossy().contains("/pmds-"));
        let drivers = drivers.context("DPDK has no drivers")?;
        let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(format!("{}:{}", libraries.display(), drivers.display()));
        command.arg(root.join("usr/bin/dpdk-testpmd"));
        command.args(["--no-huge", "-m", "128", "--no-pci", "--no-telemetry", "--no-shconf"]);
        for driver in ["librte_bus_vdev.so", "librte_mempool_ring.so", "librte_net_vhost.so"] {
            command.arg("-d").arg(drivers.join(driver));
        }
        let device = format!("net_vhost0,iface={},iommu-support=1,queues=1", socket.display());
        command.args(["--vdev", &device, "--", "--forward-mode=macswap", "--auto-start", "--nb-cores=1"]);
        command.args(["--no-mlockall", "--total-num-mbufs=4096", "--stats-period=5"]);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut testpmd = Testpmd(command.spawn().context("testpmd does not start")?);
        let until = Instant::now() + LIMIT;
        while !socket.exists() {
            ensure!(testpmd.0.try_wait()?.is_none(), "testpmd has ended");
            ensure!(Instant::now() < until, "testpmd is not ready after {LIMIT:?}");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(testpmd)
    }

    /// Asks it to end; it must still be there.
    fn stop(mut self) -> anyhow::Result<()> {
        ensure!(self.0.try_wait()?.is_none(), "testpmd was cut off");
        kill_process(Pid::from_child(&self.0), Signal::INT)?;
        let until = Instant::now() + LIMIT;
        while Instant::now() < until {
            if let Some(status) = self.0.try_wait()? {
                ensure!(status.success(), "testpmd ended with {status}");
                return Ok(());
            }
            thread::sleep(Duration::from_millis(10));
        }
        bail!("testpmd does not end");
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        // One that has ended already is what is wanted.
        let _ended = self.0.kill();
        let _ended = self.0.wait();
    }
}

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    let root = run.lab.dpdk()?;
    let sockets = tempfile::Builder::new().prefix("viommu-guest-").tempdir()?;
    let socket = sockets.path().join("net.sock");
    let log = run.folder.join("testpmd.txt");
    let testpmd = Testpmd::start(&root, &socket, File::create(&log)?)?;
    let output = Command::new(&run.lab.vhost_user_net_front).arg(&socket).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    testpmd.stop()?;
    let note = said.lines().find_map(|line| line.strip_prefix("iotlb ")).context("it has said nothing")?;
    Ok(note.to_owned())
}
