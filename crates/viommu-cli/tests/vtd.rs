//! `viommu serve` with a VT-d unit, and `viommu boot`, as far as they go without a machine.

#[expect(dead_code, reason = "of the helpers few are needed here")]
mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{Run, num, scratch, viommu};
use rustix::process::{Pid, Signal, kill_process};

/// Killed in the end.
struct Server {
    child: Child,
    /// What it printed until it was ready.
    said: String,
}

impl Server {
    fn start(directory: &Path, options: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_viommu"))
            .args(["serve", "--socket-dir"])
            .arg(directory)
            .args(options)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut said = String::new();
        while !said.lines().last().is_some_and(|line| line.starts_with("ready")) {
            assert_ne!(out.read_line(&mut said).unwrap(), 0, "it ended: {said}");
        }
        Self { child, said }
    }

    fn stop(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After `stop` there is nothing left to kill.
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

/// The modes, and what of each is said.
const MODES: [(&str, &str, bool); 4] = [
    ("vtd@00:01.0", "legacy", true),
    ("vtd@00:01.0,caching-mode=off", "legacy", false),
    ("vtd@00:01.0,scalable=second-stage", "second", true),
    ("vtd@00:01.0,scalable=first-stage,caching-mode=off", "first", false),
];

#[test]
fn serve_when_it_is_a_vtd_unit_says_how_to_boot_and_status_has_its_mode() {
    for (iommu, mode, caching_mode) in MODES {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().to_str().unwrap();
        let server = Server::start(directory.path(), &["--iommu", iommu, "--endpoint", "00:02.0=rng"]);
        assert!(server.said.starts_with("00:01.0  vtd"), "{}", server.said);
        for what in [
            &format!("viommu boot --socket-dir {at} -- ")[..],
            "-acpitable file=",
            "dmar.bin",
            "intel_iommu=on",
        ] {
            assert!(server.said.contains(what), "{what}: {}", server.said);
        }
        assert!(!server.said.contains("viot.bin"), "{}", server.said);
        // Where the registers will be is not known.
        assert!(!directory.path().join("dmar.bin").exists());
        let json = viommu(&["status", "--json", "--socket-dir", at], b"").json();
        let vtd = &json["iommu"]["vtd"];
        assert!(vtd["mode"].as_str().unwrap().contains(mode), "{vtd}");
        assert_eq!(vtd["caching_mode"], caching_mode);
        assert!(vtd["registers"].is_null(), "{vtd}");
        assert_eq!(json["endpoints"][0]["view"], "identity", "translation is off");
        let text = viommu(&["status", "--socket-dir", at], b"");
        assert_eq!(text.status, 0, "{}", text.err);
        for what in ["00:01.0  vtd", mode, "caching"] {
            assert!(text.out.contains(what), "{what}: {}", text.out);
        }
        server.stop();
    }
}

#[test]
fn serve_when_the_registers_place_is_given_has_the_table_from_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let options = ["--iommu", "vtd@00:01.0,base=0xfebfc000", "--endpoint", "00:02.0=rng"];
    let server = Server::start(directory.path(), &options);
    assert!(server.said.contains("\nqemu-system-x86_64 ") && !server.said.contains("viommu boot"));
    let table = fs::read(directory.path().join("dmar.bin")).unwrap();
    assert!(table.starts_with(b"DMAR"));
    assert_eq!(table[48 + 8..48 + 16], 0xfebf_c000_u64.to_le_bytes());
    server.stop();
}

#[test]
fn wrong_options_of_a_vtd_unit_are_one_message_each_that_names_them() {
    let directory = scratch("wrong-vtd");
    for (options, what) in [
        (&["--iommu", "vtd@00:01.0,caching-mode=maybe"][..], "caching-mode"),
        (&["--iommu", "vtd@00:01.0,scalable=on"], "second-stage"),
        (&["--iommu", "vtd@00:01.0,base=0x1001"], "base"),
        (&["--iommu", "vtd@00:01.0,speed=9"], "speed"),
        (&["--iommu", "vtd@01:00.0"], "bus 00"),
        (&["--iommu", "amd@00:01.0"], "amd"),
        (&["--iommu", "vtd@00:01.0", "--bypass", "off"], "--bypass"),
        (&["--iommu", "vtd@00:01.0", "--endpoint", "00:04.0-00:04.7=hotplug"], "root ports"),
        (&["--iommu", "vtd@00:01.0,caching-mode=off", "--record", "f"], "nothing to record"),
        (&["--iommu", "vtd@00:01.0,scalable=first-stage", "--record", "f"], "nothing to record"),
    ] {
        let at = directory.to_str().unwrap();
        let run = viommu(&[&["serve", "--socket-dir", at], options].concat(), b"");
        assert_eq!((run.status, run.out.as_str()), (2, ""), "{options:?}: {}", run.err);
        assert_eq!(run.err.lines().count(), 1, "{options:?}: {}", run.err);
        assert!(run.err.starts_with("viommu: --") && run.err.contains(what), "{options:?}: {}", run.err);
        assert!(!directory.exists());
    }
}

#[test]
fn history_of_a_vtd_unit_that_served_nobody_is_replayed() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("h.viommu");
    let file = file.to_str().unwrap();
    let options = ["--iommu", "vtd@00:01.0", "--endpoint", "00:02.0=rng", "--record", file];
    Server::start(directory.path(), &options).stop();
    for model in ["direct", "virtio-iommu", "spapr-tce", "vtd"] {
        let run = viommu(&["replay", "--format=json", "--model", model, file], b"");
        assert_eq!(run.status, 0, "{model}: {}", run.err);
        assert_eq!(num(&run.json(), "/history/attach"), 1, "all passes while translation is off");
    }
}

fn boot(directory: &Path, machine: &[&str]) -> Run {
    let at = directory.to_str().unwrap();
    viommu(&[&["boot", "--socket-dir", at, "--"], machine].concat(), b"")
}

#[test]
fn boot_where_nobody_serves_says_so_and_starts_nothing() {
    let directory = scratch("boot-nobody");
    fs::create_dir_all(&directory).unwrap();
    let ran = directory.join("ran");
    let run = boot(&directory, &["touch", ran.to_str().unwrap()]);
    assert_eq!((run.status, run.out.as_str()), (2, ""));
    let said = format!(
        "viommu: nobody serves in {}: start `viommu serve --socket-dir` there\n",
        directory.display()
    );
    assert_eq!(run.err, said);
    assert!(!ran.exists());
    assert_eq!(viommu(&["boot", "--socket-dir", "/nowhere"], b"").status, 2, "no machine");
}

#[test]
fn boot_when_the_machine_cannot_start_or_ends_at_once_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), &["--iommu", "vtd@00:01.0", "--endpoint", "00:02.0=rng"]);
    let run = boot(directory.path(), &["no-such-qemu", "-M", "q35"]);
    assert_eq!(run.status, 2);
    assert!(run.err.starts_with("viommu: no-such-qemu: ") && run.err.lines().count() == 1, "{}", run.err);
    let run = boot(directory.path(), &["sh", "-c", "echo no such device >&2; exit 3"]);
    assert_eq!(run.status, 2);
    assert!(run.err.contains("ended (exit status: 3) before its firmware"), "{}", run.err);
    assert!(run.err.ends_with("no such device\n"), "{}", run.err);
    // The server is as before.
    let at = directory.path().to_str().unwrap();
    assert_eq!(viommu(&["status", "--socket-dir", at], b"").status, 0);
    server.stop();
}

#[test]
fn boot_when_no_table_is_to_be_written_becomes_the_machine() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), &["--endpoint", "00:02.0=rng"]);
    let run =
        boot(directory.path(), &["sh", "-c", "echo \"$@\"; exit 7", "qemu", "-acpitable", "file=own.bin"]);
    assert_eq!((run.status, run.out.as_str()), (7, "-acpitable file=own.bin\n"), "{}", run.err);
    let run = boot(directory.path(), &["no-such-qemu"]);
    assert_eq!((run.status, run.err.lines().count()), (2, 1), "{}", run.err);
    server.stop();
}

#[test]
fn boot_when_the_server_goes_ends_the_machine_for_a_moment() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), &["--iommu", "vtd@00:01.0", "--endpoint", "00:02.0=rng"]);
    let pid = directory.path().join("pid");
    let script = format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 100", pid.display());
    let child = Command::new(env!("CARGO_BIN_EXE_viommu"))
        .args(["boot", "--socket-dir", directory.path().to_str().unwrap(), "--", "sh", "-c", &script])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while !pid.exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let machine = fs::read_to_string(&pid).unwrap();
    server.stop();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!Path::new(&format!("/proc/{}", machine.trim())).exists());
}
