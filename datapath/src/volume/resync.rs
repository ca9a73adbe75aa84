//! The background copy in a volume: its steps beside clients' requests.

use super::{Op, Origin, Request, Volume};
use crate::disk::image::Extent;
use crate::disk::inflight::{Access, Admission};
use crate::limits::{DIRTY_GRAIN_LEN, RESYNC_CHUNK_LEN, RESYNC_READ_AHEAD_LEN, VERIFY_LEN_MAX};
use crate::mirror::pace::Leave;
use crate::mirror::pipeline::Event as PipelineEvent;
use crate::mirror::resync::Resync;
use crate::units::ByteRange;
use crate::wire::{Kind, flags};
use std::time::Instant;

impl Volume {
    /// Copies what is marked, from now on.
    pub(super) fn begin_copy(&mut self, compares: bool) {
        self.resync_serial += 1;
        self.resync = Some(Resync::new(&self.bitmap, self.disk.size(), compares));
    }

    /// No step of a copy counts any more.
    pub(super) fn end_copy(&mut self) {
        if self.resync.take().is_some() {
            self.pace.all_ended();
        }
    }

    /// Whether a step that waited is still right: its copy is the present one, and a hole that it would tell the peer of
    /// is still one. A client may have written there while the step waited; the step is then planned anew.
    pub(super) fn resync_step_holds(&mut self, serial: u64, request: &Request) -> bool {
        let Some(resync) = self.resync.as_mut().filter(|_| serial == self.resync_serial) else {
            return false;
        };
        let range = request.range;
        if matches!(request.op, Op::Change(Kind::Write | Kind::Verify)) {
            return true;
        }
        let extent = self.disk.extent_at(range.start, range.end());
        let holds = extent.hole && extent.range.len == range.len;
        if !holds {
            resync.untake(range, false);
            self.pace.step_ended();
        }
        holds
    }

    /// A step of the copy `serial` is released: the peer has it, or has looked at it.
    pub(super) fn resync_step_released(&mut self, serial: u64, kind: Kind, range: ByteRange, differs: bool) {
        let Some(resync) = self.resync.as_mut().filter(|_| serial == self.resync_serial) else { return };
        self.pace.step_ended();
        if kind == Kind::Verify && differs {
            resync.differs(range);
        } else {
            resync.applied(range, &mut self.bitmap);
        }
    }

    /// Begins what steps may begin, and the flush behind the last.
    pub(super) fn step_resync(&mut self, now: Instant) {
        let urgent = self.pipeline.waits_for_copy();
        if self.copy_paused && !urgent {
            return;
        }
        while let Some(resync) = &mut self.resync
            && let Some(wanted) = resync.next(&self.bitmap)
        {
            let len = match self.pace.leave(now, self.clients_busy && !urgent) {
                Leave::Step(len) => len,
                Leave::Wait(at) => {
                    self.pace_due = Some(at);
                    return;
                }
                Leave::Enough => return,
            };
            let dirty = wanted.range;
            let extent = if wanted.differs { Some(dirty) } else { resync.known_data(dirty) }.map_or_else(
                || self.disk.extent_at(dirty.start, dirty.end()),
                |range| Extent { range, hole: false },
            );
            if !extent.hole && !wanted.differs {
                resync.found_data(extent.range);
            }
            let plan = Plan { len, compares: resync.compares(wanted), sparse: self.disk.is_sparse() };
            let (kind, range) = plan.step(dirty, extent.range.len, extent.hole);
            resync.took(range);
            self.pace.step_began(now, range.len);
            if matches!(kind, Kind::Write | Kind::Verify) {
                let ahead = ByteRange::new(range.end() + RESYNC_READ_AHEAD_LEN, range.len);
                self.disk.read_ahead(ahead);
            }
            let token = self.add_request(Request {
                origin: Origin::Resync { serial: self.resync_serial },
                op: Op::Change(kind),
                range,
                flags: flags::RESYNC,
                locked: false,
                landed: false,
                completed: false,
                differs: false,
                landed_at: None,
            });
            match self.inflight.request(token, range, Access::Change) {
                Admission::Granted => self.start(token),
                Admission::Waits => {}
                // The table is full of clients' requests: copy on when there is room.
                Admission::Full => {
                    self.drop_request(token);
                    self.pace.step_ended();
                    let resync = self.resync.as_mut().expect("checked above");
                    resync.untake(range, wanted.differs);
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

/// What the next step has to keep to.
struct Plan {
    /// Bytes of data it may send.
    len: u64,
    /// It asks the peer instead of sending.
    compares: bool,
    /// The disk has holes of its own.
    sparse: bool,
}

impl Plan {
    /// One step over the start of `dirty`, of which the first `extent_len` bytes are a hole or are not. A hole goes as a
    /// range of whole grains without payload; where this disk has all its blocks allocated, the peer's keeps its blocks
    /// too. A step that asks covers whole grains as well.
    fn step(&self, dirty: ByteRange, extent_len: u64, hole: bool) -> (Kind, ByteRange) {
        let up = |at: u64| at.next_multiple_of(DIRTY_GRAIN_LEN).min(dirty.end()) - dirty.start;
        let to = dirty.start + extent_len.min(dirty.len);
        let whole = if extent_len >= dirty.len {
            dirty.len
        } else {
            (to / DIRTY_GRAIN_LEN * DIRTY_GRAIN_LEN).saturating_sub(dirty.start)
        };
        if hole && whole > 0 {
            let kind = if self.sparse { Kind::Trim } else { Kind::WriteZeroes };
            return (kind, ByteRange::new(dirty.start, whole));
        }
        let data_len = if hole { up(dirty.start + 1) } else { up(to) };
        if self.compares {
            let asked = up(dirty.start + self.len.min(VERIFY_LEN_MAX));
            return (Kind::Verify, ByteRange::new(dirty.start, asked.min(data_len)));
        }
        (Kind::Write, ByteRange::new(dirty.start, data_len.min(self.len).min(RESYNC_CHUNK_LEN)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::DIRTY_GRAIN_LEN as G;

    #[test]
    fn steps_follow_holes_and_keep_to_the_grain() {
        let plan = |len, compares, sparse| Plan { len, compares, sparse };
        let dirty = ByteRange::new(G, 100 * G);
        let all = plan(RESYNC_CHUNK_LEN, false, true);
        assert_eq!(all.step(dirty, 100 * G, true), (Kind::Trim, dirty));
        let allocated = plan(RESYNC_CHUNK_LEN, false, false);
        assert_eq!(allocated.step(dirty, 2 * G + 1, true), (Kind::WriteZeroes, ByteRange::new(G, 2 * G)));
        assert_eq!(all.step(dirty, G - 1, true), (Kind::Write, ByteRange::new(G, G)), "less than a grain");
        assert_eq!(all.step(dirty, 1, false), (Kind::Write, ByteRange::new(G, G)));
        assert_eq!(all.step(dirty, 50 * G, false), (Kind::Write, ByteRange::new(G, RESYNC_CHUNK_LEN)));
        let tail = ByteRange::new(G, 100);
        assert_eq!(all.step(tail, 100, true), (Kind::Trim, tail), "the disk's end need not fill a grain");
        let short = plan(G / 8, false, true);
        assert_eq!(short.step(dirty, 50 * G, false), (Kind::Write, ByteRange::new(G, G / 8)));
        let rest = ByteRange::new(G + G / 8, 99 * G + 7 * G / 8);
        assert_eq!(
            short.step(rest, 3 * G, true),
            (Kind::Trim, ByteRange::new(rest.start, 2 * G + 7 * G / 8)),
            "a hole from within a grain still ends with one"
        );
        let asks = plan(G / 8, true, true);
        assert_eq!(asks.step(dirty, 50 * G, false), (Kind::Verify, ByteRange::new(G, G)));
        assert_eq!(
            plan(3 * G, true, true).step(dirty, G + 1, false),
            (Kind::Verify, ByteRange::new(G, 2 * G))
        );
    }
}
