//! What the tests share.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::PathBuf;

use viommu_trace::{Entry, History, ReadError};

pub(crate) fn corpus(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

/// Everything up to the end or an error.
pub(crate) fn drain(history: &mut History) -> (Vec<Entry>, Option<ReadError>) {
    let mut entries = Vec::new();
    loop {
        match history.next() {
            Ok(Some(entry)) => entries.push(entry),
            Ok(None) => return (entries, None),
            Err(error) => return (entries, Some(error)),
        }
    }
}

pub(crate) fn read(bytes: Vec<u8>) -> (Vec<Entry>, Option<ReadError>) {
    match History::from_reader(Cursor::new(bytes), "test") {
        Ok(mut history) => drain(&mut history),
        Err(error) => (Vec::new(), Some(error)),
    }
}

/// Entries of a corpus file that has no error.
pub(crate) fn good(name: &str) -> Vec<Entry> {
    let (entries, error) = drain(&mut History::open(corpus(name)).unwrap());
    assert!(error.is_none(), "{name}: {error:?}");
    entries
}

/// The variants' names and how often they come.
pub(crate) fn kinds(entries: &[Entry]) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for entry in entries {
        let name = format!("{:?}", entry.event);
        let end = name.find(|c: char| !c.is_alphanumeric()).unwrap_or(name.len());
        *kinds.entry(name[..end].to_owned()).or_default() += 1;
    }
    kinds
}
