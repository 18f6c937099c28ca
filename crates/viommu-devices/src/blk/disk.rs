//! What a disk's sectors are kept in: a file, or in tests something that fails when it is told to.

use std::fs::{File, FileType, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FlockOperation, OFlags, fallocate, flock};
use rustix::io::{Errno, retry_on_intr};

use super::spec::SECTOR;

/// Why a disk cannot be served. Nothing is left open or locked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The system refuses.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it says.
        source: io::Error,
    },
    /// It is neither a regular file nor a block device.
    #[error("{}: neither a regular file nor a block device", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// Another process, or another device of this one, has it; or it is a block device that is mounted.
    #[error("{}: in use by another server, or mounted", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It has no whole number of sectors, or none.
    #[error("{}: {bytes} bytes; a disk has one or more sectors of 512 bytes, and nothing behind", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// No queue was asked for.
    #[error("a disk has at least one queue")]
    NoQueue,
    /// The id does not fit.
    #[error("an id has at most 20 bytes of printable ASCII: {id:?}")]
    Id {
        /// The one that was asked for.
        id: String,
    },
}

/// Sectors. Offsets and lengths are in bytes, within the size, and multiples of 512.
pub(super) trait Disk: Send + Sync {
    /// Fills all of `data`.
    fn read(&self, at: u64, data: &mut [u8]) -> io::Result<()>;
    /// Writes all of `data`.
    fn write(&self, at: u64, data: &[u8]) -> io::Result<()>;
    /// What was written is safe when this returns.
    fn sync(&self) -> io::Result<()>;
    /// Makes a hole, which reads as zeroes.
    fn punch(&self, at: u64, len: u64) -> io::Result<()>;
    /// Makes zeroes without a hole and without writing them.
    fn zero(&self, at: u64, len: u64) -> io::Result<()>;
}

/// A regular file or a block device, through the page cache, locked for as long as it is open.
#[derive(Debug)]
pub(super) struct FileDisk {
    file: File,
    /// Bytes.
    pub(super) size: u64,
    /// Bytes that the file system likes best.
    pub(super) block: u64,
}

fn is_disk(kind: FileType) -> bool {
    kind.is_file() || kind.is_block_device()
}

impl FileDisk {
    pub(super) fn open(path: &Path, read_only: bool) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Io { path: path.to_owned(), source };
        let in_use = || OpenError::InUse { path: path.to_owned() };
        let check = |metadata: Metadata| {
            let kind = metadata.file_type();
            if is_disk(kind) { Ok(metadata) } else { Err(OpenError::Kind { path: path.to_owned() }) }
        };
        // Looked at before it is opened: opening a pipe waits.
        let before = check(path.metadata().map_err(failed)?)?;
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only);
        if before.file_type().is_block_device() && !read_only {
            // Refused where it is mounted.
            options.custom_flags(OFlags::EXCL.bits().cast_signed());
        }
        let mut file = options.open(path).map_err(|source| match source.kind() {
            io::ErrorKind::ResourceBusy => in_use(),
            _ => failed(source),
        })?;
        let metadata = check(file.metadata().map_err(failed)?)?;
        let lock = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        retry_on_intr(|| flock(&file, lock)).map_err(|error| match error {
            Errno::WOULDBLOCK => in_use(),
            other => failed(other.into()),
        })?;
        // A block device's size, too.
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(OpenError::Size { path: path.to_owned(), bytes: size });
        }
        Ok(Self { file, size, block: metadata.blksize() })
    }

    fn fallocate(&self, mode: FallocateFlags, at: u64, len: u64) -> io::Result<()> {
        Ok(retry_on_intr(|| fallocate(&self.file, mode | FallocateFlags::KEEP_SIZE, at, len))?)
    }
}

impl Disk for FileDisk {
    fn read(&self, at: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, at)
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::PUNCH_HOLE, at, len)
    }

    fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::ZERO_RANGE, at, len)
    }
}
