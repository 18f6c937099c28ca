//! Endpoints: who does DMA, and what each of them sees.

use core::fmt;

use crate::addr::IovaRange;
use crate::backing::Backing;
use crate::domain::inner::DomainInner;
use crate::quiesce::published::{Outlook, Published};
use crate::quiesce::slot::Slot;
use crate::quiesce::space::Space;
use crate::reader::FaultSink;
use crate::sync::Arc;
use crate::table::Table;

/// A DMA master: a requester id (a PCI function's bus, device and function, say), optionally with a PASID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct EndpointId {
    /// The requester, as the model numbers it.
    pub requester: u32,
    /// The process address space of the requester; `None` for its requests without one.
    pub pasid: Option<u32>,
}

impl EndpointId {
    /// The requests of `requester` without PASID.
    #[must_use]
    pub const fn new(requester: u32) -> Self {
        Self { requester, pasid: None }
    }

    /// The same requester's requests with `pasid`.
    #[must_use]
    pub const fn with_pasid(self, pasid: u32) -> Self {
        Self { pasid: Some(pasid), ..self }
    }

    /// What it is attached to when the guest has attached it to nothing: with a PASID nothing is seen then, since bypass
    /// is for requests without one.
    pub(crate) fn unattached(self) -> Option<View> {
        self.pasid.map(|_| View::Blocked)
    }

    /// One word that names it: 0 in the upper half for "no PASID".
    pub(crate) fn key(self) -> u64 {
        let pasid = self.pasid.map_or(0, |pasid| u64::from(pasid).wrapping_add(1));
        pasid << 32 | u64::from(self.requester)
    }

    /// The key of who is no endpoint: a reader of a domain's own cache.
    pub(crate) const NOBODY: u64 = u64::MAX;

    pub(crate) fn from_key(key: u64) -> Option<Self> {
        let half = |word: u64| u32::try_from(word & 0xffff_ffff).unwrap_or(u32::MAX);
        let id = Self { requester: half(key), pasid: half(key >> 32).checked_sub(1) };
        (key != Self::NOBODY).then_some(id)
    }
}

impl From<u32> for EndpointId {
    fn from(requester: u32) -> Self {
        Self::new(requester)
    }
}

impl fmt::Display for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pasid {
            None => write!(f, "endpoint {}", self.requester),
            Some(pasid) => write!(f, "endpoint {} pasid {pasid}", self.requester),
        }
    }
}

/// What an endpoint sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum View {
    /// Nothing: every access faults.
    Blocked,
    /// Guest physical addresses, where there is backing (bypass).
    Identity,
    /// The domain of this number.
    Domain(u32),
}

/// A region of an endpoint's addresses that no mapping may cover, whatever its view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Region {
    /// Where, inclusive.
    pub range: IovaRange,
    /// What happens there.
    pub kind: RegionKind,
}

/// What happens to an access in a [`Region`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum RegionKind {
    /// It faults.
    Reserved,
    /// A write is an interrupt and is not translated; a read faults.
    Msi,
}

/// What one endpoint sees at a time: published as a whole.
pub(crate) struct Sight {
    pub(crate) endpoint: Option<EndpointId>,
    pub(crate) domain: Option<Arc<DomainInner>>,
    pub(crate) backing: Arc<Backing>,
    /// The domain's record, where it is what counts.
    pub(crate) table: Option<Arc<Table>>,
    /// Ascending, disjoint.
    pub(crate) regions: Arc<[Region]>,
    /// Below this address regions must be looked at; above it there are none.
    pub(crate) clear_from: u64,
    pub(crate) faults: Option<Arc<dyn FaultSink>>,
    pub(crate) fenced: bool,
}

/// The part of an endpoint that its readers look at.
pub(crate) struct EndpointShared {
    pub(crate) id: Option<EndpointId>,
    sight: Published<Sight>,
}

impl Outlook for Sight {
    fn space(&self) -> Option<&Arc<Space>> {
        self.domain.as_ref().map(|domain| &domain.readers)
    }
}

impl EndpointShared {
    pub(crate) fn new(id: Option<EndpointId>, mut sight: Sight) -> Arc<Self> {
        sight.settle();
        Arc::new(Self { id, sight: Published::new(sight) })
    }

    #[inline(always)]
    pub(crate) fn generation(&self) -> u64 {
        self.sight.generation()
    }

    /// The sight and a generation that is not newer than it.
    pub(crate) fn sight(&self) -> (u64, Arc<Sight>) {
        self.sight.current()
    }

    /// How often its readers have gone inside.
    pub(crate) fn stays(&self) -> u64 {
        self.sight.stays()
    }

    /// A new reader.
    pub(crate) fn add_slot(&self, slot: &Arc<Slot>) {
        self.sight.add_slot(slot);
    }

    /// Publishes a new sight. Who is fenced sees nothing, whatever is published.
    pub(crate) fn publish(&self, change: impl FnOnce(&Sight) -> Sight) {
        self.sight.publish(|old| {
            let mut new = change(old);
            new.settle();
            new
        });
    }
}

impl Sight {
    /// Makes what is derived from the rest true again.
    pub(crate) fn settle(&mut self) {
        if self.fenced {
            self.domain = None;
        }
        let own = self.domain.as_ref().filter(|domain| domain.walker.is_none());
        self.table = own.map(|domain| domain.table.clone());
        // The very last address counts as below: it has no address behind it.
        self.clear_from = self.regions.last().map_or(0, |region| region.range.last().0.saturating_add(1));
    }

    /// The same, with another address space.
    pub(crate) fn moved_to(&self, domain: Option<Arc<DomainInner>>) -> Self {
        Self { domain, ..self.copy() }
    }

    pub(crate) fn copy(&self) -> Self {
        Self {
            endpoint: self.endpoint,
            domain: self.domain.clone(),
            backing: self.backing.clone(),
            regions: self.regions.clone(),
            table: self.table.clone(),
            clear_from: self.clear_from,
            faults: self.faults.clone(),
            fenced: self.fenced,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_of_an_endpoint_names_it_and_its_pasid() {
        for id in [EndpointId::new(0), EndpointId::new(u32::MAX), EndpointId::new(7).with_pasid(0)] {
            assert_eq!(EndpointId::from_key(id.key()), Some(id));
        }
        assert_eq!(EndpointId::from_key(EndpointId::NOBODY), None);
        assert_ne!(EndpointId::new(7).key(), EndpointId::new(7).with_pasid(0).key());
    }
}
