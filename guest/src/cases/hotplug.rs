//! A device comes behind a root port, is used, removed by the guest, and found again; a server that was started anew
//! serves the next boot.

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::endpoint;
use crate::{lab::Run, vm::expect};

const PLACE: &str = "01:00.0";

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    for boot in ["first", "second"] {
        once(run, boot).with_context(|| format!("the {boot} boot"))?;
    }
    Ok("twice, with a server started anew".to_owned())
}

fn once(run: &Run<'_>, boot: &str) -> anyhow::Result<()> {
    let server = run.serve(&endpoint("01:00.0-01:00.7", "hotplug"), boot)?;
    let config = run.config("hotplug").append(&format!("rng={PLACE}"));
    let mut vm = run.start_with(&server, config, boot)?;
    vm.wait("EMPTY")?;
    ensure!(server.status()?.endpoint(PLACE).is_err(), "expected no endpoint yet");

    let said = server.run("plug", &[&format!("{PLACE}=rng")])?;
    let line = said.lines().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("expected what QEMU is to be told, seen {said:?}"))?;
    let line: Value = serde_json::from_str(line)?;
    let command = line["execute"].as_str().context("no command")?;
    vm.qmp()?.run(command, line["arguments"].clone())?;
    vm.wait("USED")?;
    let used = server.status()?;
    ensure!(used.domain(PLACE)?.is_some(), "expected a domain, seen {}", used.endpoint(PLACE)?["view"]);
    let mapped = used.mappings()?.get(PLACE).map_or(0, Vec::len);
    ensure!(mapped > 0, "expected that its ring is mapped, seen nothing");
    expect("faults", used.faults()?, 0)?;
    vm.tell("remove")?;

    vm.wait("REMOVED")?;
    let removed = server.status()?;
    expect("mappings after the guest has removed the device", removed.live()?, 0)?;
    if run.iommu.records() {
        let view = &removed.endpoint(PLACE)?["view"];
        ensure!(removed.domain(PLACE)?.is_none(), "expected no domain, seen {view}");
    }
    vm.tell("rescan")?;

    vm.wait("USED")?;
    let again = server.status()?;
    ensure!(again.domain(PLACE)?.is_some(), "expected a domain, seen {}", again.endpoint(PLACE)?["view"]);
    expect("faults", again.faults()?, 0)?;
    vm.tell("end")?;
    vm.wait("DONE")?;
    vm.wait_end()?;
    server.stop()
}
