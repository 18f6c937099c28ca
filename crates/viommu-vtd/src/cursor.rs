//! A walk over all of a guest's page tables, for a mirror's sync: in ascending order, a bounded piece at a time.

use viommu::domain::{Found, Walk};
use viommu::{Access, Gpa, Iova};

use crate::memory::TableMemory;
use crate::paging::{ENTRIES, Entry, LEVELS, Paging, Rules, index, mask, page, place, usable};

/// Entries that one slice of a sync reads, about.
pub(crate) const SLICE_ENTRIES: u64 = 8192;

/// Walks tables. Made for one slice; each entry is read once in it.
pub(crate) struct Cursor<'m> {
    memory: &'m dyn TableMemory,
    rules: Rules,
    paging: Paging,
    /// Tables on the way to where it is, by level less one.
    path: [Option<Table>; 5],
    /// The last answer: from where, up to where, what.
    answer: Option<(Iova, Iova, Found)>,
    left: u64,
    /// Entries read.
    pub(crate) spent: u64,
    /// The beginnings of the first and the last question.
    asked: Option<(Iova, Iova)>,
}

/// A table, and the piece of it that has been read.
struct Table {
    /// The first address that it covers.
    start: Iova,
    at: Gpa,
    /// What the entries above allow.
    access: Access,
    first: u64,
    words: Vec<u64>,
}

/// Where the walk stands.
enum Stop {
    Page(viommu::Mapping),
    /// Nothing up to here, inclusive.
    Hole(Iova),
}

impl<'m> Cursor<'m> {
    pub(crate) fn new(memory: &'m dyn TableMemory, rules: Rules, paging: Paging) -> Self {
        Self {
            memory,
            rules,
            paging,
            path: [const { None }; 5],
            answer: None,
            left: SLICE_ENTRIES,
            spent: 0,
            asked: None,
        }
    }

    /// Up to where (exclusive) a sync that failed after these questions has compared for sure; `None`: to the end.
    pub(crate) fn compared(&self) -> Option<Iova> {
        let (first, last) = self.asked?;
        if last > first {
            return Some(last);
        }
        match self.answer? {
            (_, _, Found::Extent(m)) => m.range.next(),
            (_, _, Found::NotYet(at)) => Some(at),
            (_, last, Found::Nothing) => last.checked_add(1),
        }
    }

    fn known(&self, from: Iova, last: Iova) -> Option<Found> {
        let (start, end, found) = self.answer?;
        match found {
            _ if from < start => None,
            Found::Extent(m) if from <= m.range.last() => {
                Some(if m.range.start() <= last { found } else { Found::Nothing })
            }
            Found::Nothing if last <= end => Some(Found::Nothing),
            Found::NotYet(at) if from < at => Some(if last < at { Found::Nothing } else { found }),
            _ => None,
        }
    }

    fn search(&mut self, from: Iova, last: Iova) -> Found {
        let last = last.min(self.rules.last(self.paging));
        let mut at = from;
        while at <= last {
            let hole = match self.look(at, last) {
                Stop::Page(page) => return Found::Extent(page),
                Stop::Hole(hole) => hole,
            };
            let Some(next) = hole.checked_add(1) else { break };
            at = next;
            if self.left == 0 && at <= last {
                // A question behind a pause is one of the next slice's beginning.
                self.left = ENTRIES;
                return Found::NotYet(at);
            }
        }
        Found::Nothing
    }

    /// What is at `at`.
    fn look(&mut self, at: Iova, last: Iova) -> Stop {
        let mut level = self.paging.levels.min(LEVELS);
        // The lowest table that is known to cover it.
        let mut table =
            Table { start: Iova(0), at: self.paging.root, access: Access::RW, first: 0, words: Vec::new() };
        let levels = level;
        for known in 1..=levels {
            let covers = |table: &Table| table.start == Iova(at.0 & !mask(known.saturating_add(1)));
            if let Some(found) = self.slot(known).take_if(|table| covers(table)) {
                (level, table) = (known, found);
                break;
            }
        }
        loop {
            let raw = self.entry(&mut table, level, at, last);
            let entry = raw.map_or(Entry::Absent, |raw| self.rules.decode(self.paging.format, level, raw));
            let access = table.access;
            *self.slot(level) = Some(table);
            if raw.is_none() {
                // No memory there: no entry of this table can be read.
                return Stop::Hole(Iova(at.0 | mask(level.saturating_add(1))));
            }
            let hole = Stop::Hole(Iova(at.0 | mask(level)));
            match entry {
                Entry::Absent | Entry::Reserved => return hole,
                Entry::Page(gpa, own) => {
                    let allowed = access & own;
                    let whole = page(at, level, gpa, allowed).filter(|_| !allowed.is_empty());
                    let Some(whole) = whole else { return hole };
                    return usable(whole, at, self.paging.has_pasid).map_or_else(Stop::Hole, Stop::Page);
                }
                Entry::Table(next, own) => {
                    let start = Iova(at.0 & !mask(level));
                    table = Table { start, at: next, access: access & own, first: 0, words: Vec::new() };
                    level = level.saturating_sub(1);
                    if level == 0 {
                        return hole;
                    }
                }
            }
        }
    }

    fn slot(&mut self, level: u32) -> &mut Option<Table> {
        let [first, rest @ ..] = &mut self.path;
        let at = usize::try_from(level.saturating_sub(2)).unwrap_or(0);
        if level <= 1 { first } else { rest.get_mut(at).unwrap_or(first) }
    }

    /// The entry of `at`: read with those behind it that the walk up to `last` will want.
    fn entry(&mut self, table: &mut Table, level: u32, at: Iova, last: Iova) -> Option<u64> {
        let index = index(at, level);
        let known = |table: &Table| {
            let place = usize::try_from(index.checked_sub(table.first)?).ok()?;
            table.words.get(place).copied()
        };
        if let Some(raw) = known(table) {
            return Some(raw);
        }
        let here = last.min(Iova(at.0 | mask(level.saturating_add(1))));
        let wanted = self::index(here, level).saturating_sub(index).saturating_add(1);
        let wanted = wanted.min(self.left.max(1));
        self.left = self.left.saturating_sub(wanted);
        self.spent = self.spent.saturating_add(wanted);
        table.first = index;
        table.words.clear();
        table.words.resize(usize::try_from(wanted).unwrap_or(1), 0);
        let there = place(table.at, index).is_some_and(|at| self.memory.read(Gpa(at), &mut table.words));
        if !there {
            table.words.clear();
            return None;
        }
        known(table)
    }
}

impl Walk for Cursor<'_> {
    fn next(&mut self, from: Iova, last: Iova) -> Found {
        let first = self.asked.map_or(from, |(first, _)| first);
        self.asked = Some((first, from));
        if let Some(found) = self.known(from, last) {
            return found;
        }
        let found = self.search(from, last);
        self.answer = Some((from, last, found));
        found
    }
}
