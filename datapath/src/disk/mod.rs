//! The emulated disk: its mapped backing, the locks on ranges in flight, what the peer may lack, and what the disk
//! knows about itself.

pub mod bitmap;
pub mod image;
pub mod inflight;
pub mod superblock;
pub mod worker;
