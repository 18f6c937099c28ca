//! Random hypercalls, windows, endpoints and refusals, against an array of entries for each window.

use proptest::prelude::*;
use viommu_spapr::fuzzing::fuzz_hypercalls;

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn record_and_copies_are_what_the_hypercalls_say(bytes in prop::collection::vec(any::<u8>(), 0..1200)) {
        fuzz_hypercalls(&bytes);
    }
}

#[test]
fn inputs_of_the_fuzz_corpus_pass() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/spapr");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        fuzz_hypercalls(&std::fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count >= 8, "{count} inputs");
}
