//! Guards, leases and completions: when an unmap is over.

pub mod completion;
pub(crate) mod lease;
pub mod scope;
pub(crate) mod slot;
pub(crate) mod space;
