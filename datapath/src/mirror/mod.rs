//! The mirror: decisions of the primary (or the source of a resync) about a change that is in the mapped disk.
//!
//! Sans-IO throughout: [`pipeline`] decides what is posted, acknowledged, flushed and marked dirty; [`resync`] decides
//! what the background copy sends next, [`verify`] what a verification compares next, [`throttle`] how fast. The reactor carries their actions out.

pub mod pipeline;
pub mod ranges;
pub mod resync;
pub mod throttle;
pub mod verify;
