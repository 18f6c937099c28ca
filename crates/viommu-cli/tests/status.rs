//! `viommu status`, `plug` and `unplug`, where `viommu serve` serves and where nobody does.

#[expect(dead_code, reason = "of the helpers few are needed here")]
mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{scratch, viommu};
use serde_json::Value;

/// Killed in the end.
struct Server(Child);

impl Server {
    fn start(directory: &Path, options: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_viommu"))
            .args(["serve", "--socket-dir"])
            .arg(directory)
            .args(options)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let server = Self(child);
        assert!(out.lines().any(|line| line.unwrap().starts_with("ready")), "it ended");
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _status = self.0.wait();
    }
}

#[test]
fn where_nobody_serves_each_says_so_and_ends_with_2() {
    let directory = scratch("nobody");
    std::fs::create_dir_all(&directory).unwrap();
    let directory = directory.to_str().unwrap();
    for line in [
        &["status", "--socket-dir", directory][..],
        &["status", "--json", "--socket-dir", directory],
        &["status", "--watch", "--socket-dir", directory],
        &["plug", "--socket-dir", directory, "01:00.0=rng"],
        &["unplug", "--socket-dir", directory, "01:00.0"],
    ] {
        let run = viommu(line, b"");
        assert_eq!((run.status, run.out.as_str()), (2, ""), "{line:?}: {}", run.err);
        let said = format!("viommu: nobody serves in {directory}: start `viommu serve --socket-dir` there\n");
        assert_eq!(run.err, said, "{line:?}");
    }
}

#[test]
fn what_is_no_device_or_address_is_said_before_anybody_is_asked() {
    for (line, why) in [
        (&["plug", "--socket-dir", "/nowhere", "01:00.0"][..], "BDF=DEVICE is expected"),
        (&["plug", "--socket-dir", "/nowhere", "1=rng"], "no PCI function"),
        (&["plug", "--socket-dir", "/nowhere", "01:00.0=gpu"], "no device"),
        (&["unplug", "--socket-dir", "/nowhere", "x"], "no PCI function"),
        (&["status", "--socket-dir", "/nowhere", "--watch", "--json"], "cannot be used with"),
        (&["status", "--socket-dir", "/nowhere", "--interval", "0"], "0.1 to 3600"),
    ] {
        let run = viommu(line, b"");
        assert_eq!(run.status, 2, "{line:?}");
        assert!(run.err.contains(why), "{line:?}: {}", run.err);
    }
}

#[test]
fn where_a_server_is_its_state_is_shown_and_devices_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path().to_str().unwrap();
    let _server = Server::start(
        directory.path(),
        &["--endpoint", "00:02.0=rng", "--endpoint", "01:00.0-01:00.7=hotplug"],
    );
    let ask = |line: &[&str]| viommu(&[&line[..1], &["--socket-dir", at], &line[1..]].concat(), b"");
    let text = ask(&["status", "--mappings"]);
    assert_eq!(text.status, 0, "{}", text.err);
    assert!(text.out.lines().all(|line| line.chars().count() <= 80), "{}", text.out);
    for what in ["00:01.0  virtio-iommu", "00:02.0  rng", "MAP", "away"] {
        assert!(text.out.contains(what), "{what}: {}", text.out);
    }
    let json = ask(&["status", "--json"]).json();
    assert_eq!(json["iommu"]["address"], "00:01.0");
    assert_eq!(json["endpoints"][0]["view"], "identity", "bypass is on at first");

    let plugged = ask(&["plug", "01:00.0=rng"]);
    assert_eq!(plugged.status, 0, "{}", plugged.err);
    let line: Value = serde_json::from_str(&plugged.out).unwrap();
    assert_eq!(line["execute"], "device_add");
    let socket = directory.path().join("01-00.0.sock");
    assert_eq!(line["arguments"]["socket"]["path"], socket.to_str().unwrap());
    assert!(socket.exists());
    assert_eq!(ask(&["status", "--json"]).json()["endpoints"][1]["address"], "01:00.0");
    let again = ask(&["plug", "01:00.0=rng"]);
    assert_eq!((again.status, again.out.as_str()), (2, ""), "{}", again.err);
    let unplugged = ask(&["unplug", "01:00.0"]);
    assert!(unplugged.out.contains("device_del") && !socket.exists(), "{} {}", unplugged.out, unplugged.err);
    assert_eq!(ask(&["unplug", "01:00.0"]).status, 2);
    let watch = ask(&["status", "--watch"]);
    assert_eq!(watch.status, 2);
    assert!(watch.err.contains("needs a terminal"), "{}", watch.err);
}
