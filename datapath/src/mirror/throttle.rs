//! The throttle: how fast a resync or a verification may go beside busy clients. Sans-IO.
//!
//! The promise: the 99th percentile of how long clients' changes take (from landing to release) at most doubles.
//! The limit is therefore twice the 99th percentile of the changes that met no step of the copy, and 1 % of the
//! changes beside the copy may exceed it. To stay below that, the rate is cut by 1/3 if more than 0.5 % of the
//! changes take longer than 7/8 of the limit; otherwise the rate grows, by 1/2 until the first cut, then by 1/16.
//!
//! The undisturbed percentile is measured with changes that met no step: before the copy began, between its steps,
//! and if there are none, in short pauses. Steps are shorter at low rates, so that changes behind a step wait less.
//! Without clients there is no throttling.
//!
//! Invariants: never below [`THROTTLE_RATE_MIN`], however bad it looks, so that every copy ends; memory is bounded; nothing is
//! allocated after it was made.

use crate::limits::{
    RESYNC_CHUNK_LEN, RESYNC_CHUNKS_IN_FLIGHT, THROTTLE_CHANGES_KNOWN, THROTTLE_CHANGES_MIN,
    THROTTLE_JUDGE_LATEST_MS, THROTTLE_JUDGE_MS, THROTTLE_PAUSE_CHANGES, THROTTLE_PAUSE_EVERY_MS,
    THROTTLE_PAUSE_MS, THROTTLE_RATE_MAX, THROTTLE_RATE_MIN, THROTTLE_RATE_READERS, THROTTLE_RATE_START,
    THROTTLE_SLOW_ONE_IN, THROTTLE_STEP_LEN_MIN,
};
use std::time::{Duration, Instant};

/// A change's beginning, to be handed back at its end.
#[derive(Clone, Copy, Debug)]
pub struct Landed {
    at: Instant,
    /// Steps taken before it, or `None` if one was under way.
    steps: Option<u64>,
}

/// Whether the next step may begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leave {
    /// Now, over this many bytes at most.
    Step(u64),
    /// Not before this moment.
    Wait(Instant),
    /// Not before a step under way has ended.
    Enough,
}

/// The throttle of one volume's background work.
#[derive(Debug)]
pub struct Throttle {
    /// Bytes a second beside clients.
    rate: u64,
    /// When the next step is due at that rate.
    next_at: Option<Instant>,
    steps: u64,
    in_flight: usize,

    undisturbed: Vec<Duration>,
    undisturbed_at: usize,
    /// Twice their 99th percentile, less the margin.
    bearable: Option<Duration>,

    judged_at: Option<Instant>,
    changes: u64,
    slow: u64,
    /// The edge was met once.
    careful: bool,

    paused_at: Option<Instant>,
    pause_ended: Option<Instant>,
    pause_changes: u64,
}

impl Default for Throttle {
    fn default() -> Self {
        Self::new()
    }
}

impl Throttle {
    /// One that knows nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            rate: THROTTLE_RATE_START,
            next_at: None,
            steps: 0,
            in_flight: 0,
            undisturbed: Vec::with_capacity(THROTTLE_CHANGES_KNOWN),
            undisturbed_at: 0,
            bearable: None,
            judged_at: None,
            changes: 0,
            slow: 0,
            careful: false,
            paused_at: None,
            pause_ended: None,
            pause_changes: 0,
        }
    }

    /// Bytes a second beside busy clients.
    #[must_use]
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// A client's change landed.
    #[must_use]
    pub fn landed(&self, at: Instant) -> Landed {
        Landed { at, steps: (self.in_flight == 0).then_some(self.steps) }
    }

    /// It was released.
    pub fn released(&mut self, landed: Landed, now: Instant) {
        let took = now.saturating_duration_since(landed.at);
        if landed.steps == Some(self.steps) {
            self.learn(took);
        }
        if self.paused_at.is_some() {
            return;
        }
        self.changes += 1;
        if self.bearable.is_some_and(|bearable| took > bearable) {
            self.slow += 1;
        }
    }

    /// Whether a step may begin.
    pub fn leave(&mut self, now: Instant, clients_busy: bool) -> Leave {
        if !clients_busy {
            self.rest();
            return if self.in_flight < RESYNC_CHUNKS_IN_FLIGHT {
                Leave::Step(RESYNC_CHUNK_LEN)
            } else {
                Leave::Enough
            };
        }
        self.judge(now);
        if let Some(until) = self.pause(now) {
            return Leave::Wait(until);
        }
        if self.in_flight >= self.in_flight_max() {
            return Leave::Enough;
        }
        match self.next_at {
            Some(at) if at > now => Leave::Wait(at),
            _ => Leave::Step(self.step_len()),
        }
    }

    /// A step of `len` bytes began.
    pub fn step_began(&mut self, now: Instant, len: u64) {
        self.steps += 1;
        self.in_flight += 1;
        // A hole is long and costs next to nothing.
        let nanos = u128::from(len.min(RESYNC_CHUNK_LEN)) * 1_000_000_000 / u128::from(self.rate);
        let share =
            Duration::from_nanos(u64::try_from(nanos).expect("a step at the lowest rate takes seconds"));
        // What was not used in time is not made up for in a burst.
        self.next_at = Some(self.next_at.map_or(now, |at| at.max(now)) + share);
    }

    /// A step ended.
    ///
    /// # Panics
    /// When none was under way.
    pub fn step_ended(&mut self) {
        self.in_flight = self.in_flight.checked_sub(1).expect("a step was under way");
    }

    /// No step is under way any more: the session ended.
    pub fn all_ended(&mut self) {
        self.in_flight = 0;
        self.rest();
    }

    /// Bytes of a step: half a millisecond's worth. Where the rate is low because steps were felt, short ones are felt less
    /// than few.
    fn step_len(&self) -> u64 {
        (self.rate / 2048 / THROTTLE_STEP_LEN_MIN * THROTTLE_STEP_LEN_MIN)
            .clamp(THROTTLE_STEP_LEN_MIN, RESYNC_CHUNK_LEN)
    }

    fn in_flight_max(&self) -> usize {
        usize::try_from(self.rate / (512 << 20))
            .map_or(RESYNC_CHUNKS_IN_FLIGHT, |n| n.clamp(1, RESYNC_CHUNKS_IN_FLIGHT))
    }

    /// No clients: what was counted is too old to judge by once they come again.
    fn rest(&mut self) {
        self.judged_at = None;
        self.next_at = None;
        self.careful = false;
        self.paused_at = None;
        self.pause_ended = None;
    }

    fn learn(&mut self, took: Duration) {
        self.pause_changes += 1;
        if self.undisturbed.len() < THROTTLE_CHANGES_KNOWN {
            self.undisturbed.push(took);
        } else {
            self.undisturbed[self.undisturbed_at] = took;
            self.undisturbed_at = (self.undisturbed_at + 1) % THROTTLE_CHANGES_KNOWN;
        }
    }

    fn begin_judgement(&mut self, now: Instant) {
        (self.judged_at, self.changes, self.slow) = (Some(now), 0, 0);
        self.learn_bearable();
    }

    fn learn_bearable(&mut self) {
        let known = self.undisturbed.len();
        if known < 2 {
            return;
        }
        let mut sorted = [Duration::ZERO; THROTTLE_CHANGES_KNOWN];
        sorted[..known].copy_from_slice(&self.undisturbed);
        sorted[..known].sort_unstable();
        let p99 = sorted[known * 99 / 100];
        self.bearable = Some(p99 * 2 - p99 / 4);
    }

    fn judge(&mut self, now: Instant) {
        let Some(since) = self.judged_at else {
            self.pause_ended = Some(now);
            return self.begin_judgement(now);
        };
        let passed = now.saturating_duration_since(since);
        let enough =
            self.changes >= THROTTLE_CHANGES_MIN && passed >= Duration::from_millis(THROTTLE_JUDGE_MS);
        if !enough && passed < Duration::from_millis(THROTTLE_JUDGE_LATEST_MS) {
            return;
        }
        let growth = self.rate / if self.careful { 16 } else { 2 };
        if self.slow * THROTTLE_SLOW_ONE_IN > self.changes {
            self.careful = true;
            self.rate = (self.rate * 2 / 3).max(THROTTLE_RATE_MIN);
        } else if self.changes == 0 {
            // Clients that only read: nothing tells how they fare.
            self.rate = self.rate.max((self.rate + growth).min(THROTTLE_RATE_READERS));
        } else if self.bearable.is_some() {
            self.rate = (self.rate + growth).min(THROTTLE_RATE_MAX);
        }
        self.begin_judgement(now);
    }

    /// Whether to hold still for a while, and until when at most.
    fn pause(&mut self, now: Instant) -> Option<Instant> {
        if let Some(at) = self.paused_at {
            let until = at + Duration::from_millis(THROTTLE_PAUSE_MS);
            if now < until && self.pause_changes < THROTTLE_PAUSE_CHANGES {
                return Some(until);
            }
            self.paused_at = None;
            self.pause_ended = Some(now);
            self.learn_bearable();
            return None;
        }
        let every = Duration::from_millis(THROTTLE_PAUSE_EVERY_MS);
        let due = self.undisturbed.len() < THROTTLE_CHANGES_KNOWN / 2
            || self.pause_ended.is_some_and(|at| now.saturating_duration_since(at) >= every);
        let recently = self.pause_ended.is_some_and(|at| now.saturating_duration_since(at) < every / 4);
        if !due || recently {
            return None;
        }
        (self.paused_at, self.pause_changes) = (Some(now), 0);
        Some(now + Duration::from_millis(THROTTLE_PAUSE_MS))
    }
}

#[cfg(test)]
mod tests;
