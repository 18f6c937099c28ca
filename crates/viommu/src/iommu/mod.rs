//! The unit: endpoints, domains, backing, caps.

mod attach;
mod backing;
mod builder;
mod ending;
mod members;
pub(crate) mod seating;
mod subscribing;
mod subscription;
pub(crate) mod unit;

use core::fmt;

use crate::domain::Domain;
use crate::domain::inner::Tables;
use crate::endpoint::{EndpointId, Region, View};
use crate::error::{AttachError, AttachErrorKind, Cap};
use crate::iommu::ending::Owned;
use crate::iommu::unit::Unit;
use crate::quiesce::completion::Completion;
use crate::quiesce::scope::StepScope;
use crate::reader::Reader;
use crate::subscribe::Space;
use crate::sync::{Arc, lock};

pub use builder::{BuildError, Builder, DEFAULT_TABLE_BYTES};
pub use members::{Reset, ResetKind};
pub use subscribing::{BindingHandle, FillError, Subscription};

/// A virtual IOMMU: the one true record of which memory each device may reach. A handle; clones name the same unit.
///
/// The unit ends with the last of its handles, of which every [`Endpoint`] and every [`Subscription`] has one: endpoints
/// that a binding switches are taken away as by [`Endpoint::remove`], and whoever is subscribed still is emptied and
/// dropped. What a [`Reader`] sees and the record of a [`Domain`] stay as long as those do, with nobody else to hear of
/// them.
///
/// Lock order: the unit's lock, then a domain's, then a subscriber's, then those of readers; none of them is held
/// while anything is waited for. Mirrors, caches and observers are called with the first two or three held.
#[derive(Clone)]
pub struct Iommu {
    pub(crate) unit: Arc<Owned>,
}

impl fmt::Debug for Iommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let control = lock(&self.unit.control);
        f.debug_struct("Iommu")
            .field("endpoints", &control.endpoints.len())
            .field("domains", &control.domains.len())
            .field("bypass", &control.bypass)
            .finish_non_exhaustive()
    }
}

/// Where an endpoint sits and what it can never map.
#[derive(Clone, Debug, Default)]
pub struct EndpointConfig {
    /// Regions that hold in every view: disjoint and page-aligned, in any order.
    pub regions: Vec<Region>,
}

impl Iommu {
    fn new(unit: Arc<Unit>) -> Self {
        Self { unit: Arc::new(Owned(unit)) }
    }

    /// Starts to make one.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Adds an endpoint (hot-plug). It sees the default view: identity while bypass is on, else nothing.
    ///
    /// # Errors
    /// [`AttachErrorKind::Exists`], [`AttachErrorKind::Regions`], [`AttachErrorKind::Cap`]; nothing has changed.
    pub fn add_endpoint(
        &self,
        id: impl Into<EndpointId>,
        config: EndpointConfig,
    ) -> Result<Endpoint, AttachError> {
        let id = id.into();
        let _scope = StepScope::enter().map_err(|_| AttachErrorKind::InCallback)?;
        self.unit.add_endpoint(id, config)?;
        Ok(Endpoint { iommu: self.clone(), id })
    }

    /// The endpoint of that id, if it is there.
    #[must_use]
    pub fn endpoint(&self, id: impl Into<EndpointId>) -> Option<Endpoint> {
        let id = id.into();
        let there = lock(&self.unit.control).endpoints.contains_key(&id);
        there.then(|| Endpoint { iommu: self.clone(), id })
    }

    /// All endpoints, in order of id, with what they see.
    #[must_use]
    pub fn endpoints(&self) -> Vec<(EndpointId, View)> {
        let control = lock(&self.unit.control);
        control.endpoints.iter().map(|(id, member)| (*id, control.view_of(member))).collect()
    }

    /// Makes an empty domain.
    ///
    /// # Errors
    /// [`AttachErrorKind::Exists`], [`AttachErrorKind::Cap`]; nothing has changed.
    pub fn create_domain(&self, id: u32, tables: Tables) -> Result<Domain, AttachError> {
        let _scope = StepScope::enter().map_err(|_| AttachErrorKind::InCallback)?;
        let mut control = lock(&self.unit.control);
        if control.domains.contains_key(&id) {
            return Err(AttachErrorKind::Exists(Space::Domain(id).to_string()).into());
        }
        if control.domains.len() >= self.unit.config.domains {
            return Err(AttachErrorKind::Cap(Cap::Domains).into());
        }
        let backing = control.backing.clone();
        let inner = self.unit.make_domain(Space::Domain(id), &tables, &backing)?;
        control.domains.insert(id, inner.clone());
        Ok(Domain(inner))
    }

    /// The domain of that number, if it is there.
    #[must_use]
    pub fn domain(&self, id: u32) -> Option<Domain> {
        lock(&self.unit.control).domains.get(&id).cloned().map(Domain)
    }

    /// All domains, in order of number.
    #[must_use]
    pub fn domains(&self) -> Vec<(u32, Domain)> {
        lock(&self.unit.control).domains.iter().map(|(id, inner)| (*id, Domain(inner.clone()))).collect()
    }

    /// Endpoints that see the domain.
    #[must_use]
    pub fn endpoints_in(&self, domain: u32) -> Vec<EndpointId> {
        lock(&self.unit.control).endpoints_in(domain).collect()
    }

    /// Destroys a domain that no endpoint sees, with its mappings. Who subscribed to it is told.
    ///
    /// # Errors
    /// [`AttachErrorKind::NoDomain`], [`AttachErrorKind::InUse`]; nothing has changed.
    pub fn destroy_domain(&self, id: u32) -> Result<Completion, AttachError> {
        let _scope = StepScope::enter().map_err(|_| AttachErrorKind::InCallback)?;
        let mut control = lock(&self.unit.control);
        if control.endpoints_in(id).next().is_some() {
            return Err(AttachErrorKind::InUse(id).into());
        }
        self.unit.destroy_domain(&mut control, id).ok_or_else(|| AttachErrorKind::NoDomain(id).into())
    }

    /// Gives several endpoints new views as one step: `None` is nothing, so the default view.
    ///
    /// # Errors
    /// See [`AttachErrorKind`]: all endpoints are where they were, except those that [`AttachError::blocked`] names.
    pub fn set_views(&self, moves: &[(EndpointId, Option<View>)]) -> Result<Completion, AttachError> {
        let _scope = StepScope::enter().map_err(|_| AttachErrorKind::InCallback)?;
        let mut control = lock(&self.unit.control);
        self.unit.move_all(&mut control, moves, false)
    }

    /// Says that the host can move these endpoints only together (one VFIO group or container).
    ///
    /// # Errors
    /// [`AttachErrorKind::NoEndpoint`], or [`AttachErrorKind::SplitsSet`] when they see different things now or one is
    /// in another set.
    pub fn isolate_together(&self, ids: &[EndpointId]) -> Result<(), AttachError> {
        let _scope = StepScope::enter().map_err(|_| AttachErrorKind::InCallback)?;
        Ok(self.unit.isolate_together(ids)?)
    }

    /// Turns bypass on or off: what endpoints see that the guest has attached to nothing. One step for all of them.
    ///
    /// # Errors
    /// As [`Iommu::set_views`]; bypass is then as it was.
    pub fn set_bypass(&self, on: bool) -> Result<Completion, AttachError> {
        let _scope = StepScope::enter().map_err(|_| AttachErrorKind::InCallback)?;
        self.unit.set_bypass(on)
    }

    /// Whether unattached endpoints bypass.
    #[must_use]
    pub fn bypass(&self) -> bool {
        lock(&self.unit.control).bypass
    }

    /// Bytes of tables in all domains now.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        self.unit.arena.used()
    }

    /// Completions that were dropped while pending, in this process: each may have answered a guest too early.
    #[must_use]
    pub fn dropped() -> u64 {
        crate::quiesce::completion::dropped()
    }

    /// Completions that have not resolved yet.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        let control = lock(&self.unit.control);
        self.unit.outstanding(&control)
    }
}

/// A DMA master. A handle; it stays valid when the endpoint is removed, and every call says so then.
#[derive(Clone)]
pub struct Endpoint {
    pub(crate) iommu: Iommu,
    pub(crate) id: EndpointId,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({})", self.id)
    }
}

impl Endpoint {
    /// Its id.
    #[must_use]
    pub fn id(&self) -> EndpointId {
        self.id
    }

    /// The unit that it is behind.
    #[must_use]
    pub fn iommu(&self) -> &Iommu {
        &self.iommu
    }

    /// What it sees; `None` when it has been removed.
    #[must_use]
    pub fn view(&self) -> Option<View> {
        let control = lock(&self.iommu.unit.control);
        control.endpoints.get(&self.id).map(|member| control.view_of(member))
    }

    /// What the guest has attached it to; `None`: nothing (or it has been removed).
    #[must_use]
    pub fn attached(&self) -> Option<View> {
        lock(&self.iommu.unit.control).endpoints.get(&self.id)?.attached
    }

    /// Whether it has been fenced: a mirror of it could not follow, so its device is cut off.
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        let control = lock(&self.iommu.unit.control);
        control.endpoints.get(&self.id).is_some_and(|member| member.shared.sight().1.fenced)
    }

    /// Its regions, ascending.
    #[must_use]
    pub fn regions(&self) -> Vec<Region> {
        let control = lock(&self.iommu.unit.control);
        control.endpoints.get(&self.id).map_or_else(Vec::new, |member| member.regions.to_vec())
    }

    /// Guards that its readers have made since it came: batches of translations, at no cost to any of them. 0 when it has
    /// been removed.
    #[must_use]
    pub fn batches(&self) -> u64 {
        let control = lock(&self.iommu.unit.control);
        control.endpoints.get(&self.id).map_or(0, |member| member.shared.stays())
    }

    /// Attaches it to a domain. All that follows it comes along: what it saw before goes, what the domain holds comes;
    /// a bound endpoint is switched as one act. Attaching where it is changes nothing.
    ///
    /// # Errors
    /// See [`AttachErrorKind`] and [`AttachError`].
    pub fn attach(&self, domain: u32) -> Result<Completion, AttachError> {
        self.iommu.set_views(&[(self.id, Some(View::Domain(domain)))])
    }

    /// Attaches it to guest physical addresses (a bypass domain).
    ///
    /// # Errors
    /// See [`AttachErrorKind`] and [`AttachError`].
    pub fn attach_identity(&self) -> Result<Completion, AttachError> {
        self.iommu.set_views(&[(self.id, Some(View::Identity))])
    }

    /// Attaches it to nothing, whatever bypass says.
    ///
    /// # Errors
    /// See [`AttachErrorKind`] and [`AttachError`].
    pub fn block(&self) -> Result<Completion, AttachError> {
        self.iommu.set_views(&[(self.id, Some(View::Blocked))])
    }

    /// Detaches it, and its PASIDs with it: it sees the default view.
    ///
    /// # Errors
    /// See [`AttachErrorKind`] and [`AttachError`].
    pub fn detach(&self) -> Result<Completion, AttachError> {
        let _scope = StepScope::enter().map_err(|_| AttachErrorKind::InCallback)?;
        let moves: Vec<_> = {
            let control = lock(&self.iommu.unit.control);
            let pasids = control.endpoints.iter().filter(|(id, member)| {
                **id != self.id && id.requester == self.id.requester && member.attached.is_some()
            });
            let pasids = pasids.filter(|_| self.id.pasid.is_none()).map(|(id, _)| (*id, Some(View::Blocked)));
            pasids.chain([(self.id, self.id.unattached())]).collect()
        };
        self.iommu.set_views(&moves)
    }

    /// Takes it away (hot-unplug), with its PASIDs, its readers' view and all that follows it. Its device has been
    /// stopped before; the completion says when nothing of it is in use any more.
    ///
    /// # Errors
    /// [`AttachErrorKind::NoEndpoint`], [`AttachErrorKind::InCallback`].
    pub fn remove(self) -> Result<Completion, AttachError> {
        let _scope = StepScope::enter().map_err(|_| AttachErrorKind::InCallback)?;
        Ok(self.iommu.unit.remove_endpoint(self.id)?)
    }

    /// A new way to translate for one worker of the device; `None` when the endpoint has been removed. Make it on the
    /// thread that uses it. `label` names it in reports of what blocks a completion.
    #[must_use]
    pub fn reader(&self, label: &str) -> Option<Reader> {
        let control = lock(&self.iommu.unit.control);
        control.endpoints.get(&self.id).map(|member| Reader::new(&member.shared, label))
    }
}
