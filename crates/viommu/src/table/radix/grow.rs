//! Room for what comes: nodes and keys for mappings that are about to be inserted.
//!
//! Making room changes nothing that can be looked up. It is where an insertion can fail; writing the leaves cannot.

use super::Writer;
use super::find::{Found, keys};
use super::node::slot;
use super::slab::Stock;
use super::word::{KEYS, Kind, Node, Word, key, mask, shift};
use crate::mapping::Mapping;
use crate::sync::Ordering::Release;
use crate::table::NoMemory;

impl Found {
    /// Whether `[start, last]` is one leaf at just this place.
    #[inline(always)]
    pub(super) fn fits(&self, start: u64, last: u64) -> bool {
        self.at.is_some() && start & mask(self.level) == 0 && last == start | mask(self.level)
    }
}

/// Nodes that cannot be linked yet, for a larger leaf is in their place until it is removed.
#[derive(Default)]
pub(super) struct Below {
    nodes: usize,
    /// Entries, of each node at most as many as make it one of the next kind.
    to_middle: usize,
    to_table: usize,
}

/// Fewer entries than these never make a line a middle node, and that a table (`Kind::holding` of two more).
const TO_MIDDLE: usize = 7;
const TO_TABLE: usize = 27;

impl Below {
    /// Counts the nodes that `[from, last]` needs from the node of `level` at `base` on.
    fn add(&mut self, base: u64, level: u32, (from, last): (u64, u64)) {
        let (first_key, last_key) = keys(base, level, from, last);
        self.nodes += 1;
        let entries = last_key - first_key + 1;
        self.to_middle += entries.min(TO_MIDDLE);
        self.to_table += entries.min(TO_TABLE);
        let iova = |key: usize| base + ((key as u64) << shift(level));
        let is_whole = |key: usize| from <= iova(key) && iova(key) | mask(level) <= last;
        if level > 0 && !is_whole(first_key) {
            self.add(iova(first_key), level - 1, (from, last));
        }
        if level > 0 && first_key != last_key && !is_whole(last_key) {
            self.add(iova(last_key), level - 1, (from, last));
        }
    }

    /// Several mappings may share a node and make it grow together.
    fn stock(&self) -> Stock {
        Stock { lines: self.nodes, middles: self.to_middle / TO_MIDDLE, tables: self.to_table / TO_TABLE }
    }
}

/// Fills a node that no reader knows yet.
struct Filler<'a> {
    writer: &'a Writer,
    node: Node,
    used: usize,
}

impl Filler<'_> {
    fn put(&mut self, key: usize, entry: Word) {
        let arena = &*self.writer.table.arena;
        if !self.node.is_table() {
            arena.give_slot(self.node, self.used, key, entry);
            self.used += 1;
        } else if entry.is_live() {
            arena.publish(self.node.index() + key, entry);
            arena.gained(self.node, 1);
        }
    }
}

impl Writer {
    /// Makes sure that inserting `additions` once, after any removals, cannot fail for want of memory. Holds until
    /// they are inserted or until the next call, whichever comes first; with no `additions`, it gives up the
    /// reservation before. An insertion without a reservation must not come in between.
    pub(crate) fn reserve(&mut self, additions: &[Mapping]) -> Result<(), NoMemory> {
        self.give_up();
        if self.is_due() {
            self.collect();
        }
        if self.promise(additions).is_err() {
            self.promised = 1; // not kept
            self.give_up();
            self.reclaim_all();
            if let Err(e) = self.promise(additions) {
                self.promised = 1;
                self.give_up();
                return Err(e);
            }
        }
        self.promised = additions.len();
        Ok(())
    }

    /// Ends a reservation. What was made for insertions that have not come is to be reclaimed.
    #[inline]
    pub(crate) fn give_up(&mut self) {
        if self.promised > 0 && !self.fresh.is_empty() {
            for entry in std::mem::take(&mut self.fresh) {
                self.list_if_empty(entry);
            }
        }
        self.fresh.clear();
        self.promised = 0;
    }

    /// Room for one insertion that follows at once. A single page's node and place.
    pub(super) fn reserve_one(&mut self, start: u64, last: u64) -> Result<Option<(Node, usize)>, NoMemory> {
        self.fresh.clear();
        self.ticket = self.ticket.wrapping_add(1);
        let mut made = self.make_way(start, last, &mut Below::default());
        for again in [true, false] {
            if made.is_ok() {
                break;
            }
            self.promised = 1; // not kept
            self.give_up();
            if again {
                self.reclaim_all();
                made = self.make_way(start, last, &mut Below::default());
            }
        }
        made
    }

    fn promise(&mut self, additions: &[Mapping]) -> Result<(), NoMemory> {
        self.ticket = self.ticket.wrapping_add(1);
        let mut below = Below::default();
        for m in additions {
            let (start, last) = (m.range.start().0, m.range.last().0);
            let found = self.table.find(start);
            match found.at {
                Some(at) if found.fits(start, last) => self.claim(found.node, at, found.entry),
                _ => {
                    self.make_way(start, last, &mut below)?;
                }
            }
        }
        self.slab.stock(below.stock())
    }

    /// Marks a place as one that is needed, should its node be copied while room is made for others.
    #[inline(always)]
    fn claim(&self, node: Node, at: usize, entry: Word) {
        if !node.is_table() && !entry.is_live() {
            self.table.arena.publish(at, Word::tomb(self.ticket));
        }
    }

    /// Room for every leaf of `[start, last]`, as far as no larger leaf is in the way: those go to `below`. A single
    /// page's node and place.
    pub(super) fn make_way(
        &mut self,
        start: u64,
        last: u64,
        below: &mut Below,
    ) -> Result<Option<(Node, usize)>, NoMemory> {
        self.raise(last)?;
        if last == start | mask(0) {
            return self.place(start, below);
        }
        let (root, level) = self.root();
        self.prepare(root, 0, level, 0, (start, last), below)?;
        Ok(None)
    }

    /// What `prepare` does, for one page.
    fn place(&mut self, iova: u64, below: &mut Below) -> Result<Option<(Node, usize)>, NoMemory> {
        let (mut node, mut level) = self.root();
        let mut name = 0;
        let mut made = false;
        loop {
            let key = key(iova, level);
            let mut found = slot(self.table.arena.words(), node, key);
            if found.is_none() {
                node = self.make_room(node, name, key, key)?;
                found = slot(self.table.arena.words(), node, key);
            }
            let Some((at, entry)) = found else {
                debug_assert!(false, "room was just made");
                return Err(NoMemory);
            };
            if level == 0 {
                self.claim(node, at, entry);
                return Ok(Some((node, at)));
            }
            if entry.is_leaf() {
                below.add(iova & !mask(level), level - 1, (iova, iova | mask(0)));
                return Ok(None);
            }
            let parent = node;
            node = match entry.child() {
                Some(child) => child,
                None => {
                    let child = self.slab.alloc(Kind::Line)?;
                    self.table.arena.publish(at, child.word());
                    self.table.arena.gained(parent, 1);
                    if made {
                        self.fresh.pop(); // not empty any more
                    }
                    made = true;
                    self.fresh.push(iova & !mask(level) | u64::from(level - 1));
                    child
                }
            };
            name = at;
            level -= 1;
        }
    }

    /// Levels up to `last`.
    fn raise(&mut self, last: u64) -> Result<(), NoMemory> {
        loop {
            let (root, level) = self.root();
            if last & !mask(level + 1) == 0 {
                return Ok(());
            }
            let above = self.slab.alloc(Kind::Table)?;
            let arena = &*self.table.arena;
            arena.publish(above.index(), root.word());
            arena.gained(above, 1);
            self.table.root.store(above.rooted(level + 1), Release);
            if arena.live(root) == 0 && !arena.is_listed(root) {
                self.list(root, 0, level);
            }
        }
    }

    /// `at`: the word that names `node`.
    fn prepare(
        &mut self,
        node: Node,
        at: usize,
        level: u32,
        base: u64,
        (from, last): (u64, u64),
        below: &mut Below,
    ) -> Result<(), NoMemory> {
        let (first_key, last_key) = keys(base, level, from, last);
        let node = self.make_room(node, at, first_key, last_key)?;
        for key in first_key..=last_key {
            let Some((at, entry)) = slot(self.table.arena.words(), node, key) else {
                debug_assert!(false, "room was just made");
                return Err(NoMemory);
            };
            let iova = base + ((key as u64) << shift(level));
            let whole = level == 0 || from <= iova && iova | mask(level) <= last;
            match entry.child() {
                Some(child) if !whole || self.table.arena.live(child) > 0 => {
                    self.prepare(child, at, level - 1, iova, (from, last), below)?;
                }
                None if !whole && entry.is_leaf() => below.add(iova, level - 1, (from, last)),
                None if !whole => {
                    let (first, last_below) = keys(iova, level - 1, from, last);
                    let child = self.slab.alloc(Kind::holding(last_below - first + 1))?;
                    self.table.arena.publish(at, child.word());
                    self.table.arena.gained(node, 1);
                    let done = self.prepare(child, at, level - 1, iova, (from, last), below);
                    // It may stay empty: what it is for may never come.
                    if self.table.arena.live(child) == 0 {
                        self.fresh.push(iova | u64::from(level - 1));
                    }
                    done?;
                }
                _ => {} // a leaf will be here
            }
        }
        Ok(())
    }

    /// A place in `node` for each of the keys. A compact node without room is replaced by a copy: readers on the old
    /// one find there what they would have found before.
    fn make_room(
        &mut self,
        node: Node,
        at: usize,
        first_key: usize,
        last_key: usize,
    ) -> Result<Node, NoMemory> {
        if node.is_table() {
            return Ok(node);
        }
        if first_key == last_key
            && let Some((at, entry)) = slot(self.table.arena.words(), node, first_key)
        {
            self.claim(node, at, entry);
            return Ok(node);
        }
        let wanted = first_key..=last_key;
        let mut missing = last_key - first_key + 1;
        let mut size = missing;
        let mut used = 0;
        for (at, key, entry) in self.table.arena.slots(node) {
            used += 1;
            if wanted.contains(&key) {
                missing -= 1;
                self.claim(node, at, entry);
            } else if self.is_kept(entry) {
                size += 1;
            }
        }
        let arena = &*self.table.arena;
        if missing == 0 {
            return Ok(node);
        }
        let place = Word::tomb(self.ticket);
        if missing <= arena.slots_in_all(node) - used {
            for key in wanted {
                if slot(arena.words(), node, key).is_none() {
                    arena.give_slot(node, used, key, place);
                    used += 1;
                }
            }
            return Ok(node);
        }
        // Some room to spare, so that keys that come and go do not make a copy each time.
        let new = self.slab.alloc(Kind::holding(size + 2))?;
        let arena = &*self.table.arena;
        let mut filler = Filler { writer: self, node: new, used: 0 };
        for (_, key, entry) in arena.slots(node) {
            if self.is_kept(entry) && !wanted.contains(&key) {
                filler.put(key, entry);
            }
        }
        for key in wanted {
            let old = slot(arena.words(), node, key).map(|(_, entry)| entry);
            filler.put(key, old.filter(|e| e.is_live()).unwrap_or(place));
        }
        arena.set_listed(new, arena.is_listed(node));
        arena.publish(at, new.word());
        self.retire(node, true);
        Ok(new)
    }

    /// Whether a copy of a node needs this entry: it is live, or the places now being made include it.
    fn is_kept(&self, entry: Word) -> bool {
        entry.is_live() || entry == Word::tomb(self.ticket)
    }

    /// A smaller copy of a sparse node; `None` when there is no memory for it.
    pub(super) fn shrunk(&mut self, node: Node, live: usize) -> Option<Node> {
        let new = self.slab.alloc(Kind::holding(live + 2)).ok()?;
        let arena = &*self.table.arena;
        let mut filler = Filler { writer: self, node: new, used: 0 };
        if node.is_table() {
            for key in 0..KEYS {
                let entry = arena.load(node.index() + key);
                if entry.is_live() {
                    filler.put(key, entry);
                }
            }
        } else {
            arena
                .slots(node)
                .filter(|(_, _, entry)| entry.is_live())
                .for_each(|(_, key, entry)| filler.put(key, entry));
        }
        Some(new)
    }
}
