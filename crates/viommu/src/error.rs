//! What can be refused, and why.

use crate::addr::{GpaRange, IovaRange};
use crate::endpoint::EndpointId;
use crate::quiesce::completion::Completion;
use crate::subscribe::{Kinds, Refused, Space, Unreachable};

/// A step that was refused.
///
/// What it added anywhere has been taken back. Its removals, if it had any, have happened: the guest may be answered
/// when [`StepError::completion`] has resolved.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct StepError {
    /// Why.
    #[source]
    pub kind: StepErrorKind,
    /// What the refused step still has under way; ready in most cases.
    pub completion: Completion,
}

impl From<StepErrorKind> for StepError {
    fn from(kind: StepErrorKind) -> Self {
        Self { kind, completion: Completion::ready() }
    }
}

/// Why a step was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StepErrorKind {
    /// Called inside a subscriber's callback, or while this thread holds a burst. Nothing has changed.
    #[error("a step inside a subscriber's callback or a burst")]
    InCallback,
    /// Start, end or target is not a multiple of the page. Nothing has changed.
    #[error("{range} or its target is not aligned to {page_size:#x}")]
    Unaligned {
        /// The range asked for.
        range: IovaRange,
        /// Bytes.
        page_size: u64,
    },
    /// The range is not inside what the model can address. Nothing has changed.
    #[error("{range} is outside {aperture}")]
    OutOfRange {
        /// The range asked for.
        range: IovaRange,
        /// What can be addressed.
        aperture: IovaRange,
    },
    /// Something is mapped there. Nothing has changed.
    #[error("{range} overlaps the mapping at {existing}")]
    Overlap {
        /// The range asked for.
        range: IovaRange,
        /// What is there.
        existing: IovaRange,
    },
    /// The range would cut a mapping. Nothing has changed.
    #[error("{range} would cut the mapping at {existing}")]
    Cut {
        /// The range asked for.
        range: IovaRange,
        /// What would be cut.
        existing: IovaRange,
    },
    /// The range meets a reserved or MSI region of an endpoint that is attached here. Nothing has changed.
    #[error("{range} meets the region {region} of {endpoint}")]
    Reserved {
        /// The range asked for.
        range: IovaRange,
        /// The region.
        region: IovaRange,
        /// Whose it is.
        endpoint: EndpointId,
    },
    /// A cap of the embedder's is reached. Nothing has changed.
    #[error("the cap on {0} is reached")]
    Cap(Cap),
    /// A mirror cannot hold it. Nothing has changed.
    #[error("subscription {subscription} cannot hold {range}: {why}")]
    Unreachable {
        /// Whose mirror.
        subscription: u64,
        /// In which way.
        why: Unreachable,
        /// The extent, in the mirror's addresses.
        range: IovaRange,
    },
    /// A mirror refused it. What was added is taken back; what a replacement had removed is restored.
    #[error("subscription {subscription} refused: {refused}")]
    Refused {
        /// Whose mirror.
        subscription: u64,
        /// Its words.
        refused: Refused,
    },
    /// The domain has been destroyed.
    #[error("{0} is gone")]
    Gone(Space),
    /// The domain's record is not kept in this way: sync on an owned table, invalidate while a mirror listens.
    #[error("{0}")]
    WrongKind(&'static str),
    /// Backing overlaps, is not page-aligned, or is not there.
    #[error("{range}: {why}")]
    Backing {
        /// The extent asked for.
        range: GpaRange,
        /// In which way.
        why: &'static str,
    },
}

/// Caps that the embedder sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cap {
    /// Bytes of tables in all domains.
    TableBytes,
    /// Mappings in one domain.
    DomainMappings,
    /// Mappings in all domains.
    Mappings,
    /// Domains.
    Domains,
    /// Endpoints.
    Endpoints,
    /// Subscriptions.
    Subscriptions,
}

impl core::fmt::Display for Cap {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::TableBytes => "bytes of tables",
            Self::DomainMappings => "mappings of one domain",
            Self::Mappings => "mappings in all",
            Self::Domains => "domains",
            Self::Endpoints => "endpoints",
            Self::Subscriptions => "subscriptions",
        })
    }
}

/// A change of endpoints' views that was refused. The endpoints are where they were, unless `blocked` says otherwise.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct AttachError {
    /// Why.
    #[source]
    pub kind: AttachErrorKind,
    /// Endpoints that could not be brought back to where they were: they are blocked now.
    pub blocked: Vec<EndpointId>,
    /// What the refused change still has under way; the guest may be answered when it has resolved.
    pub completion: Completion,
}

impl From<AttachErrorKind> for AttachError {
    fn from(kind: AttachErrorKind) -> Self {
        Self { kind, blocked: Vec::new(), completion: Completion::ready() }
    }
}

/// Why a change of views was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttachErrorKind {
    /// Called inside a subscriber's callback.
    #[error("a step inside a subscriber's callback")]
    InCallback,
    /// There is no such endpoint.
    #[error("there is no {0}")]
    NoEndpoint(EndpointId),
    /// There is no such domain.
    #[error("there is no domain {0}")]
    NoDomain(u32),
    /// The number is taken.
    #[error("{0} is there already")]
    Exists(String),
    /// The endpoint cannot leave its isolation set, or join one whose members see something else.
    #[error("{endpoint} shares its host isolation with {with}, which would see something else")]
    SplitsSet {
        /// Who was to move.
        endpoint: EndpointId,
        /// Who would have to move along.
        with: EndpointId,
    },
    /// The endpoint has been fenced: a new subscription after a device reset brings it back.
    #[error("{0} is fenced")]
    Fenced(EndpointId),
    /// A mapping of the domain meets one of the endpoint's regions.
    #[error("the mapping at {mapping} meets the region {region} of {endpoint}")]
    Reserved {
        /// Whose region.
        endpoint: EndpointId,
        /// The region.
        region: IovaRange,
        /// The mapping.
        mapping: IovaRange,
    },
    /// A region is not made of whole pages, or regions overlap.
    #[error("regions must be disjoint and page-aligned: {0}")]
    Regions(IovaRange),
    /// A mirror of the endpoint cannot hold the domain.
    #[error("subscription {subscription} cannot hold {range}: {why}")]
    Unreachable {
        /// Whose mirror.
        subscription: u64,
        /// In which way.
        why: Unreachable,
        /// The extent, in the mirror's addresses.
        range: IovaRange,
    },
    /// A mirror or a binding refused.
    #[error("refused: {0}")]
    Refused(Refused),
    /// The model cannot produce what the endpoint's subscribers want there.
    #[error("{space} cannot give {kinds:?}: {why}")]
    NotProduced {
        /// Where.
        space: Space,
        /// What is wanted.
        kinds: Kinds,
        /// Why not.
        why: Refused,
    },
    /// A cap of the embedder's is reached.
    #[error("the cap on {0} is reached")]
    Cap(Cap),
    /// The domain still has endpoints.
    #[error("domain {0} is in use")]
    InUse(u32),
}

/// A subscription that was refused. Nothing of it is left.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubscribeError {
    /// It asks for nothing.
    #[error("a subscription must ask for MAP, UNMAP or both")]
    Nothing,
    /// It asks for kinds that make no sense for what it is: a mirror needs MAP and UNMAP, a cache UNMAP or DEVICE_TLB.
    #[error("{0:?} is not what such a subscriber can live with")]
    WrongKinds(Kinds),
    /// The window wraps with its offset, or the reach is not in order.
    #[error("{0}")]
    Invalid(&'static str),
    /// There is no such endpoint or domain.
    #[error("there is nothing to subscribe to")]
    Gone,
    /// The source cannot produce what is asked for.
    #[error("{space} cannot give {kinds:?}: {why}")]
    NotProduced {
        /// Where.
        space: Space,
        /// What is wanted.
        kinds: Kinds,
        /// Why not.
        why: Refused,
    },
    /// The mirror cannot hold what is mapped already.
    #[error("{range} cannot be held: {why}")]
    Unreachable {
        /// In which way.
        why: Unreachable,
        /// The extent, in the mirror's addresses.
        range: IovaRange,
    },
    /// The mirror refused a part of the replay; what it had got is taken back.
    #[error("the replay was refused: {0}")]
    Refused(Refused),
    /// The mirror refused a part of the replay and could not take back the rest; it has been fenced.
    #[error("the replay failed and the mirror was fenced: {0}")]
    Fenced(String),
    /// A cap of the embedder's is reached.
    #[error("the cap on {0} is reached")]
    Cap(Cap),
}

/// Something that the embedder must know of, whoever caused it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Incident {
    /// A subscriber could not follow the record and has been cut off.
    Fenced {
        /// Its number.
        subscription: u64,
        /// The endpoint that it follows, if it follows one.
        endpoint: Option<EndpointId>,
        /// What happened.
        why: String,
    },
    /// A subscriber could not be cut off: its device may still do DMA to memory that the guest has taken back. **Stop
    /// the virtual machine.** The step's completion does not resolve, nor does that of a later step which takes anything
    /// away where the subscriber is, until it is cut off after all: see [`Mirror::fence`](crate::subscribe::Mirror::fence).
    FenceFailed {
        /// Its number.
        subscription: u64,
        /// The endpoint that it follows, if it follows one.
        endpoint: Option<EndpointId>,
        /// What happened.
        why: String,
    },
    /// An endpoint could not be brought back after a refused attach, and is blocked.
    Blocked {
        /// Which.
        endpoint: EndpointId,
        /// What happened.
        why: String,
    },
    /// A subscription that was asked for inside a callback was refused when it was made.
    SubscriptionRefused {
        /// Its number.
        subscription: u64,
        /// Why.
        why: SubscribeError,
    },
}
