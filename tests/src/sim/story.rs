//! What happened, for people: one line an event, with its virtual time and place; and a checksum of it all.
//!
//! Lines are only written where somebody will read them; the checksum is always kept, so two runs of one seed can be
//! told to be the same.

use super::clock::Nanos;
use super::clock::seconds;
use std::collections::VecDeque;
use std::fmt::Write as _;

/// Lines kept: what a reader goes back over. More than a few seconds of a busy run.
const LINES_MAX: usize = 20_000;

/// The story of a run.
#[derive(Debug, Default)]
pub(super) struct Story {
    told: bool,
    lines: VecDeque<String>,
    sum: u64,
}

impl Story {
    pub(super) fn new(told: bool) -> Self {
        Self { told, ..Self::default() }
    }

    /// Adds a line.
    pub(super) fn tell(&mut self, now: Nanos, place: &str, text: std::fmt::Arguments<'_>) {
        if !self.told {
            return;
        }
        if self.lines.len() == LINES_MAX {
            self.lines.pop_front();
        }
        let mut line = String::new();
        let _ = write!(line, "{:>12} {place:<6} {text}", seconds(now));
        self.lines.push_back(line);
    }

    /// Mixes numbers of an event into the checksum.
    pub(super) fn mix(&mut self, numbers: &[u64]) {
        for number in numbers {
            self.sum = (self.sum ^ number).wrapping_mul(0x0100_0000_01b3).rotate_left(17);
        }
    }

    pub(super) fn sum(&self) -> u64 {
        self.sum
    }

    /// The last `count` lines.
    pub(super) fn last(&self, count: usize) -> Vec<String> {
        self.lines.iter().skip(self.lines.len().saturating_sub(count)).cloned().collect()
    }
}
