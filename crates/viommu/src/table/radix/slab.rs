//! The nodes of one record: whole pages of the arena, cut into nodes of one kind.
//!
//! Each page is on one list: with a free line, with a free middle node, blank (spare), or the rest. The lists and the
//! maps of free nodes lie in the arena's notes, so a page more costs no heap and any page can leave its list at once.

use super::arena::{Arena, Page, narrow};
use super::word::{KEYS, Kind, Node};
use crate::sync::{Arc, Ordering::Relaxed};
use crate::table::{NoMemory, PAGE};

/// Blank pages that are kept; more go back to the arena.
const KEEP: u32 = 2;

/// Lines of a page.
const LINES: u32 = 64;
/// Middle nodes of a page.
const MIDDLES: u32 = 16;

pub(super) struct Slab {
    arena: Arc<Arena>,
    /// Pages that this record has from the arena.
    pages: u64,
    lines: Pieces,
    middles: Pieces,
    /// Blank pages.
    spare: Page,
    spares: u32,
    /// Tables, and pages without a free node.
    rest: Page,
}

/// Pages with free nodes of one kind.
struct Pieces {
    head: Page,
    /// Free nodes on these pages.
    free: u32,
}

/// Nodes that must be there later.
#[derive(Default, Clone, Copy)]
pub(super) struct Stock {
    pub(super) lines: usize,
    pub(super) middles: usize,
    pub(super) tables: usize,
}

impl Slab {
    pub(super) fn new(arena: Arc<Arena>) -> Self {
        let none = || Pieces { head: 0, free: 0 };
        Self { arena, pages: 0, lines: none(), middles: none(), spare: 0, spares: 0, rest: 0 }
    }

    /// Bytes that this record has from the arena.
    pub(super) fn bytes(&self) -> u64 {
        self.pages * PAGE
    }

    /// A node of zeroes.
    pub(super) fn alloc(&mut self, kind: Kind) -> Result<Node, NoMemory> {
        let (head, each) = match kind {
            Kind::Table => {
                let page = self.blank()?;
                self.arena.state(page).store(0, Relaxed);
                push(&self.arena, &mut self.rest, page);
                return Ok(Node::new(Kind::Table, self.arena.index_of(page)));
            }
            Kind::Line => (self.lines.head, LINES),
            Kind::Middle => (self.middles.head, MIDDLES),
        };
        let page = if head == 0 { self.blank()? } else { head };
        let arena = &self.arena;
        let pieces = if kind == Kind::Line { &mut self.lines } else { &mut self.middles };
        if head == 0 {
            arena.state(page).store(u64::MAX >> (64 - each), Relaxed);
            push(arena, &mut pieces.head, page);
            pieces.free += each;
        }
        let state = arena.state(page);
        let free = state.load(Relaxed);
        let left = free & free.wrapping_sub(1);
        state.store(left, Relaxed);
        pieces.free -= 1;
        if left == 0 {
            unlink(arena, &mut pieces.head, page);
            push(arena, &mut self.rest, page);
        }
        Ok(Node::new(kind, arena.index_of(page) + free.trailing_zeros() as usize * kind.words()))
    }

    /// Takes back a node of zeroes that no reader can reach.
    pub(super) fn free(&mut self, node: Node) {
        let arena = &self.arena;
        let page = arena.page_of(node.index());
        let (pieces, each) = match node.kind() {
            Kind::Table => {
                unlink(arena, &mut self.rest, page);
                self.spared(page);
                return;
            }
            Kind::Line => (&mut self.lines, LINES),
            Kind::Middle => (&mut self.middles, MIDDLES),
        };
        let state = arena.state(page);
        let before = state.load(Relaxed);
        let piece = (node.index() - arena.index_of(page)) / node.kind().words();
        let after = before | 1 << piece;
        state.store(after, Relaxed);
        pieces.free += 1;
        if before == 0 {
            unlink(arena, &mut self.rest, page);
            push(arena, &mut pieces.head, page);
        }
        if after == u64::MAX >> (64 - each) {
            unlink(arena, &mut pieces.head, page);
            pieces.free -= each;
            self.spared(page);
        }
    }

    /// Makes sure that so many nodes can be had.
    pub(super) fn stock(&mut self, wanted: Stock) -> Result<(), NoMemory> {
        let pages = |wanted: usize, pieces: &Pieces, each: u32| {
            wanted.saturating_sub(pieces.free as usize).div_ceil(each as usize)
        };
        let blank = wanted
            .tables
            .saturating_add(pages(wanted.lines, &self.lines, LINES))
            .saturating_add(pages(wanted.middles, &self.middles, MIDDLES));
        while (self.spares as usize) < blank {
            let page = self.arena.take().ok_or(NoMemory)?;
            self.pages += 1;
            self.spared(page);
        }
        Ok(())
    }

    /// Whether there are more blank pages than are worth keeping.
    pub(super) fn has_excess(&self) -> bool {
        self.spares > KEEP
    }

    /// Gives blank pages back to the arena, at most `pages`.
    pub(super) fn trim(&mut self, pages: u32) {
        let excess = self.spares.saturating_sub(KEEP).min(pages);
        let arena = &self.arena;
        let head = &mut self.spare;
        arena.give((0..excess).filter_map(|_| pop(arena, head)));
        self.spares -= excess;
        self.pages -= u64::from(excess);
    }

    fn blank(&mut self) -> Result<Page, NoMemory> {
        if let Some(page) = pop(&self.arena, &mut self.spare) {
            self.spares -= 1;
            return Ok(page);
        }
        let page = self.arena.take().ok_or(NoMemory)?;
        self.pages += 1;
        Ok(page)
    }

    fn spared(&mut self, page: Page) {
        push(&self.arena, &mut self.spare, page);
        self.spares += 1;
    }
}

impl Drop for Slab {
    /// By now nobody can look into these pages.
    fn drop(&mut self) {
        let arena = &self.arena;
        for head in [&mut self.lines.head, &mut self.middles.head, &mut self.rest] {
            arena.give(std::iter::from_fn(|| {
                let page = pop(arena, head)?;
                arena.wipe(arena.index_of(page), KEYS);
                Some(page)
            }));
        }
        arena.give(std::iter::from_fn(|| pop(arena, &mut self.spare)));
    }
}

// A list is its first page; 0 ends it. A page's link: the page before in the high half, the page behind in the low.

fn push(arena: &Arena, head: &mut Page, page: Page) {
    arena.link(page).store(u64::from(*head), Relaxed);
    if *head != 0 {
        let link = arena.link(*head);
        link.store(u64::from(page) << 32 | u64::from(narrow(link.load(Relaxed))), Relaxed);
    }
    *head = page;
}

fn unlink(arena: &Arena, head: &mut Page, page: Page) {
    let link = arena.link(page).load(Relaxed);
    let (before, behind) = (narrow(link >> 32), narrow(link));
    if before == 0 {
        *head = behind;
    } else {
        let link = arena.link(before);
        link.store(link.load(Relaxed) >> 32 << 32 | u64::from(behind), Relaxed);
    }
    if behind != 0 {
        let link = arena.link(behind);
        link.store(u64::from(before) << 32 | u64::from(narrow(link.load(Relaxed))), Relaxed);
    }
}

fn pop(arena: &Arena, head: &mut Page) -> Option<Page> {
    let page = *head;
    (page != 0).then(|| {
        unlink(arena, head, page);
        page
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_nodes_leave_whole_blank_pages() {
        let arena = Arena::new(64 * PAGE).unwrap();
        let mut slab = Slab::new(arena.clone());
        let mut nodes = Vec::new();
        for i in 0..600 {
            let kind = [Kind::Line, Kind::Line, Kind::Middle][i % 3];
            nodes.push(slab.alloc(kind).unwrap());
        }
        nodes.push(slab.alloc(Kind::Table).unwrap());
        let mut firsts: Vec<_> = nodes.iter().map(|n| (n.index(), n.kind().words())).collect();
        firsts.sort_unstable();
        assert!(firsts.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
        let full = slab.bytes();
        assert_eq!(full, (400u64.div_ceil(64) + 200u64.div_ceil(16) + 1) * PAGE);
        // in another order than they came
        while !nodes.is_empty() {
            let at = nodes.len() * 7 / 11;
            slab.free(nodes.swap_remove(at));
        }
        assert_eq!(slab.bytes(), full);
        assert_eq!((slab.lines.free, slab.middles.free), (0, 0));
        slab.trim(1000);
        assert_eq!(slab.bytes(), u64::from(KEEP) * PAGE);
        assert_eq!(arena.used(), slab.bytes());
    }

    #[test]
    fn stocked_nodes_can_be_had_when_the_arena_has_no_more() {
        let arena = Arena::new(8 * PAGE).unwrap();
        let mut slab = Slab::new(arena.clone());
        slab.stock(Stock { lines: 65, middles: 17, tables: 1 }).unwrap();
        while arena.take().is_some() {}
        slab.alloc(Kind::Table).unwrap();
        assert!((0..65).all(|_| slab.alloc(Kind::Line).is_ok()));
        assert!((0..17).all(|_| slab.alloc(Kind::Middle).is_ok()));
        assert_eq!(slab.alloc(Kind::Table), Err(NoMemory));
    }

    #[test]
    fn a_dropped_slab_gives_everything_back_wiped() {
        let arena = Arena::new(4 * PAGE).unwrap();
        let mut slab = Slab::new(arena.clone());
        for kind in [Kind::Line, Kind::Middle, Kind::Table] {
            let node = slab.alloc(kind).unwrap();
            (0..kind.words()).for_each(|j| arena.word(node.index() + j).store(7, Relaxed));
        }
        drop(slab);
        assert_eq!(arena.used(), 0);
        assert!(arena.words().iter().all(|w| w.load(Relaxed) == 0));
    }
}
