//! The online verification in a volume: its steps beside clients' requests, and what follows from what it finds.
//!
//! Control asks for one while both disks are in sync ([`Volume::verify`]) and hears of its end exactly once
//! ([`Event::Verified`]). What differs is marked in the dirty bitmap. With `repair` the marked ranges are then copied over
//! the running session by the background copy, which clears them once they are durable on both nodes; without, the marks
//! stay, and the next session copies them.

use super::Volume;
use super::background::Compared;
use super::checkpoint::Quiesce;
use super::interface::{Event, Origin, Verified};
use super::request_table::Request;
use crate::mirror::pipeline::Event as PipelineEvent;
use crate::units::ByteRange;
use std::time::Instant;

impl Volume {
    /// Compares the peer's disk with this one, whatever clients write meanwhile. [`Event::Verified`] follows.
    pub fn verify(&mut self, repair: bool) {
        let refusal = if self.background.is_verifying() {
            "a verification is under way already"
        } else if !self.session.is_source() || !self.session.has_link() {
            "there is no session in which this node is the source"
        } else if self.diskless.is_active() {
            "this node's disk failed"
        } else if self.background.is_copying() {
            "the peer's disk is being copied to"
        } else if self.quiesce != Quiesce::No {
            "the volume is being handed over"
        } else {
            let grain_len = self.record.dirty().geometry().grain_len();
            self.background.begin_verify(self.disk.size(), grain_len, repair);
            return;
        };
        self.tell_verified(Verified { unfinished: Some(refusal.to_owned()), ..Verified::default() });
    }

    /// Lets a verification end early, with what it found so far.
    pub fn stop_verify(&mut self) {
        if !self.background.repairs() {
            self.end_verify("it was stopped");
        }
    }

    /// Ends a verification before its end: it tells nothing about what it did not reach.
    pub(super) fn end_verify(&mut self, why: &str) {
        if let Some(findings) = self.background.cut_verify() {
            // Nobody waits for it: a clean end stores what is marked before it calls itself clean.
            let _ = self.record.ask_store();
            self.tell_verified(Verified { findings, repaired: false, unfinished: Some(why.to_owned()) });
        }
    }

    fn tell_verified(&mut self, outcome: Verified) {
        // The last step's publication may have been before its end.
        self.counters.compared(&outcome.findings, self.disk.size());
        self.events.push(Event::Verified { volume: self.index, outcome });
    }

    /// Begins what steps may begin, and ends a verification that has compared all.
    pub(super) fn step_verify(&mut self, now: Instant) {
        if !self.background.is_verifying() || self.session.is_parted() {
            return;
        }
        while let Some(step) = self.background.next_verify_step(now, &self.disk) {
            if !self.begin_step(step) {
                return;
            }
        }
        match self.background.compared() {
            Some(Compared::All { repair }) => self.all_compared(repair),
            Some(Compared::Marking(round)) if self.record.is_stored(round) => self.finish_verify(false),
            Some(Compared::Marking(_)) | None => {}
        }
    }

    /// The peer has looked at the step's range, at this point of the write order. What it found is `None` where a link broke
    /// before it was told.
    pub(super) fn step_compared(&mut self, serial: u64, range: ByteRange, equal: Option<bool>) {
        if self.background.step_compared(serial, range, equal) {
            tracing::warn!(volume = %self.name, %range, "verification: the peer's bytes differ");
            self.record.mark(range);
        }
    }

    /// Every step is done.
    fn all_compared(&mut self, repair: bool) {
        let round = self.record.ask_store();
        // What an earlier one found may be equal by now, and is marked still.
        if repair && self.record.is_dirty() {
            self.background.repair(self.record.dirty());
            return;
        }
        self.background.marks(round);
        // Its steps count as changes: until a flush the peer would seem to lag behind.
        let token = self.requests.add(Request::flush(Origin::Nobody));
        self.pipeline_event(PipelineEvent::FlushBackground(token));
        if self.record.is_stored(round) {
            self.finish_verify(false);
        }
    }

    fn finish_verify(&mut self, repaired: bool) {
        if let Some(findings) = self.background.finish_verify() {
            self.tell_verified(Verified { findings, repaired, unfinished: None });
        }
    }

    /// A copy has ended, durable on both nodes. Returns whether it was a verification's own.
    pub(super) fn repair_done(&mut self) -> bool {
        let repairing = self.background.repairs();
        if repairing {
            self.background.end_copy();
            self.finish_verify(true);
        }
        repairing
    }
}
