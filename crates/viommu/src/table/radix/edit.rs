//! Insert and remove.

use super::Writer;
use super::arena::Arena;
use super::find::{Joined, keys};
use super::grow::Below;
use super::node::slot;
use super::word::{KEYS, Node, Word, key, mask, shift};
use crate::addr::IovaRange;
use crate::mapping::Mapping;
use crate::sync::{
    AtomicU64,
    Ordering::{Relaxed, Release},
};
use crate::table::{Cuts, InsertError, NoMemory, PAGE};

impl From<NoMemory> for InsertError {
    fn from(_: NoMemory) -> Self {
        Self::NoMemory
    }
}

/// Where one leaf can be put.
pub(crate) struct Vacancy {
    node: Node,
    at: usize,
}

impl Writer {
    /// Adds one mapping, visible to readers when this returns (page by page while it runs).
    #[inline]
    pub(crate) fn insert(&mut self, m: &Mapping) -> Result<(), InsertError> {
        debug_assert!(m.range.is_aligned(PAGE) && m.gpa.0.is_multiple_of(PAGE), "{m:?}");
        let (start, last) = (m.range.start().0, m.range.last().0);
        if self.promised == 0 && self.is_due() {
            self.collect();
        }
        let found = self.table.find(start);
        if found.entry.is_leaf() {
            return Err(InsertError::Overlap);
        }
        let entry = Word::first_leaf(m);
        match found.at {
            Some(at) if found.fits(start, last) => {
                self.table.arena.publish(at, entry);
                self.table.arena.gained(found.node, 1);
            }
            _ => {
                if last > start | mask(found.level) && self.is_taken(start, last) {
                    return Err(InsertError::Overlap);
                }
                self.insert_leaves(start, last, entry)?;
            }
        }
        self.mappings += 1;
        self.promised = self.promised.saturating_sub(1);
        Ok(())
    }

    /// The place of a mapping over `range` that is one leaf there and takes no room to be made. It is to be filled, or
    /// forgotten, before anything else is done.
    #[inline]
    pub(crate) fn vacancy(&mut self, range: IovaRange) -> Option<Vacancy> {
        debug_assert!(self.promised == 0);
        if self.is_due() {
            self.collect();
        }
        let found = self.table.find(range.start().0);
        let fits = !found.entry.is_leaf() && found.fits(range.start().0, range.last().0);
        found.at.filter(|_| fits).map(|at| Vacancy { node: found.node, at })
    }

    /// Adds `m` where [`vacancy`](Self::vacancy) found room for it.
    #[inline]
    pub(crate) fn fill_vacancy(&mut self, Vacancy { node, at }: Vacancy, m: &Mapping) {
        self.table.arena.publish(at, Word::first_leaf(m));
        self.table.arena.gained(node, 1);
        self.mappings += 1;
    }

    #[inline(never)]
    fn insert_leaves(&mut self, start: u64, last: u64, entry: Word) -> Result<(), NoMemory> {
        let mut below = Below::default();
        let place = if self.promised == 0 {
            self.reserve_one(start, last)?
        } else if let Ok(place) = self.make_way(start, last, &mut below) {
            place
        } else {
            // Never one of those that were reserved for: the reservation was given up.
            self.give_up();
            self.reserve_one(start, last)?
        };
        if let Some((node, at)) = place {
            self.table.arena.publish(at, entry);
            self.table.arena.gained(node, 1);
            return Ok(());
        }
        let (root, level) = self.root();
        self.fill(root, level, 0, (start, last), entry);
        Ok(())
    }

    /// Writes the leaves of the mapping `[start, last]`, which have their places.
    fn fill(&mut self, node: Node, level: u32, base: u64, (start, last): (u64, u64), entry: Word) {
        let (first_key, last_key) = keys(base, level, start, last);
        let mut more = 0;
        for key in first_key..=last_key {
            let Some((at, old)) = slot(self.table.arena.words(), node, key) else {
                debug_assert!(false, "room was made before");
                continue;
            };
            let iova = base + ((key as u64) << shift(level));
            let leaf = if iova <= start { entry } else { entry.continued(iova - start) };
            match old.child() {
                Some(child)
                    if iova < start || iova | mask(level) > last || self.table.arena.live(child) > 0 =>
                {
                    self.fill(child, level - 1, iova, (start, last), entry);
                }
                Some(child) => {
                    self.table.arena.publish(at, leaf);
                    self.retire(child, false);
                }
                None => {
                    self.table.arena.publish(at, leaf);
                    more += 1;
                }
            }
        }
        self.table.arena.gained(node, more);
    }

    /// Removes every mapping inside `range`, telling `gone` of each; refused when one would be cut.
    #[inline]
    pub(crate) fn remove(&mut self, range: IovaRange, mut gone: impl FnMut(Mapping)) -> Result<usize, Cuts> {
        let (start, last) = (range.start().0, range.last().0);
        if last == start | (PAGE - 1) {
            return Ok(self.remove_page(range)?.map(gone).iter().count());
        }
        let mut joined = Joined::default();
        let count = self.clear_all(range, &mut |iova, level, entry| {
            if let Some(m) = joined.leaf(iova, level, entry) {
                gone(m);
            }
        })?;
        if let Some(m) = joined.end() {
            gone(m);
        }
        Ok(count)
    }

    /// Removes every mapping inside `range`; refused when one would be cut.
    #[inline]
    pub(crate) fn remove_all_in(&mut self, range: IovaRange) -> Result<usize, Cuts> {
        let (start, last) = (range.start().0, range.last().0);
        if last == start | (PAGE - 1) {
            return Ok(usize::from(self.remove_page(range)?.is_some()));
        }
        self.clear_all(range, &mut |_, _, _| {})
    }

    /// Removes what is mapped in the page `range`; refused when it would be cut.
    #[inline]
    pub(crate) fn remove_page(&mut self, range: IovaRange) -> Result<Option<Mapping>, Cuts> {
        let (start, last) = (range.start().0, range.last().0);
        let word = self.remove_leaf(start, last)?;
        Ok(word.and_then(|word| word.mapping(start, last)))
    }

    fn remove_leaf(&mut self, start: u64, last: u64) -> Result<Option<Word>, Cuts> {
        let found = self.table.find(start);
        let (true, Some(at)) = (found.entry.is_leaf(), found.at) else { return Ok(None) };
        if !found.fits(start, last) || !found.entry.is_start() {
            return Err(Cuts);
        }
        let arena = &*self.table.arena;
        let next_key = key(start, 0) + 1;
        let goes_on = if next_key < KEYS {
            let next = slot(arena.words(), found.node, next_key).map_or(Word::NONE, |(_, entry)| entry);
            next.is_leaf() && !next.is_start()
        } else {
            last.checked_add(1).is_some_and(|next| self.is_inside(next))
        };
        if goes_on {
            return Err(Cuts);
        }
        arena.publish(at, vacated(found.node));
        if arena.lost(found.node, 1) {
            self.list(found.node, start & !mask(1), 0);
        }
        self.mappings -= 1;
        Ok(Some(found.entry))
    }

    fn clear_all(&mut self, range: IovaRange, gone: &mut impl FnMut(u64, u32, Word)) -> Result<usize, Cuts> {
        if self.cuts(range) {
            return Err(Cuts);
        }
        let (root, level) = self.root();
        let (from, last) = (range.start().0, range.last().0);
        if from & !mask(level + 1) != 0 {
            return Ok(0);
        }
        let table = self.table.clone();
        let count = self.clear(&table.arena, root, level, 0, (from, last), gone);
        self.mappings -= count;
        Ok(count)
    }

    /// Takes the leaves in `[from, last]` away; the number of mappings that began there.
    fn clear(
        &mut self,
        arena: &Arena,
        node: Node,
        level: u32,
        base: u64,
        (from, last): (u64, u64),
        gone: &mut impl FnMut(u64, u32, Word),
    ) -> usize {
        let (first_key, last_key) = keys(base, level, from, last);
        let (mut starts, mut fewer) = (0, 0);
        let mut visit = |key: usize, word: &AtomicU64, entry: Word, vacated: Word| {
            let iova = base + ((key as u64) << shift(level));
            if entry.is_leaf() {
                word.store(vacated.0, Release);
                fewer += 1;
                starts += usize::from(entry.is_start());
                gone(iova, level, entry);
            } else if let Some(child) = entry.child()
                && !arena.is_empty_table(child)
            {
                starts += self.clear(arena, child, level - 1, iova, (from, last), gone);
            }
        };
        if node.is_table() {
            let words = &arena.words()[node.index() + first_key..=node.index() + last_key];
            for (key, word) in (first_key..).zip(words) {
                visit(key, word, Word(word.load(Relaxed)), Word::NONE);
            }
        } else {
            let (sorted, count) = arena.sorted(node, first_key, last_key);
            for (key, at, entry) in &sorted[..count] {
                visit(*key, arena.word(*at), *entry, vacated(node));
            }
        }
        if fewer > 0 && arena.lost(node, fewer) {
            self.list(node, base, level);
        }
        starts
    }
}

/// What a removal leaves behind in `node`: a compact node's key keeps its place.
#[inline(always)]
pub(super) fn vacated(node: Node) -> Word {
    if node.is_table() { Word::NONE } else { Word::tomb(0) }
}
