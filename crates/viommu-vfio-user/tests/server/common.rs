//! A server on a thread, a device that uses its memory and queues, and a client that says whatever it is told to.

use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use tempfile::TempDir;
use viommu_vfio_user::memory::Window;
use viommu_vfio_user::spec::{
    Command, DmaMap, DmaUnmap, HEADER, Header, IrqAction, IrqSet, MessageFlags, RegionAccess, Version,
};
use viommu_vfio_user::virtio::{Device, DeviceSignal, DriverState, QueueSignal, ResetBy};
use viommu_vfio_user::{Link, Server, Stopper, VirtioFunction, WindowLimits, Windows};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddressSpace};
use zerocopy::IntoBytes;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const EINVAL: u32 = 22;
/// Longer than anything takes that does not hang.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// What happened to a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Connected,
    Reset(ResetBy),
    Mapped(Window),
    Unmapped(Window),
    Notified(u16),
    Rung,
}

/// Copies what it is given to where it may write, on the server's thread. Its second queue has a doorbell of its own.
pub(crate) struct Echo {
    pub(crate) windows: Windows,
    pub(crate) events: Sender<Event>,
    pub(crate) queues: [Option<(Queue, QueueSignal)>; 2],
    pub(crate) bell: Arc<OwnedFd>,
    pub(crate) signal: Arc<Mutex<Option<DeviceSignal>>>,
}

impl Echo {
    fn says(&self, event: Event) {
        // A test that has heard enough is gone.
        let _gone = self.events.send(event);
    }

    fn serve(&mut self, index: u16) {
        let memory = self.windows.memory();
        let Some((queue, signal)) = &mut self.queues[usize::from(index)] else { return };
        while let Some(chain) = queue.pop_descriptor_chain(memory.clone()) {
            let head = chain.head_index();
            let mut text = Vec::new();
            let mut written = 0;
            for part in chain {
                if part.is_write_only() {
                    let bytes = text.len().min(usize::try_from(part.len()).unwrap());
                    if memory.write_slice(&text[..bytes], part.addr()).is_ok() {
                        written += u32::try_from(bytes).unwrap();
                    }
                } else {
                    let at = text.len();
                    text.resize(at + usize::try_from(part.len()).unwrap().min(65536), 0);
                    if memory.read_slice(&mut text[at..], part.addr()).is_err() {
                        text.truncate(at);
                    }
                }
            }
            if queue.add_used(&*memory, head, written).is_err() {
                return signal.needs_reset();
            }
            signal.interrupt();
        }
    }
}

impl Device for Echo {
    fn device_type(&self) -> u16 {
        42
    }

    fn class(&self) -> u32 {
        0xff_00_00
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 16]
    }

    fn features(&self) -> u64 {
        0
    }

    fn negotiate(&mut self, _: u64) -> bool {
        true
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..8).zip(data) {
            *byte = b"viommu\0\0"[usize::try_from(at).unwrap()];
        }
    }

    fn ready(&mut self, signal: DeviceSignal) {
        *self.signal.lock().unwrap() = Some(signal);
    }

    fn start(&mut self, index: u16, queue: Queue, signal: QueueSignal) {
        self.queues[usize::from(index)] = Some((queue, signal));
    }

    fn stop(&mut self, index: u16) {
        self.queues[usize::from(index)] = None;
    }

    fn notify(&mut self, index: u16) {
        self.says(Event::Notified(index));
        self.serve(index);
    }

    fn reset(&mut self, by: ResetBy) {
        self.says(Event::Reset(by));
    }

    fn doorbell(&self, index: u16) -> Option<Arc<OwnedFd>> {
        (index == 1).then(|| self.bell.clone())
    }

    fn connected(&mut self, _: &Link) {
        self.says(Event::Connected);
    }

    fn mapped(&mut self, window: Window) {
        self.says(Event::Mapped(window));
    }

    fn unmapped(&mut self, window: Window) {
        self.says(Event::Unmapped(window));
    }

    fn events(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.bell.as_fd()]
    }

    fn event(&mut self, _: usize) {
        let mut bytes = [0; 8];
        if rustix::io::read(&self.bell, &mut bytes).is_ok() {
            self.says(Event::Rung);
            self.serve(1);
        }
    }
}

/// A server that runs, and what its device tells.
pub(crate) struct Running {
    pub(crate) path: PathBuf,
    pub(crate) windows: Windows,
    pub(crate) events: Receiver<Event>,
    pub(crate) link: Link,
    pub(crate) state: DriverState,
    pub(crate) signal: Arc<Mutex<Option<DeviceSignal>>>,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
    _folder: TempDir,
}

impl Running {
    pub(crate) fn new() -> Self {
        Self::with(WindowLimits::default())
    }

    pub(crate) fn with(limits: WindowLimits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("device.sock");
        let (function, events, signal) = function(limits);
        let windows = function.device().windows.clone();
        let state = function.driver_state();
        let mut server = Server::bind(&path, function, limits).unwrap();
        let (stopper, link) = (server.stopper(), server.link());
        let thread = std::thread::spawn(move || server.run().unwrap());
        Self { path, windows, events, link, state, signal, stopper, thread: Some(thread), _folder: folder }
    }

    pub(crate) fn stop(&self) {
        self.stopper.stop();
    }

    /// Stops it, and waits for that: not for long.
    pub(crate) fn end(&mut self) {
        self.stop();
        let begin = Instant::now();
        let thread = self.thread.take().unwrap();
        while !thread.is_finished() {
            assert!(begin.elapsed() < SOON, "the server does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
        thread.join().unwrap();
    }

    /// A client that has said its version.
    pub(crate) fn client(&self) -> Client {
        let mut client = Client::connect(&self.path);
        let (header, _) = client.version(r#"{"capabilities":{"max_msg_fds":16}}"#);
        assert_eq!(header.error.get(), 0);
        client
    }

    /// Waits until the device says this, and gives what it said before.
    pub(crate) fn until(&self, wanted: &Event) -> Vec<Event> {
        let mut before = Vec::new();
        loop {
            let event =
                self.events.recv_timeout(SOON).unwrap_or_else(|_| panic!("no {wanted:?}: {before:?}"));
            if event == *wanted {
                return before;
            }
            before.push(event);
        }
    }

    /// Waits until the last client has gone and nothing of it is left.
    pub(crate) fn cleaned(&self) {
        self.until(&Event::Reset(ResetBy::Machine));
        self.eventually(|server| server.windows.list().is_empty() && !server.link.is_connected());
    }

    pub(crate) fn eventually(&self, is_so: impl Fn(&Self) -> bool) {
        let begin = Instant::now();
        while !is_so(self) {
            assert!(begin.elapsed() < SOON, "it is never so");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.thread.is_some() && !std::thread::panicking() {
            self.end();
        }
    }
}

pub(crate) fn function(
    limits: WindowLimits,
) -> (VirtioFunction<Echo>, Receiver<Event>, Arc<Mutex<Option<DeviceSignal>>>) {
    let windows = Windows::new(limits);
    let (events, told) = channel();
    let signal = Arc::new(Mutex::new(None));
    let bell = Arc::new(event());
    let device =
        Echo { windows: windows.clone(), events, queues: [None, None], bell, signal: signal.clone() };
    (VirtioFunction::new(device, windows), told, signal)
}

/// Memory as QEMU gives it.
pub(crate) fn memory(name: &str, pages: u64) -> File {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, pages * PAGE).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    File::from(fd)
}

pub(crate) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// How often an eventfd was raised since the last time, after waiting for the first.
pub(crate) fn raised(event: &OwnedFd) -> u64 {
    let begin = Instant::now();
    loop {
        let mut bytes = [0; 8];
        if rustix::io::read(event, &mut bytes).is_ok() {
            return u64::from_ne_bytes(bytes);
        }
        assert!(begin.elapsed() < SOON, "it was not raised");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn is_raised(event: &OwnedFd) -> bool {
    rustix::io::read(event, &mut [0; 8]).is_ok()
}

/// The other end, with no manners of its own.
pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    id: u16,
}

impl Client {
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        Self { stream, id: 100 }
    }

    pub(crate) fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent =
            sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, bytes.len());
    }

    pub(crate) fn header(&mut self, command: Command, payload: usize, flags: MessageFlags) -> Header {
        self.id += 1;
        Header {
            id: self.id.into(),
            command: command.0.into(),
            size: u32::try_from(HEADER + payload).unwrap().into(),
            flags: flags.bits().into(),
            error: 0.into(),
        }
    }

    pub(crate) fn post(
        &mut self,
        command: Command,
        payload: &[u8],
        flags: MessageFlags,
        fds: &[BorrowedFd<'_>],
    ) {
        let header = self.header(command, payload.len(), flags);
        self.send(&[header.as_bytes(), payload].concat(), fds);
    }

    pub(crate) fn receive(&mut self) -> (Header, Vec<u8>, Vec<OwnedFd>) {
        let mut bytes = [0; HEADER];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
        let got = recvmsg(&self.stream, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
        assert_eq!(got.bytes, HEADER, "no whole header");
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = message {
                fds.extend(more);
            }
        }
        let header: Header = zerocopy::FromBytes::read_from_bytes(&bytes).unwrap();
        let mut payload = vec![0; usize::try_from(header.size.get()).unwrap() - HEADER];
        self.stream.read_exact(&mut payload).unwrap();
        (header, payload, fds)
    }

    /// Asks, and gives the answer, which must belong to the question.
    pub(crate) fn ask(
        &mut self,
        command: Command,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> (Header, Vec<u8>, Vec<OwnedFd>) {
        self.post(command, payload, MessageFlags::empty(), fds);
        let (header, payload, fds) = self.receive();
        assert_eq!((header.id.get(), header.command.get()), (self.id, command.0));
        let error = header.error.get() != 0;
        let flags = MessageFlags::REPLY | if error { MessageFlags::ERROR } else { MessageFlags::empty() };
        assert_eq!(header.flags.get(), flags.bits());
        assert!(!error || payload.is_empty() && fds.is_empty());
        (header, payload, fds)
    }

    /// The errno of an answer.
    pub(crate) fn errno(&mut self, command: Command, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u32 {
        self.ask(command, payload, fds).0.error.get()
    }

    pub(crate) fn done(&mut self, command: Command, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Vec<u8> {
        let (header, payload, fds) = self.ask(command, payload, fds);
        assert_eq!(header.error.get(), 0, "{command:?}");
        assert!(fds.is_empty());
        payload
    }

    pub(crate) fn version(&mut self, json: &str) -> (Header, Vec<u8>) {
        let mut payload = Version { major: 0.into(), minor: 1.into() }.as_bytes().to_vec();
        payload.extend_from_slice(json.as_bytes());
        payload.push(0);
        let (header, payload, _) = self.ask(Command::VERSION, &payload, &[]);
        (header, payload)
    }

    pub(crate) fn map(&mut self, file: Option<&File>, offset: u64, address: u64, size: u64) -> u32 {
        let fds: Vec<_> = file.iter().map(AsFd::as_fd).collect();
        self.errno(Command::DMA_MAP, map(offset, address, size).as_bytes(), &fds)
    }

    pub(crate) fn unmap(&mut self, flags: u32, address: u64, size: u64) -> u32 {
        self.errno(Command::DMA_UNMAP, unmap(flags, address, size).as_bytes(), &[])
    }

    pub(crate) fn read(&mut self, region: u32, offset: u64, bytes: u32) -> Vec<u8> {
        let access = RegionAccess { offset: offset.into(), region: region.into(), count: bytes.into() };
        let reply = self.done(Command::REGION_READ, access.as_bytes(), &[]);
        assert_eq!(&reply[..16], access.as_bytes());
        assert_eq!(reply.len(), 16 + usize::try_from(bytes).unwrap());
        reply[16..].to_vec()
    }

    pub(crate) fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let reply = self.done(Command::REGION_WRITE, &write(region, offset, data), &[]);
        assert_eq!(reply, write(region, offset, data)[..16]);
    }

    pub(crate) fn set_irqs(
        &mut self,
        index: u32,
        action: IrqAction,
        start: u32,
        count: u32,
        fds: &[&OwnedFd],
    ) -> u32 {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        self.errno(Command::DEVICE_SET_IRQS, irqs(index, action, start, count).as_bytes(), &fds)
    }

    /// Brings the device up as a driver does, with both queues, each with its rings in one page from `rings` on.
    pub(crate) fn drive(&mut self, rings: u64) {
        self.write(0, 0x14, &[1 | 2]);
        self.write(0, 0x08, &1_u32.to_le_bytes());
        self.write(0, 0x0c, &1_u32.to_le_bytes());
        self.write(0, 0x14, &[1 | 2 | 8]);
        for queue in 0..2_u16 {
            let page = rings + PAGE * u64::from(queue);
            self.write(0, 0x16, &queue.to_le_bytes());
            for (register, address) in [(0x20, page), (0x28, page + 0x400), (0x30, page + 0x800)] {
                self.write(0, register, &address.to_le_bytes());
            }
            self.write(0, 0x1a, &(queue + 1).to_le_bytes());
            self.write(0, 0x1c, &1_u16.to_le_bytes());
        }
        self.write(0, 0x14, &[1 | 2 | 8 | 4]);
        assert_eq!(self.read(0, 0x14, 1), [1 | 2 | 4 | 8]);
    }

    /// Nothing comes any more.
    pub(crate) fn assert_closed(&mut self) {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => {}
            // Something that we sent was not read any more.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("still there: {other:?} {byte:?}"),
        }
    }

    /// There is nothing to be read.
    pub(crate) fn assert_silent(&mut self) {
        self.stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let error = self.stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        self.stream.set_read_timeout(Some(SOON)).unwrap();
    }
}

pub(crate) fn map(offset: u64, address: u64, size: u64) -> DmaMap {
    DmaMap {
        argsz: 32.into(),
        flags: 3.into(),
        offset: offset.into(),
        address: address.into(),
        size: size.into(),
    }
}

pub(crate) fn unmap(flags: u32, address: u64, size: u64) -> DmaUnmap {
    DmaUnmap { argsz: 24.into(), flags: flags.into(), address: address.into(), size: size.into() }
}

pub(crate) fn write(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    let count = u32::try_from(data.len()).unwrap();
    let access = RegionAccess { offset: offset.into(), region: region.into(), count: count.into() };
    [access.as_bytes(), data].concat()
}

pub(crate) fn irqs(index: u32, action: IrqAction, start: u32, count: u32) -> IrqSet {
    IrqSet {
        argsz: 20.into(),
        flags: action.bits().into(),
        index: index.into(),
        start: start.into(),
        count: count.into(),
    }
}

/// Puts one request into a queue whose rings are at `page` of the file: `text` in, and room for as much out, at `data`.
/// The device finds the file at 0.
pub(crate) fn offer(file: &File, page: u64, data: u64, text: &[u8]) {
    offer_in(file, page, data, data, text);
}

/// The same where the device finds the file's byte `start`, with the rings, at `address`; the data are two pages behind.
pub(crate) fn offer_at(file: &File, start: u64, address: u64, text: &[u8]) {
    offer_in(file, start, start + 2 * PAGE, address + 2 * PAGE, text);
}

fn offer_in(file: &File, page: u64, data: u64, address: u64, text: &[u8]) {
    let put = |bytes: &[u8], at: u64| assert_eq!(rustix::io::pwrite(file, bytes, at).unwrap(), bytes.len());
    let entry = |address: u64, flags: u16, next: u16| {
        let len = u32::try_from(text.len()).unwrap();
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bytes
    };
    put(text, data);
    put(&entry(address, 1, 1), page);
    put(&entry(address + 0x800, 2, 0), page + 16);
    let mut index = [0; 2];
    rustix::io::pread(file, &mut index, page + 0x402).unwrap();
    let index = u16::from_le_bytes(index);
    put(&0_u16.to_le_bytes(), page + 0x404 + 2 * u64::from(index % 16));
    put(&(index + 1).to_le_bytes(), page + 0x402);
}

/// What the device wrote there.
pub(crate) fn answered(file: &File, data: u64, bytes: usize) -> Vec<u8> {
    let mut text = vec![0; bytes];
    rustix::io::pread(file, &mut text, data + 0x800).unwrap();
    text
}
