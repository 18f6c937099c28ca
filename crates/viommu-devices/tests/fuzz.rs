//! The fuzz body on what the fuzzer begins with, on all its cuts, and on seeded random bytes.

use viommu_devices::fuzzing::fuzz_blk;

/// xorshift64*: the same inputs in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next().to_be_bytes()[0]).collect()
    }
}

#[test]
fn corpus_and_all_its_cuts_are_survived() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/virtio_blk");
    let mut inputs = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        (0..=bytes.len()).for_each(|len| fuzz_blk(&bytes[..len]));
        inputs += 1;
    }
    assert!(inputs >= 4, "{inputs} inputs");
}

#[test]
fn random_bytes_are_survived() {
    let mut random = Random(0x7669_6f6d_6d75_0003);
    for round in 0..4000 {
        fuzz_blk(&random.bytes(round % 400));
    }
}
