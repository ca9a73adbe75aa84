//! `promote`, `demote`, `connect`, `disconnect`, `invalidate`: one request to the daemon, its sentence printed.
//!
//! All decisions are the daemon's; what it refuses comes back as the line on stderr.

use super::{CliError, block_on, print_done};
use crate::admin::Command;
use crate::admin_client::AdminClient;
use crate::config::VolumeName;

/// Has the daemon carry out `command`.
///
/// # Errors
/// [`CliError::Client`] with the daemon's reason, or why it did not answer.
pub fn run(client: &AdminClient, volume: &VolumeName, command: Command) -> Result<(), CliError> {
    let message = block_on(async { Ok(client.command(volume.as_str(), command).await?) })?;
    print_done(&format!("{message}\n"), "the command was carried out")
}
