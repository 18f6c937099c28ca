//! The unit: a handle, what it is made of, endpoints, resets. The record behind it is a [`viommu::Iommu`] of its own.

mod domains;
mod jobs;
mod queue;
mod registers;
mod report;
mod state;
mod views;

use core::task::{Context as TaskContext, Poll};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use viommu::endpoint::{Region, RegionKind};
use viommu::subscribe::{Producer, RefusalKind, Refused};
use viommu::{
    AttachErrorKind, Blocker, BuildError, Builder, Completion, Endpoint, EndpointConfig, EndpointId, Iommu,
    IovaRange, Kinds, ResetKind, Space, WaitError,
};
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};

use crate::context::Abilities;
use crate::faults::{Faults, Msi};
use crate::log;
use crate::memory::{Adapter, TableMemory};
use crate::metrics::{Counters, Metrics};
use crate::paging::{INTERRUPTS, Rules};
use crate::space::Shared;
use crate::sync::{Mutex, MutexGuard, lock};
use domains::Domains;
use jobs::Jobs;
use registers::Registers;
pub use report::TableView;
pub use state::{RestoreError, STATE_VERSION, SaveError, Saved, SavedEvent, SavedFaults, SavedRegisters};
pub(crate) use views::Member;

/// Widths of the addresses that a guest's tables resolve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Width {
    /// 39 bits: tables of 3 levels.
    Bits39,
    /// 48 bits: tables of 3 or 4 levels.
    Bits48,
    /// 57 bits: tables of 3 to 5 levels.
    Bits57,
}

/// Whose tables a unit of scalable mode has. Only one of them, so that a driver has no choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Tables as legacy mode has them. With caching mode new entries are announced.
    Second,
    /// Tables as processors have them. New entries are never announced, whatever caching mode says, so that no mirror
    /// can subscribe.
    First,
}

/// What the unit offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Whether the driver must announce new entries too. Without it no mirror can subscribe.
    pub caching_mode: bool,
    /// Scalable mode: PASIDs, and tables of one stage. A driver may use legacy mode all the same; `None` is legacy mode
    /// alone.
    pub scalable: Option<Stage>,
    /// What can be translated. First-stage tables have 4 or, with 57 bits, 4 or 5 levels.
    pub width: Width,
    /// Bits of a guest physical address: those above are reserved in all tables. From 32 to 52.
    pub host_bits: u32,
    /// Whether context entries may let a device pass.
    pub pass_through: bool,
    /// Whether devices may have TLBs of their own (ATS), which the driver invalidates.
    pub device_tlb: bool,
    /// Entries of tables that one invalidation may read, at most. A driver whose tables refer to the same tables again
    /// and again can make more; what is not seen then is not mapped at mirrors.
    pub walk_entries: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            caching_mode: true,
            scalable: None,
            width: Width::Bits48,
            host_bits: 48,
            pass_through: true,
            device_tlb: false,
            walk_entries: 1 << 27,
        }
    }
}

impl Config {
    /// Whether the driver announces every new entry, so that a mirror can follow: with caching mode, but not where
    /// first-stage tables are offered.
    #[must_use]
    pub fn announces(&self) -> bool {
        self.caching_mode && self.scalable != Some(Stage::First)
    }
}

/// A unit that cannot be made so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The widths are not what a driver could live with.
    #[error("{0}")]
    Limits(&'static str),
    /// The record could not be made.
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// What [`Vtd::process`] has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// Nothing is to be done until the driver writes a register.
    Idle,
    /// There is more: it is to be called again soon.
    More,
    /// The driver waits for something that devices or subscribers have not finished: [`Vtd::poll`] or [`Vtd::wait`].
    Waiting,
}

/// What a reset has left to do.
#[derive(Debug)]
#[must_use = "the reset is over only when its completion has resolved"]
pub struct Reset {
    /// Resolves when nothing of what was mapped is in use any more.
    pub completion: Completion,
    /// Readers that were inside a guard: devices that the embedder has not stopped first. By endpoint and label.
    pub inside: Vec<(EndpointId, String)>,
    /// An endpoint could not be brought to what it is to see and is blocked instead.
    pub refused: Option<AttachErrorKind>,
}

/// A VT-d unit. A handle: clones are the same unit.
///
/// It has a lock of its own, taken before those of the [`Iommu`]: callbacks of subscribers must not call it.
#[derive(Clone)]
pub struct Vtd(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    iommu: Iommu,
    config: Config,
    pub(crate) shared: Arc<Shared>,
    faults: Arc<Faults>,
    wants: Arc<Wants>,
    control: Mutex<Control>,
}

/// What changes.
pub(crate) struct Control {
    registers: Registers,
    members: BTreeMap<EndpointId, Member>,
    domains: Domains,
    jobs: Jobs,
    /// What was done and is not over: the driver is not answered before. `None` while a thread waits for it.
    pending: Option<Completion>,
    /// What was done while a thread waited.
    meanwhile: Option<Completion>,
}

/// Which domains have mirrors. The core asks under its locks, so this is a lock below all of them.
#[derive(Default)]
pub(crate) struct Wants {
    announced: bool,
    domains: Mutex<Wanted>,
    notifier: RwLock<Option<Arc<dyn Fn() + Send + Sync>>>,
}

#[derive(Default)]
struct Wanted {
    mirrors: BTreeSet<u32>,
    /// Of these, those whose record has not been filled.
    fresh: BTreeSet<u32>,
}

impl Wants {
    fn has_mirror(&self, domain: u32) -> bool {
        lock(&self.domains).mirrors.contains(&domain)
    }

    fn take_fresh(&self) -> BTreeSet<u32> {
        core::mem::take(&mut lock(&self.domains).fresh)
    }
}

impl Producer for Wants {
    fn wanted_changed(&self, space: Space, old: Kinds, new: Kinds) -> Result<(), Refused> {
        // Refused wherever the endpoint is now: it would be when the driver switches translation on.
        if new.contains(Kinds::MAP) && !self.announced {
            let why =
                "the driver does not announce new entries (caching mode is off, or tables are first-stage)";
            return Err(Refused::new(RefusalKind::Unsupported, why));
        }
        let Space::Domain(domain) = space else { return Ok(()) };
        {
            let mut wanted = lock(&self.domains);
            if !new.contains(Kinds::MAP) {
                wanted.mirrors.remove(&domain);
                wanted.fresh.remove(&domain);
                return Ok(());
            }
            wanted.mirrors.insert(domain);
            if old.contains(Kinds::MAP) {
                return Ok(());
            }
            wanted.fresh.insert(domain);
        }
        let notifier = self.notifier.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(notifier) = notifier {
            notifier();
        }
        Ok(())
    }
}

impl core::fmt::Debug for Vtd {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Vtd").field("iommu", &self.0.iommu).finish_non_exhaustive()
    }
}

impl Vtd {
    /// Makes the unit and its record. `builder` says what the embedder knows: backing, caps, who hears of incidents.
    /// Aperture, bypass, fault sink and producer are set here. Tables are read in `memory`, which is not translated.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn new<M>(builder: Builder, memory: M, config: Config) -> Result<Self, ConfigError>
    where
        M: GuestAddressSpace + Send + Sync + 'static,
        M::M: GuestMemoryBackend,
    {
        if !(32..=52).contains(&config.host_bits) {
            return Err(ConfigError::Limits("guest physical addresses have 32 to 52 bits"));
        }
        if config.width == Width::Bits39 && config.scalable == Some(Stage::First) {
            return Err(ConfigError::Limits("first-stage tables have 48 or 57 bits"));
        }
        let (levels, guest_bits) = match config.width {
            Width::Bits39 => (3, 39),
            Width::Bits48 => (4, 48),
            Width::Bits57 => (5, 57),
        };
        let rules = Rules { host_bits: config.host_bits, guest_bits, device_tlb: config.device_tlb };
        let Config { pass_through, scalable, .. } = config;
        let abilities = Abilities { rules, levels, pass_through, scalable };
        let memory: Arc<dyn TableMemory> = Arc::new(Adapter(memory));
        let counters = Arc::new(Counters::default());
        let faults = Arc::new(Faults::new(memory.clone(), abilities, counters.clone()));
        let wants = Arc::new(Wants { announced: config.announces(), ..Wants::default() });
        let shared = Arc::new(Shared { memory, abilities, counters, root_table: Default::default() });
        let builder = builder.page_size(4096).aperture(IovaRange::ALL).bypass(true);
        let iommu = builder.faults(faults.clone()).producer(wants.clone()).build()?;
        let control = Mutex::new(Control {
            registers: Registers::default(),
            members: BTreeMap::new(),
            domains: Domains::default(),
            jobs: Jobs::default(),
            pending: Some(Completion::ready()),
            meanwhile: None,
        });
        Ok(Self(Arc::new(Inner { iommu, config, shared, faults, wants, control })))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Control> {
        lock(&self.0.control)
    }

    /// The record: for readers, subscribers, reports and backing that comes and goes. Endpoints' views and domains are
    /// the unit's.
    #[must_use]
    pub fn iommu(&self) -> &Iommu {
        &self.0.iommu
    }

    /// What it offers.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Reads registers. What lies between them, or behind the page, reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let mut control = self.lock();
        // A command is seen to be over as soon as it is.
        let _left = self.0.process(&mut control, None);
        self.0.read(&control, offset, data);
    }

    /// Writes registers: 4 or 8 bytes at a multiple of that; anything else is ignored. What the write asks for is done
    /// by [`Vtd::process`], to be called next.
    pub fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(&mut self.lock(), offset, data);
    }

    /// Does what the driver has asked for, a bounded piece of it. Never waits; takes the unit's lock. To be called after
    /// a write, and when the notifier of [`Vtd::notify_subscribers`] has been called.
    pub fn process(&self) -> Progress {
        self.0.process(&mut self.lock(), None)
    }

    /// As [`Vtd::process`], for an event loop: while something is awaited the waker is woken when it may be worth
    /// another call.
    pub fn poll(&self, cx: &mut TaskContext<'_>) -> Poll<()> {
        loop {
            match self.0.process(&mut self.lock(), Some(cx)) {
                Progress::Idle => return Poll::Ready(()),
                Progress::Waiting => return Poll::Pending,
                Progress::More => {}
            }
        }
    }

    /// Does all that the driver has asked for, and waits for what that needs: for a worker thread. Registers can be read
    /// meanwhile.
    ///
    /// # Errors
    /// See [`WaitError`]: at the limit it names what is in the way, and the embedder chooses. No answer is given early.
    pub fn wait(&self, limit: Duration) -> Result<(), WaitError> {
        let start = Instant::now();
        loop {
            let pending = {
                let mut control = self.lock();
                match self.0.process(&mut control, None) {
                    Progress::Idle => return Ok(()),
                    Progress::More => continue,
                    Progress::Waiting => control.pending.take(),
                }
            };
            let Some(mut pending) = pending else {
                // Another thread waits for it.
                if start.elapsed() >= limit {
                    return Err(WaitError::TimedOut(Vec::new()));
                }
                std::thread::yield_now();
                continue;
            };
            let outcome = pending.wait_timeout(limit.saturating_sub(start.elapsed()));
            let mut control = self.lock();
            if let Some(meanwhile) = control.meanwhile.take() {
                pending.merge(meanwhile);
            }
            control.pending = Some(pending);
            drop(control);
            outcome?;
        }
    }

    /// What the driver waits for now, for an event loop that has its own time limit.
    #[must_use]
    pub fn blockers(&self) -> Vec<Blocker> {
        self.lock().pending.as_ref().map_or_else(Vec::new, Completion::blockers)
    }

    /// Who sends interrupts. Called on threads of devices, under their guards, and under locks of the unit: it must not
    /// block, wait or call the unit.
    pub fn on_interrupt(&self, send: impl Fn(Msi) + Send + Sync + 'static) {
        self.0.faults.set_sender(Arc::new(send));
    }

    /// Who is told that a mirror has come that is to be filled: [`Vtd::process`] is due. Called under the record's
    /// locks: it must not block, or call the unit or the record.
    pub fn notify_subscribers(&self, notifier: impl Fn() + Send + Sync + 'static) {
        *self.0.wants.notifier.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(notifier));
    }

    /// Adds an endpoint (hot-plug): `requester` is its bus in the upper byte, device and function in the lower. It sees
    /// what its context entry says. Its interrupts, at 0xfee00000 to 0xfeefffff, are never translated.
    ///
    /// Subscribers come through the endpoint. Without caching mode mirrors are refused.
    ///
    /// # Errors
    /// See [`AttachErrorKind`]; nothing has changed.
    pub fn add_endpoint(&self, requester: u16) -> Result<Endpoint, AttachErrorKind> {
        let mut control = self.lock();
        let range = IovaRange::new(INTERRUPTS.0, INTERRUPTS.1);
        let regions = range.map(|range| Region { range, kind: RegionKind::Msi }).into_iter().collect();
        let id = EndpointId::new(u32::from(requester));
        let added = self.0.iommu.add_endpoint(id, EndpointConfig { regions });
        let endpoint = added.map_err(|error| error.kind)?;
        if let Err(kind) = self.0.join(&mut control, id) {
            // Nothing has used it yet.
            drop(self.0.leave(&mut control, id));
            return Err(kind);
        }
        Ok(endpoint)
    }

    /// Adds a process address space of an endpoint that is there: requests of it with `pasid`. In scalable mode it sees
    /// what the PASID's entry says; in legacy mode, and while translation is off, nothing. Addresses of interrupts are
    /// ordinary ones for it.
    ///
    /// # Errors
    /// [`AttachErrorKind::NoEndpoint`] if the unit has no scalable mode, the PASID has more than 20 bits, or the endpoint
    /// is not there; else as [`Vtd::add_endpoint`]. Nothing has changed.
    pub fn add_pasid(&self, requester: u16, pasid: u32) -> Result<Endpoint, AttachErrorKind> {
        let mut control = self.lock();
        let of = EndpointId::new(u32::from(requester));
        let id = of.with_pasid(pasid);
        let is_possible = self.0.config.scalable.is_some() && pasid >> registers::PASID_BITS == 0;
        if !is_possible || !control.members.contains_key(&of) {
            return Err(AttachErrorKind::NoEndpoint(id));
        }
        let added = self.0.iommu.add_endpoint(id, EndpointConfig::default());
        let endpoint = added.map_err(|error| error.kind)?;
        if let Err(kind) = self.0.join(&mut control, id) {
            drop(self.0.leave(&mut control, id));
            return Err(kind);
        }
        Ok(endpoint)
    }

    /// Takes a process address space away. Its device has stopped using it before; the completion says when nothing of it
    /// is in use any more.
    ///
    /// # Errors
    /// [`AttachErrorKind::NoEndpoint`].
    pub fn remove_pasid(&self, requester: u16, pasid: u32) -> Result<Completion, AttachErrorKind> {
        self.remove(EndpointId::new(u32::from(requester)).with_pasid(pasid))
    }

    /// Takes an endpoint away (hot-unplug), and its PASIDs. Its device has been stopped before; the completion says when nothing of it is
    /// in use any more.
    ///
    /// # Errors
    /// [`AttachErrorKind::NoEndpoint`].
    pub fn remove_endpoint(&self, requester: u16) -> Result<Completion, AttachErrorKind> {
        self.remove(EndpointId::new(u32::from(requester)))
    }

    fn remove(&self, id: EndpointId) -> Result<Completion, AttachErrorKind> {
        let mut control = self.lock();
        if !control.members.contains_key(&id) {
            return Err(AttachErrorKind::NoEndpoint(id));
        }
        Ok(self.0.leave(&mut control, id))
    }

    /// The machine is reset: registers are what they were at first, and translation is off. The devices behind are to be
    /// stopped before.
    pub fn reset(&self) -> Reset {
        self.0.reset(&mut self.lock())
    }

    /// Whether the driver has switched translation on.
    #[must_use]
    pub fn is_translating(&self) -> bool {
        self.lock().registers.is_translating()
    }

    /// What the unit has done so far.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.0.shared.counters.snapshot()
    }
}

impl Inner {
    fn reset(&self, control: &mut Control) -> Reset {
        control.registers = Registers::default();
        self.faults.with(|registers| *registers = Default::default());
        self.faults.set_translates(false);
        self.shared.root_table.store(0, core::sync::atomic::Ordering::Release);
        control.jobs = Jobs::default();
        for member in control.members.values_mut() {
            member.attached = None;
            if let Some(walker) = &member.walker {
                walker.forget();
            }
        }
        control.domains = Domains::default();
        let mut reset = match self.iommu.reset(ResetKind::System) {
            Ok(viommu::Reset { completion, inside }) => Reset { completion, inside, refused: None },
            Err(error) => {
                log::trouble("an endpoint is blocked after the reset", &error.kind);
                Reset { completion: error.completion, inside: Vec::new(), refused: Some(error.kind) }
            }
        };
        if let Some(pending) = control.pending.replace(Completion::ready()) {
            reset.completion.merge(pending);
        }
        // The core has destroyed them all.
        let ids: Vec<_> = control.members.keys().copied().collect();
        for id in ids {
            if let Err(kind) = self.join(control, id) {
                log::trouble("an endpoint has no domain after the reset", &kind);
            }
        }
        reset
    }
}
