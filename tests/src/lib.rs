//! What the integration tests share: two daemons as processes ([`pair`]), clients that check what they read
//! ([`ledger`]), strangers and liars ([`liar`]), a pair behind an address that moves ([`floating`]), a hostile wire between the nodes
//! ([`proxy`]), programs run with a limit ([`process`]), waits that
//! end what hangs and not what is slow ([`patience`]), two nodes in virtual time ([`sim`]), and virtual machines with an
//! RDMA device ([`vm`]).
//!
//! Invariants: every wait is bounded, every process is ended by its own id when its guard is dropped, and every file
//! lives in a temporary directory. A test that fails prints the end of both daemons' logs.
#![forbid(unsafe_code)]

pub mod cable;
pub mod floating;
pub mod ledger;
pub mod liar;
pub mod pair;
pub mod patience;
pub mod process;
pub mod proxy;
pub mod sim;
pub mod vm;

pub use costandby_ffi::testing::{scaled, skip, skip_outside_rig, slowness};
use patience::{Limits, Over, Patience};
use std::time::{Duration, Instant};

/// Pause between two looks at a condition: well below every limit, and cheap on two cores.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Looks until `look` gives something. `limit` suits a quiet machine, and is longer on a slow one ([`scaled`]).
///
/// # Panics
/// When `limit` is over; the message names `what`.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let (started, limit) = (Instant::now(), scaled(limit));
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < limit, "waited {limit:?} in vain until {what}");
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// Looks until `look` finds something. What it returns as long as it does not shows by its changes that things move.
/// The limits suit a quiet machine.
///
/// # Errors
/// When the limits are over: why, and what `look` returned last.
pub fn wait_while_moving<T, M: PartialEq>(
    limits: Limits,
    mut look: impl FnMut() -> Result<T, M>,
) -> Result<T, (Over, M)> {
    let mut patience = Patience::new(limits.stretched(slowness()), Instant::now());
    let mut last = None;
    loop {
        let seen = match look() {
            Ok(found) => return Ok(found),
            Err(seen) => seen,
        };
        let now = Instant::now();
        if last.as_ref() != Some(&seen) {
            patience.moved(now);
        }
        if let Some(over) = patience.over(now) {
            return Err((over, seen));
        }
        last = Some(seen);
        std::thread::sleep(LOOK_INTERVAL);
    }
}

/// The seed of a test that chooses at random: `COSTANDBY_TEST_SEED`, or the time. Printed, so that a failure can be had
/// again.
///
/// # Panics
/// When the variable holds no number.
#[must_use]
pub fn seed() -> u64 {
    let seed = std::env::var("COSTANDBY_TEST_SEED").map_or_else(
        |_| {
            std::time::UNIX_EPOCH
                .elapsed()
                .map_or(1, |since| u64::from(since.subsec_nanos()) ^ since.as_secs())
        },
        |text| text.parse().expect("COSTANDBY_TEST_SEED is a number"),
    );
    println!("COSTANDBY_TEST_SEED={seed}");
    seed
}

/// Reproducible random numbers (xorshift64*).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// From a seed, any.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next_u64() >> 11) % bound
    }

    /// Bytes without a pattern.
    #[must_use]
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.next_u64().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}
