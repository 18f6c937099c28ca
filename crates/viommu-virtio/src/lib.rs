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
//! # Example
//! An embedder with one device behind the IOMMU; [`driver`] plays the guest.
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use viommu::{Access, Iommu, Iova, IovaRange};
//! use viommu::endpoint::RegionKind;
//! use viommu_virtio::driver::{Driver, Request};
//! use viommu_virtio::spec::request::{AttachFlags, MapFlags, Status};
//! use viommu_virtio::{Config, EndpointPlan, VirtioIommu};
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // The machine: 16 MiB of memory, the device, and one endpoint with x86's MSI doorbell.
//! let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)])?);
//! let builder = Iommu::builder().ram(0, 16 << 20).table_bytes(64 << 20);
//! let device = VirtioIommu::new(builder, Config { bypass: false, ..Config::default() })?;
//! let msi = IovaRange::new(Iova(0xfee0_0000), Iova(0xfeef_ffff)).ok_or("a range")?;
//! let added = device.add_endpoint(0x10, EndpointPlan::default().region(msi, RegionKind::Msi))?;
//!
//! // The guest's driver negotiates features and sets up its rings; the transport hands the queues over.
//! let mut driver = Driver::new(memory.clone(), 0x8000, 64, 512)?;
//! let offered = device.features();
//! device.negotiate(offered).wait()?;
//! let mut requests = device.request_queue(driver.request_queue()?, memory.clone(), || { /* interrupt */ });
//! let mut events = device.event_queue(driver.event_queue()?, memory.clone(), || {});
//!
//! // It attaches the endpoint, maps a page, and kicks once for both.
//! driver.push(&Request::Attach { domain: 1, endpoint: 0x10, flags: AttachFlags::empty() })?;
//! let flags = MapFlags::READ | MapFlags::WRITE;
//! driver.push(&Request::Map { domain: 1, virt_start: 0x1000, virt_end: 0x1fff, phys_start: 0x20_0000, flags })?;
//! requests.process()?;
//! assert!(driver.complete()?.iter().all(|answer| answer.status() == Some(Status::OK)));
//!
//! // The device behind it, on a thread of its own: translations under a guard.
//! let mut reader = added.endpoint.reader("queue 0").ok_or("unplugged")?;
//! let guard = reader.enter();
//! assert_eq!(guard.translate(Iova(0x1004), Access::WRITE)?.gpa.0, 0x20_0004);
//!
//! // The guest takes the page back. Its request is answered when the device has let go of what it translated.
//! driver.push(&Request::Unmap { domain: 1, virt_start: 0x1000, virt_end: 0x1fff })?;
//! requests.process()?;
//! assert!(driver.complete()?.is_empty() && requests.pending() == 1);
//! drop(guard);
//! requests.wait(Duration::from_secs(1))?; // a worker thread; an event loop polls
//! assert_eq!(driver.complete()?[0].status(), Some(Status::OK));
//!
//! // A stray access is reported to the guest.
//! driver.fill_events()?;
//! assert!(reader.enter().translate(Iova(0x1004), Access::READ).is_err());
//! events.process()?;
//! assert_eq!(driver.events()?[0].address.get(), 0x1004);
//!
//! // The driver resets the device: `device_status` reads non-zero until both are over.
//! let mut reset = device.reset();
//! reset.completion.merge(requests.reset());
//! events.reset();
//! reset.completion.wait()?;
//! # Ok(())
//! # }
//! ```
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
#[cfg_attr(
    not(test),
    expect(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        reason = "no guest can reach it: it is the guest's part, for tests"
    )
)]
pub mod driver;
mod events;
#[cfg(feature = "fdt")]
pub mod fdt;
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
mod journal;
mod log;
mod metrics;
mod queue;
#[cfg(all(test, shuttle))]
mod shuttle_tests;
pub mod spec;
mod sync;
#[cfg_attr(
    not(test),
    expect(
        clippy::arithmetic_side_effects,
        reason = "the embedder's: small numbers in 64 bits, and lengths"
    )
)]
pub mod viot;

pub use device::{
    Added, Config, ConfigError, EndpointPlan, Reset, RestoreError, STATE_VERSION, SaveError, Saved,
    SavedMember, TopologyError, VirtioIommu,
};
pub use events::{EventLimits, EventQueue, RecentFault};
pub use journal::{Entry, Journal};
pub use metrics::Metrics;
pub use queue::{PendingError, QueueError, RequestQueue};
