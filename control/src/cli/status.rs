//! `costandby status`: a table that a person reads at a glance, or the daemon's JSON as it is.
//!
//! Pure rendering from a [`Status`]; under a volume stand why it has no link, how often its peer broke the protocol, and the
//! daemon's advice; under the table, in a few words, which links are not RDMA for want of it.
//!
//! The table fits the terminal, and 80 columns where there is none to ask: the columns that only repeat the configuration,
//! and the epoch, give way, then the middle of long names. `--json` has all of it.

use super::{CliError, Colour, block_on, colours_wanted, print};
use crate::admin::{CONNECTED, NotListening, SYNC_SOURCE, SYNC_TARGET, Status, UP_TO_DATE, VolumeStatus};
use crate::admin_client::AdminClient;
use crate::config::quantity::display_size;
use crate::link::short_note;
use std::io::{self, IsTerminal};

/// Asks the daemon and prints.
///
/// # Errors
/// [`CliError::Client`] where no daemon answers.
pub fn run(client: &AdminClient, json: bool) -> Result<(), CliError> {
    let status = block_on(async { Ok(client.status().await?) })?;
    if json {
        let text = serde_json::to_string_pretty(&status)
            .map_err(|error| CliError::Io { doing: "writing the status", source: error.into() })?;
        print(&format!("{text}\n"))
    } else {
        print(&render_within(&status, colours_wanted(io::stdout().is_terminal()), terminal_width()))
    }
}

/// Characters that fit a line of the terminal.
fn terminal_width() -> usize {
    // `watch` and the like tell it in this way what their own window holds.
    let told = || std::env::var("COLUMNS").ok()?.parse().ok();
    let asked = rustix::termios::tcgetwinsize(io::stdout()).ok().map(|size| usize::from(size.ws_col));
    asked.filter(|&columns| columns > 0).or_else(told).unwrap_or(WIDTH_DEFAULT)
}

/// Characters of a copy's bar.
const BAR_LEN: usize = 30;

/// Characters of a line where there is no terminal to ask.
const WIDTH_DEFAULT: usize = 80;

const COLUMNS: usize = 9;
const HEADER: [&str; COLUMNS] = ["VOLUME", "ROLE", "DISK", "PEER", "LINK", "ACK", "EPOCH", "SIZE", "BEHIND"];

/// Columns that give way where the table is too wide, the first one first.
const EXPENDABLE: [&str; 3] = ["EPOCH", "ACK", "SIZE"];

/// Characters of a volume's name that are shown in any case.
const NAME_LEN_MIN: usize = 16;

/// Characters between two columns.
const GAP: usize = 2;

type Cell = (String, Colour);

/// [`render_within`] 80 columns.
#[must_use]
pub fn render(status: &Status, colours: bool) -> String {
    render_within(status, colours, WIDTH_DEFAULT)
}

/// The table, one line a volume and one for each thing there is to say about it, ending in a newline.
#[must_use]
pub fn render_within(status: &Status, colours: bool, width: usize) -> String {
    if status.volumes.is_empty() {
        return format!("node {}: no volumes here; the configuration gives it no disk\n", status.node);
    }
    let mut rows: Vec<_> = status.volumes.iter().map(row).collect();
    let mut widths = HEADER.map(str::len);
    for row in &rows {
        for (width, (text, _)) in widths.iter_mut().zip(row) {
            *width = (*width).max(text.chars().count());
        }
    }
    let shown = columns_within(&widths, width);
    let too_much = taken(&widths, &shown).saturating_sub(width + GAP);
    if too_much > 0 {
        widths[0] = widths[0].saturating_sub(too_much).max(widths[0].min(NAME_LEN_MIN));
        for [(name, _), ..] in &mut rows {
            *name = shortened(name, widths[0]);
        }
    }
    let mut out = format!("node {}\n", status.node);
    for NotListening { address, reason } in &status.not_listening {
        out.push_str(&Colour::Bad.paint(&format!("  not listening on {address}: {reason}"), colours));
        out.push('\n');
    }
    if status.log_lines_dropped > 0 {
        let ask = if status.log_dropping {
            ", and more are being dropped; is its reader stuck, its disk full?"
        } else {
            ""
        };
        let line = format!(
            "  log: lines that could not be written and were dropped since the start: {}{ask}",
            status.log_lines_dropped
        );
        out.push_str(&Colour::Attention.paint(&line, colours));
        out.push('\n');
    }
    push_line(&mut out, &HEADER.map(|text| (text.to_owned(), Colour::Plain)), &widths, &shown, colours);
    for (row, volume) in rows.iter().zip(&status.volumes) {
        push_line(&mut out, row, &widths, &shown, colours);
        if let Some(note) = volume.link_note.as_ref().filter(|_| !lacks_rdma_only(volume)) {
            out.push_str(&format!("  link {}: {note}\n", volume.link));
        }
        if let Some(copy) = copy_line(volume) {
            out.push_str(&Colour::Attention.paint(&copy, colours));
            out.push('\n');
        }
        if volume.violations > 0 {
            let line = format!(
                "  protocol: links closed because of what {} sent: {}; the log says what",
                volume.peer, volume.violations
            );
            out.push_str(&Colour::Bad.paint(&line, colours));
            out.push('\n');
        }
        for text in &volume.warnings {
            out.push_str(&Colour::Bad.paint(&format!("  warning: {text}"), colours));
            out.push('\n');
        }
        if let Some(advice) = &volume.advice {
            let line = format!("  -> {advice}");
            out.push_str(&Colour::Attention.paint(&line, colours));
            out.push('\n');
        }
    }
    out.push_str(&without_rdma(&status.volumes));
    out
}

/// Whether all there is to say about the volume's link is that a node has no RDMA, where TCP does it too.
fn lacks_rdma_only(volume: &VolumeStatus) -> bool {
    let note = volume.link_note.as_deref().unwrap_or_default();
    volume.link == "tcp" && short_note(note) != note
}

/// A line for each reason, with the volumes where there are others, too: on most machines it is one for all.
fn without_rdma(volumes: &[VolumeStatus]) -> String {
    let mut notes: Vec<(String, Vec<&str>)> = Vec::new();
    for volume in volumes.iter().filter(|volume| lacks_rdma_only(volume)) {
        let note = short_note(volume.link_note.as_deref().unwrap_or_default());
        match notes.iter_mut().find(|(known, _)| *known == note) {
            Some((_, names)) => names.push(&volume.name),
            None => notes.push((note, vec![&volume.name])),
        }
    }
    let line = |(note, names): (String, Vec<&str>)| {
        let of =
            if names.len() == volumes.len() { String::new() } else { format!(" of {}", names.join(", ")) };
        format!("link{of}: {note}; see `costandby doctor`\n")
    };
    notes.into_iter().map(line).collect()
}

/// Which columns a table of these widths has within `width`.
fn columns_within(widths: &[usize; COLUMNS], width: usize) -> [bool; COLUMNS] {
    let mut shown = [true; COLUMNS];
    for given_up in EXPENDABLE {
        if taken(widths, &shown) <= width + GAP {
            break;
        }
        shown[HEADER.iter().position(|&column| column == given_up).expect("one of them")] = false;
    }
    shown
}

/// Characters of a line with these columns, and of a gap behind it.
fn taken(widths: &[usize; COLUMNS], shown: &[bool; COLUMNS]) -> usize {
    widths.iter().zip(shown).filter(|(_, shown)| **shown).map(|(width, _)| width + GAP).sum()
}

/// `name` in `len` characters: both its ends, for names that begin alike differ in their last letters.
fn shortened(name: &str, len: usize) -> String {
    let letters: Vec<char> = name.chars().collect();
    if letters.len() <= len {
        return name.to_owned();
    }
    let behind = (len - 1) / 2;
    let before = len - 1 - behind;
    let (before, behind) = (&letters[..before], &letters[letters.len() - behind..]);
    before.iter().chain(&['…']).chain(behind).collect()
}

fn push_line(
    out: &mut String,
    cells: &[Cell; COLUMNS],
    widths: &[usize; COLUMNS],
    shown: &[bool; COLUMNS],
    colours: bool,
) {
    let cells = cells.iter().zip(widths).enumerate().filter(|(at, _)| shown[*at]);
    for (at, ((text, colour), width)) in cells {
        out.push_str(&colour.paint(text, colours));
        if at + 1 < COLUMNS {
            // Padding is counted without the colour's own bytes, which take no room on a terminal.
            let gap = width - text.chars().count() + GAP;
            out.extend(std::iter::repeat_n(' ', gap));
        }
    }
    out.push('\n');
}

fn row(volume: &VolumeStatus) -> [Cell; COLUMNS] {
    let plain = |text: &str| (text.to_owned(), Colour::Plain);
    let role =
        if volume.frozen { (format!("{} (frozen)", volume.role), Colour::Bad) } else { plain(&volume.role) };
    let link = if volume.connection == CONNECTED {
        (format!("{} {CONNECTED}", volume.link), Colour::Good)
    } else {
        (format!("{} {}", volume.link, volume.connection), Colour::Attention)
    };
    [
        plain(&volume.name),
        role,
        (volume.disk_state.clone(), disk_colour(&volume.disk_state)),
        (format!("{} {}", volume.peer, volume.peer_state), disk_colour(&volume.peer_state)),
        link,
        plain(&volume.ack),
        plain(&volume.epoch.to_string()),
        plain(&display_size(volume.size)),
        behind(volume),
    ]
}

fn disk_colour(state: &str) -> Colour {
    match state {
        UP_TO_DATE => Colour::Good,
        "Failed" | "Inconsistent" => Colour::Bad,
        _ => Colour::Attention,
    }
}

/// How far the standby is, with one decimal, rounded down: 99.97 must not read as done.
pub(super) fn percent(volume: &VolumeStatus) -> String {
    let percent = (volume.resync_percent.clamp(0.0, 100.0) * 10.0).floor() / 10.0;
    format!("{percent:.1}")
}

/// How fast a copy goes and when it will be over, as far as that is known: `, 120 MiB/s, 3 min left`.
pub(super) fn pace(volume: &VolumeStatus) -> String {
    let rate = volume.resync_rate.map(|rate| format!(", {}/s", display_size(rate)));
    let left = volume.resync_eta_s.map(|seconds| format!(", {} left", display_seconds(seconds)));
    rate.unwrap_or_default() + &left.unwrap_or_default()
}

fn display_seconds(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

fn is_copying(volume: &VolumeStatus) -> bool {
    [SYNC_SOURCE, SYNC_TARGET].contains(&volume.connection.as_str())
}

fn copy_line(volume: &VolumeStatus) -> Option<String> {
    let direction = match volume.connection.as_str() {
        SYNC_SOURCE => "to",
        SYNC_TARGET => "from",
        _ => return None,
    };
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=BAR_LEN")]
    let done = (volume.resync_percent.clamp(0.0, 100.0) / 100.0 * BAR_LEN as f64) as usize;
    let bar: String = (0..BAR_LEN)
        .map(|at| match at {
            at if at < done => '=',
            at if at == done => '>',
            _ => ' ',
        })
        .collect();
    let (peer, percent) = (&volume.peer, percent(volume));
    Some(format!("  copy {direction} {peer} [{bar}] {percent}%{}", pace(volume)))
}

/// What the peer lacks, as this node counts; how far a copy is stands in a line of its own.
fn behind(volume: &VolumeStatus) -> Cell {
    let copying = is_copying(volume);
    match volume.dirty_bytes {
        0 if copying || volume.resync_percent >= 100.0 => ("-".to_owned(), Colour::Plain),
        // One of the disks is no whole copy of anything, and nobody counted by how much.
        0 => ("unknown".to_owned(), Colour::Attention),
        bytes => (display_size(bytes), Colour::Attention),
    }
}
