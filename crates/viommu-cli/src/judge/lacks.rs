//! What the recorded VMM has mapped and our record does not: refused here, or what our device does not accept.

use std::collections::BTreeMap;

use viommu::{Iova, IovaRange, Mapping};

/// Disjoint mappings of one domain.
#[derive(Debug, Default)]
pub(crate) struct Lacks(BTreeMap<Iova, Mapping>);

impl Lacks {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn insert(&mut self, mapping: Mapping) {
        self.0.insert(mapping.range.start(), mapping);
    }

    /// Those that touch `range`.
    pub(crate) fn touching(&self, range: IovaRange) -> impl Iterator<Item = &Mapping> {
        let before = self.0.range(..range.start()).next_back().map(|(_, m)| m);
        let inside = self.0.range(range.start()..=range.last()).map(|(_, m)| m);
        before.filter(move |m| m.range.overlaps(range)).into_iter().chain(inside)
    }

    pub(crate) fn at(&self, iova: Iova) -> Option<&Mapping> {
        self.0.range(..=iova).next_back().map(|(_, m)| m).filter(|m| m.range.contains(iova))
    }

    /// Takes out all that lie inside `range`; nothing where one sticks out.
    pub(crate) fn take_inside(&mut self, range: IovaRange) -> Vec<Mapping> {
        let touching: Vec<Mapping> = self.touching(range).copied().collect();
        if !touching.iter().all(|m| range.covers(m.range)) {
            return Vec::new();
        }
        for m in &touching {
            self.0.remove(&m.range.start());
        }
        touching
    }

    /// Takes out the one with exactly this range.
    pub(crate) fn take_exact(&mut self, range: IovaRange) -> Option<Mapping> {
        let found = self.0.get(&range.start()).is_some_and(|m| m.range == range);
        found.then(|| self.0.remove(&range.start())).flatten()
    }

    pub(crate) fn take_all(&mut self) -> Vec<Mapping> {
        core::mem::take(&mut self.0).into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use viommu::{Access, Gpa};

    #[test]
    fn mappings_are_found_by_what_they_touch_and_taken_whole() {
        let range = |a, b| IovaRange::new(Iova(a), Iova(b)).unwrap();
        let m = |a, b| Mapping::over(range(a, b), Gpa(0), Access::RW).unwrap();
        let mut lacks = Lacks::default();
        lacks.insert(m(0x1000, 0x2fff));
        lacks.insert(m(0x4000, 0x4fff));
        assert_eq!(lacks.touching(range(0x2000, 0x4000)).count(), 2);
        assert_eq!(lacks.touching(range(0x3000, 0x3fff)).count(), 0);
        assert_eq!(lacks.at(Iova(0x2fff)), Some(&m(0x1000, 0x2fff)));
        assert_eq!(lacks.at(Iova(0x3000)), None);
        assert!(lacks.take_inside(range(0x2000, 0x5000)).is_empty());
        assert_eq!(lacks.take_exact(range(0x1000, 0x1fff)), None);
        assert_eq!(lacks.take_inside(range(0, 0x3fff)), [m(0x1000, 0x2fff)]);
        assert_eq!(lacks.take_all(), [m(0x4000, 0x4fff)]);
        assert!(lacks.is_empty());
    }
}
