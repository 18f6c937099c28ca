//! Endpoints: who does DMA, and what each of them sees.

use core::fmt;

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
