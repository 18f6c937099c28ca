//! `viommu replay --mirror` on a guest kernel's own interfaces: what the built-in history's disk maps goes to a device of the
//! guest's as well.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::{Program, Unit};
use crate::{cpio::Archive, lab::Run, vm::Config};

const EDU: &str = "00:04.0";

/// MiB: pages that the history maps are pinned, and a kernel lets nobody have more address space than there is memory.
const MEMORY: u32 = 1536;

pub(in crate::cases) fn type1(run: &Run<'_>) -> anyhow::Result<String> {
    into(run, &["vfio_iommu_type1", "vfio_pci"], &["type1"])
}

/// On a kernel that has them.
pub(in crate::cases) fn own(run: &Run<'_>) -> anyhow::Result<String> {
    into(run, &[], &["iommufd", "vdpa"])
}

fn into(run: &Run<'_>, modules: &[&str], interfaces: &[&str]) -> anyhow::Result<String> {
    let program = Program {
        unit: Unit::Intel,
        processors: 1,
        devices: &["-device", "edu,addr=4,dma_mask=0xffffffffffff"],
        modules,
        vfio: &[EDU],
        words: interfaces,
    };
    let initramfs = run.folder.join("initramfs");
    fs::create_dir_all(&run.folder)?;
    fs::write(&initramfs, [fs::read(run.initramfs())?, with_libraries(&run.lab.viommu)?].concat())?;
    let config = Config { memory: MEMORY, initramfs: Some(initramfs), ..program.config() };
    let mut vm = run.start(&config.append("program=replay"), "replay")?;
    vm.wait("DONE")?;
    vm.wait_end()?;

    let said = vm.said_lines("REPLAY");
    ensure!(said.len() == interfaces.len(), "{} of {} replays", said.len(), interfaces.len());
    let mut notes = Vec::new();
    for (interface, said) in interfaces.iter().zip(said) {
        notes.push(judge(interface, &said).with_context(|| said.clone())?);
    }
    Ok(notes.join(", "))
}

/// What one replay came to; a note.
fn judge(interface: &str, said: &str) -> anyhow::Result<String> {
    let json: Value = serde_json::from_str(said)?;
    let number = |path: &str| json.pointer(path).and_then(Value::as_u64).with_context(|| path.to_owned());
    for path in ["/differences", "/audits/failed", "/real_mirrors/0/refused", "/real_mirrors/0/fences"] {
        ensure!(number(path)? == 0, "{path} is {}", number(path)?);
    }
    let real = &json["real_mirrors"][0];
    ensure!(real["interface"] == *interface, "{real} is of another interface");
    // The software container beside it is that of the same endpoint.
    let mirrors = json["mirrors"].as_array().context("no mirrors")?;
    let beside =
        mirrors.iter().find(|mirror| mirror["endpoint"] == real["endpoint"]).context("no such mirror")?;
    ensure!(beside["held"] == real["held"] && beside["map"] == real["map"], "{beside} beside {real}");
    let maps = number("/real_mirrors/0/map")?;
    ensure!(maps > 1000 && number("/real_mirrors/0/held")? > 0, "too little was mapped");
    Ok(format!("{interface}: {maps} maps"))
}

/// An archive with a program of this machine's and the libraries that it asks for, where it looks for them.
fn with_libraries(program: &Path) -> anyhow::Result<Vec<u8>> {
    let output = Command::new("ldd").arg(program).output().context("ldd does not start")?;
    ensure!(output.status.success(), "ldd: {}", String::from_utf8_lossy(&output.stderr));
    let mut archive = Archive::default();
    let read = |path: &str| fs::read(path).with_context(|| path.to_owned());
    archive.program("bin/viommu", &fs::read(program).with_context(|| program.display().to_string())?);
    // NAME => PATH (ADDRESS), or PATH (ADDRESS) for the loader; what the kernel brings has no path.
    for word in
        String::from_utf8_lossy(&output.stdout).split_whitespace().filter(|word| word.starts_with('/'))
    {
        archive.program(word.trim_start_matches('/'), &read(word)?);
    }
    Ok(archive.finish())
}
