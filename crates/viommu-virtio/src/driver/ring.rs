//! One split virtqueue, from the driver's end.

use std::num::Wrapping;
use std::sync::atomic::Ordering;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::DriverError;

/// A descriptor as it lies in the table: a comparison tells whether it must be written again.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

pub(super) const ENTRY_BYTES: u64 = 16;
const NO_INTERRUPT: u16 = 1;

impl Entry {
    pub(super) fn write<G: GuestMemory>(self, memory: &G, at: GuestAddress) -> Result<(), DriverError> {
        let raw = Descriptor::new(self.addr, self.len, self.flags, self.next);
        Ok(memory.write_obj(raw, at)?)
    }
}

pub(super) struct Ring {
    size: u16,
    table: GuestAddress,
    avail: GuestAddress,
    used: GuestAddress,
    next_avail: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// What the table holds.
    entries: Vec<Entry>,
    free: Vec<u16>,
}

/// The least multiple of 16 that is not below `bytes`.
pub(super) fn round_up(bytes: u64) -> u64 {
    bytes.saturating_add(15) & !15
}

impl Ring {
    /// Bytes that the three parts take.
    pub(super) fn bytes(size: u16) -> u64 {
        let size = u64::from(size);
        ENTRY_BYTES * size + round_up(6 + 2 * size) + round_up(6 + 8 * size)
    }

    pub(super) fn new<G: GuestMemory>(memory: &G, base: u64, size: u16) -> Result<Self, DriverError> {
        let entries = u64::from(size);
        let avail = base + ENTRY_BYTES * entries;
        let mut ring = Self {
            size,
            table: GuestAddress(base),
            avail: GuestAddress(avail),
            used: GuestAddress(avail + round_up(6 + 2 * entries)),
            next_avail: Wrapping(0),
            next_used: Wrapping(0),
            entries: vec![Entry::default(); usize::from(size)],
            free: Vec::with_capacity(usize::from(size)),
        };
        ring.reset(memory)?;
        Ok(ring)
    }

    /// As after a reset of the queue: everything zero, every descriptor free.
    pub(super) fn reset<G: GuestMemory>(&mut self, memory: &G) -> Result<(), DriverError> {
        let zeros = vec![0; usize::try_from(Self::bytes(self.size)).unwrap_or(0)];
        memory.write_slice(&zeros, self.table)?;
        self.next_avail = Wrapping(0);
        self.next_used = Wrapping(0);
        self.entries.fill(Entry::default());
        self.free.clear();
        self.free.extend((0..self.size).rev());
        Ok(())
    }

    /// The device's end, as a transport would set it up.
    pub(super) fn queue(&self) -> Result<Queue, DriverError> {
        let mut queue = Queue::new(self.size).map_err(|_| DriverError::QueueSize(self.size))?;
        let halves = |address: GuestAddress| {
            let half = |word: u64| u32::try_from(word & 0xffff_ffff).ok();
            (half(address.0), half(address.0 >> 32))
        };
        let (low, high) = halves(self.table);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.avail);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.used);
        queue.set_used_ring_address(low, high);
        queue.set_ready(true);
        Ok(queue)
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    pub(super) fn take(&mut self) -> Option<u16> {
        self.free.pop()
    }

    pub(super) fn give_back(&mut self, index: u16) {
        self.free.push(index);
    }

    pub(super) fn set<G: GuestMemory>(
        &mut self,
        memory: &G,
        index: u16,
        entry: Entry,
    ) -> Result<(), DriverError> {
        let Some(there) = self.entries.get_mut(usize::from(index)) else { return Ok(()) };
        if *there != entry {
            *there = entry;
            entry.write(memory, GuestAddress(self.table.0 + ENTRY_BYTES * u64::from(index)))?;
        }
        Ok(())
    }

    /// Makes a chain available.
    pub(super) fn offer<G: GuestMemory>(&mut self, memory: &G, head: u16) -> Result<(), DriverError> {
        let slot = u64::from(self.next_avail.0 % self.size);
        memory.store(head.to_le(), GuestAddress(self.avail.0 + 4 + 2 * slot), Ordering::Relaxed)?;
        self.next_avail += 1;
        Ok(memory.store(self.next_avail.0.to_le(), GuestAddress(self.avail.0 + 2), Ordering::Release)?)
    }

    /// The next used entry: the head of the chain and the bytes written.
    pub(super) fn used<G: GuestMemory>(&mut self, memory: &G) -> Result<Option<(u32, u32)>, DriverError> {
        let index: u16 = memory.load(GuestAddress(self.used.0 + 2), Ordering::Acquire)?;
        if Wrapping(u16::from_le(index)) == self.next_used {
            return Ok(None);
        }
        let slot = u64::from(self.next_used.0 % self.size);
        let entry: u64 = memory.read_obj(GuestAddress(self.used.0 + 4 + 8 * slot))?;
        self.next_used += 1;
        let half = |word: u64| u32::try_from(word & 0xffff_ffff).unwrap_or(u32::MAX);
        let entry = u64::from_le(entry);
        Ok(Some((half(entry), half(entry >> 32))))
    }

    /// Says whether the device may interrupt.
    pub(super) fn set_interrupts<G: GuestMemory>(&self, memory: &G, on: bool) -> Result<(), DriverError> {
        let flags = if on { 0 } else { NO_INTERRUPT };
        Ok(memory.store(flags.to_le(), self.avail, Ordering::Release)?)
    }
}
