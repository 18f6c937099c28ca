//! Any bytes, read as what a hostile front end does to a vhost-user back end's IOTLB, or a hostile back end to our front end.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| viommu_vhost::user::fuzzing::fuzz_vhost_user(data));
