//! What the live tests and the program inside their guests must agree on.
#![forbid(unsafe_code)]

pub mod pattern;
