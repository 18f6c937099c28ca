//! A guest's first and only file system: busybox, our own program, modules, and the scripts of the cases.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};

use crate::{cpio::Archive, modules::Modules, setup::Kernel};

/// Loaded by the scripts, each with what it depends on.
const MODULES: [&str; 11] = [
    "virtio_iommu",
    "virtio_blk",
    "virtio_rng",
    "virtio_console",
    "ext4",
    "vfio_iommu_type1",
    "vfio_pci",
    "virtio_pci",
    "vhost_net",
    "vhost_vsock",
    "tun",
];

/// Writes the archive for one kernel into `folder`, where it is found again by its path.
///
/// # Errors
///
/// If a part is missing or cannot be read.
pub(crate) fn make(
    kernel: &Kernel,
    busybox: &Path,
    inside: &Path,
    scripts: &[(&str, &str)],
    folder: &Path,
) -> anyhow::Result<PathBuf> {
    let mut archive = Archive::default();
    for name in ["dev", "proc", "sys", "tmp", "mnt", "etc", "modules"] {
        archive.folder(name);
    }
    archive.character_device("dev/console", 5, 1);
    let program = fs::read(busybox).with_context(|| busybox.display().to_string())?;
    archive.program("bin/busybox", &program);
    for applet in applets(busybox)? {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    let program = fs::read(inside).with_context(|| inside.display().to_string())?;
    archive.program("bin/inside", &program);
    archive.program("init", include_bytes!("init.sh"));
    for (name, text) in scripts {
        archive.file(&format!("cases/{name}"), text.as_bytes());
    }
    let mut modules = Modules::open(&kernel.modules)?;
    for name in MODULES {
        let order = modules.order(name).with_context(|| format!("kernel {}", kernel.release))?;
        archive.file(&format!("modules/{name}.order"), (order.join("\n") + "\n").as_bytes());
    }
    for (name, bytes) in modules.read() {
        archive.file(&format!("modules/{name}.ko"), bytes);
    }
    let path = folder.join(format!("initramfs-{}", kernel.release));
    fs::write(&path, archive.finish()).with_context(|| path.display().to_string())?;
    Ok(path)
}

/// The commands that a busybox offers.
fn applets(busybox: &Path) -> anyhow::Result<Vec<String>> {
    let output = Command::new(busybox).arg("--list").output().context("busybox does not start")?;
    ensure!(output.status.success(), "busybox --list: {}", output.status);
    let list = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(list.lines().filter(|name| *name != "busybox").map(str::to_owned).collect())
}
