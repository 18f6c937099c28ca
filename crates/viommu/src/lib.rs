//! A virtual IOMMU for virtual machine monitors.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod ack;
pub mod addr;
mod audit;
pub mod backing;
pub mod change;
mod deliver;
pub mod domain;
pub mod endpoint;
pub mod error;
mod iommu;
pub mod mapping;
mod quiesce;
pub mod reader;
pub mod state;
pub mod subscribe;
mod sync;
mod table;

pub use ack::Ack;
pub use addr::{Gpa, GpaRange, Iova, IovaRange};
pub use audit::Audit;
pub use backing::{Extent, Medium};
pub use change::Change;
pub use deliver::Counts;
pub use domain::{Domain, Tables};
pub use endpoint::{EndpointId, View};
pub use error::{AttachError, AttachErrorKind, Cap, Incident, StepError, StepErrorKind, SubscribeError};
pub use iommu::{
    BindingHandle, BuildError, Builder, DEFAULT_TABLE_BYTES, Endpoint, EndpointConfig, FillError, Iommu,
    Reset, ResetKind, Subscription,
};
pub use mapping::{Access, Mapping, Target};
pub use quiesce::completion::{Blocker, BlockerKind, Completion, WaitError};
pub use reader::{Fault, FaultReason, Guard, Lease, Place, Reader, Translation};
pub use state::{RestoreError, SaveError, Saved};
pub use subscribe::{Interest, Kinds, Space};
