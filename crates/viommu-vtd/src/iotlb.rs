//! Translations that have been walked: a bounded table of leaves, looked into without a lock.

use core::sync::atomic::{AtomicU64, Ordering, fence};

use viommu::{Access, Gpa, Iova, IovaRange, Mapping};

use crate::paging::{mask, page, shift};

/// Slots for pages of each size, by level less one; powers of two.
const SLOTS: [usize; 3] = [512, 64, 16];
/// Bits of a slot's value that are the access.
const ACCESS: u64 = 3;
/// A tag's bit that says that there is something.
const USED: u64 = 1;

/// Entries are replaced, never more than there are slots.
pub(crate) struct Iotlb {
    levels: [Box<[Slot]>; 3],
    /// Counts all invalidations: who has walked across one keeps nothing.
    changes: AtomicU64,
    /// Counts invalidations of everything: what is older is not there.
    epoch: AtomicU64,
    /// Whether there has been an entry of the level, for the two upper ones.
    large: [AtomicU64; 2],
}

/// One entry. Odd: it is being written.
#[derive(Default)]
struct Slot {
    sequence: AtomicU64,
    tag: AtomicU64,
    value: AtomicU64,
    epoch: AtomicU64,
}

/// What has been invalidated before a walk began.
#[derive(Clone, Copy)]
pub(crate) struct Before(u64);

impl Iotlb {
    pub(crate) fn new() -> Self {
        let slots = |count: usize| (0..count).map(|_| Slot::default()).collect();
        Self {
            levels: SLOTS.map(slots),
            changes: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            large: Default::default(),
        }
    }

    fn slot(&self, iova: Iova, level: u32) -> Option<&Slot> {
        let slots = self.levels.get(usize::try_from(level.checked_sub(1)?).ok()?)?;
        let number = usize::try_from(iova.0.checked_shr(shift(level))?).ok()?;
        slots.get(number & slots.len().saturating_sub(1))
    }

    /// The page that holds `iova`, if it is known.
    #[inline]
    pub(crate) fn get(&self, iova: Iova) -> Option<Mapping> {
        let epoch = self.epoch.load(Ordering::Acquire);
        let [two_mib, one_gib] = &self.large;
        self.get_at(iova, 1, epoch)
            .or_else(|| (two_mib.load(Ordering::Relaxed) != 0).then(|| self.get_at(iova, 2, epoch))?)
            .or_else(|| (one_gib.load(Ordering::Relaxed) != 0).then(|| self.get_at(iova, 3, epoch))?)
    }

    #[inline]
    fn get_at(&self, iova: Iova, level: u32, epoch: u64) -> Option<Mapping> {
        let slot = self.slot(iova, level)?;
        let sequence = slot.sequence.load(Ordering::Acquire);
        let tag = slot.tag.load(Ordering::Relaxed);
        let value = slot.value.load(Ordering::Relaxed);
        let of = slot.epoch.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let whole = sequence & 1 == 0 && slot.sequence.load(Ordering::Relaxed) == sequence;
        if !whole || of != epoch || tag != iova.0 & !mask(level) | USED {
            return None;
        }
        let access = Access::from_bits_truncate(u8::try_from(value & ACCESS).unwrap_or(0));
        page(iova, level, Gpa(value & !mask(1)), access)
    }

    /// To be called before a walk, whose result is kept if nothing was invalidated meanwhile.
    pub(crate) fn before(&self) -> Before {
        Before(self.changes.load(Ordering::SeqCst))
    }

    /// Keeps the page of `found`, a leaf of a walk, or what the interrupts leave of it.
    pub(crate) fn put(&self, found: &Mapping, before: Before) {
        // Less the interrupts it may be smaller: then it is not kept.
        let level = (1..=3).find(|level| {
            let bytes = u128::from(mask(*level)).saturating_add(1);
            found.range.bytes() == bytes && found.range.start().0 & mask(*level) == 0
        });
        let Some(slot) = level.and_then(|level| self.slot(found.range.start(), level)) else { return };
        slot.write(|| {
            if self.changes.load(Ordering::SeqCst) != before.0 {
                return;
            }
            let large = level.and_then(|level| self.large.get(usize::try_from(level.checked_sub(2)?).ok()?));
            if let Some(large) = large {
                large.store(1, Ordering::Relaxed);
            }
            slot.tag.store(found.range.start().0 | USED, Ordering::Relaxed);
            slot.value.store(found.gpa.0 | u64::from(found.access.bits()), Ordering::Relaxed);
            slot.epoch.store(self.epoch.load(Ordering::SeqCst), Ordering::Relaxed);
        });
    }

    /// Forgets every page that touches `range`.
    pub(crate) fn invalidate(&self, range: IovaRange) {
        self.changes.fetch_add(1, Ordering::SeqCst);
        if range.bytes() > 1 << 30 {
            // More than it could ever hold in small pages: all.
            self.epoch.fetch_add(1, Ordering::SeqCst);
            return;
        }
        for (level, slots) in (1..).zip(&self.levels) {
            let pages = range
                .last()
                .0
                .checked_shr(shift(level))
                .unwrap_or(0)
                .saturating_sub(range.start().0.checked_shr(shift(level)).unwrap_or(0));
            let few = usize::try_from(pages).is_ok_and(|pages| pages < slots.len());
            let bytes = mask(level).saturating_add(1);
            match few {
                true => (0..=pages).for_each(|page| {
                    let at = range.start().0.saturating_add(page.saturating_mul(bytes));
                    if let Some(slot) = self.slot(Iova(at), level) {
                        slot.forget(range, level);
                    }
                }),
                false => slots.iter().for_each(|slot| slot.forget(range, level)),
            }
        }
    }
}

impl Slot {
    /// Alone: who writes waits for another one, which is short.
    fn write(&self, change: impl FnOnce()) {
        loop {
            let sequence = self.sequence.load(Ordering::Relaxed) & !1;
            let taken = sequence.wrapping_add(1);
            let outcome =
                self.sequence.compare_exchange_weak(sequence, taken, Ordering::AcqRel, Ordering::Relaxed);
            if outcome.is_ok() {
                fence(Ordering::Release);
                change();
                self.sequence.store(taken.wrapping_add(1), Ordering::Release);
                return;
            }
            core::hint::spin_loop();
        }
    }

    fn forget(&self, range: IovaRange, level: u32) {
        self.write(|| {
            let start = self.tag.load(Ordering::Relaxed) & !mask(level);
            if start <= range.last().0 && start | mask(level) >= range.start().0 {
                self.tag.store(0, Ordering::Relaxed);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(iova: u64, bytes: u64, gpa: u64) -> Mapping {
        Mapping::new(Iova(iova), bytes, Gpa(gpa), Access::RW).unwrap()
    }

    fn range(start: u64, bytes: u64) -> IovaRange {
        IovaRange::from_len(Iova(start), bytes).unwrap()
    }

    #[test]
    fn get_when_put_gives_the_whole_page_of_any_size() {
        let iotlb = Iotlb::new();
        let pages =
            [leaf(0x1000, 0x1000, 0x9000), leaf(2 << 20, 2 << 20, 4 << 20), leaf(5 << 30, 1 << 30, 1 << 30)];
        for page in &pages {
            iotlb.put(page, iotlb.before());
        }
        assert_eq!(iotlb.get(Iova(0x1234)), Some(pages[0]));
        assert_eq!(iotlb.get(Iova((2 << 20) + 0x12345)), Some(pages[1]));
        assert_eq!(iotlb.get(Iova((6 << 30) - 1)), Some(pages[2]));
        assert_eq!(iotlb.get(Iova(0x2000)), None);
        assert_eq!(iotlb.get(Iova(0)), None);
        assert_eq!(iotlb.get(Iova(0x1000 + 1024 * 0x1000)), None, "another page of the same slot");
    }

    #[test]
    fn invalidate_when_a_range_touches_a_large_page_forgets_it_and_no_other() {
        let iotlb = Iotlb::new();
        let pages = [leaf(0x1000, 0x1000, 0), leaf(2 << 20, 2 << 20, 0), leaf(4 << 20, 2 << 20, 0)];
        for page in &pages {
            iotlb.put(page, iotlb.before());
        }
        iotlb.invalidate(range((4 << 20) - 0x1000, 0x1000));
        assert_eq!(iotlb.get(Iova(2 << 20)), None);
        assert!(iotlb.get(Iova(0x1000)).is_some() && iotlb.get(Iova(4 << 20)).is_some());
        iotlb.invalidate(range(0, 1 << 30));
        assert!(pages.iter().all(|page| iotlb.get(page.range.start()).is_none()));
    }

    #[test]
    fn invalidate_when_everything_is_meant_forgets_everything() {
        let iotlb = Iotlb::new();
        iotlb.put(&leaf(0x1000, 0x1000, 0), iotlb.before());
        iotlb.invalidate(IovaRange::ALL);
        assert_eq!(iotlb.get(Iova(0x1000)), None);
        iotlb.put(&leaf(0x1000, 0x1000, 0), iotlb.before());
        assert!(iotlb.get(Iova(0x1000)).is_some());
    }

    #[test]
    fn put_when_something_was_invalidated_since_keeps_nothing() {
        let iotlb = Iotlb::new();
        let before = iotlb.before();
        iotlb.invalidate(range(0x100_0000, 0x1000));
        iotlb.put(&leaf(0x1000, 0x1000, 0), before);
        assert_eq!(iotlb.get(Iova(0x1000)), None);
    }
}
