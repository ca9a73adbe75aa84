//! The only crate with `unsafe` code: memory that the operating system, a device or a peer may change under us.
//!
//! Everything it exports is safe to call from safe code. The rest of the workspace forbids `unsafe`.
//!
//! - [`mapping`]: shared memory and the only handle on its bytes, [`mapping::Span`]
//! - [`lock`]: the lock that keeps other programs from a disk's file
//! - [`net`]: socket calls that move bytes straight between a socket and a span
//! - [`signal`]: signals that a daemon does not follow
//! - `verbs`: RDMA devices, registered memory, queue pairs and connections (feature `rdma`)
//! - `counting`: an allocator for tests (feature `testing`)
//! - `testing`: how a test is left out, and how slow the machine is (feature `testing`)
//! - `guard`: a medium that fails under a mapping poisons that mapping instead of killing the process
//! - `copy`, `crc`: what the process itself does to such memory, over raw pointers only

mod copy;
#[cfg(feature = "testing")]
pub mod counting;
mod crc;
mod guard;
pub mod lock;
pub mod mapping;
pub mod net;
pub mod signal;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(feature = "rdma")]
pub mod verbs;
