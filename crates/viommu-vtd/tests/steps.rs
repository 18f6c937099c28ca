//! Random registers, descriptors, tables, endpoints and refusals, against a plain reading of the tables.

use proptest::prelude::*;
use viommu_vtd::fuzzing::fuzz_unit;

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn mirrors_are_what_the_tables_say_when_all_is_announced(bytes in prop::collection::vec(any::<u8>(), 0..900)) {
        fuzz_unit(&bytes);
    }
}

#[test]
fn inputs_of_the_fuzz_corpus_pass() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/vtd");
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        fuzz_unit(&std::fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count >= 6, "{count} inputs");
}
