//! Request entry points: take the range lock, wait for the activity log if the extent is cold, hand the written
//! range to the mirror.

use super::Volume;
use super::checkpoint::Quiesce;
use super::interface::{Begin, NewRequest, Notice, Op, Origin};
use super::request_table::Request;
use crate::disk::inflight::Admission;
use crate::disk::record::Admit;
use crate::disk::worker::{Job, JobKind};
use crate::error::IoError;
use crate::mirror::pipeline::Event as PipelineEvent;
use crate::units::Token;
use crate::wire::{Kind, flags};

/// Longest range zeroed in place by the reactor itself; beyond it a worker thread does it. 64 KiB takes a few
/// microseconds, less than the hand-over.
const ZERO_IN_PLACE_LEN_MAX: u64 = 64 << 10;

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
        self.background.client_came();
        if new.op == Op::Flush {
            let token = self.requests.add(Request::flush(new.origin));
            self.ride_on_flush(token);
            self.pipeline_event(PipelineEvent::Flush(token));
            return Begin::Go(token);
        }
        assert!(new.range.len > 0 && new.range.fits(self.disk.size()), "front ends check ranges");
        let flags = if new.fua { flags::FUA } else { 0 };
        let token = self.requests.add(Request::of(new.origin, new.op, new.range, flags));
        match self.requests.lock(token) {
            Admission::Granted if new.op == Op::Read && self.reads_from_peer() => {
                self.requests.pin(token);
                self.fetch(token);
                Begin::Waits(token)
            }
            Admission::Granted if self.start(token) => Begin::Go(token),
            Admission::Granted => Begin::Waits(token),
            Admission::Waits => Begin::Waits(token),
            Admission::Full => Begin::Full,
        }
    }

    /// A read's bytes are out of the mapping.
    pub fn read_done(&mut self, token: Token) {
        let range = self.requests.end_read(token);
        self.passed_through(range);
    }

    /// A read was granted, but its client takes no replies now: let the changes that want the range go first. Another
    /// [`Notice::Granted`] follows.
    pub fn put_back(&mut self, token: Token) {
        let range = self.requests.put_back(token);
        self.passed_through(range);
    }

    /// A read's bytes are stuck half-way to a slow client: keep changes off them until [`Volume::unpin`].
    pub fn pin(&mut self, token: Token) {
        self.requests.pin(token);
    }

    /// The pinned bytes are out (or copied). Ends the read as well.
    pub fn unpin(&mut self, token: Token) {
        self.read_done(token);
    }

    /// The payload of a write stands in the mapping: mirror it.
    pub fn landed(&mut self, token: Token) {
        self.requests.making_ends();
        if !self.serving {
            self.give_up_change(token, IoError::NotPrimary);
        } else if self.requests.get(token).lost || (self.disk.is_failed() && !self.outlives_failure()) {
            self.give_up_change(token, IoError::DiskFailed);
        } else {
            self.hand_over(token);
        }
    }

    /// The client of a request that waits is gone. A write that was let through is taken back, as nothing of it stands on the disk.
    pub fn cancel_waiting(&mut self, token: Token) {
        if self.is_fetching(token) {
            // The peer answers all the same, and nobody may change the range before.
            self.requests.get_mut(token).origin = Origin::Nobody;
            return;
        }
        if self.record.give_up(token) {
            self.requests.unlock(token);
            self.requests.remove(token);
            return;
        }
        if !self.requests.take_back(token) {
            self.requests.making_ends();
            let request = *self.requests.get(token);
            if let Some(touched) = request.touched {
                self.record.written(token, request.range, touched);
            }
            self.requests.unlock(token);
        }
        self.read_done(token);
    }

    /// A client is gone: cancels its changes that wait for their range, but for a write, which its connection knows. Returns how
    /// many there were.
    pub fn cancel_changes_of(&mut self, connection: u32, serial: u32) -> usize {
        let tokens = self.requests.find(|request| {
            let Origin::Nbd { connection: at, serial: of, .. } = request.origin else { return false };
            let makes_itself = matches!(request.op, Op::Change(kind) if kind != Kind::Write);
            // Ended changes that the peer has not released yet are not locked either, but have landed.
            (at, of) == (connection, serial) && makes_itself && !request.locked && !request.landed
        });
        for token in &tokens {
            self.cancel_waiting(*token);
        }
        tokens.len()
    }

    pub(super) fn unlock_and_fail(&mut self, token: Token, error: IoError) {
        self.requests.unlock(token);
        self.fail(token, error);
    }

    fn hand_over(&mut self, token: Token) {
        let has_peer = self.session.is_source();
        let landed = self.background.landed(self.now);
        let request = self.requests.get_mut(token);
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
        let request = self.requests.get_mut(token);
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
                self.requests.get_mut(token).touched = Some(touched);
                self.make(token);
                true
            }
            Admit::Parked => false,
        }
    }

    /// The change may be made: makes it, but for a write, whose bytes the client brings.
    pub(super) fn make(&mut self, token: Token) {
        let request = self.requests.get_mut(token);
        let (range, op) = (request.range, request.op);
        self.requests.making_begins();
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
            self.requests.making_ends();
            self.give_up_change(token, IoError::DiskFailed);
        } else {
            // The peer can do it all the same: nothing of it comes from this disk.
            self.landed(token);
        }
    }

    pub(super) fn serve_granted(&mut self) {
        while let Some(token) = self.requests.next_granted() {
            let request = *self.requests.get(token);
            let holds = match request.origin {
                Origin::Resync { serial } => self.copy_step_holds(serial, &request),
                Origin::Verify { serial } => self.background.verify_step_counts(serial),
                _ => true,
            };
            if !holds {
                self.requests.unlock(token);
                self.requests.remove(token);
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
    }
}
