//! One volume in the reactor: it connects parts that each own their fields.
//!
//! | part | owns |
//! | --- | --- |
//! | `RequestTable` | requests under way, range locks, grants |
//! | [`Pipeline`] | order, acknowledgement and flush of this node's changes |
//! | [`Record`] | activity log, dirty bitmap, and their stores |
//! | `Background` | copy, verification, throttle |
//! | `Session` | link, queued frames, standby side, silence |
//! | `Diskless` | the peer's disk in place of one that failed |
//!
//! Front ends come in through [`Volume::begin`], [`Volume::landed`] and friends (`requests.rs`); the link through [`Volume::poll`]
//! (`link.rs`). What follows for front ends stands in [`Volume::notices`], for control in [`Volume::events`]; the reactor empties both
//! each turn. Nothing here blocks, and in the steady state nothing allocates.

use crate::disk::image::DiskImage;
use crate::disk::record::Record;
use crate::disk::worker::{DiskWorkers, Job, JobDone, JobKind};
use crate::error::IoError;
use crate::limits::WINDOW_LEN;
use crate::mirror::pipeline::{Action, Change, Pipeline};
use crate::units::Token;
use crate::wire::Kind;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

mod background;
mod checkpoint;
mod diskless;
pub mod interface;
mod link;
mod parting;
mod request_table;
mod requests;
mod resync;
mod session;
mod verify;

pub use interface::{Begin, NewRequest, Notice, Op, Origin, Verified};

use background::Background;
use checkpoint::Quiesce;
use interface::{Event, VolumeCounters, VolumeSpec};
use request_table::RequestTable;
use session::{ACCESS_FLUSH_BASE, SETTLE_FLUSH_BASE, Session};

/// Token of the flush the pipeline asked for.
const PIPELINE_FLUSH: Token = Token(u64::MAX);
/// Token of the change the access side waits for.
const ACCESS_CHANGE: Token = Token(u64::MAX - 2);
/// Token of the record's stores.
const RECORD_JOB: Token = Token(u64::MAX - 3);

/// A volume.
pub struct Volume {
    index: usize,
    name: String,
    disk: Arc<DiskImage>,
    disk_failure_told: bool,
    diskless: diskless::Diskless,
    workers: DiskWorkers,
    serving: bool,
    quiesce: Quiesce,
    refusal: String,

    requests: RequestTable,
    pipeline: Pipeline,
    actions: Vec<Action>,
    record: Record,
    background: Background,
    session: Session,
    /// When the present turn began.
    now: Instant,

    counters: Arc<VolumeCounters>,
    /// For front ends.
    pub notices: Vec<Notice>,
    /// For control.
    pub events: Vec<Event>,
}

impl Volume {
    /// A volume that serves nobody and has no session.
    #[must_use]
    pub fn new(index: usize, spec: VolumeSpec, workers: DiskWorkers, now: Instant) -> Self {
        Self {
            index,
            refusal: format!(
                "volume {}: this node has not agreed with its peer yet who serves it",
                spec.name
            ),
            name: spec.name,
            disk: spec.disk,
            disk_failure_told: false,
            diskless: diskless::Diskless::default(),
            workers,
            serving: false,
            quiesce: Quiesce::No,
            requests: RequestTable::new(),
            pipeline: Pipeline::new(spec.ack, spec.on_peer_loss),
            actions: Vec::with_capacity(2 * WINDOW_LEN),
            record: spec.record,
            background: Background::new(spec.checksum_first),
            session: Session::new(now),
            now,
            counters: Arc::new(VolumeCounters::default()),
            notices: Vec::with_capacity(WINDOW_LEN),
            events: Vec::new(),
        }
    }

    /// The same with counters that control has already.
    #[must_use]
    pub fn counted_by(mut self, counters: Arc<VolumeCounters>) -> Self {
        self.counters = counters;
        self
    }

    /// Export name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &Arc<DiskImage> {
        &self.disk
    }

    /// What control reads.
    #[must_use]
    pub fn counters(&self) -> Arc<VolumeCounters> {
        Arc::clone(&self.counters)
    }

    /// Why new clients are turned away, if they are.
    #[must_use]
    pub fn refusal(&self) -> Option<&str> {
        if self.serving && self.quiesce == Quiesce::No { None } else { Some(&self.refusal) }
    }

    /// Serves clients from now on. A quiesce that was under way is given up and reports nothing any more.
    pub fn serve(&mut self) {
        self.serving = true;
        self.quiesce = Quiesce::No;
        self.background.resume();
        // Its flush may end long after: that must not vouch for the next quiesce.
        self.requests.disown(Origin::Quiesce);
    }

    /// Sets what clients are told while they are turned away.
    pub fn set_refusal(&mut self, text: String) {
        self.refusal = text;
    }

    /// Fails what is under way and turns clients away. The caller closes their connections.
    pub fn stop_serving(&mut self) {
        self.serving = false;
        self.quiesce = Quiesce::No;
        self.end_parting(true);
        self.end_verify("this node stopped serving the volume");
        self.end_diskless();
        self.fail_all(IoError::NotPrimary);
        self.background.resume();
    }

    /// Admits nothing more and flushes once everything under way is done. The caller ends writes that wait.
    pub fn quiesce(&mut self) {
        self.quiesce = Quiesce::Draining;
        self.background.pause();
    }

    /// The peer's absence is on record.
    pub fn go_alone(&mut self) {
        self.end_parting(true);
        self.pipeline_event(crate::mirror::pipeline::Event::GoAlone);
    }

    /// The peer is in sync, on record.
    pub fn peer_in_sync(&mut self) {
        // Until here a lost link left the peer behind.
        self.background.end_copy();
        self.pipeline_event(crate::mirror::pipeline::Event::PeerInSync);
    }

    /// Takes the result of a disk job.
    pub fn job_done(&mut self, done: JobDone) {
        self.workers.ended();
        let failed = done.result.is_err();
        if let Err(error) = done.result {
            self.disk_failed(&error.to_string());
        }
        match done.token {
            RECORD_JOB => self.record.job_done(&done.kind, failed),
            PIPELINE_FLUSH if !failed => self.pipeline_event(crate::mirror::pipeline::Event::FlushedLocal),
            ACCESS_CHANGE => self.access_job_done(failed),
            PIPELINE_FLUSH => {}
            Token(at) if at >= SETTLE_FLUSH_BASE && failed => {}
            token if token.0 >= ACCESS_FLUSH_BASE => self.session.flushed(token),
            token if token.0 >= SETTLE_FLUSH_BASE => self.settled(token),
            token => self.local_change_done(token, failed),
        }
    }

    /// A turn begins.
    pub fn woke(&mut self, now: Instant) {
        self.now = now;
    }

    /// When something is due that no event will announce.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.background.due()
    }

    /// Starts what is due after a turn's events: grants, the background copy, a finished quiesce, outgoing frames.
    pub fn pump(&mut self, now: Instant) {
        self.now = now;
        self.background.turn(now);
        self.pump_detach(now);
        self.ask_if_parted_long(now);
        self.serve_granted();
        if let Some(token) = self.requests.pin_in_the_way() {
            self.notices.push(Notice::Unpin { token });
        }
        self.tend_record(now);
        self.step_resync(now);
        self.step_verify(now);
        self.end_quiesce();
        if self.disk.is_failed() {
            self.disk_failed(
                "a page could not be read or written (truncated file, I/O error or full file system)",
            );
        }
        self.pump_link(now);
        if self.disk.is_failed() {
            // What was to be posted met the failure.
            self.disk_failed("a page could not be read");
        }
        self.publish();
    }

    fn publish(&self) {
        let c = &self.counters;
        c.dirty_bytes.store(self.record.dirty().dirty_bytes(), Ordering::Relaxed);
        c.in_flight.store(self.pipeline.in_flight() as u64, Ordering::Relaxed);
        c.frozen.store(
            self.serving && self.pipeline.in_flight() > 0 && self.pipeline.is_frozen(),
            Ordering::Relaxed,
        );
        self.background.publish(c, self.disk.size());
    }

    fn pipeline_event(&mut self, event: crate::mirror::pipeline::Event) {
        self.pipeline.handle(event, &mut self.actions).expect("only acks err");
        self.perform();
    }

    /// Carries the pipeline's actions out, in order.
    fn perform(&mut self) {
        let mut actions = std::mem::take(&mut self.actions);
        for action in actions.drain(..) {
            match action {
                Action::Post(seq, change) => self.session.queue_post(seq, change),
                Action::FlushPeer(seq) => self.session.queue_flush(seq),
                Action::FlushLocal => {
                    self.workers.submit(Job { kind: JobKind::Flush, token: PIPELINE_FLUSH });
                }
                Action::Release(change) => self.released(change),
                Action::Complete(token) => self.completed(token),
                Action::MarkDirty(range) => self.record.mark(range),
                Action::AskAlone => self.events.push(Event::AskAlone { volume: self.index }),
            }
        }
        self.actions = actions;
    }

    fn released(&mut self, change: Change) {
        self.requests.unlock(change.token);
        let request = self.requests.get_mut(change.token);
        let (origin, completed, equal) = (request.origin, request.completed, !request.differs);
        let told = (!request.untold).then_some(equal);
        let (landed_at, touched) = (request.landed_at, request.touched.take());
        if let Some(landed) = landed_at {
            self.background.released(landed, self.now);
        }
        if let Some(touched) = touched {
            self.record.written(change.token, change.range, touched);
        }
        if change.kind == Kind::Write {
            self.passed_through(change.range);
        }
        if let Origin::Verify { serial } = origin {
            self.step_compared(serial, change.range, told);
            // A step that a session's end cut off is never completed. One whose verification alone has ended is.
            if !completed && !self.session.is_source() {
                self.requests.remove(change.token);
                return;
            }
        }
        if let Origin::Resync { serial } = origin {
            self.background.copy_step_released(serial, change.kind, change.range, !equal);
            // A step that a session's end cut off is never completed.
            if !completed && !self.background.is_copying() {
                self.requests.remove(change.token);
                return;
            }
        }
        if completed {
            self.requests.remove(change.token);
        }
    }

    fn completed(&mut self, token: Token) {
        let request = self.requests.get_mut(token);
        request.completed = true;
        let (origin, locked, op) = (request.origin, request.locked, request.op);
        let result = if request.lost { Err(IoError::DiskFailed) } else { Ok(()) };
        if !locked {
            self.requests.remove(token);
        }
        if matches!(op, Op::Change(_)) && !origin.is_background() {
            self.counters.changes_done.fetch_add(1, Ordering::Relaxed);
        }
        if op == Op::Flush {
            self.record.flush_ended(token);
        }
        match origin {
            Origin::Resync { .. } | Origin::Verify { .. } | Origin::Nobody => {}
            Origin::Checkpoint { serial } => self.record.flushed(serial),
            Origin::ResyncFlush { serial } => self.copy_flushed(serial),
            Origin::Quiesce => self.quiesce = Quiesce::Settling,
            Origin::Nbd { .. } | Origin::Queue { .. } => {
                self.notices.push(Notice::Done { origin, result });
            }
        }
    }

    /// The medium failed: go on without it where that is possible.
    fn disk_failed(&mut self, error: &str) {
        self.disk.fail();
        if !self.outlives_disk(error) {
            self.disk_lost(error);
        }
    }

    /// Nothing is left to serve from: say so once, fail what is under way, end the session.
    fn disk_lost(&mut self, error: &str) {
        self.end_diskless();
        if std::mem::replace(&mut self.disk_failure_told, true) {
            return;
        }
        self.events.push(Event::DiskFailed { volume: self.index, error: error.to_owned() });
        self.session.end("the local disk failed");
        self.end_parting(true);
        self.end_verify("the local disk failed");
        self.fail_all(IoError::DiskFailed);
        self.record.fail_marked_all(error);
    }

    /// Ends every request under way with `error`, except writes that were let through and are being put in place (their
    /// front end ends those).
    fn fail_all(&mut self, error: IoError) {
        let (mut tokens, mut locked) = (Vec::new(), Vec::new());
        if self.session.is_source() && self.pipeline.in_flight() > 0 {
            // Numbers were given out that will never be posted, and the copy counts on steps that never end.
            self.session.end("open requests were given up");
        }
        self.fail_parked(error);
        self.pipeline.abandon(&mut tokens, &mut locked);
        self.session.keep_control_only();
        for change in locked {
            if change.kind != Kind::Verify {
                self.record.mark(change.range);
            }
            self.requests.unlock(change.token);
            let request = self.requests.get_mut(change.token);
            let (touched, completed) = (request.touched.take(), request.completed);
            if let Some(touched) = touched {
                self.record.written(change.token, change.range, touched);
            }
            if completed {
                self.requests.remove(change.token);
            }
        }
        self.requests.take_back_waiting(&mut tokens);
        self.cancel_fetches(&mut tokens);
        for token in tokens {
            self.fail(token, error);
        }
        while let Some(token) = self.requests.take_back_granted() {
            self.fail(token, error);
        }
    }

    fn fail(&mut self, token: Token, error: IoError) {
        let origin = self.requests.remove(token).origin;
        if matches!(origin, Origin::Nbd { .. } | Origin::Queue { .. }) {
            self.notices.push(Notice::Done { origin, result: Err(error) });
        }
    }
}

#[cfg(test)]
mod tests;
