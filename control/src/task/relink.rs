//! How far the change of a session's link is: from TCP, with which the session had to begin, to RDMA. Sans-IO.
//!
//! ```text
//! dialer                                                acceptor
//!   │ Ask rdma, offer, RDMA connect, Link, over a second    │   the session goes on over TCP
//!   │ connection (`AskForRdma`, `OfferRdma`)                │
//!   │◀───────────────────────────────────────────── Link ── │   the acceptor has the RDMA connection too
//!   │ closes the session's link                             │
//!   │ ── Hello ────────────────────────────────────────────▶│   closes the link as well, if it is still up
//!   │◀──────────────────────────────────────────── Hello ── │   and so on as in any conversation
//! ```
//! So a link is changed by its end and the going on of the session, as after any broken link; but the connection for that is
//! there before. What can fail or take time, RDMA, is done before the session is touched.
//!
//! Invariants: nothing closes a session's link before both nodes have an RDMA connection and both controllers would let the
//! session go on; one change at a time, and a newer question of the peer's replaces an older one; while this node leaves a link
//! it dials nobody.

use super::messages::Next;

/// How far a change of link is.
enum Step<C, P> {
    /// Both nodes make the connections.
    Connecting,
    /// As acceptor: they are there, and the peer is to leave the link and say hello.
    Awaited,
    /// This node leaves the link.
    Leaving(Next<C, P>),
}

/// The change of link under way, if any.
pub(super) struct Relink<C, P> {
    step: Option<Step<C, P>>,
    /// Of the latest one.
    serial: u64,
}

impl<C, P> Default for Relink<C, P> {
    fn default() -> Self {
        Self { step: None, serial: 0 }
    }
}

impl<C, P> Relink<C, P> {
    /// A change begins, in place of any for which the link is not being left. Gives its serial.
    pub(super) fn begin(&mut self) -> u64 {
        assert!(!self.is_leaving(), "the connections of that one are in use");
        self.serial += 1;
        self.step = Some(Step::Connecting);
        self.serial
    }

    /// There is none.
    pub(super) fn is_idle(&self) -> bool {
        self.step.is_none()
    }

    /// This node has closed the link, or is about to.
    pub(super) fn is_leaving(&self) -> bool {
        matches!(self.step, Some(Step::Leaving(_)))
    }

    /// The end of the link is expected.
    pub(super) fn is_on_purpose(&self) -> bool {
        matches!(self.step, Some(Step::Awaited | Step::Leaving(_)))
    }

    /// The connections of the change of this serial are there or failed; whether that is the change under way, which ends.
    pub(super) fn connected(&mut self, serial: u64) -> bool {
        let is = self.serial == serial && matches!(self.step, Some(Step::Connecting));
        if is {
            self.step = None;
        }
        is
    }

    /// The same for the peer's hello.
    pub(super) fn came_over(&mut self, serial: u64) -> bool {
        let is = self.serial == serial && matches!(self.step, Some(Step::Awaited));
        if is {
            self.step = None;
        }
        is
    }

    /// The peer is to leave the link.
    pub(super) fn wait(&mut self) {
        self.step = Some(Step::Awaited);
    }

    /// This node leaves the link for this.
    pub(super) fn leave_for(&mut self, next: Next<C, P>) {
        self.step = Some(Step::Leaving(next));
    }

    /// The session's link is gone: what to go on with, where this node left it.
    pub(super) fn left(&mut self) -> Option<Next<C, P>> {
        match self.step.take() {
            Some(Step::Leaving(next)) => Some(next),
            awaited @ Some(Step::Awaited) => {
                self.step = awaited;
                None
            }
            Some(Step::Connecting) | None => None,
        }
    }

    /// The change is over; gives the connection that was for it, to be closed.
    pub(super) fn end(&mut self) -> Option<C> {
        match self.step.take() {
            Some(Step::Leaving(next)) => Some(next.stream),
            _ => None,
        }
    }
}
