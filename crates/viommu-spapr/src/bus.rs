//! Buses: who shares windows, and windows that come and go.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use viommu::{
    AttachError, AttachErrorKind, BuildError, Builder, Completion, Domain, Endpoint, EndpointConfig,
    EndpointId, Iommu, IovaRange, StepError, StepErrorKind, Tables,
};

use crate::metrics::{Counters, Metrics, add};
use crate::pending::Pending;
use crate::spec::{PageSizes, RtasError};
use crate::window::Window;

/// Whether entries that one hypercall sets and that are linear are told as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Merge {
    /// Each entry is a mapping by itself: it can be changed and cleared without touching another.
    #[default]
    Never,
    /// Neighbours that one H_PUT_TCE_INDIRECT sets, with targets in a row and the same access, are one mapping: fewer
    /// extents at mirrors. When one of them is changed alone, mirrors lose all and get the rests again, so DMA to the
    /// others faults for a moment. For guests that clear what they have set as they have set it.
    Hypercall,
}

/// Where a bus can have a window besides its default one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The window's number.
    pub liobn: u32,
    /// The window's first bus address.
    pub start: u64,
}

/// A bus: a partitionable endpoint, a host bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BusConfig {
    /// The window that is there after a reset.
    pub default_window: Option<Window>,
    /// Where `ibm,create-pe-dma-window` puts others, in the order in which they are tried. The default window's place is
    /// tried last, when that has been removed.
    pub slots: Vec<Slot>,
    /// Page sizes of windows that are created.
    pub page_sizes: PageSizes,
    /// The most entries of one that is created. They cost nothing until they are set.
    pub entries: u64,
}

impl BusConfig {
    /// A host bridge as guests know it: a window of 1 GiB with pages of 4 KiB at 0, and room for one more at
    /// 0x0800_0000_0000_0000. LIOBNs are made of `index` (below 2^15), so that those of no two host bridges are the same.
    #[must_use]
    pub fn host_bridge(index: u16) -> Self {
        let liobn = 0x8000_0000 | u32::from(index) << 8;
        Self {
            default_window: Window::new(liobn, 0, 30, 12),
            slots: vec![Slot { liobn: liobn | 1, start: 0x0800_0000_0000_0000 }],
            page_sizes: PageSizes::all(),
            entries: 1 << 31,
        }
    }

    /// LIOBN and place of every window that can be there.
    fn places(&self) -> impl Iterator<Item = Slot> + '_ {
        let default = self.default_window.map(|w| Slot { liobn: w.liobn, start: w.range.start().0 });
        self.slots.iter().copied().chain(default)
    }

    /// Whether a window can be there, at first or by being created.
    pub(crate) fn admits(&self, window: &Window) -> bool {
        let created = || {
            let place = Slot { liobn: window.liobn, start: window.range.start().0 };
            let size = PageSizes::of_shift(window.page_shift);
            let entries = window.range.bytes() >> window.page_shift;
            self.places().any(|known| known == place)
                && size.is_some_and(|size| self.page_sizes.contains(size))
                && window.range.bytes().is_power_of_two()
                && entries <= self.entries.into()
        };
        window.is_sound() && (self.default_window == Some(*window) || created())
    }
}

/// A bus that cannot be made so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// A LIOBN is there already, on this bus or another.
    #[error("LIOBN {0:#x} is there already")]
    Liobn(u32),
    /// The default window is not made of whole pages of a size that there is.
    #[error("{0:?} is no window")]
    Window(Window),
    /// The number is taken, or there are too many domains.
    #[error(transparent)]
    Domain(#[from] AttachErrorKind),
}

/// The TCE tables of a pseries machine. A handle: clones are the same tables.
///
/// Each bus has a lock of its own, taken before those of the [`Iommu`]: callbacks of subscribers must not call it.
#[derive(Clone)]
pub struct Spapr(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) iommu: Iommu,
    pub(crate) merge: Merge,
    pub(crate) counters: Counters,
    pub(crate) buses: RwLock<Buses>,
}

#[derive(Default)]
pub(crate) struct Buses {
    pub(crate) by_number: BTreeMap<u32, Arc<BusInner>>,
    /// All that a bus can ever have; which of them are there is the bus's.
    pub(crate) by_liobn: BTreeMap<u32, Arc<BusInner>>,
}

pub(crate) struct BusInner {
    pub(crate) number: u32,
    pub(crate) config: BusConfig,
    pub(crate) domain: Domain,
    windows: Mutex<Vec<Window>>,
}

impl BusInner {
    /// The windows that are there. Under this lock only the record runs, which says itself what a panic inside means.
    pub(crate) fn windows(&self) -> MutexGuard<'_, Vec<Window>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl core::fmt::Debug for Spapr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Spapr").field("iommu", &self.0.iommu).finish_non_exhaustive()
    }
}

impl Spapr {
    /// Makes the tables and their record. `builder` says what the embedder knows: backing, caps, who hears of incidents.
    /// Page size and aperture are set here.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn new(builder: Builder, merge: Merge) -> Result<Self, BuildError> {
        let iommu = builder.page_size(4096).aperture(IovaRange::ALL).build()?;
        let (counters, buses) = (Counters::default(), RwLock::default());
        Ok(Self(Arc::new(Inner { iommu, merge, counters, buses })))
    }

    /// The record: backing, subscriptions, readers. Its domains are the buses', and theirs to change.
    #[must_use]
    pub fn iommu(&self) -> &Iommu {
        &self.0.iommu
    }

    /// What has been done so far.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.0.counters.snapshot()
    }

    pub(crate) fn known(&self) -> std::sync::RwLockReadGuard<'_, Buses> {
        self.0.buses.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a bus, with its default window, empty. `number` is that of its domain in the record.
    ///
    /// # Errors
    /// See [`BusError`]; nothing has changed.
    pub fn add_bus(&self, number: u32, config: BusConfig) -> Result<Bus, BusError> {
        if let Some(window) = config.default_window.filter(|window| !window.is_sound()) {
            return Err(BusError::Window(window));
        }
        let mut buses = self.0.buses.write().unwrap_or_else(PoisonError::into_inner);
        let liobns: Vec<u32> = config.places().map(|place| place.liobn).collect();
        for (at, liobn) in liobns.iter().enumerate() {
            let twice = liobns.iter().skip(at.saturating_add(1)).any(|other| other == liobn);
            if twice || buses.by_liobn.contains_key(liobn) {
                return Err(BusError::Liobn(*liobn));
            }
        }
        let domain = self.0.iommu.create_domain(number, Tables::OwnedCut).map_err(|error| error.kind)?;
        let windows = Mutex::new(config.default_window.into_iter().collect());
        let inner = Arc::new(BusInner { number, config, domain, windows });
        buses.by_number.insert(number, inner.clone());
        for liobn in liobns {
            buses.by_liobn.insert(liobn, inner.clone());
        }
        Ok(Bus { spapr: self.clone(), inner })
    }

    /// The numbers of all buses, ascending.
    #[must_use]
    pub fn buses(&self) -> Vec<u32> {
        self.known().by_number.keys().copied().collect()
    }

    /// The bus of that number, if it is there.
    #[must_use]
    pub fn bus(&self, number: u32) -> Option<Bus> {
        let inner = self.known().by_number.get(&number)?.clone();
        Some(Bus { spapr: self.clone(), inner })
    }

    /// Takes a bus away whose endpoints have all gone, with its entries. Handles of it answer H_PARAMETER from then on.
    ///
    /// # Errors
    /// [`AttachErrorKind::NoDomain`], [`AttachErrorKind::InUse`], [`AttachErrorKind::InCallback`]; nothing has changed.
    pub fn remove_bus(&self, number: u32) -> Result<Completion, AttachError> {
        let mut buses = self.0.buses.write().unwrap_or_else(PoisonError::into_inner);
        let bus = buses.by_number.get(&number).ok_or(AttachErrorKind::NoDomain(number))?.clone();
        // Behind a hypercall that is being executed, and before any other.
        let mut windows = bus.windows();
        let done = match self.0.iommu.destroy_domain(number) {
            // A reset of the record has ended it.
            Err(AttachError { kind: AttachErrorKind::NoDomain(_), .. }) => Completion::ready(),
            outcome => outcome?,
        };
        windows.clear();
        buses.by_number.remove(&number);
        buses.by_liobn.retain(|_, other| !Arc::ptr_eq(other, &bus));
        Ok(done)
    }

    /// The machine is reset: [`Bus::reset`] of every bus. Devices are to be stopped first.
    ///
    /// # Errors
    /// [`StepErrorKind::InCallback`]: nothing has changed.
    pub fn reset(&self) -> Result<Completion, StepError> {
        let buses: Vec<_> = self.known().by_number.values().cloned().collect();
        let mut done = Completion::ready();
        for inner in buses {
            done.merge(Bus { spapr: self.clone(), inner }.reset()?);
        }
        Ok(done)
    }
}

/// A bus with its windows. A handle: clones are the same bus.
#[derive(Clone)]
pub struct Bus {
    spapr: Spapr,
    inner: Arc<BusInner>,
}

impl core::fmt::Debug for Bus {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Bus").field("number", &self.inner.number).finish_non_exhaustive()
    }
}

/// What `ibm,query-pe-dma-window` returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// Windows that can still be created.
    pub windows: u32,
    /// The most entries of one of them.
    pub entries: u64,
    /// Their page sizes.
    pub page_sizes: PageSizes,
}

impl Bus {
    /// Its number, which is that of its domain.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.inner.number
    }

    /// Its address space in the record: to be looked at. What changes it is the guest.
    #[must_use]
    pub fn domain(&self) -> &Domain {
        &self.inner.domain
    }

    /// The windows that are there now, in the order in which they came.
    #[must_use]
    pub fn windows(&self) -> Vec<Window> {
        self.inner.windows().clone()
    }

    /// Adds an endpoint (hot-plug): it sees the windows of the bus, with what is in them. Whoever subscribes to it is
    /// filled, alone.
    ///
    /// # Errors
    /// See [`AttachErrorKind`]; the endpoint is not there.
    pub fn add_endpoint(
        &self,
        id: impl Into<EndpointId>,
        config: EndpointConfig,
    ) -> Result<(Endpoint, Completion), AttachError> {
        let endpoint = self.spapr.iommu().add_endpoint(id, config)?;
        match endpoint.attach(self.inner.number) {
            Ok(done) => Ok((endpoint, done)),
            Err(mut error) => {
                if let Ok(gone) = endpoint.remove() {
                    error.completion.merge(gone);
                }
                Err(error)
            }
        }
    }

    /// `ibm,query-pe-dma-window`.
    #[must_use]
    pub fn query(&self) -> Query {
        let windows = self.inner.windows();
        let free = self.free_places(&windows).count();
        Query {
            windows: u32::try_from(free).unwrap_or(u32::MAX),
            entries: self.inner.config.entries,
            page_sizes: self.inner.config.page_sizes,
        }
    }

    fn free_places<'a>(&'a self, windows: &'a [Window]) -> impl Iterator<Item = Slot> + 'a {
        self.inner.config.places().filter(|place| windows.iter().all(|window| window.liobn != place.liobn))
    }

    /// `ibm,create-pe-dma-window`: a window of `1 << window_shift` bytes with pages of `1 << page_shift`, empty. Costs
    /// nothing, however large.
    ///
    /// # Errors
    /// See [`RtasError`]; nothing has changed.
    pub fn create_window(&self, page_shift: u32, window_shift: u32) -> Result<Window, RtasError> {
        let config = &self.inner.config;
        let size = PageSizes::of_shift(page_shift).ok_or(RtasError::Parameter)?;
        let entries = window_shift.checked_sub(page_shift).and_then(|shift| 1_u64.checked_shl(shift));
        if !config.page_sizes.contains(size) || entries.is_none_or(|entries| entries > config.entries) {
            return Err(RtasError::Parameter);
        }
        let mut windows = self.inner.windows();
        let fits = |window: &Window| windows.iter().all(|other| !other.range.overlaps(window.range));
        let made = self
            .free_places(&windows)
            .find_map(|place| Window::new(place.liobn, place.start, window_shift, page_shift).filter(fits));
        let window = made.ok_or(RtasError::Hardware)?;
        windows.push(window);
        Ok(window)
    }

    /// `ibm,remove-pe-dma-window`: the window goes, with its entries. The default one can go too.
    ///
    /// # Errors
    /// [`RtasError::Parameter`]: there is no such window on this bus. [`RtasError::Hardware`]: called inside a callback.
    /// Nothing has changed.
    pub fn remove_window(&self, liobn: u32) -> Result<Pending<()>, RtasError> {
        let mut windows = self.inner.windows();
        let at = windows.iter().position(|window| window.liobn == liobn).ok_or(RtasError::Parameter)?;
        let range = windows.get(at).ok_or(RtasError::Parameter)?.range;
        // No mapping crosses the end of its window.
        let done = self.inner.domain.unmap(range).map_err(|_| RtasError::Hardware)?;
        windows.remove(at);
        Ok(Pending::new((), done))
    }

    /// A reset of the bus, and `ibm,reset-pe-dma-window`: all entries go, and everyone is told; windows that were created
    /// go, and the default one is there. Endpoints stay.
    ///
    /// # Errors
    /// [`StepErrorKind::InCallback`]: nothing has changed.
    pub fn reset(&self) -> Result<Completion, StepError> {
        let mut windows = self.inner.windows();
        let done = match self.inner.domain.unmap(IovaRange::ALL) {
            // The bus has gone, and its entries with it.
            Err(StepError { kind: StepErrorKind::Gone(_), .. }) => return Ok(Completion::ready()),
            outcome => outcome?,
        };
        windows.clear();
        windows.extend(self.inner.config.default_window);
        add(&self.spapr.0.counters.resets, 1);
        Ok(done)
    }

    pub(crate) fn config(&self) -> &BusConfig {
        &self.inner.config
    }

    /// Has other windows from now on; entries are the caller's to care for.
    pub(crate) fn set_windows(&self, new: &[Window]) {
        let mut windows = self.inner.windows();
        windows.clear();
        windows.extend_from_slice(new);
    }
}
