//! Any bytes, read as what a hostile client does to a vfio-user server: a stream, or messages that are nearly right.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| viommu_vfio_user::fuzzing::fuzz_session(data));
