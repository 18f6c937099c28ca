//! `viommu serve` in front of a device that others wrote: a server of the `vfio_user` crate's, of rust-vmm. Our own client is
//! the virtual machine monitor.

#[expect(dead_code, reason = "of the device less is needed here")]
#[path = "../../viommu-vfio-user/examples/rust_vmm_device/device.rs"]
mod device;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use viommu::{
    Access, Domain, EndpointConfig, Extent, Gpa, GpaRange, Interest, Iommu, Iova, Mapping, Medium, Tables,
};
use viommu_vfio_user::client::{Area, Client, IrqAction, MirrorOptions, NoMemory};
use viommu_vfio_user::spec::region;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion, VolatileMemory,
};

use device::{Device, Told};

const PAGE: u64 = 0x1000;
const PAGES: u64 = 16;
const LIMIT: Duration = Duration::from_secs(10);

/// A `viommu serve` that is ready; killed in the end.
struct Server {
    child: Child,
    folder: PathBuf,
}

impl Server {
    fn start(folder: &Path, options: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_viommu"));
        command.args(["serve", "--socket-dir"]).arg(folder).args(options).stderr(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let server = Self { child, folder: folder.to_owned() };
        assert!(out.lines().any(|line| line.unwrap().starts_with("ready")), "it ended");
        server
    }

    fn client(&self, address: &str) -> Client {
        let socket = self.folder.join(format!("{}.sock", address.replace(':', "-")));
        Client::connect(UnixStream::connect(socket).unwrap(), LIMIT, NoMemory).unwrap()
    }

    fn ask(&self, request: &Value) -> Value {
        let mut stream = UnixStream::connect(self.folder.join("control.sock")).unwrap();
        writeln!(stream, "{request}").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// What is told of an endpoint.
    fn endpoint(&self, address: &str) -> Value {
        let answer = self.ask(&json!({ "get": "snapshot" }));
        let endpoints = answer["snapshot"]["endpoints"].as_array().unwrap();
        endpoints.iter().find(|endpoint| endpoint["address"] == address).unwrap().clone()
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
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

/// The crate's server in a thread, for a number of clients one after the other; gives what is left after the last.
fn upstream(socket: &Path, clients: usize) -> (JoinHandle<Device>, Arc<Mutex<Vec<Told>>>) {
    let listener = OwnedFd::from(UnixListener::bind(socket).unwrap());
    let told = Arc::new(Mutex::new(Vec::new()));
    let log = told.clone();
    let mut device = Device::new(move |told| log.lock().unwrap().push(told)).unwrap();
    let server = vfio_user::Server::from_owned_fd(listener, true, Device::irqs(), device.regions());
    let thread = thread::spawn(move || {
        for _ in 0..clients {
            server.run(&mut device).unwrap();
        }
        device
    });
    (thread, told)
}

/// A machine's memory, and what of it the monitor gives to its device.
struct Machine {
    memory: Arc<GuestMemoryMmap<()>>,
    domain: Domain,
    iommu: Iommu,
}

impl Machine {
    fn new() -> Self {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        let file = File::from(file);
        file.set_len(PAGES * PAGE).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let bytes = usize::try_from(PAGES * PAGE).unwrap();
        let mapping = MmapRegion::from_file(FileOffset::new(file, 0), bytes).unwrap();
        let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
        let memory = Arc::new(GuestMemoryMmap::from_regions(vec![region]).unwrap());
        let range = GpaRange::new(Gpa(0), Gpa(PAGES * PAGE - 1)).unwrap();
        let iommu = Iommu::builder().backing(Extent { range, medium: Medium::Ram }).build().unwrap();
        let domain = iommu.create_domain(1, Tables::Owned).unwrap();
        Self { memory, domain, iommu }
    }

    /// All of its maps are windows of this client's.
    fn follow(&self, client: &Client) -> viommu::Subscription {
        let endpoint = self.iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
        assert!(endpoint.attach(1).unwrap().is_complete());
        let (mirror, _) = client.mirror(self.memory.clone(), MirrorOptions::default());
        endpoint.subscribe_mirror(Box::new(mirror), Interest::MIRROR).unwrap()
    }

    fn map(&self, page: u64, access: Access) {
        let range = viommu::IovaRange::new(Iova(page * PAGE), Iova(page * PAGE + (PAGE - 1))).unwrap();
        let mapping = Mapping::over(range, Gpa(page * PAGE), access).unwrap();
        assert!(self.domain.map(mapping).unwrap().is_complete());
    }

    fn unmap(&self, page: u64) {
        let range = viommu::IovaRange::new(Iova(page * PAGE), Iova(page * PAGE + (PAGE - 1))).unwrap();
        assert!(self.domain.unmap(range).unwrap().is_complete());
    }
}

fn read(client: &Client, register: u64) -> u64 {
    let mut bytes = [0; 8];
    client.region_read(device::REGISTERS, register, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn write(client: &Client, register: u64, value: u64) {
    client.region_write(device::REGISTERS, register, &value.to_le_bytes()).unwrap();
}

fn execute(client: &Client, command: u64, address: u64) -> bool {
    write(client, device::ADDRESS, address);
    write(client, device::COMMAND, command);
    read(client, device::COMMAND) == 0
}

#[test]
fn device_that_others_wrote_is_passed_on_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("device");
    let (thread, told) = upstream(&socket, 2);
    let proxy = format!("00:02.0=proxy:{}", socket.display());
    let server = Server::start(&directory.path().join("s"), &["--endpoint", &proxy]);
    let client = server.client("00:02.0");
    let mut identity = [0; 4];
    client.region_read(region::CONFIG, 0, &mut identity).unwrap();
    assert_eq!(identity, device::IDENTITY);
    assert_eq!(client.region_info(device::REGISTERS).unwrap().size, device::REGISTERS_SIZE);
    assert_eq!(client.region_info(1).unwrap().size, 0);
    assert_eq!((client.irq_info(0).unwrap().count, client.irq_info(1).unwrap().count), (1, device::VECTORS));
    write(&client, device::DATA, 0x1122_3344_5566_7788);
    assert_eq!(read(&client, device::DATA), 0x1122_3344_5566_7788);
    // What the device refuses reads as on a bus where nobody answers.
    let mut nothing = [0; 8];
    client.region_read(device::REGISTERS, 0x800, &mut nothing).unwrap();
    assert_eq!(nothing, [0xff; 8]);

    // The monitor's own eventfd is what the device raises.
    let line = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let set = IrqAction::DATA_EVENTFD | IrqAction::TRIGGER;
    client.set_irqs(0, set, 0, 1, &[], &[line.try_clone().unwrap()]).unwrap();
    assert!(execute(&client, device::RAISE, 0));
    let ready = poll(&mut [PollFd::new(&line, PollFlags::IN)], None).unwrap();
    assert_eq!(ready, 1);
    // Of four vectors in one message the crate's server takes one at a time.
    let events: Vec<_> = (0..4).map(|_| eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect();
    told.lock().unwrap().clear();
    client.set_irqs(1, set, 0, 4, &[], &events).unwrap();
    let one = |start| Told::Irqs { index: 1, flags: set.bits(), start, count: 1, fds: 1 };
    assert_eq!(told.lock().unwrap()[..], [one(0), one(1), one(2), one(3)]);

    let before = read(&client, device::RESETS);
    client.reset().unwrap();
    assert_eq!((read(&client, device::RESETS), read(&client, device::DATA)), (before + 1, 0));
    assert!(client.close("another comes"));
    let client = server.client("00:02.0");
    // A connection begins with a reset.
    assert_eq!(read(&client, device::RESETS), before + 2);
    drop(client);
    server.stop();
    assert_eq!(thread.join().unwrap().windows(), []);
}

#[test]
fn bar_with_a_file_is_mapped_by_the_monitor_and_is_the_devices_memory() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("device");
    let (_thread, _) = upstream(&socket, 1);
    let proxy = format!("00:02.0=proxy:{}", socket.display());
    let server = Server::start(&directory.path().join("s"), &["--endpoint", &proxy]);
    let client = server.client("00:02.0");
    let shared = client.region_info(device::SHARED).unwrap();
    assert_eq!((shared.size, shared.offset), (device::SHARED_SIZE, device::SHARED_OFFSET));
    assert_eq!(shared.areas, device::AREAS.map(|(offset, size)| Area { offset, size }));
    let file = Arc::new(File::from(shared.file.unwrap()));
    for (nth, Area { offset, size }) in (0_u8..).zip(shared.areas) {
        let place = FileOffset::from_arc(file.clone(), shared.offset + offset);
        let mapped = MmapRegion::<()>::from_file(place, usize::try_from(size).unwrap()).unwrap();
        let mapped = mapped.as_volatile_slice();
        // What comes by a message is in the monitor's mapping.
        client.region_write(device::SHARED, offset + 0x10, &[nth + 1; 8]).unwrap();
        let mut seen = [0; 8];
        mapped.read_slice(&mut seen, 0x10).unwrap();
        assert_eq!(seen, [nth + 1; 8]);
        // What the monitor writes there, the device finds.
        mapped.write_slice(b"straight", 0x20).unwrap();
        assert!(execute(&client, device::LOOK, offset + 0x20));
        assert_eq!(&read(&client, device::DATA).to_le_bytes(), b"straight");
        // The rest of the region goes by messages.
        client.region_write(device::SHARED, offset - 8, b"messages").unwrap();
        client.region_read(device::SHARED, offset - 8, &mut seen).unwrap();
        assert_eq!(&seen, b"messages");
    }
}

#[test]
fn device_that_others_wrote_reaches_what_the_monitor_has_given_and_no_more() {
    for (bypass, reaches) in [("on", true), ("off", false)] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("device");
        let (thread, told) = upstream(&socket, 1);
        let proxy = format!("00:02.0=proxy:{}", socket.display());
        let options = ["--bypass", bypass, "--endpoint", &proxy];
        let server = Server::start(&directory.path().join("s"), &options);
        let (machine, client) = (Machine::new(), server.client("00:02.0"));
        let subscription = machine.follow(&client);
        machine.memory.write_slice(b"guest 03", GuestAddress(3 * PAGE + 0x40)).unwrap();
        told.lock().unwrap().clear();
        machine.map(3, Access::RW);
        machine.map(5, Access::READ);
        let windows = server.endpoint("00:02.0")["counters"]["upstream_windows"].as_u64();
        assert_eq!(windows, Some(if reaches { 2 } else { 0 }));
        assert_eq!(execute(&client, device::READ, 3 * PAGE + 0x40), reaches);
        if reaches {
            assert_eq!(&read(&client, device::DATA).to_le_bytes(), b"guest 03");
        }
        write(&client, device::DATA, u64::from_le_bytes(*b"the dev."));
        assert_eq!(execute(&client, device::WRITE, 3 * PAGE + 0x80), reaches);
        assert!(!execute(&client, device::WRITE, 5 * PAGE));
        assert!(!execute(&client, device::READ, 6 * PAGE));
        let mut seen = [0; 8];
        machine.memory.read_slice(&mut seen, GuestAddress(3 * PAGE + 0x80)).unwrap();
        assert_eq!(&seen, if reaches { b"the dev." } else { &[0; 8] });
        machine.unmap(3);
        assert!(!execute(&client, device::READ, 3 * PAGE + 0x40));
        if reaches {
            let map = |page, flags| {
                let (offset, address) = (page * PAGE, page * PAGE);
                Told::Map { flags, file: true, offset, address, size: PAGE }
            };
            let gone = Told::Unmap { flags: 0, address: 3 * PAGE, size: PAGE };
            assert_eq!(told.lock().unwrap()[..], [map(3, 3), map(5, 1), gone]);
        }
        assert!(subscription.audit().unwrap().is_clean());
        // A monitor that goes leaves nothing there.
        assert!(client.close("over"));
        server.stop();
        assert_eq!(thread.join().unwrap().windows(), [], "bypass {bypass}");
    }
}

/// Waits until something is so; fails, if it never is.
fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < LIMIT, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn device_that_hangs_holds_its_steps_up_until_its_process_ends() {
    let directory = tempfile::tempdir().unwrap();
    let (other, folder) = (directory.path().join("other"), directory.path().join("s"));
    fs::create_dir(&other).unwrap();
    let device = Server::start(&other, &["--no-iommu", "--access-platform", "--endpoint", "00:02.0=rng"]);
    let proxy = format!("00:02.0=proxy:{}", other.join("00-02.0.sock").display());
    let server = Server::start(&folder, &["--endpoint", &proxy]);
    let socket = UnixStream::connect(folder.join("00-02.0.sock")).unwrap();
    // The reply waits for two limits of the server's own.
    let client = Client::connect(socket, LIMIT * 3, NoMemory).unwrap();
    let machine = Machine::new();
    let _followed = machine.follow(&client);
    let windows = || server.endpoint("00:02.0")["counters"]["upstream_windows"].as_u64();
    machine.map(3, Access::RW);
    machine.map(4, Access::RW);
    kill_process(Pid::from_child(&device.child), Signal::STOP).unwrap();
    machine.unmap(3);
    // It could not be cut off.
    assert_eq!((server.endpoint("00:02.0")["fenced"].as_bool(), windows()), (Some(true), Some(2)));
    device.kill();
    eventually("nothing is reached any more", || windows() == Some(0));
    machine.unmap(4);
    assert_eq!(server.endpoint("00:02.0")["fenced"], true);
    server.stop();
}

#[test]
fn device_that_dies_is_cut_off_alone_and_one_that_is_plugged_anew_serves() {
    let directory = tempfile::tempdir().unwrap();
    let (other, folder) = (directory.path().join("other"), directory.path().join("s"));
    fs::create_dir(&other).unwrap();
    let device = || Server::start(&other, &["--no-iommu", "--access-platform", "--endpoint", "00:02.0=rng"]);
    let proxy = format!("proxy:{}", other.join("00-02.0.sock").display());
    let first = device();
    let options = ["--endpoint", "01:00.0-01:00.7=hotplug", "--endpoint", "00:03.0=rng"];
    let server = Server::start(&folder, &options);
    let plug = json!({ "plug": { "address": "01:00.0", "device": proxy } });
    assert!(server.ask(&plug)["plugged"].is_object());
    let counter = |name: &str| server.endpoint("01:00.0")["counters"][name].as_u64();

    let (machine, client, rng) = (Machine::new(), server.client("01:00.0"), server.client("00:03.0"));
    let followed = (machine.follow(&client), Machine::new());
    let _rng = followed.1.follow(&rng);
    machine.map(3, Access::RW);
    followed.1.map(3, Access::RW);
    assert_eq!((counter("upstream_connected"), counter("upstream_windows")), (Some(1), Some(1)));
    first.kill();
    // Nobody has asked it anything, and its end is seen.
    eventually("the device is gone", || counter("upstream_connected") == Some(0));
    assert_eq!(server.endpoint("01:00.0")["fenced"], false);
    let mut ones = [0; 4];
    client.region_read(region::CONFIG, 0, &mut ones).unwrap();
    assert_eq!(ones, [0xff; 4]);
    // At the next step it is cut off. The step stands, and others do not notice.
    machine.map(4, Access::RW);
    followed.1.map(4, Access::RW);
    assert_eq!(server.endpoint("01:00.0")["fenced"], true);
    assert_eq!(server.endpoint("00:03.0")["fenced"], false);
    assert_eq!(server.endpoint("00:03.0")["memory"]["windows"], 2);
    assert!(followed.0.audit().unwrap().is_clean());

    // One that comes back is not taken for the one that was there.
    let second = device();
    client.region_read(region::CONFIG, 0, &mut ones).unwrap();
    assert_eq!((ones, counter("upstream_connected")), ([0xff; 4], Some(0)));
    assert!(server.ask(&json!({ "unplug": { "address": "01:00.0" } }))["unplugged"].is_object());
    assert!(server.ask(&plug)["plugged"].is_object());
    let (machine, client) = (Machine::new(), server.client("01:00.0"));
    let _followed = machine.follow(&client);
    machine.map(3, Access::RW);
    client.region_read(region::CONFIG, 0, &mut ones).unwrap();
    assert_eq!(ones, [0xf4, 0x1a, 0x44, 0x10]);
    assert_eq!((counter("upstream_connected"), counter("upstream_windows")), (Some(1), Some(1)));
    assert_eq!(server.endpoint("01:00.0")["fenced"], false);
    server.stop();
    second.stop();
}
