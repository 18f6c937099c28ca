//! QEMU's control socket.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

/// A connection, past its greeting.
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    /// Connects to a socket.
    ///
    /// # Errors
    ///
    /// If nobody answers there.
    pub(crate) fn connect(path: &Path) -> anyhow::Result<Qmp> {
        let writer = UnixStream::connect(path).context("QEMU's control socket")?;
        writer.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut qmp = Qmp { reader: BufReader::new(writer.try_clone()?), writer };
        qmp.read()?;
        qmp.run("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command; what it returns. Events that come before are passed over.
    ///
    /// # Errors
    ///
    /// If QEMU refuses the command, or is gone.
    pub(crate) fn run(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        self.writer.write_all(format!("{line}\n").as_bytes()).with_context(|| command.to_owned())?;
        loop {
            let answer = self.read().with_context(|| command.to_owned())?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
        }
    }

    fn read(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU has closed its control socket");
        }
        Ok(serde_json::from_str(&line)?)
    }
}
