//! TCE tables: the IOMMU of pseries guests (PAPR, LoPAR), as a model over viommu's record.
#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![cfg_attr(
    not(test),
    warn(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)
)]

mod bus;
mod hypercall;
mod metrics;
mod pending;
pub mod spec;
mod state;
mod window;

pub use bus::{Bus, BusConfig, BusError, Merge, Query, Slot, Spapr};
pub use hypercall::Liobn;
pub use metrics::Metrics;
pub use pending::{Answer, Pending};
pub use state::{RestoreError, STATE_VERSION, SaveError, Saved, SavedBus};
pub use window::Window;
