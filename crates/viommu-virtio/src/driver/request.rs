//! Requests as a driver makes them, and what comes back.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use crate::spec::property::{KIND_MASK, PropertyHead, RESV_MEM, ResvMem};
use crate::spec::request::{
    ATTACH, Attach, AttachFlags, DETACH, Detach, Head, MAP, Map, MapFlags, PROBE, Probe, Status, Tail, UNMAP,
    Unmap,
};

/// One request. Ranges are inclusive; reserved fields are zero but in [`Request::Raw`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Attach an endpoint to a domain.
    Attach {
        /// The domain.
        domain: u32,
        /// The endpoint.
        endpoint: u32,
        /// Whether it is guest physical memory itself.
        flags: AttachFlags,
    },
    /// Detach it.
    Detach {
        /// The domain.
        domain: u32,
        /// The endpoint.
        endpoint: u32,
    },
    /// Make a mapping.
    Map {
        /// The domain.
        domain: u32,
        /// The first address.
        virt_start: u64,
        /// The last one.
        virt_end: u64,
        /// Where the first one goes.
        phys_start: u64,
        /// What is allowed.
        flags: MapFlags,
    },
    /// Remove the mappings inside a range.
    Unmap {
        /// The domain.
        domain: u32,
        /// The first address.
        virt_start: u64,
        /// The last one.
        virt_end: u64,
    },
    /// Ask for an endpoint's properties.
    Probe {
        /// The endpoint.
        endpoint: u32,
    },
    /// Any bytes, and that many to be written.
    Raw {
        /// The readable part.
        bytes: Vec<u8>,
        /// Bytes of the writable part.
        writable: u32,
    },
}

/// Bytes of the longest request but for [`Request::Raw`].
pub(super) const LONGEST: usize = size_of::<Probe>();
/// Bytes of a [`Tail`].
pub(super) const TAIL: u32 = 4;

fn head(kind: u8) -> Head {
    Head { kind, reserved: [0; 3] }
}

impl Request {
    /// The readable part.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.with_bytes(<[u8]>::to_vec)
    }

    /// Bytes of the writable part, for a device with PROBE properties of `probe_size` bytes.
    #[must_use]
    pub fn writable(&self, probe_size: u32) -> u32 {
        match self {
            Self::Probe { .. } => probe_size.saturating_add(TAIL),
            Self::Raw { writable, .. } => *writable,
            _ => TAIL,
        }
    }

    pub(super) fn with_bytes<R>(&self, look: impl FnOnce(&[u8]) -> R) -> R {
        match self {
            Self::Attach { domain, endpoint, flags } => look(
                Attach {
                    head: head(ATTACH),
                    domain: U32::new(*domain),
                    endpoint: U32::new(*endpoint),
                    flags: U32::new(flags.bits()),
                    reserved: [0; 4],
                }
                .as_bytes(),
            ),
            Self::Detach { domain, endpoint } => look(
                Detach {
                    head: head(DETACH),
                    domain: U32::new(*domain),
                    endpoint: U32::new(*endpoint),
                    reserved: [0; 8],
                }
                .as_bytes(),
            ),
            Self::Map { domain, virt_start, virt_end, phys_start, flags } => look(
                Map {
                    head: head(MAP),
                    domain: U32::new(*domain),
                    virt_start: U64::new(*virt_start),
                    virt_end: U64::new(*virt_end),
                    phys_start: U64::new(*phys_start),
                    flags: U32::new(flags.bits()),
                }
                .as_bytes(),
            ),
            Self::Unmap { domain, virt_start, virt_end } => look(
                Unmap {
                    head: head(UNMAP),
                    domain: U32::new(*domain),
                    virt_start: U64::new(*virt_start),
                    virt_end: U64::new(*virt_end),
                    reserved: [0; 4],
                }
                .as_bytes(),
            ),
            Self::Probe { endpoint } => {
                look(Probe { head: head(PROBE), endpoint: U32::new(*endpoint), reserved: [0; 64] }.as_bytes())
            }
            Self::Raw { bytes, .. } => look(bytes),
        }
    }
}

/// Names a request that was pushed; never used twice by one driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub(super) u64);

/// What came back for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Which request.
    pub token: Token,
    /// Bytes that the device says it wrote. 0: it did not understand the request.
    pub used_len: u32,
    /// The tail; `None` when nothing was written, and for chains of [`Driver::push_raw`](super::Driver::push_raw).
    pub tail: Option<Tail>,
    /// Of a PROBE, what lies before the tail. Of a raw request, the whole writable part, filled with
    /// [`FILL`](super::FILL) where the device wrote nothing. Else empty.
    pub properties: Vec<u8>,
}

impl Answer {
    /// How the request ended; `None` when nothing was written.
    #[must_use]
    pub fn status(&self) -> Option<Status> {
        self.tail.map(|tail| Status(tail.status))
    }

    /// The regions in [`Answer::properties`], as a driver reads them.
    #[must_use]
    pub fn resv_mem(&self) -> Vec<ResvMem> {
        resv_mem(&self.properties)
    }
}

/// The RESV_MEM properties of a list. Unknown ones are passed over by their length; the list ends with type 0 or the area.
#[must_use]
pub fn resv_mem(mut properties: &[u8]) -> Vec<ResvMem> {
    let mut regions = Vec::new();
    while let Ok((head, _)) = PropertyHead::read_from_prefix(properties) {
        let kind = head.kind.get();
        if kind & KIND_MASK == 0 {
            break;
        }
        if kind == RESV_MEM
            && let Ok((region, _)) = ResvMem::read_from_prefix(properties)
        {
            regions.push(region);
        }
        let next = usize::from(head.length.get()).saturating_add(size_of::<PropertyHead>());
        properties = properties.get(next..).unwrap_or_default();
    }
    regions
}
