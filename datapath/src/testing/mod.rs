//! Test doubles and the conformance suite of the transports. No program that ships contains this module.
//!
//! Compiled for this crate's unit tests, and elsewhere only with the feature `testing`, which development dependencies, the fuzz
//! targets and the tests' crate switch on. Nothing outside of tests may name this module; `tests/tests/house.rs` checks that.

pub mod conformance;
pub mod fake_rdma;
pub mod fault;
pub mod hostile_rdma;
#[cfg(test)]
pub(crate) mod simulated_medium;
