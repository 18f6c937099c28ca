//! A virtual IOMMU for virtual machine monitors.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod ack;
pub mod addr;
pub mod change;
pub mod endpoint;
pub mod mapping;
mod quiesce;
pub mod subscribe;
mod sync;
mod table;

pub use ack::Ack;
pub use addr::{Gpa, GpaRange, Iova, IovaRange};
pub use change::Change;
pub use endpoint::{EndpointId, View};
pub use mapping::{Access, Mapping, Target};
