//! What a mirror was told during one guest operation.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::subscribe::{FenceFailed, Mirror, Reach, Refused, Unmapped};
use viommu::{Ack, IovaRange, Mapping};
use viommu_vfio::software::{Container, Faults, SoftwareMirror};

/// Locks; nothing here panics half-way through a change.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which calls a guest operation asks for. One step may take away what the guest asks for and give what it does not:
/// all of memory, at a bypass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asks {
    pub(crate) maps: bool,
    pub(crate) unmaps: bool,
}

impl Asks {
    pub(crate) const NOTHING: Self = Self { maps: false, unmaps: false };
    pub(crate) const ALL: Self = Self { maps: true, unmaps: true };
}

/// What a mirror was told: calls since the last [`Told::clear`], and counts of all.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// What is asked for now: only that is written down, counted, and refused as planned.
    pub(crate) asks: Asks,
    /// Calls that were asked for: maps that were not refused, and unmaps.
    pub(crate) map: u64,
    pub(crate) unmap: u64,
    /// Extents mapped that nobody asked for.
    pub(crate) replayed: u64,
    /// Extents mapped.
    pub(crate) maps: Vec<Mapping>,
    /// Extents that an unmap took away, each as it was.
    pub(crate) unmaps: Vec<Mapping>,
}

impl Told {
    /// Keeps little memory behind a large operation.
    const KEEP: usize = 4096;

    pub(crate) fn clear(&mut self) {
        for list in [&mut self.maps, &mut self.unmaps] {
            list.clear();
            list.shrink_to(Self::KEEP);
        }
    }
}

/// A software VFIO mirror that writes down what it is told.
#[derive(Debug)]
pub(crate) struct Recording {
    inner: SoftwareMirror,
    container: Arc<Mutex<Container>>,
    told: Arc<Mutex<Told>>,
}

impl Recording {
    pub(crate) fn new(container: Arc<Mutex<Container>>, told: Arc<Mutex<Told>>) -> Self {
        Self { inner: SoftwareMirror::new(container.clone()), container, told }
    }
}

impl Mirror for Recording {
    fn reach(&self) -> Reach {
        self.inner.reach()
    }

    fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        let ack = self.inner.map(extent)?;
        let mut told = lock(&self.told);
        if told.asks.maps {
            told.maps.push(*extent);
        }
        Ok(ack)
    }

    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        let mut told = lock(&self.told);
        let before = told.unmaps.len();
        if told.asks.unmaps {
            let held = lock(&self.container);
            told.unmaps.extend(held.overlapping(range).filter_map(|dma| {
                let extent = Mapping::over(dma.range, viommu::Gpa(dma.vaddr), dma.access)?;
                range.covers(dma.range).then_some(extent)
            }));
        }
        self.inner.unmap(range).inspect_err(|_| told.unmaps.truncate(before))
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        self.inner.fence()
    }

    fn held(&self) -> Vec<Mapping> {
        self.inner.held()
    }
}

/// A mirror whose calls are counted by what asks for them, and of which only those are refused that the guest asks for.
#[derive(Debug)]
pub(crate) struct Counting<M> {
    inner: M,
    faults: Option<Faults>,
    told: Arc<Mutex<Told>>,
}

impl<M> Counting<M> {
    pub(crate) fn new(inner: M, faults: Option<Faults>, told: Arc<Mutex<Told>>) -> Self {
        Self { inner, faults, told }
    }

    fn arm(&self, asked: bool) {
        if let Some(faults) = &self.faults {
            faults.arm(asked);
        }
    }
}

impl<M: Mirror> Mirror for Counting<M> {
    fn reach(&self) -> Reach {
        self.inner.reach()
    }

    fn begin(&mut self) {
        self.inner.begin();
    }

    fn commit(&mut self) -> Ack {
        self.inner.commit()
    }

    fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        let asked = lock(&self.told).asks.maps;
        self.arm(asked);
        let outcome = self.inner.map(extent);
        let mut told = lock(&self.told);
        match outcome {
            // What comes from here on brings the mirror back to where it was.
            Err(_) => told.asks = Asks::NOTHING,
            Ok(_) if asked => told.map += 1,
            Ok(_) => told.replayed += 1,
        }
        outcome
    }

    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        let asked = {
            let mut told = lock(&self.told);
            told.unmap += u64::from(told.asks.unmaps);
            told.asks.unmaps
        };
        self.arm(asked);
        self.inner.unmap(range)
    }

    fn replace(&mut self, old: &Mapping, new: &Mapping) -> Result<Ack, Refused> {
        self.arm(lock(&self.told).asks.maps);
        self.inner.replace(old, new)
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        self.inner.fence()
    }

    fn held(&self) -> Vec<Mapping> {
        self.inner.held()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use viommu::{Access, Gpa, Iova};
    use viommu_vfio::software::{Config, Failing, Plan, When};

    #[test]
    fn an_unmap_over_gaps_is_told_as_the_extents_that_went() {
        let container = Arc::new(Mutex::new(Container::new(Config::default()).unwrap()));
        let told = Arc::new(Mutex::new(Told { asks: Asks::ALL, ..Told::default() }));
        let mut mirror = Recording::new(container, told.clone());
        let a = Mapping::new(Iova(0x1000), 0x1000, Gpa(0x8000), Access::RW).unwrap();
        let b = Mapping::new(Iova(0x5000), 0x2000, Gpa(0x1000), Access::READ).unwrap();
        for extent in [a, b] {
            let _ = mirror.map(&extent).unwrap();
        }
        assert_eq!(lock(&told).maps, [a, b]);
        let _ = mirror.unmap(IovaRange::new(Iova(0), Iova(0xffff)).unwrap()).unwrap();
        assert_eq!(lock(&told).unmaps, [a, b]);
        lock(&told).clear();
        assert!(lock(&told).maps.is_empty());
    }

    #[test]
    fn calls_are_counted_and_refused_by_what_asks_for_them() {
        let container = Arc::new(Mutex::new(Container::new(Config::default()).unwrap()));
        let told = Arc::new(Mutex::new(Told::default()));
        let plan = Plan { map: When::At(2), ..Plan::default() };
        let (failing, faults) = Failing::new(Recording::new(container, told.clone()), plan);
        let mut mirror = Counting::new(failing, Some(faults), told.clone());
        let extent = |page: u64| Mapping::new(Iova(page << 12), 0x1000, Gpa(0), Access::RW).unwrap();
        mirror.begin();
        let _ = mirror.map(&extent(1)).unwrap();
        lock(&told).asks = Asks { maps: true, unmaps: false };
        let _ = mirror.unmap(extent(1).range).unwrap();
        let _ = mirror.map(&extent(2)).unwrap();
        mirror.map(&extent(3)).unwrap_err();
        // The way back is nobody's wish.
        let _ = mirror.map(&extent(4)).unwrap();
        let told = lock(&told);
        assert_eq!((told.map, told.unmap, told.replayed), (1, 0, 2));
        assert_eq!(told.maps, [extent(2)]);
    }
}
