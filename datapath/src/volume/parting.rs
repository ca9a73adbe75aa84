//! A parted session: its link broke, and it may continue over another link.
//!
//! ```text
//!           link breaks                    attach, Before::GoesOn
//! session ──────────────▶ parted ───────────────────────────────────▶ the same session
//!                            │ attach for another session, go_alone, stop_serving, a failed disk
//!                            └──▶ given up: what the peer may lack is marked
//! ```
//! A source keeps its unacknowledged changes, its resync and its clients' requests as they are, and completes
//! nothing. A target keeps the number of the last change that it applied. Over the next link the target sends that
//! number; the source releases everything up to it and posts the rest again. Nothing of this is stored: the
//! activity log covers what is in flight, so a crash costs what any crash costs.
//!
//! A session that is given up leaves a list of the copy's steps that were under way. If the target lives on it says how far it had
//! applied ([`Before::Kept`]), and those steps are not sent again either.
//!
//! Invariants:
//! - While a session is parted nothing is unlocked, and nothing completes but a flush of what both nodes had durable before.
//!   Before anything is acknowledged without the peer the session is given up.
//! - Clients wait for the peer once: where the session goes on and nothing of it gets through, the next parting does not begin
//!   their time anew.
//! - What is given up is marked in the dirty bitmap before anything else happens. Marks that only stand for changes which the
//!   peer had applied are known as such ([`Record::doubt`]) as long as the peer lives on; and they are cleared only after a
//!   flush, like any others.
//! - A primary without a disk keeps its questions as well, and asks again for what is missing of their answers. It has nothing to
//!   go alone with: when its clients have waited long enough, its service ends.
//! - A session does not go on after this node broke its order itself: gave up a change, changed its role, lost its disk.

use super::{Outgoing, Volume};
use crate::access::Access;
use crate::limits::WINDOW_LEN;
use crate::mirror::pipeline::Event as PipelineEvent;
use crate::reactor::command::{Before, Direction, Event, Parted};
use crate::transport::DownReason;
use crate::units::{Epoch, Seq};
use std::time::{Duration, Instant};

use super::resync::Telling;

#[cfg(doc)]
use crate::disk::record::Record;

/// How a session's link ended.
#[derive(Debug)]
pub(super) struct LinkEnd {
    pub(super) reason: String,
    pub(super) undurable: bool,
    pub(super) was_target: bool,
    /// Something of the session got through over it.
    pub(super) moved: bool,
    /// Anything at all came over it.
    pub(super) heard: bool,
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
    access: Option<Access>,
    /// What a target has not told yet of its map.
    telling: Option<Telling>,
}

impl Parting {
    pub(super) fn access_mut(&mut self) -> Option<&mut Access> {
        self.access.as_mut()
    }
}

impl Volume {
    /// Whether the session whose link is gone may go on.
    pub(super) fn may_part(&self, reason: &DownReason) -> bool {
        let in_order = match reason {
            // Damage on the way says nothing about the peer.
            DownReason::Protocol(violation) => violation.is_damage(),
            DownReason::Medium => false,
            _ => !self.session_void,
        };
        // Without a disk all is at the peer, as before.
        let has_disk = !self.disk.is_failed() && (!self.diskless.is_active() || self.reads_from_peer());
        in_order && has_disk && !self.repairs() && (self.source || self.access.is_some())
    }

    /// The link is gone and the session waits for another. Control hears of it.
    pub(super) fn part(&mut self) {
        let access = self.access.take().map(|mut access| {
            access.part();
            access
        });
        if self.source {
            for request in self.requests.iter_mut().flatten() {
                // How long it will have taken is the peer's absence.
                request.landed_at = None;
            }
            self.pipeline_event(PipelineEvent::SessionParted);
        }
        let waits = self.pipeline.waits_for_parted() || self.diskless.is_fetching();
        let heard = self.stalled_since.filter(|_| waits && !self.link_moved).unwrap_or(self.last_heard);
        self.stalled_since = waits.then_some(heard);
        let telling = self.telling.take();
        self.parted = Some(Parting { heard, due: None, asked: false, access, telling });
    }

    /// What this end knows of the session, for the peer to compare with what it knows.
    pub(super) fn told_of_parting(&self) -> Option<Parted> {
        let parting = self.parted.as_ref()?;
        let (applied, numbered) = match &parting.access {
            Some(access) => (access.applied_upto(), access.applied_upto()),
            None => self.pipeline.unsure(),
        };
        let map_told = self.source && self.resync.as_ref().is_none_or(|resync| !resync.awaits_map());
        Some(Parted { source: self.source, epoch: self.epoch, applied, numbered, map_told })
    }

    /// When clients have waited long enough for the peer of a parted session. Control is asked then.
    pub(super) fn time_parting(&mut self, now: Instant, timeout: Duration) -> Option<Instant> {
        let parting = self.parted.as_mut().filter(|parting| self.source && !parting.asked)?;
        let due = *parting.due.get_or_insert(parting.heard + timeout);
        self.ask_if_parted_long(now);
        (due > now).then_some(due)
    }

    /// As if the peer had not been heard for long.
    #[cfg(test)]
    pub(super) fn end_patience(&mut self) {
        let parting = self.parted.as_mut().expect("the link broke");
        parting.due = Some(parting.heard);
    }

    /// Asks control whether to go on alone, once somebody waits and the peer was not heard for long.
    pub(super) fn ask_if_parted_long(&mut self, now: Instant) {
        let Some(parting) = &mut self.parted else { return };
        let due = parting.due.is_some_and(|due| now >= due);
        let waits = self.pipeline.waits_for_parted() || self.diskless.is_fetching();
        if !due || parting.asked || !self.source || !waits {
            return;
        }
        parting.asked = true;
        if self.reads_from_peer() {
            self.disk_lost("and the link to the peer, whose disk was used instead, is gone");
        } else {
            self.events.push(Event::AskAlone { volume: self.index });
        }
    }

    /// The session that is parted, if one is, does not go on. `lacking`: the peer may lack what was posted to it.
    pub(super) fn end_parting(&mut self, lacking: bool) {
        if self.parted.take().is_none() {
            return;
        }
        self.map_round = None;
        if !self.source {
            return;
        }
        self.end_verify("the session ended");
        if lacking {
            let mut unsure: Vec<_> = self.pipeline.unsure_steps().collect();
            if let Some(resync) = &mut self.resync {
                // Before anything else is marked: what was written there since may be lacking.
                for range in resync.applied_whole() {
                    self.record.doubt(range);
                }
                unsure.extend(resync.applied_in_part().take(WINDOW_LEN).map(|range| (Seq::ZERO, range)));
            }
            self.end_copy();
            self.end_source_record();
            // Behind their own marks, and before those of clients' changes.
            for (seq, range) in unsure {
                self.record.unsure(seq, range);
            }
        }
        self.end_copy();
        self.source = false;
        self.pipeline_event(PipelineEvent::SessionGivenUp { lacking });
    }

    /// Ends the session for a reason that keeps it from going on.
    pub(super) fn end_session(&mut self, reason: &'static str) {
        self.session_void = self.link.is_some();
        self.close_link(DownReason::Local(reason));
    }

    /// Over a new link, what was before it: a session that goes on, or one that does not. False where it should go on and
    /// cannot.
    pub(super) fn settle_parting(&mut self, before: Before, direction: Direction, epoch: Epoch) -> bool {
        match before {
            Before::GoesOn { applied, .. } => {
                let holds = self.can_go_on(applied, direction, epoch);
                if !holds {
                    self.end_parting(true);
                }
                return holds;
            }
            Before::Kept { applied } => {
                self.end_parting(true);
                self.record.resolve(applied);
            }
            Before::Unknown => {
                // In sync without a session that goes on: all that was posted is on the peer's stable storage.
                self.end_parting(direction != Direction::Source { resync: false });
                self.record.forget_doubts();
            }
        }
        true
    }

    fn can_go_on(&self, applied: Seq, direction: Direction, epoch: Epoch) -> bool {
        let Some(parting) = &self.parted else { return false };
        let agrees = match (&parting.access, direction) {
            (Some(access), Direction::Target { .. }) => access.applied_upto() == applied,
            (None, Direction::Source { resync }) => {
                let (acknowledged, numbered) = self.pipeline.unsure();
                (acknowledged..=numbered).contains(&applied) && (self.resync.is_some() || !resync)
            }
            _ => false,
        };
        agrees && epoch == self.epoch
    }

    /// The parted session goes on over the link that was just attached.
    pub(super) fn go_on(&mut self, applied: Seq, map_told: bool, direction: Direction) {
        let Some(parting) = self.parted.take() else { return };
        // What was queued without a link.
        self.outbox.clear();
        if let Some(access) = parting.access {
            self.access = Some(access);
            self.telling = match parting.telling {
                Some(Telling::All) if map_told => Some(Telling::All),
                Some(_) => Some(Telling::From(0)),
                None => None,
            };
            return;
        }
        let untold: Vec<_> = self.pipeline.comparisons_upto(applied).collect();
        for token in untold {
            // What the peer found was lost with the link: a copy takes it as if it differed, a verification asks again.
            let request = self.request_mut(token);
            (request.differs, request.untold) = (true, true);
        }
        if let Some(resync) = &mut self.resync
            && resync.goes_on()
        {
            self.outbox.push_back(Outgoing::MarksKept);
        }
        self.pipeline_event(PipelineEvent::SessionGoesOn { applied });
        self.ask_again();
        if direction == (Direction::Source { resync: false }) {
            if self.resync.is_some() {
                // Its last word was lost: the peer has it on record that the copy has ended.
                self.peer_in_sync();
            }
        } else if self.resync.as_ref().is_some_and(crate::mirror::resync::Resync::is_done) {
            self.events.push(Event::ResyncDone { volume: self.index });
        }
    }

    /// As a session's end is told to control.
    pub(super) fn tell_link_end(&mut self, end: LinkEnd) {
        let parted = self.told_of_parting();
        self.events.push(Event::LinkDown {
            volume: self.index,
            reason: end.reason,
            undurable: end.undurable,
            dirty: self.record.is_dirty(),
            moved: end.moved,
            heard: end.heard,
            parted,
        });
    }
}
