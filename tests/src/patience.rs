//! How long something is waited for: as long as it moves.
//!
//! A limit is there to end what hangs. What is only slow goes on: a machine may be several times slower than the one
//! that the limit was tried on, and nobody's work is lost by waiting for it. So a wait ends when nothing has moved for a
//! while, and, for what moves for ever and comes to nothing, after a time that is long on every machine. Both times suit
//! a quiet machine; who waits stretches them for a slow one.
//!
//! Invariant: no clock in here; who waits says what time it is.

use std::fmt;
use std::time::{Duration, Instant};

/// The longest that something may stand still, and the longest that it may take at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Without any sign of progress.
    pub still: Duration,
    /// With it.
    pub whole: Duration,
}

impl Limits {
    /// What may stand still for `still`, and take ten times as long as that.
    #[must_use]
    pub const fn still(still: Duration) -> Self {
        Self { still, whole: Duration::from_secs(still.as_secs() * 10) }
    }

    /// The same for what gives no sign before it is done.
    #[must_use]
    pub const fn silent(whole: Duration) -> Self {
        Self { still: whole, whole }
    }

    /// For a machine that is `slowness` times slower than a quiet one.
    #[must_use]
    pub fn stretched(self, slowness: f64) -> Self {
        Self { still: self.still.mul_f64(slowness), whole: self.whole.mul_f64(slowness) }
    }
}

/// A wait.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    limits: Limits,
    began: Instant,
    moved: Instant,
}

/// Why a wait is over: what was waited for did not come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Over {
    /// Nothing has moved for so long.
    Still(Duration),
    /// It went on, but it has taken so long.
    Endless(Duration),
}

impl fmt::Display for Over {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Still(time) => write!(f, "nothing has moved for {} s", time.as_secs()),
            Self::Endless(time) => {
                write!(f, "it is not done after {} s, although it goes on", time.as_secs())
            }
        }
    }
}

impl Patience {
    /// A wait that begins now.
    #[must_use]
    pub fn new(limits: Limits, now: Instant) -> Self {
        Self { limits, began: now, moved: now }
    }

    /// Something has moved.
    pub fn moved(&mut self, now: Instant) {
        self.moved = now;
    }

    /// Whether the wait is over, and why.
    #[must_use]
    pub fn over(&self, now: Instant) -> Option<Over> {
        let Limits { still, whole } = self.limits;
        if now.saturating_duration_since(self.began) >= whole {
            return Some(if still == whole { Over::Still(whole) } else { Over::Endless(whole) });
        }
        (now.saturating_duration_since(self.moved) >= still).then_some(Over::Still(still))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits::still(Duration::from_secs(10));

    /// When a wait is over for what moves at each of these seconds.
    fn over(limits: Limits, moves: impl IntoIterator<Item = u64>) -> (u64, Over) {
        let began = Instant::now();
        let mut patience = Patience::new(limits, began);
        let mut moves = moves.into_iter().peekable();
        for second in 0.. {
            let now = began + Duration::from_secs(second);
            if moves.next_if_eq(&second).is_some() {
                patience.moved(now);
            }
            if let Some(over) = patience.over(now) {
                return (second, over);
            }
        }
        unreachable!("every wait ends")
    }

    #[test]
    fn what_stands_still_is_given_up_and_what_moves_is_not() {
        let still = Over::Still(Duration::from_secs(10));
        assert_eq!(over(LIMITS, []), (10, still));
        assert_eq!(over(LIMITS, [9, 18, 27]), (37, still));
    }

    #[test]
    fn what_moves_for_ever_is_given_up_too() {
        assert_eq!(over(LIMITS, 0..), (100, Over::Endless(Duration::from_secs(100))));
    }

    #[test]
    fn a_slow_machine_has_more_time() {
        let slow = LIMITS.stretched(2.5);
        assert_eq!(over(slow, []), (25, Over::Still(Duration::from_secs(25))));
        assert_eq!(over(slow, 0..), (250, Over::Endless(Duration::from_secs(250))));
    }
}
