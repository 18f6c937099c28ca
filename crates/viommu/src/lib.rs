//! A virtual IOMMU for virtual machine monitors.
#![forbid(unsafe_code)]
#![deny(missing_docs)]
// Under loom only the protocol of guards is compiled: `quiesce`, and what it needs. It is too thorough for the rest,
// which shuttle takes.

#[cfg(not(loom))]
pub mod ack;
pub mod addr;
#[cfg(not(loom))]
mod audit;
#[cfg(not(loom))]
pub mod backing;
#[cfg(not(loom))]
pub mod change;
#[cfg(not(loom))]
mod deliver;
#[cfg(not(loom))]
pub mod domain;
#[cfg(not(loom))]
pub mod endpoint;
#[cfg(not(loom))]
pub mod error;
#[cfg(not(loom))]
mod iommu;
#[cfg(not(loom))]
pub mod mapping;
mod quiesce;
#[cfg(not(loom))]
pub mod reader;
#[cfg(not(loom))]
pub mod subscribe;
mod sync;
#[cfg(not(loom))]
mod table;

#[cfg(all(test, shuttle))]
mod shuttle_tests;

#[cfg(not(loom))]
pub use ack::Ack;
pub use addr::{Gpa, GpaRange, Iova, IovaRange};
#[cfg(not(loom))]
pub use audit::Audit;
#[cfg(not(loom))]
pub use backing::{Extent, Medium};
#[cfg(not(loom))]
pub use change::Change;
#[cfg(not(loom))]
pub use deliver::Counts;
#[cfg(not(loom))]
pub use domain::{Domain, Tables};
#[cfg(not(loom))]
pub use endpoint::{EndpointId, View};
#[cfg(not(loom))]
pub use error::{AttachError, AttachErrorKind, Cap, Incident, StepError, StepErrorKind, SubscribeError};
#[cfg(not(loom))]
pub use iommu::{
    BindingHandle, BuildError, Builder, DEFAULT_TABLE_BYTES, Endpoint, EndpointConfig, FillError, Iommu,
    Reset, ResetKind, Subscription,
};
#[cfg(not(loom))]
pub use mapping::{Access, Mapping, Target};
#[cfg(not(loom))]
pub use quiesce::completion::{Blocker, BlockerKind, Completion, WaitError};
#[cfg(not(loom))]
pub use reader::{Fault, FaultReason, Guard, Lease, Place, Reader, Translation};
#[cfg(not(loom))]
pub use subscribe::{Interest, Kinds, Space};
