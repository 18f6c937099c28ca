//! Looking into the record with the writer in hand: leaves, mappings, order.

use std::ops::ControlFlow;

use super::node::{entry, slot};
use super::word::{KEYS, Node, Word, key, mask, shift};
use super::{Table, Writer};
use crate::addr::{Iova, IovaRange};
use crate::mapping::Mapping;
use crate::sync::Ordering::Relaxed;

/// Where the walk for an address ended.
#[derive(Clone, Copy)]
pub(super) struct Found {
    /// The last node.
    pub(super) node: Node,
    /// The place of the address in it, if it has one there.
    pub(super) at: Option<usize>,
    /// A leaf, or nothing live.
    pub(super) entry: Word,
    /// The level of the place: how much of the address space is as `entry` says.
    pub(super) level: u32,
}

impl Table {
    #[inline(always)]
    pub(super) fn find(&self, iova: u64) -> Found {
        let words = self.arena.words();
        let (mut node, mut level) = Node::from_root(self.root.load(Relaxed));
        if iova & !mask(level + 1) != 0 {
            return Found { node, at: None, entry: Word::NONE, level: level + 1 };
        }
        while node.is_table() {
            let Some(entry) = entry(words, node, key(iova, level)) else { break };
            match entry.child() {
                Some(child) if level > 0 => (node, level) = (child, level - 1),
                _ => return Found { node, at: Some(node.index() + key(iova, level)), entry, level },
            }
        }
        self.find_below(iova, node, level)
    }

    /// The same from a compact node on.
    #[inline(never)]
    fn find_below(&self, iova: u64, mut node: Node, mut level: u32) -> Found {
        loop {
            let Some((at, entry)) = slot(self.arena.words(), node, key(iova, level)) else {
                return Found { node, at: None, entry: Word::NONE, level };
            };
            match entry.child() {
                Some(child) if level > 0 => (node, level) = (child, level - 1),
                _ => return Found { node, at: Some(at), entry, level },
            }
        }
    }
}

/// Puts leaves that come in order together to mappings.
#[derive(Default)]
pub(super) struct Joined {
    first: Option<(u64, Word)>,
    last: u64,
}

impl Joined {
    /// Takes a leaf; gives the mapping that is complete with it.
    #[inline(always)]
    pub(super) fn leaf(&mut self, iova: u64, level: u32, entry: Word) -> Option<Mapping> {
        let done = if entry.is_start() { self.end() } else { None };
        if entry.is_start() {
            self.first = Some((iova, entry));
        }
        self.last = iova | mask(level);
        done
    }

    /// The mapping that is not complete yet.
    #[inline(always)]
    pub(super) fn end(&mut self) -> Option<Mapping> {
        let (start, entry) = self.first.take()?;
        entry.mapping(start, self.last)
    }
}

/// The keys of a node of `level` at `base` that `[from, last]` touches.
#[inline(always)]
pub(super) fn keys(base: u64, level: u32, from: u64, last: u64) -> (usize, usize) {
    let end = base | mask(level + 1);
    (key(from.max(base), level), key(last.min(end), level))
}

impl Writer {
    /// The whole mapping that holds `from`, else the first behind it.
    pub(crate) fn next(&self, from: Iova) -> Option<Mapping> {
        let found = self.table.find(from.0);
        let (start, entry) = if found.entry.is_leaf() {
            self.start_of(from.0)?
        } else {
            let first = |iova, _, entry| ControlFlow::Break((iova, entry));
            self.leaves(from.0, u64::MAX, first).break_value()?
        };
        entry.mapping(start, self.end_of(start))
    }

    /// Visits every mapping that touches `range`, whole, in order.
    pub(crate) fn for_each(&self, range: IovaRange, f: &mut dyn FnMut(Mapping) -> ControlFlow<()>) {
        let from = range.start().0;
        let found = self.table.find(from);
        let from =
            if found.entry.is_leaf() { self.start_of(from).map_or(from, |(start, _)| start) } else { from };
        let mut joined = Joined::default();
        let all =
            self.leaves(from, range.last().0, |iova, level, entry| match joined.leaf(iova, level, entry) {
                Some(m) => f(m),
                None => ControlFlow::Continue(()),
            });
        if all.is_break() {
            return;
        }
        if let Some((start, entry)) = joined.first
            && let Some(m) = entry.mapping(start, self.end_of(start))
        {
            let _ = f(m);
        }
    }

    /// Whether a mapping sticks out of `range` at either end.
    pub(crate) fn cuts(&self, range: IovaRange) -> bool {
        self.is_inside(range.start().0) || range.next().is_some_and(|next| self.is_inside(next.0))
    }

    /// Whether a mapping holds both `iova` and the address before it.
    #[inline(always)]
    pub(super) fn is_inside(&self, iova: u64) -> bool {
        let found = self.table.find(iova);
        found.entry.is_leaf() && (!found.entry.is_start() || iova & mask(found.level) != 0)
    }

    /// Whether anything is mapped in `range`.
    #[inline]
    pub(crate) fn is_taken_in(&self, range: IovaRange) -> bool {
        let (start, last) = (range.start().0, range.last().0);
        let found = self.table.find(start);
        found.entry.is_leaf() || last > start | mask(found.level) && self.is_taken(start, last)
    }

    /// Whether anything is mapped in the range.
    pub(super) fn is_taken(&self, from: u64, last: u64) -> bool {
        self.leaves(from, last, |_, _, _| ControlFlow::Break(())).is_break()
    }

    /// Visits the leaves that touch `[from, last]`, in order: address, level, word.
    #[inline(always)]
    fn leaves<B>(
        &self,
        from: u64,
        last: u64,
        mut f: impl FnMut(u64, u32, Word) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let (node, level) = self.root();
        if from & !mask(level + 1) != 0 {
            return ControlFlow::Continue(());
        }
        self.walk(node, level, 0, (from, last), &mut f)
    }

    fn walk<B>(
        &self,
        node: Node,
        level: u32,
        base: u64,
        (from, last): (u64, u64),
        f: &mut impl FnMut(u64, u32, Word) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let arena = &*self.table.arena;
        let (first_key, last_key) = keys(base, level, from, last);
        let mut visit = |key: usize, entry: Word| {
            let iova = base + ((key as u64) << shift(level));
            if entry.is_leaf() {
                return f(iova, level, entry);
            }
            match entry.child() {
                Some(child) if !arena.is_empty_table(child) => {
                    self.walk(child, level - 1, iova, (from, last), f)
                }
                _ => ControlFlow::Continue(()),
            }
        };
        if node.is_table() {
            let words = &arena.words()[node.index() + first_key..=node.index() + last_key];
            for (key, word) in (first_key..).zip(words) {
                let entry = Word(word.load(Relaxed));
                if entry != Word::NONE {
                    visit(key, entry)?;
                }
            }
            return ControlFlow::Continue(());
        }
        let (sorted, count) = arena.sorted(node, first_key, last_key);
        sorted[..count].iter().try_for_each(|(key, _, entry)| visit(*key, *entry))
    }

    /// The first leaf of the mapping that holds `iova`.
    fn start_of(&self, mut iova: u64) -> Option<(u64, Word)> {
        loop {
            let found = self.table.find(iova);
            if !found.entry.is_leaf() {
                return None;
            }
            let mut at = found.at?;
            let (mut entry, size) = (found.entry, mask(found.level) + 1);
            iova &= !mask(found.level);
            // the neighbours in a table without a walk each
            let first = if found.node.is_table() { found.node.index() } else { at };
            while !entry.is_start() && at > first && self.table.arena.load(at - 1).is_leaf() {
                at -= 1;
                iova -= size;
                entry = self.table.arena.load(at);
            }
            if entry.is_start() {
                return Some((iova, entry));
            }
            iova = iova.checked_sub(1)?;
        }
    }

    /// The last address of the mapping that starts at `start`.
    fn end_of(&self, start: u64) -> u64 {
        let mut last = start;
        let mut next = Some(start);
        while let Some(iova) = next {
            let found = self.table.find(iova);
            if !found.entry.is_leaf() || found.entry.is_start() && iova != start {
                break;
            }
            last = iova | mask(found.level);
            if let (Some(at), true) = (found.at, found.node.is_table()) {
                let behind = at + 1..found.node.index() + KEYS;
                let more = behind
                    .map(|at| self.table.arena.load(at))
                    .take_while(|e| e.is_leaf() && !e.is_start())
                    .count();
                last += (more as u64) << shift(found.level);
            }
            next = last.checked_add(1);
        }
        last
    }
}
