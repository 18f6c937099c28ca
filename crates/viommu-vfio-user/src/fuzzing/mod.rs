//! Any bytes, read as what a hostile client does to a server: as a stream, or as messages that are nearly right, with
//! descriptors of many kinds. Behind the server is a virtio device that uses its queues and the client's memory. For
//! fuzzing and tests alone; nothing here is stable.

mod echo;
mod input;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};
use zerocopy::{FromBytes, IntoBytes};

use crate::function::{Doorbell, Function, Region};
use crate::memory::{Memory, PAGE, WindowLimits, Windows};
use crate::message;
use crate::server::session::{Outcome, Session};
use crate::server::{Link, clean, exchange};
use crate::spec::{
    Command, DmaMap, DmaUnmap, HEADER, Header, IrqAction, IrqSet, MessageFlags, MultiWrite, RegionAccess,
    Version, irq,
};
use crate::virtio::{VirtioFunction, feature, status};
use echo::Echo;
use input::Input;

/// Pages of the client's memory.
const PAGES: u64 = 16;
const QUEUES: usize = 2;
const LIMITS: WindowLimits = WindowLimits { windows: 8, files: 3, bytes: 32 * PAGE, allow_unsealed: false };
/// Steps of one input.
const STEPS: usize = 200;

/// What a client may send along, the same for all inputs: nothing of it is changed.
struct Things {
    unsealed: File,
    socket: UnixStream,
    null: File,
}

struct World {
    function: VirtioFunction<Echo>,
    pristine: [u8; 256],
    link: Link,
    session: Session,
    payload: Vec<u8>,
    ours: UnixStream,
    theirs: UnixStream,
    greeted: bool,
    id: u16,
    memory: File,
    event: OwnedFd,
    things: &'static Things,
    /// Messages do not go over the socket: that is many times quicker.
    direct: bool,
}

fn memfd(pages: u64, sealed: bool) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = memfd_create("viommu-fuzz", flags).expect("a file in memory");
    ftruncate(&fd, pages * PAGE).expect("some pages");
    if sealed {
        fcntl_add_seals(&fd, SealFlags::SHRINK).expect("nothing is sealed yet");
    }
    File::from(fd)
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd")
}

fn pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("two sockets");
    for socket in [&ours, &theirs] {
        socket.set_write_timeout(Some(Duration::from_secs(2))).expect("it is not zero");
    }
    theirs.set_nonblocking(true).expect("a socket");
    (ours, theirs)
}

fn things() -> &'static Things {
    static THINGS: OnceLock<Things> = OnceLock::new();
    THINGS.get_or_init(|| Things {
        unsealed: memfd(4, false),
        socket: UnixStream::pair().expect("two sockets").0,
        null: File::open("/dev/null").expect("it is there"),
    })
}

impl World {
    fn new(direct: bool) -> Self {
        let windows = Windows::new(LIMITS);
        let device = Echo {
            windows: windows.clone(),
            queues: [None, None],
            signal: None,
            known: Vec::new(),
            bell: Arc::new(event()),
        };
        let mut function = VirtioFunction::new(device, windows);
        let mut pristine = [0; 256];
        function.read(Region::Config, 0, &mut pristine);
        let (ours, theirs) = pair();
        let mut world = Self {
            function,
            pristine,
            link: Link::default(),
            session: Session::new(LIMITS.windows),
            payload: Vec::new(),
            ours,
            theirs,
            greeted: false,
            id: 0,
            memory: memfd(PAGES, true),
            event: event(),
            things: things(),
            direct,
        };
        world.begin();
        world
    }

    fn connect(&mut self) {
        (self.ours, self.theirs) = pair();
        self.begin();
    }

    fn begin(&mut self) {
        self.link.connect(self.ours.try_clone().expect("a descriptor"));
        self.session = Session::new(LIMITS.windows);
        self.greeted = false;
        self.function.connected(&self.link);
    }

    fn greet(&mut self) {
        let text = b"{\"capabilities\":{\"max_msg_fds\":16}}\0";
        let version = Version { major: 0.into(), minor: 1.into() };
        // It may have done so without wanting an answer, and is told that once is enough.
        self.tell(Command::VERSION, 0, &[version.as_bytes(), text].concat(), &[]);
    }

    /// The client goes.
    fn leave(&mut self) {
        clean(&mut self.function, &self.link);
        assert_eq!(self.windows().list(), []);
        assert_eq!(self.windows().memory().num_regions(), 0);
        assert!(self.function.device().known.is_empty());
        assert!(self.function.device().queues.iter().all(Option::is_none));
        assert!(!self.function.interrupts().msix_enabled() && !self.link.is_connected());
        let mut now = [0; 256];
        self.function.read(Region::Config, 0, &mut now);
        assert_eq!(now, self.pristine);
        assert_eq!(self.function.driver_state().status(), 0);
    }

    fn windows(&self) -> &Windows {
        self.function.windows()
    }

    fn file(&self, kind: u8) -> Option<BorrowedFd<'_>> {
        match kind {
            0..0xb0 => Some(self.memory.as_fd()),
            0xb0..0xc0 => Some(self.things.unsealed.as_fd()),
            0xc0..0xc8 => Some(self.things.socket.as_fd()),
            0xc8..0xd0 => Some(self.things.null.as_fd()),
            0xd0..0xe0 => Some(self.event.as_fd()),
            _ => None,
        }
    }

    fn event_or_else(&self, kind: u8) -> BorrowedFd<'_> {
        let other = if kind < 0xe0 { None } else { self.file(kind << 3) };
        other.unwrap_or_else(|| self.event.as_fd())
    }

    fn put(&self, bytes: &[u8], at: u64) {
        let at = at % (PAGES * PAGE);
        let room = usize::try_from(PAGES * PAGE - at).expect("small");
        rustix::io::pwrite(&self.memory, &bytes[..bytes.len().min(room)], at).expect("within the file");
    }

    /// Sends a message, has it served, and looks at the answer.
    fn tell(&mut self, command: Command, flags: u32, payload: &[u8], fds: &[u8]) {
        let flags = MessageFlags::from_bits_retain(flags);
        self.id = self.id.wrapping_add(1);
        let header = Header {
            id: self.id.into(),
            command: command.0.into(),
            size: u32::try_from(HEADER + payload.len()).expect("small").into(),
            flags: flags.bits().into(),
            error: 0.into(),
        };
        let files: Vec<_> = fds
            .iter()
            .filter_map(|kind| match command {
                Command::DEVICE_SET_IRQS => Some(self.event_or_else(*kind)),
                _ => self.file(*kind),
            })
            .collect();
        let wants = flags.bits() & 0xf == 0 && !flags.contains(MessageFlags::NO_REPLY);
        let wanted = wants.then_some(&header);
        let replies = if self.direct {
            let fds = files.iter().map(|file| file.try_clone_to_owned().expect("a descriptor")).collect();
            match self.session.handle(&mut self.function, message::Received { header, fds }, payload) {
                Outcome::HangUp(_) => Err(()),
                Outcome::Silence => Ok(answer(wanted, None)),
                Outcome::Reply(reply, files) => {
                    assert!(reply.error.get() == 0 || files.is_empty());
                    Ok(answer(wanted, Some((reply, self.session.payload()))))
                }
            }
        } else {
            message::send(&self.theirs, &header, payload, &files).expect("there is room");
            let goes_on = self.serve();
            let errno = self.replies(wanted.filter(|_| goes_on));
            goes_on.then_some(errno).ok_or(())
        };
        let Ok(errno) = replies else {
            self.leave();
            return self.connect();
        };
        self.greeted |= command == Command::VERSION && errno == Some(0);
        self.check();
    }

    /// One message. Whether the connection goes on.
    fn serve(&mut self) -> bool {
        let Self { function, session, link, ours, payload, .. } = self;
        matches!(exchange(function, session, link, ours, payload), Ok(None))
    }

    /// All that has come: an answer to this, or none. Its errno.
    fn replies(&mut self, wanted: Option<&Header>) -> Option<u32> {
        let mut bytes = Vec::new();
        let mut room = [0; 4096];
        loop {
            match self.theirs.read(&mut room) {
                Ok(0) => break,
                Ok(count) => bytes.extend_from_slice(&room[..count]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionReset) => {
                    break;
                }
                Err(error) => panic!("{error}"),
            }
        }
        answer(wanted, Header::read_from_prefix(&bytes).ok())
    }

    /// What the books say is what there is.
    fn check(&self) {
        let list = self.windows().list();
        assert!(list.len() <= LIMITS.windows);
        for (window, next) in list.iter().zip(list.iter().skip(1)) {
            assert!(window.address + (window.size - 1) < next.address, "{window:x?} {next:x?}");
        }
        let reached = |memory: &Memory| -> Vec<_> {
            memory.iter().map(|region| (region.start_addr().0, region.len())).collect()
        };
        let with = list.iter().filter(|window| window.memory);
        let writable = with.clone().filter(|window| !window.read_only);
        let writable: Vec<_> = writable.map(|window| (window.address, window.size)).collect();
        assert_eq!(reached(&self.windows().memory()), writable);
        let with: Vec<_> = with.map(|window| (window.address, window.size)).collect();
        assert_eq!(reached(&self.windows().with_read_only().memory()), with);
        assert!(with.iter().map(|(_, size)| size).sum::<u64>() <= LIMITS.bytes);
        let known = &self.function.device().known;
        assert!(known.len() == list.len() && list.iter().all(|window| known.contains(window)));
        let started = self.function.device().queues.iter().flatten().count();
        assert!(started == 0 || self.function.driver_state().status() & status::DRIVER_OK != 0);
    }

    fn step(&mut self, input: &mut Input<'_>) {
        // Some messages want no answer, and some come with what does not belong to them.
        let odd = input.byte();
        let flags = match odd {
            0..0xd0 => 0,
            0xd0..0xe8 => MessageFlags::NO_REPLY.bits(),
            0xe8..0xf0 => 1,
            _ => u32::from(odd & 0x0f) << 4,
        };
        match input.byte() % 20 {
            0 => {
                let texts: [&[u8]; 6] =
                    [b"", b"{}\0", b"{\0", b"{\"capabilities\":{\"max_msg_fds\":0}}\0", b"[]\0", b"{}"];
                let text = texts[usize::from(input.byte()) % texts.len()];
                let version = Version { major: u16::from(input.byte() / 0x80).into(), minor: 9.into() };
                self.tell(Command::VERSION, flags, &[version.as_bytes(), text].concat(), &[]);
            }
            1..=3 => {
                let map = DmaMap {
                    argsz: 32.into(),
                    flags: u32::from(input.byte() / 0x10).max(3).into(),
                    offset: input.pages().into(),
                    address: input.pages().into(),
                    size: input.pages().into(),
                };
                let files = [input.byte(), input.byte() | 0xd8];
                self.tell(Command::DMA_MAP, flags, map.as_bytes(), &files);
            }
            4..=5 => {
                let list = self.windows().list();
                let nth = usize::from(input.byte());
                let (mut address, mut size) =
                    list.get(nth % 16).map_or((0, 0), |window| (window.address, window.size));
                if nth >= 0xc0 {
                    (address, size) = (input.pages(), input.pages());
                }
                let all = u32::from(nth >= 0xb0) * u32::from(input.byte() & 3);
                let unmap = DmaUnmap {
                    argsz: 24.into(),
                    flags: all.into(),
                    address: address.into(),
                    size: size.into(),
                };
                self.tell(Command::DMA_UNMAP, flags, unmap.as_bytes(), &[]);
            }
            6 => {
                let (region, offset, count) = (input.byte() % 10, input.number(), input.small());
                let access = RegionAccess {
                    offset: offset.into(),
                    region: u32::from(region).into(),
                    count: count.into(),
                };
                self.tell(Command::REGION_READ, flags, access.as_bytes(), &[]);
            }
            7..=9 => {
                let (region, offset) = place(input);
                let count = usize::from(input.byte() % 16);
                let data = input.bytes(count).to_vec();
                self.write(flags, region, offset, &data);
            }
            10 => {
                let (start, count) = (input.small() % 4, input.small() % 5);
                let action = 1 << (input.byte() % 3) | 8 << (input.byte() % 3);
                let fds: Vec<_> = (0..input.byte() % 5).map(|_| input.byte()).collect();
                let index = if input.byte() < 0xf0 { irq::MSIX * u32::from(input.byte() & 1) } else { 4 };
                let set = IrqSet {
                    argsz: 20.into(),
                    flags: action.into(),
                    index: index.into(),
                    start: start.into(),
                    count: count.into(),
                };
                let data = input.bytes(usize::try_from(count).unwrap_or(0));
                let data = if action & 2 != 0 { data } else { &[] };
                let payload = [set.as_bytes(), data].concat();
                self.tell(Command::DEVICE_SET_IRQS, flags, &payload, &fds);
            }
            11 => {
                let mut payload = u64::from(input.byte() % 4).to_ne_bytes().to_vec();
                for _ in 0..input.byte() % 4 {
                    let (region, offset) = place(input);
                    let count = u32::from(input.byte() % 10);
                    let data = input.number().to_le_bytes();
                    let write = MultiWrite {
                        offset: offset.into(),
                        region: region.into(),
                        count: count.into(),
                        data,
                    };
                    payload.extend_from_slice(write.as_bytes());
                }
                self.tell(Command::REGION_WRITE_MULTI, flags, &payload, &[]);
            }
            12 => {
                // Questions, and anything else.
                let command = Command(u16::from(input.byte() % 22));
                let mut payload = vec![0; usize::from(input.byte() % 48)];
                if let Some(first) = payload.first_mut() {
                    *first = input.byte();
                }
                if let Some(index) = payload.get_mut(8) {
                    *index = input.byte() % 12;
                }
                self.tell(command, flags, &payload, &[]);
            }
            13 => {
                let command = Command(input.word() % 20);
                let count = usize::from(input.byte() % 64);
                let payload = input.bytes(count).to_vec();
                let fds: Vec<_> = (0..input.byte() % 17).map(|_| input.byte()).collect();
                self.tell(command, flags, &payload, &fds);
            }
            14 => self.drive(input.byte()),
            15 => {
                let (at, count) = (u64::from(input.word()), usize::from(input.byte() % 64));
                let bytes = input.bytes(count).to_vec();
                self.put(&bytes, at);
            }
            16..=17 => self.offer(input),
            18 => match input.byte() {
                0..0x40 => {
                    self.link.dma_write(input.number(), &[1, 2, 3, 4]).expect("there is room");
                    let mut message = [0; HEADER + 20];
                    self.theirs.read_exact(&mut message).expect("all of it");
                    assert_eq!(message[2], 12);
                }
                0x40..0x80 => {
                    // What the client's hypervisor does instead of a write.
                    let bells: Vec<Doorbell> = self.function.doorbells();
                    assert_eq!(bells.len(), 1);
                    self.function.event(0);
                }
                0x80..0xa0 => {
                    if let Some(signal) = &self.function.device().signal {
                        signal.config_changed();
                    }
                }
                _ => self.tell(Command::DEVICE_RESET, flags, &[], &[]),
            },
            _ => {
                if input.byte() < 0x80 {
                    return self.hang_up(input);
                }
                // Away, and here again; perhaps without a word.
                self.leave();
                self.connect();
                if input.byte() < 0xe0 {
                    self.greet();
                }
            }
        }
    }

    fn write(&mut self, flags: u32, region: u32, offset: u64, data: &[u8]) {
        let count = u32::try_from(data.len()).expect("small");
        let access = RegionAccess { offset: offset.into(), region: region.into(), count: count.into() };
        self.tell(Command::REGION_WRITE, flags, &[access.as_bytes(), data].concat(), &[]);
    }

    /// A message whose size lies, or the beginning of one; then the end.
    fn hang_up(&mut self, input: &mut Input<'_>) {
        let header = Header {
            id: 0.into(),
            command: u16::from(input.byte() % 20).into(),
            size: input.small().into(),
            flags: 0.into(),
            error: 0.into(),
        };
        let (cut, count) = (usize::from(input.byte()), usize::from(input.byte()));
        let message = [header.as_bytes(), input.bytes(count)].concat();
        let part = message.get(..cut).unwrap_or(&message);
        self.stream(part);
        self.connect();
    }

    /// Bytes, and the end of the stream.
    fn stream(&mut self, bytes: &[u8]) {
        (&self.theirs).write_all(bytes).expect("there is room");
        self.theirs.shutdown(Shutdown::Write).expect("a socket");
        let mut messages = 0;
        while self.serve() {
            self.check();
            messages += 1;
            assert!(messages <= bytes.len() / HEADER, "messages out of nothing");
            let mut room = [0; 65536];
            while matches!(self.theirs.read(&mut room), Ok(1..)) {}
        }
        self.leave();
    }

    /// What a driver does, down to DRIVER_OK.
    fn drive(&mut self, how: u8) {
        if !self.greeted {
            self.greet();
        }
        if self.windows().list().is_empty() {
            let map = DmaMap {
                argsz: 32.into(),
                flags: 3.into(),
                offset: 0.into(),
                address: 0.into(),
                size: (PAGES * PAGE).into(),
            };
            self.tell(Command::DMA_MAP, 0, map.as_bytes(), &[0]);
        }
        let action = IrqAction::DATA_EVENTFD | IrqAction::TRIGGER;
        let set = IrqSet {
            argsz: 20.into(),
            flags: action.bits().into(),
            index: (irq::MSIX * u32::from(how & 1)).into(),
            start: 0.into(),
            count: 1.into(),
        };
        self.tell(Command::DEVICE_SET_IRQS, 0, set.as_bytes(), &[0]);
        let features = feature::VERSION_1
            | if how & 2 != 0 { feature::EVENT_IDX } else { 0 }
            | if how & 4 != 0 { feature::RING_RESET } else { 0 };
        self.write(0, 0, 0x14, &[0]);
        self.write(0, 0, 0x14, &[3]);
        for half in 0..2_u32 {
            self.write(0, 0, 0x08, &half.to_le_bytes());
            self.write(0, 0, 0x0c, &features.to_le_bytes()[usize::try_from(half).unwrap_or(0) * 4..][..4]);
        }
        self.write(0, 0, 0x14, &[11]);
        self.write(0, 0, 0x10, &[0, 0]);
        for queue in 0..2_u16 {
            let page = PAGE * u64::from(queue);
            self.put(&[0; 4], page + 0x400);
            self.write(0, 0, 0x16, &queue.to_le_bytes());
            for (register, address) in [(0x20, page), (0x28, page + 0x400), (0x30, page + 0x800)] {
                self.write(0, 0, register, &address.to_le_bytes());
            }
            self.write(0, 0, 0x1a, &[0, 0]);
            self.write(0, 0, 0x1c, &[1, 0]);
        }
        self.write(0, 0, 0x14, &[15]);
    }

    /// A chain of two, more or less well made, and the doorbell.
    fn offer(&mut self, input: &mut Input<'_>) {
        let queue = input.byte() & 1;
        let page = PAGE * u64::from(queue);
        for nth in 0..2_u16 {
            let mut entry = (u64::from(input.word()) << (4 * (input.byte() & 1))).to_le_bytes().to_vec();
            entry.extend(u32::from(input.byte()).to_le_bytes());
            let flags = u16::from(input.byte()) & 7;
            entry.extend((if flags == 7 { 4 } else { flags & 2 | (1 - nth) }).to_le_bytes());
            entry.extend((nth + 1).to_le_bytes());
            self.put(&entry, page + 16 * u64::from(nth));
        }
        let mut index = [0; 2];
        rustix::io::pread(&self.memory, &mut index, page + 0x402).expect("within the file");
        let index = u16::from_le_bytes(index);
        self.put(&[input.byte() / 0x78, 0], page + 0x404 + 2 * u64::from(index % 16));
        self.put(&index.wrapping_add(1).to_le_bytes(), page + 0x402);
        self.write(0, 0, 0x3000 + 4 * u64::from(queue), &[queue, 0]);
    }
}

/// Looks at what came: the answer that is wanted, or nothing. Its errno.
fn answer(wanted: Option<&Header>, came: Option<(Header, &[u8])>) -> Option<u32> {
    let Some(wanted) = wanted else {
        assert!(came.is_none(), "an answer to nothing");
        return None;
    };
    let (header, payload) = came.expect("an answer");
    assert_eq!((header.id, header.command), (wanted.id, wanted.command));
    assert_eq!(usize::try_from(header.size.get()), Ok(HEADER + payload.len()));
    let error = header.error.get();
    assert_eq!(header.flags.get(), if error == 0 { 1 } else { 0x21 });
    assert!(error == 0 || payload.is_empty());
    Some(error)
}

/// Where something is, or near it.
fn place(input: &mut Input<'_>) -> (u32, u64) {
    match input.byte() {
        0..0x60 => (0, u64::from(input.byte() % 0x40)),
        0x60..0x70 => (0, 0x1000 + u64::from(input.byte() % 4)),
        0x70..0x80 => (0, 0x2000 + u64::from(input.byte())),
        0x80..0x98 => (0, 0x3000 + u64::from(input.byte() % 16)),
        0x98..0xa0 => (1, u64::from(input.word() & 0xfff)),
        0xa0..0xf0 => (7, u64::from(input.byte())),
        other => (u32::from(other & 15), input.number()),
    }
}

/// Plays the bytes. Any input is legal.
///
/// # Panics
/// When the server, or what it says of its windows, is wrong.
pub fn fuzz_session(data: &[u8]) {
    // Left where it is when something is wrong.
    let Some((first, rest)) = data.split_first() else { return };
    let mut world = core::mem::ManuallyDrop::new(World::new(first & 3 < 2));
    if *first < 0xf0 {
        world.greet();
    }
    if first & 3 == 3 {
        // What one socket holds, so that nobody waits.
        world.stream(&rest[..rest.len().min(32768)]);
    } else {
        let mut input = Input(rest);
        for _ in 0..STEPS {
            if input.0.is_empty() {
                break;
            }
            world.step(&mut input);
        }
        world.leave();
    }
    // Now and then, as it costs as much as all the rest: nothing of the client's is mapped any more.
    let world = core::mem::ManuallyDrop::into_inner(world);
    if cfg!(not(test)) && data.len().is_multiple_of(64) {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("it is there");
        assert!(!maps.contains("memfd:viommu-fuzz"), "still mapped");
    }
    drop(world);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_when_driven_copies_what_is_offered() {
        for how in 0..16 {
            let mut world = World::new(how & 8 != 0);
            world.drive(how);
            world.put(b"hello", 0x2000);
            for queue in 0..2 {
                // Where, shifted by what, how much, flags; twice; and which is the head.
                world.offer(&mut Input(&[queue, 0, 0x20, 0, 5, 0, 0, 0x30, 0, 9, 2, 0]));
                let mut text = [0; 6];
                rustix::io::pread(&world.memory, &mut text, 0x3000).unwrap();
                assert_eq!(&text, b"hello\0");
                world.put(&[0; 5], 0x3000);
                let mut used = [0; 2];
                rustix::io::pread(&world.memory, &mut used, PAGE * u64::from(queue) + 0x802).unwrap();
                assert_eq!(used, [1, 0]);
            }
            assert!(rustix::io::read(&world.event, &mut [0; 8]).is_ok(), "interrupted");
            world.leave();
        }
    }

    #[test]
    fn stream_when_it_is_whole_is_served_to_its_end() {
        let mut world = World::new(false);
        world.greet();
        let map = DmaMap {
            argsz: 32.into(),
            flags: 3.into(),
            offset: 0.into(),
            address: 0.into(),
            size: PAGE.into(),
        };
        let header = Header { command: 2.into(), size: 48.into(), ..Header::default() };
        let message = [header.as_bytes(), map.as_bytes()].concat();
        world.stream(&[&message[..], &message[..47]].concat());
        assert!(!world.link.is_connected());
    }

    /// The fuzz target's body on inputs that are the same everywhere.
    #[test]
    fn seeded_inputs_keep_every_law() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..3_000 {
            let len = next() % 512;
            let bytes: Vec<u8> = (0..len).map(|_| next().to_le_bytes()[3]).collect();
            fuzz_session(&bytes);
        }
    }
}
