//! The device IOTLB of a vhost back-end in software, and a cache over it.
//!
//! [`Iotlb`] answers UPDATE, INVALIDATE and the device's accesses as the vhost of Linux 6.12 does: 2048 entries of
//! which the oldest makes room, entries that are dropped wholly, and no miss where an entry forbids the access.
//! Addresses are guest physical ones, since it keeps no memory.
//!
//! [`SoftwareCache`] makes it a [`viommu::subscribe::Cache`]. Messages take effect at once, or, over a [`Channel`],
//! when the test lets the back-end read them: until then the device still uses what was removed.
//!
//! ```
//! use std::sync::{Arc, Mutex};
//! use viommu::{Access, Gpa, Iova, Mapping, subscribe::Cache};
//! use viommu_vhost::software::{Iotlb, Lookup, SoftwareCache};
//!
//! let iotlb = Arc::new(Mutex::new(Iotlb::default()));
//! let mut cache = SoftwareCache::new(iotlb.clone());
//! let device = |iova, access| iotlb.lock().unwrap().lookup(Iova(iova), access);
//!
//! assert_eq!(device(0x1008, Access::READ), Lookup::Miss);
//! let page = Mapping::new(Iova(0x1000), 0x1000, Gpa(0x8000), Access::READ).unwrap();
//! cache.install(&page);
//! assert_eq!(device(0x1008, Access::READ), Lookup::Hit(Gpa(0x8008)));
//! assert_eq!(device(0x1008, Access::WRITE), Lookup::Denied);
//!
//! let _ = cache.invalidate(page.range);
//! assert_eq!(device(0x1008, Access::READ), Lookup::Miss);
//! ```

mod cache;
mod iotlb;

pub use cache::{Channel, Message, SoftwareCache};
pub use iotlb::{Counts, DEFAULT_CAPACITY, Fenced, Iotlb, Lookup};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, also where a test has panicked with the lock held: nothing here panics half-way through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
