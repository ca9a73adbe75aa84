//! Drives a volume's activity log and dirty bitmap: checkpoints, stores, parked changes, and the ends of sessions
//! and service.
//!
//! What to store and when is [`crate::disk::record::Record`]'s to say; here it meets the pipeline, which flushes both
//! disks, and the worker threads.
//!
//! Invariants: before control hears that a session has ended, all that the peer may lack is marked; a quiesce is reported
//! only when both disks are flushed and the record is settled.

use super::interface::{Event, Notice, Op, Origin};
use super::request_table::Request;
use super::{RECORD_JOB, Volume};
use crate::disk::record::{MarkedAll, Touched};
use crate::disk::worker::Job;
use crate::error::IoError;
use crate::limits::IDLE_RETIRE_MS;
use crate::mirror::pipeline::Event as PipelineEvent;
use crate::units::Token;
use crate::wire::Kind;
use std::time::{Duration, Instant};

/// How far a quiesce is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Quiesce {
    /// None was asked for.
    No,
    /// What is under way ends.
    Draining,
    /// Both disks are being flushed.
    Flushing,
    /// The record is being settled.
    Settling,
}

impl Volume {
    /// Marks the whole disk dirty, on record.
    pub fn mark_all(&mut self, done: MarkedAll) {
        if self.disk.is_failed() {
            done(Err("the disk failed".to_owned()));
            return;
        }
        self.record.mark_all(done);
        self.record.tell_marked_all();
    }

    /// Does what is due for the record: cheap when nothing is.
    pub(super) fn tend_record(&mut self, now: Instant) {
        // A failed disk flushes nothing any more.
        if !self.disk.is_failed() && self.record.checkpoint_is_due(now) {
            self.begin_checkpoint();
        }
        let idle = Duration::from_millis(IDLE_RETIRE_MS);
        if self.record.can_retire() && self.background.is_idle_for(now, idle) {
            self.record.settle();
        }
        while let Some(kind) = self.record.next_job(now) {
            self.workers.submit(Job { kind, token: RECORD_JOB });
        }
        while let Some((token, touched)) = self.record.next_ready() {
            self.unpark(token, touched);
        }
        self.receipt_marks();
        self.record.tell_marked_all();
    }

    /// A change that was parked may be made.
    pub(super) fn unpark(&mut self, token: Token, touched: Touched) {
        let request = self.requests.get_mut(token);
        request.touched = Some(touched);
        let (origin, op) = (request.origin, request.op);
        self.make(token);
        if op == Op::Change(Kind::Write) {
            self.notices.push(Notice::Granted { origin, token });
        }
    }

    pub(super) fn begin_checkpoint(&mut self) {
        if let Some(serial) = self.record.begin_checkpoint() {
            let token = self.requests.add(Request::flush(Origin::Checkpoint { serial }));
            self.pipeline_event(PipelineEvent::FlushBackground(token));
        }
    }

    /// A flush that covers everything and that no copy holds back is about to be asked for: a checkpoint rides on it.
    pub(super) fn ride_on_flush(&mut self, token: Token) {
        if self.session.is_source() && !self.pipeline.is_frozen() {
            self.record.ride_on(token);
        }
    }

    /// We are no source any more: marks what the peer may lack.
    pub(super) fn end_source_record(&mut self) {
        let durable = self.pipeline.is_durable_on_both();
        let record = &mut self.record;
        self.pipeline.for_each_unreleased(|range| record.mark(range));
        record.session_ended(durable);
        self.requests.forget_landing_times();
    }

    /// We begin to apply the peer's changes: what we wrote ourselves is accounted for by marks alone from here.
    pub(super) fn begin_target_record(&mut self) {
        if self.record.can_checkpoint() {
            self.begin_checkpoint();
        }
    }

    /// Ends a change that was let through and is given up: some of its bytes may have changed here, and the peer hears
    /// of none.
    pub(super) fn give_up_change(&mut self, token: Token, error: IoError) {
        let request = *self.requests.get(token);
        if let Some(touched) = request.touched {
            self.record.mark(request.range);
            self.record.written(token, request.range, touched);
            // A session goes on only between disks that are equal; without a disk there is but one.
            if !self.diskless.is_active() {
                self.session.end("a change was given up half-way");
                if self.session.is_parted() {
                    let waits = self.pipeline.waits_for_parted();
                    self.end_parting(true);
                    if waits {
                        self.events.push(Event::AskAlone { volume: self.index });
                    }
                }
            }
        }
        self.unlock_and_fail(token, error);
    }

    /// Fails everything that is parked.
    pub(super) fn fail_parked(&mut self, error: IoError) {
        for token in self.record.parked() {
            self.record.give_up(token);
            self.unlock_and_fail(token, error);
        }
    }

    pub(super) fn end_quiesce(&mut self) {
        match self.quiesce {
            Quiesce::No | Quiesce::Flushing => {}
            Quiesce::Draining => {
                if !self.requests.is_making()
                    && self.pipeline.in_flight() == 0
                    && !self.requests.has_waiting()
                    && self.record.parked_len() == 0
                    && !self.diskless.is_fetching()
                    && !self.record.in_checkpoint()
                {
                    self.quiesce = Quiesce::Flushing;
                    self.serving = false;
                    let token = self.requests.add(Request::flush(Origin::Quiesce));
                    self.record.ride_on(token);
                    self.pipeline_event(PipelineEvent::FlushBackground(token));
                }
            }
            Quiesce::Settling => {
                if !self.record.in_checkpoint() {
                    self.record.settle();
                    if self.record.is_settled() {
                        self.quiesce = Quiesce::No;
                        self.events.push(Event::Quiesced { volume: self.index });
                    }
                }
            }
        }
    }
}
