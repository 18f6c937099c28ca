//! What becomes of nodes that have lost their children.
//!
//! A node that becomes sparse is *listed*, once, and stays linked: mapping and unmapping the same page allocates
//! nothing. At the start of a later insertion or reservation, never inside a walk, some of the listed ones are looked
//! at again: an empty one is unlinked, one with few children is replaced by a smaller copy. What is not linked any
//! more is *retired*; one reading of the readers' slots begins a grace period for all that has retired until then
//! (*limbo*). When it is over, no reader can stand on them: they are wiped and free.
//!
//! A call looks at a bounded number of nodes, and a long guard only makes limbo wait.

use super::Writer;
use super::edit::vacated;
use super::node::slot;
use super::word::{Kind, Node, TOP, key, mask};
use crate::quiesce::slot::Grace;

/// Debt at which a call pays some of it.
const DUE: u32 = 64;
/// What a table counts for: it is larger, and dearer to copy or wipe.
const TABLE: u32 = 4;
/// The most that one call pays.
const BUDGET: u32 = 64;
/// Calls between two looks at a grace period that is not over: readers' slots are on their cores' cache lines.
const PATIENCE: u32 = 32;
/// Blank pages that one call gives back.
const PAGES: u32 = 16;
/// The most pieces of `BUDGET` when an insertion would fail otherwise.
const ROUNDS: u32 = 256;

/// A node that is not linked any more.
pub(super) struct Retired {
    node: Node,
    /// Whether a table may have words that are not zero.
    dirty: bool,
}

pub(super) struct Limbo {
    nodes: Vec<Retired>,
    grace: Grace,
    is_over: bool,
    asked: u32,
}

/// The way to a node.
struct Path {
    /// By level.
    nodes: [Node; TOP as usize + 1],
    /// The word that names the node of a level, likewise.
    names: [usize; TOP as usize + 1],
}

impl Path {
    fn new(root: Node) -> Self {
        Self { nodes: [root; TOP as usize + 1], names: [0; TOP as usize + 1] }
    }
}

fn cost(node: Node) -> u32 {
    if node.kind() == Kind::Table { TABLE } else { 1 }
}

impl Writer {
    /// `node` has become sparse. The root stays a table whatever it holds.
    #[cold]
    pub(super) fn list(&mut self, node: Node, base: u64, level: u32) {
        if level < self.root().1 {
            self.table.arena.set_listed(node, true);
            self.listed.push_back(base | u64::from(level));
            self.debt = self.debt.saturating_add(cost(node));
        }
    }

    /// No reader that comes from now on finds `node`.
    pub(super) fn retire(&mut self, node: Node, dirty: bool) {
        self.retired.push(Retired { node, dirty });
        self.debt = self.debt.saturating_add(cost(node));
    }

    /// Whether [`collect`](Self::collect) has something to do.
    #[inline(always)]
    pub(super) fn is_due(&self) -> bool {
        self.debt >= DUE || self.limbo.is_some() || self.slab.has_excess()
    }

    /// One bounded piece of reclaim.
    #[cold]
    pub(super) fn collect(&mut self) {
        self.slab.trim(PAGES);
        if let Some(limbo) = &mut self.limbo
            && !limbo.is_over
        {
            limbo.asked += 1;
            if limbo.asked < PATIENCE {
                return;
            }
            limbo.asked = 0;
        }
        if self.drain() && self.debt >= DUE {
            self.harvest();
            self.open_limbo();
            self.drain();
        }
    }

    /// All that can be had at once, for an insertion that would fail otherwise.
    #[cold]
    pub(super) fn reclaim_all(&mut self) {
        for _ in 0..ROUNDS {
            if !self.drain() {
                if self.limbo.as_ref().is_some_and(|limbo| !limbo.is_over) {
                    return; // readers are inside
                }
            } else if self.listed.is_empty() && self.retired.is_empty() {
                return;
            } else {
                self.harvest();
                self.open_limbo();
            }
        }
    }

    /// Frees nodes whose grace period is over; whether limbo is empty now.
    fn drain(&mut self) -> bool {
        let Some(limbo) = &mut self.limbo else { return true };
        if !limbo.is_over && !limbo.grace.is_over() {
            return false;
        }
        limbo.is_over = true;
        let mut budget = BUDGET;
        while budget > 0 {
            let Some(Retired { node, dirty }) = limbo.nodes.pop() else {
                self.limbo = None;
                return true;
            };
            if dirty || !node.is_table() {
                self.table.arena.wipe(node.index(), node.kind().words());
            }
            self.slab.free(node);
            budget = budget.saturating_sub(cost(node));
        }
        false
    }

    /// Begins a grace period for all that has retired.
    fn open_limbo(&mut self) {
        debug_assert!(self.limbo.is_none());
        if !self.retired.is_empty() {
            let nodes = std::mem::take(&mut self.retired);
            self.limbo = Some(Limbo { nodes, grace: self.space.grace(), is_over: false, asked: 0 });
        }
        self.debt = u32::try_from(self.listed.len()).unwrap_or(u32::MAX);
    }

    /// Looks at some of the listed nodes again.
    fn harvest(&mut self) {
        let (root, top) = self.root();
        let mut path = Path::new(root);
        let mut budget = BUDGET;
        while budget > 0
            && let Some(entry) = self.listed.pop_front()
        {
            budget -= 1;
            let (base, level) = listing(entry);
            // It may have been replaced by a leaf, or be gone with one below it.
            if self.descend(base, level, &mut path) {
                self.table.arena.set_listed(path.nodes[level as usize], false);
                budget = budget.saturating_sub(self.settle(&path, base, level, top));
            }
        }
    }

    /// Takes the node of `level` on `path` away if it is empty, and then those above that are empty without it;
    /// makes a sparse one smaller. What this cost.
    fn settle(&mut self, path: &Path, base: u64, level: u32, top: u32) -> u32 {
        let mut spent = 0;
        for at in level..top {
            let node = path.nodes[at as usize];
            let live = self.table.arena.live(node);
            if live > 0 {
                let is_sparse = live <= node.kind().sparse();
                if is_sparse && at > level {
                    if !self.table.arena.is_listed(node) {
                        self.list(node, base & !mask(at + 1), at);
                    }
                } else if is_sparse && let Some(smaller) = self.shrunk(node, live) {
                    self.table.arena.publish(path.names[at as usize], smaller.word());
                    self.retire(node, true);
                    spent += cost(node);
                }
                break;
            }
            let parent = path.nodes[at as usize + 1];
            self.table.arena.publish(path.names[at as usize], vacated(parent));
            self.table.arena.gained(parent, 1u64.wrapping_neg());
            self.retire(node, false);
            spent += 1;
        }
        spent
    }

    /// Lists a node that was made for what has not come.
    pub(super) fn list_if_empty(&mut self, entry: u64) {
        let (base, level) = listing(entry);
        let mut path = Path::new(self.root().0);
        if self.descend(base, level, &mut path) {
            let node = path.nodes[level as usize];
            if !self.table.arena.is_listed(node) && self.table.arena.live(node) == 0 {
                self.list(node, base, level);
            }
        }
    }

    /// Goes to the node of `level` at `base`, if there is one below the root.
    fn descend(&self, base: u64, level: u32, path: &mut Path) -> bool {
        let (mut node, mut at) = self.root();
        if at <= level || base & !mask(at + 1) != 0 {
            return false;
        }
        path.nodes[at as usize] = node;
        while at > level {
            let found = slot(self.table.arena.words(), node, key(base, at));
            let Some((name, Some(child))) = found.map(|(name, entry)| (name, entry.child())) else {
                return false;
            };
            at -= 1;
            node = child;
            (path.nodes[at as usize], path.names[at as usize]) = (node, name);
        }
        true
    }
}

/// Base and level of a node, as they are kept in one word.
fn listing(entry: u64) -> (u64, u32) {
    (entry & !mask(1), (entry & 7) as u32)
}
