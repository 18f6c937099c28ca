//! The core against its laws (`docs/design.md`, L1 to L17) and the contract's invariants (I1 to I15).
#![expect(unreachable_pub, reason = "modules shared with the fuzz target, and words shared by tests")]

mod backing;
mod ending;
mod endpoints;
#[path = "../../src/fuzzing/mod.rs"]
mod fuzzing;
mod model;
mod paths;
mod qemu_weaknesses;
mod quiescence;
mod subscribe;
mod support;
mod transactions;
mod uncut;
mod vectors;
