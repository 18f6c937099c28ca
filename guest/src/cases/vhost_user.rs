//! A disk that is a process of its own: QEMU is the front end, and our back end, behind QEMU's own IOMMU, has only what
//! QEMU's IOTLB messages give it.

use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use crate::{
    disk,
    lab::Run,
    vm::{Config, expect},
};

const BLK: &str = "00:02.0";
/// How long the daemon may take to be ready, and to end.
const LIMIT: Duration = Duration::from_secs(10);

/// The daemon; killed when it goes out of scope.
struct Daemon(Child);

impl Daemon {
    fn start(run: &Run<'_>, socket: &Path, image: &Path) -> anyhow::Result<Daemon> {
        let output = File::create(run.folder.join("daemon.txt"))?;
        let mut command = Command::new(&run.lab.vhost_user_blk);
        command.arg(socket).arg(image).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut daemon = Daemon(command.spawn().context("the daemon does not start")?);
        let until = Instant::now() + LIMIT;
        while !socket.exists() {
            ensure!(daemon.0.try_wait()?.is_none(), "the daemon ended: {}", said(run));
            ensure!(Instant::now() < until, "the daemon is not ready after {LIMIT:?}");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(daemon)
    }

    /// Waits for its end, which comes with the connection's.
    fn wait(mut self) -> anyhow::Result<()> {
        let until = Instant::now() + LIMIT;
        while Instant::now() < until {
            if let Some(status) = self.0.try_wait()? {
                ensure!(status.success(), "the daemon ended with {status}");
                return Ok(());
            }
            thread::sleep(Duration::from_millis(10));
        }
        anyhow::bail!("the daemon is there {LIMIT:?} after QEMU has gone");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // One that has ended already is what is wanted.
        let _ended = self.0.kill();
        let _ended = self.0.wait();
    }
}

fn said(run: &Run<'_>) -> String {
    fs::read_to_string(run.folder.join("daemon.txt")).unwrap_or_default()
}

/// A number of the daemon's last line.
fn count(said: &str, name: &str) -> anyhow::Result<u64> {
    let line =
        said.lines().find_map(|line| line.strip_prefix("iotlb ")).context("the daemon said nothing")?;
    let number = line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    Ok(number.with_context(|| format!("no {name}: {line}"))?.parse()?)
}

fn with(run: &Run<'_>, unit: &str, words: &str) -> anyhow::Result<String> {
    let image = run.disk("disk.img", 16)?;
    let sockets = tempfile::Builder::new().prefix("viommu-guest-").tempdir()?;
    let socket = sockets.path().join("disk.sock");
    let daemon = Daemon::start(run, &socket, &image)?;
    let config = Config::new("vhost-user").append(&format!("{words} iommu.strict=1 blk={BLK}")).arguments([
        "-device".to_owned(),
        unit.to_owned(),
        "-chardev".to_owned(),
        format!("socket,id=disk,path={}", socket.display()),
        "-device".to_owned(),
        "vhost-user-blk-pci,chardev=disk,num-queues=1,addr=2,disable-legacy=on,iommu_platform=on".to_owned(),
    ]);
    let mut vm = run.start(&config, "vhost-user")?;
    let ran = vm.wait("DONE").and_then(|_| vm.wait_end());
    if let Err(error) = ran {
        return Err(error.context(format!("the daemon said: {}", said(run))));
    }
    daemon.wait()?;
    ensure!(
        vm.said_lines("GROUP").iter().any(|line| line.starts_with(&format!("{BLK} DMA"))),
        "no group for DMA"
    );
    expect("the disk's sum", vm.said_lines("DISK"), vec![disk::md5(&image)?])?;
    let said = said(run);
    let counts = ["misses", "updates", "invalidates", "refused"].map(|name| count(&said, name));
    let [misses, updates, invalidates, refused] = counts;
    let (misses, updates, invalidates) = (misses?, updates?, invalidates?);
    // The file system alone is 4 MiB in requests of 64 KiB at most, each mapped and unmapped.
    ensure!(misses > 64 && updates > 64 && invalidates > 64, "hardly anything was asked for: {said}");
    expect("messages refused", refused?, 0)?;
    ensure!(!said.contains("the queue stops"), "{said}");
    Ok(format!("{misses} misses, {updates} updates, {invalidates} invalidates"))
}

pub(super) fn intel(run: &Run<'_>) -> anyhow::Result<String> {
    with(run, "intel-iommu,caching-mode=on", "unit=intel intel_iommu=on")
}

pub(super) fn virtio(run: &Run<'_>) -> anyhow::Result<String> {
    with(run, "virtio-iommu-pci,addr=1", "unit=virtio")
}
