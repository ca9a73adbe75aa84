//! The front ends' side of a volume: admission, landing and the background copy's steps.

use super::{Notice, Origin, Request, Volume};
use crate::disk::image::Extent;
use crate::disk::inflight::{Access, Admission};
use crate::disk::worker::{Job, JobKind};
use crate::error::IoError;
use crate::limits::RESYNC_READ_AHEAD_LEN;
use crate::mirror::pipeline::Event as PipelineEvent;
use crate::mirror::resync::Resync;
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
        if !self.serving || self.quiescing {
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
            landed: false,
            completed: false,
            received: 0,
            lost: false,
        });
        match self.inflight.request(token, new.range, access) {
            Admission::Granted if new.op == Op::Read && self.reads_from_peer() => {
                self.inflight.pin(token, new.range);
                self.fetch(token);
                Begin::Waits(token)
            }
            Admission::Granted => {
                self.start(token);
                Begin::Go(token)
            }
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

    /// So many bytes of a write's payload are in place, and more are to come.
    pub fn received(&mut self, token: Token, bytes: usize) {
        self.request_mut(token).received = bytes as u64;
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
            self.unlock_and_fail(token, IoError::NotPrimary);
        } else if self.request_mut(token).lost || (self.disk.is_failed() && !self.outlives_failure()) {
            self.unlock_and_fail(token, IoError::DiskFailed);
        } else {
            self.hand_over(token);
        }
    }

    /// The client went away in mid-payload. Part of the range may have changed here, so the range as it stands now is
    /// mirrored like any write: both disks stay equal, and nobody is told.
    pub fn landed_in_part(&mut self, token: Token) {
        self.request_mut(token).origin = Origin::Nobody;
        self.landed(token);
    }

    /// The client of a request that waits is gone.
    pub fn cancel_waiting(&mut self, token: Token) {
        if self.is_fetching(token) {
            // The peer answers all the same, and nobody may change the range before.
            self.request_mut(token).origin = Origin::Nobody;
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
            // Its turn has come, and the news is on its way.
            self.landed_in_part(token);
            return;
        }
        self.read_done(token);
    }

    fn unlock_and_fail(&mut self, token: Token, error: IoError) {
        let start = self.request_mut(token).range.start;
        self.inflight.release(token, start, &mut self.granted);
        self.fail(token, error);
    }

    fn hand_over(&mut self, token: Token) {
        let request = self.request_mut(token);
        request.landed = true;
        let Op::Change(kind) = request.op else { panic!("only changes land") };
        let change = request.change(token, kind);
        self.pipeline_event(PipelineEvent::Landed(change));
    }

    /// The range is ours: do what needs no client.
    fn start(&mut self, token: Token) {
        let request = self.request_mut(token);
        let (range, op) = (request.range, request.op);
        let Op::Change(kind) = op else { return };
        request.locked = true;
        if matches!(request.origin, Origin::Resync { .. }) {
            self.hand_over(token);
            return;
        }
        self.receiving += 1;
        match kind {
            Kind::Write => {}
            _ if self.disk.is_detached() => self.landed(token),
            Kind::WriteZeroes if range.len <= ZERO_IN_PLACE_LEN_MAX => {
                self.disk.span(range).fill_zero();
                self.landed(token);
            }
            Kind::WriteZeroes => self.workers.submit(Job { kind: JobKind::Zero(range), token }),
            Kind::Trim => self.workers.submit(Job { kind: JobKind::Punch(range), token }),
            other => panic!("{other:?} is not a change"),
        }
    }

    pub(super) fn local_change_done(&mut self, token: Token, failed: bool) {
        if failed && !self.outlives_failure() {
            self.receiving -= 1;
            self.unlock_and_fail(token, IoError::DiskFailed);
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
                if let Origin::Resync { serial } = request.origin
                    && !self.resync_step_holds(serial, &request)
                {
                    self.inflight.release(token, request.range.start, &mut self.granted);
                    self.drop_request(token);
                    continue;
                }
                self.start(token);
                if request.op == Op::Read && self.reads_from_peer() {
                    self.fetch(token);
                    continue;
                }
                if matches!(request.op, Op::Read | Op::Change(Kind::Write))
                    && !matches!(request.origin, Origin::Resync { .. })
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

    /// Whether a step that waited is still right: its copy is the present one, and a hole that it would tell the peer of
    /// is still one. A client may have written there while the step waited; the step is then planned anew.
    fn resync_step_holds(&mut self, serial: u64, request: &Request) -> bool {
        let Some(resync) = self.resync.as_mut().filter(|_| serial == self.resync_serial) else {
            return false;
        };
        let range = request.range;
        if request.op == Op::Change(Kind::Write) {
            return true;
        }
        let extent = self.disk.extent_at(range.start, range.end());
        let holds = extent.hole && extent.range.len == range.len;
        if !holds {
            resync.untake(range);
        }
        holds
    }

    pub(super) fn step_resync(&mut self) {
        if self.copy_paused && !self.pipeline.waits_for_copy() {
            return;
        }
        loop {
            let Some(resync) = &mut self.resync else { return };
            let Some(dirty) = resync.next(&self.bitmap, self.clients_busy) else { break };
            let extent = resync.known_data(dirty).map_or_else(
                || self.disk.extent_at(dirty.start, dirty.end()),
                |range| Extent { range, hole: false },
            );
            if !extent.hole {
                resync.found_data(extent.range);
            }
            let (kind, range) = plan_step(dirty, extent.range.len, extent.hole, self.disk.is_sparse());
            resync.took(range);
            if kind == Kind::Write {
                let ahead = ByteRange::new(range.end() + RESYNC_READ_AHEAD_LEN, range.len);
                self.disk.read_ahead(ahead);
            }
            let origin = Origin::Resync { serial: self.resync_serial };
            let token = self.add_request(Request {
                origin,
                op: Op::Change(kind),
                range,
                flags: flags::RESYNC,
                locked: false,
                landed: false,
                completed: false,
                received: 0,
                lost: false,
            });
            match self.inflight.request(token, range, Access::Change) {
                Admission::Granted => self.start(token),
                Admission::Waits => {}
                // The table is full of clients' requests: copy on when there is room.
                Admission::Full => {
                    self.drop_request(token);
                    let resync = self.resync.as_mut().expect("checked above");
                    resync.untake(range);
                    return;
                }
            }
        }
        if let Some(resync) = &mut self.resync
            && resync.take_flush(&self.bitmap)
        {
            let token = self.add_request(Request::flush(Origin::ResyncFlush { serial: self.resync_serial }));
            self.pipeline_event(PipelineEvent::FlushBackground(token));
        }
    }
}

/// One step of the copy over the start of `dirty`, of which the first `extent_len` bytes are a hole or are not. Steps end
/// on the bitmap's grain. A hole goes as a range without payload; where this disk has all its blocks allocated, the
/// peer's keeps its blocks too.
fn plan_step(dirty: ByteRange, extent_len: u64, hole: bool, sparse: bool) -> (Kind, ByteRange) {
    let grain = crate::limits::DIRTY_GRAIN_LEN;
    let whole = if extent_len >= dirty.len { dirty.len } else { extent_len / grain * grain };
    if hole && whole > 0 {
        let kind = if sparse { Kind::Trim } else { Kind::WriteZeroes };
        return (kind, ByteRange::new(dirty.start, whole));
    }
    let data_len = if hole { grain } else { extent_len.next_multiple_of(grain) };
    (Kind::Write, Resync::chunk(ByteRange::new(dirty.start, data_len.min(dirty.len))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{DIRTY_GRAIN_LEN as G, RESYNC_CHUNK_LEN};

    #[test]
    fn steps_follow_holes_and_keep_to_the_grain() {
        let dirty = ByteRange::new(G, 100 * G);
        assert_eq!(plan_step(dirty, 100 * G, true, true), (Kind::Trim, dirty));
        assert_eq!(plan_step(dirty, 2 * G + 1, true, false), (Kind::WriteZeroes, ByteRange::new(G, 2 * G)));
        assert_eq!(
            plan_step(dirty, G - 1, true, true),
            (Kind::Write, ByteRange::new(G, G)),
            "less than a grain"
        );
        assert_eq!(plan_step(dirty, 1, false, true), (Kind::Write, ByteRange::new(G, G)));
        assert_eq!(plan_step(dirty, 50 * G, false, true), (Kind::Write, ByteRange::new(G, RESYNC_CHUNK_LEN)));
        let tail = ByteRange::new(G, 100);
        assert_eq!(
            plan_step(tail, 100, true, true),
            (Kind::Trim, tail),
            "the disk's end need not fill a grain"
        );
    }
}
