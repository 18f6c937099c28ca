//! A `viommu serve` of our own.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rustix::process::{Pid, Signal};

use crate::status::Status;

/// How long it may take to be ready, and to stop.
const LIMIT: Duration = Duration::from_secs(10);

/// A running server; it is killed when it goes out of scope.
pub(crate) struct Server {
    child: Child,
    viommu: PathBuf,
    sockets: PathBuf,
    output: PathBuf,
    log: PathBuf,
}

impl Server {
    /// Starts a server of the devices that `options` name, for machines of `memory` MiB; its sockets are in the folder
    /// `sockets`, its output's files in `folder`, with names that begin with `name`.
    ///
    /// # Errors
    ///
    /// If it ends instead of being ready.
    pub(crate) fn start(
        viommu: &Path,
        sockets: &Path,
        options: &[String],
        memory: u32,
        folder: &Path,
        name: &str,
    ) -> anyhow::Result<Server> {
        let output = folder.join(format!("{name}.out.txt"));
        let log = folder.join(format!("{name}.log"));
        let mut command = Command::new(viommu);
        command.arg("serve").arg("--socket-dir").arg(sockets).args(options);
        command.arg("--memory").arg(format!("{memory}M"));
        command.stdin(Stdio::null()).stdout(File::create(&output)?).stderr(File::create(&log)?);
        let child = command.spawn().with_context(|| format!("{} does not start", viommu.display()))?;
        let mut server =
            Server { child, viommu: viommu.to_owned(), sockets: sockets.to_owned(), output, log };
        let until = Instant::now() + LIMIT;
        while !server.output().lines().any(|line| line.starts_with("ready")) {
            if let Some(status) = server.child.try_wait()? {
                return Err(server.failure(&format!("it ended with {status} before it was ready")));
            }
            if Instant::now() > until {
                return Err(server.failure("it is not ready after 10 s"));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    /// The arguments for QEMU that the server has printed, but for the machine itself and what it boots.
    ///
    /// # Errors
    ///
    /// If it has printed no command line.
    pub(crate) fn arguments(&self) -> anyhow::Result<Vec<String>> {
        let words = command_line(&self.output())
            .ok_or_else(|| self.failure("it has printed no command line for QEMU"))?;
        let mut arguments = Vec::new();
        for pair in words.windows(2) {
            if matches!(pair[0].as_str(), "-device" | "-acpitable") {
                arguments.extend_from_slice(pair);
            }
        }
        Ok(arguments)
    }

    /// The command that starts a machine when its firmware has told where a VT-d unit is; the machine's own comes behind.
    pub(crate) fn boot(&self) -> Vec<OsString> {
        let words: [&OsStr; 5] = [
            self.viommu.as_ref(),
            "boot".as_ref(),
            "--socket-dir".as_ref(),
            self.sockets.as_ref(),
            "--".as_ref(),
        ];
        words.map(OsStr::to_owned).into()
    }

    /// The live state.
    ///
    /// # Errors
    ///
    /// If the server does not give it.
    pub(crate) fn status(&self) -> anyhow::Result<Status> {
        let text = self.run("status", &["--json", "--mappings"])?;
        Ok(Status::new(serde_json::from_str(&text).with_context(|| text.clone())?))
    }

    /// Runs another of viommu's commands on this server; what it has said.
    ///
    /// # Errors
    ///
    /// If it fails.
    pub(crate) fn run(&self, command: &str, words: &[&str]) -> anyhow::Result<String> {
        let mut run = Command::new(&self.viommu);
        run.arg(command).arg("--socket-dir").arg(&self.sockets).args(words);
        let output = run.stdin(Stdio::null()).output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(self.failure(&format!("viommu {command} {}: {}", words.join(" "), said.trim())));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Stops it with SIGTERM; it must end well.
    ///
    /// # Errors
    ///
    /// If it does not end, or with an error, or has said that something was wrong.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        self.ensure_alive()?;
        let id = i32::try_from(self.child.id())?;
        let id = Pid::from_raw(id).context("a process without a number")?;
        rustix::process::kill_process(id, Signal::TERM)?;
        let until = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > until {
                return Err(self.failure("it has not stopped 10 s after SIGTERM"));
            }
            thread::sleep(Duration::from_millis(10));
        };
        if !status.success() {
            return Err(self.failure(&format!("it was stopped by SIGTERM and ended with {status}")));
        }
        Ok(())
    }

    /// Stops its process, which hangs then.
    ///
    /// # Errors
    ///
    /// If it was not running.
    pub(crate) fn hang(&mut self) -> anyhow::Result<()> {
        self.ensure_alive()?;
        Ok(rustix::process::kill_process(Pid::from_child(&self.child), Signal::STOP)?)
    }

    /// Kills it in the midst of whatever it does.
    ///
    /// # Errors
    ///
    /// If it was not running.
    pub(crate) fn kill(mut self) -> anyhow::Result<ExitStatus> {
        self.ensure_alive()?;
        self.child.kill()?;
        Ok(self.child.wait()?)
    }

    /// An error, if it has ended.
    ///
    /// # Errors
    ///
    /// That one.
    pub(crate) fn ensure_alive(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait()? {
            return Err(self.failure(&format!("it ended by itself with {status}")));
        }
        Ok(())
    }

    fn output(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// An error with the end of what it has said.
    fn failure(&self, what: &str) -> anyhow::Error {
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = said.lines().collect();
        let mut text = format!("viommu serve: {what}\n--- the end of {}", self.log.display());
        for line in &lines[lines.len().saturating_sub(12)..] {
            text.push_str("\n    ");
            text.push_str(line);
        }
        anyhow::Error::msg(text)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The words of the command that `text` shows, over all lines that end with a backslash and the one after.
fn command_line(text: &str) -> Option<Vec<String>> {
    let at = text.find("qemu-system-x86_64")?;
    let mut command = String::new();
    for line in text[at..].lines() {
        match line.strip_suffix('\\') {
            Some(line) => command.push_str(line),
            None => {
                command.push_str(line);
                break;
            }
        }
    }
    shlex::split(&command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_goes_on_after_a_backslash_and_ends_without_one() {
        let text = "sockets are in x\n\nqemu-system-x86_64 \\\n  -M q35 \\\n  -device '{\"addr\":\"1.0\"}'\nready: y\n";
        let words = command_line(text).expect("a command");
        assert_eq!(words, ["qemu-system-x86_64", "-M", "q35", "-device", "{\"addr\":\"1.0\"}"]);
        assert!(command_line("ready").is_none());
    }
}
