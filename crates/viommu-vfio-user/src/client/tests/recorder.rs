//! A server that writes down what it is given, with libvfio-user's rules for windows, and goes wrong as it is told.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use rustix::fs::fstat;
use zerocopy::{FromBytes, IntoBytes};

use super::*;
use crate::message::{self, Received};
use crate::spec::{Command, DmaAccess, DmaMap, DmaUnmap, Header, MessageFlags, Version};

/// A window as it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Given {
    pub(super) address: u64,
    pub(super) size: u64,
    pub(super) offset: u64,
    pub(super) flags: u32,
    /// The file's inode.
    pub(super) file: Option<u64>,
}

/// What comes in place of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// An error reply.
    Errno(u32),
    /// Nothing.
    Silence,
    /// The end of the connection.
    HangUp,
    /// A reply with another number.
    Id,
    /// A reply to another command.
    Command,
    /// A reply of so many bytes more.
    Size(i32),
    /// The right size, and other bytes.
    Content,
    /// Something that is neither command nor reply.
    Kind,
    /// A header that says 3 GiB.
    Huge,
}

/// An access that the server makes by messages before it answers, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read(u64, u64),
    Write(u64, Vec<u8>),
    Other(u16),
}

#[derive(Default)]
struct State {
    windows: BTreeMap<u64, Given>,
    calls: Vec<Command>,
    faults: Vec<(Command, usize, Fault)>,
    /// Each fault comes once.
    once: bool,
    accesses: Vec<Access>,
    outcomes: Vec<Result<Vec<u8>, u32>>,
    limit: usize,
}

#[derive(Clone)]
pub(super) struct Recorder(Arc<Mutex<State>>, Arc<Mutex<Option<JoinHandle<()>>>>);

impl Recorder {
    pub(super) fn start(windows: u32) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let limit = usize::try_from(windows).unwrap();
        let state = Arc::new(Mutex::new(State { limit, ..State::default() }));
        let shared = state.clone();
        let thread = std::thread::spawn(move || {
            serve(&ours, &shared);
            // As libvfio-user does: first the windows, then the socket.
            shared.lock().unwrap().windows.clear();
            drop(ours);
        });
        (Self(state, Arc::new(Mutex::new(Some(thread)))), theirs)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(super) fn windows(&self) -> Vec<Given> {
        self.lock().windows.values().copied().collect()
    }

    /// Commands of this kind go wrong after so many that do not, until [`Self::heal`].
    pub(super) fn fail(&self, command: Command, good: usize, fault: Fault) {
        self.lock().faults.push((command, good, fault));
    }

    pub(super) fn fail_once(&self, command: Command, good: usize, fault: Fault) {
        self.lock().once = true;
        self.fail(command, good, fault);
    }

    pub(super) fn heal(&self) {
        let state = &mut *self.lock();
        (state.faults, state.once) = (Vec::new(), false);
    }

    pub(super) fn take_calls(&self) -> Vec<Command> {
        core::mem::take(&mut self.lock().calls)
    }

    /// Before the next command is answered.
    pub(super) fn access(&self, accesses: Vec<Access>) {
        self.lock().accesses = accesses;
    }

    pub(super) fn take_outcomes(&self) -> Vec<Result<Vec<u8>, u32>> {
        core::mem::take(&mut self.lock().outcomes)
    }

    pub(super) fn join(&self) {
        if let Some(thread) = self.1.lock().unwrap().take() {
            thread.join().unwrap();
        }
    }
}

impl State {
    fn fault(&mut self, command: Command) -> Option<Fault> {
        let at = self.faults.iter().position(|(which, ..)| *which == command)?;
        let (_, good, fault) = &mut self.faults[at];
        if let Some(left) = good.checked_sub(1) {
            *good = left;
            return None;
        }
        let fault = *fault;
        if self.once {
            self.faults.remove(at);
        }
        Some(fault)
    }

    fn execute(&mut self, command: Command, payload: &[u8], file: Option<u64>) -> Result<Vec<u8>, u32> {
        match command {
            Command::VERSION => {
                let text = format!(
                    "{{\"capabilities\":{{\"max_msg_fds\":1,\"max_dma_maps\":{},\"pgsizes\":4096}}}}\0",
                    self.limit
                );
                Ok([Version { major: 0.into(), minor: 0.into() }.as_bytes(), text.as_bytes()].concat())
            }
            Command::DMA_MAP => {
                let map = DmaMap::read_from_bytes(payload).unwrap();
                assert_eq!(map.argsz.get(), 32);
                let (address, size) = (map.address.get(), map.size.get());
                let below = self.windows.range(..=address + (size - 1)).next_back();
                if below.is_some_and(|(at, given)| at + (given.size - 1) >= address) {
                    return Err(17);
                }
                if self.windows.len() >= self.limit {
                    return Err(28);
                }
                let (offset, flags) = (map.offset.get(), map.flags.get());
                self.windows.insert(address, Given { address, size, offset, flags, file });
                Ok(Vec::new())
            }
            Command::DMA_UNMAP => {
                let unmap = DmaUnmap::read_from_bytes(payload).unwrap();
                let (address, size) = (unmap.address.get(), unmap.size.get());
                if self.windows.get(&address).is_none_or(|given| given.size != size) {
                    return Err(2);
                }
                self.windows.remove(&address);
                Ok(payload.to_vec())
            }
            _ => Err(38),
        }
    }
}

fn header(id: u16, command: Command, flags: MessageFlags, bytes: usize, error: u32) -> Header {
    Header {
        id: id.into(),
        command: command.0.into(),
        size: u32::try_from(16 + bytes).unwrap().into(),
        flags: flags.bits().into(),
        error: error.into(),
    }
}

fn serve(stream: &UnixStream, state: &Mutex<State>) {
    let mut payload = Vec::new();
    while let Ok(Some(Received { header: asked, fds })) =
        message::receive(stream, 1 << 21, SOON, &mut payload)
    {
        let (id, command) = (asked.id.get(), Command(asked.command.get()));
        assert_eq!(asked.flags.get(), 0);
        assert!(fds.len() <= 1);
        let file = fds.first().map(|fd| fstat(fd).unwrap().st_ino);
        let accesses = core::mem::take(&mut state.lock().unwrap().accesses);
        for (nth, access) in accesses.into_iter().enumerate() {
            let outcome = make(stream, u16::try_from(nth).unwrap(), &access);
            state.lock().unwrap().outcomes.push(outcome);
        }
        let mut state = state.lock().unwrap();
        state.calls.push(command);
        let fault = state.fault(command);
        // A server that fails has not done it; one that answers wrongly has.
        let outcome = match fault {
            Some(Fault::Errno(errno)) => Err(errno),
            _ => state.execute(command, &payload, file),
        };
        drop(state);
        let (mut reply, flags, error) = match outcome {
            Ok(reply) => (reply, MessageFlags::REPLY, 0),
            Err(errno) => (Vec::new(), MessageFlags::REPLY | MessageFlags::ERROR, errno),
        };
        let mut answer = header(id, command, flags, reply.len(), error);
        match fault {
            Some(Fault::Silence) => continue,
            Some(Fault::HangUp) => return,
            Some(Fault::Id) => answer.id = id.wrapping_add(1).into(),
            Some(Fault::Command) => answer.command = Command::DEVICE_RESET.0.into(),
            Some(Fault::Size(more)) => {
                reply.resize(reply.len().checked_add_signed(more as isize).unwrap(), 0);
                answer.size = u32::try_from(16 + reply.len()).unwrap().into();
            }
            Some(Fault::Content) => {
                if let Some(byte) = reply.get_mut(8) {
                    *byte ^= 0x10;
                }
            }
            Some(Fault::Kind) => answer.flags = 5.into(),
            Some(Fault::Huge) => answer.size = (3 << 30).into(),
            Some(Fault::Errno(_)) | None => {}
        }
        if message::send(stream, &answer, &reply, &[]).is_err() {
            return;
        }
    }
}

/// One command of the server's, and the client's answer to it.
fn make(stream: &UnixStream, id: u16, access: &Access) -> Result<Vec<u8>, u32> {
    let (command, payload) = match access {
        Access::Read(address, count) => {
            let read = DmaAccess { address: (*address).into(), count: (*count).into() };
            (Command::DMA_READ, read.as_bytes().to_vec())
        }
        Access::Write(address, data) => {
            let count = u64::try_from(data.len()).unwrap();
            let write = DmaAccess { address: (*address).into(), count: count.into() };
            (Command::DMA_WRITE, [write.as_bytes(), data].concat())
        }
        Access::Other(command) => (Command(*command), Vec::new()),
    };
    message::send(stream, &header(id, command, MessageFlags::empty(), payload.len(), 0), &payload, &[])
        .unwrap();
    let mut answer = Vec::new();
    let Received { header, .. } = message::receive(stream, 1 << 21, SOON, &mut answer).unwrap().unwrap();
    assert_eq!((header.id.get(), header.command.get(), header.flags.get() & 1), (id, command.0, 1));
    if header.error.get() != 0 {
        assert_eq!((header.size.get(), header.flags.get()), (16, 0x21));
        return Err(header.error.get());
    }
    // The address and the count come first, as they were sent.
    assert_eq!(answer[..16], payload[..16]);
    Ok(answer[16..].to_vec())
}
