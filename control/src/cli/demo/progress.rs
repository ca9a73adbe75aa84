//! What a person sees while the demo runs: lines that stay, and one that moves.
//!
//! All on stderr, so that stdout carries the result and nothing else. On a terminal the moving line is a spinner or a
//! bar; elsewhere it is a plain line every few seconds.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// Between two plain lines about the same thing.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

/// Between two turns of the spinner.
const TICK: Duration = Duration::from_millis(100);

/// Steps of a whole bar.
const BAR_LEN: u64 = 1000;

/// The reporter.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    spinner: ProgressStyle,
    share: ProgressStyle,
    started: Instant,
    last: Instant,
}

impl Progress {
    /// Starts the clock.
    pub(super) fn start() -> Self {
        let bar = io::stderr().is_terminal().then(|| ProgressBar::new(BAR_LEN));
        if let Some(bar) = &bar {
            bar.enable_steady_tick(TICK);
        }
        let style = |template, default: fn() -> ProgressStyle| {
            ProgressStyle::with_template(template).unwrap_or_else(|_| default()).progress_chars("=> ")
        };
        Self {
            bar,
            spinner: style("{spinner} {msg}", ProgressStyle::default_spinner),
            share: style("[{bar:40}] {msg}", ProgressStyle::default_bar),
            started: Instant::now(),
            last: Instant::now(),
        }
    }

    /// Says something that stays.
    pub(super) fn say(&mut self, text: &str) {
        let line = format!("{:6.1} s  {text}", self.started.elapsed().as_secs_f64());
        match &self.bar {
            Some(bar) => bar.println(line),
            None => line_out(&line),
        }
        self.last = Instant::now();
    }

    /// Updates the moving line.
    pub(super) fn show(&mut self, text: String) {
        if let Some(bar) = &self.bar {
            bar.set_style(self.spinner.clone());
            bar.set_message(text);
        } else if self.last.elapsed() >= LINE_INTERVAL {
            self.say(&text);
        }
    }

    /// Updates the moving line of something of which `share` is done, from 0 to 1.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to the bar's length"
    )]
    pub(super) fn show_share(&mut self, share: f64, text: &str) {
        let share = share.clamp(0.0, 1.0);
        if let Some(bar) = &self.bar {
            bar.set_style(self.share.clone());
            bar.set_position((share * BAR_LEN as f64) as u64);
            bar.set_message(text.to_owned());
        } else {
            self.show(format!("{text}, {:.0} %", share * 100.0));
        }
    }

    /// Leaves the terminal clean.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

fn line_out(line: &str) {
    // Nobody has to read along.
    let _ = writeln!(io::stderr(), "{line}");
}
