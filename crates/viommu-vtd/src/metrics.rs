//! What the unit has done, to be read at any time.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident,)*) => {
        /// Counters.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicU64,)*
        }

        /// What the unit has done since it was made.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Metrics {
            $($(#[doc = $doc])* pub $name: u64,)*
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> Metrics {
                Metrics { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Invalidations of context entries, by descriptor or register.
    context_invalidations,
    /// Invalidations of PASID entries.
    pasid_invalidations,
    /// Invalidations of translations of some pages.
    page_invalidations,
    /// Invalidations of translations of a domain id or of everything.
    wide_invalidations,
    /// Invalidations of a device's TLB.
    device_tlb_invalidations,
    /// Wait descriptors that are over.
    waits,
    /// Descriptors that are none, or could not be fetched: the queue stood still.
    queue_errors,
    /// Slices of comparisons of tables with the record.
    sync_slices,
    /// Entries of tables read for them.
    sync_entries,
    /// Comparisons that were given up, since the tables went on for too long: what was not seen is not mapped.
    syncs_cut,
    /// Comparisons in which a cap kept something out of the record.
    syncs_capped,
    /// Comparisons that the record refused for another reason.
    syncs_failed,
    /// Walks for devices: what the IOTLB did not have.
    walks,
    /// Endpoints that could not be brought to what their context entry says, and are blocked.
    refused_views,
    /// Faults recorded.
    faults,
    /// Faults not recorded, since one of the same source was pending.
    faults_collapsed,
    /// Faults not recorded, since no record was free.
    faults_lost,
    /// Faults not recorded, since the context entry says so, or since no reason is known for them.
    faults_quiet,
    /// Interrupts sent.
    interrupts,
}

pub(crate) fn bump(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

pub(crate) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
