//! How long the adaptive mode spins before it sleeps. Sans-IO.
//!
//! A wake-up costs several loopback round trips on a virtual machine, a spin costs a core. The budget grows when work
//! arrives during a spin or soon after a sleep began (a longer spin would have caught it), and shrinks to nothing when
//! spins end in long sleeps. While spinning the caller yields, so that a neighbour on the same core gets to run.

use crate::limits::SPIN_US_MAX;
use std::time::Duration;

/// The spin budget of one reactor.
#[derive(Debug)]
pub struct SpinBudget {
    budget_us: u64,
    budget_max_us: u64,
}

/// Budget a spin starts from when it grows again.
const STEP_US: u64 = 10;

impl Default for SpinBudget {
    fn default() -> Self {
        Self::with_max(SPIN_US_MAX)
    }
}

impl SpinBudget {
    /// A budget that never grows past `budget_max_us`.
    #[must_use]
    pub fn with_max(budget_max_us: u64) -> Self {
        Self { budget_us: 0, budget_max_us }
    }

    /// Whether to go on spinning after `idle` without work.
    #[must_use]
    pub fn spins(&self, idle: Duration) -> bool {
        idle < Duration::from_micros(self.budget_us)
    }

    /// Work came after `idle` (spin and sleep together).
    pub fn work_came_after(&mut self, idle: Duration) {
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
