//! The unit as a driver and its devices find it.
#![expect(clippy::cast_possible_truncation, reason = "numbers of the tests' own")]

mod bounds;
mod faults;
mod hostile;
mod lazy;
mod mirrors;
mod random;
mod registers;
mod report;
mod rig;
mod scalable;
mod scalable_faults;
mod state;
mod weaknesses;
