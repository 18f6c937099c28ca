//! `viommu boot`: starts a machine whose ACPI table must say where its own firmware puts a VT-d unit's registers.
//!
//! Firmware decides that by all devices that the machine has, so it is asked: the same machine runs its firmware for a
//! moment, and is ended as soon as the server has seen the place.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::args::Boot;
use crate::serve::snapshot::{Hex, Snapshot, VtdState};
use crate::status::client::Client;

type Error = Box<dyn std::error::Error>;

/// How often is looked how far firmware has come: what comes behind it must not begin.
const GLANCE: Duration = Duration::from_millis(2);
/// How long firmware may take, and the machine to end.
const PATIENCE: Duration = Duration::from_secs(60);
const END: Duration = Duration::from_secs(5);

/// Becomes the machine. Returns only if that cannot be.
///
/// # Errors
/// Nobody serves, or the machine does not start.
pub(crate) fn run(args: &Boot) -> Result<std::convert::Infallible, Error> {
    let (program, words) = args.machine.split_first().ok_or("the command of the machine is missing")?;
    let mut client = Client::connect(&args.socket_dir)?;
    let state = client.snapshot(false)?;
    if let Some(address) = connected(&state) {
        return Err(format!("a machine is running already: it has {address}").into());
    }
    if let Some(vtd) = state.iommu.and_then(|iommu| iommu.vtd) {
        let mut dry = Command::new(program);
        dry.args(without_table(words, Path::new(&vtd.table)));
        dry.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut machine = Dry(dry.spawn().map_err(|why| format!("{}: {why}", program.display()))?);
        let at = machine.place(&mut client)?;
        machine.end()?;
        let until = Instant::now() + END;
        while let Some(address) = connected(&client.snapshot(false)?) {
            if Instant::now() > until {
                return Err(format!("the machine has ended, and the server still has it at {address}").into());
            }
            thread::sleep(GLANCE);
        }
        let file = Path::new(&vtd.table).file_name().unwrap_or_default().display().to_string();
        eprintln!("viommu: firmware puts the VT-d registers at {at}, and {file} says so");
    }
    let why = Command::new(program).args(words).exec();
    Err(format!("{}: {why}", program.display()).into())
}

/// A function that a machine has.
fn connected(state: &Snapshot) -> Option<String> {
    let iommu = state.iommu.iter().map(|iommu| &iommu.function);
    let mut all = iommu.chain(state.endpoints.iter().map(|endpoint| &endpoint.function));
    all.find(|function| function.connected).map(|function| function.address.clone())
}

/// The arguments without the table, which may not be there yet.
fn without_table<'a>(words: &'a [OsString], table: &Path) -> Vec<&'a OsStr> {
    let escaped = table.to_string_lossy().replace(',', ",,");
    let is_table = |word: &OsStr| word.to_string_lossy().ends_with(&format!("file={escaped}"));
    let mut kept: Vec<&OsStr> = Vec::new();
    for word in words {
        match kept.last() {
            Some(option) if *option == "-acpitable" && is_table(word) => {
                kept.pop();
            }
            _ => kept.push(word),
        }
    }
    kept
}

/// The machine for a moment; it is ended when it goes out of scope.
struct Dry(Child);

impl Dry {
    /// Waits until its firmware has put the registers somewhere.
    fn place(&mut self, client: &mut Client) -> Result<Hex, Error> {
        let until = Instant::now() + PATIENCE;
        loop {
            let state = client.snapshot(false)?;
            if let Some(VtdState { registers: Some(at), .. }) = state.iommu.and_then(|iommu| iommu.vtd) {
                return Ok(at);
            }
            if let Some(status) = self.0.try_wait()? {
                let mut said = String::new();
                if let Some(mut errors) = self.0.stderr.take() {
                    let _ = errors.read_to_string(&mut said);
                }
                let why = format!("the machine ended ({status}) before its firmware had found the VT-d unit");
                return Err(format!("{why}\n{}", said.trim_end()).trim_end().into());
            }
            if Instant::now() > until {
                let seconds = PATIENCE.as_secs();
                let why = format!("firmware has not found the VT-d unit in {seconds} s");
                let help =
                    "if /dev/kvm is there and machines hang in it, take `-accel kvm` out of the command";
                return Err(format!("{why}: {help}").into());
            }
            thread::sleep(GLANCE);
        }
    }

    /// Asks it to end, so that it takes its own sockets and files away, and sees to it.
    fn end(&mut self) -> Result<(), Error> {
        let id = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw);
        if let Some(id) = id {
            kill_process(id, Signal::TERM)?;
        }
        let until = Instant::now() + END;
        while self.0.try_wait()?.is_none() {
            if Instant::now() > until {
                self.0.kill()?;
            }
            thread::sleep(GLANCE);
        }
        Ok(())
    }
}

impl Drop for Dry {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_table_leaves_all_else() {
        let words: Vec<OsString> =
            ["-acpitable", "file=/tmp/a,,b/dmar.bin", "-acpitable", "file=own.bin", "-m", "1G"]
                .map(Into::into)
                .into();
        let kept = without_table(&words, Path::new("/tmp/a,b/dmar.bin"));
        assert_eq!(kept, ["-acpitable", "file=own.bin", "-m", "1G"]);
        assert_eq!(without_table(&words, Path::new("/tmp/dmar.bin")).len(), 6);
    }
}
