//! What runs inside the guests of the live tests, where a shell does not do.

fn main() {}
