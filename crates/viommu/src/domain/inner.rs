//! One address space: its record, its readers, and those who listen to it.

use crate::addr::IovaRange;
use crate::backing::Memory;
use crate::deliver::Seats;
use crate::domain::dirty::DirtyLog;
use crate::endpoint::{EndpointId, Region};
use crate::iommu::unit::Totals;
use crate::mapping::Mapping;
use crate::quiesce::space;
use crate::reader::Walker;
use crate::subscribe::{Kinds, Space};
use crate::sync::{Arc, AtomicU64, Mutex, StdArc};
use crate::table::{Table, Writer};

/// Where the record of a domain comes from, which decides what its model can do about a refusal.
#[derive(Clone, Default)]
pub enum Tables {
    /// viommu's own record, changed by requests (virtio-iommu): a guest's request can be refused, and an unmap that
    /// would cut a mapping is.
    #[default]
    Owned,
    /// viommu's own record, changed by hypercalls that may cut and replace (sPAPR TCE).
    OwnedCut,
    /// Tables in guest memory (VT-d, AMD-Vi, SMMUv3): the record is what has been announced, and the guest cannot be
    /// refused. While no mirror listens the record stays empty and the walker translates.
    Walked {
        /// Reads the guest's tables, or the model's IOTLB.
        walker: StdArc<dyn Walker>,
        /// Whether the guest announces new entries too (VT-d caching mode, AMD-Vi NpCache). Without it no mirror can
        /// be kept, and none may subscribe.
        caching_mode: bool,
    },
}

impl core::fmt::Debug for Tables {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Owned => f.write_str("Owned"),
            Self::OwnedCut => f.write_str("OwnedCut"),
            Self::Walked { caching_mode, .. } => {
                f.debug_struct("Walked").field("caching_mode", caching_mode).finish_non_exhaustive()
            }
        }
    }
}

pub(crate) struct DomainInner {
    pub(crate) space: Space,
    pub(crate) table: Arc<Table>,
    pub(crate) readers: Arc<space::Space>,
    pub(crate) walker: Option<StdArc<dyn Walker>>,
    pub(crate) caching_mode: bool,
    /// Odd while a change is being published: spans over several mappings are read again then.
    pub(crate) version: Line<AtomicU64>,
    pub(crate) page_size: u64,
    /// What the model can address.
    pub(crate) aperture: IovaRange,
    pub(crate) totals: Arc<Totals>,
    pub(crate) state: Line<Mutex<DomainState>>,
}

/// Readers' words and the writer's fields must not share a line.
#[repr(align(128))]
pub(crate) struct Line<T>(pub(crate) T);

impl<T> core::ops::Deref for Line<T> {
    type Target = T;
    #[inline(always)]
    fn deref(&self) -> &T {
        &self.0
    }
}

/// What the domain's lock protects.
pub(crate) struct DomainState {
    pub(crate) writer: Writer,
    pub(crate) seats: Seats,
    pub(crate) memory: Memory,
    /// Regions of the endpoints that are here: no mapping may cover them.
    pub(crate) regions: Vec<(EndpointId, Region)>,
    /// The kinds that the model has been told are wanted here.
    pub(crate) told: Kinds,
    pub(crate) dirty: Option<DirtyLog>,
    /// The most mappings here; `None`: no limit but memory.
    pub(crate) limit: Option<u64>,
    /// Unmaps may cut mappings.
    pub(crate) may_cut: bool,
    /// The guest can be told of a refusal.
    pub(crate) refusable: bool,
    /// Destroyed: every step is an error.
    pub(crate) dead: bool,
    /// Ranges whose readers are still to be read, once for several steps.
    pub(crate) gone: Vec<IovaRange>,
    pub(crate) removed: Vec<Mapping>,
    pub(crate) pieces: Vec<Mapping>,
}

impl DomainInner {
    pub(crate) fn is_identity(&self) -> bool {
        self.space == Space::Identity
    }

    /// Whether the guest can be told of a refusal.
    pub(crate) fn is_refusable(&self) -> bool {
        self.walker.is_none() && !self.is_identity()
    }
}
