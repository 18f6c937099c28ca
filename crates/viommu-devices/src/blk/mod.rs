//! virtio-blk over a file.

mod batch;
mod disk;
mod metrics;
#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(
    not(test),
    expect(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        reason = "it panics when something is wrong"
    )
)]
pub(crate) mod recording;
mod spec;
#[cfg(test)]
mod tests;

use core::fmt;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use virtio_queue::Queue;
use vm_memory::GuestAddressSpace;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use batch::Batch;
use disk::{Disk, FileDisk};
use metrics::Counters;
use spec::{Config, ID_BYTES, SECTOR, Segment, UNMAP, feature};

use crate::ring::{Processed, QueueError};

pub use disk::OpenError;
pub use metrics::{Answers, Metrics};

/// Bytes of the largest segment that a driver is told to make.
const SIZE_MAX: u32 = 64 << 10;
/// Segments of the largest request that a driver is told to make: it fits into a ring of 128.
const SEG_MAX: usize = 126;
/// Bytes of the largest request that is executed: firmware heeds no limits, and reads a kernel at once.
const REQUEST_BYTES: u64 = 256 << 20;
/// Limits of one DISCARD: 2 GiB in a segment.
const DISCARD_SEGMENTS: u32 = 32;
const DISCARD_SECTORS: u32 = 4 << 20;
/// Limits of one WRITE_ZEROES: 64 MiB in a segment, all of which may have to be written.
const ZEROES_SEGMENTS: u32 = 1;
const ZEROES_SECTORS: u32 = 128 << 10;

/// What is written where a file system cannot make zeroes.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// How a disk is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlkOptions {
    /// The guest cannot write. Several servers may have the file then, as long as none of them writes.
    pub read_only: bool,
    /// Request queues, at least one.
    pub queues: u16,
    /// What GET_ID says, Linux's `/sys/block/vda/serial`: at most 20 bytes of printable ASCII.
    pub id: String,
}

impl Default for BlkOptions {
    /// Writable, one queue, no id.
    fn default() -> Self {
        Self { read_only: false, queues: 1, id: String::new() }
    }
}

/// A disk: one file, one or more queues. Each queue belongs to one thread at a time; different queues may be processed
/// at the same time.
///
/// The transport negotiates features, reads the configuration space, and calls [`Blk::process`] after a kick. A queue
/// reset or device reset needs nothing of the disk: between two calls it keeps nothing of a queue.
pub struct Blk {
    disk: Box<dyn Disk>,
    /// Bytes.
    size: u64,
    read_only: bool,
    queues: u16,
    id: [u8; ID_BYTES],
    config: Config,
    counters: Counters,
    /// What was written may be lost, since a sync failed: the system says so once only, and forgets.
    lost: Mutex<bool>,
    /// Batches that are not at work, for their memory.
    batches: Mutex<Vec<Batch>>,
}

impl fmt::Debug for Blk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blk")
            .field("size", &self.size)
            .field("read_only", &self.read_only)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

impl Blk {
    /// The type number of virtio-blk.
    pub const DEVICE_TYPE: u16 = 2;

    /// Opens a regular file or a block device and locks it, until the disk is dropped: exclusively, or with others that
    /// only read. The lock is advisory (`flock`).
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(path: &Path, options: &BlkOptions) -> Result<Self, OpenError> {
        let id = id_of(options)?;
        let disk = FileDisk::open(path, options.read_only)?;
        let (size, block) = (disk.size, disk.block);
        Ok(Self::over(Box::new(disk), size, block, options, id))
    }

    /// A disk of `size` bytes, which likes blocks of `block` bytes.
    fn over(disk: Box<dyn Disk>, size: u64, block: u64, options: &BlkOptions, id: [u8; ID_BYTES]) -> Self {
        let read_only = options.read_only;
        let config = config_of(size, block, options);
        let (counters, lost, batches) = (Counters::default(), Mutex::default(), Mutex::default());
        Self { disk, size, read_only, queues: options.queues, id, config, counters, lost, batches }
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Request queues.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// The device's feature bits; VERSION_1 and the ring's are the transport's.
    #[must_use]
    pub fn features(&self) -> u64 {
        let mut features =
            feature::SIZE_MAX | feature::SEG_MAX | feature::BLK_SIZE | feature::TOPOLOGY | feature::FLUSH;
        if self.read_only {
            features |= feature::RO;
        } else {
            features |= feature::DISCARD | feature::WRITE_ZEROES;
        }
        if self.queues > 1 {
            features |= feature::MQ;
        }
        features
    }

    /// The configuration space. What lies behind its end reads as zero; nothing in it can be written.
    #[must_use]
    pub fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    /// Takes requests from the ring, executes them in its order, and gives them back: one batch, of at most 64 requests
    /// and about 1 MiB of data, or one request that may take longer. `features` are those that the driver negotiated.
    ///
    /// `memory.memory()` is asked for once to take and once to answer, and nothing of it is kept over an access to the
    /// file. What has gone from memory in between is no longer written.
    ///
    /// # Errors
    /// See [`QueueError`]. Requests executed before stay executed; some may not be given back.
    pub fn process<S: GuestAddressSpace>(
        &self,
        features: u64,
        queue: &mut Queue,
        memory: &S,
    ) -> Result<Processed, QueueError> {
        let spare = self.batches.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut batch = spare.unwrap_or_default();
        let outcome = self.process_batch(&mut batch, features, queue, memory);
        batch.clear();
        self.batches.lock().unwrap_or_else(PoisonError::into_inner).push(batch);
        outcome
    }

    fn process_batch<S: GuestAddressSpace>(
        &self,
        batch: &mut Batch,
        features: u64,
        queue: &mut Queue,
        space: &S,
    ) -> Result<Processed, QueueError> {
        {
            let guard = space.memory();
            crate::ring::begin(queue, &*guard)?;
            batch.take(self, features, queue, &*guard)?;
            if batch.is_empty() {
                return batch.give(self, queue, &*guard);
            }
        }
        batch.execute(self, features, space);
        batch.give(self, queue, &*space.memory())
    }

    /// Makes safe what was written and answered before: for FLUSH, and for the embedder before it ends.
    ///
    /// # Errors
    /// What the system says. Data may be lost then without a further word of its, so from now on this fails always: the
    /// file must be opened anew.
    pub fn flush(&self) -> io::Result<()> {
        // One at a time: an error is told to one of those who wait only, and all must know.
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        if *lost {
            return Err(io::Error::other("an earlier flush failed"));
        }
        self.counters.synced();
        self.disk.sync().inspect_err(|error| {
            *lost = true;
            self.counters.failed(error);
        })
    }

    /// What the disk has done.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.counters.snapshot()
    }

    fn done(&self, outcome: io::Result<()>) -> bool {
        outcome.inspect_err(|error| self.counters.failed(error)).is_ok()
    }

    fn read(&self, at: u64, data: &mut [u8]) -> bool {
        self.done(self.disk.read(at, data))
    }

    fn write(&self, at: u64, data: &[u8]) -> bool {
        self.done(self.disk.write(at, data))
    }

    /// Discards, if the file system can: it is only a hint.
    fn discard_segment(&self, segment: &Segment) -> bool {
        let Some((at, len)) = self.segment(segment) else { return false };
        if len == 0 {
            return true;
        }
        match self.disk.punch(at, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => true,
            outcome => self.done(outcome),
        }
    }

    /// Makes zeroes, if need be by writing them.
    fn zero_segment(&self, segment: &Segment) -> bool {
        let Some((at, len)) = self.segment(segment) else { return false };
        if len == 0 {
            return true;
        }
        let unmap = segment.flags.get() & UNMAP != 0;
        if unmap && self.disk.punch(at, len).is_ok() || self.disk.zero(at, len).is_ok() {
            return true;
        }
        // Whatever was in the way: this is what counts.
        let piece = u64::try_from(ZEROES.len()).unwrap_or(u64::MAX);
        let end = at.saturating_add(len);
        (at..end).step_by(ZEROES.len()).all(|at| {
            let len = usize::try_from(end.saturating_sub(at).min(piece)).unwrap_or(usize::MAX);
            self.write(at, ZEROES.get(..len).unwrap_or_default())
        })
    }
}

fn id_of(options: &BlkOptions) -> Result<[u8; ID_BYTES], OpenError> {
    if options.queues == 0 {
        return Err(OpenError::NoQueue);
    }
    let mut id = [0; ID_BYTES];
    let text = options.id.as_bytes();
    let printable = text.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ');
    match id.get_mut(..text.len()) {
        Some(room) if printable => room.copy_from_slice(text),
        _ => return Err(OpenError::Id { id: options.id.clone() }),
    }
    Ok(id)
}

fn config_of(size: u64, block: u64, options: &BlkOptions) -> Config {
    // Network file systems name what they like to transfer; guests make no file system with blocks larger than a page.
    let block = if block.is_power_of_two() { block.clamp(SECTOR, 4096) } else { SECTOR };
    let sectors = block.checked_div(SECTOR).unwrap_or(1);
    Config {
        capacity: U64::new(size.checked_div(SECTOR).unwrap_or(0)),
        size_max: U32::new(SIZE_MAX),
        seg_max: U32::new(u32::try_from(SEG_MAX).unwrap_or(u32::MAX)),
        blk_size: U32::new(u32::try_from(SECTOR).unwrap_or(u32::MAX)),
        physical_block_exp: u8::try_from(sectors.trailing_zeros()).unwrap_or(0),
        min_io_size: U16::new(u16::try_from(sectors).unwrap_or(1)),
        num_queues: U16::new(options.queues),
        max_discard_sectors: U32::new(DISCARD_SECTORS),
        max_discard_seg: U32::new(DISCARD_SEGMENTS),
        discard_sector_alignment: U32::new(u32::try_from(sectors).unwrap_or(1)),
        max_write_zeroes_sectors: U32::new(ZEROES_SECTORS),
        max_write_zeroes_seg: U32::new(ZEROES_SEGMENTS),
        write_zeroes_may_unmap: 1,
        ..Config::default()
    }
}
