//! Random steps against the naive reference (`fuzzing`): every law after every step.

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use crate::fuzzing::fuzz_steps;

/// Bytes that a failing run prints on one line.
#[derive(Clone)]
struct Script(u8, Vec<[u8; 6]>);

impl core::fmt::Debug for Script {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "play({}, &{:?})", self.0, self.1)
    }
}

fn play(header: u8, steps: &[[u8; 6]]) {
    let bytes: Vec<u8> = core::iter::once(header).chain(steps.iter().flatten().copied()).collect();
    fuzz_steps(&bytes);
}

proptest! {
    #![proptest_config(ProptestConfig {
        // With 50 steps on average: 100,000 and more.
        cases: 2_200,
        max_shrink_iters: 20_000,
        failure_persistence: Some(Box::new(FileFailurePersistence::Off)),
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_steps_keep_every_law(
        script in (any::<u8>(), prop::collection::vec(any::<[u8; 6]>(), 1..100)).prop_map(|(h, s)| Script(h, s)),
    ) {
        play(script.0, &script.1);
    }
}

/// The fuzz target's body on 20,000 inputs that are the same everywhere.
#[test]
fn seeded_inputs_keep_every_law() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..20_000 {
        let len = next() % 64;
        let bytes: Vec<u8> = (0..len).map(|_| next().to_le_bytes()[3]).collect();
        fuzz_steps(&bytes);
    }
}

#[test]
fn found_before_stay_fixed() {
    play(
        0,
        &[
            [107, 162, 0, 5, 0, 0],
            [84, 2, 0, 0, 0, 0],
            [131, 80, 0, 144, 0, 0],
            [107, 2, 0, 5, 0, 0],
            [155, 105, 0, 1, 0, 0],
            [252, 48, 108, 0, 0, 0],
        ],
    );
    play(0, &[[67, 77, 16, 0, 0, 0], [83, 96, 9, 1, 0, 0], [21, 173, 0, 0, 0, 0], [233, 0, 0, 0, 0, 0]]);
}
