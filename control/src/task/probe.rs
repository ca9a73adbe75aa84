//! When a peer that dials this node is asked why it does not: whoever waits to be dialled hears nothing by itself of a peer
//! that is not there, does not know the volume or will have no session. Sans-IO.
//!
//! Nothing but what is logged and shown rests on the answers. Costs one short connection in [`PROBE_PAUSE`] for each volume
//! that is without a session, and nothing with one.

use std::time::Duration;

/// How long a peer has for dialling before it is asked: it dials twice a second at least, and a session takes a fraction of a
/// second.
const PROBE_AFTER: Duration = Duration::from_secs(2);

/// From one question to the next: what is shown is no older than that.
const PROBE_PAUSE: Duration = Duration::from_secs(3);

/// When to ask.
pub(super) struct Prober {
    next: Duration,
    under_way: bool,
}

impl Prober {
    pub(super) fn new(now: Duration) -> Self {
        Self { next: now + PROBE_AFTER, under_way: false }
    }

    /// Whether to ask now; `waits`: this node waits to be dialled.
    pub(super) fn is_due(&mut self, now: Duration, waits: bool) -> bool {
        if !waits {
            self.next = now + PROBE_AFTER;
            return false;
        }
        now >= self.next && !std::mem::replace(&mut self.under_way, true)
    }

    /// The answer came, or why there is none.
    pub(super) fn answered(&mut self, now: Duration) {
        self.under_way = false;
        self.next = now + PROBE_PAUSE;
    }
}
