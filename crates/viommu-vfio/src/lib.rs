//! VFIO consumers of [`viommu`].
//!
//! [`type1`] is a mirror over a VFIO type1 v2 container of the kernel's: a device that the host passes through reaches
//! what the guest mapped, and nothing else.
//!
//! [`iommufd`] switches devices between such copies, one for each domain of the guest's, by one call each.
//!
//! [`software`] is such a container without a kernel: the same rules, errnos and limits, no memory behind them. It is a
//! test double for a host, and an oracle for what a device behind a real container could reach.
//!
//! # Features
//! - `type1` and `iommufd` (on by default, Linux only): the modules of that name, with vm-memory.
#![deny(missing_docs, unsafe_code)]

mod coarse;
mod errno;
#[cfg(all(feature = "iommufd", target_os = "linux"))]
pub mod iommufd;
pub mod software;
#[cfg(all(feature = "type1", target_os = "linux"))]
pub mod type1;
#[cfg(all(any(feature = "type1", feature = "iommufd"), target_os = "linux"))]
mod written;

pub use errno::Errno;
