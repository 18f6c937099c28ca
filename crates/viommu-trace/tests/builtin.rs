//! The history that the program `viommu` brings along.
#![cfg(feature = "compression")]

#[expect(dead_code, reason = "not every test uses all of it")]
mod common;

use common::{drain, kinds};
use viommu_trace::{Format, History};

#[test]
fn the_built_in_history_is_whole() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../viommu-cli/data/builtin.viommu.xz");
    let mut history = History::open(path).unwrap();
    assert_eq!(history.format(), Format::Viommu);
    let (entries, error) = drain(&mut history);
    assert!(error.is_none(), "{error:?}");
    let found = kinds(&entries);
    for (kind, count) in [
        ("Access", 52_082),
        ("Translated", 47_758),
        ("Map", 6698),
        ("Unmapped", 6495),
        ("Unmap", 5693),
        ("Attach", 9),
        ("Reset", 2),
    ] {
        assert_eq!(found.get(kind), Some(&count), "{kind}");
    }
    assert_eq!(history.lines(), entries.len() as u64);
    assert!(entries.is_sorted_by_key(|entry| entry.line));
}
