//! Everything slow: configuration, roles, generations, the admin socket and the command line.
#![forbid(unsafe_code)]

pub mod admin;
pub mod admin_client;
pub mod cli;
pub mod cluster;
pub mod command_line;
pub mod compared;
pub mod config;
pub mod contents;
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
pub mod secure;
mod socket_file;
pub mod users;
pub mod worth;
