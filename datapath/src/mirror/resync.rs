//! The background copy: what to send next, and when it is done. Sans-IO.
//!
//! The copy walks the dirty bitmap once, a bounded number of steps at a time. Each step goes through the same range
//! locks and the same pipeline as a client's write, so that the peer applies both in one order; writes that arrive
//! meanwhile are mirrored wherever the cursor stands. Today every copy starts from a full bitmap; a copy of what really
//! differs only has to set fewer bits.

use crate::disk::bitmap::Bitmap;
use crate::limits::{DIRTY_GRAIN_LEN, RESYNC_CHUNK_LEN, RESYNC_CHUNKS_IN_FLIGHT, RESYNC_CHUNKS_WITH_CLIENTS};
use crate::units::ByteRange;

/// Where a copy stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Steps are left or under way.
    Copying,
    /// The flush was asked for.
    Flushing,
}

/// One background copy, within one session.
#[derive(Debug)]
pub struct Resync {
    cursor: u64,
    steps_in_flight: usize,
    stage: Stage,
    total: u64,
    /// Up to here, from the cursor on, the disk was found to hold data.
    data_until: u64,
}

impl Resync {
    /// A copy of everything marked in `bitmap`.
    #[must_use]
    pub fn new(bitmap: &Bitmap) -> Self {
        Self {
            cursor: 0,
            steps_in_flight: 0,
            stage: Stage::Copying,
            total: bitmap.dirty_bytes(),
            data_until: 0,
        }
    }

    /// The next dirty range to copy, or `None` while enough is under way or nothing is left. The caller says with
    /// [`Resync::took`] how much of it the step covers.
    #[must_use]
    pub fn next(&self, bitmap: &Bitmap, clients_busy: bool) -> Option<ByteRange> {
        let steps_max = if clients_busy { RESYNC_CHUNKS_WITH_CLIENTS } else { RESYNC_CHUNKS_IN_FLIGHT };
        if self.stage != Stage::Copying || self.steps_in_flight >= steps_max {
            return None;
        }
        bitmap.next_dirty(self.cursor, crate::limits::RESYNC_HOLE_LEN_MAX)
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

    /// A step over `range` is under way. Its length must be a multiple of the bitmap's grain, or end the disk.
    pub fn took(&mut self, range: ByteRange) {
        self.cursor = range.end().next_multiple_of(DIRTY_GRAIN_LEN);
        self.steps_in_flight += 1;
    }

    /// A step that was taken could not start: it comes again. So may those taken after it, unless they are applied by
    /// then; that costs their bytes once more and nothing else.
    pub fn untake(&mut self, range: ByteRange) {
        self.cursor = self.cursor.min(range.start);
        // What lies between may have been a hole.
        self.data_until = 0;
        self.steps_in_flight -= 1;
    }

    /// The peer applied a step.
    pub fn applied(&mut self, range: ByteRange, bitmap: &mut Bitmap) {
        bitmap.clear(range);
        self.steps_in_flight -= 1;
    }

    /// Whether it is time to flush the peer; says yes once.
    pub fn take_flush(&mut self, bitmap: &Bitmap) -> bool {
        let done = self.stage == Stage::Copying
            && self.steps_in_flight == 0
            && bitmap.next_dirty(self.cursor, DIRTY_GRAIN_LEN).is_none();
        if done {
            self.stage = Stage::Flushing;
        }
        done
    }

    /// Bytes of data one step copies at most.
    #[must_use]
    pub fn chunk(range: ByteRange) -> ByteRange {
        ByteRange::new(range.start, range.len.min(RESYNC_CHUNK_LEN))
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
mod tests {
    use super::*;

    #[test]
    fn a_stretch_of_data_is_asked_for_once_and_anew_after_a_step_back() {
        let mut bitmap = Bitmap::new(8 * RESYNC_CHUNK_LEN);
        bitmap.set_all();
        let mut resync = Resync::new(&bitmap);
        let dirty = resync.next(&bitmap, false).expect("all of it");
        assert_eq!(resync.known_data(dirty), None, "not asked yet");
        resync.found_data(ByteRange::new(0, 3 * RESYNC_CHUNK_LEN));
        let first = Resync::chunk(dirty);
        resync.took(first);
        let rest = resync.next(&bitmap, false).expect("more");
        assert_eq!(resync.known_data(rest), Some(ByteRange::new(RESYNC_CHUNK_LEN, 2 * RESYNC_CHUNK_LEN)));
        resync.took(ByteRange::new(RESYNC_CHUNK_LEN, 2 * RESYNC_CHUNK_LEN));
        let beyond = resync.next(&bitmap, false).expect("more");
        assert_eq!(resync.known_data(beyond), None, "the end of what was found");
        resync.found_data(beyond);
        resync.untake(first);
        assert_eq!(resync.known_data(dirty), None, "there may be a hole in front");
    }

    #[test]
    fn it_covers_every_dirty_byte_once_with_bounded_steps_then_flushes_once() {
        let size = 10 * RESYNC_CHUNK_LEN + 4096;
        let mut bitmap = Bitmap::new(size);
        bitmap.set_all();
        let mut resync = Resync::new(&bitmap);
        let mut under_way = std::collections::VecDeque::new();
        // Clients come when a third is copied and stay.
        let clients_busy = |copied: u64| copied > size / 3;
        let mut copied = 0;
        while !resync.take_flush(&bitmap) {
            while let Some(dirty) = resync.next(&bitmap, clients_busy(copied)) {
                let step = Resync::chunk(dirty);
                assert_eq!(step.start, copied, "in order, without gaps");
                resync.took(step);
                copied = step.end();
                under_way.push_back(step);
                let bound = if clients_busy(step.start) {
                    RESYNC_CHUNKS_WITH_CLIENTS
                } else {
                    RESYNC_CHUNKS_IN_FLIGHT
                };
                assert!(under_way.len() <= bound, "{} steps", under_way.len());
            }
            resync.applied(under_way.pop_front().expect("steps under way until done"), &mut bitmap);
        }
        assert_eq!((copied, bitmap.dirty_bytes(), under_way.len()), (size, 0, 0));
        assert!((resync.percent(&bitmap) - 100.0).abs() < 1e-9);
        assert!(!resync.take_flush(&bitmap), "once");
    }
}
