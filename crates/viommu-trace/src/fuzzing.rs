//! Bodies of fuzz targets: plain functions, so that they run as tests too.

use std::io;

use crate::event::Entry;
use crate::format::Writer;
use crate::history::History;

/// Events read from one input, at most.
const EVENTS: u64 = 200_000;
/// Bytes that a decoder may allocate.
const MEMORY: u64 = 8 << 20;

/// Reads any bytes as a history, within a cap on work. Entries that come out must survive being written and read.
pub fn fuzz_reader(data: &[u8]) {
    let bytes = io::Cursor::new(data.to_vec());
    let Ok(mut history) = History::begin(Box::new(bytes), "fuzz".to_owned(), None, MEMORY) else { return };
    let mut kept: Vec<Entry> = Vec::new();
    for _ in 0..EVENTS {
        match history.next() {
            Ok(Some(entry)) if kept.len() < 1000 => kept.push(entry),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => break,
        }
        // A bomb: much passed over, nothing found.
        if history.lines() > EVENTS {
            break;
        }
    }
    let Ok(mut writer) = Writer::new(Vec::new()) else { return };
    for entry in &kept {
        let written = writer.write(entry);
        assert!(written.is_ok(), "a vector takes everything");
    }
    let Ok(file) = writer.finish() else { return };
    let again = History::from_reader(io::Cursor::new(file), "again");
    let mut again = again.unwrap_or_else(|error| panic!("what was written is not recognised: {error}"));
    for entry in kept {
        match again.next() {
            Ok(Some(read)) => assert_eq!(read, entry),
            other => panic!("{entry:?} was written, {other:?} was read"),
        }
    }
    assert!(matches!(again.next(), Ok(None)));
}
