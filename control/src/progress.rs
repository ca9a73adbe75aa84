//! How far a background copy is, how fast it goes and when it will be over, and how much is in sync without one. Sans-IO.
//!
//! The source knows from its counters and tells the target about once a second in a message between controllers
//! ([`Sample::to_message`]), so both nodes' `status` show the same. Nothing rests on any of it.
//!
//! Survives: a peer that sends any number (what cannot be is not shown), a copy that stands still or grows.

use std::collections::VecDeque;
use std::time::Duration;

/// The source looks, and tells the target, this often.
pub const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// The rate is that of so many last samples: long enough to be steady, short enough to follow.
const SAMPLES_MAX: usize = 10;

/// What a message has for percent times 100; the bits below are for what is left.
const PERCENT_SHIFT: u32 = 48;

/// What is left is told in units of this many bytes: 48 bits of them are far beyond any volume.
const UNIT_LEN: u64 = 4096;

/// Percent of a volume of `size` bytes that is in sync while `dirty_bytes` of it may differ, in hundredths rounded down: 100
/// only where nothing differs.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "at most 10000")]
pub fn percent_in_sync(size: u64, dirty_bytes: u64) -> f64 {
    let same = u128::from(size.saturating_sub(dirty_bytes));
    let percent_x100 = same * 10_000 / u128::from(size.max(1));
    percent_x100 as f64 / 100.0
}

/// How far a copy is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sample {
    /// Percent times 100.
    pub percent_x100: u64,
    /// Bytes still to be copied.
    pub left_bytes: u64,
}

impl Sample {
    /// As the argument of a message between controllers.
    #[must_use]
    pub fn to_message(self) -> u64 {
        let left = self.left_bytes.div_ceil(UNIT_LEN).min((1 << PERCENT_SHIFT) - 1);
        self.percent_x100.min(10_000) << PERCENT_SHIFT | left
    }

    /// What such an argument says; `None` where that cannot be.
    #[must_use]
    pub fn from_message(arg: u64) -> Option<Self> {
        let percent_x100 = arg >> PERCENT_SHIFT;
        let left_bytes = (arg & ((1 << PERCENT_SHIFT) - 1)) * UNIT_LEN;
        (percent_x100 <= 10_000).then_some(Self { percent_x100, left_bytes })
    }
}

/// The last samples of one copy.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    samples: VecDeque<(Duration, Sample)>,
}

impl Progress {
    /// Takes a sample. `now` never goes back.
    pub fn note(&mut self, now: Duration, sample: Sample) {
        if self.samples.len() == SAMPLES_MAX {
            self.samples.pop_front();
        }
        self.samples.push_back((now, sample));
    }

    /// The copy is over.
    pub fn clear(&mut self) {
        self.samples.clear();
    }

    /// Whether the source should look again.
    #[must_use]
    pub fn is_due(&self, now: Duration) -> bool {
        self.samples.back().is_none_or(|(at, _)| now.saturating_sub(*at) >= PROGRESS_INTERVAL)
    }

    /// Percent times 100, as of the last sample.
    #[must_use]
    pub fn percent_x100(&self) -> Option<u64> {
        self.samples.back().map(|(_, sample)| sample.percent_x100)
    }

    /// Bytes a second over the last samples; `None` before there are two.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        let ((began, first), (ended, last)) = (self.samples.front()?, self.samples.back()?);
        let millis = u64::try_from(ended.saturating_sub(*began).as_millis()).ok().filter(|&ms| ms > 0)?;
        let copied = u128::from(first.left_bytes.saturating_sub(last.left_bytes));
        u64::try_from(copied * 1000 / u128::from(millis)).ok()
    }

    /// Seconds until it is over, at this rate; `None` where it stands still.
    #[must_use]
    pub fn eta_s(&self) -> Option<u64> {
        let (_, last) = self.samples.back()?;
        Some(last.left_bytes.div_ceil(self.rate().filter(|&rate| rate > 0)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64, percent_x100: u64, left_bytes: u64) -> (Duration, Sample) {
        (Duration::from_secs(seconds), Sample { percent_x100, left_bytes })
    }

    #[test]
    fn rate_and_estimate_follow_the_last_samples() {
        let mut progress = Progress::default();
        assert!(progress.is_due(Duration::ZERO) && progress.rate().is_none() && progress.eta_s().is_none());
        let mut note = |(now, sample)| progress.note(now, sample);
        note(at(1, 0, 1_000_000));
        note(at(3, 5000, 500_000));
        assert_eq!((progress.rate(), progress.eta_s()), (Some(250_000), Some(2)));
        assert!(!progress.is_due(Duration::from_millis(3999)) && progress.is_due(Duration::from_secs(4)));
        for second in 4..20 {
            progress.note(Duration::from_secs(second), Sample { percent_x100: 5000, left_bytes: 500_000 });
        }
        assert_eq!((progress.rate(), progress.eta_s()), (Some(0), None), "it stands still");
        progress.note(Duration::from_secs(21), Sample { percent_x100: 4000, left_bytes: 700_000 });
        assert_eq!(progress.rate(), Some(0), "it grew");
        assert_eq!(progress.percent_x100(), Some(4000));
        progress.clear();
        assert_eq!(progress.percent_x100(), None);
    }

    #[test]
    fn only_what_differs_nowhere_is_all_in_sync() {
        let close = |found: f64, wanted: f64| assert!((found - wanted).abs() < 1e-9, "{found}, not {wanted}");
        close(percent_in_sync(64 << 30, 0), 100.0);
        close(percent_in_sync(64 << 30, 1), 99.99);
        close(percent_in_sync(64 << 30, 3 << 29), 97.65);
        close(percent_in_sync(u64::MAX, u64::MAX), 0.0);
        // The map counts in grains, of which the last may reach beyond the end.
        close(percent_in_sync(4096, 65536), 0.0);
    }

    #[test]
    fn a_message_says_it_all_and_nonsense_nothing() {
        let sample = Sample { percent_x100: 4217, left_bytes: 5 * UNIT_LEN };
        assert_eq!(Sample::from_message(sample.to_message()), Some(sample));
        let odd = Sample { percent_x100: 4217, left_bytes: 1 };
        assert_eq!(Sample::from_message(odd.to_message()).map(|s| s.left_bytes), Some(UNIT_LEN), "never 0");
        let huge = Sample { percent_x100: 10_000, left_bytes: u64::MAX };
        assert!(Sample::from_message(huge.to_message()).is_some());
        assert_eq!(Sample::from_message(u64::MAX), None);
        assert_eq!(Sample::from_message(10_001 << PERCENT_SHIFT), None);
    }
}
