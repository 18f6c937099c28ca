//! Linux tracepoint text: `/sys/kernel/tracing/trace`, `trace_pipe` and `perf script`.
//!
//! `iommu:map` and `iommu:unmap` name neither device nor domain. What follows them in the same task does:
//! `dma:dma_map_*` and `dma_alloc*` (behind the map), `dma_unmap_*` (behind the unmap), `dma_free*` (before it), and
//! `intel_iommu:cache_tag_flush_range*` with a domain id that `cache_tag_assign` and `attach_device_to_domain` tie
//! to a device. Where nothing follows, an unmap still belongs to the only domain that holds the range. The rest is
//! counted and left out, see [`Attribution`].
//!
//! Domains are numbered by IOMMU group: the group's number, plus 65536 for each time its devices were attached anew
//! (to VFIO's domain and back). Groups that the trace does not name count from 32768. Endpoints are PCI addresses,
//! `segment << 16 | bus << 8 | devfn`; devices that are not on PCI count from 2^31.

mod attribute;
mod line;

use std::collections::VecDeque;

pub use attribute::Attribution;
use attribute::Attributor;
use line::{Line, Said};

use crate::error::Stop;
use crate::event::{Entry, Event, Label};
use crate::input::Input;
use crate::passed_over::PassedOver;

pub(crate) use line::recognises;

/// Reads Linux trace text.
#[derive(Default)]
pub(crate) struct LinuxReader {
    attributor: Attributor,
    ready: VecDeque<Entry>,
    done: bool,
    failure: Option<Stop>,
}

impl LinuxReader {
    pub(crate) fn attribution(&self) -> Attribution {
        self.attributor.counts()
    }

    pub(crate) fn next(&mut self, input: &mut Input, passed: &mut PassedOver) -> Result<Option<Entry>, Stop> {
        loop {
            if let Some(entry) = self.ready.pop_front() {
                return Ok(Some(entry));
            }
            if self.attributor.pop(&mut self.ready, self.done) {
                continue;
            }
            if self.done {
                return self.failure.take().map_or(Ok(None), Err);
            }
            // What came before the trouble is told first.
            if let Err(stop) = self.line(input, passed) {
                self.done = true;
                self.failure = Some(stop);
            }
        }
    }

    fn line(&mut self, input: &mut Input, passed: &mut PassedOver) -> Result<(), Stop> {
        let Some((line, text)) = input.line()? else {
            self.done = true;
            return Ok(());
        };
        let Some(Line { task, time, name, said }) = line::parse(text) else {
            passed.chat();
            return Ok(());
        };
        let said =
            said.map_err(|bad| Stop::line(line, format!("{}: {bad}", String::from_utf8_lossy(name))))?;
        match said {
            Said::Mark(text) => {
                let event = Event::Mark(Label::new(&String::from_utf8_lossy(text)));
                self.attributor.push_ready(Entry { line, time, event });
            }
            Said::Other => passed.event(name),
            said => self.attributor.take(line, time, task, &said),
        }
        Ok(())
    }
}
