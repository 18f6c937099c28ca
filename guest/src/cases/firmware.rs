//! The firmware boots from a disk behind the IOMMU before any driver of it is there: bypass lets it, or does not.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    thread,
    time::{Duration, Instant},
};

use anyhow::ensure;
use serde_json::json;

use super::blk;
use crate::{
    lab::Run,
    vm::{Config, expect},
};

const BLK: &str = "00:02.0";
const SECTOR: usize = 512;

/// A boot sector for 16-bit mode: reads the second sector by the firmware's disk service, writes what it holds to the
/// first serial port, and then to the third sector.
#[rustfmt::skip]
const BOOT: [u8; 66] = [
    0x31, 0xc0,             // xor ax, ax
    0x8e, 0xd8,             // mov ds, ax
    0x8e, 0xc0,             // mov es, ax
    0x8e, 0xd0,             // mov ss, ax
    0xbc, 0x00, 0x7c,       // mov sp, 0x7c00
    0xb8, 0x01, 0x02,       // mov ax, 0x0201       read one sector
    0xb9, 0x02, 0x00,       // mov cx, 2            of cylinder 0, the second
    0x30, 0xf6,             // xor dh, dh           of head 0
    0xbb, 0x00, 0x7e,       // mov bx, 0x7e00       to there
    0xcd, 0x13,             // int 0x13
    0x72, 0x28,             // jc stop
    0xbe, 0x00, 0x7e,       // mov si, 0x7e00
    0xe8, 0x14, 0x00,       // call print
    0xb8, 0x01, 0x03,       // mov ax, 0x0301       write one sector
    0xb9, 0x03, 0x00,       // mov cx, 3            the third
    0x30, 0xf6,             // xor dh, dh
    0xcd, 0x13,             // int 0x13
    0x72, 0x16,             // jc stop
    0xbe, 0x10, 0x7e,       // mov si, 0x7e10
    0xe8, 0x02, 0x00,       // call print
    0xeb, 0x0e,             // jmp stop
    0x52,                   // print: push dx       which holds the drive's number
    0xba, 0xf8, 0x03,       // mov dx, 0x3f8
    0xac,                   // next: lodsb
    0x84, 0xc0,             // test al, al
    0x74, 0x03,             // jz end
    0xee,                   // out dx, al
    0xeb, 0xf8,             // jmp next
    0x5a,                   // end: pop dx
    0xc3,                   // ret
];

pub(super) fn run(run: &Run<'_>) -> anyhow::Result<String> {
    allowed(run)?;
    forbidden(run)?;
    Ok("booted with bypass, and did not without".to_owned())
}

/// A disk to boot from.
fn bootable(run: &Run<'_>, name: &str) -> anyhow::Result<std::path::PathBuf> {
    let image = run.disk(name, 4)?;
    let mut boot = [0; SECTOR];
    boot[..BOOT.len()].copy_from_slice(&BOOT);
    // stop: hlt; jmp stop
    boot[BOOT.len()..BOOT.len() + 3].copy_from_slice(&[0xf4, 0xeb, 0xfd]);
    boot[510..].copy_from_slice(&[0x55, 0xaa]);
    let mut text = [0; SECTOR];
    text[..9].copy_from_slice(b"@@BOOTED\n");
    text[16..26].copy_from_slice(b"@@WRITTEN\n");
    let file = OpenOptions::new().write(true).open(&image)?;
    file.write_all_at(&boot, 0)?;
    file.write_all_at(&text, SECTOR as u64)?;
    Ok(image)
}

fn allowed(run: &Run<'_>) -> anyhow::Result<()> {
    let image = bootable(run, "allowed.img")?;
    let server = run.serve(&blk(BLK, &image), "allowed")?;
    let mut vm = run.start_with(&server, Config::firmware(), "allowed")?;
    vm.wait_console("@@BOOTED")?;
    vm.wait_console("@@WRITTEN")?;
    expect("faults", server.status()?.faults()?, 0)?;
    vm.qmp()?.run("quit", json!({}))?;
    vm.wait_end()?;
    server.stop()?;
    let disk = fs::read(&image)?;
    ensure!(
        disk[2 * SECTOR..3 * SECTOR] == disk[SECTOR..2 * SECTOR],
        "expected in the third sector what the firmware has read from the second, seen something else"
    );
    Ok(())
}

fn forbidden(run: &Run<'_>) -> anyhow::Result<()> {
    let image = bootable(run, "forbidden.img")?;
    let before = fs::read(&image)?;
    let options = [blk(BLK, &image), ["--bypass".to_owned(), "off".to_owned()]].concat();
    let server = run.serve(&options, "forbidden")?;
    let mut vm = run.start_with(&server, Config::firmware(), "forbidden")?;
    let until = Instant::now() + Duration::from_secs(20);
    while server.status()?.faults()? == 0 {
        ensure!(
            Instant::now() < until,
            "expected a fault of the firmware's first request, seen none in 20 s"
        );
        ensure!(vm.is_running()?, "QEMU has ended");
        thread::sleep(Duration::from_millis(50));
    }
    // It has been refused; a moment for what must not come.
    thread::sleep(Duration::from_millis(500));
    let console = vm.console();
    ensure!(!console.contains("@@BOOTED"), "expected that the firmware cannot read, seen {console:?}");
    vm.qmp()?.run("quit", json!({}))?;
    vm.wait_end()?;
    server.stop()?;
    ensure!(fs::read(&image)? == before, "expected the disk as it was, seen something else");
    Ok(())
}
