//! The IOTLB: one endpoint in one domain of a unit of its own, whose record is what the front end has sent.

use core::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use viommu::domain::Domain;
use viommu::{
    Access, Completion, Endpoint, EndpointConfig, Extent, Gpa, GpaRange, Iommu, Iova, IovaRange, Mapping,
    Medium, StepError, StepErrorKind, Tables, WaitError,
};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::misses::{Miss, MissError, Misses};
use super::table::{Table, TableError};
use super::{BackendError, BackendOptions};
use crate::spec::{IotlbMsg, kind};

/// Guest memory, as `vhost-user-backend` has it too.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

const PAGE: u64 = 4096;
const DOMAIN: u32 = 1;

/// What the connection's thread and the device's threads share.
pub(super) struct Iotlb {
    iommu: Iommu,
    endpoint: Endpoint,
    domain: Domain,
    pub(super) memory: Memory,
    table: Mutex<State>,
    pub(super) misses: Misses,
    /// UPDATEs that took effect, and INVALIDATEs.
    pub(super) updates: AtomicU64,
    pub(super) invalidates: AtomicU64,
    /// How long an access may wait for the front end.
    pub(super) patience: Duration,
    /// How long what is taken back may be in use.
    limit: Duration,
}

#[derive(Default)]
struct State {
    table: Table,
    /// Whether addresses are translated: VIRTIO_F_ACCESS_PLATFORM was negotiated.
    active: bool,
}

impl fmt::Debug for Iotlb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Iotlb")
            .field("domain", &self.domain)
            .field("misses", &self.misses)
            .finish_non_exhaustive()
    }
}

/// Why a message of the front end's does nothing; it is told so.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unfit {
    #[error("a range that is empty or passes 2^64-1")]
    Range,
    #[error("memory that no region of the table holds")]
    OutsideTable,
    #[error("an access that is not defined")]
    Access,
    #[error(transparent)]
    Step(#[from] StepError),
}

impl Iotlb {
    pub(super) fn new(options: &BackendOptions) -> Result<Self, BackendError> {
        let setup = |error: &dyn fmt::Display| BackendError::Setup(error.to_string());
        let builder = Iommu::builder().domain_mappings(options.entries.max(1)).bypass(false);
        let iommu = builder.build().map_err(|error| setup(&error))?;
        let endpoint = iommu.add_endpoint(0, EndpointConfig::default()).map_err(|error| setup(&error))?;
        // A front end may drop a part of what it gave, and exchange it.
        let domain = iommu.create_domain(DOMAIN, Tables::OwnedCut).map_err(|error| setup(&error))?;
        Ok(Self {
            iommu,
            endpoint,
            domain,
            memory: GuestMemoryAtomic::new(GuestMemoryMmap::new()),
            table: Mutex::default(),
            misses: Misses::default(),
            updates: AtomicU64::new(0),
            invalidates: AtomicU64::new(0),
            patience: options.patience,
            limit: options.limit,
        })
    }

    pub(super) fn reader(&self) -> Result<viommu::Reader, BackendError> {
        self.endpoint.reader("device").ok_or_else(|| BackendError::Setup("the endpoint is gone".into()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What panics under it leaves a table that is whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Entries there are now.
    pub(super) fn len(&self) -> usize {
        self.domain.len()
    }

    pub(super) fn table(&self) -> Table {
        self.state().table.clone()
    }

    pub(super) fn is_active(&self) -> bool {
        self.state().active
    }

    /// Waits until nobody is inside what was taken away. Those who wait for a MISS in there give up.
    fn settle(&self, mut done: Completion) -> Result<(), BackendError> {
        let _removal = self.misses.removal();
        match done.wait_timeout(self.limit) {
            Ok(()) => Ok(()),
            Err(WaitError::TimedOut(_)) => Err(BackendError::Busy(self.limit)),
            Err(error) => Err(BackendError::Setup(error.to_string())),
        }
    }

    /// Drops every entry.
    pub(super) fn flush(&self) -> Result<(), BackendError> {
        self.settle(self.domain.unmap(IovaRange::ALL).map_err(BackendError::step)?)
    }

    /// The features that the front end sets: a fresh IOTLB, or none.
    pub(super) fn set_active(&self, active: bool) -> Result<(), BackendError> {
        self.flush()?;
        let attach = if active { self.endpoint.attach(DOMAIN) } else { self.endpoint.attach_identity() };
        self.settle(attach.map_err(|error| BackendError::Setup(error.to_string()))?)?;
        self.state().active = active;
        Ok(())
    }

    /// Other memory: nobody is in the old one when this returns. On an error nothing of any can be reached.
    pub(super) fn set_table(&self, table: Table) -> Result<(), BackendError> {
        let memory = table.memory().map_err(BackendError::Table)?;
        self.flush()?;
        // Before the wait for those who may be inside: who begins during it has the new memory already.
        match self.memory.lock() {
            Ok(guard) => guard.replace(memory),
            Err(poisoned) => poisoned.into_inner().replace(memory),
        }
        for extent in self.iommu.backing() {
            self.settle(self.iommu.remove_backing(extent.range).map_err(BackendError::step)?)?;
        }
        for (start, bytes) in table.ranges() {
            let range =
                GpaRange::from_len(Gpa(start), bytes).ok_or(BackendError::Table(TableError::Unaligned))?;
            // What is added needs no waiting for.
            let _nothing_removed =
                self.iommu.add_backing(Extent { range, medium: Medium::Ram }).map_err(BackendError::step)?;
        }
        self.state().table = table;
        Ok(())
    }

    /// An UPDATE or an INVALIDATE. When it returns without an error, it has taken effect.
    pub(super) fn message(&self, body: &IotlbMsg) -> Result<Result<(), Unfit>, BackendError> {
        let Some(range) = IovaRange::from_len(Iova(body.iova), body.size) else {
            return Ok(Err(Unfit::Range));
        };
        match (body.kind, crate::user::access_of(body.perm)) {
            (kind::UPDATE, Some(access)) if access.is_empty() => self.invalidate(range).map(Ok),
            (kind::UPDATE, Some(access)) => Ok(self.update(range, body.uaddr, access)),
            (kind::UPDATE, None) => Ok(Err(Unfit::Access)),
            (kind::INVALIDATE, _) => self.invalidate(range).map(Ok),
            _ => Err(BackendError::Protocol("an IOTLB message that is not its to send")),
        }
    }

    fn update(&self, range: IovaRange, user: u64, access: Access) -> Result<(), Unfit> {
        let bytes = u64::try_from(range.bytes()).map_err(|_| Unfit::Range)?;
        let gpa = self.state().table.guest_of(user, bytes).ok_or(Unfit::OutsideTable)?;
        let new = Mapping::over(range, Gpa(gpa), access).ok_or(Unfit::Range)?;
        // Nothing waits for what an UPDATE changes: a front end that must know sends an INVALIDATE first.
        let outcome = match self.domain.replace(new) {
            // Full: all of it can be asked for again.
            Err(StepError { kind: StepErrorKind::Cap(_), .. }) => {
                let _forgotten = self.domain.unmap(IovaRange::ALL)?;
                self.domain.replace(new)
            }
            outcome => outcome,
        };
        let _changed = outcome?;
        self.updates.fetch_add(1, Ordering::Relaxed);
        self.misses.updated(range);
        Ok(())
    }

    fn invalidate(&self, range: IovaRange) -> Result<(), BackendError> {
        // Entries are made of pages.
        let (first, last) = (range.start().0 & !(PAGE - 1), range.last().0 | (PAGE - 1));
        let range = IovaRange::new(Iova(first), Iova(last)).unwrap_or(range);
        let done = match self.domain.unmap(range) {
            // Full, and one entry would become two: all of it can be asked for again.
            Err(StepError { kind: StepErrorKind::Cap(_), .. }) => self.domain.unmap(IovaRange::ALL),
            outcome => outcome,
        };
        self.settle(done.map_err(BackendError::step)?)?;
        self.invalidates.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The connection is over: nothing can be reached any more. Does not wait for who is inside.
    pub(super) fn close(&self) {
        self.misses.close();
        let _forgotten = self.endpoint.block();
        let _forgotten = self.domain.unmap(IovaRange::ALL);
    }

    /// Asks the front end for `wanted`; see [`Misses::fetch`].
    pub(super) fn fetch(&self, wanted: &[Miss], in_guard: bool, until: Instant) -> Result<(), MissError> {
        self.misses.fetch(wanted, in_guard, until)
    }
}
