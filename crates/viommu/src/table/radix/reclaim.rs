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
use super::word::{Kind, Node, key, mask};
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
            if let Some(place) = self.descend(base, level) {
                self.table.arena.set_listed(place.node, false);
                budget = budget.saturating_sub(self.settle(&place, base, level));
            }
        }
    }

    fn settle(&mut self, place: &Place, base: u64, level: u32) -> u32 {
        let Place { node, at, parent } = *place;
        let live = self.table.arena.live(node);
        if live > node.kind().sparse() {
            return 0;
        }
        if live > 0 {
            if let Some(smaller) = self.shrunk(node, live) {
                self.table.arena.publish(at, smaller.word());
                self.retire(node, true);
            }
            return cost(node);
        }
        self.table.arena.publish(at, vacated(parent));
        self.retire(node, false);
        if self.table.arena.lost(parent, 1) {
            self.list(parent, base & !mask(level + 2), level + 1);
        }
        0
    }

    /// The node of `level` at `base`, if there is one below the root.
    fn descend(&self, base: u64, level: u32) -> Option<Place> {
        let (mut parent, mut above) = self.root();
        if above <= level || base & !mask(above + 1) != 0 {
            return None;
        }
        loop {
            let (at, entry) = slot(self.table.arena.words(), parent, key(base, above))?;
            let node = entry.child()?;
            above -= 1;
            if above == level {
                return Some(Place { node, at, parent });
            }
            parent = node;
        }
    }
}
