//! The `costandby` program.
#![forbid(unsafe_code)]
fn main() {}
