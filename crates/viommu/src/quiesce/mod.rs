//! Guards, leases and completions: when an unmap is over.

#[cfg(not(loom))]
pub(crate) mod completion;
pub(crate) mod lease;
#[cfg(all(test, loom))]
mod loom_tests;
pub(crate) mod published;
#[cfg(not(loom))]
pub(crate) mod scope;
pub(crate) mod slot;
pub(crate) mod space;
