//! The words of all records of one unit.
//!
//! One reservation of the whole cap. It is asked of the allocator zeroed and with an alignment of 8, which makes it
//! address space until it is touched. Words are named by index; an index that was once good stays good.

#[cfg(not(shuttle))]
use zerocopy::FromZeros;

use super::word::KEYS;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering::Relaxed, lock};
use crate::table::{NoMemory, PAGE};

/// Keeps what is inside away from its neighbours' cache lines (which are fetched in pairs).
#[repr(align(128))]
pub(super) struct Apart<T>(pub(super) T);

/// Names a page of the arena. Page 0 is never handed out and stays zero.
pub(super) type Page = u32;

/// Memory of all records of one unit, up to a cap in bytes.
pub(crate) struct Arena {
    words: Box<[AtomicU64]>,
    /// The first word of page 0: on a page boundary, so that no node lies across cache lines.
    first: usize,
    /// Two words a page, its owner's: state and links.
    notes: Box<[AtomicU64]>,
    pool: Apart<Mutex<Pool>>,
}

struct Pool {
    /// Pages from here on were never handed out.
    fresh: Page,
    /// Pages there are, page 0 included.
    end: Page,
    /// Head of the list of pages that came back, all zero.
    returned: Page,
    used: u64,
    #[cfg(test)]
    refuses: bool,
}

impl Arena {
    /// An arena of at most `bytes` (rounded down to 4 KiB); an error when the address space for it is refused.
    pub(crate) fn new(bytes: u64) -> Result<Arc<Self>, NoMemory> {
        let pages = usize::try_from(bytes / PAGE).map_err(|_| NoMemory)?.checked_add(1).ok_or(NoMemory)?;
        let end = Page::try_from(pages).map_err(|_| NoMemory)?;
        // One page more: the allocator's own header moves the first page boundary in.
        let words = zeroed(pages.checked_add(1).and_then(|p| p.checked_mul(KEYS)).ok_or(NoMemory)?)?;
        let notes = zeroed(pages.checked_mul(2).ok_or(NoMemory)?)?;
        let first = to_page_boundary(&words);
        let pool = Apart(Mutex::new(Pool {
            fresh: 1,
            end,
            returned: 0,
            used: 0,
            #[cfg(test)]
            refuses: false,
        }));
        Ok(Arc::new(Self { words, first, notes, pool }))
    }

    /// Bytes handed out and not returned.
    pub(crate) fn used(&self) -> u64 {
        lock(&self.pool.0).used
    }

    /// All words, for readers: what they find in them is looked up with `get`.
    #[inline(always)]
    pub(super) fn words(&self) -> &[AtomicU64] {
        &self.words
    }

    /// A word that the writer knows to exist.
    #[inline(always)]
    pub(super) fn word(&self, index: usize) -> &AtomicU64 {
        &self.words[index]
    }

    /// The first word of a page.
    #[inline(always)]
    pub(super) fn index_of(&self, page: Page) -> usize {
        self.first + page as usize * KEYS
    }

    /// The page of a word.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "pages are counted in 32 bits")]
    pub(super) fn page_of(&self, index: usize) -> Page {
        ((index - self.first) / KEYS) as Page
    }

    /// What the owner notes of a page: children of a table, or free nodes.
    #[inline(always)]
    pub(super) fn state(&self, page: Page) -> &AtomicU64 {
        &self.notes[page as usize * 2]
    }

    /// The owner's links of a page.
    #[inline(always)]
    pub(super) fn link(&self, page: Page) -> &AtomicU64 {
        &self.notes[page as usize * 2 + 1]
    }

    /// Hands out a page of zeroes; `None` at the cap.
    pub(super) fn take(&self) -> Option<Page> {
        let mut pool = lock(&self.pool.0);
        #[cfg(test)]
        if pool.refuses {
            return None;
        }
        let page = match pool.returned {
            0 if pool.fresh < pool.end => {
                pool.fresh += 1;
                pool.fresh - 1
            }
            0 => return None,
            page => {
                pool.returned = narrow(self.link(page).load(Relaxed));
                page
            }
        };
        pool.used += PAGE;
        Some(page)
    }

    /// As if the cap were reached.
    #[cfg(test)]
    pub(super) fn refuse(&self, refuses: bool) {
        lock(&self.pool.0).refuses = refuses;
    }

    /// Takes back pages, which must be zero and out of every reader's reach.
    pub(super) fn give(&self, pages: impl Iterator<Item = Page>) {
        let mut pool = lock(&self.pool.0);
        for page in pages {
            self.link(page).store(u64::from(pool.returned), Relaxed);
            pool.returned = page;
            pool.used -= PAGE;
        }
    }

    /// Zeroes `count` words, which must be out of every reader's reach.
    pub(super) fn wipe(&self, index: usize, count: usize) {
        for word in &self.words[index..index + count] {
            word.store(0, Relaxed);
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is a page")]
pub(super) fn narrow(link: u64) -> Page {
    link as Page
}

#[cfg(not(shuttle))]
fn zeroed(words: usize) -> Result<Box<[AtomicU64]>, NoMemory> {
    <[AtomicU64]>::new_box_zeroed_with_elems(words).map_err(|_| NoMemory)
}

#[cfg(shuttle)]
#[expect(clippy::unnecessary_wraps, reason = "the other one can fail")]
fn zeroed(words: usize) -> Result<Box<[AtomicU64]>, NoMemory> {
    Ok((0..words).map(|_| AtomicU64::new(0)).collect())
}

/// Words up to the first page boundary.
#[cfg(not(shuttle))]
fn to_page_boundary(words: &[AtomicU64]) -> usize {
    (KEYS - words.as_ptr().addr() / size_of::<AtomicU64>() % KEYS) % KEYS
}

/// The stand-in's words have another size: alignment means nothing.
#[cfg(shuttle)]
fn to_page_boundary(_: &[AtomicU64]) -> usize {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_handed_out_to_the_cap_and_come_back() {
        let arena = Arena::new(4 * PAGE + 7).unwrap();
        let pages: Vec<Page> = std::iter::from_fn(|| arena.take()).collect();
        assert_eq!(pages, [1, 2, 3, 4]);
        assert_eq!(arena.used(), 4 * PAGE);
        arena.give(pages.into_iter().skip(1));
        assert_eq!(arena.used(), PAGE);
        assert_eq!(std::iter::from_fn(|| arena.take()).count(), 3);
    }

    #[test]
    fn every_page_lies_on_a_page_boundary() {
        let arena = Arena::new(3 * PAGE).unwrap();
        for page in 0..4 {
            let at = arena.index_of(page);
            assert_eq!(std::ptr::from_ref(arena.word(at)).addr() % 4096, 0);
            assert_eq!(arena.page_of(at + KEYS - 1), page);
        }
    }

    #[test]
    fn a_cap_beyond_the_address_space_is_refused() {
        assert_eq!(Arena::new(u64::MAX).err(), Some(NoMemory));
    }
}
