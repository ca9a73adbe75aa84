//! The emulated disk: its mapped backing, the locks on ranges in flight, and what the peer may lack.

pub mod bitmap;
pub mod image;
pub mod inflight;
pub mod worker;
