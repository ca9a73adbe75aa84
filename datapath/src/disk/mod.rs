//! The local disk: its mapping (`image`), range locks, activity log, dirty bitmap, superblock and metadata, worker
//! threads.

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
