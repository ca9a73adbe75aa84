//! How a client's connection ends.

use std::io;

/// The connection is over; close it with [`super::connection::Connection::close`].
#[derive(Debug, thiserror::Error)]
pub enum ConnectionEnd {
    /// The client left, or is left after an answered goodbye.
    #[error("the client disconnected")]
    Gone,
    /// The client broke the protocol beyond repair.
    #[error("{0}")]
    Protocol(String),
    /// The socket failed.
    #[error("socket: {0}")]
    Io(#[from] io::Error),
}
