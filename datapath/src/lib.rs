//! The hot path of costandby: from a client's request to the peer's disk and back.
//!
//! A write goes one way: front end → disk (mapping) → mirror pipeline → transport → peer's ring → access → peer's disk.
//! Its acknowledgement comes back the same way. `ARCHITECTURE.md` names each step's file.
//!
//! Layers, from the top:
//!
//! 1. [`reactor`]: the only loop. Owns volumes, links and clients; takes commands from control and sends events to it.
//! 2. [`front`]: what clients speak. [`volume`]: one volume, which connects the parts below.
//! 3. [`mirror`]: decisions of the node that sends. [`access`]: decisions of the node that applies. [`disk`]: the mapped
//!    disk, its locks and its metadata. [`transport`]: the link.
//! 4. [`wire`]: frames. [`units`], [`limits`], [`error`]: numbers, bounds and errors. [`waker`]: the reactor's doorbell.
//!
//! Files that decide are sans-IO: time comes in as an argument, actions come out as a list.
//!
//! A program can embed this crate without the daemon: [`front::queue`] is the front end for it, and
//! `examples/two_nodes.rs` a whole program.
#![forbid(unsafe_code)]

pub mod access;
pub mod disk;
pub mod error;
pub mod front;
pub mod limits;
pub mod mirror;
pub mod reactor;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
pub mod transport;
pub mod units;
pub mod volume;
pub mod waker;
pub mod wire;
