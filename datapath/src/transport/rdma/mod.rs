//! RDMA: one write with immediate a change, straight from the mapped disk into the peer's registered ring.

pub mod endpoint;
pub mod private;
mod stage;
pub mod windows;
