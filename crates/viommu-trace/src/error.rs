//! Why a history cannot be read.

use core::fmt;
use std::io;

/// A place in the uncompressed input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// A line of a text format, the first is 1.
    Line(u64),
    /// A byte of a binary format, the first is 0.
    Byte(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Byte(byte) => write!(f, "byte {byte}"),
        }
    }
}

/// Why reading stopped. `source_name` is the file's path, or `-` for standard input.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The file cannot be opened or read.
    #[error("{source_name}: {error}")]
    Io {
        /// What was read.
        source_name: String,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// The input is damaged or cut off. Everything before `place` was delivered.
    #[error("{source_name}: {place}: {reason}")]
    Corrupt {
        /// What was read.
        source_name: String,
        /// Where.
        place: Place,
        /// What is wrong there.
        reason: String,
    },
    /// The input is in no format that is known.
    #[error(
        "{source_name}: not a history: neither a QEMU -trace log, nor Linux trace text, nor viommu's format"
    )]
    Unrecognised {
        /// What was read.
        source_name: String,
    },
    /// There is nothing in it.
    #[error("{source_name}: no history in it: the input is empty")]
    Empty {
        /// What was read.
        source_name: String,
    },
    /// viommu's own format in a version that this crate cannot read.
    #[error(
        "{source_name}: version {major}.{minor} of viommu's format, which is newer than this program reads"
    )]
    Version {
        /// What was read.
        source_name: String,
        /// The file's major version.
        major: u8,
        /// The file's minor version.
        minor: u8,
    },
}

/// Why reading stopped, before it is known what was read.
#[derive(Debug)]
pub(crate) enum Stop {
    Io(io::Error),
    Corrupt(Place, String),
}

impl Stop {
    pub(crate) fn line(line: u64, reason: impl Into<String>) -> Self {
        Self::Corrupt(Place::Line(line), reason.into())
    }

    pub(crate) fn byte(offset: u64, reason: impl Into<String>) -> Self {
        Self::Corrupt(Place::Byte(offset), reason.into())
    }

    pub(crate) fn of(self, source_name: &str) -> ReadError {
        let source_name = source_name.to_owned();
        match self {
            Self::Io(error) => ReadError::Io { source_name, error },
            Self::Corrupt(place, reason) => ReadError::Corrupt { source_name, place, reason },
        }
    }
}
