//! The program `viommu`.
fn main() {}
