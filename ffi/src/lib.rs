//! The only crate with `unsafe` code: memory that the operating system, a device or a peer may change under us.
//!
//! Everything it exports is safe to call from safe code. The rest of the workspace forbids `unsafe`.

pub mod mapping;
pub mod net;
