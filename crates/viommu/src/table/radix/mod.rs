//! The record as a radix of atomic words.
//!
//! Nine bits of address a level, leaves at every level, as many levels as the highest address needs. A node is a
//! line of 7 keys, a middle node of 28 or a table of 512, and changes its kind with its number of children. Readers
//! only load. The one writer publishes each change of a word with one release store; whatever a reader may still
//! stand on stays as it was until a grace period of the address space is over.
//!
//! `arena`, `slab`: memory. `word`, `node`: what a word says and how a node is searched. `find`: looking, for the
//! writer. `edit`: insert and remove. `grow`: room for what comes. `reclaim`: what becomes of emptied nodes.

mod arena;
mod edit;
mod find;
mod grow;
mod node;
mod reclaim;
mod slab;
#[cfg(test)]
mod tests;
mod word;

use std::collections::VecDeque;

use self::arena::Apart;
use self::reclaim::Limbo;
use self::slab::Slab;
use self::word::{Kind, Leaf, Node, TOP, key, mask};
use super::{Hit, NoMemory};
use crate::addr::Iova;
use crate::quiesce::space::Space;
use crate::sync::{
    Arc, AtomicU64, Mutex,
    Ordering::{Acquire, Relaxed, Release},
    lock,
};

pub(crate) use self::arena::Arena;

/// What readers look into.
pub(crate) struct Table {
    /// The top node and its level. Beside it only what readers read too.
    root: AtomicU64,
    arena: Arc<Arena>,
    /// The nodes, when the writer is gone. They go back to the arena with the last reader's hold on the table.
    left_behind: Apart<Mutex<Option<Slab>>>,
}

/// What the domain changes, under its own lock.
pub(crate) struct Writer {
    table: Arc<Table>,
    space: Arc<Space>,
    slab: Slab,
    mappings: usize,
    /// Insertions to come that must not fail. Nothing is reclaimed before them.
    promised: usize,
    /// Nodes made for insertions to come that are empty until then, as base address and level.
    fresh: Vec<u64>,
    /// Marks the places that the latest reservation, or insertion without one, has made.
    ticket: u64,
    /// Nodes that had become sparse, as base address and level.
    listed: VecDeque<u64>,
    /// Nodes that are not linked any more, since the latest grace period began.
    retired: Vec<reclaim::Retired>,
    limbo: Option<Limbo>,
    /// How much there is to reclaim; roughly `listed` and `retired`, tables counting for more.
    debt: u32,
}

impl Table {
    /// An empty record in `arena`, whose readers are those of `space`.
    pub(crate) fn new(arena: &Arc<Arena>, space: Arc<Space>) -> Result<(Arc<Self>, Writer), NoMemory> {
        let mut slab = Slab::new(arena.clone());
        let root = slab.alloc(Kind::Table)?;
        let table = Arc::new(Self {
            root: AtomicU64::new(root.rooted(1)),
            arena: arena.clone(),
            left_behind: Apart(Mutex::new(None)),
        });
        let writer = Writer {
            table: table.clone(),
            space,
            slab,
            mappings: 0,
            promised: 0,
            fresh: Vec::new(),
            ticket: 0,
            listed: VecDeque::new(),
            retired: Vec::new(),
            limbo: None,
            debt: 0,
        };
        Ok((table, writer))
    }

    /// What `iova` translates to, at most one leaf of it. To be called under a guard, or under the writer's lock.
    #[inline]
    pub(crate) fn lookup(&self, iova: Iova) -> Option<Hit> {
        self.leaf(iova).hit(iova)
    }

    /// The leaf that holds `iova`. To be called as [`Self::lookup`].
    #[inline(always)]
    pub(crate) fn leaf(&self, iova: Iova) -> Leaf {
        let words = self.arena.words();
        let (mut node, mut level) = Node::from_root(self.root.load(Acquire));
        if iova.0 & !mask(level + 1) != 0 {
            return Leaf::NONE;
        }
        while node.is_table() {
            let Some(entry) = node::entry(words, node, key(iova.0, level)) else { break };
            if entry.is_leaf() {
                return Leaf::new(entry, level);
            }
            match entry.child() {
                Some(child) if level > 0 => (node, level) = (child, level - 1),
                _ => return Leaf::NONE,
            }
        }
        self.leaf_below(iova.0, node, level)
    }

    /// The same from a compact node on. Out of line: what is there besides tables must not slow them down.
    #[inline(never)]
    fn leaf_below(&self, iova: u64, mut node: Node, mut level: u32) -> Leaf {
        while let Some((_, entry)) = node::slot(self.arena.words(), node, key(iova, level)) {
            if entry.is_leaf() {
                return Leaf::new(entry, level);
            }
            match entry.child() {
                Some(child) if level > 0 => (node, level) = (child, level - 1),
                _ => break,
            }
        }
        Leaf::NONE
    }
}

impl Writer {
    /// Mappings in the record.
    pub(crate) fn len(&self) -> usize {
        self.mappings
    }

    /// Bytes of the arena that this record holds, free nodes and those in limbo included.
    pub(crate) fn bytes(&self) -> u64 {
        self.slab.bytes()
    }

    #[inline(always)]
    fn root(&self) -> (Node, u32) {
        Node::from_root(self.table.root.load(Relaxed))
    }
}

impl Drop for Writer {
    /// Readers find nothing from now on. One that is inside may still stand on a node: the nodes wait for the table.
    fn drop(&mut self) {
        let nothing = Node::new(Kind::Table, self.table.arena.index_of(0));
        self.table.root.store(nothing.rooted(TOP), Release);
        let slab = std::mem::replace(&mut self.slab, Slab::new(self.table.arena.clone()));
        *lock(&self.table.left_behind.0) = Some(slab);
    }
}
