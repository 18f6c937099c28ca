//! Histories of IOMMU mappings.
#![forbid(unsafe_code)]
