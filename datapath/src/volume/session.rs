//! A volume's session with its peer: the link, what is queued for it, how long the peer was silent, and this node's role in it.
//!
//! ```text
//! attach ─▶ be_source / be_target ─▶ poll, send, keep_alive ─▶ link_gone ─▶ over
//!                                                                 └▶ part ─▶ attach, go_on
//! ```
//! The volume hands every frame that arrives to the part that it is for, and carries out what follows for the disk, the pipeline and the
//! clients. What the standby side does with the frames is in `standby.rs`, what is sent in `send.rs`, a session without a link in
//! `parting.rs`.
//!
//! Invariants: one link at a time; after a violation nothing that the link brings is believed but its end; a session that this node broke
//! itself ([`Session::end`]) does not go on over another link. Nothing here touches the pipeline or the record.

use super::interface::Direction;
use super::resync::Telling;
use crate::access::Access;
use crate::error::Violation;
use crate::limits::{LINK_EVENTS_MAX, PEER_ANSWER_S_MAX, STALLED_PEER_TIMEOUTS, WINDOW_LEN};
use crate::mirror::pipeline::Change;
use crate::transport::{DownReason, Link, LinkEvent, Slot};
use crate::units::{ByteRange, Epoch, Seq};
use crate::wire::{Header, Kind};
use parting::Parting;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

mod parting;
mod send;
mod standby;

pub(super) use parting::LinkEnd;
pub(super) use send::Sources;

/// Tokens of flushes after a target's session: this plus a serial.
pub(super) const SETTLE_FLUSH_BASE: u64 = 1 << 61;
/// Tokens of flushes that the standby side asked for: this plus the session's serial, so that one of an ended session is known.
pub(super) const ACCESS_FLUSH_BASE: u64 = 1 << 62;

/// A frame that waits for its turn, or for credit.
#[derive(Clone, Copy, Debug)]
enum Outgoing {
    Post(Seq, Change),
    Flush(Seq),
    Control {
        code: u64,
        arg: u64,
    },
    /// A question to the peer's disk.
    Read {
        id: u64,
        range: ByteRange,
    },
    /// What is left of the answer to one of the peer's.
    Reply {
        id: u64,
        range: ByteRange,
    },
    /// The target's marks are on our record.
    MarksKept,
}

/// See the file's head.
pub(super) struct Session {
    epoch: Epoch,
    /// This node's changes go to the peer.
    source: bool,
    /// The peer's changes come here.
    standby: Option<Access>,
    /// Counts the lives of the standby side.
    standby_serial: u64,
    /// The session would have made us a target, and ends instead; control has it on record as one.
    target_refused: bool,

    link: Option<Box<dyn Link>>,
    link_events: Vec<LinkEvent>,
    /// The peer broke the protocol; the link's end is on its way.
    distrusted: bool,
    /// This node broke the session's order itself: it cannot go on over another link.
    void: bool,
    /// The session went on over this link or one before.
    gone_on: bool,
    /// Something of the session got through over the present link.
    moved: bool,
    /// A session without a link, which may go on. `source` holds for that one then.
    parted: Option<Parting>,
    /// The link is gone; control hears of it once nothing is being applied any more.
    ended: Option<LinkEnd>,

    outbox: VecDeque<Outgoing>,
    /// What a target has to tell the source of its marks.
    telling: Option<Telling>,
    /// Changes of the peer that wait to be applied, in order.
    arrived: VecDeque<Slot>,
    /// The one that a worker thread applies.
    applying: Option<Slot>,
    /// Counts the flushes after a target's session.
    settle_serial: u64,

    heard_bytes: u64,
    last_heard: Instant,
    last_sent: Instant,
    /// When [`Session::keep_alive`] was last called.
    last_kept: Instant,
    /// When the peer last acknowledged something, or nothing waited for it.
    last_answer: Instant,
    /// Clients wait, and have since the peer was heard then: links came and went, and nothing of the session got through.
    stalled_since: Option<Instant>,
}

impl Session {
    /// No session yet.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            epoch: Epoch::ZERO,
            source: false,
            standby: None,
            standby_serial: 0,
            target_refused: false,
            link: None,
            link_events: Vec::with_capacity(LINK_EVENTS_MAX),
            distrusted: false,
            void: false,
            gone_on: false,
            moved: false,
            parted: None,
            ended: None,
            outbox: VecDeque::with_capacity(WINDOW_LEN),
            telling: None,
            arrived: VecDeque::new(),
            applying: None,
            settle_serial: 0,
            heard_bytes: 0,
            last_heard: now,
            last_sent: now,
            last_kept: now,
            last_answer: now,
            stalled_since: None,
        }
    }

    /// A link is there. Its roles follow: [`Session::be_source`], [`Session::be_target`], or [`Session::go_on`].
    ///
    /// # Panics
    /// When the last one has not ended: control hands over one at a time.
    pub(super) fn attach(&mut self, link: Box<dyn Link>, goes_on: bool, now: Instant) {
        self.assert_over();
        self.link = Some(link);
        self.distrusted = false;
        self.void = false;
        self.moved = false;
        self.gone_on = goes_on;
        self.heard_bytes = 0;
        self.last_heard = now;
        self.last_sent = now;
        self.last_answer = now;
        self.last_kept = now;
    }

    /// Nothing is left of a link.
    pub(super) fn assert_over(&self) {
        assert!(self.link.is_none() && self.ended.is_none(), "one session at a time");
    }

    /// The epoch of the session, or of the last one.
    pub(super) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether this node's changes go to the peer, now or once a parted session goes on.
    pub(super) fn is_source(&self) -> bool {
        self.source
    }

    /// Whether the peer's changes come here.
    pub(super) fn is_target(&self) -> bool {
        self.standby.is_some()
    }

    /// Whether a frame is of this session, in which we are the source.
    pub(super) fn is_source_of(&self, header: &Header) -> bool {
        self.source && header.epoch == self.epoch
    }

    /// Whether the roles are these already.
    pub(super) fn has_roles(&self, direction: Direction, epoch: Epoch) -> bool {
        let same = match direction {
            Direction::Source { .. } => self.source,
            Direction::Target { .. } => self.standby.is_some(),
            Direction::Idle => false,
        };
        same && epoch == self.epoch
    }

    /// The roles end, and new ones follow in `epoch`. Returns whether this node was the source.
    pub(super) fn end_roles(&mut self, epoch: Epoch) -> bool {
        self.epoch = epoch;
        let was_source = std::mem::take(&mut self.source);
        if self.standby.take().is_some() || was_source {
            // What the peer asked of our disk, it asked as what it is no more; numbers of the session that ends go with it.
            self.keep_control_only();
        }
        self.telling = None;
        was_source
    }

    /// This node's changes go to the peer from now on.
    pub(super) fn be_source(&mut self) {
        self.source = true;
    }

    /// This node's changes go nowhere any more. Returns whether they did.
    pub(super) fn end_source(&mut self) -> bool {
        std::mem::take(&mut self.source)
    }

    /// The session would make this node a target, which cannot be now.
    pub(super) fn refuse_target(&mut self) {
        self.target_refused = true;
    }

    /// Whether a session is up.
    pub(super) fn has_link(&self) -> bool {
        self.link.is_some()
    }

    /// Whether the peer can be counted on.
    pub(super) fn is_trusted(&self) -> bool {
        self.link.is_some() && !self.distrusted
    }

    /// Whether the link holds something to tell that the poller will not announce.
    pub(super) fn has_backlog(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.has_backlog())
    }

    /// Whether the link is to be looked at each turn, as that costs nothing.
    pub(super) fn polls_for_free(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.polls_for_free())
    }

    /// Before the reactor sleeps on the link's descriptor. False when the link has something to tell already.
    pub(super) fn prepare_sleep(&mut self) -> bool {
        self.link.as_mut().is_none_or(|link| link.prepare_sleep())
    }

    /// Ends the link. Its end arrives as [`LinkEvent::Down`].
    pub(super) fn close(&mut self, reason: DownReason) {
        if let Some(link) = &mut self.link {
            link.close(reason);
        }
    }

    /// Ends the session for a reason that keeps it from going on.
    pub(super) fn end(&mut self, reason: &'static str) {
        self.void = self.link.is_some();
        self.close(DownReason::Local(reason));
    }

    /// The peer broke the protocol: its frames end here.
    pub(super) fn distrust(&mut self, violation: Violation) {
        self.distrusted = true;
        self.close(DownReason::Protocol(violation));
    }

    /// Takes what the link has, and whether there was anything. The events are to be given back ([`Session::polled`]).
    pub(super) fn poll(&mut self, now: Instant) -> Option<(Vec<LinkEvent>, bool)> {
        let link = self.link.as_mut()?;
        let mut events = std::mem::take(&mut self.link_events);
        link.poll(&mut events);
        let heard = link.received_bytes();
        let mut any = !events.is_empty();
        if heard != self.heard_bytes {
            self.heard_bytes = heard;
            self.last_heard = now;
            any = true;
        }
        Some((events, any))
    }

    /// Whether an event counts. After a violation nothing more is believed; what the same poll brought along is dropped with it.
    pub(super) fn believes(&self, event: &LinkEvent) -> bool {
        !self.distrusted || matches!(event, LinkEvent::Down(_))
    }

    /// The events of a poll were taken.
    pub(super) fn polled(&mut self, events: Vec<LinkEvent>) {
        self.link_events = events;
    }

    /// Gives a slot back to the link.
    pub(super) fn release(&mut self, slot: Slot) {
        if let Some(link) = &mut self.link {
            link.release(slot);
        }
    }

    /// The peer's word went from `before` to `after`: applied and durable. With `wants_durable` something waits for the latter.
    pub(super) fn acknowledged(&mut self, before: (Seq, Seq), after: (Seq, Seq), wants_durable: bool) {
        self.moved |= after > before;
        if after.1 > before.1 || (after.0 > before.0 && !wants_durable) {
            self.answered();
        }
    }

    /// The peer does what it is there for.
    pub(super) fn answered(&mut self) {
        self.last_answer = self.last_heard;
    }

    /// Keep-alives out, silence in: to be called often against `timeout`, while there is a link. `awaited`: something waits for the
    /// peer. Returns when to call again at the latest.
    pub(super) fn keep_alive(&mut self, now: Instant, timeout: Duration, awaited: bool) -> Option<Instant> {
        let interval = timeout / 4;
        let link = self.link.as_mut()?;
        if link.arm().is_some_and(|(_, interest)| !interest.readable) {
            // It is we who do not listen: our ring is full.
            self.last_heard = now;
        }
        if now.duration_since(self.last_kept) > timeout / 2 {
            // It is we who were held up, and sent nothing that a live host could have answered.
            self.last_heard = now;
        }
        self.last_kept = now;
        let silent = now.duration_since(self.last_heard);
        let host_answers = || link.host_silence().is_some_and(|host| host < timeout);
        // A peer of which nothing came since the handshake has not shown that its program runs at all.
        let unheard = self.heard_bytes == 0;
        let patience = if unheard { timeout + timeout / 2 } else { timeout * STALLED_PEER_TIMEOUTS };
        if silent >= patience || (silent >= timeout && !host_answers()) {
            let silent_ms = u64::try_from(silent.as_millis()).unwrap_or(u64::MAX);
            link.close(DownReason::Silent { silent_ms });
            return Some(now);
        }
        if !awaited && self.telling.is_none() {
            self.last_answer = now;
            self.stalled_since = None;
        } else if now.duration_since(self.last_answer) >= Duration::from_secs(PEER_ANSWER_S_MAX) {
            link.close(DownReason::Unanswering);
            return Some(now);
        }
        let stuck = now.duration_since(self.last_answer).max(silent);
        if stuck >= timeout * 2 {
            // Its host answers and the peer does not, or only to what needs few bytes.
            self.moved = false;
        }
        // A little early, so that a node's links come to send theirs together and wake it once.
        if now.duration_since(self.last_sent) >= interval - interval / 8 {
            // Without credit there is unread traffic of ours in front of the peer: sign of life enough.
            let _ = link.send(Header::new(Kind::KeepAlive, self.epoch));
            link.kick();
            self.last_sent = now;
        }
        let patience_ends = self.last_heard + timeout;
        Some((self.last_sent + interval).min(if patience_ends > now {
            patience_ends
        } else {
            now + interval
        }))
    }
}

#[cfg(test)]
impl Session {
    pub(super) fn stalled_since(&self) -> Option<Instant> {
        self.stalled_since
    }

    pub(super) fn last_heard(&self) -> Instant {
        self.last_heard
    }

    pub(super) fn distrust_all(&mut self) {
        self.distrusted = true;
    }

    pub(super) fn has_sent_all(&self) -> bool {
        self.outbox.is_empty()
    }

    pub(super) fn is_applying(&self) -> bool {
        self.applying.is_some()
    }

    pub(super) fn link_mut(&mut self) -> &mut dyn Link {
        self.link.as_mut().expect("a session").as_mut()
    }

    pub(super) fn assert_nothing_left(&self) {
        assert_eq!((self.outbox.len(), self.arrived.len()), (0, 0), "queued and arrived");
        assert!(self.applying.is_none());
    }
}

#[cfg(test)]
mod tests;
