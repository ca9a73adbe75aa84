//! Everything slow: configuration, roles, generations, the admin socket and the command line.
#![forbid(unsafe_code)]

pub mod admin;
pub mod admin_client;
pub mod cli;
pub mod cluster;
pub mod config;
mod descriptors;
pub mod generation;
pub mod hello;
pub mod kernel;
pub mod link;
pub mod logging;
pub mod nbd_client;
pub mod node;
pub mod progress;
pub mod role;
mod socket_file;
