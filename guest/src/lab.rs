//! Runs the cases on the kernels, two machines at a time, and says how each ended.

use std::{
    collections::VecDeque,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};
use rustix::fs::FlockOperation;

use crate::{
    Options, cases, initramfs,
    iommu::Iommu,
    server::Server,
    setup::{self, Kernel, Parts},
    vm::{self, Config, Hardware, Vm},
};

/// Machines that run at a time: one a processor of a small machine.
const AT_A_TIME: usize = 2;

/// What all cases have in common.
pub(crate) struct Lab {
    pub(crate) parts: Parts,
    pub(crate) viommu: PathBuf,
    /// The disk that is a vhost-user back end, and the front end of a network device.
    pub(crate) vhost_user_blk: PathBuf,
    pub(crate) vhost_user_net_front: PathBuf,
    /// The device of a vfio-user server that is not ours.
    pub(crate) rust_vmm_device: PathBuf,
    /// Longer runs under load.
    pub(crate) full: bool,
    /// Of the comparison with QEMU's VT-d: the first seed, and how many.
    pub(crate) seeds: (u64, u64),
    folder: PathBuf,
    /// Of each kernel, in their order.
    initramfs: Vec<PathBuf>,
    /// Held while DPDK is unpacked.
    dpdk: Mutex<()>,
}

impl Lab {
    /// A folder with DPDK and all of its libraries.
    ///
    /// # Errors
    ///
    /// If it cannot be had.
    pub(crate) fn dpdk(&self) -> anyhow::Result<PathBuf> {
        let _alone = locked(&self.dpdk);
        setup::dpdk(&self.folder)
    }

    /// Files, sockets and kernel of what is called `name`, in an empty folder; its servers have that IOMMU.
    ///
    /// # Errors
    ///
    /// If there is no such kernel, or the folders cannot be made.
    pub(crate) fn run(&self, name: &str, index: usize, iommu: Iommu) -> anyhow::Result<Run<'_>> {
        let kernel = self.kernels().nth(index).context("no such kernel")?;
        let initramfs = self.initramfs.get(index).context("a kernel without its initramfs")?;
        let folder = self.folder.join("runs").join(name);
        emptied(&folder)?;
        let sockets = tempfile::Builder::new().prefix("viommu-guest-").tempdir()?;
        Ok(Run { lab: self, kernel, iommu, initramfs, folder, sockets })
    }

    /// All kernels: Debian's, then the one that is built here, if it has been.
    fn kernels(&self) -> impl Iterator<Item = &Kernel> {
        self.parts.kernels.iter().chain(&self.parts.own)
    }

    /// The kernels that a case runs on, by their number.
    fn kernels_of(&self, case: &cases::Case) -> std::ops::Range<usize> {
        let debian = self.parts.kernels.len();
        if case.own_kernel { debian..self.kernels().count() } else { 0..debian }
    }

    /// The kernels, for a reader.
    pub(crate) fn releases(&self) -> String {
        let names: Vec<&str> = self.kernels().map(|kernel| kernel.release.as_str()).collect();
        names.join(" and ")
    }
}

/// One case on one kernel.
pub(crate) struct Run<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) kernel: &'a Kernel,
    pub(crate) iommu: Iommu,
    initramfs: &'a Path,
    /// Where its files go.
    pub(crate) folder: PathBuf,
    /// Where its server's sockets are: their paths are short by law, and the folder's may not be.
    sockets: tempfile::TempDir,
}

impl Run<'_> {
    /// Starts a machine; its files' names begin with `name`.
    ///
    /// # Errors
    ///
    /// If QEMU cannot be started.
    pub(crate) fn start(&self, config: &Config, name: &str) -> anyhow::Result<Vm> {
        let hardware =
            Hardware { qemu: &self.lab.parts.qemu, kernel: self.kernel, initramfs: self.initramfs };
        Vm::start(hardware, config, &self.folder, name)
    }

    /// The first file system of its machines.
    pub(crate) fn initramfs(&self) -> &Path {
        self.initramfs
    }

    /// A machine whose kernel uses the IOMMU, and runs `script`.
    pub(crate) fn config(&self, script: &str) -> Config {
        Config::new(script).append(&self.iommu.words())
    }

    /// Starts a server of the IOMMU; its files' names begin with `name`. One that is started again has the same sockets.
    ///
    /// # Errors
    ///
    /// If it ends instead of being ready.
    pub(crate) fn serve(&self, options: &[String], name: &str) -> anyhow::Result<Server> {
        let sockets = self.sockets.path().join("s");
        let options = [&self.iommu.options(), options].concat();
        Server::start(&self.lab.viommu, &sockets, &options, vm::MEMORY, &self.folder, name)
    }

    /// Starts another server, of what `options` say alone; gives the folder of its sockets too.
    ///
    /// # Errors
    ///
    /// If it ends instead of being ready.
    pub(crate) fn serve_plainly(&self, options: &[String], name: &str) -> anyhow::Result<(Server, PathBuf)> {
        let sockets = self.sockets.path().join(name);
        let server = Server::start(&self.lab.viommu, &sockets, options, vm::MEMORY, &self.folder, name)?;
        Ok((server, sockets))
    }

    /// Starts a machine whose devices are a server's.
    ///
    /// # Errors
    ///
    /// If QEMU cannot be started.
    pub(crate) fn start_with(&self, server: &Server, config: Config, name: &str) -> anyhow::Result<Vm> {
        let config = config.arguments(server.arguments()?);
        let boot = if self.iommu.is_vtd() { server.boot() } else { Vec::new() };
        self.start(&Config { boot, ..config }, name)
    }

    /// A new file of zeroes for a disk.
    ///
    /// # Errors
    ///
    /// If it cannot be made.
    pub(crate) fn disk(&self, name: &str, mebibytes: u64) -> anyhow::Result<PathBuf> {
        let path = self.folder.join(name);
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        file.set_len(mebibytes << 20)?;
        Ok(path)
    }
}

/// Has all parts at hand, for this process alone as long as the file is held.
///
/// # Errors
///
/// If a part cannot be had.
pub(crate) fn open(options: &Options) -> anyhow::Result<(Lab, File)> {
    fs::create_dir_all(&options.folder).with_context(|| options.folder.display().to_string())?;
    let folder = options.folder.canonicalize()?;
    let alone = alone(&folder)?;
    let parts = setup::parts(&folder)?;
    println!("{}", parts.qemu.version()?);
    let initramfs = parts
        .kernels
        .iter()
        .chain(&parts.own)
        .map(|kernel| initramfs::make(kernel, &parts.busybox, &options.inside, &cases::SCRIPTS, &folder))
        .collect::<anyhow::Result<_>>()?;
    let lab = Lab {
        parts,
        viommu: options.viommu.clone(),
        vhost_user_blk: options.vhost_user_blk.clone(),
        vhost_user_net_front: options.vhost_user_net_front.clone(),
        rust_vmm_device: options.rust_vmm_device.clone(),
        full: options.full,
        seeds: (options.seed, options.cases),
        folder,
        initramfs,
        dpdk: Mutex::default(),
    };
    Ok((lab, alone))
}

/// Builds the kernel that Debian does not ship, unless it is there.
///
/// # Errors
///
/// If that cannot be done.
pub(crate) fn build_kernel(options: &Options) -> anyhow::Result<()> {
    fs::create_dir_all(&options.folder).with_context(|| options.folder.display().to_string())?;
    let folder = options.folder.canonicalize()?;
    let _alone = alone(&folder)?;
    setup::build_kernel(&folder)
}

/// Runs what the options choose; whether all passed.
///
/// # Errors
///
/// If nothing can be run.
pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let begun = Instant::now();
    for name in &options.case {
        ensure!(cases::CASES.iter().any(|case| case.name == name), "there is no case {name}: see --list");
    }
    let (lab, _alone) = open(options)?;
    let chosen = |kernel: &&Kernel| {
        options.kernel.is_empty()
            || options
                .kernel
                .iter()
                .any(|name| kernel.release.starts_with(name.as_str()) || kernel.name == *name)
    };
    if !lab.kernels().any(|kernel| chosen(&kernel)) {
        bail!("no such kernel; there are {}", lab.releases());
    }

    let wanted: Vec<&cases::Case> = cases::CASES
        .iter()
        .filter(|case| match &options.case[..] {
            [] => options.full || !case.full,
            names => names.iter().any(|name| name == case.name),
        })
        .collect();
    for case in wanted.iter().filter(|case| lab.kernels_of(case).is_empty()) {
        println!("{:<16}SKIPPED: cargo xtask guest-kernel builds the kernel for it", case.name);
    }
    let kernels: Vec<&Kernel> = lab.kernels().collect();
    let runs: VecDeque<(&cases::Case, usize)> = wanted
        .into_iter()
        .flat_map(|case| {
            let kernels = lab.kernels_of(case).filter(|at| kernels.get(*at).is_some_and(chosen));
            // Which kernel is not asked where none runs.
            let every = case.has_guest && !case.one_kernel;
            kernels.take(if every { usize::MAX } else { 1 }).map(move |kernel| (case, kernel))
        })
        .collect();
    let count = runs.len();
    let runs = Mutex::new(runs);
    let failed = Mutex::new(0);
    thread::scope(|scope| {
        for _ in 0..AT_A_TIME.min(count) {
            scope.spawn(|| {
                while let Some((case, kernel)) = locked(&runs).pop_front() {
                    if !one(&lab, case, kernel, options.keep) {
                        *locked(&failed) += 1;
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{} of {count} passed in {:.0} s", count - failed, begun.elapsed().as_secs_f64());
    Ok(failed == 0)
}

/// Runs one case and prints how it went; whether it passed.
fn one(lab: &Lab, case: &cases::Case, index: usize, keep: bool) -> bool {
    let begun = Instant::now();
    let kernel_name = lab.kernels().nth(index).filter(|_| case.has_guest).map_or("", |kernel| &kernel.name);
    let name = if case.has_guest { format!("{}-{kernel_name}", case.name) } else { case.name.to_owned() };
    let folder = lab.folder.join("runs").join(&name);
    let result = lab.run(&name, index, case.iommu).and_then(|run| (case.run)(&run));
    let time = begun.elapsed().as_secs_f64();
    match result {
        Ok(note) => {
            println!("{:<16}{kernel_name:<6}{time:5.1} s  passed  {note}", case.name);
            if !keep {
                let _ = fs::remove_dir_all(&folder);
            }
            true
        }
        Err(error) => {
            println!("{:<16}{kernel_name:<6}{time:5.1} s  FAILED  {error:#}", case.name);
            println!("    its files: {}", folder.display());
            false
        }
    }
}

/// Holds the folder until it is dropped, so that two runs do not mix their files.
fn alone(folder: &Path) -> anyhow::Result<File> {
    let lock = File::create(folder.join("lock"))?;
    if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        println!("waiting for another run to end");
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
    }
    Ok(lock)
}

fn emptied(folder: &Path) -> anyhow::Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
