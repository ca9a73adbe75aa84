//! One volume in the reactor: connects its disk, range locks, pipeline or standby side, and link.
//!
//! Front ends come in through [`Volume::begin`], [`Volume::landed`] and friends (`requests.rs`); the link through
//! [`Volume::poll`] (`session.rs`; `links.rs` while there are two). What follows for front ends stands in [`Volume::notices`], for control in
//! [`Volume::events`]; the reactor empties both each turn. Nothing here blocks, and in the steady state nothing
//! allocates.

use crate::access::Access;
use crate::disk::image::DiskImage;
use crate::disk::inflight::Inflight;
use crate::disk::record::{Record, Round, Touched};
use crate::disk::worker::{DiskWorkers, Job, JobDone, JobKind};
use crate::error::IoError;
use crate::limits::{CLIENTS_BUSY_MS, WAITERS_LEN, WINDOW_LEN};
use crate::mirror::pipeline::{Action, Change, Pipeline};
use crate::mirror::resync::Resync;
use crate::mirror::throttle::{Landed, Throttle};
use crate::reactor::command::{Event, VolumeCounters, VolumeSpec};
use crate::transport::{Link, LinkEvent, Slot};
use crate::units::{ByteRange, Epoch, Seq, Token};
use crate::wire::Kind;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

mod checkpoint;
mod diskless;
mod parting;
mod requests;
mod resync;
mod session;
mod verify;

pub use requests::{Begin, NewRequest, Op};
pub use verify::Verified;

use checkpoint::{MarkedAllWaits, Quiesce};
use resync::Telling;

/// Token of the flush the pipeline asked for.
const PIPELINE_FLUSH: Token = Token(u64::MAX);
/// The same for the flush after a target's session.
const SETTLE_FLUSH_BASE: u64 = 1 << 61;
/// Tokens of flushes the access side asked for: this plus the session's serial, so that one of an ended session is known.
const ACCESS_FLUSH_BASE: u64 = 1 << 62;
/// Token of the change the access side waits for.
const ACCESS_CHANGE: Token = Token(u64::MAX - 2);
/// Token of the record's stores.
const RECORD_JOB: Token = Token(u64::MAX - 3);

/// Who made a request, and so who hears of its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// An NBD connection of the reactor (index and serial) and its cookie.
    Nbd {
        /// Index of the connection.
        connection: u32,
        /// Tells it from an earlier one at the same index.
        serial: u32,
        /// The client's handle.
        cookie: u64,
    },
    /// An in-process queue of the reactor.
    Queue {
        /// Index of the queue.
        queue: u32,
        /// Place of the operation in the queue's table.
        slot: u32,
    },
    /// A step of the background copy number `serial`.
    Resync {
        /// Tells its steps from an earlier copy's.
        serial: u64,
    },
    /// A flush for the background copy number `serial`.
    ResyncFlush {
        /// Tells it from an earlier copy's, which must not vouch for this one.
        serial: u64,
    },
    /// A step of the verification number `serial`.
    Verify {
        /// Tells its steps from an earlier one's.
        serial: u64,
    },
    /// The flush of the checkpoint number `serial`.
    Checkpoint {
        /// As the record numbered it.
        serial: u64,
    },
    /// The flush that ends a quiesce.
    Quiesce,
    /// A client that is gone.
    Nobody,
}

impl Origin {
    /// A step that no client asked for.
    fn is_background(self) -> bool {
        matches!(self, Self::Resync { .. } | Self::Verify { .. })
    }
}

/// What a front end gets to hear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Notice {
    /// A request that waited may go on, as after [`Begin::Go`].
    Granted {
        /// Whose.
        origin: Origin,
        /// Its token.
        token: Token,
    },
    /// A request ended. Its token is void.
    Done {
        /// Whose.
        origin: Origin,
        /// How.
        result: Result<(), IoError>,
    },
    /// A slow reader's reply stands in the way of a change: copy the rest of it out and unpin.
    Unpin {
        /// The token that pins.
        token: Token,
    },
}

#[derive(Clone, Copy, Debug)]
struct Request {
    origin: Origin,
    op: Op,
    range: ByteRange,
    flags: u8,
    /// Holds its range lock.
    locked: bool,
    /// How the record let it through.
    touched: Option<Touched>,
    /// The pipeline has it.
    landed: bool,
    completed: bool,
    /// Its bytes were lost with the disk.
    lost: bool,
    /// A comparison, and the peer says that its bytes are others.
    differs: bool,
    /// A comparison whose outcome was lost with the link.
    untold: bool,
    /// When a client's change landed.
    landed_at: Option<Landed>,
}

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
    /// The copy starts no steps from a quiesce to what control makes of it: with a step always under way there would be
    /// nothing to wait for, and afterwards nothing that could be stopped without ending the session.
    copy_paused: bool,
    refusal: String,

    requests: Vec<Option<Request>>,
    requests_free: Vec<usize>,
    receiving: usize,
    inflight: Inflight,
    granted: Vec<Token>,
    pipeline: Pipeline,
    actions: Vec<Action>,
    /// A copy asks the peer first whether its bytes are others.
    checksum_first: bool,
    record: Record,
    /// The flush that a checkpoint rides on, and its number.
    riding: Option<(Token, u64)>,
    /// Stores after which somebody outside hears.
    marked_all: MarkedAllWaits,
    /// The store of what the target has marked.
    map_round: Option<Round>,
    /// What we have to tell the source of our marks.
    telling: Option<Telling>,
    resync: Option<Resync>,
    resync_serial: u64,
    verifying: Option<verify::Verifying>,
    verify_serial: u64,
    /// How fast the copy and the verification may go, and when their next step is due.
    throttle: Throttle,
    throttle_due: Option<Instant>,
    /// When the present turn began.
    now: Instant,
    /// What the turn before spent on background steps: a request that came meanwhile waited for it unseen.
    stalled: Duration,
    /// A request came since the last turn's end; when the last one came; whether that is recent.
    client_came: bool,
    last_client: Option<Instant>,
    clients_busy: bool,

    epoch: Epoch,
    /// Counts the access side's lives.
    session_serial: u64,
    link: Option<Box<dyn Link>>,
    link_events: Vec<LinkEvent>,
    /// The peer broke the protocol; the link's end is on its way.
    link_distrusted: bool,
    /// This node broke the session's order itself: it cannot go on over another link.
    session_void: bool,
    /// A session without a link, which may go on. `source` holds for that one then.
    parted: Option<parting::Parting>,
    /// Clients wait, and have since the peer was heard then: links came and went, and nothing of the session got through.
    stalled_since: Option<Instant>,
    /// The session went on over this link or one before.
    gone_on: bool,
    /// Counts the flushes after a target's session.
    settle_serial: u64,
    /// Something of the session got through over the present link.
    link_moved: bool,
    source: bool,
    outbox: VecDeque<Outgoing>,
    access: Option<Access>,
    /// The session would have made us a target, and ends instead; control has it on record as one.
    target_refused: bool,
    arrived: VecDeque<Slot>,
    access_job: Option<Slot>,
    /// A session ended; control hears of it once nothing is being applied any more.
    down_deferred: Option<parting::LinkEnd>,
    heard_bytes: u64,
    last_heard: Instant,
    last_sent: Instant,
    /// When [`Volume::keep_alive`] was last called.
    last_kept: Instant,
    /// When the peer last acknowledged something, or nothing waited for it.
    last_answer: Instant,

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
            copy_paused: false,
            requests: Vec::with_capacity(WINDOW_LEN),
            requests_free: Vec::with_capacity(WINDOW_LEN),
            receiving: 0,
            inflight: Inflight::new(WINDOW_LEN, WAITERS_LEN),
            granted: Vec::with_capacity(WINDOW_LEN),
            pipeline: Pipeline::new(spec.ack, spec.on_peer_loss),
            actions: Vec::with_capacity(2 * WINDOW_LEN),
            checksum_first: spec.checksum_first,
            record: spec.record,
            riding: None,
            marked_all: Vec::new(),
            map_round: None,
            telling: None,
            resync: None,
            resync_serial: 0,
            verifying: None,
            verify_serial: 0,
            throttle: Throttle::new(),
            throttle_due: None,
            now,
            stalled: Duration::ZERO,
            client_came: false,
            last_client: None,
            clients_busy: false,
            epoch: Epoch::ZERO,
            session_serial: 0,
            link: None,
            link_events: Vec::with_capacity(crate::limits::LINK_EVENTS_MAX),
            link_distrusted: false,
            session_void: false,
            parted: None,
            stalled_since: None,
            gone_on: false,
            settle_serial: 0,
            link_moved: false,
            source: false,
            outbox: VecDeque::with_capacity(WINDOW_LEN),
            access: None,
            target_refused: false,
            arrived: VecDeque::new(),
            access_job: None,
            down_deferred: None,
            heard_bytes: 0,
            last_heard: now,
            last_sent: now,
            last_answer: now,
            last_kept: now,
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
        self.copy_paused = false;
        for request in self.requests.iter_mut().flatten().filter(|r| r.origin == Origin::Quiesce) {
            // Its flush may end long after: that must not vouch for the next quiesce.
            request.origin = Origin::Nobody;
        }
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
        self.copy_paused = false;
    }

    /// Admits nothing more and flushes once everything under way is done. The caller ends writes that wait.
    pub fn quiesce(&mut self) {
        self.quiesce = Quiesce::Draining;
        self.copy_paused = true;
    }

    /// The peer's absence is on record.
    pub fn go_alone(&mut self) {
        self.end_parting(true);
        self.pipeline_event(crate::mirror::pipeline::Event::GoAlone);
    }

    /// The peer is in sync, on record.
    pub fn peer_in_sync(&mut self) {
        // Until here a lost link left the peer behind.
        self.end_copy();
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
            Token(token) if (SETTLE_FLUSH_BASE..ACCESS_FLUSH_BASE).contains(&token) => {
                if !failed {
                    self.settled(token - SETTLE_FLUSH_BASE);
                }
            }
            Token(token) if token >= ACCESS_FLUSH_BASE => {
                let parted = self.parted.as_mut().and_then(parting::Parting::access_mut);
                if let Some(access) = self.access.as_mut().or(parted)
                    && token == ACCESS_FLUSH_BASE + self.session_serial
                    && !failed
                {
                    access.flushed();
                }
            }
            token => self.local_change_done(token, failed),
        }
    }

    /// Whether anything is under way that the link will answer soon: worth spinning for.
    #[must_use]
    pub fn expects_link(&self) -> bool {
        self.link.is_some()
            && (self.access.is_some() || self.pipeline.in_flight() > 0 || self.diskless.is_fetching())
    }

    /// Whether the link is to be looked at each turn, as that costs nothing.
    #[must_use]
    pub fn link_polls_for_free(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.polls_for_free())
    }

    /// Before the reactor sleeps on the link's descriptor. False when the link has something to tell already.
    pub fn prepare_sleep(&mut self) -> bool {
        self.link.as_mut().is_none_or(|link| link.prepare_sleep())
    }

    /// A turn begins.
    pub fn woke(&mut self, now: Instant) {
        self.now = now;
    }

    /// When something is due that no event will announce.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.throttle_due
    }

    /// Starts what is due after a turn's events: grants, the background copy, a finished quiesce, outgoing frames.
    pub fn pump(&mut self, now: Instant) {
        self.now = now;
        self.stalled = Duration::ZERO;
        self.throttle_due = None;
        self.pump_detach(now);
        self.ask_if_parted_long(now);
        self.serve_granted();
        if let Some(token) = self.inflight.pin_in_the_way() {
            self.notices.push(Notice::Unpin { token });
        }
        if std::mem::take(&mut self.client_came) {
            self.last_client = Some(now);
        }
        let busy = Duration::from_millis(CLIENTS_BUSY_MS);
        self.clients_busy = self.last_client.is_some_and(|at| now.duration_since(at) < busy);
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
        c.dirty_bytes.store(self.record.dirty.dirty_bytes(), Ordering::Relaxed);
        c.in_flight.store(self.pipeline.in_flight() as u64, Ordering::Relaxed);
        c.frozen.store(
            self.serving && self.pipeline.in_flight() > 0 && self.pipeline.is_frozen(),
            Ordering::Relaxed,
        );
        c.resyncing.store(self.resync.is_some(), Ordering::Relaxed);
        self.publish_verify();
        if let Some(resync) = &self.resync {
            let (total, done) = resync.progress();
            c.resync_total_bytes.store(total, Ordering::Relaxed);
            c.resync_done_bytes.store(done, Ordering::Relaxed);
            let percent = u128::from(done) * 10_000 / u128::from(total.max(1));
            let percent = if total == 0 { 0 } else { u64::try_from(percent).expect("10,000 at most") };
            c.resync_percent_x100.store(percent, Ordering::Relaxed);
        }
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
                Action::Post(seq, change) => self.outbox.push_back(Outgoing::Post(seq, change)),
                Action::FlushPeer(seq) => self.outbox.push_back(Outgoing::Flush(seq)),
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
        self.inflight.release(change.token, change.range.start, &mut self.granted);
        let request = self.request_mut(change.token);
        request.locked = false;
        let (origin, completed, equal) = (request.origin, request.completed, !request.differs);
        let told = (!request.untold).then_some(equal);
        let (landed_at, touched) = (request.landed_at, request.touched.take());
        if let Some(landed) = landed_at {
            self.throttle.released(landed, self.now);
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
            if !completed && !self.source {
                self.drop_request(change.token);
                return;
            }
        }
        if let Origin::Resync { serial } = origin {
            self.resync_step_released(serial, change.kind, change.range, !equal);
            // A step that a session's end cut off is never completed.
            if !completed && self.resync.is_none() {
                self.drop_request(change.token);
                return;
            }
        }
        if completed {
            self.drop_request(change.token);
        }
    }

    fn completed(&mut self, token: Token) {
        let request = self.request_mut(token);
        request.completed = true;
        let (origin, locked, op) = (request.origin, request.locked, request.op);
        let result = if request.lost { Err(IoError::DiskFailed) } else { Ok(()) };
        if !locked {
            self.drop_request(token);
        }
        if matches!(op, Op::Change(_)) && !origin.is_background() {
            self.counters.changes_done.fetch_add(1, Ordering::Relaxed);
        }
        if op == Op::Flush {
            self.flush_ended(token);
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
        self.end_session("the local disk failed");
        self.end_parting(true);
        self.end_verify("the local disk failed");
        self.fail_all(IoError::DiskFailed);
        for (_, done) in self.marked_all.drain(..) {
            done(Err(error.to_owned()));
        }
    }

    /// Ends every request under way with `error`, except writes that were let through and are being put in place (their
    /// front end ends those).
    fn fail_all(&mut self, error: IoError) {
        let (mut tokens, mut locked) = (Vec::new(), Vec::new());
        if self.source && self.pipeline.in_flight() > 0 {
            // Numbers were given out that will never be posted, and the copy counts on steps that never end.
            self.end_session("open requests were given up");
        }
        self.fail_parked(error);
        self.pipeline.abandon(&mut tokens, &mut locked);
        self.outbox.retain(|outgoing| matches!(outgoing, Outgoing::Control { .. }));
        for change in locked {
            if change.kind != Kind::Verify {
                self.record.mark(change.range);
            }
            self.inflight.release(change.token, change.range.start, &mut self.granted);
            let request = self.request_mut(change.token);
            request.locked = false;
            let (touched, completed) = (request.touched.take(), request.completed);
            if let Some(touched) = touched {
                self.record.written(change.token, change.range, touched);
            }
            if completed {
                self.drop_request(change.token);
            }
        }
        self.inflight.cancel_all(&mut tokens);
        self.cancel_fetches(&mut tokens);
        for token in tokens {
            self.fail(token, error);
        }
        let granted = std::mem::take(&mut self.granted);
        for token in granted {
            let request = *self.request_mut(token);
            if matches!(request.op, Op::Change(_)) {
                self.inflight.release(token, request.range.start, &mut self.granted);
            } else {
                self.inflight.unpin(token, &mut self.granted);
            }
            self.fail(token, error);
        }
    }

    fn fail(&mut self, token: Token, error: IoError) {
        let origin = self.drop_request(token).origin;
        if matches!(origin, Origin::Nbd { .. } | Origin::Queue { .. }) {
            self.notices.push(Notice::Done { origin, result: Err(error) });
        }
    }

    fn add_request(&mut self, request: Request) -> Token {
        let at = self.requests_free.pop().unwrap_or_else(|| {
            self.requests.push(None);
            self.requests.len() - 1
        });
        self.requests[at] = Some(request);
        Token(at as u64)
    }

    fn request_mut(&mut self, token: Token) -> &mut Request {
        let at = usize::try_from(token.0).expect("a token is an index");
        self.requests[at].as_mut().unwrap_or_else(|| panic!("{token:?} names no request"))
    }

    fn drop_request(&mut self, token: Token) -> Request {
        let at = usize::try_from(token.0).expect("a token is an index");
        self.requests_free.push(at);
        self.requests[at].take().unwrap_or_else(|| panic!("{token:?} names no request"))
    }
}

impl Request {
    fn flush(origin: Origin) -> Self {
        Self {
            origin,
            op: Op::Flush,
            range: ByteRange::new(0, 0),
            flags: 0,
            locked: false,
            touched: None,
            landed: true,
            completed: false,
            lost: false,
            differs: false,
            untold: false,
            landed_at: None,
        }
    }

    fn change_of(origin: Origin, kind: Kind, range: ByteRange, flags: u8) -> Self {
        let op = Op::Change(kind);
        Self { op, range, flags, landed: false, ..Self::flush(origin) }
    }

    fn change(&self, token: Token, kind: Kind) -> Change {
        Change { token, kind, range: self.range, flags: self.flags }
    }
}

#[cfg(test)]
mod tests;
