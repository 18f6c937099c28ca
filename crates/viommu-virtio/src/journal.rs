//! What the device did, told as it happens: for a history of it.

use std::sync::Arc;

use viommu::endpoint::Region;
use viommu::{IovaRange, Mapping, ResetKind};

use crate::device::VirtioIommu;
use crate::spec::event;

/// Hears of all that changes what endpoints see, in the order in which it happens, and of the faults that are reported.
///
/// What a driver asked for and was refused is not told, nor an ATTACH to where the endpoint is already: they change
/// nothing.
pub trait Journal: Send + Sync {
    /// Something has happened. Called under the device's lock, and for mappings under their domain's too (faults: under
    /// neither), so its time is the driver's: it must not call the device or the record.
    fn note(&self, entry: &Entry<'_>);
}

/// One thing that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Entry<'a> {
    /// What the journal begins with.
    Config {
        /// Page sizes, one a bit.
        page_size_mask: u64,
        /// Addresses that can be mapped.
        input_range: IovaRange,
        /// Whether endpoints that are attached to nothing bypass.
        bypass: bool,
    },
    /// An endpoint has come.
    EndpointAdded {
        /// Its number.
        endpoint: u32,
        /// What no mapping of its domain may meet: ascending, disjoint.
        regions: &'a [Region],
    },
    /// An endpoint has gone. If it was attached, it is not any more, and the domain has died if it was the last one.
    EndpointRemoved {
        /// Its number.
        endpoint: u32,
    },
    /// An endpoint has come to a domain, from wherever it was: a domain that it leaves as the last one dies.
    Attach {
        /// Its number.
        endpoint: u32,
        /// The domain's.
        domain: u32,
        /// The domain is one of bypass.
        bypass: bool,
    },
    /// An endpoint has left its domain, which dies with its last one. Also where a request to detach or attach it failed
    /// so that it is attached to nothing.
    Detach {
        /// Its number.
        endpoint: u32,
        /// The domain's.
        domain: u32,
    },
    /// A mapping has come.
    Map {
        /// The domain.
        domain: u32,
        /// The mapping.
        mapping: Mapping,
    },
    /// All mappings in a range have gone.
    Unmap {
        /// The domain.
        domain: u32,
        /// The range, as the driver asked for it.
        range: IovaRange,
        /// How many there were.
        removed: usize,
    },
    /// All endpoints are attached to nothing, and all domains are gone.
    Reset(ResetKind),
    /// What endpoints see that are attached to nothing.
    Bypass {
        /// All of memory.
        on: bool,
    },
    /// A fault was given to the driver, in a buffer of the event queue.
    Fault(event::Fault),
}

impl VirtioIommu {
    /// Tells `journal` of everything from now on, and first of what there is: configuration, endpoints, where they are
    /// attached, mappings. Without a journal that costs one branch each time. Gives whether it is taken: a device has
    /// one journal, and keeps it.
    pub fn journal(&self, journal: Arc<dyn Journal>) -> bool {
        // No request comes between what there is and what changes.
        let control = self.lock();
        if self.journal_cell().get().is_some() {
            return false;
        }
        let config = self.config();
        journal.note(&Entry::Config {
            page_size_mask: control.page_size_mask(),
            input_range: config.input_range,
            bypass: self.iommu().bypass(),
        });
        control
            .for_each_endpoint(|endpoint, regions| journal.note(&Entry::EndpointAdded { endpoint, regions }));
        control.for_each_attached(|entry| journal.note(&entry));
        self.journal_cell().set(journal).is_ok()
    }

    /// Tells the journal, if there is one.
    #[inline]
    pub(crate) fn note<'a>(&self, entry: impl FnOnce() -> Entry<'a>) {
        if let Some(journal) = self.journal_cell().get() {
            journal.note(&entry());
        }
    }
}
