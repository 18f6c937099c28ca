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

/// The nodes on the way to one, by level.
struct Path([Option<Place>; TOP as usize]);

#[derive(Clone, Copy)]
struct Place {
    node: Node,
    /// The word that names it.
    at: usize,
    parent: Node,
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
        let mut budget = BUDGET;
        while budget > 0
            && let Some(entry) = self.listed.pop_front()
        {
            let (base, level) = (entry & !mask(1), (entry & 7) as u32);
            budget -= 1;
            // It may have been replaced by a leaf, or be gone with a listing of its own.
            if let Some(path) = self.descend(base, level) {
                if let Some(place) = path.0[level as usize] {
                    self.table.arena.set_listed(place.node, false);
                }
                budget = budget.saturating_sub(self.settle(&path, base, level));
            }
        }
    }

    /// Takes the node of `level` on `path` away if it is empty, and then those above that are empty without it;
    /// makes a sparse one smaller. What this cost.
    fn settle(&mut self, path: &Path, base: u64, level: u32) -> u32 {
        let mut spent = 0;
        for above in level..TOP {
            let Some(Place { node, at, parent }) = path.0[above as usize] else { break };
            let live = self.table.arena.live(node);
            if live > 0 {
                if above > level {
                    // It has children, and has lost one.
                    if live <= node.kind().sparse() && !self.table.arena.is_listed(node) {
                        self.list(node, base & !mask(above + 1), above);
                    }
                } else if live <= node.kind().sparse()
                    && let Some(smaller) = self.shrunk(node, live)
                {
                    self.table.arena.publish(at, smaller.word());
                    self.retire(node, true);
                    spent += cost(node);
                }
                break;
            }
            self.table.arena.publish(at, vacated(parent));
            self.table.arena.gained(parent, 1u64.wrapping_neg());
            self.retire(node, false);
            spent += 1;
        }
        spent
    }

    /// Lists a node that was made for what has not come.
    pub(super) fn list_if_empty(&mut self, entry: u64) {
        let (base, level) = (entry & !mask(1), (entry & 7) as u32);
        if let Some(path) = self.descend(base, level)
            && let Some(Place { node, .. }) = path.0[level as usize]
            && !self.table.arena.is_listed(node)
            && self.table.arena.live(node) == 0
        {
            self.list(node, base, level);
        }
    }

    /// The way to the node of `level` at `base`, if there is one below the root.
    fn descend(&self, base: u64, level: u32) -> Option<Path> {
        let (mut parent, mut above) = self.root();
        if above <= level || base & !mask(above + 1) != 0 {
            return None;
        }
        let mut path = Path([None; TOP as usize]);
        while above > level {
            let (at, entry) = slot(self.table.arena.words(), parent, key(base, above))?;
            let node = entry.child()?;
            above -= 1;
            path.0[above as usize] = Some(Place { node, at, parent });
            parent = node;
        }
        Some(path)
    }
}
