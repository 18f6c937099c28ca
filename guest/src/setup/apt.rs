//! Packages through the machine's own apt, with lists, cache and status of our own: the system is left as it is.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};

use super::sources::{self, Mirror};

/// Where Debian's own keys are, for a source that names none.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// How often something is fetched before it is given up.
const TRIES: u64 = 3;

/// The packages of some suites.
pub(super) struct Apt {
    folder: PathBuf,
}

impl Apt {
    /// Fetches the lists of `suites` from the mirror that the machine uses for Debian, into `folder`.
    ///
    /// # Errors
    ///
    /// If there is no apt, no mirror, or no network.
    pub(super) fn open(folder: &Path, suites: &[&str]) -> anyhow::Result<Apt> {
        for program in ["apt-get", "apt-cache", "dpkg-deb"] {
            if Command::new(program).arg("--version").output().is_err() {
                bail!("{program} is not on this machine");
            }
        }
        let mirror = match env::var("DEBIAN_MIRROR") {
            Ok(uri) => Some(Mirror { uri, keyring: None }),
            Err(_) => sources::mirror(Path::new("/etc/apt")),
        };
        let mirror = mirror
            .context("the machine's apt sources name no mirror of Debian; DEBIAN_MIRROR=URI names one")?;
        for part in ["lists/partial", "cache/archives/partial", "state"] {
            fs::create_dir_all(folder.join(part)).with_context(|| folder.display().to_string())?;
        }
        // A status without any package: what is asked for comes with all that it needs, the C library included.
        fs::write(folder.join("status"), "")?;
        let keyring = mirror.keyring.or_else(|| Path::new(KEYRING).exists().then(|| KEYRING.to_owned()));
        let keyring = keyring.map_or_else(String::new, |keyring| format!("[signed-by={keyring}] "));
        let list: String =
            suites.iter().map(|suite| format!("deb {keyring}{} {suite} main\n", mirror.uri)).collect();
        fs::write(folder.join("sources.list"), list)?;

        let apt = Apt { folder: folder.to_owned() };
        patiently("apt-get update", || {
            apt.run(apt.command("apt-get").args(["-o", "APT::Update::Error-Mode=any", "update"])).map(drop)
        })?;
        Ok(apt)
    }

    /// Unpacks a package, given as `name` or `name/suite`, without what it depends on.
    ///
    /// # Errors
    ///
    /// If it cannot be fetched or unpacked.
    pub(super) fn unpack_package(&self, package: &str, to: &Path) -> anyhow::Result<()> {
        let into = self.emptied("download")?;
        patiently(package, || {
            self.run(self.command("apt-get").args(["download", package]).current_dir(&into)).map(drop)
        })?;
        unpack_all(&into, to)
    }

    /// Unpacks a package and all that it depends on, those of `suite` first.
    ///
    /// # Errors
    ///
    /// As [`Apt::unpack_package`].
    pub(super) fn unpack_closure(&self, package: &str, suite: &str, to: &Path) -> anyhow::Result<()> {
        let archives = self.emptied("cache/archives")?;
        fs::create_dir_all(archives.join("partial"))?;
        patiently(package, || {
            let mut command = self.command("apt-get");
            self.run(command.args(["install", "--download-only", "-t", suite, package])).map(drop)
        })?;
        unpack_all(&archives, to)
    }

    /// The names of what a package, given as `name` or `name/suite`, depends on.
    ///
    /// # Errors
    ///
    /// If there is no such package.
    pub(super) fn dependencies(&self, package: &str) -> anyhow::Result<Vec<String>> {
        let said = self.run(self.command("apt-cache").args(["show", package]))?;
        let line = said.lines().find_map(|line| line.strip_prefix("Depends: "));
        let line = line.with_context(|| format!("{package} depends on nothing"))?;
        Ok(line
            .split([',', '|'])
            .filter_map(|word| word.split_whitespace().next())
            .map(str::to_owned)
            .collect())
    }

    /// A program of apt's; the machine's own configuration stays in force (a proxy, say) but for what is ours.
    fn command(&self, program: &str) -> Command {
        let at = |name: &str| self.folder.join(name).display().to_string();
        let mut command = Command::new(program);
        command.args(["-qq", "--yes"].iter().filter(|_| program == "apt-get"));
        for (option, value) in [
            ("Dir::Etc::SourceList", at("sources.list")),
            ("Dir::Etc::SourceParts", "/dev/null".to_owned()),
            ("Dir::Etc::Preferences", "/dev/null".to_owned()),
            ("Dir::Etc::PreferencesParts", "/dev/null".to_owned()),
            ("Dir::State", at("state")),
            ("Dir::State::Lists", at("lists")),
            ("Dir::State::Status", at("status")),
            ("Dir::State::extended_states", at("state/extended_states")),
            ("Dir::Cache", at("cache")),
            ("Dir::Cache::Archives", at("cache/archives")),
            ("APT::Architecture", "amd64".to_owned()),
            ("APT::Architectures", "amd64".to_owned()),
            ("APT::Install-Recommends", "0".to_owned()),
            ("APT::Sandbox::User", String::new()),
            ("APT::Keep-Downloaded-Packages", "1".to_owned()),
            ("Acquire::Languages", "none".to_owned()),
            ("Acquire::Retries", "3".to_owned()),
            ("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", "false".to_owned()),
            ("Acquire::IndexTargets::deb::CNF::DefaultEnabled", "false".to_owned()),
            ("Debug::NoLocking", "1".to_owned()),
        ] {
            command.arg("-o").arg(format!("{option}={value}"));
        }
        command.env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// Runs a command; what it has said.
    fn run(&self, command: &mut Command) -> anyhow::Result<String> {
        let name = command.get_program().to_string_lossy().into_owned();
        let output =
            command.stdin(Stdio::null()).output().with_context(|| format!("{name} does not start"))?;
        if !output.status.success() {
            bail!("{name}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn emptied(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.folder.join(name);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(path)
    }
}

/// Unpacks every package in `from`, and then takes them away: they are of no more use.
fn unpack_all(from: &Path, to: &Path) -> anyhow::Result<()> {
    let mut count = 0;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "deb") {
            continue;
        }
        let status = Command::new("dpkg-deb").arg("-x").arg(&path).arg(to).stdin(Stdio::null()).status()?;
        ensure!(status.success(), "dpkg-deb -x {}: {status}", path.display());
        fs::remove_file(&path)?;
        count += 1;
    }
    ensure!(count > 0, "apt has fetched no package into {}", from.display());
    Ok(())
}

/// Does something that the network may upset, a few times, with pauses.
fn patiently(what: &str, mut attempt: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut tried = 1;
    loop {
        match attempt() {
            Ok(()) => return Ok(()),
            Err(error) if tried < TRIES => {
                println!("  {what}: {error:#}; again");
                thread::sleep(Duration::from_secs(2 * tried));
                tried += 1;
            }
            Err(error) => return Err(error.context(format!("{what}, {TRIES} times"))),
        }
    }
}
