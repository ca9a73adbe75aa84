//! The steps of the background copy.

use super::{Background, Step};
use crate::disk::dirty_bitmap::DirtyBitmap;
use crate::disk::image::{DiskImage, Extent};
use crate::limits::{RESYNC_CHUNK_LEN, RESYNC_READ_AHEAD_LEN, VERIFY_LEN_MAX};
use crate::mirror::resync::Resync;
use crate::units::ByteRange;
use crate::volume::interface::Origin;
use crate::wire::Kind;
use std::time::Instant;

impl Background {
    /// Copies what is marked here and there, once the peer has told its marks.
    pub(in crate::volume) fn begin_copy(&mut self, dirty: &DirtyBitmap) {
        self.begin(dirty, self.checksum_first);
    }

    /// Copies what a verification has marked in `dirty`. The peer has no marks of its own: it is in sync but for those.
    pub(in crate::volume) fn begin_repair(&mut self, dirty: &DirtyBitmap) {
        self.begin(dirty, false);
        if let Some(copy) = &mut self.copy {
            let first = copy.told_all(dirty, Vec::new());
            assert!(first, "a copy begins once");
            copy.kept();
        }
    }

    fn begin(&mut self, dirty: &DirtyBitmap, compares: bool) {
        let geometry = dirty.geometry();
        self.copy_serial += 1;
        self.copy = Some(Resync::new(geometry.grain_len(), geometry.size(), compares));
    }

    /// No step of a copy counts any more.
    pub(in crate::volume) fn end_copy(&mut self) {
        if self.copy.take().is_some() {
            self.throttle.all_ended();
        }
    }

    /// The copy under way: what its peer tells.
    pub(in crate::volume) fn copy_mut(&mut self) -> Option<&mut Resync> {
        self.copy.as_mut()
    }

    /// Whether a copy is under way.
    pub(in crate::volume) fn is_copying(&self) -> bool {
        self.copy.is_some()
    }

    /// Whether the peer of a copy has yet to tell its marks.
    pub(in crate::volume) fn awaits_map(&self) -> bool {
        self.copy.as_ref().is_some_and(Resync::awaits_map)
    }

    /// Whether all is copied and durable, and control has not said so to the peer.
    pub(in crate::volume) fn copy_is_done(&self) -> bool {
        self.copy.as_ref().is_some_and(Resync::is_done)
    }

    /// The next step of the copy, if one may begin. `urgent`: clients wait for the end of the copy.
    pub(in crate::volume) fn next_copy_step(
        &mut self,
        now: Instant,
        urgent: bool,
        dirty: &DirtyBitmap,
        disk: &DiskImage,
    ) -> Option<Step> {
        if self.paused && !urgent {
            return None;
        }
        let copy = self.copy.as_mut()?;
        copy.ask_for_a_step(dirty);
        let wanted = copy.next(dirty)?;
        let len = self.leave(now, self.clients_busy && !urgent)?;
        let copy = self.copy.as_mut()?;
        let marked = wanted.range;
        let extent = if wanted.differs { Some(marked) } else { copy.known_data(marked) }.map_or_else(
            || disk.extent_at(marked.start, marked.end()),
            |range| Extent { range, hole: false },
        );
        if !extent.hole && !wanted.differs {
            copy.found_data(extent.range);
        }
        let (grain, compares) = (copy.grain_len(), copy.compares(wanted));
        let plan = Plan { grain, len, compares, sparse: disk.is_sparse() };
        let (kind, range) = plan.step(marked, extent.range.len, extent.hole);
        copy.took(range);
        self.throttle.step_began(now, range.len);
        if matches!(kind, Kind::Write | Kind::Verify) {
            disk.read_ahead(ByteRange::new(range.end() + RESYNC_READ_AHEAD_LEN, range.len));
        }
        let origin = Origin::Resync { serial: self.copy_serial };
        Some(Step { origin, kind, range, differs: wanted.differs })
    }

    /// Whether a step that waited is still right: its copy is the present one, and a hole that it would tell the peer of
    /// is still one. A client may have written there while the step waited; the step is then planned anew.
    pub(in crate::volume) fn copy_step_holds(
        &mut self,
        serial: u64,
        kind: Kind,
        range: ByteRange,
        disk: &DiskImage,
    ) -> bool {
        let Some(copy) = self.copy.as_mut().filter(|_| serial == self.copy_serial) else { return false };
        if matches!(kind, Kind::Write | Kind::Verify) {
            return true;
        }
        let extent = disk.extent_at(range.start, range.end());
        let holds = extent.hole && extent.range.len == range.len;
        if !holds {
            copy.untake(range, false);
            self.throttle.step_ended();
        }
        holds
    }

    /// A step of the copy `serial` is released: the peer has it, or has looked at it.
    pub(in crate::volume) fn copy_step_released(
        &mut self,
        serial: u64,
        kind: Kind,
        range: ByteRange,
        differs: bool,
    ) {
        let Some(copy) = self.copy.as_mut().filter(|_| serial == self.copy_serial) else { return };
        self.throttle.step_ended();
        if kind == Kind::Verify && differs {
            copy.differs(range);
        } else {
            copy.applied(range);
        }
    }

    /// The origin of the flush that is due behind what was applied. However many steps are under way: what is not cleared by
    /// the session's end is copied again.
    pub(in crate::volume) fn copy_flush_due(
        &mut self,
        now: Instant,
        urgent: bool,
        dirty: &DirtyBitmap,
    ) -> Option<Origin> {
        if self.paused && !urgent {
            return None;
        }
        let due = self.copy.as_mut()?.take_flush(dirty, now);
        due.then_some(Origin::ResyncFlush { serial: self.copy_serial })
    }

    /// Both disks were flushed for the copy number `serial`: what is equal and durable now, and whether that was the end.
    pub(in crate::volume) fn copy_flushed(&mut self, serial: u64) -> Option<(Vec<ByteRange>, bool)> {
        self.copy.as_mut().filter(|_| serial == self.copy_serial).map(Resync::flushed)
    }
}

/// What the next step has to keep to.
struct Plan {
    /// The dirty bitmap's.
    grain: u64,
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
        let up = |at: u64| at.next_multiple_of(self.grain).min(dirty.end()) - dirty.start;
        let to = dirty.start + extent_len.min(dirty.len);
        let whole = if extent_len >= dirty.len {
            dirty.len
        } else {
            (to / self.grain * self.grain).saturating_sub(dirty.start)
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
        let plan = |len, compares, sparse| Plan { grain: G, len, compares, sparse };
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
