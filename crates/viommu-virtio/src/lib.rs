//! The virtio-iommu device (VIRTIO 1.4, device type 23), to be put behind any transport.
//!
//! A guest's stock driver attaches endpoints to domains and makes mappings with requests in a ring; the device makes
//! them steps of a [`viommu::Iommu`], which tells everybody who holds a copy, and answers when nothing uses any more
//! what a request took away. Faults of the devices behind it are reported on the event queue.
//!
//! - [`VirtioIommu`] is the device: endpoints, configuration space, resets, save and restore.
//! - [`RequestQueue`] and [`EventQueue`] serve the two rings, on a thread of the embedder or in its event loop.
//! - [`spec`] has what lies in memory, and nothing else.
//! - [`viot`] and `fdt` tell a guest's firmware which endpoints are behind the device.
//!
//! # Locks
//! The device has one lock, taken for a batch of requests and before all locks of the record. Callbacks of subscribers
//! run under it, so they must not call the device; they may raise interrupts. Faults are collected under a lock of
//! their own, so that devices never wait for requests.
#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![cfg_attr(
    not(test),
    warn(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)
)]

mod device;
#[cfg(feature = "driver")]
pub mod driver;
mod events;
mod log;
mod metrics;
mod queue;
mod rate;
pub mod spec;

pub use device::{
    Added, Config, ConfigError, EndpointPlan, Reset, RestoreError, STATE_VERSION, SaveError, Saved,
    SavedMember, TopologyError, VirtioIommu,
};
pub use events::{EventLimits, EventQueue};
pub use metrics::Metrics;
pub use queue::{PendingError, QueueError, RequestQueue};
