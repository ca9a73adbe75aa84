//! The hot path of costandby: front ends, the emulated disk, the mirror pipeline, the link and the access side.
//!
//! A write goes one way: front end → disk (mapping) → mirror pipeline → transport → peer's ring → access → peer's disk,
//! and its acknowledgement comes back the same way. Files that decide are sans-IO; the reactor is the only loop.
#![forbid(unsafe_code)]

pub mod access;
pub mod disk;
pub mod error;
pub mod front;
pub mod limits;
pub mod mirror;
pub mod reactor;
pub mod transport;
pub mod units;
pub mod volume;
pub mod waker;
pub mod wire;
