//! A virtual IOMMU for virtual machine monitors.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod addr;
pub mod mapping;
#[expect(dead_code, reason = "the domain comes next")]
mod quiesce;
mod sync;
mod table;
