//! Records events as they happen.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::event::{Entry, Event};
use crate::format::Writer;
use crate::scribe::Scribe;

/// Writes events from any thread, in the order in which they come, with the time since the recorder was made.
///
/// Each [`Recorder::record`] takes a lock and, now and then, writes a block: the underlying writer's speed is felt.
#[derive(Debug)]
pub struct Recorder<W: Write> {
    start: Instant,
    inner: Mutex<Inner<W>>,
}

#[derive(Debug)]
struct Inner<W: Write> {
    writer: Writer<W>,
    /// The first error: what is written behind it would not be read.
    failed: Option<io::Error>,
}

impl<W: Write> Recorder<W> {
    /// Begins a history in viommu's own format.
    ///
    /// # Errors
    /// What writing to `out` gives.
    pub fn new(out: W) -> io::Result<Self> {
        let writer = Writer::without_lines(out)?;
        Ok(Self { start: Instant::now(), inner: Mutex::new(Inner { writer, failed: None }) })
    }

    /// Appends `event` with the present time. Does nothing once writing has failed; [`Recorder::finish`] tells.
    pub fn record(&self, event: Event) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.failed.is_some() {
            return;
        }
        // Under the lock, so that times rise.
        let time = u64::try_from(self.start.elapsed().as_nanos()).ok();
        if let Err(error) = inner.writer.write(&Entry { line: 0, time, event }) {
            inner.failed = Some(error);
        }
    }

    /// What follows the endpoints of a unit and records what they see: `recorder.scribe().follow(&endpoint)?`.
    pub fn scribe(self: &Arc<Self>) -> Arc<Scribe>
    where
        W: Send + 'static,
    {
        let recorder = self.clone();
        Scribe::new(move |event| recorder.record(event))
    }

    /// Ends the history.
    ///
    /// # Errors
    /// The first error that writing gave; what was written before it can be read.
    pub fn finish(self) -> io::Result<W> {
        let inner = self.inner.into_inner().unwrap_or_else(PoisonError::into_inner);
        match inner.failed {
            Some(error) => Err(error),
            None => inner.writer.finish(),
        }
    }
}
