//! Any bytes, read as what a hostile guest does to a virtio-iommu: rings, requests, configuration space, resets, DMA.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| viommu_virtio::fuzzing::fuzz_ring(data));
