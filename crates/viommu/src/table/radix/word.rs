//! What one word of the record says.
//!
//! | bits | leaf | child | placeholder |
//! | --- | --- | --- | --- |
//! | 0 | `LEAF` | | |
//! | 1, 2 | may read, may write | | |
//! | 3 | device registers | | |
//! | 4 | first leaf of its mapping | | |
//! | 5 | | | `TOMB` |
//! | 6 | | `CHILD` | |
//! | 7, 8 | | line, middle (neither: table) | |
//! | 9 to 11 | | level, in the root's word only | |
//! | 12 to 63 | page of the target | index of the node's first word | who asked for it |
//!
//! A word of 0 is nothing at all. A placeholder holds a key in a compact node, with nothing behind it.

use crate::addr::{Gpa, Iova, IovaRange};
use crate::mapping::{Access, Mapping, Target};
use crate::table::Hit;

const LEAF: u64 = 1;
const ACCESS: u32 = 1;
const MMIO: u64 = 1 << 3;
const START: u64 = 1 << 4;
const TOMB: u64 = 1 << 5;
const CHILD: u64 = 1 << 6;
const LINE: u64 = 1 << 7;
const MIDDLE: u64 = 1 << 8;
const LEVEL: u32 = 9;
const LEVEL_BITS: u64 = 7 << LEVEL;
const REST: u32 = 12;
const PAGE_BITS: u64 = !0xfff;

/// The root's highest level: its 128 keys are the top 7 bits of an address.
pub(super) const TOP: u32 = 5;
/// Keys of a table.
pub(super) const KEYS: usize = 512;

/// Where a level's key begins in an address.
#[inline(always)]
pub(super) const fn shift(level: u32) -> u32 {
    12 + 9 * level
}

/// Bytes of one entry of `level`, minus one. A node of `level` spans as much as an entry of the level above.
#[inline(always)]
pub(super) const fn mask(level: u32) -> u64 {
    if level > TOP { u64::MAX } else { (1 << shift(level)) - 1 }
}

/// The key of `iova` in a node of `level`.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "9 bits")]
pub(super) const fn key(iova: u64, level: u32) -> usize {
    (iova >> shift(level)) as usize & (KEYS - 1)
}

/// A word of the record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Word(pub(super) u64);

impl Word {
    pub(super) const NONE: Self = Self(0);

    /// A key's place without anything behind it. `ticket` tells who asked for it; 0: left by a removal.
    pub(super) const fn tomb(ticket: u64) -> Self {
        Self(TOMB | ticket << REST)
    }

    /// The first leaf of `m`.
    #[inline(always)]
    pub(super) fn first_leaf(m: &Mapping) -> Self {
        let target = if m.target == Target::Mmio { MMIO } else { 0 };
        Self(m.gpa.0 & PAGE_BITS | u64::from(m.access.bits()) << ACCESS | target | START | LEAF)
    }

    /// The leaf of the same mapping `bytes` behind its first one.
    #[inline(always)]
    pub(super) fn continued(self, bytes: u64) -> Self {
        Self((self.0 & !START).wrapping_add(bytes & PAGE_BITS))
    }

    #[inline(always)]
    pub(super) fn is_leaf(self) -> bool {
        self.0 & LEAF != 0
    }

    /// Whether a leaf is the first one of its mapping.
    #[inline(always)]
    pub(super) fn is_start(self) -> bool {
        self.0 & START != 0
    }

    /// Whether there is a leaf or a child.
    #[inline(always)]
    pub(super) fn is_live(self) -> bool {
        self.0 & (LEAF | CHILD) != 0
    }

    #[inline(always)]
    pub(super) fn child(self) -> Option<Node> {
        (self.0 & (LEAF | CHILD) == CHILD).then_some(Node(self.0))
    }

    /// The mapping whose first leaf this is, given its range.
    #[inline(always)]
    pub(super) fn mapping(self, start: u64, last: u64) -> Option<Mapping> {
        let range = IovaRange::new(Iova(start), Iova(last))?;
        Some(Mapping { range, gpa: Gpa(self.0 & PAGE_BITS), access: self.access(), target: self.target() })
    }

    #[inline(always)]
    fn access(self) -> Access {
        Access::from_bits_truncate((self.0 >> ACCESS & 3) as u8)
    }

    #[inline(always)]
    fn target(self) -> Target {
        if self.0 & MMIO == 0 { Target::Ram } else { Target::Mmio }
    }
}

/// A leaf and how far it reaches: two words, so that it stays in registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaf {
    /// 0: nothing is there.
    word: u64,
    /// Bytes, minus one.
    mask: u64,
}

impl Leaf {
    pub(super) const NONE: Self = Self { word: 0, mask: 0 };

    #[inline(always)]
    pub(super) fn new(entry: Word, level: u32) -> Self {
        Self { word: entry.0, mask: mask(level) }
    }

    /// Whether it is memory that allows all of `access`, and anything at all.
    #[inline(always)]
    pub(crate) fn is_memory_for(self, access: Access) -> bool {
        let wanted = u64::from(access.bits()) << ACCESS;
        let some = u64::from(Access::RW.bits()) << ACCESS;
        self.word & (wanted | MMIO) == wanted && self.word & some != 0
    }

    /// The target of `iova`, which it holds.
    #[inline(always)]
    pub(crate) fn gpa(self, iova: Iova) -> Gpa {
        Gpa((self.word & PAGE_BITS).wrapping_add(iova.0 & self.mask))
    }

    /// Bytes of it behind `iova`, which it holds.
    #[inline(always)]
    pub(crate) fn left(self, iova: Iova) -> u64 {
        self.mask - (iova.0 & self.mask)
    }

    /// What the device may do.
    #[inline(always)]
    pub(crate) fn access(self) -> Access {
        Word(self.word).access()
    }

    /// Whether it is there and not the first leaf of its mapping.
    #[inline(always)]
    pub(crate) fn goes_on(self) -> bool {
        self.word & (LEAF | START) == LEAF
    }

    /// All that it says of `iova`; `None` when nothing is there.
    #[inline(always)]
    pub(crate) fn hit(self, iova: Iova) -> Option<Hit> {
        let target = Word(self.word).target();
        (self.word != 0).then(|| Hit {
            gpa: self.gpa(iova),
            access: self.access(),
            target,
            left: self.left(iova),
        })
    }
}

/// How a node keeps its children.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// 7 keys in one word, 7 entries: 64 bytes.
    Line,
    /// 28 keys in four words, 28 entries: 256 bytes.
    Middle,
    /// One entry for each of the 512 keys: 4096 bytes.
    Table,
}

impl Kind {
    /// The smallest one that holds `children`.
    pub(super) fn holding(children: usize) -> Self {
        match children {
            0..=7 => Self::Line,
            8..=28 => Self::Middle,
            _ => Self::Table,
        }
    }

    /// Words of one node.
    pub(super) const fn words(self) -> usize {
        match self {
            Self::Line => 8,
            Self::Middle => 32,
            Self::Table => KEYS,
        }
    }

    /// Words that hold keys, before the entries.
    pub(super) const fn key_words(self) -> usize {
        match self {
            Self::Line => 1,
            Self::Middle => 4,
            Self::Table => 0,
        }
    }

    /// The most children at which a node that shrinks is made smaller, or is taken away when there are none.
    pub(super) const fn sparse(self) -> usize {
        match self {
            Self::Line => 0,
            Self::Middle => 5,
            Self::Table => 20,
        }
    }
}

/// The word of a child: which node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Node(u64);

impl Node {
    pub(super) fn new(kind: Kind, index: usize) -> Self {
        let kind = match kind {
            Kind::Line => LINE,
            Kind::Middle => MIDDLE,
            Kind::Table => 0,
        };
        Self((index as u64) << REST | kind | CHILD)
    }

    /// As the root's word.
    pub(super) fn rooted(self, level: u32) -> u64 {
        self.0 | u64::from(level) << LEVEL
    }

    /// The node and the level in the root's word.
    #[inline(always)]
    pub(super) fn from_root(word: u64) -> (Self, u32) {
        (Self(word & !LEVEL_BITS), (word >> LEVEL & 7) as u32)
    }

    #[inline(always)]
    pub(super) fn word(self) -> Word {
        Word(self.0)
    }

    #[inline(always)]
    pub(super) fn is_table(self) -> bool {
        self.0 & (LINE | MIDDLE) == 0
    }

    #[inline(always)]
    pub(super) fn is_line(self) -> bool {
        self.0 & LINE != 0
    }

    #[inline(always)]
    pub(super) fn kind(self) -> Kind {
        if self.is_table() {
            Kind::Table
        } else if self.is_line() {
            Kind::Line
        } else {
            Kind::Middle
        }
    }

    /// The node's first word in the arena.
    #[inline(always)]
    pub(super) fn index(self) -> usize {
        (self.0 >> REST) as usize
    }
}
