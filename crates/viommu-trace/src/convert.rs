//! From any format to viommu's own.

use std::io::{self, Write};

use crate::error::ReadError;
use crate::format::Writer;
use crate::history::History;

/// Why converting stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The history cannot be read on.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The output cannot be written.
    #[error("writing: {0}")]
    Write(#[from] io::Error),
}

/// Copies what is left of `history` to `writer`; gives the number of entries. The file is not finished.
///
/// # Errors
/// [`ConvertError`]. Everything before a read error has been copied.
pub fn convert<W: Write>(history: &mut History, writer: &mut Writer<W>) -> Result<u64, ConvertError> {
    let mut entries = 0;
    while let Some(entry) = history.next()? {
        writer.write(&entry)?;
        entries += 1;
    }
    Ok(entries)
}
