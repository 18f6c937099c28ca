//! One request in the ring: what the driver wrote, and where the answer goes. Nothing in it is trusted.

use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::queue::near::Near;

/// Bytes of the longest request.
const LONGEST: usize = 72;

/// A request that was read.
#[derive(Debug)]
pub(crate) struct Frame {
    bytes: [u8; LONGEST],
    len: usize,
    /// Where the answer goes.
    room: Vec<(GuestAddress, u32)>,
    room_bytes: u64,
}

impl Default for Frame {
    fn default() -> Self {
        Self { bytes: [0; LONGEST], len: 0, room: Vec::new(), room_bytes: 0 }
    }
}

/// It cannot be read: descriptors that end nowhere, run in a circle, are out of order, or lie outside memory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

impl Frame {
    /// Reads `chain` into this frame: the beginning of what the driver wrote (no request is longer), and the places of
    /// the answer. A chain has at most `longest` descriptors, those of an indirect table too.
    pub(crate) fn read<M: GuestMemoryBackend>(
        &mut self,
        memory: &Near<'_, M>,
        chain: DescriptorChain<&Near<'_, M>>,
        longest: u16,
    ) -> Result<(), Malformed> {
        self.len = 0;
        self.room.clear();
        self.room_bytes = 0;
        // Also where the first descriptor is none.
        let mut ended = false;
        for descriptor in chain.take(usize::from(longest)) {
            ended = !descriptor.has_next();
            let (at, bytes) = (descriptor.addr(), descriptor.len());
            if descriptor.is_write_only() {
                self.room.push((at, bytes));
                self.room_bytes = self.room_bytes.saturating_add(u64::from(bytes));
                continue;
            }
            if !self.room.is_empty() {
                return Err(Malformed);
            }
            let wanted = usize::try_from(bytes).unwrap_or(usize::MAX);
            let end = self.len.saturating_add(wanted).min(LONGEST);
            let part = self.bytes.get_mut(self.len..end).ok_or(Malformed)?;
            if !part.is_empty() {
                memory.read(part, at).map_err(|_| Malformed)?;
            }
            self.len = end;
        }
        if ended { Ok(()) } else { Err(Malformed) }
    }

    /// What the driver wrote, as far as requests go.
    pub(crate) fn request(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// Bytes that the device may write.
    pub(crate) fn room(&self) -> u64 {
        self.room_bytes
    }

    /// The pieces of memory behind `[offset, offset + len)` of the room: address, and range of the answer's bytes.
    fn pieces(
        &self,
        offset: u64,
        len: usize,
    ) -> impl Iterator<Item = (GuestAddress, core::ops::Range<usize>)> {
        let mut skip = offset;
        let mut done = 0_usize;
        self.room
            .iter()
            .map_while(move |(at, bytes)| {
                if done >= len {
                    return None;
                }
                let bytes = u64::from(*bytes);
                if skip >= bytes {
                    skip = skip.saturating_sub(bytes);
                    return Some(None);
                }
                let at = at.0.checked_add(skip).map(GuestAddress)?;
                let here = usize::try_from(bytes.saturating_sub(skip)).unwrap_or(usize::MAX);
                let end = done.saturating_add(here).min(len);
                let range = done..end;
                skip = 0;
                done = end;
                Some(Some((at, range)))
            })
            .flatten()
    }

    /// Whether `len` bytes can be written at `offset` of the room.
    pub(crate) fn can_write(
        &self,
        memory: &Near<'_, impl GuestMemoryBackend>,
        offset: u64,
        len: usize,
    ) -> bool {
        let mut writable = 0_usize;
        for (at, range) in self.pieces(offset, len) {
            if !memory.is_there(at, range.len()) {
                return false;
            }
            writable = writable.saturating_add(range.len());
        }
        writable == len
    }

    /// Writes at `offset` of the room.
    pub(crate) fn write(
        &self,
        memory: &Near<'_, impl GuestMemoryBackend>,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), Malformed> {
        let mut written = 0_usize;
        for (at, range) in self.pieces(offset, bytes.len()) {
            let part = bytes.get(range).ok_or(Malformed)?;
            memory.write(part, at).map_err(|_| Malformed)?;
            written = written.saturating_add(part.len());
        }
        if written == bytes.len() { Ok(()) } else { Err(Malformed) }
    }
}
