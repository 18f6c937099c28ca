//! What a device behind viommu sees of guest memory, as [`vm_memory::GuestMemory`].
//!
//! A device model of the rust-vmm kind is written against `GuestMemory` or [`GuestAddressSpace`]. This crate gives it
//! an endpoint's view in their place: rings and buffers lie at I/O virtual addresses, every access is translated and
//! checked, and an unmap completes only when the device has let go.
//!
//! - [`EndpointMemory`]: for a worker of its own. [`EndpointMemory::enter`] gives the guard of one batch.
//! - [`EndpointSpace`]: a handle to share, which is a `GuestAddressSpace`: `memory()` is the guard, and it ends with its
//!   last clone.
//! - `iommu::EndpointIommu` (feature `iommu`): for those who have a `vm_memory::IommuMemory`; it promises less.
//! - [`host_pieces`] and [`ram_extents`]: from the embedder's memory to what mirrors map and to viommu's backing.
//! - [`mirror`]: what every mirror over memory of this process keeps.
//!
//! A guard covers one bounded batch: it must not be kept while the device waits for the guest.
//!
//! ```
//! use viommu::{Access, EndpointConfig, Gpa, Iommu, Iova, Mapping, Tables};
//! use viommu_memory::{EndpointMemory, ram_extents};
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
//!
//! let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
//! let builder = ram_extents(&memory)?.into_iter().fold(Iommu::builder(), |b, extent| b.backing(extent));
//! let iommu = builder.build()?;
//! let endpoint = iommu.add_endpoint(8, EndpointConfig::default())?;
//! let domain = iommu.create_domain(1, Tables::Owned)?;
//! endpoint.attach(1)?.wait()?;
//! let mapping = Mapping::new(Iova(0xffff_0000), 0x1000, Gpa(0x3000), Access::RW).ok_or("no range")?;
//! domain.map(mapping)?.wait()?;
//!
//! let mut device = EndpointMemory::new(endpoint.reader("net").ok_or("unplugged")?, &memory);
//! let guard = device.enter();
//! guard.write_obj(7u32, GuestAddress(0xffff_0010))?;
//! let mut done = domain.unmap(mapping.range)?;
//! assert!(!done.is_complete()); // the device is in the middle of a batch
//! assert!(guard.write_obj(8u32, GuestAddress(0xffff_0010)).is_err());
//! drop(guard);
//! done.wait()?;
//! assert_eq!(memory.read_obj::<u32>(GuestAddress(0x3010))?, 7);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`GuestAddressSpace`]: vm_memory::GuestAddressSpace
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod host;
#[cfg(feature = "iommu")]
pub mod iommu;
pub mod mirror;
mod pool;
mod shared;
mod slices;
mod worker;

pub use host::{HostError, HostPiece, UnalignedRegion, host_pieces, ram_extents};
pub use shared::{EndpointSpace, OwnedMemoryGuard};
pub use worker::{EndpointMemory, MemoryGuard};
