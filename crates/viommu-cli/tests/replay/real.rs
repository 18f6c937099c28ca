//! Interfaces besides the software consumers: a vfio-user server that writes down what it is given.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, OnceLock};

use serde_json::Value;
use tempfile::TempDir;
use viommu_trace::{Event, History};
use viommu_vfio_user::memory::Window;
use viommu_vfio_user::{Function, Interrupts, Region, Server, Stopper, WindowLimits, Windows};

use crate::common::qemu::{Qemu, READ};
use crate::common::{num, replay, viommu};
use crate::{BUILT_IN, RW};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Mapped { address: u64, size: u64, read_only: bool },
    Unmapped { address: u64, size: u64 },
}

/// A function that has nothing but windows.
struct Notes {
    windows: Windows,
    interrupts: Interrupts,
    told: Arc<Mutex<Vec<Told>>>,
    /// After so many it stops its server.
    last: Option<usize>,
    stop: Arc<OnceLock<Stopper>>,
}

impl Notes {
    fn says(&self, told: Told) {
        let mut all = self.told.lock().unwrap();
        all.push(told);
        if self.last == Some(all.len()) {
            self.stop.get().unwrap().stop();
        }
    }
}

impl Function for Notes {
    fn bars(&self) -> [u64; 6] {
        [0; 6]
    }

    fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    fn windows(&self) -> &Windows {
        &self.windows
    }

    fn read(&mut self, _: Region, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: Region, _: u64, _: &[u8]) {}

    fn reset(&mut self) {}

    fn disconnected(&mut self) {}

    fn mapped(&mut self, window: Window) {
        let Window { address, size, memory, read_only } = window;
        // The server takes a ROM that it has no room for, and leaves it out.
        assert!(memory || read_only, "a window without a file");
        self.says(Told::Mapped { address, size, read_only });
    }

    fn unmapped(&mut self, window: Window) {
        self.says(Told::Unmapped { address: window.address, size: window.size });
    }
}

/// A server on a thread.
struct Peer {
    _folder: TempDir,
    option: String,
    told: Arc<Mutex<Vec<Told>>>,
    stop: Stopper,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Peer {
    fn start(limits: WindowLimits, last: Option<usize>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("device.sock");
        let told = Arc::default();
        let (windows, interrupts, stops) = (Windows::new(limits), Interrupts::new(0), Arc::default());
        let notes = Notes { windows, interrupts, told: Arc::clone(&told), last, stop: Arc::clone(&stops) };
        let mut server = Server::bind(&path, notes, limits).unwrap();
        let stop = stops.get_or_init(|| server.stopper()).clone();
        let thread = Some(std::thread::spawn(move || server.run().unwrap()));
        Self { option: format!("vfio-user:{}", path.display()), _folder: folder, told, stop, thread }
    }

    fn roomy() -> Self {
        Self::start(WindowLimits::default(), None)
    }

    /// What it was told, once nothing more comes.
    fn told(mut self) -> Vec<Told> {
        self.stop.stop();
        self.thread.take().unwrap().join().unwrap();
        core::mem::take(&mut *self.told.lock().unwrap())
    }
}

/// Windows that are there at the end of it. None is ever there twice, or goes without having been there.
fn left(told: &[Told]) -> BTreeMap<u64, u64> {
    let mut there = BTreeMap::new();
    for told in told {
        match *told {
            Told::Mapped { address, size, .. } => {
                assert_eq!(there.insert(address, size), None, "{address:#x}")
            }
            Told::Unmapped { address, size } => {
                assert_eq!(there.remove(&address), Some(size), "{address:#x}")
            }
        }
    }
    there
}

/// The maps and unmaps of a domain in the built-in history, each unmap as what it removes.
fn of_domain(wanted: u32) -> Vec<Told> {
    let mut history = History::from_reader(Cursor::new(BUILT_IN), "test").unwrap();
    let (mut there, mut all) = (BTreeMap::new(), Vec::new());
    while let Some(entry) = history.next().unwrap() {
        match entry.event {
            Event::Map { domain, range, access, .. } if domain == wanted => {
                let (address, size) = (range.start().0, u64::try_from(range.bytes()).unwrap());
                there.insert(address, size);
                all.push(Told::Mapped { address, size, read_only: !access.contains(viommu::Access::WRITE) });
            }
            Event::Unmap { domain, range } if domain == wanted => {
                let inside: Vec<u64> =
                    there.range(range.start().0..=range.last().0).map(|(at, _)| *at).collect();
                for address in inside {
                    all.push(Told::Unmapped { address, size: there.remove(&address).unwrap() });
                }
            }
            _ => {}
        }
    }
    all
}

/// The built-in history, all models the same but for what is said of the interface.
fn without_interface(mut json: Value) -> Value {
    let fields = json.as_object_mut().unwrap();
    fields.remove("real_mirrors");
    fields["seconds"] = 0.into();
    fields["audits"]["run"] = 0.into();
    json
}

#[test]
fn a_server_is_told_what_the_domain_is_told_and_has_nothing_in_the_end() {
    let plain = viommu(&["replay", "--format=json"], b"").json();
    for (endpoint, domain, args) in [
        (16, 2, &[][..]),
        (24, 3, &["--mirror-endpoint", "00:03.0"]),
        (32, 4, &["--mirror-endpoint", "0x20", "--model", "virtio-iommu"]),
    ] {
        let peer = Peer::roomy();
        let all = [&["replay", "--format=json", "--mirror", &peer.option], args].concat();
        let run = viommu(&all, b"");
        assert_eq!(run.status, 0, "{all:?}: {}", run.err);
        let json = run.json();
        let mut told = peer.told();
        assert_eq!(left(&told), BTreeMap::new());
        let expected = of_domain(domain);
        let held = left(&expected).len();
        // What is left goes at the end.
        told.truncate(told.len() - held);
        assert!(told == expected && told.len() > 1000, "{} told, {} expected", told.len(), expected.len());
        let real = &json["real_mirrors"][0];
        assert_eq!(
            (real["endpoint"].as_u64(), real["domain"].as_u64()),
            (Some(endpoint), Some(domain.into()))
        );
        assert_eq!(num(real, "/held"), held as u64);
        assert_eq!((num(real, "/refused"), num(real, "/fences"), num(real, "/domains")), (0, 0, 1));
        assert!(num(&json, "/audits/run") > num(&plain, "/audits/run"));
        if !args.contains(&"--model") {
            assert_eq!(without_interface(json), without_interface(plain.clone()), "{args:?}");
        }
    }
}

#[test]
fn a_server_follows_its_endpoint_from_domain_to_domain() {
    let mut qemu = Qemu { bypass: true, notified: vec![16, 24], ..Qemu::default() };
    qemu.get_config();
    qemu.attach(1, 16);
    qemu.map(1, 0x1000, 0x2fff, 0x8000, RW);
    qemu.attach(2, 24);
    qemu.map(2, 0x10000, 0x10fff, 0x20000, READ);
    qemu.attach(2, 16);
    qemu.map(2, 0x20000, 0x20fff, 0x30000, RW);
    qemu.unmap(2, 0x10000, 0x10fff);
    qemu.detach(2, 16);
    qemu.map(2, 0x40000, 0x40fff, 0x50000, RW);
    let peer = Peer::roomy();
    let run = replay(&qemu.log, &["--mirror", &peer.option]);
    assert_eq!(run.status, 0, "{}{}", run.out, run.err);
    let mapped = |address, size, read_only| Told::Mapped { address, size, read_only };
    let unmapped = |address, size| Told::Unmapped { address, size };
    let expected = [
        mapped(0x1000, 0x2000, false),
        unmapped(0x1000, 0x2000),
        mapped(0x10000, 0x1000, true),
        mapped(0x20000, 0x1000, false),
        unmapped(0x10000, 0x1000),
        unmapped(0x20000, 0x1000),
    ];
    assert_eq!(peer.told(), expected);
    let real = &run.json()["real_mirrors"][0];
    assert_eq!((num(real, "/domains"), &real["domain"]), (2, &Value::Null));
}

#[test]
fn a_domain_without_a_known_endpoint_is_followed_until_one_is_known() {
    let mut qemu = Qemu { notified: vec![16], ..Qemu::default() };
    qemu.attach(1, 16);
    let middle = qemu.log.len();
    qemu.map(1, 0x1000, 0x2fff, 0x8000, RW);
    qemu.attach(1, 24);
    qemu.map(1, 0x4000, 0x4fff, 0x9000, RW);
    let log = qemu.log.split_off(middle);
    let peer = Peer::roomy();
    let run = replay(&log, &["--mirror", &peer.option]);
    assert_eq!(run.status, 0, "{}{}", run.out, run.err);
    assert_eq!(num(&run.json(), "/real_mirrors/0/held"), 2);
    assert_eq!(peer.told().len(), 4);
}

#[test]
fn a_server_that_takes_little_has_operations_refused_and_nothing_differs() {
    // Fewer windows than are wanted: refused by what the server has said. Fewer bytes: refused by the server.
    let windows = WindowLimits { windows: 8, ..WindowLimits::default() };
    let bytes = WindowLimits { bytes: 0x8000, ..WindowLimits::default() };
    for (limits, by_server) in [(windows, false), (bytes, true)] {
        for model in ["direct", "virtio-iommu", "spapr-tce"] {
            let peer = Peer::start(limits, None);
            let args = [
                "replay",
                "--format=json",
                "--model",
                model,
                "--mirror",
                &peer.option,
                "--mirror-endpoint=32",
            ];
            let run = viommu(&args, b"");
            assert_eq!(run.status, 0, "{args:?}: {}", run.err);
            let json = run.json();
            assert!(num(&json, "/history/refused_here") > 100, "{args:?}");
            assert_eq!((num(&json, "/audits/failed"), num(&json, "/differences")), (0, 0));
            assert!(num(&json, "/translations/unanswered") > 0);
            let real = &json["real_mirrors"][0];
            assert_eq!(num(real, "/refused") > 0, by_server, "{real}");
            assert_eq!(num(real, "/fences"), 0);
            assert_eq!(left(&peer.told()), BTreeMap::new());
        }
    }
}

#[test]
fn a_server_that_goes_amid_the_history_is_a_difference_and_the_rest_agrees() {
    for args in [&[][..], &["--unfence"], &["--model", "virtio-iommu"]] {
        let peer = Peer::start(WindowLimits::default(), Some(100));
        let all = [&["replay", "--format=json", "--mirror", &peer.option], args].concat();
        let run = viommu(&all, b"");
        assert_eq!(run.status, 1, "{all:?}: {}", run.err);
        let json = run.json();
        assert!(run.err.contains("was fenced"), "{}", run.err);
        assert_eq!(num(&json, "/audits/failed"), 0, "{}", run.err);
        assert_eq!(num(&json, "/translations/differ"), 0);
        assert_eq!(num(&json, "/real_mirrors/0/fences"), 1);
        // Told once, and with --unfence once more that no other can be had.
        assert!(num(&json, "/differences") <= 2, "{}", run.err);
        drop(peer);
    }
}

#[test]
fn interfaces_that_are_not_there_are_named_and_nothing_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let gone = folder.path().join("gone.sock");
    let silent = folder.path().join("nobody.sock");
    drop(UnixListener::bind(&silent).unwrap());
    for (interface, word) in [
        (format!("vfio-user:{}", gone.display()), "gone.sock"),
        (format!("vfio-user:{}", silent.display()), "nobody.sock"),
        ("type1:4294967295".to_owned(), "/dev/vfio/4294967295"),
        ("iommufd:no-such-device".to_owned(), "/dev/vfio/devices/no-such-device"),
        ("vdpa:4294967295".to_owned(), "/dev/vhost-vdpa-4294967295"),
        ("vfio-user".to_owned(), "vfio-user:SOCKET"),
        ("type7".to_owned(), "type1[:GROUP]"),
    ] {
        let run = viommu(&["replay", "--mirror", &interface], b"");
        assert_eq!((run.status, run.out.as_str()), (2, ""), "{interface}");
        assert!(run.err.contains(word) && run.err.contains("--mirror"), "{interface}: {}", run.err);
    }
    let run = viommu(&["replay", "--mirror-endpoint", "16"], b"");
    assert!(run.status == 2 && run.err.contains("--mirror <INTERFACE>"), "{}", run.err);
}
