//! What the back end may hold: at least what it does.

use std::collections::BTreeMap;

use viommu::{Iova, IovaRange, Mapping};

/// Disjoint extents that were sent and not taken back. A back end may have dropped any of them.
#[derive(Debug, Default)]
pub(super) struct Held(BTreeMap<Iova, Mapping>);

impl Held {
    /// The extents that `range` touches, ascending.
    fn touched(&self, range: IovaRange) -> Vec<Mapping> {
        let before =
            self.0.range(..=range.start()).next_back().filter(|(_, m)| m.range.last() >= range.start());
        let from = before.map_or_else(|| range.start(), |(start, _)| *start);
        self.0.range(from..=range.last()).map(|(_, mapping)| *mapping).collect()
    }

    /// Adds `entry`. Gives what must be taken back before: what says something else about an address of it.
    pub(super) fn add(&mut self, entry: &Mapping) -> Vec<IovaRange> {
        let (mut all, mut stale) = (*entry, Vec::new());
        for old in self.touched(entry.range) {
            self.0.remove(&old.range.start());
            let goes_on = old.gpa.0.wrapping_sub(old.range.start().0)
                == entry.gpa.0.wrapping_sub(entry.range.start().0);
            if goes_on && (old.access, old.target) == (entry.access, entry.target) {
                let (first, last) =
                    (old.range.start().min(all.range.start()), old.range.last().max(all.range.last()));
                let gpa = if first == old.range.start() { old.gpa } else { all.gpa };
                all = IovaRange::new(first, last).map_or(all, |range| Mapping { range, gpa, ..all });
            } else {
                stale.push(old.range);
            }
        }
        self.0.insert(all.range.start(), all);
        stale
    }

    /// Removes `range`; whether there was anything. What sticks out stays: the back end may have it still.
    pub(super) fn remove(&mut self, range: IovaRange) -> bool {
        let touched = self.touched(range);
        for old in &touched {
            self.0.remove(&old.range.start());
            let before =
                range.start().0.checked_sub(1).and_then(|last| IovaRange::new(old.range.start(), Iova(last)));
            let behind =
                range.last().checked_add(1).and_then(|first| IovaRange::new(first, old.range.last()));
            for rest in [before, behind].into_iter().flatten().filter_map(|part| old.clip(part)) {
                self.0.insert(rest.range.start(), rest);
            }
        }
        !touched.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn all(&self) -> Vec<Mapping> {
        self.0.values().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use viommu::{Access, Gpa};

    proptest! {
        /// Page by page it is a map, and what it wants taken back is what changes.
        #[test]
        fn extents_say_of_each_page_what_a_map_of_pages_does(
            steps in prop::collection::vec((any::<bool>(), 0_u64..16, 1_u64..6, 0_u64..3, any::<bool>()), 1..60)
        ) {
            let (mut held, mut pages) = (Held::default(), BTreeMap::new());
            for (add, first, count, target, write) in steps {
                let range = IovaRange::from_len(Iova(first << 12), count << 12).unwrap();
                let numbers = first..first + count;
                if add {
                    let access = if write { Access::RW } else { Access::READ };
                    let gpa = Gpa((target * 64 + first) << 12);
                    let stale = held.add(&Mapping::over(range, gpa, access).unwrap());
                    for page in 0..32_u64 {
                        let new = numbers.contains(&page).then_some(((target * 64 + page) << 12, access));
                        let old: Option<&(u64, Access)> = pages.get(&page);
                        let wrong = new.is_some() && old.is_some() && old != new.as_ref();
                        let told = stale.iter().any(|range| range.contains(Iova(page << 12)));
                        prop_assert!(told || !wrong, "page {page} is changed with nobody told");
                        if told {
                            pages.remove(&page);
                        }
                        if let Some(new) = new {
                            pages.insert(page, new);
                        }
                    }
                } else {
                    let had = numbers.clone().filter(|page| pages.remove(page).is_some()).count();
                    prop_assert_eq!(held.remove(range), had > 0);
                }
                let mut said = BTreeMap::new();
                for mapping in held.all() {
                    let first = mapping.range.start().0 >> 12;
                    for page in first..=mapping.range.last().0 >> 12 {
                        let gpa = mapping.gpa.0 + ((page - first) << 12);
                        prop_assert!(said.insert(page, (gpa, mapping.access)).is_none());
                    }
                }
                prop_assert_eq!(&said, &pages);
            }
        }
    }
}
