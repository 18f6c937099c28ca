//! Making a unit: what it can address, its caps, who is told.

use core::fmt;
use std::collections::BTreeMap;

use crate::addr::{Gpa, GpaRange, IovaRange};
use crate::backing::{Backing, Extent};
use crate::domain::Tables;
use crate::error::{Incident, StepErrorKind};
use crate::iommu::Iommu;
use crate::iommu::unit::{Alarm, Config, Control, Totals, Unit, make_domain};
use crate::reader::FaultSink;
use crate::subscribe::{Producer, Space};
use crate::sync::{Arc, AtomicU64, Mutex, StdArc};
use crate::table::{Arena, PAGE};

/// The most bytes of tables that a unit takes unless it is told otherwise: room for about 30 million dense 4 KiB
/// mappings, or 1.5 million in the worst layout a guest can make.
pub const DEFAULT_TABLE_BYTES: u64 = 256 << 20;

/// Makes an [`Iommu`].
pub struct Builder {
    page_size: u64,
    aperture: IovaRange,
    bypass: bool,
    table_bytes: u64,
    mappings: Option<u64>,
    domain_mappings: Option<u64>,
    domains: usize,
    endpoints: usize,
    subscriptions: usize,
    alarm: Option<Alarm>,
    faults: Option<StdArc<dyn FaultSink>>,
    producer: Option<StdArc<dyn Producer>>,
    extents: Vec<Extent>,
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder").field("page_size", &self.page_size).finish_non_exhaustive()
    }
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            page_size: PAGE,
            aperture: IovaRange::ALL,
            bypass: false,
            table_bytes: DEFAULT_TABLE_BYTES,
            mappings: None,
            domain_mappings: None,
            domains: 65_536,
            endpoints: 65_536,
            subscriptions: 65_536,
            alarm: None,
            faults: None,
            producer: None,
            extents: Vec::new(),
        }
    }
}

/// A unit that cannot be made so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Not a power of two, or below 4 KiB.
    #[error("a page of {0:#x} bytes: it must be a power of two of at least 4 KiB")]
    PageSize(u64),
    /// The address space for the tables could not be had.
    #[error("no address space for {0} bytes of tables")]
    TableBytes(u64),
    /// Backing overlaps or is not page-aligned.
    #[error(transparent)]
    Backing(#[from] StepErrorKind),
}

impl Builder {
    /// Bytes: the smallest page of a mapping. 4 KiB unless told otherwise.
    #[must_use]
    pub fn page_size(self, page_size: u64) -> Self {
        Self { page_size, ..self }
    }

    /// What can be addressed, inclusive. Everything unless told otherwise.
    #[must_use]
    pub fn aperture(self, aperture: IovaRange) -> Self {
        Self { aperture, ..self }
    }

    /// Whether endpoints that the guest has attached to nothing bypass, at first and after a system reset.
    #[must_use]
    pub fn bypass(self, bypass: bool) -> Self {
        Self { bypass, ..self }
    }

    /// The most bytes of tables in all domains. Only what is used takes memory.
    #[must_use]
    pub fn table_bytes(self, table_bytes: u64) -> Self {
        Self { table_bytes, ..self }
    }

    /// The most mappings in all domains.
    #[must_use]
    pub fn mappings(self, mappings: u64) -> Self {
        Self { mappings: Some(mappings), ..self }
    }

    /// The most mappings in one domain.
    #[must_use]
    pub fn domain_mappings(self, mappings: u64) -> Self {
        Self { domain_mappings: Some(mappings), ..self }
    }

    /// The most domains.
    #[must_use]
    pub fn domains(self, domains: usize) -> Self {
        Self { domains, ..self }
    }

    /// The most endpoints, PASIDs counted.
    #[must_use]
    pub fn endpoints(self, endpoints: usize) -> Self {
        Self { endpoints, ..self }
    }

    /// The most subscriptions.
    #[must_use]
    pub fn subscriptions(self, subscriptions: usize) -> Self {
        Self { subscriptions, ..self }
    }

    /// Adds backing, as [`Iommu::add_backing`].
    #[must_use]
    pub fn backing(mut self, extent: Extent) -> Self {
        self.extents.push(extent);
        self
    }

    /// Who is told when a subscriber had to be cut off. Called with locks held: it must not call back into the unit.
    #[must_use]
    pub fn alarm(self, alarm: impl Fn(&Incident) + Send + Sync + 'static) -> Self {
        Self { alarm: Some(StdArc::new(alarm)), ..self }
    }

    /// Who hears of faults.
    #[must_use]
    pub fn faults(self, faults: StdArc<dyn FaultSink>) -> Self {
        Self { faults: Some(faults), ..self }
    }

    /// The model, to be asked when the kinds wanted change.
    #[must_use]
    pub fn producer(self, producer: StdArc<dyn Producer>) -> Self {
        Self { producer: Some(producer), ..self }
    }

    /// Makes the unit.
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn build(self) -> Result<Iommu, BuildError> {
        if !self.page_size.is_power_of_two() || self.page_size < PAGE {
            return Err(BuildError::PageSize(self.page_size));
        }
        let no_room = |_| BuildError::TableBytes(self.table_bytes);
        let arena = Arena::new(self.table_bytes).map_err(no_room)?;
        let config = Config {
            page_size: self.page_size,
            aperture: self.aperture,
            initial_bypass: self.bypass,
            domain_mappings: self.domain_mappings,
            domains: self.domains,
            endpoints: self.endpoints,
            subscriptions: self.subscriptions,
            faults: self.faults,
            producer: self.producer,
        };
        let totals = Totals::new(self.mappings, self.alarm);
        let backing = Arc::new(Backing::default());
        let identity = make_domain(&config, &arena, &totals, Space::Identity, &Tables::OwnedCut, &backing);
        let identity = identity.map_err(|_| BuildError::TableBytes(self.table_bytes))?;
        let control = Control {
            backing,
            bypass: self.bypass,
            endpoints: BTreeMap::new(),
            domains: BTreeMap::new(),
            identity,
            bindings: BTreeMap::new(),
            homes: BTreeMap::new(),
            next_set: 0,
            uncut: BTreeMap::new(),
            retired: Vec::new(),
        };
        let unit = Arc::new_cyclic(|this| Unit {
            config,
            arena,
            totals,
            this: this.clone(),
            control: Mutex::new(control),
            next_subscription: AtomicU64::new(1),
        });
        let iommu = Iommu::new(unit);
        for extent in self.extents {
            let outcome = iommu.add_backing(extent);
            drop(outcome.map_err(|error| error.kind)?);
        }
        Ok(iommu)
    }

    /// RAM at `[start, start + bytes - 1]`: a short form of [`Builder::backing`].
    ///
    /// # Panics
    /// When the range is empty or passes 2^64-1.
    #[must_use]
    pub fn ram(self, start: u64, bytes: u64) -> Self {
        let range = GpaRange::from_len(Gpa(start), bytes);
        let Some(range) = range else { panic!("RAM of {bytes:#x} bytes at {start:#x} is no range") };
        self.backing(Extent { range, medium: crate::backing::Medium::Ram })
    }
}
