//! Everything slow: configuration, roles, generations, the admin socket and the command line.
#![forbid(unsafe_code)]

pub mod nbd_client;
pub mod generation;
pub mod hello;
pub mod role;
