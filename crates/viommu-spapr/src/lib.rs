//! TCE tables: the IOMMU of pseries guests (sPAPR, LoPAR), as a model over viommu's record.
//!
//! A guest changes translations with hypercalls alone, one entry a page, and may put a live entry in another's place with
//! one call. Each call is one step of a [`viommu::Iommu`], which knows the old entry: a mirror that can replace gets one
//! call, any other an unmap and a map, and caches are told. The guest is answered when nobody uses any more what went.
//!
//! - [`Spapr`] is the tables of a machine, [`Bus`] one address space with its windows and endpoints.
//! - [`Spapr::hypercall`] takes a number and registers; [`Liobn`] has the four calls by name.
//! - [`Pending`] is an answer that is kept back until it is true.
//!
//! What each call does in which case is in the repository's `docs/spapr-tce.md`.
//!
//! # Example
//! ```
//! use viommu::{Access, EndpointConfig, Gpa, Iommu, Iova};
//! use viommu_spapr::spec::{Code, H_PUT_TCE};
//! use viommu_spapr::{BusConfig, Merge, Spapr};
//! use vm_memory::{GuestAddress, GuestMemoryMmap};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // The machine: 16 MiB of memory, a host bridge, and a device behind it.
//! let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16 << 20)])?;
//! let spapr = Spapr::new(Iommu::builder().ram(0, 16 << 20), Merge::Never)?;
//! let bus = spapr.add_bus(1, BusConfig::host_bridge(0))?;
//! let (device, attached) = bus.add_endpoint(8, EndpointConfig::default())?;
//! attached.wait()?;
//! let liobn = u64::from(bus.windows()[0].liobn); // told by `ibm,dma-window`
//!
//! // The guest maps a page; the thread of its virtual CPU waits for the answer.
//! let put = spapr.hypercall(H_PUT_TCE, [liobn, 0x1000, 0x20_0003, 0], &memory).ok_or("not ours")?;
//! assert_eq!(put.wait()?.code, Code::Success);
//! let mut reader = device.reader("queue 0").ok_or("unplugged")?;
//! let guard = reader.enter();
//! assert_eq!(guard.translate(Iova(0x1004), Access::WRITE)?.gpa, Gpa(0x20_0004));
//!
//! // It puts another page there. It has no answer while the device may be using the first.
//! let mut put = spapr.hypercall(H_PUT_TCE, [liobn, 0x1000, 0x30_0003, 0], &memory).ok_or("not ours")?;
//! assert!(put.poll().is_none());
//! assert_eq!(guard.translate(Iova(0x1004), Access::WRITE)?.gpa, Gpa(0x30_0004));
//! drop(guard);
//! assert_eq!(put.wait()?.code, Code::Success);
//! # Ok(())
//! # }
//! ```
//!
//! # Locks
//! Each bus has one lock, taken for a hypercall and before all locks of the record; hypercalls on two buses do not meet.
//! Nothing is waited for under it. Callbacks of subscribers run under it, so they must not call their bus.
#![forbid(unsafe_code)]
#![deny(missing_docs)]
#![cfg_attr(
    not(test),
    warn(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)
)]

mod bus;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
#[cfg_attr(
    not(test),
    expect(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing,
        reason = "it panics when something is wrong"
    )
)]
pub mod fuzzing;
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
