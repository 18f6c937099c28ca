//! `--record`: what the guest does with the IOMMU, as a history for `viommu replay`.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use viommu::ResetKind;
use viommu::endpoint::RegionKind;
use viommu_trace::{Entry as Line, Event, Reserved, Reset, Writer};
use viommu_virtio::{Entry, Journal};

use super::snapshot::nanos;

/// A journal of the device that writes a history, with the time since it began. Writing is the driver's time: a block
/// of 16 KiB now and then.
pub(crate) struct Recording<W: Write>(Mutex<State<W>>);

struct State<W: Write> {
    start: Instant,
    /// None once the history has ended, or could not be written.
    writer: Option<Writer<W>>,
    trouble: Box<dyn FnMut(&io::Error) + Send>,
}

impl Recording<File> {
    /// Begins the history in `file`; what was there is lost. If it cannot be written on, the server goes on without it,
    /// and says so once.
    ///
    /// # Errors
    /// It cannot be made, or written.
    pub(crate) fn create(file: &Path) -> io::Result<Arc<Self>> {
        let name = file.display().to_string();
        Self::new(File::create(file)?, move |why| {
            eprintln!("viommu: --record {name}: {why}; what the guest does from here on is not in it");
        })
    }
}

impl<W: Write> Recording<W> {
    /// Begins the history; `trouble` hears of the first error after that.
    fn new(out: W, trouble: impl FnMut(&io::Error) + Send + 'static) -> io::Result<Arc<Self>> {
        let writer = Some(Writer::without_lines(out)?);
        Ok(Arc::new(Self(Mutex::new(State { start: Instant::now(), writer, trouble: Box::new(trouble) }))))
    }

    /// Ends the history: what happens from now on is not in it. Gives what was written to, if all is there.
    pub(crate) fn finish(&self) -> Option<W> {
        let mut state = self.lock();
        let outcome = state.writer.take()?.finish();
        outcome.inspect_err(|why| (state.trouble)(why)).ok()
    }

    pub(crate) fn write(&self, event: Event) {
        self.lock().write(event);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State<W>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W: Write> State<W> {
    fn write(&mut self, event: Event) {
        let Some(writer) = &mut self.writer else { return };
        let line = Line { line: 0, time: Some(nanos(self.start.elapsed())), event };
        if let Err(why) = writer.write(&line) {
            // What comes behind the place of an error could not be read.
            self.writer = None;
            (self.trouble)(&why);
        }
    }
}

impl<W: Write + Send> Journal for Recording<W> {
    fn note(&self, entry: &Entry<'_>) {
        let mut state = self.lock();
        let event = match *entry {
            Entry::Config { page_size_mask, input_range, bypass } => {
                Event::Config { page_sizes: page_size_mask, input: input_range, bypass }
            }
            Entry::EndpointAdded { endpoint, regions } => {
                state.write(Event::EndpointAdded { endpoint });
                for region in regions {
                    let kind = match region.kind {
                        RegionKind::Reserved => Reserved::Reserved,
                        RegionKind::Msi => Reserved::Msi,
                    };
                    state.write(Event::ReservedRegion { endpoint, kind, range: region.range });
                }
                return;
            }
            Entry::EndpointRemoved { endpoint } => Event::EndpointRemoved { endpoint },
            Entry::Attach { endpoint, domain, bypass } => Event::Attach { domain, endpoint, bypass },
            Entry::Detach { endpoint, domain } => Event::Detach { domain, endpoint },
            Entry::Map { domain, mapping: m } => {
                Event::Map { domain, range: m.range, gpa: m.gpa, access: m.access, target: m.target }
            }
            Entry::Unmap { domain, range, .. } => Event::Unmap { domain, range },
            Entry::Reset(ResetKind::Device) => Event::Reset(Reset::Device),
            Entry::Reset(_) => Event::Reset(Reset::System),
            Entry::Bypass { on } => Event::Bypass { on },
            Entry::Fault(fault) => Event::Fault {
                reason: fault.reason.into(),
                flags: fault.flags.get(),
                endpoint: fault.endpoint.get(),
                address: viommu::Iova(fault.address.get()),
            },
            // What a later version tells and this one does not know.
            _ => return,
        };
        state.write(event);
    }
}

#[cfg(test)]
mod scribe_tests;
#[cfg(test)]
mod tests;
