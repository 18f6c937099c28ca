//! VFIO consumers of [`viommu`].
//!
//! [`software`] is a VFIO type1 v2 container without a kernel: the same rules, errnos and limits, no memory behind
//! them. It is a test double for a host, and an oracle for what a device behind a real container could reach.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod software;
