//! What the report's pictures are drawn from: a fixed number of buckets, merged as the history grows.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;

use viommu::{Iova, IovaRange};
use viommu_trace::Entry;

use super::picture::{COLUMNS, Cell, Picture};

/// Domains that are drawn.
const PICTURES: usize = 16;
/// First addresses whose last map is remembered.
const REMEMBERED: usize = 1 << 16;
/// Powers of two of distances.
pub(crate) const DISTANCES: usize = 40;

/// One step of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bucket {
    pub(crate) maps: u64,
    pub(crate) unmaps: u64,
    pub(crate) accesses: u64,
    /// The most mappings at a time.
    pub(crate) live: u64,
}

/// Gathers while the history is replayed.
#[derive(Debug)]
pub(crate) struct Stats {
    /// Nanoseconds, or lines where the history has no times.
    origin: Option<u64>,
    has_time: bool,
    width: u64,
    now: usize,
    pub(crate) buckets: Vec<Bucket>,
    live: u64,
    pub(crate) pictures: BTreeMap<u32, Picture>,
    /// Domains that were not drawn.
    pub(crate) not_drawn: bool,
    /// By hash of domain and first address: which, and its number among all maps. What falls together is forgotten.
    last_maps: Vec<(u64, u64)>,
    maps: u64,
    /// Maps by the power of two of the maps since the last one of the same first address.
    pub(crate) distances: [u64; DISTANCES],
    pub(crate) first_uses: u64,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            origin: None,
            has_time: false,
            width: 1,
            now: 0,
            buckets: vec![Bucket::default(); COLUMNS],
            live: 0,
            pictures: BTreeMap::new(),
            not_drawn: false,
            last_maps: vec![(0, 0); REMEMBERED],
            maps: 0,
            distances: [0; DISTANCES],
            first_uses: 0,
        }
    }
}

impl Stats {
    /// The place of what comes next.
    pub(crate) fn at(&mut self, entry: &Entry) {
        let origin = match self.origin {
            Some(origin) => origin,
            None => {
                self.has_time = entry.time.is_some();
                let origin = entry.time.unwrap_or(entry.line);
                self.origin = Some(origin);
                origin
            }
        };
        let at = if self.has_time { entry.time } else { Some(entry.line) };
        let Some(offset) = at.map(|at| at.saturating_sub(origin)) else { return };
        while offset / self.width >= COLUMNS as u64 {
            self.merge();
        }
        let column = usize::try_from(offset / self.width).unwrap_or(COLUMNS - 1);
        while self.now < column {
            self.now += 1;
            if let Some(bucket) = self.buckets.get_mut(self.now) {
                bucket.live = self.live;
            }
        }
    }

    fn merge(&mut self) {
        self.width = self.width.saturating_mul(2);
        self.now /= 2;
        let buckets = core::mem::replace(&mut self.buckets, vec![Bucket::default(); COLUMNS]);
        for (pair, bucket) in buckets.chunks(2).zip(&mut self.buckets) {
            for old in pair {
                bucket.maps += old.maps;
                bucket.unmaps += old.unmaps;
                bucket.accesses += old.accesses;
                bucket.live = bucket.live.max(old.live);
            }
        }
        self.pictures.values_mut().for_each(Picture::merge_columns);
    }

    fn bucket(&mut self) -> Option<&mut Bucket> {
        self.buckets.get_mut(self.now)
    }

    fn mark(&mut self, domain: u32, start: Iova, last: Iova, what: Cell) {
        let room = self.pictures.len() < PICTURES;
        let picture = match self.pictures.entry(domain) {
            Slot::Occupied(slot) => slot.into_mut(),
            Slot::Vacant(slot) if room => slot.insert(Picture::default()),
            Slot::Vacant(_) => {
                self.not_drawn = true;
                return;
            }
        };
        picture.mark(self.now, start.0, last.0, what);
    }

    pub(crate) fn mapped(&mut self, domain: u32, range: IovaRange) {
        self.live += 1;
        self.maps += 1;
        let live = self.live;
        if let Some(bucket) = self.bucket() {
            bucket.maps += 1;
            bucket.live = bucket.live.max(live);
        }
        self.mark(domain, range.start(), range.last(), Cell { maps: 1, accesses: 0 });
        // Page numbers leave 12 bits; 2^64/4096 of them and 32 bits of domain do not fit one word, so it is a mix.
        let key = (range.start().0 >> 12 ^ u64::from(domain) << 52).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let slot = usize::try_from(key >> 48).unwrap_or(0);
        let number = self.maps;
        let Some(last) = self.last_maps.get_mut(slot) else { return };
        if last.0 == key {
            let power = usize::try_from((number - last.1).ilog2()).unwrap_or(0);
            if let Some(count) = self.distances.get_mut(power) {
                *count += 1;
            }
        } else {
            self.first_uses += 1;
        }
        *last = (key, number);
    }

    pub(crate) fn unmapped(&mut self, _domain: u32, _range: IovaRange) {
        self.live = self.live.saturating_sub(1);
        if let Some(bucket) = self.bucket() {
            bucket.unmaps += 1;
        }
    }

    /// Mappings that went with their domain.
    pub(crate) fn dropped(&mut self, count: u64) {
        self.live = self.live.saturating_sub(count);
    }

    pub(crate) fn accessed(&mut self, domain: u32, iova: Iova) {
        if let Some(bucket) = self.bucket() {
            bucket.accesses += 1;
        }
        self.mark(domain, iova, iova, Cell { maps: 0, accesses: 1 });
    }

    /// The buckets that were reached.
    pub(crate) fn columns(&self) -> usize {
        self.now + 1
    }

    /// Seconds in a bucket; `None` where buckets are lines.
    pub(crate) fn seconds(&self) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "for a picture")]
        self.has_time.then_some(self.width as f64 / 1e9)
    }

    /// Lines in a bucket, where there are no times.
    pub(crate) fn width(&self) -> u64 {
        self.width
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use viommu_trace::{Event, Reset};

    fn at(stats: &mut Stats, time: u64) {
        stats.at(&Entry { line: 1, time: Some(time), event: Event::Reset(Reset::System) });
    }

    #[test]
    fn buckets_are_merged_and_lose_nothing() {
        let mut stats = Stats::default();
        for n in 0..10_000_u64 {
            at(&mut stats, n * 1000);
            let range = IovaRange::from_len(Iova((n % 100) << 12), 4096).unwrap();
            stats.mapped(1, range);
            if n >= 50 {
                stats.unmapped(1, range);
            }
        }
        assert_eq!(stats.buckets.len(), COLUMNS);
        assert_eq!(stats.buckets.iter().map(|b| b.maps).sum::<u64>(), 10_000);
        assert_eq!(stats.buckets.iter().map(|b| b.unmaps).sum::<u64>(), 9_950);
        assert_eq!(stats.buckets.iter().map(|b| b.live).max(), Some(51));
        assert!(stats.columns() > COLUMNS / 2);
        // Each address comes again after 100 maps.
        assert_eq!(stats.first_uses, 100);
        assert_eq!(stats.distances[6], 9_900);
    }
}
