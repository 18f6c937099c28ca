//! The record of one domain.
//!
//! A [`Writer`] (under the domain's lock) changes it and remembers the boundaries of mappings; a [`Table`] is what
//! readers look into at the same time. `plain` is an ordered map, the reference; `radix` is the one in use.

#[cfg(test)]
pub(crate) mod plain;
// The model checker has another model of the table: all that it needs to know is one word and its reuse.
#[cfg(not(loom))]
pub(crate) mod radix;

#[cfg(not(loom))]
pub(crate) use radix::{Arena, Table, Writer};

use crate::addr::Gpa;
use crate::mapping::{Access, Target};

/// The smallest page that the record can hold, in bytes.
pub(crate) const PAGE: u64 = 4096;

/// What one address translates to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hit {
    /// The target of that very byte.
    pub(crate) gpa: Gpa,
    pub(crate) access: Access,
    pub(crate) target: Target,
    /// Bytes from here on that are known to go on linearly, minus one. A mapping may go on behind them.
    pub(crate) left: u64,
}

/// A mapping would overlap one that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InsertError {
    /// Something is mapped in the range.
    Overlap,
    /// The arena's cap is reached. Nothing has changed.
    NoMemory,
}

/// The range ends inside a mapping. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cuts;

/// The arena's cap is reached. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoMemory;
