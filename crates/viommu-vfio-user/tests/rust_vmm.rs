//! Our client and a server that others wrote: the `vfio_user` crate's, of rust-vmm, with a device of the example's.

#[path = "../examples/rust_vmm_device/device.rs"]
mod device;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use viommu::{
    Access, Domain, Endpoint, EndpointConfig, Extent, Gpa, GpaRange, Incident, Interest, Iommu, Iova,
    IovaRange, Mapping, Medium, Subscription, Tables,
};
use viommu_vfio_user::client::{
    Area, Capabilities, Client, ClientError, DeviceInfo, Handle, IrqAction, IrqFlags, MirrorOptions, NoMemory,
};
use viommu_vfio_user::spec::{irq, region};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion, VolatileMemory,
};

use device::{Device, Told};

const PAGE: u64 = 0x1000;
const LIMIT: Duration = Duration::from_secs(10);
/// Pages of the guest's memory, and where they begin in their file.
const PAGES: u64 = 16;
const IN_FILE: u64 = 4;
/// Pages that nobody may write.
const ROM: (u64, u64) = (12, 15);

/// The crate's server in a thread, for a number of clients one after the other.
struct Upstream {
    socket: std::path::PathBuf,
    told: Arc<Mutex<Vec<Told>>>,
    thread: JoinHandle<Device>,
    _directory: tempfile::TempDir,
}

impl Upstream {
    fn new(clients: usize, made: impl FnOnce(Device) -> Device) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let listener = OwnedFd::from(UnixListener::bind(&socket).unwrap());
        let told = Arc::new(Mutex::new(Vec::new()));
        let log = told.clone();
        let mut device = made(Device::new(move |told| log.lock().unwrap().push(told)).unwrap());
        let server = vfio_user::Server::from_owned_fd(listener, true, Device::irqs(), device.regions());
        let thread = thread::spawn(move || {
            for nth in 0..clients {
                if nth > 0 {
                    device.gone();
                }
                server.run(&mut device).unwrap();
            }
            device
        });
        Self { socket, told, thread, _directory: directory }
    }

    fn client(&self) -> Client {
        Client::connect(UnixStream::connect(&self.socket).unwrap(), LIMIT, NoMemory).unwrap()
    }

    fn take_told(&self) -> Vec<Told> {
        std::mem::take(&mut *self.told.lock().unwrap())
    }
}

fn plain() -> Upstream {
    Upstream::new(1, |device| device)
}

fn read(client: &Client, register: u64) -> u64 {
    let mut bytes = [0; 8];
    client.region_read(device::REGISTERS, register, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn write(client: &Client, register: u64, value: u64) {
    client.region_write(device::REGISTERS, register, &value.to_le_bytes()).unwrap();
}

/// Has the device do something; whether it could.
fn execute(client: &Client, command: u64, address: u64) -> bool {
    write(client, device::ADDRESS, address);
    write(client, device::COMMAND, command);
    read(client, device::COMMAND) == 0
}

/// The 8 bytes that the device finds there.
fn fetched(client: &Client, address: u64) -> Option<[u8; 8]> {
    execute(client, device::READ, address).then(|| read(client, device::DATA).to_le_bytes())
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn count(event: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    match rustix::io::read(event, &mut bytes) {
        Ok(_) => u64::from_ne_bytes(bytes),
        Err(errno) => {
            assert_eq!(errno, Errno::AGAIN);
            0
        }
    }
}

fn memory() -> Arc<GuestMemoryMmap<()>> {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len((IN_FILE + PAGES) * PAGE).unwrap();
    let bytes = usize::try_from(PAGES * PAGE).unwrap();
    let mapping = MmapRegion::from_file(FileOffset::new(file, IN_FILE * PAGE), bytes).unwrap();
    let region = GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap();
    Arc::new(GuestMemoryMmap::from_regions(vec![region]).unwrap())
}

fn pages(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first * PAGE), Iova(last * PAGE + (PAGE - 1))).unwrap()
}

fn map_of(first: u64, last: u64, gpa: u64, access: Access) -> Mapping {
    Mapping::over(pages(first, last), Gpa(gpa * PAGE), access).unwrap()
}

/// What is told of a map of these pages.
fn given(first: u64, last: u64, gpa: u64, flags: u32) -> Told {
    let (address, size) = (first * PAGE, (last + 1 - first) * PAGE);
    Told::Map { flags, file: true, offset: (IN_FILE + gpa) * PAGE, address, size }
}

fn taken(first: u64, last: u64) -> Told {
    Told::Unmap { flags: 0, address: first * PAGE, size: (last + 1 - first) * PAGE }
}

/// A unit with an endpoint in a domain.
struct Rig {
    domain: Domain,
    endpoint: Endpoint,
    memory: Arc<GuestMemoryMmap<()>>,
    incidents: Arc<Mutex<Vec<Incident>>>,
    _iommu: Iommu,
}

impl Rig {
    fn new() -> Self {
        let incidents = Arc::new(Mutex::new(Vec::new()));
        let alarm = incidents.clone();
        let gpas = |first, last| GpaRange::new(Gpa(first * PAGE), Gpa(last * PAGE + (PAGE - 1))).unwrap();
        let iommu = Iommu::builder()
            .alarm(move |incident| alarm.lock().unwrap().push(incident.clone()))
            .backing(Extent { range: gpas(0, ROM.0 - 1), medium: Medium::Ram })
            .backing(Extent { range: gpas(ROM.0, ROM.1), medium: Medium::Rom })
            .build()
            .unwrap();
        let domain = iommu.create_domain(1, Tables::Owned).unwrap();
        let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
        assert!(endpoint.attach(1).unwrap().is_complete());
        Self { domain, endpoint, memory: memory(), incidents, _iommu: iommu }
    }

    fn mirror(&self, client: &Client, options: MirrorOptions) -> (Subscription, Handle) {
        let (mirror, handle) = client.mirror(self.memory.clone(), options);
        (self.endpoint.subscribe_mirror(Box::new(mirror), Interest::MIRROR).unwrap(), handle)
    }

    #[track_caller]
    fn map(&self, mapping: Mapping) {
        assert!(self.domain.map(mapping).unwrap().is_complete());
    }

    #[track_caller]
    fn unmap(&self, range: IovaRange) {
        assert!(self.domain.unmap(range).unwrap().is_complete());
    }
}

#[test]
fn device_when_asked_says_what_it_has() {
    let upstream = plain();
    let client = upstream.client();
    // It says no more than how many descriptors it takes; the rest is the document's.
    let default = Capabilities { fds: 1, transfer: 1 << 20, windows: 65535, page_sizes: 4096 };
    assert_eq!(client.capabilities(), default);
    assert_eq!(client.info().unwrap(), DeviceInfo { reset: true, pci: true, regions: 9, irqs: 5 });
    let registers = client.region_info(device::REGISTERS).unwrap();
    assert_eq!((registers.size, registers.flags.bits()), (device::REGISTERS_SIZE, 3));
    assert!(registers.file.is_none() && registers.areas.is_empty());
    assert_eq!(client.region_info(1).unwrap().size, 0);
    let config = client.region_info(region::CONFIG).unwrap();
    assert_eq!((config.size, config.flags.bits(), config.file.is_some()), (256, 3, false));
    let line = client.irq_info(0).unwrap();
    assert_eq!((line.flags, line.count), (IrqFlags::EVENTFD, 1));
    assert_eq!(client.irq_info(1).unwrap().count, device::VECTORS);
    assert_eq!(client.irq_info(irq::MSIX).unwrap().count, 0);
    let mut identity = [0; 4];
    client.region_read(region::CONFIG, 0, &mut identity).unwrap();
    assert_eq!(identity, device::IDENTITY);
    // What there is none of is refused, and the connection goes on.
    for refused in
        [client.region_info(9).map(drop), client.irq_info(5).map(drop), client.region_read(9, 0, &mut [0; 4])]
    {
        assert!(matches!(refused, Err(ClientError::Refused { errno: 22, .. })), "{refused:?}");
    }
    assert!(client.info().is_ok());
}

#[test]
fn registers_when_written_are_read_back_and_a_refusal_has_no_number() {
    let upstream = plain();
    let client = upstream.client();
    write(&client, device::DATA, 0x1122_3344_5566_7788);
    assert_eq!(read(&client, device::DATA), 0x1122_3344_5566_7788);
    let mut half = [0; 2];
    client.region_read(device::REGISTERS, device::DATA + 2, &mut half).unwrap();
    assert_eq!(half, [0x66, 0x55]);
    // What its device refuses, the crate's server passes on without saying why.
    let refused = client.region_read(device::REGISTERS, 0x800, &mut [0; 8]);
    assert!(matches!(refused, Err(ClientError::Refused { errno: 0, .. })), "{refused:?}");
    let refused = client.region_write(device::REGISTERS, 0x800, &[0; 8]);
    assert!(matches!(refused, Err(ClientError::Refused { errno: 0, .. })), "{refused:?}");
    client.reset().unwrap();
    assert_eq!((read(&client, device::DATA), read(&client, device::RESETS)), (0, 1));
    assert_eq!(upstream.take_told(), [Told::Reset]);
}

#[test]
fn region_when_it_has_a_file_can_be_mapped_and_is_the_devices() {
    let upstream = plain();
    let client = upstream.client();
    let shared = client.region_info(device::SHARED).unwrap();
    assert_eq!((shared.size, shared.offset), (device::SHARED_SIZE, device::SHARED_OFFSET));
    assert_eq!(shared.areas, device::AREAS.map(|(offset, size)| Area { offset, size }));
    let Area { offset, size } = shared.areas[1];
    let place = FileOffset::new(shared.file.unwrap().into(), shared.offset + offset);
    let mapped = MmapRegion::<()>::from_file(place, usize::try_from(size).unwrap()).unwrap();
    // By a message, and past all messages.
    client.region_write(device::SHARED, offset + 0x10, b"messages").unwrap();
    let mut seen = [0; 8];
    let mapped = mapped.as_volatile_slice();
    mapped.read_slice(&mut seen, 0x10).unwrap();
    assert_eq!(&seen, b"messages");
    mapped.write_slice(b"straight", 0x20).unwrap();
    assert!(execute(&client, device::LOOK, offset + 0x20));
    assert_eq!(&read(&client, device::DATA).to_le_bytes(), b"straight");
    client.region_read(device::SHARED, offset + 0x20, &mut seen).unwrap();
    assert_eq!(&seen, b"straight");
}

#[test]
fn interrupts_when_set_go_one_to_a_message_and_are_raised() {
    let upstream = plain();
    let client = upstream.client();
    let set = IrqAction::DATA_EVENTFD | IrqAction::TRIGGER;
    let events: Vec<_> = (0..device::VECTORS).map(|_| event()).collect();
    client.set_irqs(1, set, 0, device::VECTORS, &[], &events).unwrap();
    let one = |start| Told::Irqs { index: 1, flags: set.bits(), start, count: 1, fds: 1 };
    assert_eq!(upstream.take_told(), [one(0), one(1), one(2), one(3)]);

    assert!(!execute(&client, device::RAISE, 0));
    let line = event();
    client.set_irqs(0, set, 0, 1, &[], &[line.try_clone().unwrap()]).unwrap();
    assert!(execute(&client, device::RAISE, 0));
    assert_eq!(count(&line), 1);
    client.set_irqs(0, IrqAction::DATA_NONE | IrqAction::TRIGGER, 0, 0, &[], &[]).unwrap();
    assert!(!execute(&client, device::RAISE, 0));
    assert_eq!(count(&line), 0);
}

#[test]
fn interrupts_with_a_byte_each_end_the_connection_and_nothing_is_taken_for_a_reply() {
    let upstream = plain();
    let stream = UnixStream::connect(&upstream.socket).unwrap();
    let client = Client::connect(stream, Duration::from_secs(1), NoMemory).unwrap();
    let some = IrqAction::DATA_BOOL | IrqAction::TRIGGER;
    let refused = client.set_irqs(1, some, 0, 2, &[1, 0], &[]);
    assert!(matches!(refused, Err(ClientError::Refused { errno: 0, .. })), "{refused:?}");
    // The crate's server refuses them and leaves the bytes in its socket, where it takes them for the begin of the next
    // message: it answers what nobody asked, or waits for the rest.
    let error = client.info().unwrap_err();
    assert!(matches!(error, ClientError::Broken(_) | ClientError::Late(_)), "{error}");
    assert!(!client.is_open());
}

#[test]
fn device_reaches_what_is_mapped_with_its_permissions_and_nothing_else() {
    let (upstream, rig) = (plain(), Rig::new());
    let client = upstream.client();
    let (subscription, handle) = rig.mirror(&client, MirrorOptions::default());
    rig.memory.write_slice(b"guest 03", GuestAddress(3 * PAGE + 0x40)).unwrap();
    rig.memory.write_slice(b"guest 13", GuestAddress(13 * PAGE + 0x40)).unwrap();
    assert_eq!(fetched(&client, 0x50_0040), None);

    rig.map(map_of(0x500, 0x501, 3, Access::RW));
    rig.map(map_of(0x600, 0x600, 5, Access::READ));
    rig.map(map_of(0x601, 0x601, 6, Access::WRITE));
    // Of what nobody may write the device gets no more than reading.
    rig.map(map_of(0x700, 0x700, 13, Access::RW));
    let maps = [given(0x500, 0x501, 3, 3), given(0x600, 0x600, 5, 1), given(0x601, 0x601, 6, 2)];
    assert_eq!(upstream.take_told(), [&maps[..], &[given(0x700, 0x700, 13, 1)]].concat());
    assert_eq!((handle.windows(), read(&client, device::WINDOWS)), (4, 4));

    assert_eq!(fetched(&client, 0x50_0040).as_ref(), Some(b"guest 03"));
    assert_eq!(fetched(&client, 0x70_0040).as_ref(), Some(b"guest 13"));
    assert_eq!(fetched(&client, 0x60_1000), None);
    write(&client, device::DATA, u64::from_le_bytes(*b"the dev."));
    let written = [0x50_1000, 0x60_1ff8, 0x60_0000, 0x70_0000, 0x80_0000];
    assert_eq!(written.map(|at| execute(&client, device::WRITE, at)), [true, true, false, false, false]);
    for (page, expected) in [(4 * PAGE, b"the dev."), (6 * PAGE + 0xff8, b"the dev."), (5 * PAGE, &[0; 8])] {
        let mut seen = [0; 8];
        rig.memory.read_slice(&mut seen, GuestAddress(page)).unwrap();
        assert_eq!(&seen, expected, "{page:#x}");
    }

    // Windows stay over a reset of the device.
    client.reset().unwrap();
    assert_eq!(fetched(&client, 0x50_0040).as_ref(), Some(b"guest 03"));
    upstream.take_told();
    rig.unmap(pages(0x600, 0x6ff));
    assert_eq!(upstream.take_told(), [taken(0x600, 0x600), taken(0x601, 0x601)]);
    assert_eq!(fetched(&client, 0x60_0000), None);
    assert_eq!(fetched(&client, 0x50_0040).as_ref(), Some(b"guest 03"));
    assert!(subscription.audit().unwrap().is_clean());
    // Who leaves takes all away, one by one.
    assert!(subscription.leave().is_complete());
    assert_eq!(upstream.take_told(), [taken(0x500, 0x501), taken(0x700, 0x700)]);
    assert_eq!(read(&client, device::WINDOWS), 0);
    assert!(rig.incidents.lock().unwrap().is_empty());
}

#[test]
fn new_connection_is_given_everything_again() {
    let (upstream, rig) = (Upstream::new(2, |device| device), Rig::new());
    let first = upstream.client();
    let (subscription, _) = rig.mirror(&first, MirrorOptions::default());
    rig.map(map_of(0x500, 0x501, 3, Access::RW));
    assert!(subscription.leave().is_complete());
    assert!(first.close("another comes"));
    rig.map(map_of(0x600, 0x600, 5, Access::READ));
    upstream.take_told();
    let second = upstream.client();
    let (_subscription, handle) = rig.mirror(&second, MirrorOptions::default());
    assert_eq!(upstream.take_told(), [given(0x500, 0x501, 3, 3), given(0x600, 0x600, 5, 1)]);
    assert_eq!(handle.windows(), 2);
}

#[test]
fn map_that_is_refused_is_refused_to_the_guest_and_nothing_else() {
    let (upstream, rig) = (Upstream::new(1, |device| device.limited(1)), Rig::new());
    let client = upstream.client();
    let (subscription, handle) = rig.mirror(&client, MirrorOptions::default());
    rig.map(map_of(0x500, 0x500, 3, Access::RW));
    rig.domain.map(map_of(0x600, 0x600, 4, Access::RW)).unwrap_err();
    assert_eq!((handle.windows(), subscription.is_fenced()), (1, false));
    rig.unmap(pages(0x500, 0x500));
    rig.map(map_of(0x600, 0x600, 4, Access::RW));
    assert!(subscription.audit().unwrap().is_clean());
    assert!(rig.incidents.lock().unwrap().is_empty());
}

#[test]
fn unmap_that_is_refused_cuts_off_a_server_that_has_told_its_device_nothing() {
    let (upstream, rig) = (Upstream::new(1, |device| device.keeping(0x50_0000)), Rig::new());
    let client = upstream.client();
    let (subscription, _) = rig.mirror(&client, MirrorOptions::default());
    rig.map(map_of(0x500, 0x500, 3, Access::RW));
    rig.map(map_of(0x600, 0x600, 4, Access::RW));
    rig.unmap(pages(0x500, 0x500));
    assert!(subscription.is_fenced() && !client.is_open());
    assert!(matches!(rig.incidents.lock().unwrap()[..], [Incident::Fenced { .. }]));
    // The crate's server closes its end and then returns: whoever runs it must do the rest, and nobody waits for that.
    let device = upstream.thread.join().unwrap();
    assert_eq!(device.windows(), [(0x50_0000, PAGE), (0x60_0000, PAGE)]);
}

#[test]
fn fence_that_waits_for_the_servers_end_holds_when_nothing_is_left() {
    let (upstream, rig) = (Upstream::new(1, |device| device.keeping(0x50_0000)), Rig::new());
    let client = upstream.client();
    let (ended, left) = (Mutex::new(Some(upstream.thread)), Arc::new(Mutex::new(None)));
    let (ending, seen) = (client.clone(), left.clone());
    let options = MirrorOptions::default().fence(move || {
        // As the end of its process does: the connection, and then all that it had.
        ending.close("the server's process is ended");
        let thread = ended.lock().unwrap().take();
        let mut device = thread.expect("one fence").join().expect("the server ends well");
        device.gone();
        *seen.lock().unwrap() = Some(device.windows());
        Ok(())
    });
    let (subscription, _) = rig.mirror(&client, options);
    rig.map(map_of(0x500, 0x500, 3, Access::RW));
    rig.unmap(pages(0x500, 0x500));
    assert!(subscription.is_fenced());
    assert_eq!(left.lock().unwrap().as_deref(), Some(&[][..]));
}
