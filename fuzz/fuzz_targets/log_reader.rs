//! Any bytes, read as a log: an error with its place, never a panic or memory without bound.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| viommu_trace::fuzzing::fuzz_reader(data));
