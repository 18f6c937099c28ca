//! Virtio devices as plain engines: requests in, answers out. They have no transport, no thread and no registers, and
//! know nothing of an IOMMU: memory is whatever [`GuestAddressSpace`](vm_memory::GuestAddressSpace) they are given.
//!
//! - [`Blk`] is virtio-blk over a file.
//! - [`Rng`] is virtio-rng, with the system's random bytes.
//!
//! `process` handles one bounded batch. A guard on memory is held to take the batch from the ring and to answer it, and
//! never while a file is read, written or made safe: with an endpoint's view as memory, an unmap waits for copies, not
//! for a disk.
//!
//! # Example
//! What a transport does after a kick.
//! ```no_run
//! use std::path::Path;
//!
//! use viommu_devices::{Blk, BlkOptions};
//! # use virtio_queue::{Queue, QueueT};
//! # use vm_memory::GuestMemoryMmap;
//! # fn negotiated() -> u64 { 0 }
//! # fn interrupt() {}
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let memory = std::sync::Arc::new(GuestMemoryMmap::<()>::new());
//! # let mut queue = Queue::new(256)?;
//! let disk = Blk::open(Path::new("disk.img"), &BlkOptions::default())?;
//! loop {
//!     let processed = disk.process(negotiated(), &mut queue, &memory)?;
//!     if processed.interrupt {
//!         interrupt();
//!     }
//!     if !processed.more {
//!         break;
//!     }
//! }
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![cfg_attr(
    not(test),
    warn(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)
)]

pub mod blk;
mod chain;
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
mod ring;
mod rng;
#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(
    not(test),
    expect(
        clippy::arithmetic_side_effects,
        reason = "no guest can reach it: it is the guest's part, for tests"
    )
)]
mod testing;

pub use blk::{Blk, BlkOptions, OpenError};
pub use ring::{Processed, QueueError};
pub use rng::{Rng, RngMetrics};
