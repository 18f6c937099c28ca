//! VFIO consumers.
#![forbid(unsafe_code)]
