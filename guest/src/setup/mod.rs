//! QEMU, busybox and guest kernels, unpacked from Debian's packages below the target folder; nothing is installed.

mod apt;
mod kernel;
mod own;
mod sources;

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};

use self::apt::Apt;
pub(crate) use self::{kernel::Kernel, own::NotHere};

/// Raised when what is unpacked changes: an older folder is made anew.
const GENERATION: &str = "1";

/// The release whose kernel and busybox are taken, and the one whose newer kernel and QEMU are.
const STABLE: &str = "trixie";
const BACKPORTS: &str = "trixie-backports";

/// What the machines are made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) qemu: Qemu,
    /// A static busybox.
    pub(crate) busybox: PathBuf,
    pub(crate) kernels: Vec<Kernel>,
    /// The one that is built here, if it has been.
    pub(crate) own: Option<Kernel>,
}

/// How QEMU is started.
#[derive(Debug)]
pub(crate) enum Qemu {
    /// A program of the machine's own.
    Own(PathBuf),
    /// A folder with QEMU and all of its libraries.
    Unpacked(PathBuf),
}

impl Qemu {
    /// The command, without arguments.
    pub(crate) fn command(&self) -> std::process::Command {
        match self {
            Qemu::Own(program) => std::process::Command::new(program),
            Qemu::Unpacked(root) => {
                let libraries = root.join("usr/lib/x86_64-linux-gnu");
                let mut command = std::process::Command::new(libraries.join("ld-linux-x86-64.so.2"));
                command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
                command.arg("--library-path").arg(libraries);
                // Its own name is how QEMU finds out what it emulates.
                command.args(["--argv0", "qemu-system-x86_64"]);
                command.arg(root.join("usr/bin/qemu-system-x86_64"));
                for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
                    command.arg("-L").arg(root.join(firmware));
                }
                command
            }
        }
    }

    /// What it says of its version.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub(crate) fn version(&self) -> anyhow::Result<String> {
        let mut command = self.command();
        let output = command.arg("--version").output().context("QEMU does not start")?;
        ensure!(output.status.success(), "QEMU: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
    }
}

/// Takes what the environment names, and unpacks the rest below `folder` unless that was done before.
///
/// # Errors
///
/// If a package cannot be had, or a part brought along is not one.
pub(crate) fn parts(folder: &Path) -> anyhow::Result<Parts> {
    ensure!(cfg!(target_arch = "x86_64"), "the guests are x86_64 machines with packages for such a host");
    let begun = Instant::now();
    let mut apt = Lazy { folder, apt: None };
    let qemu = match env::var_os("QEMU") {
        Some(own) => Qemu::Own(own.into()),
        None => Qemu::Unpacked(once(folder, "qemu", |to| unpack_qemu(apt.get()?, to))?),
    };
    let busybox = match env::var_os("BUSYBOX") {
        Some(own) => own.into(),
        None => busybox(&once(folder, "busybox", |to| {
            apt.get()?.unpack_package(&format!("busybox-static/{STABLE}"), to)
        })?)?,
    };
    let folders: Vec<PathBuf> = match env::var_os("KERNEL") {
        Some(own) => env::split_paths(&own).collect(),
        None => [("kernel-stable", STABLE), ("kernel-backports", BACKPORTS)]
            .into_iter()
            .map(|(name, suite)| once(folder, name, |to| unpack_kernel(apt.get()?, suite, to)))
            .collect::<anyhow::Result<_>>()?,
    };
    let kernels =
        folders.iter().map(|from| Kernel::open(from, folder)).collect::<anyhow::Result<Vec<_>>>()?;
    let parts = Parts { qemu, busybox, kernels, own: own::built(folder) };
    if apt.apt.is_some() {
        println!("unpacked in {:.1} s", begun.elapsed().as_secs_f64());
    }
    Ok(parts)
}

/// Builds the kernel that Debian does not ship.
///
/// # Errors
///
/// If something is missing that cannot be had, or it does not build.
pub(crate) fn build_kernel(folder: &Path) -> anyhow::Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "the guests are x86_64 machines with packages for such a host");
    own::build(folder)
}

/// DPDK and all of its libraries, unpacked below `folder` unless that was done before.
///
/// # Errors
///
/// If they cannot be had.
pub(crate) fn dpdk(folder: &Path) -> anyhow::Result<PathBuf> {
    let mut apt = Lazy { folder, apt: None };
    once(folder, "dpdk", |to| apt.get()?.unpack_closure("dpdk-dev", STABLE, to))
}

/// The machine's packages, asked for only when something is missing.
struct Lazy<'a> {
    folder: &'a Path,
    apt: Option<Apt>,
}

impl Lazy<'_> {
    fn get(&mut self) -> anyhow::Result<&Apt> {
        if self.apt.is_none() {
            println!("unpacking QEMU and kernels from Debian's packages below {}", self.folder.display());
            let apt = Apt::open(&self.folder.join("apt"), &[STABLE, BACKPORTS]).context(
                "no Debian packages can be had here. QEMU=PROGRAM, KERNEL=FOLDER[:FOLDER] (each an unpacked \
                 kernel package) and BUSYBOX=PROGRAM (static) name parts of one's own",
            )?;
            self.apt = Some(apt);
        }
        self.apt.as_ref().context("no packages")
    }
}

/// The folder `name`, made by `make` unless an earlier run has finished it.
fn once(
    folder: &Path,
    name: &str,
    make: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<PathBuf> {
    let path = folder.join(name);
    let stamp = folder.join(format!("{name}.done"));
    if fs::read_to_string(&stamp).is_ok_and(|generation| generation == GENERATION) && path.is_dir() {
        return Ok(path);
    }
    if path.exists() {
        fs::remove_dir_all(&path).with_context(|| path.display().to_string())?;
    }
    fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
    let begun = Instant::now();
    make(&path).with_context(|| format!("{name} cannot be unpacked"))?;
    fs::write(&stamp, GENERATION).with_context(|| stamp.display().to_string())?;
    println!("  {name}: {:.1} s", begun.elapsed().as_secs_f64());
    Ok(path)
}

fn unpack_qemu(apt: &Apt, to: &Path) -> anyhow::Result<()> {
    apt.unpack_closure("qemu-system-x86", BACKPORTS, to)?;
    // Debian keeps its files in /usr alone; a library's path may still begin with /lib.
    for name in ["lib", "lib64", "bin", "sbin"] {
        let link = to.join(name);
        if !link.exists() {
            std::os::unix::fs::symlink(format!("usr/{name}"), &link)?;
        }
    }
    Ok(())
}

/// The packages behind the one that always names the newest kernel; since 7.x that is two.
fn unpack_kernel(apt: &Apt, suite: &str, to: &Path) -> anyhow::Result<()> {
    let newest = apt.dependencies(&format!("linux-image-amd64/{suite}"))?;
    let Some(image) = newest.iter().find(|name| name.starts_with("linux-image-")) else {
        bail!("linux-image-amd64 of {suite} depends on no linux-image-*");
    };
    let parts = apt.dependencies(image)?;
    let parts =
        parts.iter().filter(|name| name.starts_with("linux-binary-") || name.starts_with("linux-modules-"));
    for package in [image].into_iter().chain(parts) {
        apt.unpack_package(package, to)?;
    }
    Ok(())
}

fn busybox(root: &Path) -> anyhow::Result<PathBuf> {
    let places = ["usr/bin/busybox", "bin/busybox"];
    let found = places.iter().map(|place| root.join(place)).find(|path| path.is_file());
    found.with_context(|| format!("{}: no busybox in it", root.display()))
}
