//! `costandby demo`: two daemons on loopback, a kill in mid-write, a takeover, and the proof that nothing was lost.

use super::{CliError, DemoArgs};

/// Runs the demonstration.
///
/// # Errors
/// [`CliError`] where anything was lost, torn or different.
pub fn run(_args: &DemoArgs) -> Result<(), CliError> {
    Err(CliError::NotBuiltIn { what: "demo" })
}
