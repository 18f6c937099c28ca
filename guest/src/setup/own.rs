//! A kernel that Debian does not ship, with iommufd and its IOMMU in software, VFIO's device files, and vDPA's simulators:
//! built from Debian's source package of the newest kernel, below the target folder.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};

use super::{BACKPORTS, GENERATION, Kernel, STABLE, apt::Apt};

/// What is switched on; all else is off.
const CONFIG: &str = include_str!("kernel.config");

/// Its name among the kernels.
const NAME: &str = "own";

/// Its folder.
const FOLDER: &str = "kernel-own";

/// What is built with, and may be missing: a program, and Debian's packages that it is in.
const PROGRAMS: [(&str, &[&str]); 3] =
    [("flex", &["flex", "m4"]), ("bison", &["bison", "m4"]), ("bc", &["bc"])];
/// The same for a header of libelf's, which the kernel's own tools need.
const LIBELF: (&str, &[&str]) = ("/usr/include/gelf.h", &["libelf-dev", "libelf1", "zlib1g-dev"]);
/// Of the source, what is not unpacked: more than half of it. Configuration files and Makefiles stay, for the kernel's own
/// configuration program reads those of every folder.
const LEFT_OUT: [&str; 16] = [
    "arch/[!x]*.[chS]",
    "arch/*.dts*",
    "Documentation/*.rst",
    "Documentation/*.yaml",
    "drivers/accel/*.[ch]",
    "drivers/clk/*/*.[ch]",
    "drivers/gpu/*/*.[ch]",
    "drivers/infiniband/*.[ch]",
    "drivers/media/*.[ch]",
    "drivers/net/*/*.[ch]",
    "drivers/scsi/*.[ch]",
    "drivers/staging/*.[ch]",
    "drivers/usb/*.[ch]",
    "sound/*.[ch]",
    "tools/perf/*",
    "tools/testing/*",
];
/// What there must be.
const COMPILER: [&str; 5] = ["make", "gcc", "ld", "tar", "xz"];

/// Why there is no kernel where nothing is wrong with it: no compiler, no packages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NotHere;

impl fmt::Display for NotHere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("what a kernel is built with, or from, cannot be had here")
    }
}

/// The kernel, if it was built, and of this configuration.
pub(super) fn built(folder: &Path) -> Option<Kernel> {
    let at = folder.join(FOLDER);
    let release = fs::read_to_string(at.join("release")).ok()?;
    let same = fs::read_to_string(at.join("config")).is_ok_and(|config| config == stamp());
    let vmlinux = at.join("vmlinux");
    let kernel = Kernel {
        name: NAME.to_owned(),
        release,
        image: vmlinux.clone(),
        vmlinux,
        modules: at.join("modules"),
    };
    (same && kernel.vmlinux.is_file()).then_some(kernel)
}

/// What a kernel that was built is compared by.
fn stamp() -> String {
    format!("{GENERATION}\n{CONFIG}")
}

/// Builds it, unless that was done.
///
/// # Errors
///
/// If something is missing that cannot be had, or it does not build.
pub(super) fn build(folder: &Path) -> anyhow::Result<()> {
    if let Some(kernel) = built(folder) {
        println!("kernel {} is there: {}", kernel.release, kernel.vmlinux.display());
        return Ok(());
    }
    let begun = Instant::now();
    let work = folder.join("kernel-own.work");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    for part in ["package", "tools", "source", "objects"] {
        fs::create_dir_all(work.join(part)).with_context(|| work.display().to_string())?;
    }
    let (source, make) = gather(folder, &work).context(NotHere)?;
    println!(
        "  {source} unpacked after {:.0} s; it is built now, which takes minutes",
        begun.elapsed().as_secs_f64()
    );

    fs::write(work.join("wanted"), CONFIG)?;
    make.run(&["allnoconfig"], &[("KCONFIG_ALLCONFIG", work.join("wanted"))])?;
    check(&fs::read_to_string(work.join("objects/.config"))?)?;
    let jobs = format!("-j{}", thread::available_parallelism().map_or(1, usize::from));
    make.run(&[&jobs, "vmlinux"], &[])?;
    let release = make.run(&["kernelrelease"], &[])?;
    let Some(release) = release.lines().last() else { bail!("the kernel does not tell its release") };

    let to = folder.join(FOLDER);
    if to.exists() {
        fs::remove_dir_all(&to)?;
    }
    fs::create_dir_all(to.join("modules/kernel"))?;
    let status =
        Command::new("strip").arg("-o").arg(to.join("vmlinux")).arg(work.join("objects/vmlinux")).status();
    ensure!(status.context("strip does not start")?.success(), "strip has failed");
    fs::write(to.join("release"), release)?;
    fs::write(to.join("config"), stamp())?;
    let bytes = fs::metadata(to.join("vmlinux"))?.len();
    fs::remove_dir_all(&work)?;
    println!("kernel {release}: {} MB, built in {:.0} s", bytes >> 20, begun.elapsed().as_secs_f64());
    Ok(())
}

/// Has at hand what a kernel is built with and from; the name of the source's package.
fn gather(folder: &Path, work: &Path) -> anyhow::Result<(String, Make)> {
    for program in COMPILER {
        ensure!(is_there(program), "{program} is not on this machine, and a kernel is built with it");
    }
    let own = own_release().unwrap_or_else(|| STABLE.to_owned());
    let apt = Apt::open(&folder.join("apt"), &[STABLE, BACKPORTS, &own])?;
    let source = unpack_source(&apt, work)?;
    let environment = tools(&apt, &own, &work.join("tools"))?;
    Ok((source, Make { environment, work: work.to_owned() }))
}

/// Debian's source of the newest kernel, but for what is left out; its package's name.
fn unpack_source(apt: &Apt, work: &Path) -> anyhow::Result<String> {
    let newest = apt.dependencies(&format!("linux-source/{BACKPORTS}"))?;
    let Some(package) = newest.into_iter().find(|name| name.starts_with("linux-source-")) else {
        bail!("linux-source of {BACKPORTS} depends on no linux-source-*");
    };
    apt.unpack_package(&format!("{package}/{BACKPORTS}"), &work.join("package"))?;
    let archive = work.join("package/usr/src").join(format!("{package}.tar.xz"));
    let mut tar = Command::new("tar");
    // From the top: a `*` takes in folders, too.
    tar.arg("--anchored").args(LEFT_OUT.map(|pattern| format!("--exclude={package}/{pattern}")));
    tar.arg("-xf").arg(&archive).arg("-C").arg(work.join("source")).arg("--strip-components=1");
    ensure!(
        tar.status().context("tar does not start")?.success(),
        "{} cannot be unpacked",
        archive.display()
    );
    fs::remove_dir_all(work.join("package"))?;
    Ok(package)
}

/// Has at hand what is missing; the variables by which it is found.
fn tools(apt: &Apt, suite: &str, to: &Path) -> anyhow::Result<Vec<(&'static str, String)>> {
    let missing = PROGRAMS.iter().filter(|(program, _)| !is_there(program));
    let mut packages: Vec<&str> = missing.flat_map(|(_, packages)| packages.iter().copied()).collect();
    if !Path::new(LIBELF.0).exists() {
        packages.extend(LIBELF.1);
    }
    packages.sort_unstable();
    packages.dedup();
    for package in &packages {
        apt.unpack_package(&format!("{package}/{suite}"), to)?;
    }
    let at = |places: &[&str], more: Option<&str>| {
        let ours = places.iter().map(|place| to.join(place).display().to_string());
        ours.chain(more.and_then(|name| env::var(name).ok())).collect::<Vec<_>>().join(":")
    };
    let triple = "x86_64-linux-gnu";
    let libraries = [format!("usr/lib/{triple}"), format!("lib/{triple}")];
    let libraries: Vec<&str> = libraries.iter().map(String::as_str).collect();
    let mut environment = vec![
        ("PATH", at(&["usr/bin"], Some("PATH"))),
        ("C_INCLUDE_PATH", at(&["usr/include", &format!("usr/include/{triple}")], Some("C_INCLUDE_PATH"))),
        ("LIBRARY_PATH", at(&libraries, Some("LIBRARY_PATH"))),
        ("LD_LIBRARY_PATH", at(&libraries, Some("LD_LIBRARY_PATH"))),
    ];
    if packages.contains(&"bison") {
        environment.push(("BISON_PKGDATADIR", at(&["usr/share/bison"], None)));
    }
    if packages.contains(&"m4") {
        environment.push(("M4", at(&["usr/bin/m4"], None)));
    }
    Ok(environment)
}

/// Runs the kernel's Makefile.
struct Make {
    environment: Vec<(&'static str, String)>,
    work: PathBuf,
}

impl Make {
    /// What it has said.
    fn run(&self, words: &[&str], variables: &[(&str, PathBuf)]) -> anyhow::Result<String> {
        let mut command = Command::new("nice");
        command.args(["make", "-s", "ARCH=x86_64", "-C"]).arg(self.work.join("source"));
        command.arg(format!("O={}", self.work.join("objects").display())).args(words);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        // Flags of a make, or of a cargo, that has started this are not for it.
        for name in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "CFLAGS", "LDFLAGS"] {
            command.env_remove(name);
        }
        for (name, value) in [("TIMESTAMP", "@0"), ("USER", "viommu"), ("HOST", "viommu")] {
            command.env(format!("KBUILD_BUILD_{name}"), value);
        }
        let output = command.stdin(Stdio::null()).output().context("make does not start")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let last: Vec<&str> = said.lines().rev().take(20).collect();
            let last: Vec<&str> = last.into_iter().rev().collect();
            bail!("make {}: {}\n{}", words.join(" "), output.status, last.join("\n"));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Whether all that is wanted is in the configuration: what lacks something that it depends on is left out without a word.
fn check(config: &str) -> anyhow::Result<()> {
    let lines: Vec<&str> = config.lines().collect();
    let wanted = CONFIG.lines().filter(|line| line.starts_with("CONFIG_"));
    let off = |line: &str| Some(format!("# {} is not set", line.strip_suffix("=n")?));
    let missing: Vec<&str> = wanted
        .filter(|line| !lines.contains(line) && !off(line).is_some_and(|off| lines.contains(&off.as_str())))
        .collect();
    ensure!(missing.is_empty(), "this kernel does not take {}", missing.join(" "));
    Ok(())
}

fn is_there(program: &str) -> bool {
    Command::new(program).arg("--version").stdin(Stdio::null()).output().is_ok()
}

/// The machine's own release of Debian: programs of another may want another C library.
fn own_release() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    (field("ID")? == "debian")
        .then(|| field("VERSION_CODENAME").map(|name| name.trim_matches('"').to_owned()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kernel_does_not_take_is_named() {
        let all: String = CONFIG.lines().map(|line| format!("{line}\n")).collect();
        check(&all.replace("CONFIG_CPU_MITIGATIONS=n", "# CONFIG_CPU_MITIGATIONS is not set"))
            .expect("all there");
        let error = check(&all.replace("CONFIG_IOMMUFD_TEST=y", "")).expect_err("one is missing");
        assert!(error.to_string().contains("CONFIG_IOMMUFD_TEST=y"), "{error}");
    }

    #[test]
    fn a_kernel_of_another_configuration_counts_as_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = folder.path().join(FOLDER);
        fs::create_dir_all(&at).expect("to be made");
        for (name, text) in [("release", "7.3.4-viommu"), ("vmlinux", ""), ("config", &stamp())] {
            fs::write(at.join(name), text).expect("to be written");
        }
        assert_eq!(built(folder.path()).expect("there").name, NAME);
        fs::write(at.join("config"), "0\nCONFIG_64BIT=y\n").expect("to be written");
        assert!(built(folder.path()).is_none());
    }
}
