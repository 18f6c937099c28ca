//! Insert and remove.

use super::Writer;
use super::find::{Joined, keys};
use super::grow::Below;
use super::node::slot;
use super::word::{KEYS, Node, Word, mask, shift};
use crate::addr::IovaRange;
use crate::mapping::Mapping;
use crate::sync::Ordering::{Relaxed, Release};
use crate::table::{Cuts, InsertError, NoMemory, PAGE};

impl From<NoMemory> for InsertError {
    fn from(_: NoMemory) -> Self {
        Self::NoMemory
    }
}

impl Writer {
    /// Adds one mapping, visible to readers when this returns (page by page while it runs).
    #[inline]
    pub(crate) fn insert(&mut self, m: &Mapping) -> Result<(), InsertError> {
        debug_assert!(m.range.is_aligned(PAGE) && m.gpa.0 % PAGE == 0, "{m:?}");
        let (start, last) = (m.range.start().0, m.range.last().0);
        let promised = self.promised > 0;
        if promised {
            self.promised -= 1;
        } else if self.is_due() {
            self.collect();
        }
        let found = self.table.find(start);
        if found.entry.is_leaf() {
            return Err(InsertError::Overlap);
        }
        let entry = Word::first_leaf(m);
        match found.at {
            Some(at) if found.fits(start, last) => {
                self.table.begin_change();
                self.table.arena.publish(at, entry);
                self.table.end_change();
                self.table.arena.gained(found.node, 1);
            }
            _ => {
                if last > start | mask(found.level) && self.is_taken(start, last) {
                    return Err(InsertError::Overlap);
                }
                self.insert_leaves(start, last, entry, promised)?;
            }
        }
        self.mappings += 1;
        Ok(())
    }

    #[inline(never)]
    fn insert_leaves(&mut self, start: u64, last: u64, entry: Word, promised: bool) -> Result<(), NoMemory> {
        if !promised {
            self.ticket = self.ticket.wrapping_add(1);
        }
        let mut below = Below::default(); // nothing is in the way
        if self.make_way(start, last, &mut below).is_err() {
            // Never one of those that were reserved for: the reservation was given up.
            self.promised = 0;
            self.reclaim_all();
            self.make_way(start, last, &mut below)?;
        }
        let (root, level) = self.root();
        self.table.begin_change();
        self.fill(root, level, 0, (start, last), entry);
        self.table.end_change();
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
    pub(crate) fn remove(&mut self, range: IovaRange, gone: &mut dyn FnMut(Mapping)) -> Result<usize, Cuts> {
        let (start, last) = (range.start().0, range.last().0);
        if last == start | (PAGE - 1) {
            return self.remove_page(start, last, gone);
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
    pub(crate) fn remove_all_in(&mut self, range: IovaRange) -> Result<usize, Cuts> {
        self.clear_all(range, &mut |_, _, _| {})
    }

    #[inline]
    fn remove_page(&mut self, start: u64, last: u64, gone: &mut dyn FnMut(Mapping)) -> Result<usize, Cuts> {
        let found = self.table.find(start);
        let (true, Some(at)) = (found.entry.is_leaf(), found.at) else { return Ok(0) };
        if !found.fits(start, last) || !found.entry.is_start() {
            return Err(Cuts);
        }
        let arena = &*self.table.arena;
        let goes_on = if found.node.is_table() && at + 1 < found.node.index() + KEYS {
            let next = arena.load(at + 1);
            next.is_leaf() && !next.is_start()
        } else {
            last.checked_add(1).is_some_and(|next| self.is_inside(next))
        };
        if goes_on {
            return Err(Cuts);
        }
        self.table.begin_change();
        arena.publish(at, vacated(found.node));
        self.table.end_change();
        if arena.lost(found.node, 1) {
            self.list(found.node, start & !mask(1), 0);
        }
        self.mappings -= 1;
        if let Some(m) = found.entry.mapping(start, last) {
            gone(m);
        }
        Ok(1)
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
        self.table.begin_change();
        let count = self.clear(root, level, 0, (from, last), gone);
        self.table.end_change();
        self.mappings -= count;
        Ok(count)
    }

    /// Takes the leaves in `[from, last]` away; the number of mappings that began there.
    fn clear(
        &mut self,
        node: Node,
        level: u32,
        base: u64,
        (from, last): (u64, u64),
        gone: &mut impl FnMut(u64, u32, Word),
    ) -> usize {
        let (first_key, last_key) = keys(base, level, from, last);
        let (mut starts, mut fewer) = (0, 0);
        let iova = |key: usize| base + ((key as u64) << shift(level));
        let vacated = vacated(node);
        if node.is_table() {
            let mut from_key = first_key;
            while let Some((key, child)) = {
                // leaf after leaf, up to a child
                let mut words =
                    self.table.arena.words()[node.index()..=node.index() + last_key].iter().enumerate();
                words.by_ref().take(from_key).for_each(drop);
                words.find_map(|(key, word)| {
                    let entry = Word(word.load(Relaxed));
                    if entry.is_leaf() {
                        word.store(vacated.0, Release);
                        fewer += 1;
                        starts += usize::from(entry.is_start());
                        gone(iova(key), level, entry);
                        return None;
                    }
                    entry.child().map(|child| (key, child))
                })
            } {
                starts += self.clear(child, level - 1, iova(key), (from, last), gone);
                from_key = key + 1;
            }
        } else {
            let (sorted, count) = self.table.arena.sorted(node, first_key, last_key);
            for (key, at, entry) in &sorted[..count] {
                if let Some(child) = entry.child() {
                    starts += self.clear(child, level - 1, iova(*key), (from, last), gone);
                } else {
                    self.table.arena.publish(*at, vacated);
                    fewer += 1;
                    starts += usize::from(entry.is_start());
                    gone(iova(*key), level, *entry);
                }
            }
        }
        if fewer > 0 && self.table.arena.lost(node, fewer) {
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
