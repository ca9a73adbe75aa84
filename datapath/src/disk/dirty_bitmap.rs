//! The dirty bitmap: which grains of the disk the peer may lack, and which of its blocks are stored. Sans-IO.
//!
//! A set bit means "these bytes may differ from the peer's". The map lives in memory; its blocks are stored by the
//! caller, who does the I/O: [`DirtyBitmap::take_unsaved`] hands out what to write, [`DirtyBitmap::stored`] hears
//! that it is on stable storage.
//!
//! Invariants, and who upholds them:
//! - **Sets are eager.** A change that is acknowledged without the peer rests on a durable record. That is either its
//!   bit in the stored bitmap ([`DirtyBitmap::is_durable`]) or its extent in the activity log, which stays hot until the
//!   bit is durable. The map never calls a bit durable before [`DirtyBitmap::stored`] said so for a store that was taken
//!   after the bit was set.
//! - **Clears are lazy.** The caller clears a bit only when the grain's bytes are on stable storage on both disks; the
//!   stored bitmap may keep it for as long as it likes. A superset costs a copy, nothing else.
//! - A block is stored by one writer at a time, so that an older picture never lands on a newer one.
//! - A *round* is a promise of its own: begun by [`DirtyBitmap::begin_round`], it is over when every bit that was set by
//!   then is in the stored bitmap, however many are set meanwhile.
//!
//! Survives: a crash at any point (what was set and not stored is covered by the activity log), a store that fails (its
//! bits stay unsaved).

use super::metadata::layout::{BLOCK_WORDS, Geometry};
use crate::units::ByteRange;

#[cfg(test)]
mod tests;

/// A block of the bitmap, as it is to be stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirtyBlock {
    /// Its place in the bitmap.
    pub index: usize,
    /// Its bits.
    pub words: Box<[u64; BLOCK_WORDS]>,
}

/// Whether what was just marked is on record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "a change may be acknowledged alone only when its record is durable"]
pub enum Marked {
    /// The stored bitmap has it.
    Durable,
    /// It does not yet: store what [`DirtyBitmap::take_unsaved`] gives first, or rest on the activity log.
    Unsaved,
}

/// The dirty bits of one disk.
#[derive(Debug)]
pub struct DirtyBitmap {
    geometry: Geometry,
    grain_shift: u32,
    words: Vec<u64>,
    /// One bit a word that is not zero, so that an almost clean map is searched quickly.
    summary: Vec<u64>,
    dirty_count: u64,
    /// Blocks with bits that the stored bitmap may lack.
    unsaved: BlockSet,
    /// Blocks of which the stored bitmap has bits that are cleared here.
    lagging: BlockSet,
    /// Blocks being stored.
    storing: BlockSet,
    /// Those of them that were unsaved when they were taken.
    storing_sets: BlockSet,
    /// Blocks of the present round that are still to be taken.
    round_due: BlockSet,
    /// Blocks of the present round that are being stored.
    round_storing: BlockSet,
}

impl DirtyBitmap {
    /// All clean, and so is the stored bitmap.
    #[must_use]
    pub fn new(geometry: Geometry) -> Self {
        let blocks = index(geometry.dirty_blocks());
        let words = blocks * BLOCK_WORDS;
        Self {
            geometry,
            grain_shift: geometry.grain_len().trailing_zeros(),
            words: vec![0; words],
            summary: vec![0; words.div_ceil(64)],
            dirty_count: 0,
            unsaved: BlockSet::new(blocks),
            lagging: BlockSet::new(blocks),
            storing: BlockSet::new(blocks),
            storing_sets: BlockSet::new(blocks),
            round_due: BlockSet::new(blocks),
            round_storing: BlockSet::new(blocks),
        }
    }

    /// The shape of the metadata.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Marks every grain that `range` touches.
    pub fn set(&mut self, range: ByteRange) -> Marked {
        if range.len == 0 {
            return Marked::Durable;
        }
        let (first, last) = (range.start >> self.grain_shift, (range.end() - 1) >> self.grain_shift);
        for word in place(first).0..=place(last).0 {
            let marked = self.words[word] | mask_within(word, first, last);
            if self.words[word] != marked {
                self.put(word, marked);
                self.unsaved.insert(word / BLOCK_WORDS);
            }
        }
        if self.is_saved(first, last) { Marked::Durable } else { Marked::Unsaved }
    }

    /// Marks the whole disk.
    pub fn set_all(&mut self) -> Marked {
        self.set(ByteRange::new(0, self.geometry.size()))
    }

    /// Clears the grains that lie wholly inside `range` (or end the disk inside it). Only for bytes that are equal and on
    /// stable storage on both disks.
    pub fn clear(&mut self, range: ByteRange) {
        let first = range.start.div_ceil(self.geometry.grain_len());
        let at_end = range.end() >= self.geometry.size();
        let end = if at_end { self.geometry.grains() } else { range.end() >> self.grain_shift };
        if first >= end {
            return;
        }
        for word in place(first).0..=place(end - 1).0 {
            let cleared = self.words[word] & !mask_within(word, first, end - 1);
            if self.words[word] != cleared {
                self.put(word, cleared);
                self.lagging.insert(word / BLOCK_WORDS);
            }
        }
    }

    /// Whether the stored bitmap has every grain of `range`. May say no for a while where it has.
    #[must_use]
    pub fn is_durable(&self, range: ByteRange) -> bool {
        if range.len == 0 {
            return true;
        }
        let (first, last) = (range.start >> self.grain_shift, (range.end() - 1) >> self.grain_shift);
        let is_set = |word| {
            let mask = mask_within(word, first, last);
            self.words[word] & mask == mask
        };
        self.is_saved(first, last) && (place(first).0..=place(last).0).all(is_set)
    }

    fn is_saved(&self, first: u64, last: u64) -> bool {
        let saved = |block| !self.unsaved.contains(block) && !self.storing_sets.contains(block);
        (place(first).0 / BLOCK_WORDS..=place(last).0 / BLOCK_WORDS).all(saved)
    }

    /// Blocks with bits that the stored bitmap may lack, at most `max`, not those being stored now.
    pub fn take_unsaved(&mut self, max: usize) -> Vec<DirtyBlock> {
        let mut taken = Vec::new();
        let mut from = 0;
        while taken.len() < max
            && let Some(block) = self.unsaved.next(from)
        {
            if !self.storing.contains(block) {
                taken.push(self.take(block));
            }
            from = block + 1;
        }
        taken
    }

    /// Blocks of which the stored bitmap still has cleared bits, at most `max`: for idle moments and a clean end.
    pub fn take_lagging(&mut self, max: usize) -> Vec<DirtyBlock> {
        let mut taken = Vec::new();
        let mut from = 0;
        while taken.len() < max
            && let Some(block) = self.lagging.next(from)
        {
            if !self.storing.contains(block) {
                taken.push(self.take(block));
            }
            from = block + 1;
        }
        taken
    }

    /// Begins a round: what is set by now is to be stored, and [`DirtyBitmap::take_round`] gives what that takes. One at a
    /// time.
    ///
    /// # Panics
    /// When one is under way.
    pub fn begin_round(&mut self) {
        assert!(self.round_is_over(), "one round at a time");
        self.round_due.copy_from(&self.unsaved);
        self.round_storing.copy_from(&self.storing_sets);
    }

    /// Whether no round is under way.
    #[must_use]
    pub fn round_is_over(&self) -> bool {
        self.round_due.count == 0 && self.round_storing.count == 0
    }

    /// Blocks of the present round, at most `max`, not those being stored now.
    pub fn take_round(&mut self, max: usize) -> Vec<DirtyBlock> {
        let mut taken = Vec::new();
        let mut from = 0;
        while taken.len() < max
            && let Some(block) = self.round_due.next(from)
        {
            if !self.storing.contains(block) {
                taken.push(self.take(block));
            }
            from = block + 1;
        }
        taken
    }

    /// The bits of 64 grains, the first of which begins at byte `start`.
    #[must_use]
    pub fn window(&self, start: u64) -> u64 {
        let first = start >> self.grain_shift;
        let (word, shift) = (index(first / 64), first % 64);
        let low = self.words.get(word).map_or(0, |bits| bits >> shift);
        let high =
            if shift == 0 { 0 } else { self.words.get(word + 1).map_or(0, |bits| bits << (64 - shift)) };
        low | high
    }

    fn take(&mut self, block: usize) -> DirtyBlock {
        self.storing.insert(block);
        if self.round_due.remove(block) {
            self.round_storing.insert(block);
        }
        if self.unsaved.remove(block) {
            self.storing_sets.insert(block);
        }
        self.lagging.remove(block);
        let mut words = Box::new([0; BLOCK_WORDS]);
        words.copy_from_slice(&self.words[block * BLOCK_WORDS..][..BLOCK_WORDS]);
        DirtyBlock { index: block, words }
    }

    /// A block that was taken is on stable storage.
    ///
    /// # Panics
    /// When it was not taken.
    pub fn stored(&mut self, block: usize) {
        assert!(self.storing.remove(block), "block {block} was not being stored");
        self.storing_sets.remove(block);
        self.round_storing.remove(block);
    }

    /// A block that was taken could not be stored: it is to be stored anew.
    ///
    /// # Panics
    /// When it was not taken.
    pub fn not_stored(&mut self, block: usize) {
        assert!(self.storing.remove(block), "block {block} was not being stored");
        if self.storing_sets.remove(block) {
            self.unsaved.insert(block);
        }
        if self.round_storing.remove(block) {
            self.round_due.insert(block);
        }
        // What is on the disk now is either picture.
        self.lagging.insert(block);
    }

    /// Whether some bit is set that the stored bitmap may lack.
    #[must_use]
    pub fn has_unsaved(&self) -> bool {
        self.unsaved.count > 0 || self.storing_sets.count > 0
    }

    /// Blocks of which the stored bitmap has bits that are cleared here.
    #[must_use]
    pub fn lagging_len(&self) -> usize {
        self.lagging.count
    }

    /// Takes over the words at `at` as they are stored; for reading the bitmap in. Bits behind the disk's end are dropped.
    pub(super) fn load(&mut self, at: usize, words: impl Iterator<Item = u64>) {
        let grains = self.geometry.grains();
        for (word, value) in (at..).zip(words) {
            let before = word as u64 * 64;
            let kept = match grains.saturating_sub(before) {
                0 => 0,
                left @ 1..64 => value & ((1 << left) - 1),
                _ => value,
            };
            if kept != 0 {
                self.put(word, kept);
            }
        }
    }

    /// The first run of dirty grains at or after byte `from`, cut to about `len_max` bytes (whole grains, at least one)
    /// and the disk's end.
    #[must_use]
    pub fn next_dirty(&self, from: u64, len_max: u64) -> Option<ByteRange> {
        let grains = self.geometry.grains();
        let mut bit = self.next_set(from >> self.grain_shift)?;
        let start = bit << self.grain_shift;
        let mut end = start;
        while bit < grains && end - start < len_max && self.is_set(bit) {
            bit += 1;
            end = bit << self.grain_shift;
        }
        Some(ByteRange::new(start, end.min(self.geometry.size()) - start))
    }

    /// The first set bit at or after `bit`.
    fn next_set(&self, bit: u64) -> Option<u64> {
        let (word, mask) = place(bit);
        let rest = self.words.get(word)? & !(mask - 1);
        if rest != 0 {
            return Some(word as u64 * 64 + u64::from(rest.trailing_zeros()));
        }
        let word = next_bit(&self.summary, word + 1)?;
        Some(word as u64 * 64 + u64::from(self.words[word].trailing_zeros()))
    }

    /// Bytes marked, at the map's grain; the last grain has no more than the disk.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        let behind_end = (self.geometry.grains() << self.grain_shift) - self.geometry.size();
        let last = self.is_set(self.geometry.grains() - 1);
        (self.dirty_count << self.grain_shift) - if last { behind_end } else { 0 }
    }

    /// Grains marked.
    #[must_use]
    pub fn dirty_grains(&self) -> u64 {
        self.dirty_count
    }

    /// Bytes of memory it holds.
    #[must_use]
    pub fn memory_len(&self) -> usize {
        let round = [&self.round_due, &self.round_storing];
        let sets = [&self.unsaved, &self.lagging, &self.storing, &self.storing_sets].into_iter().chain(round);
        let blocks: usize = sets.map(|set| set.words.len()).sum();
        (self.words.len() + self.summary.len() + blocks) * 8
    }

    fn is_set(&self, bit: u64) -> bool {
        let (word, mask) = place(bit);
        self.words[word] & mask != 0
    }

    fn put(&mut self, word: usize, value: u64) {
        let before = self.words[word];
        self.dirty_count = self.dirty_count - u64::from(before.count_ones()) + u64::from(value.count_ones());
        self.words[word] = value;
        let mask = 1 << (word % 64);
        if value == 0 {
            self.summary[word / 64] &= !mask;
        } else {
            self.summary[word / 64] |= mask;
        }
    }
}

/// Some of the bitmap's blocks.
#[derive(Debug)]
struct BlockSet {
    words: Vec<u64>,
    count: usize,
}

impl BlockSet {
    fn new(blocks: usize) -> Self {
        Self { words: vec![0; blocks.div_ceil(64)], count: 0 }
    }

    fn copy_from(&mut self, other: &Self) {
        self.words.copy_from_slice(&other.words);
        self.count = other.count;
    }

    fn contains(&self, block: usize) -> bool {
        self.words[block / 64] & (1 << (block % 64)) != 0
    }

    fn insert(&mut self, block: usize) {
        self.count += usize::from(!self.contains(block));
        self.words[block / 64] |= 1 << (block % 64);
    }

    /// Returns whether it was there.
    fn remove(&mut self, block: usize) -> bool {
        let was = self.contains(block);
        self.count -= usize::from(was);
        self.words[block / 64] &= !(1 << (block % 64));
        was
    }

    fn next(&self, from: usize) -> Option<usize> {
        if self.count == 0 { None } else { next_bit(&self.words, from) }
    }
}

/// The first set bit at or after `from`.
fn next_bit(words: &[u64], from: usize) -> Option<usize> {
    let mut at = from / 64;
    let mut rest = words.get(at)? & !((1 << (from % 64)) - 1);
    while rest == 0 {
        at += 1;
        rest = *words.get(at)?;
    }
    Some(at * 64 + rest.trailing_zeros() as usize)
}

fn index(n: u64) -> usize {
    usize::try_from(n).expect("the geometry bounds it")
}

/// The bits of `word` that lie in `first..=last`, of which it has at least one.
fn mask_within(word: usize, first: u64, last: u64) -> u64 {
    let start = word as u64 * 64;
    let low = first.saturating_sub(start);
    let high = (last - start).min(63);
    (u64::MAX << low) & (u64::MAX >> (63 - high))
}

fn place(bit: u64) -> (usize, u64) {
    (index(bit / 64), 1 << (bit % 64))
}
