//! What clients are told who ask for a volume that is not served here.

use crate::role::{Role, Status};

/// The text for clients of volume `name`; `None` where it is served.
pub(super) fn refusal(name: &str, peer: &str, status: &Status) -> Option<String> {
    Some(match (status.role, status.peer_primary) {
        (Role::Primary, _) => return None,
        (Role::Demoting, _) => format!("volume {name} is being handed over: try {peer} in a moment"),
        (_, Some(true)) => {
            format!("volume {name} is served by {peer}: this node is its standby, connect there")
        }
        (_, _) => format!(
            "volume {name} is not served by this node, its standby; if {peer} does not serve it either, run \
             `costandby promote {name}` on the node that shall"
        ),
    })
}
