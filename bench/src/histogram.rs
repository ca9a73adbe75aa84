//! What one run of one load measured: every latency in a histogram, boiled down to a [`Summary`].
//!
//! Where it stands: each load records into a [`Recorder`] and returns its [`Summary`]; the report joins the summaries of
//! several rounds by their medians. Latencies are kept in nanoseconds at three digits, so recording costs no allocation.

use hdrhistogram::Histogram;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Longest latency told apart, in nanoseconds: a minute, beyond which a run has failed anyway.
const LATENCY_NS_MAX: u64 = 60_000_000_000;

/// What a run came to. Rates are over the whole run, percentiles over its single requests.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Summary {
    /// Requests measured.
    pub(crate) requests: u64,
    /// Median latency.
    pub(crate) p50_us: f64,
    /// Latency of all but one request in a hundred.
    pub(crate) p99_us: f64,
    /// Requests a second.
    pub(crate) iops: f64,
    /// Payload a second, in millions of bytes.
    pub(crate) mb_s: f64,
}

/// Collects one run.
pub(crate) struct Recorder {
    latencies: Histogram<u64>,
    since: Instant,
    payload_len: usize,
}

impl Recorder {
    /// For requests of `payload_len` bytes; time runs from now.
    pub(crate) fn new(payload_len: usize) -> Self {
        let latencies = Histogram::new_with_max(LATENCY_NS_MAX, 3).expect("constant bounds are in range");
        Self { latencies, since: Instant::now(), payload_len }
    }

    /// Forgets what the warm-up recorded; time runs from now.
    pub(crate) fn restart(&mut self) {
        self.latencies.reset();
        self.since = Instant::now();
    }

    /// One request took this long.
    pub(crate) fn record(&mut self, latency: Duration) {
        self.latencies.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(LATENCY_NS_MAX));
    }

    /// The run is over, now.
    pub(crate) fn finish(&self) -> Summary {
        let seconds = self.since.elapsed().as_secs_f64();
        let requests = self.latencies.len();
        let us = |quantile| self.latencies.value_at_quantile(quantile) as f64 / 1e3;
        let iops = requests as f64 / seconds;
        Summary {
            requests,
            p50_us: us(0.5),
            p99_us: us(0.99),
            iops,
            mb_s: iops * self.payload_len as f64 / 1e6,
        }
    }
}

/// The middle value; the mean of the two middle ones where there are two.
///
/// # Panics
/// When there is none.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}

/// The rounds of one case joined: each number is the median of the rounds' numbers.
pub(crate) fn joined(rounds: &[Summary]) -> Summary {
    let of = |number: fn(&Summary) -> f64| median(rounds.iter().map(number));
    Summary {
        requests: rounds.iter().map(|round| round.requests).sum(),
        p50_us: of(|round| round.p50_us),
        p99_us: of(|round| round.p99_us),
        iops: of(|round| round.iops),
        mb_s: of(|round| round.mb_s),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_and_medians_come_from_the_right_end() {
        let mut recorder = Recorder::new(1000);
        recorder.record(Duration::from_secs(5));
        recorder.restart();
        for us in 1..=100 {
            recorder.record(Duration::from_micros(us));
        }
        let summary = recorder.finish();
        assert_eq!(summary.requests, 100, "the warm-up does not count");
        assert!((summary.p50_us - 50.0).abs() < 0.5 && (summary.p99_us - 99.0).abs() < 0.5, "{summary:?}");
        assert!((summary.mb_s - summary.iops / 1e3).abs() < 1e-6 * summary.mb_s, "{summary:?}");
        assert_eq!([median([3.0, 1.0, 2.0]), median([4.0, 1.0])], [2.0, 2.5]);
    }
}
