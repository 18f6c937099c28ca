//! The device: configuration, features, resets; the record behind it is a [`viommu::Iommu`] of its own.

pub(crate) mod execute;
mod limits;
mod state;
mod status;
mod topology;

use core::ops::{ControlFlow, RangeInclusive};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use viommu::endpoint::Region;
use viommu::{
    AttachErrorKind, BuildError, Builder, Completion, Domain, Endpoint, Iommu, IovaRange, ResetKind,
};
use virtio_queue::Queue;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use crate::events::{EventLimits, EventQueue, Faults, RecentFault};
use crate::journal::{Entry, Journal};
use crate::log;
use crate::metrics::{Counters, Metrics};
use crate::queue::RequestQueue;
use crate::spec::config::{self, BYPASS_OFFSET};
use crate::spec::{Features, property};
use crate::sync::{self, Mutex, MutexGuard};
use limits::Limits;

pub use state::{RestoreError, STATE_VERSION, SaveError, Saved, SavedMember};
pub use topology::{Added, EndpointPlan, TopologyError};

/// What the device offers.
#[derive(Clone, Debug)]
pub struct Config {
    /// Features to offer, of those in [`Features`]. All but BYPASS, which BYPASS_CONFIG replaces, unless told otherwise.
    pub features: Features,
    /// Page sizes, one a bit. What subscribers cannot do is taken out as they come ([`VirtioIommu::add_endpoint`]).
    pub page_size_mask: u64,
    /// Addresses that can be mapped, inclusive.
    pub input_range: IovaRange,
    /// Numbers that domains can have, inclusive.
    pub domain_range: RangeInclusive<u32>,
    /// Bytes of the properties of an endpoint: 24 for each of its regions.
    pub probe_size: u32,
    /// Whether endpoints that are attached to nothing bypass, at first and after a system reset.
    pub bypass: bool,
    /// How many faults are reported.
    pub events: EventLimits,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            features: Features::INPUT_RANGE
                | Features::DOMAIN_RANGE
                | Features::MAP_UNMAP
                | Features::PROBE
                | Features::MMIO
                | Features::BYPASS_CONFIG,
            page_size_mask: !0xfff,
            input_range: IovaRange::ALL,
            domain_range: 0..=u32::MAX,
            probe_size: 512,
            bypass: true,
            events: EventLimits::default(),
        }
    }
}

/// A configuration that makes no device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Features that this device does not have, or BYPASS together with BYPASS_CONFIG.
    #[error("features {0:?} cannot be offered")]
    Features(Features),
    /// The limits are not what a driver could live with.
    #[error("{0}")]
    Limits(&'static str),
    /// The record could not be made.
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// A virtio-iommu. A handle: clones are the same device.
///
/// It has a lock of its own, taken before those of the [`Iommu`]: callbacks of subscribers must not call it.
#[derive(Clone)]
pub struct VirtioIommu(Arc<Inner>);

struct Inner {
    iommu: Iommu,
    config: Config,
    faults: Arc<Faults>,
    counters: Arc<Counters>,
    control: Mutex<Control>,
    journal: OnceLock<Arc<dyn Journal>>,
}

/// What changes.
pub(crate) struct Control {
    negotiated: Features,
    page_size_mask: u64,
    /// The driver may have read the page sizes and regions: they stay.
    frozen: bool,
    members: BTreeMap<u32, Member>,
    /// Endpoint to domain.
    attached: BTreeMap<u32, u32>,
    /// Those that endpoints are attached to.
    domains: BTreeMap<u32, GuestDomain>,
}

#[cfg(feature = "fuzzing")]
impl Control {
    /// The domain that an endpoint is attached to, and whether it is a bypass one.
    pub(crate) fn attached_to(&self, endpoint: u32) -> Option<(u32, bool)> {
        let id = *self.attached.get(&endpoint)?;
        Some((id, matches!(self.domains.get(&id)?.kind, Kind::Bypass)))
    }
}

impl Control {
    pub(crate) fn page_size_mask(&self) -> u64 {
        self.page_size_mask
    }

    pub(crate) fn for_each_endpoint(&self, mut visit: impl FnMut(u32, &[Region])) {
        self.members.iter().for_each(|(id, member)| visit(*id, &member.regions));
    }

    /// What requests would make it what it is: attachments, then mappings.
    pub(crate) fn for_each_attached(&self, mut visit: impl FnMut(Entry<'static>)) {
        for (endpoint, domain) in &self.attached {
            let kind = self.domains.get(domain).map(|domain| &domain.kind);
            let bypass = matches!(kind, Some(Kind::Bypass));
            visit(Entry::Attach { endpoint: *endpoint, domain: *domain, bypass });
        }
        for (id, domain) in &self.domains {
            let Kind::Paged(record) = &domain.kind else { continue };
            record.for_each(IovaRange::ALL, |mapping| {
                visit(Entry::Map { domain: *id, mapping });
                ControlFlow::Continue(())
            });
        }
    }
}

struct Member {
    /// What a PROBE says: ascending, disjoint.
    regions: Vec<Region>,
}

struct GuestDomain {
    kind: Kind,
    endpoints: usize,
}

enum Kind {
    /// Guest physical memory itself.
    Bypass,
    /// A table of mappings.
    Paged(Domain),
}

/// What a reset has left to do.
#[derive(Debug)]
#[must_use = "the reset is over only when its completion has resolved"]
pub struct Reset {
    /// Resolves when nothing of what was mapped is in use any more. `device_status` reads non-zero until then.
    pub completion: Completion,
    /// Readers that were inside a guard: devices that the embedder has not stopped first. By endpoint and label.
    pub inside: Vec<(viommu::EndpointId, String)>,
    /// An endpoint could not be brought to what it is to see (bypass) and is blocked instead.
    pub refused: Option<AttachErrorKind>,
}

impl core::fmt::Debug for VirtioIommu {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("VirtioIommu").field("iommu", &self.0.iommu).finish_non_exhaustive()
    }
}

impl VirtioIommu {
    /// Makes the device and its record. `builder` says what the embedder knows: backing, caps, who hears of incidents.
    /// Page size, aperture, bypass and fault sink are set here, from `config`.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn new(builder: Builder, config: Config) -> Result<Self, ConfigError> {
        let both = Features::BYPASS | Features::BYPASS_CONFIG;
        let known = Config::default().features | Features::BYPASS;
        let unknown = config.features.difference(known);
        if !unknown.is_empty() || config.features.contains(both) {
            return Err(ConfigError::Features(if unknown.is_empty() { both } else { unknown }));
        }
        if !config.features.contains(Features::MAP_UNMAP) {
            return Err(ConfigError::Limits("without MAP_UNMAP no driver can do anything"));
        }
        if config.page_size_mask.trailing_zeros() < 12 || config.page_size_mask == 0 {
            return Err(ConfigError::Limits("the smallest page must be of 4 KiB or more"));
        }
        if config.domain_range.is_empty() {
            return Err(ConfigError::Limits("the domain range is empty"));
        }
        let room = usize::try_from(config.probe_size).unwrap_or(usize::MAX);
        if config.features.contains(Features::PROBE) && room < property::RESV_MEM_SIZE {
            return Err(ConfigError::Limits("the probe size must be of 24 bytes or more"));
        }
        if config.probe_size > 1 << 16 || !config.probe_size.is_multiple_of(8) {
            return Err(ConfigError::Limits("the probe size must be a multiple of 8 and at most 65536"));
        }
        let counters = Arc::new(Counters::default());
        let faults = Arc::new(Faults::new(config.events, counters.clone()));
        // The legacy bit means: unattached endpoints bypass if it is negotiated. Until then they are blocked.
        let bypass = config.bypass && config.features.contains(Features::BYPASS_CONFIG);
        // What the driver is told is what holds, whatever the builder says.
        let builder = builder.page_size(granule(config.page_size_mask)).aperture(config.input_range);
        let iommu = builder.bypass(bypass).faults(faults.clone()).build()?;
        let control = Control {
            negotiated: Features::empty(),
            page_size_mask: config.page_size_mask,
            frozen: false,
            members: BTreeMap::new(),
            attached: BTreeMap::new(),
            domains: BTreeMap::new(),
        };
        let control = Mutex::new(control);
        let journal = OnceLock::new();
        Ok(Self(Arc::new(Inner { iommu, config, faults, counters, control, journal })))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Control> {
        sync::lock(&self.0.control)
    }

    pub(crate) fn faults(&self) -> &Faults {
        &self.0.faults
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.0.counters
    }

    pub(crate) fn journal_cell(&self) -> &OnceLock<Arc<dyn Journal>> {
        &self.0.journal
    }

    pub(crate) fn config(&self) -> &Config {
        &self.0.config
    }

    fn limits(&self, control: &Control) -> Limits {
        Limits {
            input: self.0.config.input_range,
            domains: self.0.config.domain_range.clone(),
            granule: granule(control.page_size_mask),
            negotiated: control.negotiated,
        }
    }

    /// The record: for readers, reports and backing that comes and goes. Endpoints and domains are the device's.
    #[must_use]
    pub fn iommu(&self) -> &Iommu {
        &self.0.iommu
    }

    /// The endpoint of that number, if it is there.
    #[must_use]
    pub fn endpoint(&self, id: u32) -> Option<Endpoint> {
        self.0.iommu.endpoint(id)
    }

    /// The feature bits to offer, besides those of every device: the transport adds VERSION_1 and the ring's.
    #[must_use]
    pub fn features(&self) -> Features {
        self.0.config.features
    }

    /// The driver has written its features. Those that were not offered are ignored. Gives what a bypass that the driver
    /// has asked for with the legacy bit waits for: `FEATURES_OK` is given then.
    #[must_use = "the driver goes on when this has resolved"]
    pub fn negotiate(&self, driver: Features) -> Completion {
        let mut control = self.lock();
        control.negotiated = driver & self.features();
        control.frozen = true;
        if self.features().contains(Features::BYPASS) {
            return self.switch_bypass(control.negotiated.contains(Features::BYPASS));
        }
        Completion::ready()
    }

    fn switch_bypass(&self, on: bool) -> Completion {
        match self.0.iommu.set_bypass(on) {
            Ok(completion) => {
                self.note(|| Entry::Bypass { on });
                completion
            }
            Err(error) => {
                log::trouble("bypass stays as it was", &error.kind);
                error.completion
            }
        }
    }

    /// Reads the configuration space. What lies behind its end reads as zero. From now on the driver may know the page
    /// sizes and the endpoints' regions.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut control = self.lock();
        control.frozen = true;
        let Config { input_range, domain_range, probe_size, .. } = &self.0.config;
        let space = config::Config {
            page_size_mask: U64::new(control.page_size_mask),
            input_start: U64::new(input_range.start().0),
            input_end: U64::new(input_range.last().0),
            domain_start: U32::new(*domain_range.start()),
            domain_end: U32::new(*domain_range.end()),
            probe_size: U32::new(*probe_size),
            bypass: u8::from(self.offers_bypass() && self.0.iommu.bypass()),
            reserved: [0; 3],
        };
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = space.as_bytes().get(from..).unwrap_or_default();
        let known = bytes.len().min(data.len());
        data.fill(0);
        if let (Some(to), Some(from)) = (data.get_mut(..known), bytes.get(..known)) {
            to.copy_from_slice(from);
        }
    }

    fn offers_bypass(&self) -> bool {
        self.features().contains(Features::BYPASS_CONFIG)
    }

    /// Writes the configuration space: the one field is `bypass`, 0 or 1, once BYPASS_CONFIG is negotiated; all else is
    /// ignored. The transport finishes the write (answers the vCPU) when the completion has resolved. If an endpoint's
    /// subscriber refuses, bypass stays as it was, and reads so.
    #[must_use = "the write is over only when this has resolved"]
    pub fn write_config(&self, offset: u64, data: &[u8]) -> Completion {
        let control = self.lock();
        let at = usize::try_from(offset).ok().and_then(|offset| BYPASS_OFFSET.checked_sub(offset));
        match at.and_then(|at| data.get(at)) {
            Some(value @ (0 | 1)) if control.negotiated.contains(Features::BYPASS_CONFIG) => {
                self.switch_bypass(*value == 1)
            }
            _ => Completion::ready(),
        }
    }

    /// The driver has reset the device: all endpoints are attached to nothing, all domains and mappings are gone,
    /// `bypass` stays. Reset the queues too ([`RequestQueue::reset`]).
    pub fn reset(&self) -> Reset {
        self.reset_as(ResetKind::Device)
    }

    /// The machine is reset: as [`Self::reset`], and `bypass` is again what it was at first, reports that wait are
    /// lost, page sizes may change again. The devices behind are to be stopped before.
    pub fn system_reset(&self) -> Reset {
        self.reset_as(ResetKind::System)
    }

    fn reset_as(&self, kind: ResetKind) -> Reset {
        let mut control = self.lock();
        control.attached.clear();
        control.domains.clear();
        control.negotiated = Features::empty();
        if kind == ResetKind::System {
            control.frozen = false;
            self.faults().clear();
        }
        let mut reset = match self.0.iommu.reset(kind) {
            Ok(viommu::Reset { completion, inside }) => Reset { completion, inside, refused: None },
            Err(error) => {
                log::trouble("an endpoint is blocked after the reset", &error.kind);
                Reset { completion: error.completion, inside: Vec::new(), refused: Some(error.kind) }
            }
        };
        self.note(|| Entry::Reset(kind));
        if kind == ResetKind::System {
            self.note(|| Entry::Bypass { on: self.0.iommu.bypass() });
        }
        if self.features().contains(Features::BYPASS) {
            reset.completion.merge(self.switch_bypass(false));
        }
        reset
    }

    /// An endpoint has left `domain`, which dies with its last one.
    fn left(&self, control: &mut Control, domain: Option<u32>, done: &mut Completion) {
        let Some(id) = domain else { return };
        if let Some(domain) = control.domains.get_mut(&id) {
            domain.endpoints = domain.endpoints.saturating_sub(1);
        }
        self.drop_if_unused(control, id, done);
    }

    fn drop_if_unused(&self, control: &mut Control, id: u32, done: &mut Completion) {
        if control.domains.get(&id).is_none_or(|domain| domain.endpoints > 0) {
            return;
        }
        if let Some(GuestDomain { kind: Kind::Paged(_), .. }) = control.domains.remove(&id) {
            match self.0.iommu.destroy_domain(id) {
                Ok(completion) => done.merge(completion),
                Err(error) => log::trouble("a domain without endpoints is still in use", &error.kind),
            }
        }
    }

    /// The request queue: `queue` as the driver has set it up, in `memory`, and how to interrupt the driver for it. The
    /// device's own rings are not translated, so it is plain memory.
    pub fn request_queue<M>(
        &self,
        queue: Queue,
        memory: M,
        interrupt: impl Fn() + Send + 'static,
    ) -> RequestQueue<M>
    where
        M: GuestAddressSpace,
        M::M: GuestMemoryBackend,
    {
        RequestQueue::new(self.clone(), queue, memory, Box::new(interrupt))
    }

    /// The event queue, likewise.
    pub fn event_queue<M>(
        &self,
        queue: Queue,
        memory: M,
        interrupt: impl Fn() + Send + 'static,
    ) -> EventQueue<M>
    where
        M: GuestAddressSpace,
        M::M: GuestMemoryBackend,
    {
        EventQueue::new(self.clone(), queue, memory, Box::new(interrupt))
    }

    /// Who is told when there is a fault to report and none was before: [`EventQueue::process`] is due. Called on a
    /// device's thread, under its guard: it must not block, wait, or call the device.
    pub fn notify_faults(&self, notifier: impl Fn() + Send + Sync + 'static) {
        self.faults().notify(Arc::new(notifier));
    }

    /// The last 16 faults, oldest first: also those that were not reported to the driver.
    #[must_use]
    pub fn recent_faults(&self) -> Vec<RecentFault> {
        self.faults().recent()
    }

    /// What the device has done so far.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.counters().snapshot(self.faults().len())
    }
}

/// Bytes of the smallest page in a mask.
fn granule(page_sizes: u64) -> u64 {
    page_sizes & page_sizes.wrapping_neg()
}
