//! The client against our own server: a device's registers, interrupts, memory and reset.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vm_memory::{Bytes as _, GuestAddressSpace as _};

use super::*;
use crate::memory::{Window, Windows};
use crate::spec::{irq, region};
use crate::{Function, Interrupts, Link, Region, RegionFile, Server, WindowLimits};

/// A register file whose first word, written, says which window to copy from and raises a vector.
struct Copier {
    windows: Windows,
    interrupts: Interrupts,
    bar: Vec<u8>,
    link: Option<Link>,
    log: Arc<Mutex<Vec<&'static str>>>,
}

impl Function for Copier {
    fn bars(&self) -> [u64; 6] {
        [0x20000, 0, 0, 0, 0, 0]
    }

    fn region_file(&self, region: Region) -> Option<RegionFile> {
        let areas = vec![Area { offset: 0x1000, size: 0x2000 }, Area { offset: 0x10000, size: 0x1000 }];
        let file = Arc::new(memfd(32).into());
        (region == Region::Bar(0)).then_some(RegionFile { file, offset: 0x4000, areas })
    }

    fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    fn windows(&self) -> &Windows {
        &self.windows
    }

    fn read(&mut self, region: Region, offset: u64, data: &mut [u8]) {
        let at = usize::try_from(offset).unwrap();
        match region {
            Region::Bar(_) => data.copy_from_slice(&self.bar[at..at + data.len()]),
            Region::Config => data.fill(0x1a),
        }
    }

    fn write(&mut self, _: Region, offset: u64, data: &[u8]) {
        let at = usize::try_from(offset).unwrap();
        self.bar[at..at + data.len()].copy_from_slice(data);
        if offset == 0 {
            let address = GuestAddress(u64::from_ne_bytes(data.try_into().unwrap()));
            let memory = self.windows.memory();
            if memory.read_slice(&mut self.bar[8..16], address).is_err() {
                self.bar[8..16].fill(0xff);
            }
            self.interrupts.raise(1);
        } else if offset == 16 {
            let address = u64::from_ne_bytes(data.try_into().unwrap());
            self.link.as_ref().unwrap().dma_write(address, b"by message").unwrap();
        }
    }

    fn reset(&mut self) {
        self.bar.fill(0);
        self.log.lock().unwrap().push("reset");
    }

    fn connected(&mut self, link: &Link) {
        self.link = Some(link.clone());
    }

    fn disconnected(&mut self) {
        self.log.lock().unwrap().push("disconnected");
    }

    fn unmapped(&mut self, _: Window) {
        self.log.lock().unwrap().push("unmapped");
    }
}

struct Ours {
    client: Client,
    log: Arc<Mutex<Vec<&'static str>>>,
    endpoint: Endpoint,
    domain: Domain,
    memory: Arc<GuestMemoryMmap<()>>,
    handle: Handle,
    subscription: Subscription,
    stopper: crate::Stopper,
    thread: thread::JoinHandle<()>,
    _directory: tempfile::TempDir,
}

fn ours() -> Ours {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let log = Arc::new(Mutex::new(Vec::new()));
    let limits = WindowLimits { windows: 8, ..WindowLimits::default() };
    let windows = Windows::new(limits);
    let function = Copier {
        windows,
        interrupts: Interrupts::new(40),
        bar: vec![0; 0x20000],
        link: None,
        log: log.clone(),
    };
    let mut server = Server::bind(&socket, function, limits).unwrap();
    let stopper = server.stopper();
    let thread = thread::spawn(move || server.run().unwrap());
    let memory = memory();
    let iommu = Iommu::builder().backing(Extent { range: gpas(0, 31), medium: Medium::Ram }).build().unwrap();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
    over(endpoint.attach(1).unwrap());
    let view = EndpointSpace::new(endpoint.reader("messages").unwrap(), memory.clone());
    let client = Client::connect(UnixStream::connect(&socket).unwrap(), SOON, SeenThrough(view)).unwrap();
    let (mirror, handle) = client.mirror(memory.clone(), MirrorOptions::default());
    let subscription = endpoint.subscribe_mirror(Box::new(mirror), Interest::MIRROR).unwrap();
    Ours {
        client,
        log,
        endpoint,
        domain,
        memory,
        handle,
        subscription,
        stopper,
        thread,
        _directory: directory,
    }
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

#[test]
fn device_when_asked_says_what_it_has() {
    let Ours { client, .. } = ours();
    assert_eq!(client.info().unwrap(), DeviceInfo { reset: true, pci: true, regions: 9, irqs: 5 });
    let bar = client.region_info(0).unwrap();
    assert_eq!((bar.size, bar.flags.bits(), bar.offset), (0x20000, 15, 0x4000));
    assert_eq!(fstat(bar.file.unwrap()).unwrap().st_size, 32 * 0x1000);
    assert_eq!(bar.areas, [Area { offset: 0x1000, size: 0x2000 }, Area { offset: 0x10000, size: 0x1000 }]);
    let config = client.region_info(region::CONFIG).unwrap();
    assert_eq!((config.size, config.flags.bits(), config.file.is_some()), (256, 3, false));
    assert!(matches!(client.region_info(9), Err(ClientError::Refused { errno: 22, .. })));
    let vectors = client.irq_info(irq::MSIX).unwrap();
    assert_eq!((vectors.flags, vectors.count), (IrqFlags::EVENTFD, 40));
    assert_eq!(client.capabilities().windows, 8);
}

#[test]
fn region_with_areas_when_asked_without_room_for_them_says_how_much_it_takes() {
    use crate::spec::{Command, RegionFlags, RegionInfo};
    use zerocopy::{FromBytes as _, IntoBytes as _};
    let Ours { client, .. } = ours();
    // As QEMU asks first; it refuses a region that says CAPS and does not say where.
    let words = |argsz: u32| [argsz, 0, 0, 0, 0, 0, 0, 0];
    let mut connection = client.connection();
    let mut ask = |argsz: u32| {
        let reply = connection.call(
            Command::DEVICE_GET_REGION_INFO,
            &[words(argsz).as_bytes()],
            &[],
            (32, argsz.try_into().unwrap()),
        );
        let reply = reply.unwrap();
        let (info, _) = RegionInfo::read_from_prefix(&reply.payload).unwrap();
        let caps = info.flags.get() & RegionFlags::CAPS.bits() != 0;
        (reply.payload.len(), reply.fds.len(), info.argsz.get(), caps, info.cap_offset.get())
    };
    assert_eq!(ask(32), (32, 0, 80, false, 0));
    assert_eq!(ask(79), (32, 0, 80, false, 0));
    assert_eq!(ask(80), (80, 1, 80, true, 32));
}

#[test]
fn registers_when_written_are_read_back_also_in_pieces() {
    let Ours { client, log, .. } = ours();
    let data: Vec<u8> = (0..0x1ff00_u32).map(|n| (n % 251) as u8).collect();
    client.region_write(0, 0x100, &data).unwrap();
    let mut back = vec![0; data.len()];
    client.region_read(0, 0x100, &mut back).unwrap();
    assert!(back == data);
    let refused = client.region_read(0, 0x1fffd, &mut [0; 4]);
    assert!(matches!(refused, Err(ClientError::Refused { errno: 22, .. })), "{refused:?}");
    client.reset().unwrap();
    client.region_read(0, 0x100, &mut back).unwrap();
    assert!(back.iter().all(|byte| *byte == 0));
    assert_eq!(log.lock().unwrap()[..], ["reset"]);
}

#[test]
fn interrupts_when_set_in_several_messages_are_all_there() {
    let Ours { client, .. } = ours();
    let events: Vec<_> =
        (0..40).map(|_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()).collect();
    let fds = || events.iter().map(|event| event.try_clone().unwrap()).collect::<Vec<_>>();
    let set = IrqAction::DATA_EVENTFD | IrqAction::TRIGGER;
    client.set_irqs(irq::MSIX, set, 0, 40, &[], &fds()).unwrap();
    let all = IrqAction::DATA_NONE | IrqAction::TRIGGER;
    client.set_irqs(irq::MSIX, all, 0, 40, &[], &[]).unwrap();
    assert!(events.iter().all(|event| count(event) == 1));
    // Those without a descriptor lose theirs.
    client.set_irqs(irq::MSIX, set, 0, 40, &[], &fds()[..20]).unwrap();
    client.set_irqs(irq::MSIX, all, 0, 40, &[], &[]).unwrap();
    assert_eq!(events.iter().map(count).sum::<u64>(), 20);
    let some = IrqAction::DATA_BOOL | IrqAction::TRIGGER;
    client.set_irqs(irq::MSIX, some, 3, 3, &[1, 0, 1], &[]).unwrap();
    assert_eq!(events.iter().map(count).collect::<Vec<_>>()[..6], [0, 0, 0, 1, 0, 1]);
    assert!(client.set_irqs(irq::MSIX, some, 39, 2, &[1, 1], &[]).is_err_and(|error| error.goes_on()));
    assert!(matches!(client.set_irqs(irq::MSIX, set, 0, 1, &[], &fds()), Err(ClientError::Request(_))));
}

#[test]
fn device_reaches_what_the_record_says_and_nothing_else() {
    let Ours { client, domain, memory, handle, subscription, endpoint, log, stopper, thread, .. } = ours();
    memory.write_slice(b"guest 17", GuestAddress(17 * PAGE + 0x40)).unwrap();
    let copied = |address: u64| {
        client.region_write(0, 0, &address.to_ne_bytes()).unwrap();
        let mut got = [0; 8];
        client.region_read(0, 8, &mut got).unwrap();
        got
    };
    assert_eq!(copied(0x50_0040), [0xff; 8]);
    over(domain.map(rw(0x500, 0x501, 17)).unwrap());
    assert_eq!(&copied(0x50_0040), b"guest 17");
    assert_eq!(handle.windows(), 1);
    // A message without a wish for a reply.
    client.region_write(0, 16, &0x50_1000_u64.to_ne_bytes()).unwrap();
    client.reset().unwrap();
    let mut written = [0; 10];
    memory.read_slice(&mut written, GuestAddress(18 * PAGE)).unwrap();
    assert_eq!(&written, b"by message");
    over(domain.unmap(pages(0x500, 0x501)).unwrap());
    assert_eq!(copied(0x50_0040), [0xff; 8]);
    // What our server refuses, the guest is refused: it has 8 windows.
    for page in 0..8 {
        over(domain.map(rw(page, page, page)).unwrap());
    }
    assert!(domain.map(rw(9, 9, 9)).is_err());
    assert!(subscription.audit().unwrap().is_clean());
    // A client that goes: our server's end closes when nothing is used any more.
    log.lock().unwrap().clear();
    assert!(client.close("over"));
    assert_eq!(
        log.lock().unwrap()[..],
        [
            "disconnected",
            "unmapped",
            "unmapped",
            "unmapped",
            "unmapped",
            "unmapped",
            "unmapped",
            "unmapped",
            "unmapped"
        ]
    );
    drop((subscription, endpoint));
    stopper.stop();
    thread.join().unwrap();
}
