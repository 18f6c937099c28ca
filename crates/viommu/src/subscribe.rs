//! Who holds a copy: mirrors, caches, bindings, and observers that only watch.
//!
//! All callbacks run inside a step, under the lock of the domain, one at a time for one subscriber and in the same
//! order for all of them. Inside a callback a device may translate; steps, fills and waiting are typed errors;
//! subscribing and leaving are accepted and take effect after the step. A callback must return soon: what takes long
//! is answered with [`Ack::Pending`]. It must not ask the unit or a domain anything else (`len`, `view`, `counts`): those
//! take the locks that the step holds.

use core::fmt;

use crate::ack::Ack;
use crate::addr::{Iova, IovaRange};
use crate::change::Change;
use crate::endpoint::EndpointId;
use crate::mapping::Mapping;
#[cfg(feature = "tracing")]
pub use crate::traced::Traced;

bitflags::bitflags! {
    /// Kinds of events that a subscriber asks for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
    pub struct Kinds: u8 {
        /// New mappings.
        const MAP = 1;
        /// Mappings that are gone.
        const UNMAP = 2;
        /// Explicit invalidations of one endpoint's device TLB (PCI ATS). A cache that asks for these alone hears of no
        /// step on a domain, since the guest tells it by itself; it does hear when its endpoint's view changes, when
        /// its domain ends, and when backing goes.
        const DEVICE_TLB = 4;
    }
}

/// What a subscriber wants to hear of. Events are clipped to it, silently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Interest {
    /// The window of the domain's addresses, inclusive.
    pub window: IovaRange,
    /// The kinds of events; never empty. A mirror has MAP and UNMAP, a cache UNMAP or DEVICE_TLB.
    pub kinds: Kinds,
    /// Added (modulo 2^64) to a domain's address to give the subscriber's.
    pub offset: u64,
}

impl Interest {
    /// Everything, as a mirror needs it.
    pub const MIRROR: Self = Self::all_of(Kinds::MAP.union(Kinds::UNMAP));
    /// All removals, as a cache needs them.
    pub const CACHE: Self = Self::all_of(Kinds::UNMAP);

    /// The whole address space, no offset.
    #[must_use]
    pub const fn all_of(kinds: Kinds) -> Self {
        Self { window: IovaRange::ALL, kinds, offset: 0 }
    }

    /// The same, inside `window` only.
    #[must_use]
    pub const fn within(self, window: IovaRange) -> Self {
        Self { window, ..self }
    }

    /// The same, with `offset` added to every address that the subscriber sees.
    #[must_use]
    pub const fn with_offset(self, offset: u64) -> Self {
        Self { offset, ..self }
    }

    /// A domain's range as the subscriber sees it.
    pub(crate) fn outward(self, range: IovaRange) -> IovaRange {
        let start = Iova(range.start().0.wrapping_add(self.offset));
        let last = Iova(range.last().0.wrapping_add(self.offset));
        IovaRange::new(start, last).unwrap_or(range) // the window was checked not to wrap at subscribe
    }

    /// The subscriber's range in the domain's addresses; `None` where it wraps.
    pub(crate) fn inward(self, range: IovaRange) -> Option<IovaRange> {
        let start = Iova(range.start().0.wrapping_sub(self.offset));
        IovaRange::new(start, Iova(range.last().0.wrapping_sub(self.offset)))
    }
}

/// What a mirror's host can do. Checked before a step begins; never clipped silently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Addresses (the subscriber's) that can be mapped: ascending, disjoint, inclusive. Holes lie between them.
    pub apertures: Vec<IovaRange>,
    /// Bit n set: pages of 2^n bytes. Every extent must be a multiple of the smallest, which is at least 4 KiB.
    pub page_sizes: u64,
    /// Extents that can be held at a time; `None` when the host has no such limit.
    pub entries: Option<u32>,
    /// Whether [`Mirror::replace`] exchanges an extent in place. Without it a change is an unmap and a map.
    pub replace: bool,
    /// Whether one unmap may cover several extents and gaps. Without it each extent is unmapped by itself.
    pub wide_unmap: bool,
    /// Whether [`Mirror::begin`] and [`Mirror::commit`] mean something here; they are not called otherwise.
    pub batches: bool,
    /// Whether device registers (MMIO) can be mapped. Without it they stay in the record and are not delivered.
    pub mmio: bool,
    /// What becomes of a mapping out of reach where the guest cannot be refused (tables in guest memory).
    pub out_of_reach: OutOfReach,
}

/// What becomes of a mapping that a mirror cannot hold and the guest cannot be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OutOfReach {
    /// The mirror is fenced.
    #[default]
    Fence,
    /// The mapping is left out: the device faults there.
    LeaveOut,
}

impl Default for Reach {
    /// No limit at all, 4 KiB pages, unmap and map instead of replace.
    fn default() -> Self {
        Self {
            apertures: vec![IovaRange::ALL],
            page_sizes: !0xfff,
            entries: None,
            replace: false,
            wide_unmap: true,
            batches: false,
            mmio: false,
            out_of_reach: OutOfReach::Fence,
        }
    }
}

impl Reach {
    /// The smallest page, in bytes.
    #[must_use]
    pub fn granule(&self) -> u64 {
        1 << self.page_sizes.trailing_zeros().min(63)
    }

    /// Why `extent` (in the subscriber's addresses) cannot be held; `None` when it can.
    #[must_use]
    pub fn refuses(&self, extent: &Mapping) -> Option<Unreachable> {
        if !extent.range.is_aligned(self.granule()) || extent.gpa.0 & self.granule().wrapping_sub(1) != 0 {
            return Some(Unreachable::PageSize);
        }
        let inside = self.apertures.iter().any(|a| a.covers(extent.range));
        (!inside).then_some(Unreachable::Aperture)
    }
}

/// Why a mapping is out of a mirror's reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unreachable {
    /// It is not inside one aperture.
    #[error("outside the host's apertures")]
    Aperture,
    /// It does not fit the smallest page.
    #[error("not aligned to the host's smallest page")]
    PageSize,
    /// The host's entries are used up.
    #[error("more extents than the host can hold")]
    Entries,
}

/// A consumer's refusal. The state of the consumer is as before the call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refused {
    /// In which way.
    pub kind: RefusalKind,
    /// The consumer's own words (an errno, say), for logs.
    pub reason: String,
}

impl Refused {
    /// A refusal of `kind`, with the consumer's own words.
    pub fn new(kind: RefusalKind, reason: impl Into<String>) -> Self {
        Self { kind, reason: reason.into() }
    }
}

/// The shape of a refusal, for the status that a model gives its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RefusalKind {
    /// Memory, pinning or entries ran out.
    Resources,
    /// The range cannot be mapped there.
    Range,
    /// It is not something this consumer does.
    Unsupported,
    /// The host failed.
    Device,
    /// A [`Mirror::replace`] has left neither `old` nor `new`, or a [`Mirror::map`] some of the extent: the mirror is
    /// fenced.
    Lost,
}

/// What an unmap did.
#[derive(Debug)]
#[must_use]
pub struct Unmapped {
    /// Bytes that were mapped and are no more.
    pub bytes: u128,
    /// Pages that the device wrote, where the host reports it: in the addresses of the call.
    pub dirty: Option<DirtyBitmap>,
    /// When the host is done: no access of the device uses what was removed after that.
    pub ack: Ack,
}

impl Unmapped {
    /// `bytes` removed at once.
    pub fn done(bytes: u128) -> Self {
        Self { bytes, dirty: None, ack: Ack::Done }
    }
}

/// One bit a page, by IOVA, little-endian bit order in each word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBitmap {
    /// The first byte of the first bit's page.
    pub start: Iova,
    /// Bytes a bit, a power of two.
    pub page_size: u64,
    /// The bits: page n is bit n % 64 of word n / 64.
    pub words: Vec<u64>,
}

/// The fence did not hold: the device may still do DMA. The virtual machine must be stopped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device could not be fenced: {0}")]
pub struct FenceFailed(pub String);

/// A subscriber with a full copy that hardware or another process uses unasked: VFIO, iommufd, vhost-vDPA, vfio-user.
///
/// It must hold exactly what the core told it: whole extents, never cut, never two over one address. The extents it
/// is given lie inside its interest, have backing, and have the access that the backing allows.
pub trait Mirror: Send {
    /// What the host can do. Read once, at subscribe; a later loss is told by
    /// [`Subscription::reach_changed`](crate::Subscription::reach_changed).
    fn reach(&self) -> Reach;

    /// A step begins that changes something here. Called only if [`Reach::batches`] says so.
    fn begin(&mut self) {}

    /// The step's calls are all made. A consumer with batches sends them now. Called only if [`Reach::batches`] says so.
    fn commit(&mut self) -> Ack {
        Ack::Done
    }

    /// Holds `extent` from now on. Nothing that it holds overlaps it.
    ///
    /// # Errors
    /// A refusal leaves nothing of the extent behind, but for [`RefusalKind::Lost`]; the step takes back what it added
    /// anywhere. A pending ack that is answered with a failure later fences the mirror.
    fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused>;

    /// Drops every extent inside `range`; none sticks out of it.
    ///
    /// # Errors
    /// A removal is never undone: a mirror that cannot remove is fenced.
    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused>;

    /// Exchanges `old` for `new`, which has the same range. Called only if [`Reach::replace`] says so.
    ///
    /// # Errors
    /// A refusal leaves `old` in place, but for [`RefusalKind::Lost`].
    fn replace(&mut self, old: &Mapping, new: &Mapping) -> Result<Ack, Refused> {
        let Unmapped { ack, .. } = self.unmap(old.range)?;
        let refused = match self.map(new) {
            Ok(more) => return Ok(ack.and(more)),
            Err(refused) => refused,
        };
        match self.map(old) {
            Ok(Ack::Done) => Err(refused),
            // Whether it will be there, nobody would learn.
            Ok(Ack::Pending(_)) | Err(_) => Err(Refused { kind: RefusalKind::Lost, ..refused }),
        }
    }

    /// Cuts the device off: returns only when it can do no more DMA through this mirror (detached, closed, bus-master
    /// off, process gone). The mirror gets no further call but this one.
    ///
    /// # Errors
    /// The embedder is told that it must stop the virtual machine. Neither the step completes nor a later one that
    /// removes anything where the mirror is, until it is cut off after all: it is asked to do so again when its
    /// subscription is ended, when its endpoint or its address space goes, and at [`Iommu::reset`](crate::Iommu::reset).
    fn fence(&mut self) -> Result<(), FenceFailed>;

    /// Every extent held now, in any order, for an audit.
    fn held(&self) -> Vec<Mapping>;
}

/// A subscriber with the entries that it asked for: vhost, vhost-user, a device's own TLB (ATS).
pub trait Cache: Send {
    /// Holds `entry` from now on; called by [`Subscription::fill`](crate::Subscription::fill) only, under this
    /// subscription's own lock, so that a later `invalidate` is behind it.
    fn install(&mut self, entry: &Mapping);

    /// Drops at least what it holds inside `range`. The ack says that nobody uses it any more.
    fn invalidate(&mut self, range: IovaRange) -> Ack;

    /// As [`Mirror::fence`].
    ///
    /// # Errors
    /// As [`Mirror::fence`].
    fn fence(&mut self) -> Result<(), FenceFailed>;

    /// Every entry held now, for an audit; `None` when the peer does not tell.
    fn held(&self) -> Option<Vec<Mapping>> {
        None
    }
}

/// Sees every committed change with old and new; cannot fail. Tracing, statistics, recording.
pub trait Observer: Send {
    /// `change` has been committed in the address space `space`.
    fn changed(&mut self, space: Space, change: &Change);

    /// The view of `endpoint` has changed: the endpoint that this observer follows, or any if it follows none.
    fn moved(&mut self, endpoint: EndpointId, to: crate::endpoint::View) {
        let _ = (endpoint, to);
    }
}

/// How a host switches endpoints from one mirror to another as one act (iommufd: one HWPT attach).
///
/// Endpoints with one binding share its mirrors: there is one for each address space that any of them is in.
pub trait Binding: Send {
    /// A new, empty mirror for `space`, where `first` is the endpoint that will be switched to it before any other: its
    /// host's limits are the mirror's reach, and an identity view is clipped to its regions.
    ///
    /// # Errors
    /// The ATTACH that wanted it is refused.
    fn mirror_for(&mut self, space: Space, first: EndpointId) -> Result<Box<dyn Mirror>, Refused>;

    /// Switches `endpoint` to the mirror made for a space, or to nothing. When it returns, or when the ack comes,
    /// the device uses no other.
    ///
    /// # Errors
    /// A refusal leaves the endpoint where it was.
    fn bind(&mut self, endpoint: EndpointId, to: Bound) -> Result<Ack, Refused>;

    /// As [`Mirror::fence`], for this one endpoint.
    ///
    /// # Errors
    /// As [`Mirror::fence`]; it is asked again at [`Iommu::reset`](crate::Iommu::reset), and a later `bind` says the same.
    fn fence(&mut self, endpoint: EndpointId) -> Result<(), FenceFailed>;
}

/// Where a binding switches an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bound {
    /// To the mirror made for this space.
    Space(Space),
    /// To nothing: no DMA.
    Blocked,
}

/// An address space: a domain of the guest's, or the identity that bypassed endpoints share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Space {
    /// Guest physical addresses, where there is backing.
    Identity,
    /// The domain of this number.
    Domain(u32),
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Identity => f.write_str("identity"),
            Self::Domain(id) => write!(f, "domain {id}"),
        }
    }
}

/// What a model does when subscribers come and go: its `notify_started` and `notify_stopped`.
pub trait Producer: Send + Sync {
    /// The kinds that all subscribers of `space` together want go from `old` to `new`. `old` empty: the first one
    /// comes; `new` empty: the last one goes, which cannot be refused. Called under the unit's lock: no steps here.
    ///
    /// # Errors
    /// The subscription (or the ATTACH that brings it here) is refused.
    fn wanted_changed(&self, space: Space, old: Kinds, new: Kinds) -> Result<(), Refused>;
}
