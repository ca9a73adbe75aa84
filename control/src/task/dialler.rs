//! When the peer is dialled. Sans-IO.

use super::redial::Redial;
use std::time::Duration;

/// The first pause after a failed dial is twice this, where no session was before.
const PAUSE_BEGIN: Duration = Duration::from_millis(100);

/// Longest pause between two dials: what a standby's return may take longer than it must.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// The first pause between two dials after a session, when the first dial found the peer busy with the end of it. It doubles.
const PAUSE_FIRST: Duration = Duration::from_millis(4);

/// When to dial.
pub(super) struct Dialler {
    /// The controller wants it.
    dials: bool,
    under_way: bool,
    pause: Duration,
    next: Duration,
    redial: Redial,
    /// Since when a session has a link.
    session_began: Option<Duration>,
}

impl Dialler {
    pub(super) fn new(now: Duration) -> Self {
        Self {
            dials: false,
            under_way: false,
            pause: PAUSE_BEGIN,
            next: now,
            redial: Redial::default(),
            session_began: None,
        }
    }

    /// The controller wants the peer dialled, at once at first.
    pub(super) fn start(&mut self, now: Duration) {
        self.dials = true;
        self.next = now;
    }

    /// The controller does not want the peer dialled.
    pub(super) fn stop(&mut self) {
        self.dials = false;
    }

    /// Whether the controller wants the peer dialled.
    pub(super) fn is_on(&self) -> bool {
        self.dials
    }

    /// When to dial next, where nothing but time stands in the way.
    pub(super) fn due(&self) -> Option<Duration> {
        (self.dials && !self.under_way).then_some(self.next)
    }

    /// Whether to dial now, which then is under way.
    pub(super) fn begin(&mut self, now: Duration) -> bool {
        let due = self.due().is_some_and(|due| now >= due);
        self.under_way |= due;
        due
    }

    /// The dial is over.
    pub(super) fn ended(&mut self) {
        self.under_way = false;
    }

    /// A dial, or the talk after it, came to nothing.
    pub(super) fn pause(&mut self, now: Duration) {
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        self.next = now + self.pause;
    }

    /// A session has a link.
    pub(super) fn session_began(&mut self, now: Duration) {
        self.session_began = Some(now);
    }

    /// A session's link broke: its peer most likely lives, and is dialled again at once. Not where session after session ends
    /// without a single change that got through (`moved`). Gives what to log.
    pub(super) fn session_ended(&mut self, now: Duration, moved: bool, peer: &str) -> Option<String> {
        let lived = self.session_began.take().map_or(Duration::ZERO, |began| now.saturating_sub(began));
        let (pause, text) = self.redial.session_ended(lived, moved, peer);
        self.pause = PAUSE_FIRST / 2;
        self.next = now + pause;
        text
    }

    /// A link ended on purpose, which says nothing about the path: the next dial, if there has to be one, follows at once.
    pub(super) fn link_left(&mut self, now: Duration) {
        self.session_began = None;
        self.pause = PAUSE_FIRST / 2;
        self.next = now;
    }
}
