//! What a mirror was told during one guest operation.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::subscribe::{FenceFailed, Mirror, Reach, Refused, Unmapped};
use viommu::{Ack, IovaRange, Mapping};
use viommu_vfio::software::{Container, SoftwareMirror};

/// Locks; nothing here panics half-way through a change.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls since the last [`Told::clear`].
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Whether calls are written down: not those that no log records, such as all of memory at a bypass.
    pub(crate) listening: bool,
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
        if told.listening {
            told.maps.push(*extent);
        }
        Ok(ack)
    }

    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        let mut told = lock(&self.told);
        let before = told.unmaps.len();
        if told.listening {
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

#[cfg(test)]
mod tests {
    use super::*;
    use viommu::{Access, Gpa, Iova};
    use viommu_vfio::software::Config;

    #[test]
    fn an_unmap_over_gaps_is_told_as_the_extents_that_went() {
        let container = Arc::new(Mutex::new(Container::new(Config::default()).unwrap()));
        let told = Arc::new(Mutex::new(Told { listening: true, ..Told::default() }));
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
}
