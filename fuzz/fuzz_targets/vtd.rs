//! Any bytes, read as what a hostile guest does to a VT-d unit: registers, descriptors, bytes of tables, resets.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| viommu_vtd::fuzzing::fuzz_unit(data));
