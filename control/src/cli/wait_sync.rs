//! `costandby wait-sync`: polls the daemon until a volume is connected and both disks are `UpToDate`, or until it is clear
//! that they will not be before an operator acts.
//!
//! Survives a daemon that is just starting: it is given a few seconds to open its socket, because scripts start it in the
//! background and wait right away. A daemon that answered once and then is gone is an error at once.

use super::status::{pace, percent};
use super::{CliError, block_on, print};
use crate::admin::{Status, VolumeStatus};
use crate::admin_client::{AdminClient, ClientError};
use crate::config::VolumeName;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal};
use std::time::Duration;
use tokio::time::Instant;

/// Between two looks: a person sees no delay, and an idle daemon no load.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// How long a daemon may take to open its socket.
const START_GRACE: Duration = Duration::from_secs(5);

/// How long the peer may seem to refuse for good: what a daemon knows of it is from its last attempt to connect, and may
/// be of before an operator's `connect` there.
const PARTED_GRACE: Duration = Duration::from_millis(1500);

/// [`VolumeStatus::connection`] of a node that does not look for its peer.
const STANDALONE: &str = "standalone";

/// Why the volume is not in sync.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// The time is over.
    #[error("volume {} is not in sync after {after:?}: {}", status.name, stood(status))]
    Timeout {
        /// How long it had.
        after: Duration,
        /// Where it stood.
        status: Box<VolumeStatus>,
    },
    /// Nothing would come of waiting.
    #[error("volume {} cannot get in sync by itself: {}", .0.name, stood(.0))]
    Parted(Box<VolumeStatus>),
    /// Not a volume of the daemon.
    #[error("node {node} has no volume {volume}: there are {known}")]
    NoSuchVolume {
        /// Who answered.
        node: String,
        /// As asked.
        volume: String,
        /// The volumes there are.
        known: String,
    },
}

/// Waits, with a bar where stderr is a terminal.
///
/// # Errors
/// [`CliError::WaitSync`] when the time is over, or the two nodes stay apart until an operator acts; [`CliError::Client`]
/// when the daemon does not answer.
pub fn run(client: &AdminClient, volume: &VolumeName, timeout: Option<Duration>) -> Result<(), CliError> {
    let bar = ProgressBar::new(1000);
    if !io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let style = ProgressStyle::with_template("{prefix} [{wide_bar}] {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    bar.set_style(style);
    bar.set_prefix(volume.to_string());
    let waited = block_on(wait(client, volume.as_str(), timeout, &bar));
    bar.finish_and_clear();
    waited?;
    print(&format!("volume {volume} is in sync\n"))
}

async fn wait(
    client: &AdminClient,
    volume: &str,
    timeout: Option<Duration>,
    bar: &ProgressBar,
) -> Result<(), CliError> {
    let started = Instant::now();
    let grace = timeout.map_or(START_GRACE, |timeout| timeout.min(START_GRACE));
    let mut answered = false;
    let mut parted_since = None;
    loop {
        match client.status().await {
            Ok(status) => {
                answered = true;
                let found = find(&status, volume)?;
                if found.in_sync() {
                    return Ok(());
                }
                show(bar, found);
                let since = *parted_since.get_or_insert_with(Instant::now);
                if !found.parted {
                    parted_since = None;
                } else if found.connection == STANDALONE || since.elapsed() >= PARTED_GRACE {
                    return Err(WaitError::Parted(Box::new(found.clone())).into());
                }
                if let Some(after) = timeout.filter(|timeout| started.elapsed() >= *timeout) {
                    return Err(WaitError::Timeout { after, status: Box::new(found.clone()) }.into());
                }
            }
            Err(ClientError::NoDaemon { .. }) if !answered && started.elapsed() < grace => {
                bar.set_message("waiting for the daemon to start");
            }
            Err(error) => return Err(error.into()),
        }
        let left = timeout.map_or(POLL_INTERVAL, |timeout| timeout.saturating_sub(started.elapsed()));
        tokio::time::sleep(left.min(POLL_INTERVAL)).await;
    }
}

pub(super) fn find<'a>(status: &'a Status, volume: &str) -> Result<&'a VolumeStatus, WaitError> {
    status.volumes.iter().find(|found| found.name == volume).ok_or_else(|| {
        let known: Vec<_> = status.volumes.iter().map(|found| found.name.as_str()).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        WaitError::NoSuchVolume { node: status.node.clone(), volume: volume.to_owned(), known }
    })
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Clamped to 0..=1000.
fn show(bar: &ProgressBar, volume: &VolumeStatus) {
    bar.set_position((volume.resync_percent * 10.0).clamp(0.0, 1000.0) as u64);
    let (percent, pace) = (percent(volume), pace(volume));
    bar.set_message(format!("{percent}%{pace} ({}, peer {})", volume.connection, volume.peer_state));
}

fn stood(volume: &VolumeStatus) -> String {
    let VolumeStatus { role, disk_state, peer, peer_state, connection, advice, .. } = volume;
    let percent = percent(volume);
    let advice = advice.as_ref().map(|advice| format!("; {advice}")).unwrap_or_default();
    format!(
        "role {role}, disk {disk_state}, peer {peer} {peer_state}, {connection}, {percent}% in sync{advice}"
    )
}
