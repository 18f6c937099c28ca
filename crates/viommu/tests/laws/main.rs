//! The core against its laws (`docs/design.md`, L1 to L17) and the contract's invariants (I1 to I15).

#[path = "../../src/fuzzing/mod.rs"]
mod fuzzing;
mod model;
