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
/// A window that comes without a descriptor is kept in the books, so that it can be unmapped, and is reached by no device.
/// One that devices may only read is not in here, but in [`Windows::with_read_only`].
#[derive(Clone, Debug)]
pub struct Windows(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    memory: GuestMemoryAtomic<Memory>,
    /// With windows that may only be read.
    all: GuestMemoryAtomic<Memory>,
    limits: WindowLimits,
    books: Mutex<Books>,
}

#[derive(Debug, Default)]
struct Books {
    /// By their start.
    windows: BTreeMap<u64, Entry>,
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
    /// Whether they may only read it.
    pub read_only: bool,
}

/// What the books have of a window.
#[derive(Clone, Debug)]
struct Entry {
    size: u64,
    /// What says that it is gone; none where there is no memory.
    latch: Option<Latch>,
    read_only: bool,
}

impl Entry {
    fn window(&self, address: u64) -> Window {
        Window { address, size: self.size, memory: self.latch.is_some(), read_only: self.read_only }
    }
}

/// All windows with memory, those that may only be read among them: for those who hold who may write where elsewhere, as an
/// endpoint's view does over backing that is a ROM. Nothing here keeps them from writing. A handle, as [`Windows`] is.
#[derive(Clone, Debug)]
pub struct AllWindows(Windows);

impl GuestAddressSpace for AllWindows {
    type M = Memory;
    type T = GuestMemoryLoadGuard<Memory>;

    fn memory(&self) -> Self::T {
        self.0.0.all.memory()
    }
}

impl Windows {
    /// No windows yet.
    #[must_use]
    pub fn new(limits: WindowLimits) -> Self {
        let memory = || GuestMemoryAtomic::new(Memory::default());
        Self(Arc::new(Shared { memory: memory(), all: memory(), limits, books: Mutex::default() }))
    }

    /// These, and windows that may only be read.
    #[must_use]
    pub fn with_read_only(&self) -> AllWindows {
        AllWindows(self.clone())
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // Nothing that is done under this lock panics.
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is, ascending.
    #[must_use]
    pub fn list(&self) -> Vec<Window> {
        self.books().windows.iter().map(|(address, entry)| entry.window(*address)).collect()
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
        if below.is_some_and(|(start, entry)| start.saturating_add(entry.size.saturating_sub(1)) >= address) {
            return Err(WindowError::Overlap);
        }
        if books.windows.len() >= self.0.limits.windows {
            return Err(WindowError::TooMany(self.0.limits.windows));
        }
        // One that may only be written can be read all the same: memory of a process is not made so.
        let read_only = flags & (DmaFlags::READ | DmaFlags::WRITE) == DmaFlags::READ;
        let reached = flags.intersects(DmaFlags::READ | DmaFlags::WRITE);
        let latch = match file.filter(|_| reached) {
            None => None,
            Some(file) => match self.insert(&mut books, file, offset, address, size, read_only) {
                Ok(latch) => Some(latch),
                // What is only read may be a file of any kind: a client that sends its ROMs goes on.
                Err(_) if read_only => None,
                Err(error) => return Err(error),
            },
        };
        let entry = Entry { size, latch, read_only };
        let window = entry.window(address);
        books.windows.insert(address, entry);
        Ok(window)
    }

    fn insert(
        &self,
        books: &mut Books,
        file: File,
        offset: u64,
        address: u64,
        size: u64,
        read_only: bool,
    ) -> Result<Latch, WindowError> {
        let WindowLimits { files, bytes, allow_unsealed, .. } = self.0.limits;
        let total = books.bytes.checked_add(size).filter(|total| *total <= bytes);
        let total = total.ok_or(WindowError::TooMuch(bytes))?;
        let file = books.share(file, files)?;
        let (region, latch) = Region::map(file, offset, address, size, allow_unsealed)?;
        let region = Arc::new(region);
        for space in self.spaces(read_only) {
            let added = space.memory().insert_region(region.clone()).map_err(|_| WindowError::Overlap)?;
            replace(space, added);
        }
        books.bytes = total;
        Ok(latch)
    }

    /// Where a window of that kind is found.
    fn spaces(&self, read_only: bool) -> impl Iterator<Item = &GuestMemoryAtomic<Memory>> {
        [&self.0.all].into_iter().chain((!read_only).then_some(&self.0.memory))
    }

    /// DMA_UNMAP: takes away the window with exactly these bounds. `between` is called when devices cannot find it any
    /// more, and before anybody is waited for. Returns when nobody uses it and its memory is unmapped from this process.
    ///
    /// # Errors
    /// [`WindowError::Unknown`]; nothing has changed then.
    pub fn unmap(&self, address: u64, size: u64, between: impl FnOnce(Window)) -> Result<(), WindowError> {
        let entry = {
            let mut books = self.books();
            let known = books.windows.get(&address).is_some_and(|entry| entry.size == size);
            let gone = known.then(|| books.windows.remove(&address)).flatten();
            let entry = gone.ok_or(WindowError::Unknown)?;
            if entry.latch.is_some() {
                books.bytes = books.bytes.saturating_sub(size);
                for space in self.spaces(entry.read_only) {
                    let memory = space.memory();
                    if let Ok((rest, region)) = memory.remove_region(vm_memory::GuestAddress(address), size) {
                        drop((memory, region));
                        replace(space, rest);
                    }
                }
            }
            entry
        };
        between(entry.window(address));
        if let Some(latch) = entry.latch {
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
}

fn replace(space: &GuestMemoryAtomic<Memory>, memory: Memory) {
    // Nothing can panic under this lock; what is replaced is whole.
    space.lock().unwrap_or_else(PoisonError::into_inner).replace(memory);
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
