//! Which volumes a turn of the reactor looks at. Sans-IO: time comes in.
//!
//! The cost of a turn grows with the volumes it looks at, and every client waits for the turn. So a volume rests
//! after [`REST_AFTER`] without events, and then costs nothing until an event, a command or a client wakes it. Work
//! that only time makes due reaches a resting volume with the reactor's deadlines, a few times a second.
//!
//! Invariants: a volume rests only after a turn that looked at it and found nothing, as the reactor itself sleeps only after
//! such a turn; one that rests was quiet when it was asked last.

use std::time::{Duration, Instant};

/// How long a volume is looked at after it was last heard of: several times what a spinning reactor waits for work before it
/// sleeps, since the link of a volume that rests is asked by way of the poller.
const REST_AFTER: Duration = Duration::from_millis(1);

/// The volumes, each awake or at rest.
#[derive(Debug, Default)]
pub(super) struct Awake {
    /// Of each volume: when it was last heard of.
    heard: Vec<Instant>,
    is_awake: Vec<bool>,
    /// Those that are.
    all: Vec<usize>,
}

impl Awake {
    /// One more volume, which is awake.
    pub(super) fn add(&mut self, now: Instant) {
        self.all.push(self.heard.len());
        self.heard.push(now);
        self.is_awake.push(true);
    }

    /// The volume is heard of. Returns whether it was at rest.
    pub(super) fn wake(&mut self, volume: usize, now: Instant) -> bool {
        self.heard[volume] = now;
        let rested = !std::mem::replace(&mut self.is_awake[volume], true);
        if rested {
            self.all.push(volume);
        }
        rested
    }

    pub(super) fn is_awake(&self, volume: usize) -> bool {
        self.is_awake[volume]
    }

    /// In no order.
    pub(super) fn all(&self) -> &[usize] {
        &self.all
    }

    /// Lets those rest that were not heard of for a while before the turn that began `now`, where `is_quiet`.
    pub(super) fn let_rest(&mut self, now: Instant, mut is_quiet: impl FnMut(usize) -> bool) {
        let Self { heard, is_awake, all } = self;
        all.retain(|&volume| {
            let stays = now.saturating_duration_since(heard[volume]) < REST_AFTER || !is_quiet(volume);
            is_awake[volume] = stays;
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_rests_after_a_while_without_a_word_and_wakes_at_the_first() {
        let began = Instant::now();
        let mut awake = Awake::default();
        for _ in 0..3 {
            awake.add(began);
        }
        awake.let_rest(began + REST_AFTER / 2, |_| true);
        assert_eq!(awake.all(), [0, 1, 2]);
        let later = began + REST_AFTER;
        assert!(!awake.wake(1, later), "it is awake");
        awake.let_rest(later, |volume| volume != 2);
        assert_eq!(awake.all(), [1, 2], "one was heard of in this turn, one is not quiet");
        assert!(!awake.is_awake(0));
        awake.let_rest(later + REST_AFTER, |_| true);
        assert!(awake.all().is_empty());
        assert!(awake.wake(2, later + REST_AFTER) && awake.wake(0, later + REST_AFTER));
        assert!(!awake.wake(2, later + REST_AFTER), "once");
        assert_eq!(awake.all(), [2, 0]);
    }
}
