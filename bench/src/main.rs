//! The `costandby-bench` program.
#![forbid(unsafe_code)]
fn main() {}
