//! A random driver, and subscribers that come, refuse and go, against a naive model of the specification: statuses, used
//! lengths, record, translations and mirrors agree after each step.

mod reference;
mod world;

use core::fmt;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// Bytes, to be read as steps. Shown in a form that can be pasted.
#[derive(Clone)]
struct Script(Vec<u8>);

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "&{:?}", self.0)
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 600,
        max_shrink_iters: 20_000,
        failure_persistence: Some(Box::new(FileFailurePersistence::Off)),
        ..ProptestConfig::default()
    })]

    #[test]
    fn device_does_what_the_specification_says_whatever_the_driver_does(
        script in vec(any::<u8>(), 0..2_000).prop_map(Script),
    ) {
        world::play(&script.0);
    }
}
