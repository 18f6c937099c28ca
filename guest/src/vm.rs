//! One virtual machine: QEMU, what its guest says, and a limit on its time.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::Write,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use crate::{
    qmp::Qmp,
    setup::{Kernel, Qemu},
};

/// How long a machine may live, unless a case says otherwise.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// MiB of a machine, unless a case says otherwise.
pub(crate) const MEMORY: u32 = 256;

/// How often is looked whether something has happened.
const PAUSE: Duration = Duration::from_millis(10);

/// The slot of QEMU's own serial port for the trace, out of the way of what the cases add.
const TRACE_SLOT: &str = "10";

/// A machine that is yet to be started.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// The script that the guest runs, by name; without one the firmware boots from a disk.
    pub(crate) script: Option<String>,
    /// Further words of the kernel's command line.
    pub(crate) append: String,
    /// Further arguments of QEMU: devices and what they need.
    pub(crate) arguments: Vec<String>,
    /// A command that starts QEMU, which comes behind it; nothing: QEMU is started itself.
    pub(crate) boot: Vec<OsString>,
    pub(crate) processors: u32,
    /// MiB.
    pub(crate) memory: u32,
    /// Another first file system than that of all cases.
    pub(crate) initramfs: Option<PathBuf>,
    /// A reboot starts the guest anew; else it ends the machine.
    pub(crate) reboots: bool,
    pub(crate) limit: Duration,
}

impl Config {
    /// A machine of one processor that runs `script`.
    pub(crate) fn new(script: &str) -> Config {
        Config {
            script: Some(script.to_owned()),
            append: String::new(),
            arguments: Vec::new(),
            boot: Vec::new(),
            processors: 1,
            memory: MEMORY,
            initramfs: None,
            reboots: false,
            limit: LIMIT,
        }
    }

    /// A machine whose firmware boots from a disk.
    pub(crate) fn firmware() -> Config {
        Config { script: None, ..Config::new("") }
    }

    /// Adds arguments of QEMU's.
    pub(crate) fn arguments<T: Into<String>>(mut self, arguments: impl IntoIterator<Item = T>) -> Config {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Adds words to the kernel's command line.
    pub(crate) fn append(mut self, words: &str) -> Config {
        self.append.push(' ');
        self.append.push_str(words);
        self
    }
}

/// What a machine is made of besides its configuration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hardware<'a> {
    pub(crate) qemu: &'a Qemu,
    pub(crate) kernel: &'a Kernel,
    pub(crate) initramfs: &'a Path,
}

/// A running machine; it is killed when it goes out of scope.
pub(crate) struct Vm {
    child: Child,
    /// Where its files are; their names begin with `name`.
    folder: PathBuf,
    name: String,
    sockets: tempfile::TempDir,
    until: Instant,
    /// Bytes of what the guest said that have been waited for.
    heard: usize,
}

impl Vm {
    /// Starts a machine whose files go to `folder`, with names that begin with `name`.
    ///
    /// # Errors
    ///
    /// If QEMU cannot be started.
    pub(crate) fn start(
        hardware: Hardware<'_>,
        config: &Config,
        folder: &Path,
        name: &str,
    ) -> anyhow::Result<Vm> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        // A socket's path is short by law, and the folder's may not be.
        let sockets = tempfile::Builder::new().prefix("viommu-guest-").tempdir()?;
        let at = |what: &str| folder.join(format!("{name}.{what}")).display().to_string();
        for stale in ["guest.txt", "console.txt", "trace.txt"] {
            let _ = fs::remove_file(at(stale));
        }

        let mut command = hardware.qemu.command();
        command.args(["-M", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-monitor", "none"]);
        let memory = config.memory;
        command.args(["-m", &memory.to_string(), "-smp", &config.processors.to_string()]);
        command.arg("-object").arg(format!("memory-backend-memfd,id=ram,size={memory}M,share=on"));
        command.args(["-machine", "memory-backend=ram"]);
        if !config.reboots {
            command.arg("-no-reboot");
        }
        if let Some(script) = &config.script {
            let initramfs = config.initramfs.as_deref().unwrap_or(hardware.initramfs);
            command.arg("-kernel").arg(&hardware.kernel.vmlinux).arg("-initrd").arg(initramfs);
            // The check of the timer counts interrupts against turns of a loop: a busy host fails it, and the guest panics.
            let words = format!(
                "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check case={script}{}",
                config.append
            );
            command.arg("-append").arg(words);
        }
        command.arg("-chardev").arg(format!("file,id=console,path={}", at("console.txt")));
        command.args(["-serial", "chardev:console"]);
        let socket = sockets.path().join("guest.sock");
        command.arg("-chardev").arg(format!(
            "socket,id=guest,path={},server=on,wait=off,logfile={}",
            socket.display(),
            at("guest.txt")
        ));
        command.args(["-serial", "chardev:guest"]);
        command.arg("-chardev").arg(format!("file,id=trace,path={}", at("trace.txt")));
        command.arg("-device").arg(format!("virtio-serial-pci,addr={TRACE_SLOT}"));
        command.args(["-device", "virtserialport,chardev=trace,name=trace"]);
        let qmp = sockets.path().join("qmp.sock");
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", qmp.display()));
        command.args(&config.arguments);

        if let [program, words @ ..] = &config.boot[..] {
            let mut boot = Command::new(program);
            boot.args(words).arg(command.get_program()).args(command.get_args());
            boot.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
            command = boot;
        }
        let log = File::create(at("qemu.log")).context("QEMU's log")?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().context("QEMU does not start")?;
        Ok(Vm {
            child,
            folder: folder.to_owned(),
            name: name.to_owned(),
            sockets,
            until: Instant::now() + config.limit,
            heard: 0,
        })
    }

    /// Waits until the guest says `@@marker` after what was waited for before; the rest of that line.
    ///
    /// # Errors
    ///
    /// If the guest fails or ends before, or time is up.
    pub(crate) fn wait(&mut self, marker: &str) -> anyhow::Result<String> {
        loop {
            let ended = self.child.try_wait()?;
            if let Some(rest) = self.find(marker)? {
                return Ok(rest);
            }
            if let Some(status) = ended {
                return Err(self.failure(&format!("QEMU ended ({status}) before the guest said {marker}")));
            }
            self.watch(&format!("the guest to say {marker}"))?;
        }
    }

    /// Waits until the kernel's console has a line with `text`.
    ///
    /// # Errors
    ///
    /// If QEMU ends before, or time is up.
    pub(crate) fn wait_console(&mut self, text: &str) -> anyhow::Result<()> {
        loop {
            let ended = self.child.try_wait()?;
            if self.console().contains(text) {
                return Ok(());
            }
            if let Some(status) = ended {
                return Err(self.failure(&format!("QEMU ended ({status}) and its console had no {text:?}")));
            }
            self.watch(&format!("{text:?} on the console"))?;
        }
    }

    /// Waits until QEMU has ended by itself.
    ///
    /// # Errors
    ///
    /// If time is up, or it ends with an error.
    pub(crate) fn wait_end(&mut self) -> anyhow::Result<()> {
        let status = self.wait_status()?;
        if !status.success() {
            return Err(self.failure(&format!("QEMU ended with {status}")));
        }
        Ok(())
    }

    /// As [`Vm::wait_end`], however it ends.
    ///
    /// # Errors
    ///
    /// If time is up.
    pub(crate) fn wait_status(&mut self) -> anyhow::Result<ExitStatus> {
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            self.watch("QEMU to end")?;
        }
    }

    /// Whether QEMU has not ended.
    ///
    /// # Errors
    ///
    /// If the system does not tell.
    pub(crate) fn is_running(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Writes a line for the guest to read.
    ///
    /// # Errors
    ///
    /// If QEMU does not take it.
    pub(crate) fn tell(&self, line: &str) -> anyhow::Result<()> {
        let mut stream =
            UnixStream::connect(self.sockets.path().join("guest.sock")).context("the guest's serial port")?;
        stream.write_all(format!("{line}\n").as_bytes())?;
        Ok(())
    }

    /// QEMU's own control socket.
    ///
    /// # Errors
    ///
    /// If QEMU does not answer.
    pub(crate) fn qmp(&self) -> anyhow::Result<Qmp> {
        Qmp::connect(&self.sockets.path().join("qmp.sock"))
    }

    /// All that the guest has said.
    pub(crate) fn said(&self) -> String {
        self.text("guest.txt")
    }

    /// The rest of each line that begins with `@@marker`, of all that the guest has said.
    pub(crate) fn said_lines(&self, marker: &str) -> Vec<String> {
        self.said().lines().filter_map(|line| rest_of(line, marker)).map(str::to_owned).collect()
    }

    /// What the kernel has printed.
    pub(crate) fn console(&self) -> String {
        self.text("console.txt")
    }

    /// What QEMU itself has said.
    pub(crate) fn log(&self) -> String {
        self.text("qemu.log")
    }

    /// What the guest has recorded.
    pub(crate) fn trace(&self) -> String {
        self.text("trace.txt")
    }

    /// An error with the ends of all that was said, and where the whole is.
    pub(crate) fn failure(&self, what: &str) -> anyhow::Error {
        let mut text = what.to_owned();
        for file in ["guest.txt", "console.txt", "qemu.log"] {
            let whole = self.text(file);
            let lines: Vec<&str> = whole.lines().filter(|line| !line.trim().is_empty()).collect();
            let path = self.folder.join(format!("{}.{file}", self.name));
            text.push_str(&format!("\n--- the end of {}", path.display()));
            for line in &lines[lines.len().saturating_sub(12)..] {
                text.push_str("\n    ");
                text.push_str(line);
            }
        }
        anyhow::Error::msg(text)
    }

    fn text(&self, file: &str) -> String {
        let bytes = fs::read(self.folder.join(format!("{}.{file}", self.name))).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Looks for `@@marker` in whole lines that are new; a failure that the guest tells is an error.
    fn find(&mut self, marker: &str) -> anyhow::Result<Option<String>> {
        let said = self.said();
        let mut at = self.heard;
        while let Some(length) = said.get(at..).and_then(|rest| rest.find('\n')) {
            let line = &said[at..at + length];
            at += length + 1;
            if let Some(rest) = rest_of(line, marker) {
                self.heard = at;
                return Ok(Some(rest.to_owned()));
            }
            if let Some(why) = rest_of(line, "FAIL") {
                return Err(self.failure(&format!("the guest failed: {why}")));
            }
        }
        Ok(None)
    }

    /// Lets a moment pass; an error, if it was the last, or the kernel has given up.
    fn watch(&mut self, what: &str) -> anyhow::Result<()> {
        if self.console().contains("Kernel panic") {
            return Err(self.failure(&format!("the guest's kernel panicked; waited for {what}")));
        }
        if Instant::now() > self.until {
            return Err(self.failure(&format!("time is up; waited for {what}")));
        }
        thread::sleep(PAUSE);
        Ok(())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What comes after `@@marker` in a line that begins so.
fn rest_of<'a>(line: &'a str, marker: &str) -> Option<&'a str> {
    let rest = line.strip_prefix("@@")?.strip_prefix(marker)?;
    if rest.is_empty() { Some(rest) } else { rest.strip_prefix(' ') }
}

/// Checks one thing; the error says both what was expected and what was seen.
///
/// # Errors
///
/// If they differ.
pub(crate) fn expect<T: PartialEq + std::fmt::Debug>(what: &str, seen: T, expected: T) -> anyhow::Result<()> {
    if seen != expected {
        bail!("{what}: expected {expected:?}, seen {seen:?}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rest_of_takes_whole_words() {
        assert_eq!(rest_of("@@UP 1.5", "UP"), Some("1.5"));
        assert_eq!(rest_of("@@UP", "UP"), Some(""));
        assert_eq!(rest_of("@@UPPER 1", "UP"), None);
        assert_eq!(rest_of("UP 1", "UP"), None);
    }
}
