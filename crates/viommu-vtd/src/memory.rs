//! The guest's memory, as the unit uses it: tables, descriptors, statuses.

use core::sync::atomic::{AtomicU64, Ordering};

use viommu::Gpa;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, VolatileMemory};

/// Bytes of a word of a table.
pub(crate) const WORD: u64 = 8;

/// Reads and writes whole words, each as one: a guest changes its tables while they are read.
pub(crate) trait TableMemory: Send + Sync {
    /// Fills `words` from `at` on, which is a multiple of 8; all inside one page. Whether all of it is memory.
    fn read(&self, at: Gpa, words: &mut [u64]) -> bool;

    /// Writes `new` at `at`, a multiple of 8, where `old` still is.
    fn exchange(&self, at: Gpa, old: u64, new: u64) -> Marked;

    /// Writes at `at`, a multiple of 4. Whether that is memory.
    fn write_u32(&self, at: Gpa, value: u32) -> bool;
}

/// What became of a word that was to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Marked {
    Done,
    /// Something else is there by now.
    Changed,
    /// There is no memory.
    Nowhere,
}

/// Any memory of vm-memory.
pub(crate) struct Adapter<M>(pub(crate) M);

impl<M> TableMemory for Adapter<M>
where
    M: GuestAddressSpace + Send + Sync,
    M::M: GuestMemoryBackend,
{
    fn read(&self, at: Gpa, words: &mut [u64]) -> bool {
        let memory = self.0.memory();
        if let [word] = words {
            let read = GuestMemoryBackend::get_slice(&*memory, GuestAddress(at.0), size_of::<u64>())
                .and_then(|slice| Ok(slice.load::<u64>(0, Ordering::Acquire)?));
            *word = read.as_ref().map_or(0, |read| u64::from_le(*read));
            return read.is_ok();
        }
        let bytes = words.len().saturating_mul(size_of::<u64>());
        let Ok(slice) = GuestMemoryBackend::get_slice(&*memory, GuestAddress(at.0), bytes) else {
            return false;
        };
        let places = (0..).step_by(size_of::<u64>());
        words.iter_mut().zip(places).all(|(word, place)| {
            let read = slice.load::<u64>(place, Ordering::Acquire);
            *word = read.as_ref().map_or(0, |read| u64::from_le(*read));
            read.is_ok()
        })
    }

    fn exchange(&self, at: Gpa, old: u64, new: u64) -> Marked {
        let memory = self.0.memory();
        let slice = GuestMemoryBackend::get_slice(&*memory, GuestAddress(at.0), size_of::<u64>());
        let Ok(slice) = slice else { return Marked::Nowhere };
        let Ok(word) = slice.get_atomic_ref::<AtomicU64>(0) else { return Marked::Nowhere };
        let outcome = word.compare_exchange(old.to_le(), new.to_le(), Ordering::AcqRel, Ordering::Acquire);
        if outcome.is_err() {
            return Marked::Changed;
        }
        slice.bitmap().mark_dirty(0, size_of::<u64>());
        Marked::Done
    }

    fn write_u32(&self, at: Gpa, value: u32) -> bool {
        let memory = self.0.memory();
        let slice = GuestMemoryBackend::get_slice(&*memory, GuestAddress(at.0), size_of::<u32>());
        slice.is_ok_and(|slice| slice.store::<u32>(value.to_le(), 0, Ordering::Release).is_ok())
    }
}

/// One word.
pub(crate) fn word(memory: &dyn TableMemory, at: Option<u64>) -> Option<u64> {
    let mut words = [0];
    memory.read(Gpa(at?), &mut words).then_some(())?;
    let [word] = words;
    Some(word)
}
