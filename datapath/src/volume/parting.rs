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
//!   peer had applied are known as such (`Record::doubt`) as long as the peer lives on; and they are cleared only after a
//!   flush, like any others.
//! - A primary without a disk keeps its questions as well, and asks again for what is missing of their answers. It has nothing to
//!   go alone with: when its clients have waited long enough, its service ends.
//! - A session does not go on after this node broke its order itself: gave up a change, changed its role, lost its disk.

use super::Volume;
use super::checkpoint::Quiesce;
use super::interface::{Before, Direction, Event, Parted};
use crate::limits::WINDOW_LEN;
use crate::mirror::pipeline::Event as PipelineEvent;
use crate::transport::DownReason;
use crate::units::{Epoch, Seq};
use std::time::{Duration, Instant};

impl Volume {
    /// Whether the session whose link is gone may go on.
    pub(super) fn may_part(&self, reason: &DownReason) -> bool {
        // Without a disk all is at the peer, as before.
        let has_disk = !self.disk.is_failed() && (!self.diskless.is_active() || self.reads_from_peer());
        has_disk && !self.background.repairs() && self.session.may_part(reason)
    }

    /// The link is gone and the session waits for another.
    pub(super) fn part(&mut self) {
        if self.session.is_source() {
            // How long what is under way will have taken is the peer's absence.
            self.requests.forget_landing_times();
            self.pipeline_event(PipelineEvent::SessionParted);
        }
        self.session.part(self.waits_for_parted());
    }

    fn waits_for_parted(&self) -> bool {
        self.pipeline.waits_for_parted() || self.diskless.is_fetching()
    }

    /// What this end knows of the session, for the peer to compare with what it knows.
    pub(super) fn told_of_parting(&self) -> Option<Parted> {
        self.session.told_of_parting(self.pipeline.unsure(), !self.background.awaits_map())
    }

    /// When clients have waited long enough for the peer of a parted session. Control is asked then.
    pub(super) fn time_parting(&mut self, now: Instant, timeout: Duration) -> Option<Instant> {
        let due = self.session.patience_ends(timeout)?;
        self.ask_if_parted_long(now);
        (due > now).then_some(due)
    }

    /// Asks control whether to go on alone, once a client waits, or the flush that ends a quiesce, and the peer was not heard for
    /// long.
    pub(super) fn ask_if_parted_long(&mut self, now: Instant) {
        let waits = self.waits_for_parted() || self.quiesce == Quiesce::Flushing;
        if !self.session.is_parted() || !self.session.is_out_of_patience(now, waits) {
            return;
        }
        if self.reads_from_peer() {
            self.disk_lost("and the link to the peer, whose disk was used instead, is gone");
        } else {
            self.events.push(Event::AskAlone { volume: self.index });
        }
    }

    /// The session that is parted, if one is, does not go on. `lacking`: the peer may lack what was posted to it.
    pub(super) fn end_parting(&mut self, lacking: bool) {
        if !self.session.give_up_parted() {
            return;
        }
        self.record.forget_told();
        if !self.session.is_source() {
            return;
        }
        self.end_verify("the session ended");
        if lacking {
            let mut unsure: Vec<_> = self.pipeline.unsure_steps().collect();
            if let Some(copy) = self.background.copy_mut() {
                // Before anything else is marked: what was written there since may be lacking.
                for range in copy.applied_whole() {
                    self.record.doubt(range);
                }
                unsure.extend(copy.applied_in_part().take(WINDOW_LEN).map(|range| (Seq::ZERO, range)));
            }
            self.background.end_copy();
            self.end_source_record();
            // Behind their own marks, and before those of clients' changes.
            for (seq, range) in unsure {
                self.record.unsure(seq, range);
            }
        }
        self.background.end_copy();
        self.session.end_source();
        self.pipeline_event(PipelineEvent::SessionGivenUp { lacking });
    }

    /// Over a new link, what was before it: a session that goes on, or one that does not. False where it should go on and
    /// cannot.
    pub(super) fn settle_parting(&mut self, before: Before, direction: Direction, epoch: Epoch) -> bool {
        match before {
            Before::GoesOn { applied, .. } => {
                let (unsure, is_copying) = (self.pipeline.unsure(), self.background.is_copying());
                let holds = self.session.can_go_on(applied, direction, epoch, unsure, is_copying);
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

    /// The parted session goes on over the link that was just attached.
    pub(super) fn go_on(&mut self, applied: Seq, map_told: bool, direction: Direction) {
        if !self.session.go_on(map_told) {
            return;
        }
        let untold: Vec<_> = self.pipeline.comparisons_upto(applied).collect();
        for token in untold {
            // What the peer found was lost with the link: a copy takes it as if it differed, a verification asks again.
            let request = self.requests.get_mut(token);
            (request.differs, request.untold) = (true, true);
        }
        if let Some(copy) = self.background.copy_mut()
            && copy.goes_on()
        {
            self.session.queue_marks_kept();
        }
        self.pipeline_event(PipelineEvent::SessionGoesOn { applied });
        self.ask_again();
        if direction == (Direction::Source { resync: false }) {
            if self.background.is_copying() {
                // Its last word was lost: the peer has it on record that the copy has ended.
                self.peer_in_sync();
            }
        } else if self.background.copy_is_done() {
            self.events.push(Event::ResyncDone { volume: self.index });
        }
    }
}
