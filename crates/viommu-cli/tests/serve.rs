//! `viommu serve` as a process: its start, its control socket, its end.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use viommu_vfio_user::client::{Client, NoMemory};
use viommu_vfio_user::spec::{irq, region};

fn serve(directory: &Path, options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_viommu"));
    command.arg("serve").arg("--socket-dir").arg(directory.join("s")).args(options).current_dir(directory);
    command
}

/// A server that is ready; it is killed if the test ends before it does.
struct Server {
    child: Child,
    /// What it printed until it was ready.
    said: String,
}

impl Server {
    fn start(directory: &Path, options: &[&str]) -> Self {
        let mut child = serve(directory, options)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut said = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        while !said.lines().last().is_some_and(|line| line.starts_with("ready")) {
            if out.read_line(&mut said).unwrap() == 0 {
                let mut error = String::new();
                child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
                panic!("it ended: {said}{error}");
            }
        }
        Self { child, said }
    }

    fn stop(mut self, signal: Signal) -> ExitStatus {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self.child.wait().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After `stop` there is nothing left to kill.
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

fn ask(directory: &Path, request: &Value) -> Value {
    let mut stream = UnixStream::connect(directory.join("s/control.sock")).unwrap();
    writeln!(stream, "{request}").unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

fn refused(directory: &Path, options: &[&str]) -> String {
    let Output { status, stderr, .. } = serve(directory, options).output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(2), "{options:?}: {stderr}");
    stderr
}

#[test]
fn server_when_ready_has_private_sockets_and_leaves_none_behind() {
    for signal in [Signal::INT, Signal::TERM] {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("disk.img"), [0; 4096]).unwrap();
        let options = ["--endpoint", "00:02.0=blk:disk.img", "--endpoint", "00:03.0=rng"];
        let server = Server::start(directory.path(), &options);
        assert!(server.said.contains("qemu-system-x86_64"), "{}", server.said);
        let socket = |name: &str| directory.path().join("s").join(name);
        for name in ["iommu.sock", "00-02.0.sock", "00-03.0.sock", "control.sock"] {
            let mode = fs::symlink_metadata(socket(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
            assert!(server.said.contains(name) || name == "control.sock", "{name}: {}", server.said);
        }
        assert!(fs::read(socket("viot.bin")).unwrap().starts_with(b"VIOT"));
        assert!(server.stop(signal).success());
        for name in ["iommu.sock", "00-02.0.sock", "00-03.0.sock", "control.sock"] {
            assert!(!socket(name).exists(), "{name}");
        }
    }
}

#[test]
fn second_server_in_the_same_directory_is_refused_and_the_first_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let first = Server::start(directory.path(), &["--endpoint", "00:03.0=rng"]);
    let why = refused(directory.path(), &["--endpoint", "00:03.0=rng"]);
    assert!(why.contains("another server is there"), "{why}");
    let snapshot = ask(directory.path(), &json!({ "get": "snapshot" }));
    assert_eq!(snapshot["snapshot"]["endpoints"][0]["device"], "rng");
    assert!(first.stop(Signal::TERM).success());
}

#[test]
fn sockets_of_a_killed_server_are_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    let first = Server::start(directory.path(), &["--endpoint", "00:03.0=rng"]);
    assert!(!first.stop(Signal::KILL).success());
    assert!(directory.path().join("s/iommu.sock").exists());
    let second = Server::start(directory.path(), &["--endpoint", "00:03.0=rng"]);
    assert!(second.stop(Signal::TERM).success());
}

/// What a monitor reads first of a function.
fn identity(client: &Client) -> [u8; 4] {
    let mut bytes = [0; 4];
    client.region_read(region::CONFIG, 0, &mut bytes).unwrap();
    bytes
}

#[test]
fn proxy_whose_device_dies_reads_as_all_ones_until_the_next_client() {
    const RNG: [u8; 4] = [0xf4, 0x1a, 0x44, 0x10];
    let directory = tempfile::tempdir().unwrap();
    let other = directory.path().join("other");
    fs::create_dir(&other).unwrap();
    let device = || Server::start(&other, &["--no-iommu", "--access-platform", "--endpoint", "00:02.0=rng"]);
    // There is nobody yet.
    let server = Server::start(directory.path(), &["--endpoint", "00:02.0=proxy:other/s/00-02.0.sock"]);
    let connect = || {
        let stream = UnixStream::connect(directory.path().join("s/00-02.0.sock")).unwrap();
        Client::connect(stream, Duration::from_secs(10), NoMemory).unwrap()
    };
    let counter = |name: &str| {
        let snapshot = ask(directory.path(), &json!({ "get": "snapshot" }));
        snapshot["snapshot"]["endpoints"][0]["counters"][name].as_u64()
    };
    let client = connect();
    assert_eq!((identity(&client), counter("upstream_connected")), ([0xff; 4], Some(0)));
    assert!(client.close("another comes"));

    let first = device();
    let client = connect();
    assert_eq!((identity(&client), counter("upstream_connected")), (RNG, Some(1)));
    assert!(client.irq_info(irq::MSIX).unwrap().count > 0);
    assert!(client.region_info(0).unwrap().size > 0);
    assert!(!first.stop(Signal::KILL).success());
    assert_eq!(identity(&client), [0xff; 4]);
    let second = device();
    assert_eq!((identity(&client), counter("upstream_connected")), ([0xff; 4], Some(0)));
    assert!(client.close("another comes"));

    let client = connect();
    assert_eq!((identity(&client), counter("upstream_connections")), (RNG, Some(2)));
    assert!(server.stop(Signal::TERM).success());
    assert!(second.stop(Signal::TERM).success());
}

#[test]
fn disk_that_is_in_use_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("disk.img"), [0; 4096]).unwrap();
    let _first = Server::start(directory.path(), &["--endpoint", "00:02.0=blk:disk.img"]);
    let other = directory.path().join("other");
    fs::create_dir(&other).unwrap();
    let why = refused(&other, &["--endpoint", "00:02.0=blk:../disk.img"]);
    assert!(why.contains("00:02.0=blk:") && why.contains("disk.img"), "{why}");
}

#[test]
fn wrong_options_are_one_message_each_and_serve_nothing() {
    let directory = tempfile::tempdir().unwrap();
    for (options, what) in [
        (&["--endpoint", "00:02.0=blk:missing.img"][..], "missing.img"),
        (&["--endpoint", "00:02.0=floppy"], "floppy"),
        (&["--endpoint", "00:01.0=rng"], "the IOMMU itself is there"),
        (&["--iommu", "00:01"], "--iommu 00:01"),
        (&["--page-sizes", "5K"], "--page-sizes 5K"),
        (&["--reserved", "0x10-0x1"], "--reserved 0x10-0x1"),
        (&["--no-iommu"], "nothing to serve"),
        (&["--endpoint", "00:02.0=proxy:"], "needs the socket"),
        (
            &["--iommu", "vtd@00:01.0,caching-mode=off", "--endpoint", "00:02.0=proxy:x"],
            "without caching mode",
        ),
        (
            &["--iommu", "vtd@00:01.0,scalable=first-stage", "--endpoint", "00:02.0=proxy:x"],
            "first-stage tables",
        ),
    ] {
        let why = refused(directory.path(), options);
        assert_eq!(why.lines().count(), 1, "{options:?}: {why}");
        assert!(why.contains(what), "{options:?}: {why}");
        assert!(!directory.path().join("s/iommu.sock").exists());
    }
}

#[test]
fn device_when_plugged_is_there_until_it_is_unplugged() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), &["--endpoint", "01:00.0-01:00.7=hotplug"]);
    let plug = json!({ "plug": { "address": "01:00.0", "device": "rng" } });
    let unplug = json!({ "unplug": { "address": "01:00.0" } });
    let socket = directory.path().join("s/01-00.0.sock");

    let plugged = ask(directory.path(), &plug);
    assert!(plugged["plugged"]["qmp"].as_str().unwrap().contains("device_add"), "{plugged}");
    assert!(socket.exists());
    assert!(ask(directory.path(), &plug)["error"].as_str().unwrap().contains("already"));
    let snapshot = ask(directory.path(), &json!({ "get": "snapshot" }));
    assert_eq!(snapshot["snapshot"]["endpoints"][0]["id"], 0x100);

    assert!(ask(directory.path(), &unplug)["unplugged"].is_object());
    assert!(!socket.exists());
    assert!(ask(directory.path(), &unplug)["error"].is_string());
    let elsewhere = json!({ "plug": { "address": "02:00.0", "device": "rng" } });
    assert!(ask(directory.path(), &elsewhere)["error"].as_str().unwrap().contains("hotplug"));
    // And again: nothing of the first is left.
    assert!(ask(directory.path(), &plug)["plugged"].is_object());
    assert!(server.stop(Signal::TERM).success());
}

#[test]
fn history_of_a_server_that_served_nobody_can_be_replayed() {
    let directory = tempfile::tempdir().unwrap();
    let options = ["--endpoint", "00:03.0=rng", "--record", "h.viommu"];
    assert!(Server::start(directory.path(), &options).stop(Signal::TERM).success());
    let replay = Command::new(env!("CARGO_BIN_EXE_viommu"))
        .args(["replay", "--format", "json", "h.viommu"])
        .current_dir(directory.path())
        .output()
        .unwrap();
    let said = String::from_utf8(replay.stdout).unwrap();
    assert!(replay.status.success(), "{said}");
}
