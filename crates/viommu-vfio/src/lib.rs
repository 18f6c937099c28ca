//! VFIO consumers of [`viommu`].
//!
//! [`type1`] is a mirror over a VFIO type1 v2 container of the kernel's: a device that the host passes through reaches
//! what the guest mapped, and nothing else.
//!
//! [`software`] is such a container without a kernel: the same rules, errnos and limits, no memory behind them. It is a
//! test double for a host, and an oracle for what a device behind a real container could reach.
//!
//! # Features
//! - `type1` (on by default, Linux only): the module of that name, with vm-memory.
#![deny(missing_docs, unsafe_code)]

mod coarse;
mod errno;
pub mod software;
#[cfg(all(feature = "type1", target_os = "linux"))]
pub mod type1;

pub use errno::Errno;
