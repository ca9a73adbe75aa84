//! The background copy: what to send next, when its bits may be cleared, and when it is done. Sans-IO.
//!
//! The copy waits until the peer has told its own dirty bitmap, then walks the union of both once, a bounded number of
//! steps at a time. Each step goes through the same range locks and the same pipeline as a client's write, so that the
//! peer applies both in one order; writes that arrive meanwhile are mirrored wherever the cursor stands.
//!
//! Invariant: a bit is cleared only after a flush of both disks that began after its grain was applied
//! ([`Resync::take_flush`], [`Resync::flushed`]). What a lost session leaves is therefore still marked, and the next copy
//! goes on with it.
//!
//! What the peer had applied in a session before, and has still, is not sent again: it is flushed as soon as the first step of
//! this session is answered, never before, as a flush behind no step is no flush of the peer's disk.
//!
//! A copy may compare first: a step then asks the peer whether it holds other bytes, a stretch that differs is asked for
//! grain by grain, and only grains that differ are sent; equal ones count as applied. How long steps are and how many go
//! at a time is [`super::throttle`]'s business; steps that send may be shorter than a grain, and a grain is cleared when all
//! of it was applied.

use super::ranges::Ranges;
use crate::disk::dirty_bitmap::DirtyBitmap;
use crate::limits::{RESYNC_FLUSH_LEN, RESYNC_FLUSH_MS, RESYNC_HOLE_LEN_MAX, RESYNC_RUNS_MAX};
use crate::units::ByteRange;
use std::collections::VecDeque;
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
    grain_len: u64,
    size: u64,
    compares: bool,
    cursor: u64,
    /// Stretches behind the cursor that need another step.
    again: VecDeque<Wanted>,
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
    applied: Ranges,
    applied_len: u64,
    /// Those that the flush under way covers.
    flushing: Option<Vec<ByteRange>>,
    /// When `applied` got its first.
    waiting_since: Option<Instant>,
    /// What is marked and was applied by the peer in a session before this one; in order, whole grains.
    equal: Vec<ByteRange>,
    /// The same, until the peer has answered a step: a flush of nothing that was posted is none.
    equal_unflushed: Vec<ByteRange>,
    /// What was applied is to be flushed at once.
    hurry: bool,
    /// The last flush has ended.
    ended: bool,
}

impl Resync {
    /// A copy that waits for the peer's word, of a disk of `size` bytes. `grain_len` is our dirty bitmap's; `compares` where
    /// what is equal is not to be sent.
    #[must_use]
    pub fn new(grain_len: u64, size: u64, compares: bool) -> Self {
        Self {
            grain_len,
            size,
            compares,
            cursor: 0,
            again: VecDeque::new(),
            steps_in_flight: 0,
            stage: Stage::Told,
            kept: false,
            told_until: 0,
            total: 0,
            done: 0,
            data_until: 0,
            applied: Ranges::default(),
            applied_len: 0,
            flushing: None,
            waiting_since: None,
            equal: Vec::new(),
            equal_unflushed: Vec::new(),
            hurry: false,
            ended: false,
        }
    }

    /// The peer tells of marks in `range`. False when it may not: it has said that that was all, or goes back.
    #[must_use]
    pub fn told(&mut self, range: ByteRange) -> bool {
        let in_turn = self.stage == Stage::Told && range.start >= self.told_until;
        self.told_until = range.end();
        in_turn
    }

    /// The peer has told all: the copy of everything marked in `dirty` begins, but for what is `equal` by what the two
    /// remember of a session before, which only waits for a flush. That is of whole grains, in order. False when the peer has
    /// said so before.
    #[must_use]
    pub fn told_all(&mut self, dirty: &DirtyBitmap, equal: Vec<ByteRange>) -> bool {
        if self.stage != Stage::Told {
            return false;
        }
        self.stage = Stage::Copying;
        self.total = dirty.dirty_bytes().saturating_sub(equal.iter().map(|range| range.len).sum());
        self.equal_unflushed.clone_from(&equal);
        self.equal = equal;
        true
    }

    /// The session goes on over another link. A peer that has not told all its marks tells them again from the first on.
    /// Returns whether it may still wait for the word that its marks are on our record.
    pub fn goes_on(&mut self) -> bool {
        self.told_until = 0;
        self.kept
    }

    /// Where nothing is left to send but what is equal, one grain of that is sent all the same: only a flush behind a step
    /// is a flush of the peer's disk.
    pub fn ask_for_a_step(&mut self, dirty: &DirtyBitmap) {
        if self.steps_in_flight == 0
            && self.stage == Stage::Copying
            && let Some(first) = self.equal_unflushed.first()
            && self.left(dirty).is_none()
        {
            let range = ByteRange::new(first.start, first.len.min(self.grain_len));
            self.total += range.len;
            self.again.push_back(Wanted { range, differs: false });
        }
    }

    /// The session is given up: whole grains that the peer has applied, or holds the same bytes of, and whose marks no flush
    /// has cleared yet.
    pub fn applied_whole(&mut self) -> Vec<ByteRange> {
        let mut whole = self.flushing.take().unwrap_or_default();
        whole.append(&mut self.applied.take_whole(self.grain_len, self.size));
        whole
    }

    /// The same for parts of grains, after [`Resync::applied_whole`].
    pub fn applied_in_part(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.applied.iter()
    }

    /// Whether all is copied, and durable.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.ended
    }

    /// Whether the peer still has marks to tell.
    #[must_use]
    pub fn awaits_map(&self) -> bool {
        self.stage == Stage::Told
    }

    /// What the peer told is on our record; the copy does not end before.
    pub fn kept(&mut self) {
        self.kept = true;
    }

    /// Whether to ask the peer before sending `wanted`.
    #[must_use]
    pub fn compares(&self, wanted: Wanted) -> bool {
        self.compares && !wanted.differs
    }

    /// What to do next, or `None` when nothing is left to begin, or too much waits for a flush. The caller says with
    /// [`Resync::took`] how much of it the step covers.
    #[must_use]
    pub fn next(&self, dirty: &DirtyBitmap) -> Option<Wanted> {
        if self.applied.len() >= RESYNC_RUNS_MAX { None } else { self.left(dirty) }
    }

    fn left(&self, dirty: &DirtyBitmap) -> Option<Wanted> {
        if self.stage != Stage::Copying {
            return None;
        }
        if let Some(again) = self.again.front() {
            return Some(*again);
        }
        if self.cursor >= self.size {
            return None;
        }
        let mut cursor = self.cursor;
        while cursor < self.size {
            let marked = dirty.next_dirty(cursor, RESYNC_HOLE_LEN_MAX)?;
            // The cursor may stand within a grain.
            let start = marked.start.max(cursor);
            let equal = self.equal.get(self.equal.partition_point(|equal| equal.end() <= start));
            let end = match equal {
                Some(equal) if equal.start <= start => {
                    cursor = equal.end();
                    continue;
                }
                Some(equal) => marked.end().min(equal.start),
                None => marked.end(),
            };
            return Some(Wanted { range: ByteRange::new(start, end - start), differs: false });
        }
        None
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
    ///
    /// # Panics
    /// When it is another range.
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

    /// The peer applied a step, or holds the same bytes.
    pub fn applied(&mut self, range: ByteRange) {
        self.steps_in_flight -= 1;
        self.done = (self.done + range.len).min(self.total);
        self.applied_len += range.len;
        self.applied.insert(range);
        // The peer may be gone again in a moment: what it had applied before is to be durable by then.
        self.hurry |= !self.equal_unflushed.is_empty();
        for equal in self.equal_unflushed.drain(..) {
            self.applied.insert(equal);
        }
    }

    /// The peer holds other bytes in the range of a step that asked.
    pub fn differs(&mut self, range: ByteRange) {
        self.steps_in_flight -= 1;
        let mut start = range.start;
        while start < range.end() {
            let len = self.grain_len.min(range.end() - start);
            let differs = len == range.len;
            self.again.push_back(Wanted { range: ByteRange::new(start, len), differs });
            start += len;
        }
    }

    /// Whether to flush both disks now. When that has ended, [`Resync::flushed`] is to be called.
    pub fn take_flush(&mut self, dirty: &DirtyBitmap, now: Instant) -> bool {
        if self.flushing.is_some() || self.stage != Stage::Copying {
            return false;
        }
        let is_last = self.kept && self.steps_in_flight == 0 && self.left(dirty).is_none();
        if is_last {
            self.stage = Stage::Flushing;
        } else if self.applied.is_empty() {
            return false;
        } else {
            let since = *self.waiting_since.get_or_insert(now);
            let waited = now.duration_since(since) >= Duration::from_millis(RESYNC_FLUSH_MS);
            if !waited
                && !self.hurry
                && self.applied_len < RESYNC_FLUSH_LEN
                && self.applied.len() < RESYNC_RUNS_MAX
            {
                return false;
            }
        }
        self.flushing = Some(self.applied.take_whole(self.grain_len, self.size));
        self.applied_len = 0;
        self.waiting_since = None;
        self.hurry = false;
        true
    }

    /// The flush ended. Gives back whose bits may be cleared, and whether the copy is done.
    ///
    /// # Panics
    /// When none was under way.
    pub fn flushed(&mut self) -> (Vec<ByteRange>, bool) {
        self.ended = self.stage == Stage::Flushing;
        (self.flushing.take().expect("a flush was under way"), self.ended)
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
mod tests;
