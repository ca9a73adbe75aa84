//! The resync in a volume: both ends exchange their dirty bitmaps, then the copy's steps and its flushes.
//!
//! ```text
//! target ──Dirty…, DirtyEnd──▶ source ──DirtyKept──▶ target forgets its map
//!                                └──▶ steps of what either has marked ──▶ flush ──▶ clear
//! ```
//!
//! Invariants: the target forgets a mark only after the source has it on stable storage; the map is told from a cursor,
//! as far as the link takes it, and never queued whole; steps change nothing on this disk and so touch no log.
//!
//! Survives a peer that tells ranges outside the volume, backwards, unasked or without end: its session ends.

use super::{Origin, Outgoing, Request, Volume};
use crate::disk::dirty_bitmap::DirtyBitmap;
use crate::disk::image::Extent;
use crate::disk::inflight::{Access, Admission};
use crate::error::Violation;
use crate::limits::{
    DIRTY_GRAIN_LEN_MAX, DIRTY_GRAIN_LEN_MIN, DIRTY_RUN_LEN_MAX, DIRTY_TOLD_MAX, RESYNC_CHUNK_LEN,
    RESYNC_READ_AHEAD_LEN, VERIFY_LEN_MAX,
};
use crate::mirror::pipeline::Event as PipelineEvent;
use crate::mirror::resync::Resync;
use crate::mirror::throttle::Leave;
use crate::reactor::command::Event;
use crate::transport::Link;
use crate::units::{ByteRange, Epoch};
use crate::wire::{Header, Kind, flags};
use std::time::Instant;

use super::requests::Op;

/// Grains that one message with a mask stands for.
const MASK_GRAINS: u64 = 64;

/// What a target still has to tell the source of its copy.
#[derive(Clone, Copy, Debug)]
pub(super) enum Telling {
    /// What is marked from this byte on.
    From(u64),
    /// All was told; the source has not said yet that it is on its record.
    All,
}

impl Telling {
    /// Tells on, as far as the link takes it in one turn.
    pub(super) fn go_on(&mut self, dirty: &DirtyBitmap, link: &mut dyn Link, epoch: Epoch) -> Told {
        for count in 0..DIRTY_TOLD_MAX {
            let Self::From(cursor) = *self else {
                return if count > 0 { Told::AllThatFits } else { Told::Nothing };
            };
            let (header, next) = match next_told(dirty, cursor, epoch) {
                Some((header, next)) => (header, Self::From(next)),
                None => (Header::new(Kind::DirtyEnd, epoch), Self::All),
            };
            if link.send(header).is_err() {
                return if count > 0 { Told::AllThatFits } else { Told::Nothing };
            }
            *self = next;
        }
        Told::Part
    }
}

/// What a turn told the source of our marks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Told {
    /// Nothing.
    Nothing,
    /// The rest, or what the link has room for.
    AllThatFits,
    /// As much as goes in one turn: no event announces the next one.
    Part,
}

/// The message about the first marks at or behind `cursor`, and where the next one begins. A run or, where the marks are
/// scattered, a mask of the next few grains.
fn next_told(dirty: &DirtyBitmap, cursor: u64, epoch: Epoch) -> Option<(Header, u64)> {
    let window_len = MASK_GRAINS * dirty.geometry().grain_len();
    let run = dirty.next_dirty(cursor, DIRTY_RUN_LEN_MAX)?;
    let mut header = Header::new(Kind::Dirty, epoch);
    header.range = run;
    if run.len < window_len {
        header.range.len = window_len;
        header.aux = dirty.window(run.start);
    }
    // A run that ends the disk need not end a grain.
    Some((header, header.range.end().next_multiple_of(dirty.geometry().grain_len())))
}

/// The ranges that a message tells of.
fn told_ranges(header: &Header, size: u64) -> Result<impl Iterator<Item = ByteRange> + use<>, Violation> {
    let (range, mask) = (header.range, header.aux);
    let wrong = |what| Violation::DirtyBitmap { what, range };
    let grain_len = if mask == 0 { range.len } else { range.len / MASK_GRAINS };
    if range.start % DIRTY_GRAIN_LEN_MIN != 0 {
        return Err(wrong("a mark that begins inside a page"));
    }
    if mask != 0 {
        let bounds = DIRTY_GRAIN_LEN_MIN..=DIRTY_GRAIN_LEN_MAX;
        if !grain_len.is_power_of_two() || !bounds.contains(&grain_len) || range.len % MASK_GRAINS != 0 {
            return Err(wrong("marks of an impossible grain"));
        }
        let last = u64::from(mask.ilog2());
        if range.start.saturating_add(last * grain_len) >= size {
            return Err(wrong("a mark behind the volume's end"));
        }
    } else if !range.fits(size) || (range.len % DIRTY_GRAIN_LEN_MIN != 0 && range.end() != size) {
        return Err(wrong("a mark that ends inside a page or behind the volume's end"));
    }
    let bits = if mask == 0 { 1 } else { mask };
    let marked = (0..MASK_GRAINS).filter(move |bit| bits & (1 << bit) != 0);
    Ok(marked.map(move |bit| {
        let start = range.start + bit * grain_len;
        ByteRange::new(start, grain_len.min(size - start))
    }))
}

impl Volume {
    /// The peer's word about dirty bitmaps.
    pub(super) fn map_message(&mut self, header: &Header) -> Result<(), Violation> {
        if header.epoch < self.epoch {
            // Of before the roles changed.
            return Ok(());
        }
        let wrong = |what| Violation::DirtyBitmap { what, range: header.range };
        if header.epoch > self.epoch {
            return Err(Violation::Epoch { found: header.epoch, ours: self.epoch });
        }
        if header.kind == Kind::DirtyKept {
            match self.telling.take() {
                Some(Telling::All) => self.record.clear_all(),
                // It is said again where a link broke before it was known to have arrived.
                None if self.gone_on => {}
                _ => return Err(wrong("a receipt for marks that were not told")),
            }
            return Ok(());
        }
        let Some(resync) = &mut self.resync else { return Err(wrong("marks that nobody asked for")) };
        if header.kind == Kind::DirtyEnd {
            if !resync.told_all(&self.record.dirty, self.record.doubts()) {
                return Err(wrong("a second end of the marks"));
            }
            self.map_round = Some(self.record.ask_store());
            return Ok(());
        }
        let ranges = told_ranges(header, self.disk.size())?;
        if !resync.told(header.range) {
            return Err(wrong("marks out of order"));
        }
        self.last_answer = self.last_heard;
        for range in ranges {
            self.record.mark(range);
        }
        Ok(())
    }

    /// Says that the target's marks are on our record, once they are.
    pub(super) fn receipt_marks(&mut self) {
        if self.map_round.take_if(|round| self.record.is_stored(*round)).is_some()
            && let Some(resync) = &mut self.resync
        {
            resync.kept();
            self.outbox.push_back(Outgoing::MarksKept);
        }
    }

    /// Copies what is marked here and there, once the peer has told its marks.
    pub(super) fn begin_copy(&mut self, compares: bool) {
        self.resync_serial += 1;
        self.resync = Some(Resync::new(self.record.dirty.geometry().grain_len(), self.disk.size(), compares));
    }

    /// No step of a copy counts any more.
    pub(super) fn end_copy(&mut self) {
        if self.resync.take().is_some() {
            self.throttle.all_ended();
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
            self.throttle.step_ended();
        }
        holds
    }

    /// A step of the copy `serial` is released: the peer has it, or has looked at it.
    pub(super) fn resync_step_released(&mut self, serial: u64, kind: Kind, range: ByteRange, differs: bool) {
        let Some(resync) = self.resync.as_mut().filter(|_| serial == self.resync_serial) else { return };
        self.throttle.step_ended();
        if kind == Kind::Verify && differs {
            resync.differs(range);
        } else {
            resync.applied(range);
        }
    }

    /// Begins what steps may begin, and the flush that is due behind what was applied.
    pub(super) fn step_resync(&mut self, now: Instant) {
        let urgent = self.pipeline.waits_for_copy();
        if self.parted.is_some() || (self.copy_paused && !urgent) {
            return;
        }
        if let Some(resync) = &mut self.resync {
            resync.ask_for_a_step(&self.record.dirty);
        }
        self.begin_steps(now, urgent);
        // However many steps are under way: what is not cleared by the session's end is copied again.
        if let Some(resync) = &mut self.resync
            && resync.take_flush(&self.record.dirty, now)
        {
            let token = self.add_request(Request::flush(Origin::ResyncFlush { serial: self.resync_serial }));
            self.pipeline_event(PipelineEvent::FlushBackground(token));
        }
    }

    fn begin_steps(&mut self, now: Instant, urgent: bool) {
        while let Some(resync) = &mut self.resync
            && let Some(wanted) = resync.next(&self.record.dirty)
        {
            let grain = resync.grain_len();
            let len = match self.throttle.leave(now, self.clients_busy && !urgent) {
                Leave::Step(len) => len,
                Leave::Wait(at) => {
                    self.throttle_due = Some(at);
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
            let plan = Plan { grain, len, compares: resync.compares(wanted), sparse: self.disk.is_sparse() };
            let (kind, range) = plan.step(dirty, extent.range.len, extent.hole);
            resync.took(range);
            self.throttle.step_began(now, range.len);
            if matches!(kind, Kind::Write | Kind::Verify) {
                let ahead = ByteRange::new(range.end() + RESYNC_READ_AHEAD_LEN, range.len);
                self.disk.read_ahead(ahead);
            }
            let origin = Origin::Resync { serial: self.resync_serial };
            let token = self.add_request(Request::change_of(origin, kind, range, flags::RESYNC));
            match self.inflight.request(token, range, Access::Change) {
                Admission::Granted => {
                    self.start(token);
                }
                Admission::Waits => {}
                // The table is full of clients' requests: copy on when there is room.
                Admission::Full => {
                    self.drop_request(token);
                    self.throttle.step_ended();
                    let resync = self.resync.as_mut().expect("checked above");
                    resync.untake(range, wanted.differs);
                    return;
                }
            }
        }
    }

    /// Both disks were flushed for the copy number `serial`.
    pub(super) fn copy_flushed(&mut self, serial: u64) {
        if let Some(resync) = self.resync.as_mut().filter(|_| serial == self.resync_serial) {
            let (equal, done) = resync.flushed();
            self.record.clear(&equal);
            if done && !self.repair_done() {
                self.events.push(Event::ResyncDone { volume: self.index });
            }
        }
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
    use crate::disk::metadata::layout::Geometry;
    use crate::limits::{DIRTY_GRAIN_LEN as G, RESYNC_CHUNK_LEN};
    use proptest::prelude::*;

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

    fn header(start: u64, len: u64, mask: u64) -> Header {
        let mut header = Header::new(Kind::Dirty, Epoch(1));
        (header.range, header.aux) = (ByteRange::new(start, len), mask);
        header
    }

    #[test]
    fn marks_that_cannot_be_are_refused() {
        let size = 100 * G + 4096;
        let wrong = [
            header(1, G, 0),
            header(0, G + 1, 0),
            header(100 * G, G, 0),
            header(0, 64 * G - 1, 1),
            header(0, 64 * 3 * 4096, 1),
            header(0, 64 * 2048, 1),
            header(0, 64 << 21, 1),
            header(64 * G, 64 * G, 1 << 37),
            header(128 * G, 64 * G, 1),
            header(u64::MAX - 4095, 64 * G, 1),
        ];
        for header in wrong {
            assert!(told_ranges(&header, size).is_err(), "{header:?}");
        }
        let tail: Vec<_> = told_ranges(&header(64 * G, 64 * G, 1 << 36), size).expect("the last").collect();
        assert_eq!(tail, [ByteRange::new(100 * G, 4096)], "cut at the volume's end");
        let whole: Vec<_> = told_ranges(&header(0, size, 0), size).expect("all of it").collect();
        assert_eq!(whole, [ByteRange::new(0, size)]);
    }

    proptest! {
        /// Whatever is marked arrives, nothing else, in messages that the receiver accepts; at another grain as well.
        #[test]
        fn what_is_told_is_what_is_marked(
            marks in prop::collection::vec((0..5000u64, 1..300u64), 0..40),
            other_grain in prop::sample::select(vec![4096, G, 1 << 20]),
        ) {
            let size = 5000 * G + 4096;
            let mut dirty = DirtyBitmap::new(Geometry::for_volume(size).expect("usual"));
            let mut heard = DirtyBitmap::new(Geometry::new(size, other_grain, 4 << 20, 1024).expect("good"));
            let (mut told, mut marked) = (0, 0);
            for (start, count) in marks {
                let start = start * G;
                let _ = dirty.set(ByteRange::new(start, (count * G).min(size - start)));
            }
            let mut receiver = Resync::new(G, size, false);
            let mut cursor = 0;
            while let Some((header, next)) = next_told(&dirty, cursor, Epoch(1)) {
                let header = Header::decode(&header.encode()).expect("well formed");
                prop_assert!(receiver.told(header.range));
                for range in told_ranges(&header, size).expect("accepted") {
                    let _ = heard.set(range);
                    told += range.len;
                }
                cursor = next;
            }
            let mut from = 0;
            while let Some(run) = dirty.next_dirty(from, u64::MAX) {
                let found = heard.next_dirty(run.start, u64::MAX).expect("told");
                prop_assert!(found.start <= run.start && found.end() >= run.end());
                marked += run.len;
                from = run.end().next_multiple_of(G);
            }
            prop_assert_eq!(told, marked, "no byte twice, and none that is not marked");
        }
    }
}
