//! Virtual time and the list of what happens next.
//!
//! Everything in the simulator happens at a point of one virtual clock, in the order (time, order of scheduling), on one
//! thread. Each node reads the clock through its own [`Skew`], as real ones do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Nanoseconds since the run began.
pub(super) type Nanos = u64;

pub(super) const US: Nanos = 1_000;
pub(super) const MS: Nanos = 1_000_000;
pub(super) const S: Nanos = 1_000_000_000;

/// As the story tells it.
pub(super) fn seconds(at: Nanos) -> String {
    if at == Nanos::MAX { "?".to_owned() } else { format!("{}.{:06}", at / S, at % S / 1000) }
}

/// The one clock; links hold a copy of the handle.
#[derive(Clone, Debug, Default)]
pub(super) struct Clock(Arc<AtomicU64>);

impl Clock {
    pub(super) fn now(&self) -> Nanos {
        self.0.load(Ordering::Relaxed)
    }

    fn advance(&self, to: Nanos) {
        assert!(to >= self.now(), "time goes forward");
        self.0.store(to, Ordering::Relaxed);
    }
}

/// What is to happen, by time and by order of scheduling.
#[derive(Debug)]
pub(super) struct Agenda<E> {
    clock: Clock,
    events: BTreeMap<(Nanos, u64), E>,
    serial: u64,
}

impl<E> Agenda<E> {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, events: BTreeMap::new(), serial: 0 }
    }

    /// Schedules `event`; a time that has passed means at once.
    pub(super) fn at(&mut self, time: Nanos, event: E) {
        self.serial += 1;
        self.events.insert((time.max(self.clock.now()), self.serial), event);
    }

    /// Takes the next event and sets the clock to its time.
    pub(super) fn next(&mut self) -> Option<E> {
        let ((time, _), event) = self.events.pop_first()?;
        self.clock.advance(time);
        Some(event)
    }
}

/// How a node's clock stands to the virtual one: it began at another moment and runs at another rate.
#[derive(Clone, Copy, Debug)]
pub(super) struct Skew {
    base: Instant,
    /// Thousandths of the true rate.
    rate_x1000: u64,
}

impl Skew {
    pub(super) fn new(base: Instant, offset: Duration, rate_x1000: u64) -> Self {
        Self { base: base + offset, rate_x1000 }
    }

    fn elapsed(self, now: Nanos) -> Duration {
        Duration::from_nanos(now / 1000 * self.rate_x1000 + now % 1000)
    }

    /// What the node takes for now.
    pub(super) fn instant(self, now: Nanos) -> Instant {
        self.base + self.elapsed(now)
    }

    /// The node's own count since it came to be.
    pub(super) fn duration(self, now: Nanos) -> Duration {
        self.elapsed(now)
    }

    /// When the node's clock will show `at`, rounded up.
    pub(super) fn when(self, at: Instant) -> Nanos {
        self.when_shows(at.saturating_duration_since(self.base))
    }

    /// When the node's own count will show `at`, rounded up.
    pub(super) fn when_shows(self, at: Duration) -> Nanos {
        let local = u64::try_from(at.as_nanos()).unwrap_or(u64::MAX / 2000);
        local / self.rate_x1000 * 1000 + 1000
    }
}
