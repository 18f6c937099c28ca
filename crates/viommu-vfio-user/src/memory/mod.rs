//! Guest memory as one client gives it: windows of its files, mapped into this process.

mod window;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestRegionCollection};

use crate::spec::DmaFlags;
use window::{Latch, identity};

pub use window::{PAGE, Region, WindowError};

/// The memory that a client has given, by the addresses it gave.
pub type Memory = GuestRegionCollection<Region>;

/// How much a client may give.
#[derive(Clone, Copy, Debug)]
pub struct WindowLimits {
    /// Windows at a time. Each costs a mapping of this process, of which Linux allows 65530 in all by default.
    pub windows: usize,
    /// Files that they lie in. Each costs a descriptor of this process.
    pub files: usize,
    /// Bytes of them all. They cost addresses of this process, of which it has 128 TiB in all on most machines.
    pub bytes: u64,
    /// Also take memory that can go away under our hands: files that are not sealed against shrinking, and huge pages,
    /// of which there may be none when one is touched. A client that lets that happen kills this process: only for
    /// clients that are trusted.
    pub allow_unsealed: bool,
}

impl Default for WindowLimits {
    fn default() -> Self {
        Self { windows: 4096, files: 256, bytes: 1 << 43, allow_unsealed: false }
    }
}

/// The windows of one connection, shared with the devices that use them: clones are the same windows.
///
/// As a `GuestAddressSpace` it is the client's memory, untranslated. What [`GuestAddressSpace::memory`] returned keeps
/// the windows of that moment, so nobody keeps it for longer than a batch: [`Windows::unmap`] waits for it.
///
/// A window that comes without a descriptor, or that the device may only read, is kept in the books, so that it can be
/// unmapped, and is reached by no device.
#[derive(Clone, Debug)]
pub struct Windows(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    memory: GuestMemoryAtomic<Memory>,
    limits: WindowLimits,
    books: Mutex<Books>,
}

#[derive(Debug, Default)]
struct Books {
    /// Start to bytes, and what says that it is gone; none where there is no memory.
    windows: BTreeMap<u64, (u64, Option<Latch>)>,
    /// Bytes of those with memory.
    bytes: u64,
    /// By device and inode: windows of one file share its descriptor.
    files: HashMap<(u64, u64), Weak<File>>,
}

impl Books {
    /// The file, or the one that is there already and is the same.
    fn share(&mut self, file: File, most: usize) -> Result<Arc<File>, WindowError> {
        let key = identity(&file)?;
        if let Some(known) = self.files.get(&key).and_then(Weak::upgrade) {
            return Ok(known);
        }
        self.files.retain(|_, file| file.strong_count() > 0);
        if self.files.len() >= most {
            return Err(WindowError::TooManyFiles(most));
        }
        let file = Arc::new(file);
        self.files.insert(key, Arc::downgrade(&file));
        Ok(file)
    }
}

/// A window as the books have it. Its end is not included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its first address.
    pub address: u64,
    /// Its bytes, whole pages, so that its last byte is not behind 2^64-1.
    pub size: u64,
    /// Whether devices reach it.
    pub memory: bool,
}

impl Windows {
    /// No windows yet.
    #[must_use]
    pub fn new(limits: WindowLimits) -> Self {
        let memory = GuestMemoryAtomic::new(Memory::default());
        Self(Arc::new(Shared { memory, limits, books: Mutex::default() }))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // Nothing that is done under this lock panics.
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is, ascending.
    #[must_use]
    pub fn list(&self) -> Vec<Window> {
        let window = |(address, (size, latch)): (&u64, &(u64, Option<Latch>))| Window {
            address: *address,
            size: *size,
            memory: latch.is_some(),
        };
        self.books().windows.iter().map(window).collect()
    }

    /// DMA_MAP: adds a window. Gives whether devices reach it.
    ///
    /// # Errors
    /// See [`WindowError`]. Nothing has changed then.
    pub fn map(
        &self,
        flags: u32,
        file: Option<File>,
        offset: u64,
        address: u64,
        size: u64,
    ) -> Result<Window, WindowError> {
        let flags = DmaFlags::from_bits_retain(flags);
        let defined = DmaFlags::READ | DmaFlags::WRITE | DmaFlags::MMAP | DmaFlags::FILE_IO;
        let needs_file = flags.intersects(DmaFlags::MMAP | DmaFlags::FILE_IO);
        if !defined.contains(flags) || (needs_file && file.is_none()) {
            return Err(WindowError::Flags(flags.bits()));
        }
        let pages = address.is_multiple_of(PAGE) && size.is_multiple_of(PAGE) && offset.is_multiple_of(PAGE);
        let last = size.checked_sub(1).and_then(|bytes| address.checked_add(bytes));
        let last = last.filter(|_| pages).ok_or(WindowError::Unaligned)?;
        let mut books = self.books();
        let below = books.windows.range(..=last).next_back();
        if below.is_some_and(|(start, (bytes, _))| start.saturating_add(bytes.saturating_sub(1)) >= address) {
            return Err(WindowError::Overlap);
        }
        if books.windows.len() >= self.0.limits.windows {
            return Err(WindowError::TooMany(self.0.limits.windows));
        }
        let writable = flags.contains(DmaFlags::READ | DmaFlags::WRITE);
        let latch = match file.filter(|_| writable) {
            None => None,
            Some(file) => {
                let WindowLimits { files, bytes, allow_unsealed, .. } = self.0.limits;
                let total = books.bytes.checked_add(size).filter(|total| *total <= bytes);
                let total = total.ok_or(WindowError::TooMuch(bytes))?;
                let file = books.share(file, files)?;
                let (region, latch) = Region::map(file, offset, address, size, allow_unsealed)?;
                let added = self.0.memory.memory().insert_region(Arc::new(region));
                self.replace(added.map_err(|_| WindowError::Overlap)?);
                books.bytes = total;
                Some(latch)
            }
        };
        let memory = latch.is_some();
        books.windows.insert(address, (size, latch));
        Ok(Window { address, size, memory })
    }

    /// DMA_UNMAP: takes away the window with exactly these bounds. `between` is called when devices cannot find it any
    /// more, and before anybody is waited for. Returns when nobody uses it and its memory is unmapped from this process.
    ///
    /// # Errors
    /// [`WindowError::Unknown`]; nothing has changed then.
    pub fn unmap(&self, address: u64, size: u64, between: impl FnOnce(Window)) -> Result<(), WindowError> {
        let latch = {
            let mut books = self.books();
            let known = books.windows.get(&address).is_some_and(|(bytes, _)| *bytes == size);
            let gone = known.then(|| books.windows.remove(&address)).flatten();
            let (_, latch) = gone.ok_or(WindowError::Unknown)?;
            if latch.is_some() {
                books.bytes = books.bytes.saturating_sub(size);
                let memory = self.0.memory.memory();
                if let Ok((rest, region)) = memory.remove_region(vm_memory::GuestAddress(address), size) {
                    drop((memory, region));
                    self.replace(rest);
                }
            }
            latch
        };
        between(Window { address, size, memory: latch.is_some() });
        if let Some(latch) = latch {
            latch.wait();
        }
        Ok(())
    }

    /// Takes all windows away, as [`Self::unmap`] does each.
    pub fn clear(&self, mut between: impl FnMut(Window)) {
        for Window { address, size, .. } in self.list() {
            // Nobody else removes windows; one that is gone is what is wanted.
            let _gone = self.unmap(address, size, &mut between);
        }
    }

    fn replace(&self, memory: Memory) {
        // Nothing can panic under this lock; what is replaced is whole.
        self.0.memory.lock().unwrap_or_else(PoisonError::into_inner).replace(memory);
    }
}

impl GuestAddressSpace for Windows {
    type M = Memory;
    type T = GuestMemoryLoadGuard<Memory>;

    fn memory(&self) -> Self::T {
        self.0.memory.memory()
    }
}

#[cfg(test)]
mod tests;
