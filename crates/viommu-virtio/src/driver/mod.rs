//! The other end of the rings: a driver that lays out split virtqueues in memory, for tests, benchmarks and replay.
//!
//! It does what it is told, legal or not; it only checks that the device keeps to the rules of rings. When the device is
//! told that something is available is left to the caller.
//!
//! ```
//! use std::sync::Arc;
//! use viommu_virtio::driver::{Driver, Request};
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let ranges = [(GuestAddress(0), Driver::<Arc<GuestMemoryMmap>>::bytes(64, 512) as usize)];
//! let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges)?);
//! let mut driver = Driver::new(memory, 0, 64, 512)?;
//! let queue = driver.request_queue()?; // for the device
//! let token = driver.push(&Request::Probe { endpoint: 8 })?;
//! // The device has done nothing yet.
//! assert!(driver.complete()?.is_empty());
//! assert!(driver.is_outstanding(token));
//! # Ok(())
//! # }
//! ```

mod request;
mod ring;
#[cfg(test)]
mod tests;

use std::ops::Deref;

use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::spec::event;
use crate::spec::request::{PROBE, Tail};

pub use request::{Answer, Request, Token, resv_mem};
use request::{LONGEST, TAIL};
use ring::{ENTRY_BYTES, Entry, INDIRECT, NEXT, Ring, WRITE, round_up};

/// What the writable parts are filled with before the device gets them.
pub const FILL: u8 = 0xa5;
/// Bytes that a [`Request::Raw`] may have in its readable part.
pub const RAW_BYTES: u32 = 256;
/// Bytes that a [`Request::Raw`] may have in its writable part, beyond those of a PROBE.
pub const RAW_WRITABLE: u32 = 256;
/// Bytes at [`Driver::scratch`].
pub const SCRATCH: u32 = 4096;
/// Entries of one indirect table.
pub const INDIRECT_ENTRIES: u16 = 64;

/// Something that a driver cannot do, or that a device must not.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    /// Not a power of two.
    #[error("a queue of {0} entries")]
    QueueSize(u16),
    /// The area is not memory, or its base is not a multiple of 16.
    #[error("no memory for rings at {base:#x}: {bytes} bytes are needed")]
    Area {
        /// The base asked for.
        base: u64,
        /// What would be taken.
        bytes: u64,
    },
    /// Not enough descriptors are free. Nothing was made available.
    #[error("the ring is full")]
    Full,
    /// A raw request is longer than its buffer, or has more pieces than the queue or the indirect table. Nothing was made
    /// available.
    #[error("the request is too long, or in too many pieces")]
    TooLong,
    /// The area is no longer memory.
    #[error(transparent)]
    Memory(#[from] GuestMemoryError),
    /// The device used a chain that it did not have.
    #[error("the device used chain {0}, which it did not have")]
    NotOutstanding(u32),
    /// The device says that it wrote more than there was room for.
    #[error("the device wrote {used} bytes where {writable} can be written")]
    UsedLength {
        /// What it says.
        used: u32,
        /// The room.
        writable: u32,
    },
}

/// How a request is laid over descriptors: one for each part, unless cut.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// Offsets where the readable part is cut, ascending; those outside are passed over.
    pub readable: Vec<u32>,
    /// The same for the writable part.
    pub writable: Vec<u32>,
    /// The descriptors are in a table of their own, and one names it.
    pub indirect: bool,
}

impl Split {
    /// One descriptor a byte.
    #[must_use]
    pub fn bytes(readable: u32, writable: u32) -> Self {
        Self { readable: (1..readable).collect(), writable: (1..writable).collect(), indirect: false }
    }
}

/// A descriptor for [`Driver::push_raw`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawDescriptor {
    /// Where.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`RawDescriptor::NEXT`] and the like.
    pub flags: u16,
    /// The position in the list of the descriptor that follows; a number behind the list is written as it is.
    pub next: u16,
}

impl RawDescriptor {
    /// Another follows.
    pub const NEXT: u16 = NEXT;
    /// The device writes.
    pub const WRITE: u16 = WRITE;
    /// It names a table.
    pub const INDIRECT: u16 = INDIRECT;
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Fixed,
    Probe,
    /// A request of raw bytes: the writable part is given back.
    Raw {
        is_probe: bool,
    },
    /// Raw descriptors: nobody knows where a tail would be.
    Chain,
}

/// A chain at the device.
#[derive(Clone, Default)]
struct Flight {
    /// `None`: not at the device.
    token: Option<Token>,
    kind: Kind,
    writable: u32,
    /// Descriptors besides the head.
    others: Vec<u16>,
}

/// A driver in memory: a request queue, an event queue and their buffers. `M` gives the memory (an `Arc` or a reference).
pub struct Driver<M> {
    memory: M,
    probe_size: u32,
    requests: Ring,
    events: Ring,
    /// By head.
    flights: Vec<Flight>,
    /// Bytes of the event buffers at the device, by head; 0: not there.
    event_buffers: Vec<u32>,
    outstanding: usize,
    next_token: u64,
    scratch: u64,
    buffers: u64,
    tables: u64,
    event_area: u64,
}

/// The pieces of a part of `len` bytes.
struct Pieces<'s> {
    at: u32,
    len: u32,
    cuts: core::slice::Iter<'s, u32>,
}

impl Iterator for Pieces<'_> {
    type Item = (u32, u32);

    fn next(&mut self) -> Option<(u32, u32)> {
        let start = self.at;
        if start >= self.len {
            return None;
        }
        let cut = self.cuts.by_ref().copied().find(|cut| *cut > start && *cut < self.len);
        self.at = cut.unwrap_or(self.len);
        Some((start, self.at - start))
    }
}

fn pieces(len: u32, cuts: &[u32]) -> Pieces<'_> {
    Pieces { at: 0, len, cuts: cuts.iter() }
}

fn readable_room() -> u64 {
    round_up(u64::from(RAW_BYTES).max(LONGEST as u64))
}

fn writable_room(probe_size: u32) -> u64 {
    round_up(u64::from(probe_size) + u64::from(TAIL) + u64::from(RAW_WRITABLE))
}

fn table_bytes() -> u64 {
    u64::from(INDIRECT_ENTRIES) * ENTRY_BYTES
}

/// Bytes of one event buffer's place: room for one that is longer than a report.
const EVENT_ROOM: u32 = 64;
/// Bytes of a report.
const EVENT_BYTES: u32 = 24;
const _: () = assert!(EVENT_BYTES as usize == event::SIZE);

impl<M> Driver<M>
where
    M: Deref,
    M::Target: GuestMemory + Sized,
{
    /// Bytes that a driver with queues of `queue_size` entries takes.
    #[must_use]
    pub fn bytes(queue_size: u16, probe_size: u32) -> u64 {
        let each = readable_room() + writable_room(probe_size) + table_bytes() + u64::from(EVENT_ROOM);
        2 * Ring::bytes(queue_size) + u64::from(SCRATCH) + u64::from(queue_size) * each
    }

    /// Lays out both queues from `base` on (a multiple of 16); they take [`Driver::bytes`] bytes.
    ///
    /// # Errors
    /// [`DriverError::QueueSize`], [`DriverError::Area`].
    pub fn new(memory: M, base: u64, queue_size: u16, probe_size: u32) -> Result<Self, DriverError> {
        if !queue_size.is_power_of_two() {
            return Err(DriverError::QueueSize(queue_size));
        }
        let bytes = Self::bytes(queue_size, probe_size);
        let is_memory = usize::try_from(bytes).is_ok_and(|bytes| {
            base.checked_add(bytes as u64).is_some()
                && memory.check_range(GuestAddress(base), bytes, Permissions::ReadWrite)
        });
        if base & 15 != 0 || !is_memory {
            return Err(DriverError::Area { base, bytes });
        }
        let requests = Ring::new(&*memory, base, queue_size)?;
        let events = Ring::new(&*memory, base + Ring::bytes(queue_size), queue_size)?;
        let scratch = base + 2 * Ring::bytes(queue_size);
        let buffers = scratch + u64::from(SCRATCH);
        let tables = buffers + u64::from(queue_size) * (readable_room() + writable_room(probe_size));
        let event_area = tables + u64::from(queue_size) * table_bytes();
        Ok(Self {
            memory,
            probe_size,
            requests,
            events,
            flights: vec![Flight::default(); usize::from(queue_size)],
            event_buffers: vec![0; usize::from(queue_size)],
            outstanding: 0,
            next_token: 0,
            scratch,
            buffers,
            tables,
            event_area,
        })
    }

    /// The device's end of the request queue, configured and ready. For a device that begins, or begins anew after
    /// [`Driver::reset`].
    ///
    /// # Errors
    /// None in fact: the size has been checked.
    pub fn request_queue(&self) -> Result<Queue, DriverError> {
        self.requests.queue()
    }

    /// The device's end of the event queue, as [`Driver::request_queue`].
    ///
    /// # Errors
    /// None in fact: the size has been checked.
    pub fn event_queue(&self) -> Result<Queue, DriverError> {
        self.events.queue()
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &M::Target {
        &self.memory
    }

    /// [`SCRATCH`] bytes that the driver does not touch: for the buffers and tables of [`Driver::push_raw`].
    #[must_use]
    pub fn scratch(&self) -> GuestAddress {
        GuestAddress(self.scratch)
    }

    /// Requests at the device.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// Whether that request is at the device.
    #[must_use]
    pub fn is_outstanding(&self, token: Token) -> bool {
        self.flights.iter().any(|flight| flight.token == Some(token))
    }

    /// Says whether the device may interrupt for requests. It may at first.
    ///
    /// # Errors
    /// [`DriverError::Memory`].
    pub fn set_interrupts(&self, on: bool) -> Result<(), DriverError> {
        self.requests.set_interrupts(&*self.memory, on)
    }

    /// Forgets everything at the device, and clears both queues: after the device or its queues have been reset.
    ///
    /// # Errors
    /// [`DriverError::Memory`].
    pub fn reset(&mut self) -> Result<(), DriverError> {
        self.requests.reset(&*self.memory)?;
        self.events.reset(&*self.memory)?;
        for flight in &mut self.flights {
            flight.token = None;
            flight.others.clear();
        }
        self.event_buffers.fill(0);
        self.outstanding = 0;
        Ok(())
    }

    /// Makes a request available: one readable descriptor, one writable.
    ///
    /// # Errors
    /// [`DriverError::Full`]; [`DriverError::TooLong`] for raw ones; [`DriverError::Memory`].
    #[inline]
    pub fn push(&mut self, request: &Request) -> Result<Token, DriverError> {
        const WHOLE: Split = Split { readable: Vec::new(), writable: Vec::new(), indirect: false };
        self.push_split(request, &WHOLE)
    }

    /// The same, laid over descriptors as `split` says.
    ///
    /// # Errors
    /// As [`Driver::push`].
    pub fn push_split(&mut self, request: &Request, split: &Split) -> Result<Token, DriverError> {
        let writable = request.writable(self.probe_size);
        let kind = match request {
            Request::Probe { .. } => Kind::Probe,
            Request::Raw { bytes, .. } => Kind::Raw { is_probe: bytes.first() == Some(&PROBE) },
            _ => Kind::Fixed,
        };
        request.with_bytes(|bytes| {
            let readable = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            if u64::from(readable) > readable_room() || u64::from(writable) > writable_room(self.probe_size) {
                return Err(DriverError::TooLong);
            }
            let count = pieces(readable, &split.readable).count() + pieces(writable, &split.writable).count();
            // No bytes at all still take a descriptor.
            let count = count.max(1);
            let limit = if split.indirect { INDIRECT_ENTRIES } else { self.requests.size() };
            if count > usize::from(limit) {
                return Err(DriverError::TooLong);
            }
            let taken = if split.indirect { 1 } else { count };
            let head = self.take(taken)?;
            let from = self.buffers + u64::from(head) * (readable_room() + writable_room(self.probe_size));
            let to = from + readable_room();
            self.memory.write_slice(bytes, GuestAddress(from))?;
            self.fill(to, writable)?;
            let read = pieces(readable, &split.readable).map(|(at, len)| (from + u64::from(at), len, 0));
            let write = pieces(writable, &split.writable).map(|(at, len)| (to + u64::from(at), len, WRITE));
            let nothing = (readable == 0 && writable == 0).then_some((from, 0, 0));
            self.lay(head, count, split.indirect, read.chain(write).chain(nothing))?;
            self.launch(head, kind, writable)
        })
    }

    /// Makes a chain of any descriptors available, beginning with the first. Their buffers are the caller's business.
    ///
    /// # Errors
    /// [`DriverError::Full`]; [`DriverError::TooLong`] for none, or more than the queue has; [`DriverError::Memory`].
    pub fn push_raw(&mut self, descriptors: &[RawDescriptor]) -> Result<Token, DriverError> {
        if descriptors.is_empty() || descriptors.len() > usize::from(self.requests.size()) {
            return Err(DriverError::TooLong);
        }
        let head = self.take(descriptors.len())?;
        for (at, raw) in descriptors.iter().enumerate() {
            let next = if usize::from(raw.next) < descriptors.len() {
                self.index(head, raw.next.into())
            } else {
                raw.next
            };
            let entry = Entry { addr: raw.addr, len: raw.len, flags: raw.flags, next };
            let index = self.index(head, at);
            self.requests.set(&*self.memory, index, entry)?;
        }
        self.launch(head, Kind::Chain, u32::MAX)
    }

    /// The next answer in the used ring. Takes no memory but for properties.
    ///
    /// # Errors
    /// [`DriverError::NotOutstanding`], [`DriverError::UsedLength`]: the entry has been passed over;
    /// [`DriverError::Memory`].
    pub fn next_answer(&mut self) -> Result<Option<Answer>, DriverError> {
        let Some((id, used_len)) = self.requests.used(&*self.memory)? else { return Ok(None) };
        let not_outstanding = || DriverError::NotOutstanding(id);
        let head = u16::try_from(id).map_err(|_| not_outstanding())?;
        let flight = self.flights.get_mut(usize::from(head)).ok_or_else(not_outstanding)?;
        let token = flight.token.take().ok_or_else(not_outstanding)?;
        let (kind, writable) = (flight.kind, flight.writable);
        // The last one first, so that the same chain comes out of it again.
        while let Some(index) = flight.others.pop() {
            self.requests.give_back(index);
        }
        self.requests.give_back(head);
        self.outstanding = self.outstanding.saturating_sub(1);
        if used_len > writable {
            return Err(DriverError::UsedLength { used: used_len, writable });
        }
        let at = self.buffers + u64::from(head) * (readable_room() + writable_room(self.probe_size));
        let at = at + readable_room();
        let is_probe = matches!(kind, Kind::Probe | Kind::Raw { is_probe: true });
        let tail_at = if is_probe { writable.saturating_sub(TAIL).min(self.probe_size) } else { 0 };
        let has_tail = kind != Kind::Chain && used_len != 0 && writable >= TAIL;
        let tail = if has_tail { Some(self.tail(at + u64::from(tail_at))?) } else { None };
        let shown = match kind {
            Kind::Probe => tail_at,
            Kind::Raw { .. } => writable,
            Kind::Fixed | Kind::Chain => 0,
        };
        let mut properties = vec![0; shown as usize];
        if shown != 0 {
            self.memory.read_slice(&mut properties, GuestAddress(at))?;
        }
        Ok(Some(Answer { token, used_len, tail, properties }))
    }

    /// All answers there are, in the order of the used ring.
    ///
    /// # Errors
    /// As [`Driver::next_answer`]; answers before are lost.
    pub fn complete(&mut self) -> Result<Vec<Answer>, DriverError> {
        core::iter::from_fn(|| self.next_answer().transpose()).collect()
    }

    /// Gives the device every free event buffer, of 24 bytes each.
    ///
    /// # Errors
    /// [`DriverError::Memory`].
    pub fn fill_events(&mut self) -> Result<(), DriverError> {
        while self.events.free() != 0 {
            self.post_event(EVENT_BYTES)?;
        }
        Ok(())
    }

    /// Gives the device one event buffer of that many bytes, 64 at most.
    ///
    /// # Errors
    /// [`DriverError::Full`], [`DriverError::TooLong`], [`DriverError::Memory`].
    pub fn post_event(&mut self, bytes: u32) -> Result<(), DriverError> {
        if bytes == 0 || bytes > EVENT_ROOM {
            return Err(DriverError::TooLong);
        }
        let head = self.events.take().ok_or(DriverError::Full)?;
        let addr = self.event_area + u64::from(head) * u64::from(EVENT_ROOM);
        self.fill(addr, EVENT_ROOM)?;
        self.events.set(&*self.memory, head, Entry { addr, len: bytes, flags: WRITE, next: 0 })?;
        if let Some(there) = self.event_buffers.get_mut(usize::from(head)) {
            *there = bytes;
        }
        self.events.offer(&*self.memory, head)
    }

    /// The next used event buffer: its bytes as far as the device wrote. The buffer is free again, and not given back.
    ///
    /// # Errors
    /// As [`Driver::next_answer`].
    pub fn next_event(&mut self) -> Result<Option<Vec<u8>>, DriverError> {
        let Some((id, used)) = self.events.used(&*self.memory)? else { return Ok(None) };
        let not_outstanding = || DriverError::NotOutstanding(id);
        let head = u16::try_from(id).map_err(|_| not_outstanding())?;
        let there = self.event_buffers.get_mut(usize::from(head)).ok_or_else(not_outstanding)?;
        let writable = core::mem::take(there);
        if writable == 0 {
            return Err(not_outstanding());
        }
        self.events.give_back(head);
        if used > writable {
            return Err(DriverError::UsedLength { used, writable });
        }
        let mut bytes = vec![0; used as usize];
        let at = self.event_area + u64::from(head) * u64::from(EVENT_ROOM);
        self.memory.read_slice(&mut bytes, GuestAddress(at))?;
        Ok(Some(bytes))
    }

    /// The fault reports that have come. What is shorter than one is passed over. [`Driver::fill_events`] gives the
    /// buffers back.
    ///
    /// # Errors
    /// As [`Driver::next_answer`]; reports before are lost.
    pub fn events(&mut self) -> Result<Vec<event::Fault>, DriverError> {
        let mut faults = Vec::new();
        while let Some(bytes) = self.next_event()? {
            faults.extend(event::Fault::read_from_prefix(&bytes).ok().map(|(fault, _)| fault));
        }
        Ok(faults)
    }

    /// Takes `count` descriptors, linked to the head that it gives.
    fn take(&mut self, count: usize) -> Result<u16, DriverError> {
        if self.requests.free() < count {
            return Err(DriverError::Full);
        }
        let head = self.requests.take().ok_or(DriverError::Full)?;
        if let Some(flight) = self.flights.get_mut(usize::from(head)) {
            flight.others.clear();
            let others = core::iter::from_fn(|| self.requests.take());
            flight.others.extend(others.take(count.saturating_sub(1)));
        }
        Ok(head)
    }

    /// The `at`-th descriptor of the chain of `head`.
    fn index(&self, head: u16, at: usize) -> u16 {
        let others = self.flights.get(usize::from(head)).map_or(&[][..], |flight| &flight.others);
        at.checked_sub(1).and_then(|at| others.get(at)).copied().unwrap_or(head)
    }

    /// Writes the descriptors of a chain.
    fn lay(
        &mut self,
        head: u16,
        count: usize,
        indirect: bool,
        buffers: impl Iterator<Item = (u64, u32, u16)>,
    ) -> Result<(), DriverError> {
        let table = self.tables + u64::from(head) * table_bytes();
        for (at, (addr, len, flags)) in buffers.enumerate() {
            let next = (at + 1 < count).then_some(at + 1);
            let flags = if next.is_some() { flags | NEXT } else { flags };
            if indirect {
                let next = next.and_then(|next| u16::try_from(next).ok()).unwrap_or(0);
                let place = GuestAddress(table + at as u64 * ENTRY_BYTES);
                Entry { addr, len, flags, next }.write(&*self.memory, place)?;
            } else {
                let next = next.map_or(0, |next| self.index(head, next));
                let index = self.index(head, at);
                self.requests.set(&*self.memory, index, Entry { addr, len, flags, next })?;
            }
        }
        if indirect {
            let len = u32::try_from(count as u64 * ENTRY_BYTES).unwrap_or(0);
            let entry = Entry { addr: table, len, flags: INDIRECT, next: 0 };
            self.requests.set(&*self.memory, head, entry)?;
        }
        Ok(())
    }

    fn launch(&mut self, head: u16, kind: Kind, writable: u32) -> Result<Token, DriverError> {
        let token = Token(self.next_token);
        self.next_token += 1;
        if let Some(flight) = self.flights.get_mut(usize::from(head)) {
            flight.token = Some(token);
            flight.kind = kind;
            flight.writable = writable;
        }
        self.outstanding += 1;
        self.requests.offer(&*self.memory, head)?;
        Ok(token)
    }

    fn fill(&self, at: u64, bytes: u32) -> Result<(), DriverError> {
        const FILLING: [u8; 64] = [FILL; 64];
        let (mut at, mut left) = (at, bytes as usize);
        while left != 0 {
            let part = FILLING.get(..left).unwrap_or(&FILLING);
            self.memory.write_slice(part, GuestAddress(at))?;
            at += part.len() as u64;
            left -= part.len();
        }
        Ok(())
    }

    fn tail(&self, at: u64) -> Result<Tail, DriverError> {
        let mut tail = Tail::new_zeroed();
        self.memory.read_slice(tail.as_mut_bytes(), GuestAddress(at))?;
        Ok(tail)
    }
}
