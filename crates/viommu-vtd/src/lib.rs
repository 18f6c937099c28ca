//! An Intel VT-d unit (a DMA-remapping hardware unit), to be put at any address of a guest's memory.
//!
//! A guest's stock driver keeps root, context and page tables in its own memory, and says through a queue what may have
//! changed in them; the unit makes these steps of a [`viommu::Iommu`], which tells everybody who holds a copy, and
//! answers when nothing uses any more what a change took away. Faults of the devices behind it are recorded in its
//! registers and told by an interrupt.
//!
//! - [`Vtd`] is the unit: registers, endpoints, resets.
//! - [`dmar`] tells a guest's firmware where it is, and which devices are behind it.
//! - [`spec`] has what lies in registers and in memory, and nothing else.
//!
//! # Caching mode
//! With [`Config::caching_mode`] the driver announces new entries too. Endpoints whose context entries name the same
//! tables share a domain of the record. Where a mirror listens, every invalidation compares its range with the guest's
//! tables ([`viommu::Domain::sync`]); elsewhere nothing is walked but for devices. Without it each endpoint has a domain
//! of its own, whose walker looks for the context entry when the device comes, and mirrors are refused.
//!
//! # Locks
//! The unit has one lock, taken for a piece of work and before all locks of the record. Callbacks of subscribers run
//! under it, so they must not call the unit. Faults are recorded under a lock of their own, so that devices never wait
//! for the driver's commands.
#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![cfg_attr(
    not(test),
    warn(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)
)]

mod context;
mod cursor;
pub mod dmar;
mod faults;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
#[cfg_attr(
    not(test),
    expect(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        reason = "it panics when something is wrong"
    )
)]
pub mod fuzzing;
mod iotlb;
mod log;
mod memory;
mod metrics;
mod paging;
mod scalable;
mod space;
pub mod spec;
mod sync;
mod unit;

pub use faults::{Msi, RecentFault};
pub use metrics::Metrics;
pub use unit::{
    Config, ConfigError, Progress, Reset, RestoreError, STATE_VERSION, SaveError, Saved, SavedEvent,
    SavedFaults, SavedRegisters, Stage, TableView, Vtd, Width,
};
