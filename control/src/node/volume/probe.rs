//! The part of a volume's task that asks a peer which dials us why it does not: whoever waits to be dialled hears nothing by
//! itself of a peer that is not there, does not know the volume or will have no session.
//!
//! Nothing but what is logged and shown rests on the answers. Costs one short connection in [`PROBE_PAUSE`] for each volume
//! that is without a session, and nothing with one.

use super::super::peers;
use super::VolumeTask;
use crate::role::{Connection, Event, Obstacle};
use std::time::{Duration, Instant};

/// How long a peer has for dialling before it is asked: it dials within [`DIAL_PAUSE_MAX`](super::DIAL_PAUSE_MAX), and a
/// session takes a fraction of a second.
const PROBE_AFTER: Duration = Duration::from_secs(2);

/// From one question to the next: what is shown is no older than that.
const PROBE_PAUSE: Duration = Duration::from_secs(3);

/// When to ask.
pub(super) struct Prober {
    next: Instant,
    under_way: bool,
    /// The peer has not heard yet that this daemon was started, or that an operator here said `connect`.
    anew: bool,
}

impl Prober {
    pub(super) fn new(now: Instant) -> Self {
        Self { next: now + PROBE_AFTER, under_way: false, anew: true }
    }

    /// An operator wants a session: the peer is asked at once, and dials without a pause.
    pub(super) fn ask_anew(&mut self) {
        self.anew = true;
        self.next = Instant::now();
    }
}

impl VolumeTask {
    /// Asks, when it is time for that.
    pub(super) fn probe_if_due(&mut self) {
        let now = Instant::now();
        let is_dialled = self.shared.peer.as_str() < self.surroundings.node.as_str();
        let waits = is_dialled
            && !self.link_up
            && self.conversation.is_none()
            && self.controller.status().connection == Connection::Connecting;
        if !waits {
            // A session says more.
            self.prober.anew &= !self.link_up;
            self.prober.next = now + PROBE_AFTER;
        } else if now >= self.prober.next && !self.prober.under_way {
            self.prober.under_way = true;
            let volume = self.shared.config.name.as_str().to_owned();
            let anew = self.prober.anew;
            peers::probe(self.surroundings.route.clone(), volume, anew, self.shared.inbox.clone());
        }
    }

    /// The answer, or why there is none.
    pub(super) async fn probed(&mut self, asked: Result<(), Obstacle>) {
        self.prober.under_way = false;
        self.prober.next = Instant::now() + PROBE_PAUSE;
        let event = match asked {
            Ok(()) => {
                self.prober.anew = false;
                Event::Contact { willing: true }
            }
            Err(obstacle) => Event::NoContact(obstacle),
        };
        self.handle(event).await;
    }
}
