//! vhost consumers of [`viommu`].
//!
//! [`software`] is a device IOTLB without a kernel: the same rules and capacity. It is a test double for a vhost
//! back-end, and an oracle for what its device could reach.
//!
//! [`spec`] has the layouts of the messages. `user` (feature `user`) is vhost-user, both ends.
#![deny(unsafe_code)]
#![deny(missing_docs)]

pub mod software;
pub mod spec;
#[cfg(feature = "user")]
pub mod user;
