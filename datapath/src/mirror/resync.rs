//! The background copy: what to send next, when its bits may be cleared, and when it is done. Sans-IO.
//!
//! The copy waits until the peer has told its own dirty map, then walks the union of both once, a bounded number of
//! steps at a time. Each step goes through the same range locks and the same pipeline as a client's write, so that the
//! peer applies both in one order; writes that arrive meanwhile are mirrored wherever the cursor stands.
//!
//! Invariant: a bit is cleared only after a flush of both disks that began after its grain was applied
//! ([`Resync::take_flush`], [`Resync::flushed`]). What a lost session leaves is therefore still marked, and the next copy
//! goes on with it.

use crate::disk::dirty_map::DirtyMap;
use crate::limits::{
    RESYNC_CHUNK_LEN, RESYNC_CHUNKS_IN_FLIGHT, RESYNC_CHUNKS_WITH_CLIENTS, RESYNC_FLUSH_LEN, RESYNC_FLUSH_MS,
    RESYNC_HOLE_LEN_MAX, RESYNC_RUNS_MAX,
};
use crate::units::ByteRange;
use std::time::{Duration, Instant};

/// Where a copy stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// The peer tells what it has marked.
    Told,
    /// Steps are left or under way.
    Copying,
    /// The last flush was asked for.
    Flushing,
}

/// One background copy, within one session.
#[derive(Debug)]
pub struct Resync {
    grain_len: u64,
    cursor: u64,
    steps_in_flight: usize,
    stage: Stage,
    /// The peer's marks are on our record.
    kept: bool,
    /// End of what the peer told last.
    told_until: u64,
    total: u64,
    done: u64,
    /// Up to here, from the cursor on, the disk was found to hold data.
    data_until: u64,
    /// Runs that the peer applied since the last flush was asked for.
    applied: Vec<ByteRange>,
    applied_len: u64,
    /// Those that the flush under way covers.
    flushing: Option<Vec<ByteRange>>,
    /// When `applied` got its first.
    waiting_since: Option<Instant>,
}

impl Resync {
    /// A copy that waits for the peer's word. `grain_len` is our dirty map's.
    #[must_use]
    pub fn new(grain_len: u64) -> Self {
        Self {
            grain_len,
            cursor: 0,
            steps_in_flight: 0,
            stage: Stage::Told,
            kept: false,
            told_until: 0,
            total: 0,
            done: 0,
            data_until: 0,
            applied: Vec::new(),
            applied_len: 0,
            flushing: None,
            waiting_since: None,
        }
    }

    /// The peer tells of marks in `range`. False when it may not: it has said that that was all, or goes back.
    #[must_use]
    pub fn told(&mut self, range: ByteRange) -> bool {
        let in_turn = self.stage == Stage::Told && range.start >= self.told_until;
        self.told_until = range.end();
        in_turn
    }

    /// The peer has told all: the copy of everything marked in `dirty` begins. False when it has said so before.
    #[must_use]
    pub fn told_all(&mut self, dirty: &DirtyMap) -> bool {
        let first = self.stage == Stage::Told;
        self.stage = Stage::Copying;
        self.total = dirty.dirty_bytes();
        first
    }

    /// What the peer told is on our record; the copy does not end before.
    pub fn kept(&mut self) {
        self.kept = true;
    }

    /// The next dirty range to copy, or `None` while enough is under way or nothing is left. The caller says with
    /// [`Resync::took`] how much of it the step covers.
    #[must_use]
    pub fn next(&self, dirty: &DirtyMap, clients_busy: bool) -> Option<ByteRange> {
        let steps_max = if clients_busy { RESYNC_CHUNKS_WITH_CLIENTS } else { RESYNC_CHUNKS_IN_FLIGHT };
        if self.stage != Stage::Copying
            || self.steps_in_flight >= steps_max
            || self.applied.len() >= RESYNC_RUNS_MAX
        {
            return None;
        }
        dirty.next_dirty(self.cursor, RESYNC_HOLE_LEN_MAX)
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

    /// A step over `range` is under way. Its length must be a multiple of the map's grain, or end the disk.
    pub fn took(&mut self, range: ByteRange) {
        self.cursor = range.end().next_multiple_of(self.grain_len);
        self.steps_in_flight += 1;
    }

    /// A step that was taken could not start: it comes again. So may those taken after it, unless their bits are cleared
    /// by then; that costs their bytes once more and nothing else.
    pub fn untake(&mut self, range: ByteRange) {
        self.cursor = self.cursor.min(range.start);
        // What lies between may have been a hole.
        self.data_until = 0;
        self.steps_in_flight -= 1;
    }

    /// The peer applied a step.
    pub fn applied(&mut self, range: ByteRange) {
        self.steps_in_flight -= 1;
        self.done = (self.done + range.len).min(self.total);
        self.applied_len += range.len;
        match self.applied.last_mut() {
            Some(last) if last.end() == range.start => last.len += range.len,
            _ => self.applied.push(range),
        }
    }

    /// Whether to flush both disks now. When that has ended, [`Resync::flushed`] is to be called.
    pub fn take_flush(&mut self, dirty: &DirtyMap, now: Instant) -> bool {
        if self.flushing.is_some() || self.stage != Stage::Copying {
            return false;
        }
        let is_last =
            self.kept && self.steps_in_flight == 0 && dirty.next_dirty(self.cursor, self.grain_len).is_none();
        if is_last {
            self.stage = Stage::Flushing;
        } else if self.applied.is_empty() {
            return false;
        } else {
            let since = *self.waiting_since.get_or_insert(now);
            let waited = now.duration_since(since) >= Duration::from_millis(RESYNC_FLUSH_MS);
            if !waited && self.applied_len < RESYNC_FLUSH_LEN && self.applied.len() < RESYNC_RUNS_MAX {
                return false;
            }
        }
        self.flushing = Some(std::mem::take(&mut self.applied));
        self.applied_len = 0;
        self.waiting_since = None;
        true
    }

    /// The flush ended. Gives back whose bits may be cleared, and whether the copy is done.
    ///
    /// # Panics
    /// When none was under way.
    pub fn flushed(&mut self) -> (Vec<ByteRange>, bool) {
        (self.flushing.take().expect("a flush was under way"), self.stage == Stage::Flushing)
    }

    /// Bytes of data one step copies at most.
    #[must_use]
    pub fn chunk(&self, range: ByteRange) -> ByteRange {
        ByteRange::new(range.start, range.len.min(RESYNC_CHUNK_LEN.max(self.grain_len)))
    }

    /// The map's grain.
    #[must_use]
    pub fn grain_len(&self) -> u64 {
        self.grain_len
    }

    /// Bytes to copy in all, and bytes of them that the peer has applied.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.total, self.done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::metadata::layout::Geometry;
    use crate::limits::DIRTY_GRAIN_LEN as G;

    fn full(size: u64) -> DirtyMap {
        let mut dirty = DirtyMap::new(Geometry::for_volume(size).expect("usual"));
        let _ = dirty.set_all();
        dirty
    }

    fn begun(dirty: &DirtyMap) -> Resync {
        let mut resync = Resync::new(G);
        assert_eq!(resync.next(dirty, false), None, "the peer has not told yet");
        assert!(resync.told_all(dirty) && !resync.told_all(dirty));
        resync
    }

    #[test]
    fn a_stretch_of_data_is_asked_for_once_and_anew_after_a_step_back() {
        let dirty = full(8 * RESYNC_CHUNK_LEN);
        let mut resync = begun(&dirty);
        let all = resync.next(&dirty, false).expect("all of it");
        assert_eq!(resync.known_data(all), None, "not asked yet");
        resync.found_data(ByteRange::new(0, 3 * RESYNC_CHUNK_LEN));
        let first = resync.chunk(all);
        resync.took(first);
        let rest = resync.next(&dirty, false).expect("more");
        assert_eq!(resync.known_data(rest), Some(ByteRange::new(RESYNC_CHUNK_LEN, 2 * RESYNC_CHUNK_LEN)));
        resync.took(ByteRange::new(RESYNC_CHUNK_LEN, 2 * RESYNC_CHUNK_LEN));
        let beyond = resync.next(&dirty, false).expect("more");
        assert_eq!(resync.known_data(beyond), None, "the end of what was found");
        resync.found_data(beyond);
        resync.untake(first);
        assert_eq!(resync.known_data(all), None, "there may be a hole in front");
    }

    #[test]
    fn it_covers_every_dirty_byte_once_with_bounded_steps_then_flushes_once_more() {
        let size = 10 * RESYNC_CHUNK_LEN + 4096;
        let dirty = full(size);
        let (mut resync, now) = (begun(&dirty), Instant::now());
        let mut under_way = std::collections::VecDeque::new();
        // Clients come when a third is copied and stay.
        let clients_busy = |copied: u64| copied > size / 3;
        let (mut copied, mut kept) = (0, false);
        while !resync.take_flush(&dirty, now) {
            while let Some(marked) = resync.next(&dirty, clients_busy(copied)) {
                let step = resync.chunk(marked);
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
            match under_way.pop_front() {
                Some(step) => resync.applied(step),
                None => {
                    assert!(!std::mem::replace(&mut kept, true), "the peer's marks are not on record yet");
                    resync.kept();
                }
            }
        }
        assert!(kept);
        assert_eq!((copied, resync.progress()), (size, (size, size)));
        assert!(!resync.take_flush(&dirty, now), "once");
        assert_eq!(resync.flushed(), (vec![ByteRange::new(0, size)], true));
    }

    #[test]
    fn a_flush_covers_what_was_applied_before_it_and_comes_by_bytes_or_by_time() {
        let size = 3 * RESYNC_FLUSH_LEN;
        let dirty = full(size);
        let (mut resync, now) = (begun(&dirty), Instant::now());
        let step = |n: u64| ByteRange::new(n * RESYNC_CHUNK_LEN, RESYNC_CHUNK_LEN);
        for n in [0, 1, 3] {
            resync.took(step(n));
        }
        resync.applied(step(0));
        assert!(!resync.take_flush(&dirty, now), "too little");
        resync.applied(step(1));
        let later = now + Duration::from_millis(RESYNC_FLUSH_MS);
        assert!(resync.take_flush(&dirty, later), "time is up");
        resync.applied(step(3));
        assert!(!resync.take_flush(&dirty, later + Duration::from_secs(9)), "one at a time");
        assert_eq!(resync.flushed(), (vec![ByteRange::new(0, 2 * RESYNC_CHUNK_LEN)], false));
        let large = ByteRange::new(4 * RESYNC_CHUNK_LEN, RESYNC_FLUSH_LEN);
        resync.took(large);
        resync.applied(large);
        assert!(resync.take_flush(&dirty, later), "enough");
        let all = ByteRange::new(3 * RESYNC_CHUNK_LEN, RESYNC_CHUNK_LEN + RESYNC_FLUSH_LEN);
        assert_eq!(resync.flushed(), (vec![all], false));
    }

    #[test]
    fn a_map_is_told_forwards_and_once() {
        let mut resync = Resync::new(G);
        assert!(resync.told(ByteRange::new(G, G)) && resync.told(ByteRange::new(2 * G, G)));
        assert!(!resync.told(ByteRange::new(2 * G, G)), "goes back");
        assert!(resync.told_all(&full(8 * G)));
        assert!(!resync.told(ByteRange::new(5 * G, G)), "after its end");
    }
}
