//! A VFIO type1 v2 container in software, and mirrors over it.
//!
//! [`Container`] answers `MAP_DMA`, `UNMAP_DMA`, `DIRTY_PAGES` and `GET_INFO` as Linux does (6.12, or 7.3: see [`Release`]):
//! the tests in the same order, the same errno for each, the same limits. It keeps no memory: a host address is a number.
//!
//! - [`SoftwareMirror`] makes it a [`viommu::subscribe::Mirror`]: the same calls as for a real container.
//! - [`Failing`] refuses calls as a [`Plan`] says, [`Deferred`] has them acknowledged later: for tests of what a
//!   record does when a host says no, or says yes late.
//!
//! What the kernel tests and Rust's types already rule out (`argsz`, more than one flag of `DIRTY_PAGES`) has no
//! counterpart here. Two flaws are not copied: 6.12 loses sight of a mapping that ends at 2^64-1 and finds nothing in a
//! range that ends there, and the bits behind a mapping's end in the last word of its dirty bitmap are rubbish in Linux.
//!
//! ```
//! use std::sync::{Arc, Mutex};
//! use viommu::{Access, Gpa, Iova, Mapping, subscribe::Mirror};
//! use viommu_vfio::software::{Config, Container, Reached, SoftwareMirror};
//!
//! let container = Arc::new(Mutex::new(Container::new(Config::x86_host())?));
//! let mut mirror = SoftwareMirror::new(container.clone());
//!
//! let extent = Mapping::new(Iova(0x10_0000), 0x2000, Gpa(0x8000), Access::READ).unwrap();
//! mirror.map(&extent)?;
//! let device = |iova, access| container.lock().unwrap().lookup(Iova(iova), access);
//! assert_eq!(device(0x10_1004, Access::READ), Reached::Host(0x9004));
//! assert_eq!(device(0x10_1004, Access::WRITE), Reached::Denied);
//!
//! // As the kernel: a mapping is never replaced in place.
//! assert_eq!(mirror.map(&extent).unwrap_err().reason, "MAP_DMA: EEXIST");
//!
//! assert_eq!(mirror.unmap(extent.range)?.bytes, 0x2000);
//! assert_eq!(device(0x10_1004, Access::READ), Reached::Nothing);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod container;
mod deferred;
mod dirty;
mod failing;
mod mirror;

pub use crate::errno::Errno;
pub use container::{
    Config, Container, DEFAULT_DMA_ENTRY_LIMIT, Dma, HostRange, Info, MapDma, MapFlags, Reached, Release,
    UnmapDma, UnmapFlags,
};
pub use deferred::{Acks, Deferred, Later};
pub use dirty::{Bitmap, DirtyScope, MAX_DIRTY_BITMAP_BYTES, MAX_DIRTY_BITMAP_PAGES};
pub use failing::{Call, Counts, Failing, Fault, Faults, MAX_KEPT_FAULTS, Plan, When};
pub use mirror::SoftwareMirror;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, also where a test has panicked with the lock held: nothing here panics half-way through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
