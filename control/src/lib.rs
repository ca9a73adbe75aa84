//! Everything slow: configuration, decisions about roles and data, the daemon, its command line.
//!
//! Nothing here stands in a write's way: control hands commands to the reactor of `costandby-datapath` and hears events.
//!
//! Layers, from the top:
//!
//! 1. [`cli`]: the command line, one file a subcommand.
//! 2. [`node`]: the daemon: one task a volume carries out what the volume's controller decides. [`admin`], [`admin_client`]:
//!    both ends of the admin socket. [`logging`]: the log.
//! 3. [`task`]: what a volume's task does with what the controller decides, sans-IO; the simulator drives the same.
//!    [`role`]: the controller of one volume, sans-IO. [`generation`]: which disk is newer. [`hello`]: what controllers say to
//!    each other. [`mod@link`]: which link two nodes take. [`compared`], [`progress`], [`worth`]: texts and figures for `status`.
//! 4. [`secure`]: the proof of the pair's key. [`config`]: the configuration file. [`contents`], [`users`], [`kernel`]: what
//!    the system says about disks and about itself.
//!
//! [`cluster`] and [`nbd_client`] are no part of a daemon: they start pairs of daemons and speak to them, for the demo, the
//! benches and the tests.
#![forbid(unsafe_code)]

pub mod admin;
pub mod admin_client;
pub mod cli;
pub mod cluster;
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
pub mod task;
pub mod users;
pub mod worth;
