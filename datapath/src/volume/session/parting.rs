//! A session whose link is gone, and which may go on over another.

use super::Session;
use crate::access::Access;
use crate::transport::DownReason;
use crate::units::{Epoch, Seq};
use crate::volume::interface::{Direction, Parted};
use crate::volume::resync::Telling;
use std::time::{Duration, Instant};

/// How a session's link ended.
#[derive(Debug)]
pub(in crate::volume) struct LinkEnd {
    pub(in crate::volume) reason: String,
    pub(in crate::volume) undurable: bool,
    pub(in crate::volume) was_target: bool,
    /// Something of the session got through over it.
    pub(in crate::volume) moved: bool,
    /// Anything at all came over it.
    pub(in crate::volume) heard: bool,
}

/// A session without a link.
#[derive(Debug)]
pub(super) struct Parting {
    /// When the peer was last heard, or had last been when clients began to wait.
    heard: Instant,
    /// From when on a client need not wait any longer, once the peer's timeout is known.
    due: Option<Instant>,
    /// Control was asked whether to go on alone.
    asked: bool,
    /// A target's.
    standby: Option<Access>,
    /// What a target has not told yet of its map.
    telling: Option<Telling>,
}

impl Parting {
    pub(super) fn standby_mut(&mut self) -> Option<&mut Access> {
        self.standby.as_mut()
    }
}

impl Session {
    /// Whether the session may go on over another link, as far as the end of this one and the roles say.
    pub(in crate::volume) fn may_part(&self, reason: &DownReason) -> bool {
        let in_order = match reason {
            // Damage on the way says nothing about the peer.
            DownReason::Protocol(violation) => violation.is_damage(),
            DownReason::Medium => false,
            _ => !self.void,
        };
        in_order && (self.source || self.standby.is_some())
    }

    /// The link is gone, with all that was queued for it. `undurable`: the peer has not confirmed everything.
    pub(in crate::volume) fn link_gone(&mut self, reason: &DownReason, undurable: bool) {
        self.link = None;
        self.arrived.clear();
        self.outbox.clear();
        let was_target = self.standby.is_some() | std::mem::take(&mut self.target_refused);
        let undurable = undurable || (self.void && !was_target);
        let (moved, heard) = (self.moved, self.heard_bytes > 0);
        self.ended = Some(LinkEnd { reason: reason.to_string(), undurable, was_target, moved, heard });
    }

    /// The end that control has not heard of, if nothing is being applied any more.
    pub(in crate::volume) fn take_end(&mut self) -> Option<LinkEnd> {
        if self.applying.is_some() { None } else { self.ended.take() }
    }

    /// The session does not go on: a target is none any more.
    pub(in crate::volume) fn end_target(&mut self) {
        self.standby = None;
        self.telling = None;
    }

    /// The session waits for another link. `waits`: a client waits for the peer.
    pub(in crate::volume) fn part(&mut self, waits: bool) {
        let standby = self.standby.take().map(|mut access| {
            access.part();
            access
        });
        let heard = self.stalled_since.filter(|_| waits && !self.moved).unwrap_or(self.last_heard);
        self.stalled_since = waits.then_some(heard);
        let telling = self.telling.take();
        self.parted = Some(Parting { heard, due: None, asked: false, standby, telling });
    }

    /// Whether a session waits for another link.
    pub(in crate::volume) fn is_parted(&self) -> bool {
        self.parted.is_some()
    }

    /// What this end knows of a parted session, for the peer to compare with what it knows. Of a source: `unsure` is what was
    /// acknowledged and what has a number; `map_told` where the target's marks are known.
    pub(in crate::volume) fn told_of_parting(&self, unsure: (Seq, Seq), map_told: bool) -> Option<Parted> {
        let parting = self.parted.as_ref()?;
        let (applied, numbered) = match &parting.standby {
            Some(access) => (access.applied_upto(), access.applied_upto()),
            None => unsure,
        };
        let map_told = self.source && map_told;
        Some(Parted { source: self.source, epoch: self.epoch, applied, numbered, map_told })
    }

    /// When clients have waited long enough for the peer of a parted session.
    pub(in crate::volume) fn patience_ends(&mut self, timeout: Duration) -> Option<Instant> {
        let parting = self.parted.as_mut().filter(|parting| self.source && !parting.asked)?;
        Some(*parting.due.get_or_insert(parting.heard + timeout))
    }

    /// Whether clients that wait have waited long enough. Says so once.
    pub(in crate::volume) fn is_out_of_patience(&mut self, now: Instant, waits: bool) -> bool {
        let Some(parting) = self.parted.as_mut().filter(|_| self.source && waits) else { return false };
        let due = parting.due.is_some_and(|due| now >= due);
        due && !std::mem::replace(&mut parting.asked, true)
    }

    /// A parted session does not go on. Returns whether there was one. The roles end with [`Session::end_source`].
    pub(in crate::volume) fn give_up_parted(&mut self) -> bool {
        self.parted.take().is_some()
    }

    /// Whether the parted session is the one that both nodes know of. `unsure` as for [`Session::told_of_parting`].
    pub(in crate::volume) fn can_go_on(
        &self,
        applied: Seq,
        direction: Direction,
        epoch: Epoch,
        unsure: (Seq, Seq),
        is_copying: bool,
    ) -> bool {
        let Some(parting) = &self.parted else { return false };
        let agrees = match (&parting.standby, direction) {
            (Some(access), Direction::Target { .. }) => access.applied_upto() == applied,
            (None, Direction::Source { resync }) => {
                let (acknowledged, numbered) = unsure;
                (acknowledged..=numbered).contains(&applied) && (is_copying || !resync)
            }
            _ => false,
        };
        agrees && epoch == self.epoch
    }

    /// The parted session goes on over the link that was just attached. Returns whether this node is its source.
    pub(in crate::volume) fn go_on(&mut self, map_told: bool) -> bool {
        let Some(parting) = self.parted.take() else { return false };
        // What was queued without a link.
        self.outbox.clear();
        let is_source = parting.standby.is_none();
        if !is_source {
            self.standby = parting.standby;
            self.telling = match parting.telling {
                Some(Telling::All) if map_told => Some(Telling::All),
                Some(_) => Some(Telling::From(0)),
                None => None,
            };
        }
        is_source
    }
}

#[cfg(test)]
impl Session {
    /// As if the peer had not been heard for long.
    pub(in crate::volume) fn end_patience(&mut self) {
        let parting = self.parted.as_mut().expect("the link broke");
        parting.due = Some(parting.heard);
    }
}
