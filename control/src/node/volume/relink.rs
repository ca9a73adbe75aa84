//! The part of a volume's task that takes a session which had to begin over TCP on to RDMA.
//!
//! ```text
//! dialer                                                acceptor
//!   │ Ask rdma, offer, RDMA connect, Link, over a second    │   the session goes on over TCP
//!   │ connection (`negotiate::ask_rdma`, `offer_rdma`)      │
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

use super::super::negotiate::NoLink;
use super::super::peers;
use super::super::rdma::Prepared;
use super::VolumeTask;
use crate::config::LinkKind;
use crate::hello::{Ask, Hello, Refuse, RefuseCode};
use crate::link::Kind;
use crate::role::Event;
use crate::secure::channel::Channel;
use costandby_datapath::reactor::command::Command;
use std::time::Instant;

/// Why the session's link is closed, for the peer's log where it did not expect that.
const REASON: &str = "the session goes on over RDMA";

/// A connection on which the session is to go on, RDMA beside it, and the hello that came on it where the peer dialled.
pub(in crate::node) struct Next {
    pub(in crate::node) stream: Channel,
    pub(in crate::node) prepared: Prepared,
    pub(in crate::node) hello: Option<Box<Hello>>,
}

/// How far a change of link is.
enum Step {
    /// Both nodes make the connections.
    Connecting,
    /// As acceptor: they are there, and the peer is to leave the link and say hello.
    Awaited,
    /// This node leaves the link.
    Leaving(Box<Next>),
}

/// The change of link under way, if any.
#[derive(Default)]
pub(super) struct Relink {
    step: Option<Step>,
    /// Of the latest one.
    serial: u64,
}

impl Relink {
    fn begin(&mut self) -> u64 {
        self.serial += 1;
        self.step = Some(Step::Connecting);
        self.serial
    }

    /// This node has closed the link, or is about to.
    pub(super) fn is_leaving(&self) -> bool {
        matches!(self.step, Some(Step::Leaving(_)))
    }

    /// The end of the link is expected.
    pub(super) fn is_on_purpose(&self) -> bool {
        matches!(self.step, Some(Step::Awaited | Step::Leaving(_)))
    }

    fn is_connecting(&self, serial: u64) -> bool {
        self.serial == serial && matches!(self.step, Some(Step::Connecting))
    }

    fn is_awaited(&self, serial: u64) -> bool {
        self.serial == serial && matches!(self.step, Some(Step::Awaited))
    }
}

impl VolumeTask {
    /// Asks the peer to take the session on to RDMA, when it is time for that.
    pub(super) fn ask_for_rdma_if_due(&mut self) {
        let now = self.began.elapsed();
        let may = self.relink.step.is_none()
            && self.session.as_ref().is_some_and(|session| session.dialled)
            && self.controller.may_change_link();
        if !may || !self.link.probe_due(now) {
            return;
        }
        let serial = self.relink.begin();
        let volume = self.shared.config.name.as_str().to_owned();
        let ask = Ask { node: self.surroundings.node.clone(), volume, rdma: true, anew: false };
        peers::ask_for_rdma(
            serial,
            self.surroundings.route.clone(),
            ask,
            self.terms(),
            self.shared.inbox.clone(),
        );
    }

    /// The peer asks whether there would be a session, or for RDMA to take one on to.
    pub(super) fn asked(&mut self, stream: Channel, ask: &Ask) {
        let over_tcp = self.session.as_ref().is_some_and(|s| !s.dialled && s.kind == Kind::Tcp);
        let auto = self.shared.config.link == LinkKind::Auto;
        let may = ask.rdma && auto && over_tcp && !self.relink.is_leaving();
        if ask.anew {
            self.dial_anew();
        }
        if !may || !self.controller.may_change_link() {
            let text = "there is no session over TCP here that can change its link now".to_owned();
            let refuse = self.controller.will_refuse().unwrap_or(Refuse { code: RefuseCode::Busy, text });
            return peers::part(stream, refuse);
        }
        let serial = self.relink.begin();
        peers::offer_rdma(serial, stream, self.terms(), self.shared.inbox.clone());
    }

    /// Both connections of a change of link are there, or not.
    pub(super) fn made(&mut self, serial: u64, made: Result<(Channel, Prepared), NoLink>) {
        if !self.relink.is_connecting(serial) {
            return;
        }
        self.relink.step = None;
        let (stream, prepared) = match made {
            Ok(made) => made,
            // Not now, for a reason that is no fault.
            Err(NoLink::Refused(Refuse { code: RefuseCode::Busy, .. })) => return,
            Err(error) => {
                self.link.tell(&error.note());
                return self.publish_link();
            }
        };
        let Some(session) = self.session.as_ref().filter(|_| self.controller.may_change_link()) else {
            // The peer finds the connection closed, and the session as it was.
            return;
        };
        if session.dialled {
            self.leave_for(Next { stream, prepared, hello: None });
        } else {
            self.relink.step = Some(Step::Awaited);
            peers::await_hello(serial, stream, prepared, self.shared.inbox.clone());
        }
    }

    /// As acceptor: the peer has left the session's link and says hello over the new connection, or it does not.
    pub(super) async fn came_over(&mut self, serial: u64, next: Result<Next, NoLink>) {
        if !self.relink.is_awaited(serial) {
            return;
        }
        self.relink.step = None;
        match next {
            Ok(next) if self.link_up => self.leave_for(next),
            Ok(next) => self.go_over(next).await,
            Err(_) => self.handle(Event::LinkChanges(false)).await,
        }
    }

    fn leave_for(&mut self, next: Next) {
        self.relink.step = Some(Step::Leaving(Box::new(next)));
        self.send(Command::CloseLink { volume: self.index, reason: REASON });
    }

    /// The session's link is gone, and the controller knows. Goes over to the new one, if that is why.
    pub(super) async fn left_link(&mut self) {
        match self.relink.step.take() {
            Some(Step::Leaving(next)) => self.go_over(*next).await,
            awaited @ Some(Step::Awaited) => self.relink.step = awaited,
            Some(Step::Connecting) | None => {}
        }
    }

    async fn go_over(&mut self, next: Next) {
        let Next { stream, prepared, hello } = next;
        let busy = self.conversation.is_some() || self.link_up;
        if busy || (hello.is_none() && !self.dials) {
            return self.handle(Event::LinkChanges(false)).await;
        }
        let ours = self.begin_conversation(hello.is_none());
        let (terms, inbox) = (self.terms(), self.shared.inbox.clone());
        peers::greet_over(self.serial, stream, ours, hello, prepared, terms, inbox);
    }

    /// The peer dials as if there were no change of link.
    pub(super) async fn end_change(&mut self) {
        self.relink.step = None;
        self.handle(Event::LinkChanges(false)).await;
    }

    /// A link that ended on purpose says nothing about the path: the next dial, if there has to be one, follows at once.
    pub(super) fn no_pause_after_session(&mut self) {
        self.session_began = None;
        self.dial_pause = super::DIAL_PAUSE_FIRST / 2;
        self.next_dial = Instant::now();
    }
}
