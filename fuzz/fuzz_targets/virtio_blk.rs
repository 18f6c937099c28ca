//! Any bytes, read as what a hostile guest does to a virtio-blk and a virtio-rng: rings, requests, memory that vanishes.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| viommu_devices::fuzzing::fuzz_blk(data));
