//! `costandby verify`: has the daemon compare the standby's disk with its own, watches, and says what was found.
//!
//! The daemon goes on comparing when this program ends; `--stop` ends that. Exit status 0 says that both disks hold the
//! same, or do after a repair.

use super::wait_sync::find;
use super::{CliError, VerifyArgs, block_on, print};
use crate::admin::{Command, VerifyStatus};
use crate::admin_client::AdminClient;
use crate::config::quantity::display_size;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal};
use std::time::Duration;

/// For `--help`.
pub const EXAMPLES: &str = "\
Examples:
  costandby --node alpha verify db               on the node that serves; reports and marks what differs
  costandby --node alpha verify db --repair      copies it to the standby as well
  costandby --node alpha verify db --stop

What differs is marked: the next connect copies it where --repair did not. Clients go on meanwhile, and the comparison
steps back for them. It compares what the nodes would serve, which the page cache may hold back from a damaged medium.

Exit status 0: nothing differs, or nothing does any more. 1: something differs, or it could not be compared.";

/// Between two looks: a person sees no delay, and an idle daemon no load.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Ranges printed for a person; `--json` has them all.
const RANGES_SHOWN: usize = 20;

/// Why it is not known that both disks hold the same.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// They do not.
    #[error(
        "volume {volume}: {bytes} in {ranges} ranges differ on the standby: the same command with `--repair` copies them \
         from here"
    )]
    Differs {
        /// Which volume.
        volume: String,
        /// How much.
        bytes: String,
        /// How many.
        ranges: u64,
    },
    /// It ended early.
    #[error("volume {volume}: the comparison was not completed: {why}")]
    Unfinished {
        /// Which volume.
        volume: String,
        /// The daemon's words.
        why: String,
    },
    /// The daemon knows nothing of it any more.
    #[error("volume {volume}: the daemon was restarted meanwhile: start the verification again")]
    Forgotten {
        /// Which volume.
        volume: String,
    },
}

/// Begins, watches and tells; with `stop` only ends the one under way.
///
/// # Errors
/// [`CliError::Verify`] where something differs or is not known, [`CliError::Client`] for the daemon's refusals.
pub fn run(client: &AdminClient, args: &VerifyArgs) -> Result<(), CliError> {
    let volume = args.volume.as_str();
    if args.stop {
        let message = block_on(async { Ok(client.command(volume, Command::StopVerify).await?) })?;
        return print(&format!("{message}\n"));
    }
    let bar = ProgressBar::new(1000);
    if !io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let style = ProgressStyle::with_template("{prefix} [{wide_bar}] {msg} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    bar.set_style(style);
    bar.set_prefix(volume.to_owned());
    let outcome = block_on(watch(client, volume, args.repair, &bar));
    bar.finish_and_clear();
    let outcome = outcome?;
    if args.json {
        let text = serde_json::to_string_pretty(&outcome)
            .map_err(|error| CliError::Io { doing: "writing the result", source: error.into() })?;
        print(&format!("{text}\n"))?;
    } else {
        print(&told(volume, &outcome))?;
    }
    verdict(volume, &outcome).map_err(CliError::from)
}

async fn watch(
    client: &AdminClient,
    volume: &str,
    repair: bool,
    bar: &ProgressBar,
) -> Result<VerifyStatus, CliError> {
    client.command(volume, Command::Verify { repair }).await?;
    let mut id = None;
    loop {
        let status = client.status().await?;
        let found = find(&status, volume)?.verify.clone();
        let same = found.filter(|found| *id.get_or_insert(found.id) == found.id);
        let Some(found) = same else {
            return Err(VerifyError::Forgotten { volume: volume.to_owned() }.into());
        };
        if !found.running {
            return Ok(found);
        }
        show(bar, &found);
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // Clamped to 0..=1000.
fn show(bar: &ProgressBar, found: &VerifyStatus) {
    bar.set_position((found.percent * 10.0).clamp(0.0, 1000.0) as u64);
    let differs = match found.differing_bytes {
        0 => String::new(),
        bytes => format!(", {} differ", display_size(bytes)),
    };
    let repairing = if found.repair && found.percent >= 100.0 { ", repairing" } else { "" };
    bar.set_message(format!("{:.1}% compared{differs}{repairing}", (found.percent * 10.0).floor() / 10.0));
}

/// What a person reads.
fn told(volume: &str, found: &VerifyStatus) -> String {
    let mut out = String::new();
    for [start, len] in found.ranges.iter().take(RANGES_SHOWN) {
        out.push_str(&format!("differs: bytes {start} to {} ({})\n", start + len - 1, display_size(*len)));
    }
    let shown = found.ranges.len().min(RANGES_SHOWN) as u64;
    if found.differing_ranges > shown {
        out.push_str(&format!("and {} more ranges\n", found.differing_ranges - shown));
    }
    if found.unfinished.is_none() && found.differing_bytes == 0 {
        out.push_str(&format!("volume {volume}: both disks hold the same\n"));
    } else if found.repaired {
        let (bytes, ranges) = (display_size(found.differing_bytes), found.differing_ranges);
        out.push_str(&format!(
            "volume {volume}: {bytes} in {ranges} ranges differed, and were copied to the standby\n"
        ));
    }
    out
}

fn verdict(volume: &str, found: &VerifyStatus) -> Result<(), VerifyError> {
    let volume = volume.to_owned();
    if let Some(why) = found.unfinished.clone() {
        return Err(VerifyError::Unfinished { volume, why });
    }
    if found.differing_bytes > 0 && !found.repaired {
        let (bytes, ranges) = (display_size(found.differing_bytes), found.differing_ranges);
        return Err(VerifyError::Differs { volume, bytes, ranges });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(ranges: &[[u64; 2]], repaired: bool, unfinished: Option<&str>) -> VerifyStatus {
        VerifyStatus {
            id: 1,
            running: false,
            repair: repaired,
            percent: 100.0,
            differing_bytes: ranges.iter().map(|[_, len]| len).sum(),
            differing_ranges: ranges.len() as u64,
            ranges: ranges.to_vec(),
            repaired,
            unfinished: unfinished.map(str::to_owned),
        }
    }

    #[test]
    fn what_is_said_and_whether_it_failed() {
        let equal = found(&[], false, None);
        assert_eq!(told("db", &equal), "volume db: both disks hold the same\n");
        verdict("db", &equal).expect("equal");
        let differs = found(&[[65536, 65536], [0, 4096]], false, None);
        assert!(
            told("db", &differs).starts_with("differs: bytes 65536 to 131071 (64 KiB)\n"),
            "{}",
            told("db", &differs)
        );
        let error = verdict("db", &differs).expect_err("differs").to_string();
        assert!(error.contains("2 ranges") && error.contains("--repair"), "{error}");
        let repaired = found(&[[0, 4096]], true, None);
        assert!(told("db", &repaired).contains("were copied to the standby"));
        verdict("db", &repaired).expect("equal now");
        let cut = found(&[], false, Some("the session ended"));
        assert_eq!(told("db", &cut), "");
        assert!(verdict("db", &cut).expect_err("not known").to_string().contains("the session ended"));
        let many = found(&[[0, 1]; RANGES_SHOWN + 3], false, None);
        assert!(told("db", &many).ends_with("and 3 more ranges\n"));
    }
}
