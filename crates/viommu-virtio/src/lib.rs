//! The virtio-iommu device (VIRTIO 1.4, device type 23), to be put behind any transport.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

#[cfg(feature = "fdt")]
pub mod fdt;
pub mod spec;
pub mod viot;
