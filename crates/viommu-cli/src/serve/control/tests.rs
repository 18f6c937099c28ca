use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;

use super::protocol::{Plug, Unplug, What};
use super::*;
use crate::serve::snapshot::tests::sample;

/// Answers with what it was asked.
#[derive(Default)]
struct Fake {
    snapshots: AtomicUsize,
}

impl Live for Fake {
    fn snapshot(&self, mappings: bool) -> Snapshot {
        self.snapshots.fetch_add(1, Ordering::Relaxed);
        Snapshot { version: format!("mappings {mappings}"), ..sample() }
    }

    fn plug(&self, address: Bdf, device: Kind) -> Result<Plugged, String> {
        Ok(Plugged { address: address.to_string(), socket: device.to_string(), qmp: String::new() })
    }

    fn unplug(&self, address: Bdf) -> Result<Plugged, String> {
        Err(format!("nothing at {address}"))
    }
}

fn start() -> (TempDir, Arc<Fake>, Control) {
    let directory = tempfile::tempdir().unwrap();
    let live = Arc::new(Fake::default());
    let control = Control::start(&directory.path().join("control.sock"), live.clone()).unwrap();
    (directory, live, control)
}

fn connect(directory: &TempDir) -> BufReader<UnixStream> {
    let stream = UnixStream::connect(directory.path().join("control.sock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    BufReader::new(stream)
}

fn ask(client: &mut BufReader<UnixStream>, bytes: &[u8]) -> Answer {
    client.get_mut().write_all(bytes).unwrap();
    read(client)
}

fn read(client: &mut BufReader<UnixStream>) -> Answer {
    let mut text = String::new();
    client.read_line(&mut text).unwrap();
    serde_json::from_str(&text).unwrap_or_else(|why| panic!("{why}: {text:?}"))
}

fn get(mappings: bool) -> Vec<u8> {
    line(&Request::Get { get: What::Snapshot, mappings })
}

fn version(answer: Answer) -> String {
    match answer {
        Answer::Snapshot(snapshot) => snapshot.version,
        other => panic!("{other:?}"),
    }
}

#[test]
fn requests_are_answered_one_after_the_other() {
    let (directory, _, _control) = start();
    let mut client = connect(&directory);
    assert_eq!(version(ask(&mut client, &get(true))), "mappings true");
    assert_eq!(version(ask(&mut client, &get(false))), "mappings false");
    let plug = Plug { address: "01:00.0".into(), device: "rng".into() };
    let plugged = Plugged { address: "01:00.0".into(), socket: "rng".into(), qmp: String::new() };
    assert_eq!(ask(&mut client, &line(&Request::Plug { plug })), Answer::Plugged(plugged));
    let unplug = Request::Unplug { unplug: Unplug { address: "01:00.0".into() } };
    assert_eq!(ask(&mut client, &line(&unplug)), Answer::Error("nothing at 01:00.0".into()));
}

#[test]
fn requests_that_come_at_once_and_in_pieces_are_all_answered() {
    let (directory, live, _control) = start();
    let mut client = connect(&directory);
    let many = get(false).repeat(5);
    let (first, rest) = many.split_at(7);
    client.get_mut().write_all(first).unwrap();
    thread::sleep(Duration::from_millis(20));
    client.get_mut().write_all(rest).unwrap();
    client.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
    for _ in 0..5 {
        version(read(&mut client));
    }
    assert_eq!(live.snapshots.load(Ordering::Relaxed), 5);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}

#[test]
fn what_cannot_be_plugged_is_said_before_the_server_is_asked() {
    let (directory, _, _control) = start();
    let mut client = connect(&directory);
    for (address, device, why) in [
        ("x", "rng", "no PCI function"),
        ("01:01.0", "rng", "root port"),
        ("01:00.0", "gpu", "no device"),
        ("01:00.0", "blk:/nowhere/disk", "No such file"),
    ] {
        let plug = Plug { address: address.into(), device: device.into() };
        let Answer::Error(said) = ask(&mut client, &line(&Request::Plug { plug })) else { panic!() };
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn garbage_is_answered_and_costs_nothing_else() {
    let (directory, _, _control) = start();
    let mut other = connect(&directory);
    let mut client = connect(&directory);
    for garbage in [&b"\n"[..], b"{\n", b"\xff\xfe\0\n", b"[]\n", b"{\"get\":\"everything\"}\n"] {
        assert!(matches!(ask(&mut client, garbage), Answer::Error(_)), "{garbage:?}");
    }
    version(ask(&mut client, &get(false)));
    version(ask(&mut other, &get(false)));
}

#[test]
fn a_line_without_end_is_refused_and_closed() {
    let (directory, _, _control) = start();
    let mut client = connect(&directory);
    let endless = vec![b'x'; connection::LINE * 8];
    // It may be closed before all is written.
    let _ = client.get_mut().write_all(&endless);
    let Answer::Error(said) = read(&mut client) else { panic!() };
    assert!(said.contains("at most"), "{said}");
    let mut rest = Vec::new();
    // With bytes of it left unread, the end may be a reset.
    let _ = client.read_to_end(&mut rest);
    assert!(rest.is_empty());
    version(ask(&mut connect(&directory), &get(false)));
}

#[test]
fn silent_connections_make_room_for_new_ones() {
    let (directory, _, _control) = start();
    let mut watcher = connect(&directory);
    let silent: Vec<_> = (0..CONNECTIONS - 1).map(|_| connect(&directory)).collect();
    version(ask(&mut watcher, &get(false)));
    // All places are taken, and none has been silent for long.
    let mut early = connect(&directory);
    let mut nothing = String::new();
    assert!(matches!(early.read_line(&mut nothing), Ok(0) | Err(_)));
    let start = Instant::now();
    while start.elapsed() < PATIENCE + Duration::from_millis(200) {
        version(ask(&mut watcher, &get(false)));
        thread::sleep(Duration::from_millis(100));
    }
    // Now one has, and it is none that asks.
    version(ask(&mut connect(&directory), &get(false)));
    version(ask(&mut watcher, &get(false)));
    drop(silent);
}

#[test]
fn who_does_not_read_holds_nobody_up() {
    let (directory, live, _control) = start();
    let mut slow = connect(&directory);
    // More answers than the socket's buffers hold, and none is read.
    let many = get(true).repeat(400);
    slow.get_mut().set_nonblocking(true).unwrap();
    let _ = slow.get_mut().write(&many);
    let mut other = connect(&directory);
    let start = Instant::now();
    for _ in 0..20 {
        version(ask(&mut other, &get(false)));
    }
    assert!(start.elapsed() < connection::SLOWNESS, "{:?}", start.elapsed());
    assert!(live.snapshots.load(Ordering::Relaxed) >= 20);
}

#[test]
fn stop_ends_connections_and_removes_the_socket() {
    let (directory, _, control) = start();
    let mut client = connect(&directory);
    version(ask(&mut client, &get(false)));
    let path = directory.path().join("control.sock");
    assert!(path.exists());
    let start = Instant::now();
    control.stop();
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(!path.exists());
    let mut rest = Vec::new();
    assert_eq!(client.read_to_end(&mut rest).unwrap(), 0);
}

#[test]
fn start_where_somebody_serves_is_refused() {
    let (directory, _, _control) = start();
    let again = Control::start(&directory.path().join("control.sock"), Arc::new(Fake::default()));
    assert!(matches!(again, Err(BindError::InUse(_))));
    version(ask(&mut connect(&directory), &get(false)));
}
