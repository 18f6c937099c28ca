//! Writes viommu's own format.

use std::io::{self, Write};

use super::record::{Last, put, put_count};
use super::{BLOCK, END, HAS_LINES, MAGIC, MAJOR, MINOR, RECORDS, checksum};
use crate::event::Entry;

/// Writes a history in viommu's own format.
///
/// Entries are gathered in blocks of 16 KiB, so `W` needs no buffer of its own. Without [`Writer::finish`] the file
/// lacks its end mark, and reading it ends in an error behind the last whole block.
///
/// ```
/// use viommu_trace::{Entry, Event, History, Reset, Writer};
///
/// let entry = Entry { line: 7, time: Some(1_000), event: Event::Reset(Reset::System) };
/// let mut writer = Writer::new(Vec::new())?;
/// writer.write(&entry)?;
/// let file = writer.finish()?;
///
/// let mut history = History::from_reader(std::io::Cursor::new(file), "memory")?;
/// assert_eq!(history.next()?, Some(entry));
/// assert_eq!(history.next()?, None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Writer<W: Write> {
    out: W,
    lines: bool,
    block: Vec<u8>,
    last: Last,
    records: u64,
}

impl<W: Write> Writer<W> {
    /// Begins a file that keeps each entry's line.
    ///
    /// # Errors
    /// What writing to `out` gives.
    pub fn new(out: W) -> io::Result<Self> {
        Self::begin(out, true)
    }

    /// Begins a file without lines: entries are then numbered as they are read.
    ///
    /// # Errors
    /// What writing to `out` gives.
    pub fn without_lines(out: W) -> io::Result<Self> {
        Self::begin(out, false)
    }

    fn begin(mut out: W, lines: bool) -> io::Result<Self> {
        out.write_all(MAGIC)?;
        out.write_all(&[MAJOR, MINOR, if lines { HAS_LINES } else { 0 }])?;
        Ok(Self { out, lines, block: Vec::with_capacity(BLOCK + 256), last: Last::default(), records: 0 })
    }

    /// Appends `entry`.
    ///
    /// # Errors
    /// What writing to the underlying writer gives. The file is then of no use from the last whole block on.
    pub fn write(&mut self, entry: &Entry) -> io::Result<()> {
        put(&mut self.block, &mut self.last, entry, self.lines);
        self.records += 1;
        if self.block.len() >= BLOCK { self.flush_block() } else { Ok(()) }
    }

    /// Entries written so far.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Ends the block early, so that a reader can have all that was written so far.
    ///
    /// # Errors
    /// What writing to the underlying writer gives.
    pub fn flush(&mut self) -> io::Result<()> {
        self.flush_block()?;
        self.out.flush()
    }

    /// Writes what is left and the end mark, and gives the underlying writer back.
    ///
    /// # Errors
    /// What writing to the underlying writer gives; the file then has no end mark.
    pub fn finish(mut self) -> io::Result<W> {
        self.flush_block()?;
        put_count(&mut self.block, self.records);
        write_block(&mut self.out, END, &self.block)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn flush_block(&mut self) -> io::Result<()> {
        if self.block.is_empty() {
            return Ok(());
        }
        write_block(&mut self.out, RECORDS, &self.block)?;
        self.block.clear();
        self.last = Last::default();
        Ok(())
    }
}

fn write_block<W: Write>(out: &mut W, kind: u8, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    out.write_all(&[kind])?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(&checksum(kind, payload).to_le_bytes())?;
    out.write_all(payload)
}
