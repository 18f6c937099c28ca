//! Guards, leases and completions: when an unmap is over.

#[cfg(not(loom))]
pub(crate) mod completion;
pub(crate) mod lease;
pub(crate) mod published;
#[cfg(not(loom))]
pub(crate) mod scope;
pub(crate) mod slot;
pub(crate) mod space;
