//! Benchmarks of costandby.
#![forbid(unsafe_code)]
