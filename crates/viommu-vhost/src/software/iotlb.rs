//! The device IOTLB: its entries and the rules by which they come and go.

use std::collections::BTreeMap;

use viommu::{Access, Gpa, Iova, IovaRange, Mapping};

/// Linux's default of vhost's module parameter `max_iotlb_entries`.
pub const DEFAULT_CAPACITY: usize = 2048;

/// What an access of the device meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// This address.
    Hit(Gpa),
    /// No entry: the back-end asks for one, and waits for it.
    Miss,
    /// An entry that does not allow it. Nothing is asked: the access has failed.
    Denied,
    /// No IOTLB: the device was cut off, and nothing is asked.
    Fenced,
}

/// The device was cut off: it has no IOTLB to fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no device IOTLB: the device was cut off")]
pub struct Fenced;

/// What happened so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Counts {
    /// Lookups answered with an address.
    pub hits: u64,
    /// Lookups without an entry.
    pub misses: u64,
    /// Lookups that an entry denied.
    pub denied: u64,
    /// Entries that updates made.
    pub fills: u64,
    /// Entries that made room for newer ones.
    pub evictions: u64,
    /// Calls of [`Iotlb::invalidate`].
    pub invalidations: u64,
    /// Entries that those dropped.
    pub invalidated: u64,
    /// Entries that a [`SoftwareCache`](super::SoftwareCache) dropped for a fill over them.
    pub displaced: u64,
}

/// When an entry came: the lowest is the oldest.
type Age = u64;

/// A device IOTLB.
#[derive(Clone, Debug)]
pub struct Iotlb {
    capacity: usize,
    /// By first address; entries with the same one in the order they came.
    entries: BTreeMap<(Iova, Age), Mapping>,
    /// The same entries, oldest first.
    by_age: BTreeMap<Age, Iova>,
    next_age: Age,
    /// Pairs of entries that overlap. While there is none, one entry at most is near an address.
    overlaps: usize,
    counts: Counts,
    fenced: bool,
}

impl Default for Iotlb {
    /// With the kernel's capacity, 2048 entries.
    fn default() -> Self {
        Self::new(DEFAULT_CAPACITY)
    }
}

impl Iotlb {
    /// Empty, for `capacity` entries; 0 means without limit, as in the kernel.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity,
            entries: BTreeMap::new(),
            by_age: BTreeMap::new(),
            next_age: 0,
            overlaps: 0,
            counts: Counts::default(),
            fenced: false,
        }
    }

    /// UPDATE: one more entry; where it is full, the oldest goes. `[0, 2^64-1]` becomes two entries.
    ///
    /// What is there already is not looked at. An entry over a live one leaves both, and the device finds either: who
    /// changes an entry invalidates it first.
    ///
    /// # Errors
    /// [`Fenced`] after [`fence`](Self::fence); nothing changes.
    pub fn update(&mut self, entry: &Mapping) -> Result<(), Fenced> {
        if self.fenced {
            return Err(Fenced);
        }
        if entry.range == IovaRange::ALL {
            let middle = Iova(u64::MAX / 2);
            let halves =
                [IovaRange::new(Iova(0), middle), IovaRange::new(Iova(middle.0 + 1), Iova(u64::MAX))];
            halves
                .into_iter()
                .flatten()
                .filter_map(|half| entry.clip(half))
                .for_each(|half| self.insert(half));
        } else {
            self.insert(*entry);
        }
        Ok(())
    }

    /// INVALIDATE: drops every entry that shares an address with `range`, wholly. The number of them.
    pub fn invalidate(&mut self, range: IovaRange) -> usize {
        self.counts.invalidations += 1;
        let gone = self.drop_touching(range);
        self.counts.invalidated += gone as u64;
        gone
    }

    /// Makes room over `range`, so that an update there overlaps nothing.
    pub(super) fn displace(&mut self, range: IovaRange) {
        self.counts.displaced += self.drop_touching(range) as u64;
    }

    /// What an access of the device meets. Where entries overlap, the one that starts first is found, and the older
    /// of those that start together.
    pub fn lookup(&mut self, iova: Iova, access: Access) -> Lookup {
        if self.fenced {
            return Lookup::Fenced;
        }
        match self.entry(iova) {
            None => {
                self.counts.misses += 1;
                Lookup::Miss
            }
            Some(entry) if entry.access.contains(access) => {
                let gpa = entry.translate(iova);
                self.counts.hits += 1;
                Lookup::Hit(gpa)
            }
            Some(_) => {
                self.counts.denied += 1;
                Lookup::Denied
            }
        }
    }

    /// The entry that a lookup of `iova` finds; not counted.
    #[must_use]
    pub fn entry(&self, iova: Iova) -> Option<&Mapping> {
        let mut before = self.entries.range(..=(iova, Age::MAX)).map(|(_, entry)| entry);
        if self.overlaps == 0 {
            before.next_back().filter(|entry| entry.range.contains(iova))
        } else {
            before.find(|entry| entry.range.contains(iova))
        }
    }

    /// The entry that makes room next.
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    pub(crate) fn oldest(&self) -> Option<&Mapping> {
        let (&age, &start) = self.by_age.first_key_value()?;
        self.entries.get(&(start, age))
    }

    /// Every entry, in the order of the device's addresses.
    pub fn iter(&self) -> impl Iterator<Item = &Mapping> + '_ {
        self.entries.values()
    }

    /// Entries held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Entries that fit; 0 means without limit.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Pairs of entries that overlap: 0 unless a writer forgot to invalidate what it changes.
    #[must_use]
    pub fn overlaps(&self) -> usize {
        self.overlaps
    }

    /// Takes the IOTLB away, as clearing the device's feature does: every entry goes, and every access fails.
    pub fn fence(&mut self) {
        self.clear();
        self.fenced = true;
    }

    /// A fresh, empty IOTLB of the same capacity; the counts go on.
    pub fn reset(&mut self) {
        self.clear();
        self.fenced = false;
    }

    /// Whether it was taken away.
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        self.fenced
    }

    fn clear(&mut self) {
        self.entries.clear();
        self.by_age.clear();
        self.overlaps = 0;
    }

    fn insert(&mut self, entry: Mapping) {
        if self.capacity != 0
            && self.entries.len() >= self.capacity
            && let Some((&age, &start)) = self.by_age.first_key_value()
        {
            self.remove(start, age);
            self.counts.evictions += 1;
        }
        self.overlaps += self.touching(entry.range).count();
        let (start, age) = (entry.range.start(), self.next_age);
        self.next_age += 1;
        self.entries.insert((start, age), entry);
        self.by_age.insert(age, start);
        self.counts.fills += 1;
    }

    fn drop_touching(&mut self, range: IovaRange) -> usize {
        let gone: Vec<_> = self.touching(range).map(|(&key, _)| key).collect();
        for &(start, age) in &gone {
            self.remove(start, age);
        }
        gone.len()
    }

    fn remove(&mut self, start: Iova, age: Age) {
        self.by_age.remove(&age);
        let Some(entry) = self.entries.remove(&(start, age)) else { return };
        if self.overlaps != 0 {
            self.overlaps -= self.touching(entry.range).count();
        }
    }

    /// Every entry that shares an address with `range`, in order.
    fn touching(&self, range: IovaRange) -> impl Iterator<Item = (&(Iova, Age), &Mapping)> {
        let start = (range.start(), 0);
        let inside = self.entries.range(start..=(range.last(), Age::MAX));
        // Of those that start before it, only the last can reach in, unless entries overlap.
        let look_back = if self.overlaps == 0 { 1 } else { self.entries.len() };
        let before = self.entries.range(..start).rev().take(look_back);
        before.filter(move |(_, entry)| entry.range.overlaps(range)).chain(inside)
    }
}

#[cfg(test)]
#[path = "iotlb_tests.rs"]
mod tests;
