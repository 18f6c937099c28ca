//! Looking into one node, and adding keys to it.
//!
//! A compact node gives its slots away in order. A slot's key never changes until the node, out of every reader's
//! reach, is wiped. The writer publishes key, then entry; the reader reads key, entry, and *key again*: an unused
//! slot looks like one of key 0, and may get another key and its entry between the first two reads. If the entry is
//! seen, so is the key that was published before it.

use super::arena::Arena;
use super::word::{KEYS, Kind, Node, Word};
use crate::sync::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Keys in one word.
const EACH: usize = 7;
const KEY_BITS: usize = 9;
const KEY_MASK: u64 = 511;
/// The lowest bit of each key.
const ONES: u64 = 1 | 1 << 9 | 1 << 18 | 1 << 27 | 1 << 36 | 1 << 45 | 1 << 54;
/// The highest bit of each key.
const HIGHS: u64 = ONES << 8;
/// The writer's mark on a node that waits to be looked at for reclaim: in the first key word, or in a table's notes.
const LISTED: u64 = 1 << 63;

/// The first of seven keys that is `key`.
#[inline(always)]
fn search(keys: u64, key: usize) -> Option<usize> {
    let differs = (keys ^ (key as u64).wrapping_mul(ONES)) & !LISTED;
    let zeroes = differs.wrapping_sub(ONES) & !differs & HIGHS;
    (zeroes != 0).then(|| zeroes.trailing_zeros() as usize / KEY_BITS)
}

/// What is there for `key` in a table.
#[inline(always)]
pub(super) fn entry(words: &[AtomicU64], table: Node, key: usize) -> Option<Word> {
    Some(Word(words.get(table.index() + key)?.load(Acquire)))
}

/// The place of `key` in `node` and what is there; `None` when it has no place. Reads every word once more than it
/// trusts it, and nothing that is not in `words`.
#[inline(always)]
pub(super) fn slot(words: &[AtomicU64], node: Node, key: usize) -> Option<(usize, Word)> {
    if node.is_table() {
        Some((node.index() + key, entry(words, node, key)?))
    } else if node.is_line() {
        let keys = words.get(node.index())?;
        let j = search(keys.load(Acquire), key)?;
        confirmed(words, keys, node.index() + 1 + j, j, key)
    } else {
        middle_slot(words, node, key)
    }
}

/// Out of line: the rare kind must not make the walk's loop longer.
#[inline(never)]
fn middle_slot(words: &[AtomicU64], node: Node, key: usize) -> Option<(usize, Word)> {
    let key_words = Kind::Middle.key_words();
    for k in 0..key_words {
        let keys = words.get(node.index() + k)?;
        if let Some(j) = search(keys.load(Acquire), key) {
            return confirmed(words, keys, node.index() + key_words + k * EACH + j, j, key);
        }
    }
    None
}

#[inline(always)]
fn confirmed(
    words: &[AtomicU64],
    keys: &AtomicU64,
    at: usize,
    j: usize,
    key: usize,
) -> Option<(usize, Word)> {
    let entry = words.get(at)?.load(Acquire);
    let still = keys.load(Relaxed) >> (KEY_BITS * j) & KEY_MASK;
    (entry != 0 && still == key as u64).then_some((at, Word(entry)))
}

/// The writer's view of nodes.
impl Arena {
    #[inline(always)]
    pub(super) fn load(&self, at: usize) -> Word {
        Word(self.word(at).load(Relaxed))
    }

    /// Visible to readers from now on, with all that was written before.
    #[inline(always)]
    pub(super) fn publish(&self, at: usize, word: Word) {
        self.word(at).store(word.0, Release);
    }

    /// The slots of a compact node that have been given away: place, key, entry.
    pub(super) fn slots(&self, node: Node) -> impl Iterator<Item = (usize, usize, Word)> {
        let (first, key_words) = (node.index(), node.kind().key_words());
        (0..key_words * EACH)
            .map(move |j| {
                let at = first + key_words + j;
                let key = self.word(first + j / EACH).load(Relaxed) >> (KEY_BITS * (j % EACH)) & KEY_MASK;
                (at, key as usize, self.load(at))
            })
            .take_while(|(_, _, entry)| *entry != Word::NONE)
    }

    /// The live slots of a compact node with keys from `first` to `last`, by key: key, place, entry. And how many.
    pub(super) fn sorted(
        &self,
        node: Node,
        first: usize,
        last: usize,
    ) -> ([(usize, usize, Word); 28], usize) {
        let mut sorted = [(KEYS, 0, Word::NONE); 28];
        let mut count = 0;
        for (at, key, entry) in self.slots(node) {
            if entry.is_live() && (first..=last).contains(&key) {
                sorted[count] = (key, at, entry);
                count += 1;
            }
        }
        sorted[..count].sort_unstable_by_key(|(key, _, _)| *key);
        (sorted, count)
    }

    /// Slots of a compact node, given away or not.
    pub(super) fn slots_in_all(&self, node: Node) -> usize {
        node.kind().key_words() * EACH
    }

    /// Gives slot `j` of a compact node, the first unused one, to `key`.
    pub(super) fn give_slot(&self, node: Node, j: usize, key: usize, entry: Word) {
        let keys = self.word(node.index() + j / EACH);
        keys.store(keys.load(Relaxed) | (key as u64) << (KEY_BITS * (j % EACH)), Release);
        self.publish(node.index() + node.kind().key_words() + j, entry);
    }

    /// Leaves and children, counted up to one more than makes a node of this kind sparse.
    pub(super) fn live(&self, node: Node) -> usize {
        if node.is_table() {
            return usize::try_from(self.children(node).load(Relaxed) & !LISTED).unwrap_or(usize::MAX);
        }
        let first = node.index() + node.kind().key_words();
        let entries = first..node.index() + node.kind().words();
        let live = entries.map(|at| self.load(at)).take_while(|e| *e != Word::NONE).filter(|e| e.is_live());
        live.take(node.kind().sparse() + 1).count()
    }

    /// Whether it is a table that has nothing: 512 words that need not be read.
    #[inline(always)]
    pub(super) fn is_empty_table(&self, node: Node) -> bool {
        node.is_table() && self.children(node).load(Relaxed) & !LISTED == 0
    }

    /// A table's number of leaves and children (compact nodes are counted when need be).
    #[inline(always)]
    fn children(&self, table: Node) -> &AtomicU64 {
        self.state(self.page_of(table.index()))
    }

    /// `node` has one leaf or child more.
    #[inline(always)]
    pub(super) fn gained(&self, node: Node, children: u64) {
        if node.is_table() {
            let count = self.children(node);
            count.store(count.load(Relaxed).wrapping_add(children), Relaxed);
        }
    }

    /// `node` has `children` fewer. Whether it is sparse now, and not listed yet.
    #[inline(always)]
    pub(super) fn lost(&self, node: Node, children: u64) -> bool {
        if node.is_table() {
            let count = self.children(node);
            let left = count.load(Relaxed).wrapping_sub(children);
            count.store(left, Relaxed);
            left <= Kind::Table.sparse() as u64 // a listed one is far above
        } else {
            !self.is_listed(node) && self.live(node) <= node.kind().sparse()
        }
    }

    pub(super) fn is_listed(&self, node: Node) -> bool {
        self.mark(node).load(Relaxed) & LISTED != 0
    }

    pub(super) fn set_listed(&self, node: Node, listed: bool) {
        let mark = self.mark(node);
        let word = mark.load(Relaxed) & !LISTED;
        mark.store(if listed { word | LISTED } else { word }, Relaxed);
    }

    fn mark(&self, node: Node) -> &AtomicU64 {
        if node.is_table() { self.children(node) } else { self.word(node.index()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn search_finds_the_first_of_equal_keys() {
        let keys = [5u64, 0, 511, 5, 256, 255, 1];
        let word = keys.iter().enumerate().map(|(j, k)| k << (9 * j)).sum::<u64>();
        for marked in [word, word | LISTED] {
            for key in 0..512 {
                assert_eq!(search(marked, key), keys.iter().position(|k| *k == key as u64), "{key}");
            }
        }
        assert_eq!(search(0, 0), Some(0));
        assert_eq!(search(LISTED, 1), None);
    }
}
