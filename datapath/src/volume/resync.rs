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

use super::Volume;
use super::background::Step;
use super::interface::{Event, Op};
use super::request_table::Request;
use crate::disk::dirty_bitmap::DirtyBitmap;
use crate::disk::inflight::Admission;
use crate::error::Violation;
use crate::limits::{DIRTY_GRAIN_LEN_MAX, DIRTY_GRAIN_LEN_MIN, DIRTY_RUN_LEN_MAX, DIRTY_TOLD_MAX};
use crate::mirror::pipeline::Event as PipelineEvent;
use crate::transport::Link;
use crate::units::{ByteRange, Epoch};
use crate::wire::{Header, Kind, flags};
use std::time::Instant;

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
        let epoch = self.session.epoch();
        if header.epoch < epoch {
            // Of before the roles changed.
            return Ok(());
        }
        let wrong = |what| Violation::DirtyBitmap { what, range: header.range };
        if header.epoch > epoch {
            return Err(Violation::Epoch { found: header.epoch, ours: epoch });
        }
        if header.kind == Kind::DirtyKept {
            match self.session.marks_kept() {
                Some(true) => self.record.clear_all(),
                Some(false) => {}
                None => return Err(wrong("a receipt for marks that were not told")),
            }
            return Ok(());
        }
        let Some(copy) = self.background.copy_mut() else { return Err(wrong("marks that nobody asked for")) };
        if header.kind == Kind::DirtyEnd {
            if !copy.told_all(self.record.dirty(), self.record.doubts()) {
                return Err(wrong("a second end of the marks"));
            }
            self.record.peer_told_all();
            return Ok(());
        }
        let ranges = told_ranges(header, self.disk.size())?;
        if !copy.told(header.range) {
            return Err(wrong("marks out of order"));
        }
        self.session.answered();
        for range in ranges {
            self.record.mark(range);
        }
        Ok(())
    }

    /// Says that the target's marks are on our record, once they are.
    pub(super) fn receipt_marks(&mut self) {
        if self.record.take_told_stored()
            && let Some(copy) = self.background.copy_mut()
        {
            copy.kept();
            self.session.queue_marks_kept();
        }
    }

    /// Begins what steps of the copy may begin, and the flush that is due behind what was applied.
    pub(super) fn step_resync(&mut self, now: Instant) {
        if !self.background.is_copying() || self.session.is_parted() {
            return;
        }
        let urgent = self.pipeline.waits_for_copy();
        while let Some(step) = self.background.next_copy_step(now, urgent, self.record.dirty(), &self.disk) {
            if !self.begin_step(step) {
                break;
            }
        }
        if let Some(origin) = self.background.copy_flush_due(now, urgent, self.record.dirty()) {
            let token = self.requests.add(Request::flush(origin));
            self.pipeline_event(PipelineEvent::FlushBackground(token));
        }
    }

    /// Gives a step its request. False where clients' requests leave no room: it comes again.
    pub(super) fn begin_step(&mut self, step: Step) -> bool {
        let request = Request::of(step.origin, Op::Change(step.kind), step.range, flags::RESYNC);
        let token = self.requests.add(request);
        match self.requests.lock(token) {
            Admission::Granted => {
                self.start(token);
                true
            }
            Admission::Waits => true,
            Admission::Full => {
                self.background.untake(step);
                false
            }
        }
    }

    /// Whether a step that waited is still right.
    pub(super) fn copy_step_holds(&mut self, serial: u64, request: &Request) -> bool {
        let Op::Change(kind) = request.op else { panic!("steps are changes") };
        self.background.copy_step_holds(serial, kind, request.range, &self.disk)
    }

    /// Both disks were flushed for the copy number `serial`.
    pub(super) fn copy_flushed(&mut self, serial: u64) {
        let Some((equal, done)) = self.background.copy_flushed(serial) else { return };
        self.record.clear(&equal);
        if done && !self.repair_done() {
            self.events.push(Event::ResyncDone { volume: self.index });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::metadata::layout::Geometry;
    use crate::limits::DIRTY_GRAIN_LEN as G;
    use crate::mirror::resync::Resync;
    use proptest::prelude::*;

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
