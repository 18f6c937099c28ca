//! The requests of one batch: taken from the ring, executed, answered. Guest memory is reached in the first and the last
//! of these alone, but for requests that are larger than a batch.

use core::ops::Range;

use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemory};
use zerocopy::{FromBytes, IntoBytes};

use super::spec::{
    HEADER_BYTES, Header, ID_BYTES, SECTOR, SEGMENT_BYTES, Segment, Status, UNMAP, feature, kind,
};
use super::{
    Blk, DISCARD_SECTORS, DISCARD_SEGMENTS, REQUEST_BYTES, SEG_MAX, ZEROES_SECTORS, ZEROES_SEGMENTS,
};
use crate::chain::{Layout, Places};
use crate::ring::{self, Processed, QueueError, Verdict};

/// Data of a batch, and of one piece of a larger request: with it, a batch has been filled.
const BATCH_BYTES: usize = 1 << 20;

/// What is to be done for a request. Offsets and lengths are in bytes, and lie on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Task {
    /// Nothing more: this is the answer.
    Answer(Status),
    /// It cannot be answered, and is not given back.
    Nothing,
    Read {
        at: u64,
    },
    Write {
        at: u64,
    },
    /// More than goes into a batch.
    LongRead {
        at: u64,
        len: u64,
    },
    LongWrite {
        at: u64,
        len: u64,
    },
    Flush,
    Discard,
    WriteZeroes,
    GetId,
}

impl Task {
    /// It may take long, so nothing else waits for it in the same batch.
    fn is_slow(&self) -> bool {
        matches!(
            self,
            Self::LongRead { .. } | Self::LongWrite { .. } | Self::Flush | Self::Discard | Self::WriteZeroes
        )
    }

    fn changes_the_disk(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::LongWrite { .. } | Self::Discard | Self::WriteZeroes)
    }
}

#[derive(Debug)]
struct Job {
    head: u16,
    /// As the header says, if it can be read.
    kind: Option<u32>,
    task: Task,
    layout: Layout,
    /// Its part of the batch's data.
    data: Range<usize>,
    status: Status,
    /// Bytes of data that are in guest memory already.
    delivered: u64,
}

impl Job {
    /// Bytes of data that the device may write: the last byte is the status.
    fn room(&self) -> u64 {
        self.layout.writable_bytes.saturating_sub(1)
    }
}

/// One batch, and its memory for the next.
#[derive(Debug, Default)]
pub(super) struct Batch {
    jobs: Vec<Job>,
    places: Places,
    /// What was written, and what was read. Of it, `used` bytes are this batch's.
    data: Vec<u8>,
    used: usize,
    /// There are more requests in the ring.
    more: bool,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.jobs.clear();
        self.places.clear();
        self.used = 0;
        self.more = false;
    }

    fn reserve(&mut self, bytes: usize) -> Range<usize> {
        let range = self.used..self.used.saturating_add(bytes);
        if self.data.len() < range.end {
            self.data.resize(range.end, 0);
        }
        self.used = range.end;
        range
    }

    /// Takes requests from the ring, with the data to be written.
    pub(super) fn take<M: GuestMemory>(
        &mut self,
        blk: &Blk,
        features: u64,
        queue: &mut Queue,
        memory: &M,
    ) -> Result<(), QueueError> {
        // An indirect table may be longer than the ring.
        let longest = usize::from(queue.size()).max(LONGEST);
        let more = ring::take(queue, memory, |chain| self.take_one(blk, features, memory, chain, longest))?;
        self.more = more;
        Ok(())
    }

    fn take_one<M: GuestMemory>(
        &mut self,
        blk: &Blk,
        features: u64,
        memory: &M,
        chain: DescriptorChain<&M>,
        longest: usize,
    ) -> Verdict {
        let head = chain.head_index();
        let layout = self.places.take(chain, longest).filter(|layout| layout.writable_bytes > 0);
        let job = match layout {
            None => Job {
                head,
                kind: None,
                task: Task::Nothing,
                layout: Layout::default(),
                data: 0..0,
                status: Status::IoErr,
                delivered: 0,
            },
            Some(layout) => self.read_request(blk, features, memory, head, layout),
        };
        let slow = job.task.is_slow();
        if slow && !self.jobs.is_empty() {
            // What was read of it goes with the batch.
            return Verdict::PutBack;
        }
        self.jobs.push(job);
        if slow || self.used >= BATCH_BYTES || self.places.looked_at() >= ring::DESCRIPTORS {
            Verdict::Last
        } else {
            Verdict::Taken
        }
    }

    /// Reads a request and checks it.
    fn read_request<M: GuestMemory>(
        &mut self,
        blk: &Blk,
        features: u64,
        memory: &M,
        head: u16,
        layout: Layout,
    ) -> Job {
        let mut job = Job {
            head,
            kind: None,
            task: Task::Answer(Status::IoErr),
            layout,
            data: 0..0,
            status: Status::IoErr,
            delivered: 0,
        };
        let mut header = Header::default();
        if !self.places.read(memory, &job.layout.readable, 0, header.as_mut_bytes()) {
            return job;
        }
        let kind = header.kind.get();
        job.kind = Some(kind);
        let sent = job.layout.readable_bytes.saturating_sub(HEADER_BYTES_U64);
        let sector = header.sector.get();
        job.task = match kind {
            kind::IN => self.read_task(blk, &mut job, sector, sent),
            kind::OUT => self.write_task(blk, memory, &mut job, sector, sent),
            kind::FLUSH => Task::Flush,
            kind::GET_ID => {
                if job.room() < ID_BYTES_U64 {
                    return job;
                }
                job.data = self.reserve(ID_BYTES);
                Task::GetId
            }
            kind::DISCARD if features & feature::DISCARD != 0 => {
                self.segments_task(blk, memory, &mut job, sent, Task::Discard)
            }
            kind::WRITE_ZEROES if features & feature::WRITE_ZEROES != 0 => {
                self.segments_task(blk, memory, &mut job, sent, Task::WriteZeroes)
            }
            _ => Task::Answer(Status::Unsupp),
        };
        job
    }

    fn read_task(&mut self, blk: &Blk, job: &mut Job, sector: u64, sent: u64) -> Task {
        let len = job.room();
        let at = blk.place(sector, len).filter(|_| sent == 0 && len <= REQUEST_BYTES);
        match (at, usize::try_from(len)) {
            (Some(at), Ok(bytes)) if bytes <= BATCH_BYTES => {
                job.data = self.reserve(bytes);
                Task::Read { at }
            }
            (Some(at), _) => Task::LongRead { at, len },
            (None, _) => Task::Answer(Status::IoErr),
        }
    }

    fn write_task<M: GuestMemory>(
        &mut self,
        blk: &Blk,
        memory: &M,
        job: &mut Job,
        sector: u64,
        len: u64,
    ) -> Task {
        let refused = blk.read_only || job.room() != 0 || len > REQUEST_BYTES;
        let at = blk.place(sector, len).filter(|_| !refused);
        match (at, usize::try_from(len)) {
            (Some(at), Ok(bytes)) if bytes <= BATCH_BYTES => match self.fetch(memory, job, bytes) {
                true => Task::Write { at },
                false => Task::Answer(Status::IoErr),
            },
            (Some(at), _) => Task::LongWrite { at, len },
            (None, _) => Task::Answer(Status::IoErr),
        }
    }

    fn segments_task<M: GuestMemory>(
        &mut self,
        blk: &Blk,
        memory: &M,
        job: &mut Job,
        sent: u64,
        task: Task,
    ) -> Task {
        let (segments, sectors) = match task {
            Task::Discard => (DISCARD_SEGMENTS, DISCARD_SECTORS),
            _ => (ZEROES_SEGMENTS, ZEROES_SECTORS),
        };
        let unmap_is_known = task == Task::WriteZeroes;
        let most = usize::try_from(segments).unwrap_or(usize::MAX).saturating_mul(SEGMENT_BYTES);
        let bytes = usize::try_from(sent).unwrap_or(usize::MAX);
        let refused = blk.read_only || job.room() != 0;
        if refused || bytes == 0 || !bytes.is_multiple_of(SEGMENT_BYTES) || bytes > most {
            return Task::Answer(Status::IoErr);
        }
        if !self.fetch(memory, job, bytes) {
            return Task::Answer(Status::IoErr);
        }
        // All are checked before the first is executed.
        for segment in segments_of(&self.data, &job.data) {
            let flags = segment.flags.get();
            if flags & !UNMAP != 0 || flags & UNMAP != 0 && !unmap_is_known {
                return Task::Answer(Status::Unsupp);
            }
            if segment.sectors.get() > sectors || blk.segment(&segment).is_none() {
                return Task::Answer(Status::IoErr);
            }
        }
        task
    }

    /// Copies what the driver wrote behind the header, all at once: nothing of it is read a second time.
    fn fetch<M: GuestMemory>(&mut self, memory: &M, job: &mut Job, bytes: usize) -> bool {
        // Also where this fails it is work that was done under the guard, so it stays counted.
        let range = self.reserve(bytes);
        let fetched = self
            .data
            .get_mut(range.clone())
            .is_some_and(|data| self.places.read(memory, &job.layout.readable, HEADER_BYTES_U64, data));
        if fetched {
            job.data = range;
        }
        fetched
    }

    /// Executes what was taken. No guard is held meanwhile, but for the pieces of a long request.
    pub(super) fn execute<S: GuestAddressSpace>(&mut self, blk: &Blk, features: u64, space: &S) {
        let Self { jobs, places, data, .. } = self;
        let mut changed = false;
        for job in &mut *jobs {
            let done = match &job.task {
                Task::Answer(status) => {
                    job.status = *status;
                    continue;
                }
                Task::Nothing => continue,
                Task::Read { at } => data.get_mut(job.data.clone()).is_some_and(|data| blk.read(*at, data)),
                Task::Write { at } => data.get(job.data.clone()).is_some_and(|data| blk.write(*at, data)),
                Task::LongRead { at, len } => {
                    let read = long_read(blk, (*at, *len), data, places, &job.layout, space);
                    job.delivered = if read { *len } else { 0 };
                    read
                }
                Task::LongWrite { at, len } => long_write(blk, (*at, *len), data, places, &job.layout, space),
                Task::Flush => blk.flush().is_ok(),
                Task::Discard => segments_of(data, &job.data).all(|segment| blk.discard_segment(&segment)),
                Task::WriteZeroes => segments_of(data, &job.data).all(|segment| blk.zero_segment(&segment)),
                Task::GetId => {
                    if let Some(data) = data.get_mut(job.data.clone()) {
                        data.copy_from_slice(&blk.id);
                    }
                    true
                }
            };
            job.status = if done { Status::Ok } else { Status::IoErr };
            changed |= done && job.task.changes_the_disk();
        }
        // Without FLUSH, the driver takes what is answered to be safe.
        if changed && features & feature::FLUSH == 0 && blk.flush().is_err() {
            for job in jobs.iter_mut().filter(|job| job.task.changes_the_disk()) {
                job.status = Status::IoErr;
            }
        }
    }

    /// Writes data and statuses, and gives the requests back.
    pub(super) fn give<M: GuestMemory>(
        &mut self,
        blk: &Blk,
        queue: &mut Queue,
        memory: &M,
    ) -> Result<Processed, QueueError> {
        let Self { jobs, places, data, more, .. } = self;
        // Without a status of ours, the driver would find an old one of its own: such a request stays with the device.
        let answers =
            jobs.iter_mut().filter_map(|job| Some((job.head, answer(blk, job, places, data, memory)?)));
        ring::give(queue, memory, answers, *more)
    }
}

/// Descriptors of the longest request that a driver builds which knows the limits: header, data, status.
const LONGEST: usize = SEG_MAX.saturating_add(2);
const HEADER_BYTES_U64: u64 = 16;
const ID_BYTES_U64: u64 = 20;
const _: () = assert!(HEADER_BYTES == 16 && ID_BYTES == 20, "the same in two types");

fn segments_of(data: &[u8], range: &Range<usize>) -> impl Iterator<Item = Segment> {
    let data = data.get(range.clone()).unwrap_or_default();
    data.chunks_exact(SEGMENT_BYTES).filter_map(|bytes| Segment::read_from_bytes(bytes).ok())
}

/// Writes the answer to one request; gives the bytes written, from the first one on without a gap. `None`: it has no
/// status.
fn answer<M: GuestMemory>(blk: &Blk, job: &mut Job, places: &Places, data: &[u8], memory: &M) -> Option<u32> {
    if job.task == Task::Nothing {
        blk.counters.unanswered();
        return None;
    }
    let mut bytes = match &job.task {
        Task::LongWrite { len, .. } => *len,
        Task::LongRead { .. } => job.delivered,
        _ => u64::try_from(job.data.len()).unwrap_or(u64::MAX),
    };
    if job.status == Status::Ok && matches!(job.task, Task::Read { .. } | Task::GetId) {
        let data = data.get(job.data.clone()).unwrap_or_default();
        if places.write(memory, &job.layout.writable, 0, data) {
            job.delivered = bytes;
        } else {
            job.status = Status::IoErr;
        }
    }
    if job.status != Status::Ok {
        (bytes, job.delivered) = (0, 0);
    }
    let status = job.status.byte();
    if !places.write(memory, &job.layout.writable, job.room(), &[status]) {
        blk.counters.unanswered();
        return None;
    }
    blk.counters.answered(job.kind, job.status, bytes);
    let written = if job.delivered == job.room() { job.delivered.saturating_add(1) } else { job.delivered };
    Some(u32::try_from(written).unwrap_or(u32::MAX))
}

/// The pieces of a request of `len` bytes: where they begin, and how long they are.
fn pieces(len: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..len).step_by(BATCH_BYTES).map(move |begin| {
        let left = usize::try_from(len.saturating_sub(begin)).unwrap_or(usize::MAX);
        (begin, left.min(BATCH_BYTES))
    })
}

/// Room for one piece, at the beginning of the batch's data: a long request is alone.
fn first(data: &mut Vec<u8>, len: usize) -> Option<&mut [u8]> {
    if data.len() < len {
        data.resize(len, 0);
    }
    data.get_mut(..len)
}

/// Reads piece by piece, with a guard for each.
fn long_read<S: GuestAddressSpace>(
    blk: &Blk,
    (at, len): (u64, u64),
    data: &mut Vec<u8>,
    places: &Places,
    layout: &Layout,
    space: &S,
) -> bool {
    pieces(len).all(|(begin, bytes)| {
        let Some(data) = first(data, bytes) else { return false };
        blk.read(at.saturating_add(begin), data)
            && places.write(&*space.memory(), &layout.writable, begin, data)
    })
}

/// Writes piece by piece, with a guard for each. What was written before the first that fails, stays.
fn long_write<S: GuestAddressSpace>(
    blk: &Blk,
    (at, len): (u64, u64),
    data: &mut Vec<u8>,
    places: &Places,
    layout: &Layout,
    space: &S,
) -> bool {
    pieces(len).all(|(begin, bytes)| {
        let Some(data) = first(data, bytes) else { return false };
        let from = HEADER_BYTES_U64.saturating_add(begin);
        // The guard ends with this line.
        let fetched = places.read(&*space.memory(), &layout.readable, from, data);
        fetched && blk.write(at.saturating_add(begin), data)
    })
}

impl Blk {
    /// Where a request of so many bytes begins on the disk, if it lies there.
    fn place(&self, sector: u64, len: u64) -> Option<u64> {
        let at = sector.checked_mul(SECTOR)?;
        let fits = len.is_multiple_of(SECTOR) && at.checked_add(len)? <= self.size;
        fits.then_some(at)
    }

    /// Begin and length of a segment, if it lies on the disk.
    pub(super) fn segment(&self, segment: &Segment) -> Option<(u64, u64)> {
        let len = u64::from(segment.sectors.get()).checked_mul(SECTOR)?;
        Some((self.place(segment.sector.get(), len)?, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_when_a_request_is_long_cover_it_once() {
        let len = 5 * BATCH_BYTES as u64 / 2;
        let pieces: Vec<_> = pieces(len).collect();
        assert_eq!(
            pieces,
            [(0, BATCH_BYTES), (BATCH_BYTES as u64, BATCH_BYTES), (2 * BATCH_BYTES as u64, BATCH_BYTES / 2)]
        );
    }
}
