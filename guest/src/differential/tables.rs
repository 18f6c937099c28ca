//! Random entries of tables: good ones mostly, and all that can be wrong with one.

use super::{machine::RAM, model::INTERRUPTS, random::Random};

/// Tables lie here, each a page: two root tables, two of contexts, and page tables.
pub(super) const TABLES: u64 = 0x100_0000;
pub(super) const CONTEXTS: u64 = TABLES + 0x2000;
/// Page tables by level, from 1 on: the first and how many.
pub(super) const LEVELS: [(u64, u64); 4] =
    [(TABLES + 0x4000, 4), (TABLES + 0x8000, 3), (TABLES + 0xb000, 2), (TABLES + 0xd000, 2)];
pub(super) const TABLE_BYTES: u64 = 0x1_0000;
/// What is mapped, mostly.
const DATA: u64 = 0x120_0000;
const DATA_PAGES: u64 = 16;

/// Where addresses differ, by level from 1 on. Nothing below 16 MiB of a gigabyte, where machines have other things.
pub(super) const INDICES: [&[u64]; 4] =
    [&[0, 1, 2, 0xff, 0x100, 0x1ff], &[8, 9, 0x7f, 0x80], &[0, 1, 2], &[0, 1, 0x1ff]];

impl Random {
    pub(super) fn iova(&mut self) -> u64 {
        if self.percent(2) {
            // Wider than any table.
            return 1 << 48 | 8 << 21;
        }
        let mut iova = 0;
        for (level, indices) in (0..).zip(INDICES) {
            iova |= self.one(indices) << (12 + 9 * level);
        }
        iova
    }

    /// Where a table may be that is none.
    pub(super) fn nowhere(&mut self) -> u64 {
        let inside = RAM + 0x1000 * self.below(16);
        self.one(&[RAM, inside, 1 << 40, 0x7fff_f000])
    }

    pub(super) fn root_entry(&mut self) -> [u64; 2] {
        let table = CONTEXTS + 0x1000 * self.below(2);
        match self.below(150) {
            0 => [table, 0],
            1 => [table | 1 | 1 << (1 + self.below(11)), 0],
            2 => [table | 1, 1 << self.below(64)],
            3 => [self.nowhere() | 1, 0],
            4 => [table | 1 | 1 << (48 + self.below(16)), 0],
            _ => [table | 1, 0],
        }
    }

    pub(super) fn context_entry(&mut self) -> [u64; 2] {
        let (width, levels) = self.one(&[(1, 3), (2, 4), (2, 4), (2, 4)]);
        let (first, count) = LEVELS[levels - 1];
        let root = first + 0x1000 * self.below(count);
        let quiet = if self.percent(12) { 2 } else { 0 };
        let (low, high) = (root | 1 | quiet, width | (1 + self.below(3)) << 8);
        match self.below(60) {
            0 => [low & !1, high],
            1 => [low | 1 << (2 + self.below(10)), high],
            2 => [low, high ^ 1 << self.below(64)],
            3 => [self.nowhere() | 1 | quiet, high],
            4 => [low | 1 << (48 + self.below(16)), high],
            5..=8 => [low | 2 << 2, high],
            _ => [low, high],
        }
    }

    /// An entry of a table of a level.
    pub(super) fn entry(&mut self, level: usize) -> u64 {
        let access = self.one(&[3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 1, 2]);
        let is_page = level == 1 || level <= 3 && self.percent(if level == 2 { 30 } else { 15 });
        let target = if is_page { self.target(level) } else { self.table(level - 1) };
        let good = target | access | if is_page && level > 1 { 1 << 7 } else { 0 };
        match self.below(80) {
            0..=2 => 0,
            4 => good & !3,
            // A bit that is nobody's, or reserved.
            5 | 6 => good ^ 1 << self.one(&[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 48, 51, 52, 61, 62, 63]),
            7 if is_page && level > 1 => good | 1 << (12 + self.below(9 * (level as u64 - 1))),
            8 => self.nowhere() | access,
            9 if self.percent(20) => u64::MAX,
            _ => good,
        }
    }

    pub(super) fn table(&mut self, level: usize) -> u64 {
        // Sometimes one of another level, perhaps the same table.
        let level = if self.percent(6) { 1 + self.index(4) } else { level };
        let (first, count) = LEVELS[level - 1];
        first + 0x1000 * self.below(count)
    }

    pub(super) fn target(&mut self, level: usize) -> u64 {
        match level {
            1 => {
                let data = DATA + 0x1000 * self.below(DATA_PAGES);
                let table = TABLES + 0x1000 * self.below(TABLE_BYTES >> 12);
                let interrupts = *INTERRUPTS.start() + 0x1000 * self.below(0x100);
                let nowhere = self.nowhere();
                self.one(&[data, data, data, data, data, data, data, data, table, interrupts, nowhere])
            }
            2 => self.one(&[0x200_0000, 0x220_0000, 0x240_0000, RAM - 0x20_0000, RAM, 0xfee0_0000]),
            _ => self.one(&[0, 0, 0, 1 << 30, 3 << 30]),
        }
    }
}
