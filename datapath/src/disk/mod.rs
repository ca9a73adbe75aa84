//! The emulated disk: its mapped backing, the locks on ranges in flight, what the peer may lack, and what the disk
//! knows about itself.

pub mod activity_log;
pub mod digest;
pub mod dirty_bitmap;
pub mod doubts;
pub mod image;
pub mod inflight;
pub mod job;
pub mod metadata;
pub mod pool;
pub mod record;
pub mod record_store;
pub mod superblock;
pub mod worker;
