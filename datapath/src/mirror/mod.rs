//! The mirror: what the primary (or the source of a copy) does with a change after it landed in the mapped disk.
//!
//! Sans-IO throughout: [`pipeline`] decides what is posted, acknowledged, flushed and marked dirty; [`resync`] decides
//! what the background copy sends next. The reactor carries their actions out.

pub mod pipeline;
pub mod resync;
