//! The background copy: what to send next, and when it is done. Sans-IO.
//!
//! The copy walks the dirty bitmap once, a bounded number of steps at a time. Each step goes through the same range
//! locks and the same pipeline as a client's write, so that the peer applies both in one order; writes that arrive
//! meanwhile are mirrored wherever the cursor stands. Today every copy starts from a full bitmap; a copy of what really
//! differs only has to set fewer bits.
//!
//! A copy may compare first: a step then asks the peer whether it holds other bytes, a stretch that differs is asked for
//! grain by grain, and only grains that differ are sent. How long steps are and how many go at a time is
//! [`super::pace`]'s business; steps that send may be shorter than a grain, and a grain counts as copied when all of it is.

use super::ranges::Ranges;
use crate::disk::bitmap::Bitmap;
use crate::limits::DIRTY_GRAIN_LEN;
use crate::units::ByteRange;
use std::collections::VecDeque;

/// Where a copy stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Steps are left or under way.
    Copying,
    /// The flush was asked for.
    Flushing,
}

/// What to do next about a stretch of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// The stretch. A step covers the first part of it, or all.
    pub range: ByteRange,
    /// The peer said that its bytes are others; otherwise a copy that compares first asks.
    pub differs: bool,
}

/// One background copy, within one session.
#[derive(Debug)]
pub struct Resync {
    size: u64,
    cursor: u64,
    /// Stretches behind the cursor that need another step.
    again: VecDeque<Wanted>,
    steps_in_flight: usize,
    stage: Stage,
    total: u64,
    /// Up to here, from the cursor on, the disk was found to hold data.
    data_until: u64,
    compares: bool,
    /// Covered by steps, but for the whole grains that were cleared already.
    applied: Ranges,
}

impl Resync {
    /// A copy of everything marked in `bitmap`, of a disk of `size` bytes; `compares` where what is equal is not to be sent.
    #[must_use]
    pub fn new(bitmap: &Bitmap, size: u64, compares: bool) -> Self {
        Self {
            size,
            cursor: 0,
            again: VecDeque::new(),
            steps_in_flight: 0,
            stage: Stage::Copying,
            total: bitmap.dirty_bytes(),
            data_until: 0,
            compares,
            applied: Ranges::default(),
        }
    }

    /// Whether to ask the peer before sending `wanted`.
    #[must_use]
    pub fn compares(&self, wanted: Wanted) -> bool {
        self.compares && !wanted.differs
    }

    /// What to do next, or `None` when nothing is left to begin. The caller says with [`Resync::took`] how much of it the
    /// step covers.
    #[must_use]
    pub fn next(&self, bitmap: &Bitmap) -> Option<Wanted> {
        if self.stage != Stage::Copying {
            return None;
        }
        if let Some(again) = self.again.front() {
            return Some(*again);
        }
        if self.cursor >= self.size {
            return None;
        }
        let dirty = bitmap.next_dirty(self.cursor, crate::limits::RESYNC_HOLE_LEN_MAX)?;
        // The cursor may stand within a grain.
        let start = dirty.start.max(self.cursor);
        Some(Wanted { range: ByteRange::new(start, dirty.end() - start), differs: false })
    }

    /// How much of `dirty`, from its start on, is known to be data. A file system in memory looks at every page to find
    /// the next hole, so the disk is asked once a stretch and not once a step. A hole made since is copied as zeroes.
    #[must_use]
    pub fn known_data(&self, dirty: ByteRange) -> Option<ByteRange> {
        let end = self.data_until.min(dirty.end());
        (end > dirty.start).then(|| ByteRange::new(dirty.start, end - dirty.start))
    }

    /// The disk says that all of `range`, which begins where the copy stands, is data.
    pub fn found_data(&mut self, range: ByteRange) {
        self.data_until = range.end();
    }

    /// A step over `range`, with which what was last wanted begins, is under way.
    pub fn took(&mut self, range: ByteRange) {
        assert!(range.len > 0, "a step covers something");
        self.steps_in_flight += 1;
        let Some(again) = self.again.front_mut() else {
            self.cursor = range.end();
            return;
        };
        assert_eq!(again.range.start, range.start, "a step covers the beginning of what is wanted");
        again.range = ByteRange::new(range.end(), again.range.end() - range.end());
        if again.range.len == 0 {
            self.again.pop_front();
        }
    }

    /// A step that was taken could not start: it comes again.
    pub fn untake(&mut self, range: ByteRange, differs: bool) {
        self.again.push_front(Wanted { range, differs });
        // What was found there may have changed.
        self.data_until = 0;
        self.steps_in_flight -= 1;
    }

    /// The peer applied a step, or found that it need not be sent.
    pub fn applied(&mut self, range: ByteRange, bitmap: &mut Bitmap) {
        self.steps_in_flight -= 1;
        self.applied.insert(range);
        for whole in self.applied.take_whole(DIRTY_GRAIN_LEN, self.size) {
            bitmap.clear(whole);
        }
    }

    /// The peer holds other bytes in the range of a step that asked.
    pub fn differs(&mut self, range: ByteRange) {
        self.steps_in_flight -= 1;
        let mut start = range.start;
        while start < range.end() {
            let len = DIRTY_GRAIN_LEN.min(range.end() - start);
            let differs = len == range.len;
            self.again.push_back(Wanted { range: ByteRange::new(start, len), differs });
            start += len;
        }
    }

    /// Whether it is time to flush the peer; says yes once.
    pub fn take_flush(&mut self, bitmap: &Bitmap) -> bool {
        let done = self.stage == Stage::Copying && self.steps_in_flight == 0 && self.next(bitmap).is_none();
        if done {
            self.stage = Stage::Flushing;
        }
        done
    }

    /// Percent of the bytes to copy that the peer has applied.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a percentage for people")]
    pub fn percent(&self, bitmap: &Bitmap) -> f64 {
        let done = self.total.saturating_sub(bitmap.dirty_bytes());
        if self.total == 0 { 100.0 } else { done as f64 * 100.0 / self.total as f64 }
    }
}

#[cfg(test)]
mod tests;
