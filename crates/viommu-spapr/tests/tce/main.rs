//! The TCE model: hypercalls, windows, and what everyone who holds a copy hears.

mod bulk;
mod hostile;
mod parallel;
mod rig;
mod state;
mod transitions;
mod weaknesses;
mod windows;
