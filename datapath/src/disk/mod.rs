//! The local disk of a volume: its content and what it remembers about itself.

pub mod superblock;
