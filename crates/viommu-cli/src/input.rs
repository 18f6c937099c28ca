//! Where a history comes from.

use std::io::Cursor;
use std::path::Path;

use viommu_trace::{History, ReadError};

/// A real guest's history; its origin is told in `data/README.md`.
static BUILT_IN: &[u8] = include_bytes!("../data/builtin.viommu.xz");

/// Opens `file`, or the built-in history.
pub(crate) fn open(file: Option<&Path>) -> Result<History, ReadError> {
    match file {
        Some(path) => History::open(path),
        None => History::from_reader(Cursor::new(BUILT_IN), "built-in"),
    }
}
