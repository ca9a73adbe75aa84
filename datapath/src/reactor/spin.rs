//! How long the adaptive mode spins before it sleeps. Sans-IO.
//!
//! A wake-up costs several loopback round trips on a virtual machine, a spin costs a core. The budget grows when work
//! arrives during a spin or soon after a sleep began (a longer spin would have caught it), and shrinks to nothing when
//! spins end in long sleeps. While spinning the caller yields, so that a neighbour on the same core gets to run.
//!
//! A neighbour that computes without a pause keeps the core for a whole time slice when we yield, milliseconds, while a
//! wake-up from sleep takes the core from it at once. So a yield that took long ends the spinning for a while, and each
//! further one for twice as long.

use crate::limits::SPIN_US_MAX;
use std::time::Duration;

/// The spin budget of one reactor.
#[derive(Debug)]
pub struct SpinBudget {
    budget_us: u64,
    budget_max_us: u64,
    /// Arrivals of work to come before spinning is tried again.
    barred: u32,
    /// How many those are after the next yield that takes long.
    bar_next: u32,
}

/// Budget a spin starts from when it grows again.
const STEP_US: u64 = 10;

/// A yield this long went to a neighbour that computes: those that wait for work as we do are done in tens of
/// microseconds, and a time slice is milliseconds.
const YIELD_LONG: Duration = Duration::from_micros(500);

/// Arrivals of work without spinning, after the first yield that took long and at most: at most one in so many then
/// waits for a neighbour's time slice, which is out of sight of the 99th percentile.
const BAR_MIN: u32 = 256;
const BAR_MAX: u32 = 16 << 10;

impl Default for SpinBudget {
    fn default() -> Self {
        Self::with_max(SPIN_US_MAX)
    }
}

impl SpinBudget {
    /// A budget that never grows past `budget_max_us`.
    #[must_use]
    pub fn with_max(budget_max_us: u64) -> Self {
        Self { budget_us: 0, budget_max_us, barred: 0, bar_next: BAR_MIN }
    }

    /// Whether to go on spinning after `idle` without work.
    #[must_use]
    pub fn spins(&self, idle: Duration) -> bool {
        idle < Duration::from_micros(self.budget_us)
    }

    /// A yield during the spin came back after `took`.
    pub fn yielded(&mut self, took: Duration) {
        if took >= YIELD_LONG {
            self.budget_us = 0;
            self.barred = self.bar_next;
            self.bar_next = (self.bar_next * 2).min(BAR_MAX);
        }
    }

    /// Work came after `idle` (spin and sleep together).
    pub fn work_came_after(&mut self, idle: Duration) {
        if self.barred > 0 {
            self.barred -= 1;
            return;
        }
        // Forgiven as slowly as it came: by as many arrivals as it cost.
        self.bar_next = (self.bar_next - 1).max(BAR_MIN);
        let max = Duration::from_micros(self.budget_max_us);
        if idle <= max {
            self.budget_us = (self.budget_us * 2).clamp(STEP_US, self.budget_max_us);
        } else {
            self.budget_us = if self.budget_us <= STEP_US { 0 } else { self.budget_us / 2 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_neighbour_that_computes_ends_the_spinning_for_ever_longer() {
        let mut spin = SpinBudget::default();
        let arrivals_until_it_spins = |spin: &mut SpinBudget| {
            (0..2 * BAR_MAX).find(|_| {
                spin.work_came_after(Duration::from_micros(20));
                spin.spins(Duration::ZERO)
            })
        };
        assert_eq!(arrivals_until_it_spins(&mut spin), Some(0));
        spin.yielded(YIELD_LONG / 2);
        assert!(spin.spins(Duration::ZERO), "neighbours that wait as we do are no reason");
        for bar in [BAR_MIN, 2 * BAR_MIN - 1] {
            spin.yielded(YIELD_LONG);
            assert!(!spin.spins(Duration::ZERO));
            assert_eq!(arrivals_until_it_spins(&mut spin), Some(bar));
        }
        for _ in 0..20 {
            spin.yielded(YIELD_LONG);
        }
        assert_eq!(arrivals_until_it_spins(&mut spin), Some(BAR_MAX), "but not for good");
        for _ in 0..BAR_MAX {
            spin.work_came_after(Duration::from_micros(20));
        }
        spin.yielded(YIELD_LONG);
        assert_eq!(arrivals_until_it_spins(&mut spin), Some(BAR_MIN), "and forgiven in the end");
    }

    #[test]
    fn it_grows_on_quick_work_and_shrinks_to_nothing_when_idle() {
        let mut spin = SpinBudget::default();
        assert!(!spin.spins(Duration::ZERO), "no spin before any work");
        for _ in 0..10 {
            spin.work_came_after(Duration::from_micros(SPIN_US_MAX / 2));
        }
        assert!(spin.spins(Duration::from_micros(SPIN_US_MAX - 1)));
        assert!(!spin.spins(Duration::from_micros(SPIN_US_MAX)), "bounded");
        for _ in 0..10 {
            spin.work_came_after(Duration::from_millis(100));
        }
        assert!(!spin.spins(Duration::ZERO));
    }
}
