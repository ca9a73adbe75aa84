//! Request entry points: take the range lock, wait for the activity log if the extent is cold, hand the written
//! range to the mirror.

use super::checkpoint::Quiesce;
use super::{Notice, Origin, Request, Volume};
use crate::disk::inflight::{Access, Admission};
use crate::disk::record::Admit;
use crate::disk::worker::{Job, JobKind};
use crate::error::IoError;
use crate::mirror::pipeline::Event as PipelineEvent;
use crate::units::{ByteRange, Token};
use crate::wire::{Kind, flags};

/// Longest range zeroed in place by the reactor itself; beyond it a worker thread does it. 64 KiB takes a few
/// microseconds, less than the hand-over.
const ZERO_IN_PLACE_LEN_MAX: u64 = 64 << 10;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Look at the range.
    Read,
    /// Change it: `Write`, `WriteZeroes` or `Trim`.
    Change(Kind),
    /// Everything acknowledged before is to be on stable storage.
    Flush,
}

/// A checked request of a front end: its range fits the volume and is not empty (but for a flush).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewRequest {
    /// Who hears of it.
    pub origin: Origin,
    /// What.
    pub op: Op,
    /// Where.
    pub range: ByteRange,
    /// Complete only when durable on every in-sync replica.
    pub fua: bool,
}

/// Answer to [`Volume::begin`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Begin {
    /// Read: the range may be read now; end with [`Volume::read_done`]. Write: put the payload into the range, then
    /// call [`Volume::landed`]. Other: nothing to do but wait for the notice.
    Go(Token),
    /// A [`Notice::Granted`] follows, to be treated as `Go`.
    Waits(Token),
    /// No room; try again after the next completion and take no further requests until then.
    Full,
    /// Refused at once; no notice follows.
    Failed(IoError),
}

impl Volume {
    /// Starts a request.
    pub fn begin(&mut self, new: NewRequest) -> Begin {
        if !self.serving || self.quiesce != Quiesce::No {
            return Begin::Failed(IoError::NotPrimary);
        }
        if self.disk.is_failed() && !self.outlives_failure() {
            return Begin::Failed(IoError::DiskFailed);
        }
        if new.op == Op::Read && self.fetches_are_full() {
            return Begin::Full;
        }
        self.client_came = true;
        if new.op == Op::Flush {
            let token = self.add_request(Request::flush(new.origin));
            self.ride_on_flush(token);
            self.pipeline_event(PipelineEvent::Flush(token));
            return Begin::Go(token);
        }
        assert!(new.range.len > 0 && new.range.fits(self.disk.size()), "front ends check ranges");
        let access = if new.op == Op::Read { Access::Read } else { Access::Change };
        let token = self.add_request(Request {
            origin: new.origin,
            op: new.op,
            range: new.range,
            flags: if new.fua { flags::FUA } else { 0 },
            locked: false,
            touched: None,
            landed: false,
            completed: false,
            lost: false,
            differs: false,
            untold: false,
            landed_at: None,
        });
        match self.inflight.request(token, new.range, access) {
            Admission::Granted if new.op == Op::Read && self.reads_from_peer() => {
                self.inflight.pin(token, new.range);
                self.fetch(token);
                Begin::Waits(token)
            }
            Admission::Granted if self.start(token) => Begin::Go(token),
            Admission::Granted => Begin::Waits(token),
            Admission::Waits => Begin::Waits(token),
            Admission::Full => {
                self.drop_request(token);
                Begin::Full
            }
        }
    }

    /// A read's bytes are out of the mapping.
    pub fn read_done(&mut self, token: Token) {
        if self.inflight.has_pin(token) {
            self.inflight.unpin(token, &mut self.granted);
        }
        let request = self.drop_request(token);
        self.passed_through(request.range);
    }

    /// A read was granted, but its client takes no replies now: let the changes that want the range go first. Another
    /// [`Notice::Granted`] follows.
    pub fn put_back(&mut self, token: Token) {
        let range = self.request_mut(token).range;
        self.inflight.put_back(token, range, &mut self.granted);
        self.passed_through(range);
    }

    /// A read's bytes are stuck half-way to a slow client: keep changes off them until [`Volume::unpin`].
    pub fn pin(&mut self, token: Token) {
        let range = self.request_mut(token).range;
        self.inflight.pin(token, range);
    }

    /// The pinned bytes are out (or copied). Ends the read as well.
    pub fn unpin(&mut self, token: Token) {
        self.read_done(token);
    }

    /// The payload of a write stands in the mapping: mirror it.
    pub fn landed(&mut self, token: Token) {
        self.receiving -= 1;
        if !self.serving {
            self.give_up_change(token, IoError::NotPrimary);
        } else if self.request_mut(token).lost || (self.disk.is_failed() && !self.outlives_failure()) {
            self.give_up_change(token, IoError::DiskFailed);
        } else {
            self.hand_over(token);
        }
    }

    /// The client of a request that waits is gone. A write that was let through is taken back, as nothing of it stands on the disk.
    pub fn cancel_waiting(&mut self, token: Token) {
        if self.is_fetching(token) {
            // The peer answers all the same, and nobody may change the range before.
            self.request_mut(token).origin = Origin::Nobody;
            return;
        }
        if self.record.give_up(token) {
            let start = self.request_mut(token).range.start;
            self.inflight.release(token, start, &mut self.granted);
            self.drop_request(token);
            return;
        }
        self.inflight.cancel(token, &mut self.granted);
        // It may have been granted in this very turn.
        if let Some(at) = self.granted.iter().position(|t| *t == token) {
            self.granted.remove(at);
            let request = *self.request_mut(token);
            if matches!(request.op, Op::Change(_)) {
                self.inflight.release(token, request.range.start, &mut self.granted);
            }
        } else if self.request_mut(token).locked {
            self.receiving -= 1;
            let request = *self.request_mut(token);
            if let Some(touched) = request.touched {
                self.record.written(token, request.range, touched);
            }
            self.inflight.release(token, request.range.start, &mut self.granted);
        }
        self.read_done(token);
    }

    /// A client is gone: cancels its changes that wait for their range, but for a write, which its connection knows. Returns how
    /// many there were.
    pub fn cancel_changes_of(&mut self, connection: u32, serial: u32) -> usize {
        let waits = |request: &Request| {
            let Origin::Nbd { connection: at, serial: of, .. } = request.origin else { return false };
            let makes_itself = matches!(request.op, Op::Change(kind) if kind != Kind::Write);
            (at, of) == (connection, serial) && makes_itself && !request.locked
        };
        // Ended changes that the peer has not released yet are not locked either, but have landed.
        let waiting = |request: &Option<Request>| request.as_ref().is_some_and(|r| waits(r) && !r.landed);
        let found = self.requests.iter().enumerate().filter(|(_, request)| waiting(request));
        let tokens: Vec<_> = found.map(|(at, _)| Token(at as u64)).collect();
        for token in &tokens {
            self.cancel_waiting(*token);
        }
        tokens.len()
    }

    pub(super) fn unlock_and_fail(&mut self, token: Token, error: IoError) {
        let start = self.request_mut(token).range.start;
        self.inflight.release(token, start, &mut self.granted);
        self.fail(token, error);
    }

    fn hand_over(&mut self, token: Token) {
        let has_peer = self.source;
        let landed = self.throttle.landed(self.now.checked_sub(self.stalled).unwrap_or(self.now));
        let request = self.request_mut(token);
        request.landed = true;
        // One that waits for no peer says nothing about what clients bear.
        if has_peer && !request.origin.is_background() {
            request.landed_at = Some(landed);
        }
        let Op::Change(kind) = request.op else { panic!("only changes land") };
        let change = request.change(token, kind);
        self.pipeline_event(PipelineEvent::Landed(change));
    }

    /// The range is ours: do what needs no client. False when the change is parked until it is on record.
    pub(super) fn start(&mut self, token: Token) -> bool {
        let request = self.request_mut(token);
        let (range, op, origin) = (request.range, request.op, request.origin);
        if !matches!(op, Op::Change(_)) {
            return true;
        }
        request.locked = true;
        if origin.is_background() {
            self.hand_over(token);
            return true;
        }
        match self.record.touch(token, range) {
            Admit::Go(touched) => {
                self.request_mut(token).touched = Some(touched);
                self.make(token);
                true
            }
            Admit::Parked => false,
        }
    }

    /// The change may be made: makes it, but for a write, whose bytes the client brings.
    pub(super) fn make(&mut self, token: Token) {
        let request = self.request_mut(token);
        let (range, op) = (request.range, request.op);
        self.receiving += 1;
        match op {
            Op::Change(Kind::Write) => {}
            Op::Change(_) if self.disk.is_detached() => self.landed(token),
            Op::Change(Kind::WriteZeroes) if range.len <= ZERO_IN_PLACE_LEN_MAX => {
                self.disk.span(range).fill_zero();
                self.landed(token);
            }
            Op::Change(Kind::WriteZeroes) => {
                self.workers.submit(Job { kind: JobKind::Zero(range), token });
            }
            Op::Change(Kind::Trim) => self.workers.submit(Job { kind: JobKind::Punch(range), token }),
            other => panic!("{other:?} is not a change"),
        }
    }

    pub(super) fn local_change_done(&mut self, token: Token, failed: bool) {
        if failed && !self.outlives_failure() {
            self.receiving -= 1;
            self.give_up_change(token, IoError::DiskFailed);
        } else {
            // The peer can do it all the same: nothing of it comes from this disk.
            self.landed(token);
        }
    }

    pub(super) fn serve_granted(&mut self) {
        while !self.granted.is_empty() {
            let mut granted = std::mem::take(&mut self.granted);
            for token in granted.drain(..) {
                let request = *self.request_mut(token);
                let holds = match request.origin {
                    Origin::Resync { serial } => self.resync_step_holds(serial, &request),
                    Origin::Verify { serial } => self.verify_step_counts(serial),
                    _ => true,
                };
                if !holds {
                    self.inflight.release(token, request.range.start, &mut self.granted);
                    self.drop_request(token);
                    continue;
                }
                if request.op == Op::Read && self.reads_from_peer() {
                    self.fetch(token);
                    continue;
                }
                if self.start(token)
                    && matches!(request.op, Op::Read | Op::Change(Kind::Write))
                    && !request.origin.is_background()
                {
                    self.notices.push(Notice::Granted { origin: request.origin, token });
                }
            }
            if self.granted.is_empty() {
                self.granted = granted;
                return;
            }
        }
    }
}
