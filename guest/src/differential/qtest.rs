//! A QEMU without a processor, driven by the lines of its qtest protocol: registers, memory, clock.

use std::{
    fmt::{self, Write as _},
    fs::File,
    io::{BufRead, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Stdio},
};

use anyhow::{Context as _, bail};

use crate::setup::Qemu;

/// A QEMU; it ends with this.
pub(super) struct Qtest {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Lines that have not been sent yet, so that many go at once.
    lines: String,
    /// Answers that they will have.
    count: usize,
}

impl Qtest {
    /// Starts one; what it complains of goes to `log`.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub(super) fn start(qemu: &Qemu, arguments: &[&str], log: &Path) -> anyhow::Result<Self> {
        let mut command = qemu.command();
        command.args([
            "-M",
            "q35,sata=off,smbus=off,hpet=off",
            "-accel",
            "qtest",
            "-qtest",
            "stdio",
            "-qtest-log",
            "none",
        ]);
        command.args(["-display", "none", "-nodefaults", "-monitor", "none"]).args(arguments);
        // It makes its maps of memory anew whenever translation is switched: the heap is not to come and go with them.
        command.envs([("MALLOC_ARENA_MAX", "1"), ("MALLOC_TRIM_THRESHOLD_", "268435456")]);
        let log = File::create(log).context("QEMU's log")?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().context("QEMU does not start")?;
        let input = child.stdin.take().context("QEMU's input")?;
        let output = BufReader::new(child.stdout.take().context("QEMU's output")?);
        Ok(Self { child, input, output, lines: String::new(), count: 0 })
    }

    /// Has a line sent with the next [`Qtest::answers`]; which of those will be its own.
    pub(super) fn tell(&mut self, line: fmt::Arguments<'_>) -> usize {
        let _ = writeln!(self.lines, "{line}");
        self.count += 1;
        self.count - 1
    }

    /// Sends all lines; what each has for an answer: its last word, nothing for none.
    ///
    /// # Errors
    ///
    /// If QEMU refuses one, or is gone.
    pub(super) fn answers(&mut self) -> anyhow::Result<Vec<String>> {
        self.input.write_all(self.lines.as_bytes()).context("QEMU does not listen")?;
        let mut answers = Vec::with_capacity(self.count);
        let mut line = String::new();
        while answers.len() < self.count {
            line.clear();
            if self.output.read_line(&mut line)? == 0 {
                bail!("QEMU has ended: {:?}", self.child.wait());
            }
            let mut words = line.split_whitespace();
            match words.next() {
                Some("OK") => answers.push(words.next().unwrap_or_default().to_owned()),
                Some("IRQ") => {}
                _ => bail!("QEMU answers {line:?} to line {} of {:?}", answers.len(), self.lines),
            }
        }
        self.lines.clear();
        self.count = 0;
        Ok(answers)
    }
}

/// A number that QEMU answers.
///
/// # Errors
///
/// If it is none.
pub(super) fn number(answers: &[String], at: usize) -> anyhow::Result<u64> {
    let word = answers.get(at).context("an answer is missing")?;
    let digits = word.strip_prefix("0x").unwrap_or(word);
    u64::from_str_radix(digits, 16).with_context(|| format!("QEMU answers {word:?}"))
}

impl Drop for Qtest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
