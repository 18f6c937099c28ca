//! An endpoint's view of guest memory.
#![forbid(unsafe_code)]
