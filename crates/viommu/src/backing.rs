//! What lies at the guest's physical addresses, as the embedder tells it.

use core::cell::Cell;
use core::ops::Deref;

use crate::addr::{Gpa, GpaRange};
use crate::mapping::Mapping;
use crate::sync::Arc;

/// What an extent of guest physical addresses is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Medium {
    /// Memory that can be read and written.
    Ram,
    /// Memory that can only be read: a mirror never gets write access to it, whatever the guest maps.
    Rom,
    /// Device registers.
    Mmio,
}

/// One extent of backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it lies, inclusive.
    pub range: GpaRange,
    /// What it is made of.
    pub medium: Medium,
}

/// The extents, ascending and disjoint. Neighbours stay two: a host maps each by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Backing {
    extents: Vec<Extent>,
}

impl Backing {
    /// Index of the first extent that ends at or after `gpa`.
    #[inline]
    fn from(&self, gpa: Gpa) -> usize {
        self.extents.partition_point(|e| e.range.last() < gpa)
    }

    /// Adds an extent; `false` (and no change) when it overlaps one.
    pub(crate) fn add(&mut self, extent: Extent) -> bool {
        let at = self.from(extent.range.start());
        if self.extents.get(at).is_some_and(|e| e.range.overlaps(extent.range)) {
            return false;
        }
        self.extents.insert(at, extent);
        true
    }

    /// Removes exactly this extent; `None` (and no change) when there is none with these bounds.
    pub(crate) fn remove(&mut self, range: GpaRange) -> Option<Extent> {
        let at = self.from(range.start());
        (self.extents.get(at)?.range == range).then(|| self.extents.remove(at))
    }

    pub(crate) fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The extents that touch `range`, ascending.
    #[inline]
    pub(crate) fn over(&self, range: GpaRange) -> impl Iterator<Item = &Extent> {
        self.extents
            .get(self.from(range.start())..)
            .unwrap_or_default()
            .iter()
            .take_while(move |e| e.range.start() <= range.last())
    }

    /// Whether every byte of `range` lies in an extent.
    pub(crate) fn holds(&self, range: GpaRange) -> bool {
        let mut next = Some(range.start());
        for extent in self.over(range) {
            if next.is_none_or(|next| !extent.range.contains(next)) {
                return false;
            }
            if extent.range.last() >= range.last() {
                return true;
            }
            next = extent.range.next();
        }
        false
    }

    /// The extent that holds `gpa`.
    #[inline]
    pub(crate) fn at(&self, gpa: Gpa) -> Option<&Extent> {
        self.extents.get(self.from(gpa)).filter(|e| e.range.contains(gpa))
    }
}

/// The backing as one address space uses it: it remembers which memory was asked for last, for that is asked for next as
/// a rule.
#[derive(Clone)]
pub(crate) struct Memory {
    backing: Arc<Backing>,
    near: Cell<Option<GpaRange>>,
}

impl Memory {
    pub(crate) fn new(backing: Arc<Backing>) -> Self {
        Self { backing, near: Cell::new(None) }
    }

    /// Whether all of the mapping's target is one extent of memory.
    #[inline]
    pub(crate) fn is_ram_behind(&self, mapping: &Mapping) -> bool {
        let last = mapping.gpa_last();
        let holds = |range: GpaRange| range.start() <= mapping.gpa && last <= range.last();
        // A target that wraps is in no extent.
        if mapping.gpa <= last && self.near.get().is_some_and(holds) {
            return true;
        }
        self.look_behind(mapping)
    }

    #[inline(never)]
    fn look_behind(&self, mapping: &Mapping) -> bool {
        let Some(target) = GpaRange::new(mapping.gpa, mapping.gpa_last()) else { return false };
        let extent = self.backing.at(mapping.gpa).filter(|e| e.medium == Medium::Ram);
        let Some(extent) = extent.filter(|e| e.range.covers(target)) else { return false };
        self.near.set(Some(extent.range));
        true
    }
}

impl Deref for Memory {
    type Target = Backing;

    #[inline]
    fn deref(&self) -> &Backing {
        &self.backing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Iova;
    use crate::mapping::Access;

    #[test]
    fn memory_behind_a_mapping_is_one_extent_of_ram_wherever_the_one_before_was() {
        let mut b = Backing::default();
        b.add(ram(0, 0x1fff));
        b.add(ram(0x2000, 0x3fff));
        let rom = GpaRange::new(Gpa(0x8000), Gpa(0x8fff)).unwrap();
        b.add(Extent { range: rom, medium: Medium::Rom });
        let memory = Memory::new(Arc::new(b));
        let asked = |gpa: u64, bytes: u64| {
            memory.is_ram_behind(&Mapping::new(Iova(0), bytes, Gpa(gpa), Access::RW).unwrap())
        };
        for _ in 0..2 {
            assert!(asked(0x1000, 0x1000) && asked(0x2000, 0x2000));
            assert!(!asked(0x1000, 0x2000), "two extents");
            assert!(!asked(0x8000, 0x1000), "read-only");
            assert!(!asked(0x5000, 0x1000), "nothing");
        }
    }

    fn ram(start: u64, last: u64) -> Extent {
        Extent { range: GpaRange::new(Gpa(start), Gpa(last)).unwrap(), medium: Medium::Ram }
    }

    #[test]
    fn add_refuses_overlap_and_keeps_order() {
        let mut b = Backing::default();
        assert!(b.add(ram(0x4000, 0x4fff)));
        assert!(b.add(ram(0, 0xfff)));
        assert!(!b.add(ram(0x800, 0x1fff)));
        assert!(!b.add(ram(0, u64::MAX)));
        assert!(b.add(ram(0x5000, u64::MAX)));
        let starts: Vec<u64> = b.over(GpaRange::ALL).map(|e| e.range.start().0).collect();
        assert_eq!(starts, [0, 0x4000, 0x5000]);
    }

    #[test]
    fn holds_when_there_is_no_gap() {
        let mut b = Backing::default();
        b.add(ram(0x1000, 0x1fff));
        b.add(ram(0x2000, 0x3fff));
        b.add(ram(0x5000, u64::MAX));
        let holds = |start, last| b.holds(GpaRange::new(Gpa(start), Gpa(last)).unwrap());
        assert!(holds(0x1800, 0x2fff) && holds(0x1000, 0x3fff) && holds(0x6000, u64::MAX));
        assert!(!holds(0xfff, 0x1000) && !holds(0x3fff, 0x5000) && !holds(0x4000, 0x4fff));
        assert!(!holds(0, u64::MAX));
    }

    #[test]
    fn remove_takes_exact_extents_only() {
        let mut b = Backing::default();
        b.add(ram(0, 0xfff));
        assert_eq!(b.remove(GpaRange::new(Gpa(0), Gpa(0x7ff)).unwrap()), None);
        assert!(b.remove(GpaRange::new(Gpa(0), Gpa(0xfff)).unwrap()).is_some());
        assert!(b.extents().is_empty());
    }

    #[test]
    fn at_finds_what_holds_an_address() {
        let mut b = Backing::default();
        b.add(ram(0, 0xfff));
        b.add(ram(0x2000, 0x2fff));
        assert_eq!(b.at(Gpa(0x2fff)).unwrap().range.start(), Gpa(0x2000));
        assert!(b.at(Gpa(0x1000)).is_none());
        assert!(b.at(Gpa(0x3000)).is_none());
        assert_eq!(b.at(Gpa(0)).unwrap().range.start(), Gpa(0));
    }
}
