//! What a step makes different.

use crate::addr::IovaRange;
use crate::mapping::Mapping;
use crate::subscribe::Kinds;

/// One difference, derived from the record: never from a permission, never claimed by a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// `new` is mapped where nothing was.
    Map {
        /// What is there now.
        new: Mapping,
    },
    /// `old` is gone.
    Unmap {
        /// What was there.
        old: Mapping,
    },
    /// One mapping took the place of another over the same range, in one step.
    Replace {
        /// What was there.
        old: Mapping,
        /// What is there now.
        new: Mapping,
    },
}

impl Change {
    /// The range that it touches.
    #[must_use]
    pub fn range(&self) -> IovaRange {
        match self {
            Self::Map { new } | Self::Replace { new, .. } => new.range,
            Self::Unmap { old } => old.range,
        }
    }

    /// What was mapped before.
    #[must_use]
    pub fn before(&self) -> Option<&Mapping> {
        match self {
            Self::Map { .. } => None,
            Self::Unmap { old } | Self::Replace { old, .. } => Some(old),
        }
    }

    /// What is mapped now.
    #[must_use]
    pub fn after(&self) -> Option<&Mapping> {
        match self {
            Self::Map { new } | Self::Replace { new, .. } => Some(new),
            Self::Unmap { .. } => None,
        }
    }

    /// The kinds of events that it is: a replacement is both.
    #[must_use]
    pub fn kinds(&self) -> Kinds {
        match self {
            Self::Map { .. } => Kinds::MAP,
            Self::Unmap { .. } => Kinds::UNMAP,
            Self::Replace { .. } => Kinds::MAP | Kinds::UNMAP,
        }
    }
}
