//! Guards, leases and completions: when an unmap is over.

pub(crate) mod completion;
pub(crate) mod lease;
pub(crate) mod scope;
pub(crate) mod slot;
pub(crate) mod space;
