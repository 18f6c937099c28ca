//! Guards, leases and completions: when an unmap is over.

pub(crate) mod slot;
pub(crate) mod space;
