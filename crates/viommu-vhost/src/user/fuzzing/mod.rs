//! Any bytes, read as what a hostile front end does to our back end, or a hostile back end to our front end: messages that
//! are nearly right, one at a time, and streams. A naive reading of the messages says what must be there after each. For
//! fuzzing and tests alone; nothing here is stable.

mod back;
mod front;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use super::wire::{Message, Receiver, Sender};

const PAGE: u64 = 4096;
/// Pages of a region of memory, and of a file.
const PAGES: u64 = 16;
/// Steps of one input.
const STEPS: usize = 200;
/// Where the device has its addresses, 32 pages each; the last ends with the last page of all.
const PLACES: [u64; 4] = [0, 1 << 20, 1 << 32, u64::MAX - 32 * PAGE + 1];

/// Bytes to take from.
struct Input<'d>(&'d [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken.to_vec()
    }

    /// Mostly a page of a place, else one of the ends that matter.
    fn address(&mut self) -> u64 {
        match self.byte() {
            page @ 0..0xe0 => PLACES[usize::from(page) % 4].wrapping_add(u64::from(page) / 4 % 8 * PAGE),
            0xe0 => u64::MAX,
            0xe1 => 1 << 63,
            0xe2 => 1 << 40,
            0xe3 => PAGE - 1,
            _ => u64::from_le_bytes(core::array::from_fn(|_| self.byte())),
        }
    }

    /// Mostly some pages.
    fn size(&mut self) -> u64 {
        match self.byte() {
            pages @ 0..0xe0 => u64::from(pages) % 8 * PAGE + PAGE,
            0xe0 => 0,
            0xe1 => u64::MAX,
            0xe2 => 1 << 63,
            0xe3 => 1,
            _ => u64::from_le_bytes(core::array::from_fn(|_| self.byte())),
        }
    }
}

/// The other end of a socket, which never waits.
struct Peer {
    socket: UnixStream,
    receiver: Receiver,
    sender: Sender,
}

impl Peer {
    fn new(socket: UnixStream) -> Self {
        Self { socket, receiver: Receiver::default(), sender: Sender::default() }
    }

    fn say(&mut self, request: u32, flags: u32, payload: &[u8], fds: Vec<OwnedFd>) {
        let message = Message { request, flags, payload: payload.to_vec(), fds };
        // Whoever has closed it hears nothing.
        let _said = self.sender.send(&self.socket, message);
    }

    /// The next message; `None` when there is none, or at the end.
    fn heard(&mut self) -> Option<Message> {
        self.receiver.next(&self.socket).ok().flatten()
    }
}

fn pair() -> (UnixStream, UnixStream) {
    UnixStream::pair().expect("two sockets")
}

fn memfd(sealed: bool, tag: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = memfd_create("viommu-fuzz", flags).expect("a file in memory");
    ftruncate(&fd, PAGES * PAGE).expect("some pages");
    if sealed {
        fcntl_add_seals(&fd, SealFlags::SHRINK).expect("nothing is sealed yet");
    }
    for page in 0..PAGES {
        rustix::io::pwrite(&fd, &(tag << 32 | page).to_le_bytes(), page * PAGE).expect("within the file");
    }
    File::from(fd)
}

/// What is sent along, the same for all inputs: nothing of it is changed. Two are memory as it must be.
fn files() -> &'static [File; 4] {
    static FILES: OnceLock<[File; 4]> = OnceLock::new();
    FILES.get_or_init(|| {
        let null = File::open("/dev/null").expect("it is there");
        [memfd(true, 1), memfd(true, 2), memfd(false, 3), null]
    })
}

/// Plays the bytes. Any input is legal.
///
/// # Panics
/// When one of our ends is wrong.
pub fn fuzz_vhost_user(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else { return };
    let mut input = Input(rest);
    match first & 3 {
        0 | 1 => back::play(&mut input, first & 4 != 0, first & 8 == 0),
        2 => front::play(&mut input),
        _ if first & 4 != 0 => back::stream(rest),
        _ => front::stream(rest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            fuzz_vhost_user(&bytes);
        }
    }
}
