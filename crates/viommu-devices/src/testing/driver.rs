//! The guest's end of a queue.

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::Space;

/// Where the rings lie, each from a page of its own on.
pub(crate) const TABLE: u64 = 0x1000;
pub(crate) const AVAIL: u64 = 0x3000;
pub(crate) const USED: u64 = 0x4000;
/// Where buffers begin.
const BUFFERS: u64 = 0x8000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) at: u64,
    pub(crate) len: u32,
    pub(crate) write: bool,
}

/// A request that was offered: its head, and where the device's bytes are to lie.
#[cfg(test)]
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) head: u16,
    pub(crate) pieces: Vec<Piece>,
}

pub(crate) struct Driver {
    pub(crate) space: Space,
    pub(crate) queue: Queue,
    size: u16,
    next_descriptor: u16,
    avail: u16,
    seen: u16,
    next_buffer: u64,
}

impl Driver {
    /// `bytes` of memory, and a queue of `size`.
    pub(crate) fn new(bytes: u64, size: u16) -> Self {
        let space = Space::new(bytes);
        let queue = Queue::new(size).expect("a power of two");
        let mut driver =
            Self { space, queue, size, next_descriptor: 0, avail: 0, seen: 0, next_buffer: BUFFERS };
        driver.set_up();
        driver
    }

    /// Resets the queue and sets it up.
    pub(crate) fn set_up(&mut self) {
        self.queue.reset();
        self.queue.set_size(self.size);
        let low = |address: u64| u32::try_from(address).ok();
        self.queue.set_desc_table_address(low(TABLE), Some(0));
        self.queue.set_avail_ring_address(low(AVAIL), Some(0));
        self.queue.set_used_ring_address(low(USED), Some(0));
        self.queue.set_ready(true);
        self.write(AVAIL, &[0; 4]);
        self.write(USED, &[0; 4]);
        (self.avail, self.seen) = (0, 0);
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.space.memory.write_slice(bytes, GuestAddress(at)).expect("in memory");
    }

    pub(crate) fn descriptor(&self, table: u64, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = at.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(table + 16 * u64::from(index), &bytes);
    }

    fn list(&self, table: u64, first: u16, size: u16, pieces: &[Piece]) -> u16 {
        let mut index = first;
        for (n, piece) in pieces.iter().enumerate() {
            let next = (index + 1) % size;
            let more = if n + 1 < pieces.len() { NEXT } else { 0 };
            let flags = more | if piece.write { WRITE } else { 0 };
            self.descriptor(table, index, piece.at, piece.len, flags, next);
            index = next;
        }
        index
    }

    /// Makes a chain available, of descriptors in the ring's table; gives its head.
    pub(crate) fn offer(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next_descriptor;
        self.next_descriptor = self.list(TABLE, head, self.size, pieces);
        self.make_available(head);
        head
    }

    /// The same with a table of its own.
    pub(crate) fn offer_indirect(&mut self, pieces: &[Piece]) -> u16 {
        let count = u16::try_from(pieces.len()).expect("few");
        let table = self.room(16 * u64::from(count), 16);
        self.list(table, 0, count.max(1), pieces);
        let head = self.next_descriptor;
        self.descriptor(TABLE, head, table, 16 * u32::from(count), INDIRECT, 0);
        self.next_descriptor = (head + 1) % self.size;
        self.make_available(head);
        head
    }

    pub(crate) fn make_available(&mut self, head: u16) {
        self.write(AVAIL + 4 + 2 * u64::from(self.avail % self.size), &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.write(AVAIL + 2, &self.avail.to_le_bytes());
    }

    /// What has been used since the last time: head and length.
    #[cfg(test)]
    pub(crate) fn used(&mut self) -> Vec<(u32, u32)> {
        let read = |at| self.space.memory.read_obj::<u32>(GuestAddress(at)).expect("in memory");
        let index: u16 = self.space.memory.read_obj(GuestAddress(USED + 2)).expect("in memory");
        let mut used = Vec::new();
        while self.seen != index {
            let at = USED + 4 + 8 * u64::from(self.seen % self.size);
            used.push((read(at), read(at + 4)));
            self.seen = self.seen.wrapping_add(1);
        }
        used
    }

    /// All buffers are free again.
    pub(crate) fn free(&mut self) {
        self.next_buffer = BUFFERS;
    }

    /// Memory for buffers, with a gap before it.
    pub(crate) fn room(&mut self, len: u64, align: u64) -> u64 {
        let at = (self.next_buffer + 3).next_multiple_of(align);
        self.next_buffer = at + len;
        at
    }
}

#[cfg(test)]
impl Driver {
    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.space.memory.read_slice(&mut bytes, GuestAddress(at)).expect("in memory");
        bytes
    }

    /// Pieces for `len` bytes, cut at `cuts`.
    fn pieces(&mut self, len: usize, cuts: &[usize], write: bool) -> Vec<Piece> {
        let mut ends: Vec<usize> = cuts.iter().copied().filter(|cut| *cut < len).collect();
        ends.extend([0, len]);
        ends.sort_unstable();
        ends.dedup();
        ends.windows(2)
            .map(|ends| {
                let len = u32::try_from(ends[1] - ends[0]).unwrap();
                Piece { at: self.room(u64::from(len), 1), len, write }
            })
            .collect()
    }

    /// Offers a request: `readable` cut in pieces, and `room` bytes for the device to write, filled with 0xaa.
    pub(crate) fn request(
        &mut self,
        readable: &[u8],
        room: usize,
        cuts: &[usize],
        indirect: bool,
    ) -> Request {
        let mut pieces = self.pieces(readable.len(), cuts, false);
        let mut rest = readable;
        for piece in &pieces {
            let (part, more) = rest.split_at(piece.len as usize);
            self.write(piece.at, part);
            rest = more;
        }
        let writable = self.pieces(room, cuts, true);
        for piece in &writable {
            self.write(piece.at, &vec![0xaa; piece.len as usize]);
        }
        pieces.extend(writable);
        let head = if indirect { self.offer_indirect(&pieces) } else { self.offer(&pieces) };
        Request { head, pieces }
    }

    /// What the device wrote: all of the writable part.
    pub(crate) fn answer(&self, request: &Request) -> Vec<u8> {
        let writable = request.pieces.iter().filter(|piece| piece.write);
        writable.flat_map(|piece| self.read(piece.at, piece.len as usize)).collect()
    }
}
