//! Any bytes, read as what a hostile pseries guest does with its TCE tables: hypercalls, windows, resets.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| viommu_spapr::fuzzing::fuzz_hypercalls(data));
