//! What a volume does beside its clients: the background copy, the verification, and the throttle that both keep to.
//!
//! The volume asks for the next step ([`Background::next_copy_step`], [`Background::next_verify_step`]), gives that step a request of its
//! own, and says when the peer has answered it. A step that found no room among the requests comes back ([`Background::untake`]).
//!
//! Invariants: what belongs to a copy or a verification that has ended changes nothing any more, which the serial in a step's
//! [`Origin`] tells; no step begins while the background is paused, unless clients wait for the end of the copy; with clients about,
//! steps keep to the throttle. Nothing here knows a request, a link or the pipeline; time comes in as an argument.

use super::interface::{Origin, VolumeCounters};
use crate::limits::CLIENTS_BUSY_MS;
use crate::mirror::resync::Resync;
use crate::mirror::throttle::{Landed, Leave, Throttle};
use crate::units::ByteRange;
use crate::wire::Kind;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use verify::Verifying;

mod copy;
mod verify;

pub(super) use verify::Compared;

/// A step to be made: a change that no client asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Step {
    /// [`Origin::Resync`] or [`Origin::Verify`].
    pub(super) origin: Origin,
    /// `Verify` where the peer is asked, else what it is to do.
    pub(super) kind: Kind,
    /// Over this range.
    pub(super) range: ByteRange,
    /// The peer has said that its bytes are others.
    differs: bool,
}

/// See the file's head.
#[derive(Debug)]
pub(super) struct Background {
    /// A copy asks the peer first whether its bytes are others.
    checksum_first: bool,
    /// No step begins, from a quiesce to what control makes of it: with a step always under way there would be nothing to wait
    /// for, and afterwards nothing that could be stopped without ending the session.
    paused: bool,
    copy: Option<Resync>,
    copy_serial: u64,
    verifying: Option<Verifying>,
    verify_serial: u64,
    /// How fast both may go.
    throttle: Throttle,
    /// When the next step is due.
    due: Option<Instant>,
    /// What the turn before spent on steps: a request that came meanwhile waited for it unseen.
    stalled: Duration,
    /// A request came since the last turn's end; when the last one came; whether that is recent.
    client_came: bool,
    last_client: Option<Instant>,
    clients_busy: bool,
}

impl Background {
    /// Nothing to do. With `checksum_first` copies ask the peer before they send.
    pub(super) fn new(checksum_first: bool) -> Self {
        Self {
            checksum_first,
            paused: false,
            copy: None,
            copy_serial: 0,
            verifying: None,
            verify_serial: 0,
            throttle: Throttle::new(),
            due: None,
            stalled: Duration::ZERO,
            client_came: false,
            last_client: None,
            clients_busy: false,
        }
    }

    /// Begins no step until [`Background::resume`].
    pub(super) fn pause(&mut self) {
        self.paused = true;
    }

    /// Ends [`Background::pause`].
    pub(super) fn resume(&mut self) {
        self.paused = false;
    }

    /// A client's request came.
    pub(super) fn client_came(&mut self) {
        self.client_came = true;
    }

    /// The events of a turn are over, and what is due begins.
    pub(super) fn turn(&mut self, now: Instant) {
        self.stalled = Duration::ZERO;
        self.due = None;
        if std::mem::take(&mut self.client_came) {
            self.last_client = Some(now);
        }
        let busy = Duration::from_millis(CLIENTS_BUSY_MS);
        self.clients_busy = self.last_client.is_some_and(|at| now.duration_since(at) < busy);
    }

    /// Whether no client came for this long.
    pub(super) fn is_idle_for(&self, now: Instant, idle: Duration) -> bool {
        self.last_client.is_none_or(|at| now.duration_since(at) >= idle)
    }

    /// When something is due that no event will announce.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Another turn should follow at once.
    pub(super) fn is_due(&mut self, now: Instant) {
        self.due = Some(now);
    }

    /// The turn spent this long on a step.
    pub(super) fn stalled(&mut self, took: Duration) {
        self.stalled += took;
    }

    /// A client's change landed, in the turn that began at `now`.
    pub(super) fn landed(&self, now: Instant) -> Landed {
        self.throttle.landed(now.checked_sub(self.stalled).unwrap_or(now))
    }

    /// The peer has it.
    pub(super) fn released(&mut self, landed: Landed, now: Instant) {
        self.throttle.released(landed, now);
    }

    /// A step found no room among the requests.
    pub(super) fn untake(&mut self, step: Step) {
        self.throttle.step_ended();
        match (step.origin, &mut self.copy, &mut self.verifying) {
            (Origin::Resync { .. }, Some(copy), _) => copy.untake(step.range, step.differs),
            (Origin::Verify { .. }, _, Some(verifying)) => verifying.untake(step.range),
            _ => {}
        }
    }

    /// How many bytes a step may cover, or `None` where none may begin now.
    fn leave(&mut self, now: Instant, beside_clients: bool) -> Option<u64> {
        match self.throttle.leave(now, beside_clients) {
            Leave::Step(len) => Some(len),
            Leave::Wait(at) => {
                self.due = Some(at);
                None
            }
            Leave::Enough => None,
        }
    }

    /// Puts into the counters what control shows, for a disk of `size` bytes.
    pub(super) fn publish(&self, counters: &VolumeCounters, size: u64) {
        counters.resyncing.store(self.copy.is_some(), Ordering::Relaxed);
        counters.verifying.store(self.verifying.is_some(), Ordering::Relaxed);
        if let Some(verifying) = &self.verifying {
            counters.compared(verifying.findings(), size);
        }
        if let Some(copy) = &self.copy {
            let (total, done) = copy.progress();
            counters.resync_total_bytes.store(total, Ordering::Relaxed);
            counters.resync_done_bytes.store(done, Ordering::Relaxed);
            let percent = u128::from(done) * 10_000 / u128::from(total.max(1));
            let percent = if total == 0 { 0 } else { u64::try_from(percent).expect("10,000 at most") };
            counters.resync_percent_x100.store(percent, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
impl Background {
    /// No client holds it back.
    pub(super) fn be_idle(&mut self) {
        self.last_client = None;
    }

    /// A client came just now.
    pub(super) fn be_busy(&mut self, now: Instant) {
        self.last_client = Some(now);
    }

    /// Copies ask before they send.
    pub(super) fn compare_first(&mut self) {
        self.checksum_first = true;
    }
}

#[cfg(test)]
mod tests;
