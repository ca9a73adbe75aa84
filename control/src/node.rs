//! The daemon of one node: opens its disks, listens, dials, answers the admin socket.

use crate::config::{Config, NodeName};

/// Why the daemon ended.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// There is no daemon in this build.
    #[error("node {node} cannot run: this build has no daemon")]
    NotBuiltIn {
        /// Which node.
        node: NodeName,
    },
}

/// Runs `node` until it is told to stop.
///
/// # Errors
/// [`NodeError`].
#[allow(clippy::needless_pass_by_value)] // The daemon keeps its configuration.
pub fn run(_config: Config, node: NodeName) -> Result<(), NodeError> {
    Err(NodeError::NotBuiltIn { node })
}
