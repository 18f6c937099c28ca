//! vhost consumers of [`viommu`].
//!
//! [`kernel`] is a cache over a vhost device of the kernel's: it reaches what the guest mapped, and nothing else.
//!
//! [`vdpa`] is a mirror over a vhost-vDPA device of the kernel's, which asks for nothing and has all of it pushed.
//!
//! [`software`] is a device IOTLB without a kernel: the same rules and capacity. It is a test double for a vhost
//! back-end, and an oracle for what its device could reach.
//!
//! [`spec`] has the layouts of the messages.
//!
//! # Features
//! - `kernel` (on by default, Linux only): the module of that name, with vm-memory.
//! - `user` (on by default): vhost-user, both ends.
//! - `vdpa` (on by default, Linux only): the module of that name, with vm-memory.
//! - `tracing` (on by default): what the kernel's devices ask and are refused.
#![deny(unsafe_code)]
#![deny(missing_docs)]

#[cfg(all(feature = "kernel", target_os = "linux"))]
pub mod kernel;
#[cfg(all(feature = "kernel", target_os = "linux"))]
mod log;
pub mod software;
pub mod spec;
#[cfg(feature = "user")]
pub mod user;
#[cfg(all(feature = "vdpa", target_os = "linux"))]
pub mod vdpa;
