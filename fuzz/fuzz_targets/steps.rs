//! Any bytes, read as steps on a domain with recording mirrors: record and copies agree after each.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| viommu::fuzzing::fuzz_steps(data));
