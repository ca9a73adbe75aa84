//! The activity log: names the extents that are being written to, on stable storage before the first write.
//! Sans-IO.
//!
//! After a crash nothing else tells what was in flight. So a change may touch the mapped disk only while its extent
//! is *hot*, that is, named by a transaction on stable storage. After a crash every hot extent counts as dirty as a
//! whole.
//!
//! ```text
//! touch ─▶ Hot ───────────────────────────▶ land, mirror ─▶ written ─┐ grains unconfirmed
//!       └▶ Wait(ticket) ─▶ transaction ─▶ committed(ticket) ─▶ land … │
//!       └▶ Full ─▶ checkpoint, then again      evictable ◀── end_checkpoint
//! ```
//!
//! **When an extent may be evicted.** It must have no change between [`ActivityLog::touch`] and
//! [`ActivityLog::written`], and every grain written since the last checkpoint must be accounted for without the log. A
//! checkpoint is begun by the caller ([`ActivityLog::begin_checkpoint`]), who then sees to two things and says
//! [`ActivityLog::end_checkpoint`]:
//! - What was `written` before is the same on both disks for good, or dirty: with a live peer both disks were flushed,
//!   each flush begun after the checkpoint; alone, every range of [`ActivityLog::for_each_unconfirmed`] is set in the
//!   dirty bitmap.
//! - Every bit that the dirty bitmap had at the checkpoint's beginning, or got by that, is in the stored bitmap. With a live
//!   peer as well: what was written alone before may still wait for its copy, with no record but the log.
//!
//! If the session ends in between, the flush of the peer proves nothing any more: [`ActivityLog::abort_checkpoint`].
//!
//! **What the caller keeps to.** `touch` before the first byte of the mapping changes, and go on only when it said
//! `Hot` or its ticket is committed. `written` when the change stands here and the peer has applied it (or it is marked
//! dirty because there is no peer); then its range is unlocked. When the session ends, everything unconfirmed and
//! everything still in flight is set in the dirty bitmap before anything is acknowledged alone.
//!
//! **Invariants.** At any crash the stored log names a superset of the extents with a touch that was let through and is
//! not accounted for otherwise. One transaction is under way at a time. All bounds are the geometry's; in the steady
//! state nothing allocates but a transaction.
//!
//! **Survives** a torn or lost transaction (nothing it names was written to yet, and what it evicted needed no record), a
//! flipped bit in any of them (see [`ring`]), and a crash during recovery.

use super::metadata::layout::Geometry;
pub use super::metadata::layout::{CONTEXT_LEN, UPDATES_MAX};
use crate::units::ByteRange;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};

pub mod ring;
#[cfg(test)]
mod tests;

pub use ring::Transaction;

/// The transaction to wait for: its number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Ticket(pub u64);

/// Answer to [`ActivityLog::touch`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "the disk may be written to only when its extents are hot"]
pub enum Touch {
    /// The change may land now.
    Hot,
    /// The change may land once [`ActivityLog::is_committed`] says so of this ticket.
    Wait(Ticket),
    /// No room: nothing was touched. Try again after the next commit or checkpoint; see
    /// [`ActivityLog::wants_checkpoint`].
    Full,
    /// Longer than [`Geometry::touch_len_max`]: nothing was touched. Do it in pieces.
    TooLong,
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Names no extent; the stored log may still name an old one.
    Empty,
    /// In the next transaction.
    Staged,
    /// In the transaction under way.
    Committing,
    /// On record.
    Hot,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    state: State,
    extent: u64,
    /// Changes between `touch` and `written`.
    pins: u32,
    /// Some grain was written and is not accounted for without the log.
    unconfirmed: bool,
    /// Neighbours by time of use.
    newer: u32,
    older: u32,
}

impl Slot {
    fn is_evictable(&self) -> bool {
        let settled = matches!(self.state, State::Empty | State::Hot);
        settled && self.pins == 0 && !self.unconfirmed
    }
}

/// Spreads extent numbers over the index's table: one multiplication, as each change asks twice. Whoever picks numbers
/// that collide gains nothing: the table has a few thousand entries at most.
#[derive(Clone, Copy, Default, Debug)]
struct Spread;

impl BuildHasher for Spread {
    type Hasher = SpreadHasher;

    fn build_hasher(&self) -> SpreadHasher {
        SpreadHasher(0)
    }
}

#[derive(Debug)]
struct SpreadHasher(u64);

impl Hasher for SpreadHasher {
    fn write_u64(&mut self, extent: u64) {
        let product = u128::from(self.0 ^ extent) * u128::from(0x9E37_79B9_7F4A_7C15_u64);
        // Both halves: the table looks at the highest bits and at the lowest.
        self.0 = u64::try_from(product >> 64).expect("the upper half")
            ^ u64::try_from(product & u128::from(u64::MAX)).expect("the lower half");
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// The activity log of one disk.
#[derive(Debug)]
pub struct ActivityLog {
    geometry: Geometry,
    area: u64,
    slots: Vec<Slot>,
    index: HashMap<u64, u32, Spread>,
    newest: u32,
    oldest: u32,
    evictable: usize,
    /// Slots with `unconfirmed` set.
    unconfirmed: usize,
    /// Some extent was not hot when it was touched since the last checkpoint began.
    missed: bool,
    staged: Vec<u32>,
    /// Words of a slot in each of the masks.
    mask_words: usize,
    /// Grains written since the last checkpoint began.
    open: Vec<u64>,
    /// Grains written before that which it has not accounted for yet.
    sealed: Vec<u64>,
    checkpoint: bool,
    issued: u64,
    durable: u64,
    /// Transactions due only so that the stored table forgets what the one in memory has.
    retelling: u64,
}

impl ActivityLog {
    /// A log that names no extent; its next transaction is number `durable + 1`.
    #[must_use]
    pub fn new(geometry: Geometry, area: u64, durable: u64) -> Self {
        let count = geometry.slots();
        let slot = |at: u32| Slot {
            state: State::Empty,
            extent: 0,
            pins: 0,
            unconfirmed: false,
            newer: at.checked_sub(1).unwrap_or(NONE),
            older: if at + 1 == count { NONE } else { at + 1 },
        };
        let slots: Vec<_> = (0..count).map(slot).collect();
        let grains = geometry.extent_len() / geometry.grain_len();
        let mask_words = usize::try_from(grains.div_ceil(64)).expect("the geometry bounds it");
        Self {
            geometry,
            area,
            index: HashMap::with_capacity_and_hasher(2 * slots.len(), Spread),
            newest: 0,
            oldest: count - 1,
            evictable: slots.len(),
            unconfirmed: 0,
            missed: false,
            staged: Vec::with_capacity(UPDATES_MAX),
            mask_words,
            open: vec![0; slots.len() * mask_words],
            sealed: vec![0; slots.len() * mask_words],
            checkpoint: false,
            issued: durable,
            durable,
            retelling: 0,
            slots,
        }
    }

    /// The log as it was replayed: its extents are hot, and every grain of them unconfirmed.
    #[must_use]
    pub fn resume(geometry: Geometry, area: u64, durable: u64, table: &[Option<u64>]) -> Self {
        let mut log = Self::new(geometry, area, durable);
        for (at, extent) in (0..).zip(table) {
            let Some(extent) = *extent else { continue };
            // A table that names an extent twice is a superset like any other.
            log.index.entry(extent).or_insert(at);
            log.change(at, |slot| {
                slot.state = State::Hot;
                slot.extent = extent;
                slot.unconfirmed = true;
            });
            log.mask(at, |_, open| open.fill(u64::MAX));
        }
        log
    }

    /// The geometry.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Says that a change of `range` is about to be made. Unless the answer is `Full` or `TooLong`, exactly one
    /// [`ActivityLog::written`] or [`ActivityLog::untouch`] of the same range must follow.
    pub fn touch(&mut self, range: ByteRange) -> Touch {
        if range.len > self.geometry.touch_len_max() {
            return Touch::TooLong;
        }
        let extents = self.extents_of(range);
        // Those that have a slot first, so that no other of this range takes it from them.
        let mut missing = 0;
        for extent in extents.clone() {
            match self.index.get(&extent) {
                Some(&slot) => {
                    self.change(slot, |slot| slot.pins += 1);
                    self.use_now(slot);
                }
                None => missing += 1,
            }
        }
        if missing > 0 {
            self.missed = true;
            if missing > self.evictable || self.staged.len() + missing > UPDATES_MAX {
                for extent in extents {
                    if let Some(&slot) = self.index.get(&extent) {
                        self.change(slot, |slot| slot.pins -= 1);
                    }
                }
                return Touch::Full;
            }
            for extent in extents.clone() {
                if !self.index.contains_key(&extent) {
                    self.stage(extent);
                }
            }
        }
        let mut ticket = 0;
        for extent in extents {
            ticket = ticket.max(match self.slots[self.index[&extent] as usize].state {
                State::Hot => 0,
                State::Committing => self.issued,
                State::Staged => self.issued + 1,
                State::Empty => panic!("an indexed slot names an extent"),
            });
        }
        if ticket == 0 { Touch::Hot } else { Touch::Wait(Ticket(ticket)) }
    }

    /// Gives `extent` the slot that was not used for longest, pinned once.
    fn stage(&mut self, extent: u64) {
        let mut at = self.oldest;
        while !self.slots[at as usize].is_evictable() {
            at = self.slots[at as usize].newer;
            assert!(at != NONE, "the evictable slots were counted");
        }
        let before = self.slots[at as usize];
        if before.state == State::Hot && self.index.get(&before.extent) == Some(&at) {
            self.index.remove(&before.extent);
        }
        self.change(at, |slot| {
            slot.state = State::Staged;
            slot.extent = extent;
            slot.pins = 1;
        });
        self.index.insert(extent, at);
        self.staged.push(at);
        self.use_now(at);
    }

    /// A touched change stands on this disk, and on the peer's or in the dirty bitmap.
    ///
    /// # Panics
    /// When it was not touched.
    pub fn written(&mut self, range: ByteRange) {
        for extent in self.extents_of(range) {
            let slot = self.pinned(extent);
            assert!(self.slots[slot as usize].state == State::Hot, "extent {extent} is not on record");
            let (first, last) = self.grains_in(extent, range);
            self.mask(slot, |_, open| {
                for grain in first..=last {
                    open[grain / 64] |= 1 << (grain % 64);
                }
            });
            self.change(slot, |slot| {
                slot.pins -= 1;
                slot.unconfirmed = true;
            });
        }
    }

    /// A touched change was given up before it changed a byte.
    ///
    /// # Panics
    /// When it was not touched.
    pub fn untouch(&mut self, range: ByteRange) {
        for extent in self.extents_of(range) {
            let slot = self.pinned(extent);
            self.change(slot, |slot| slot.pins -= 1);
        }
    }

    fn pinned(&self, extent: u64) -> u32 {
        let slot = self.index.get(&extent).copied().filter(|&slot| self.slots[slot as usize].pins > 0);
        slot.unwrap_or_else(|| panic!("extent {extent} was not touched"))
    }

    /// The next transaction to store, if one is due and none is under way.
    pub fn next_transaction(&mut self) -> Option<Transaction> {
        if self.issued > self.durable || (self.staged.is_empty() && self.retelling == 0) {
            return None;
        }
        self.issued += 1;
        self.retelling = self.retelling.saturating_sub(1);
        let mut updates = std::mem::take(&mut self.staged);
        for &at in &updates {
            self.change(at, |slot| slot.state = State::Committing);
        }
        let transaction = ring::encode(self.geometry, self.area, self.issued, &updates, |at| {
            let slot = &self.slots[at as usize];
            (slot.state != State::Empty).then_some(slot.extent)
        });
        updates.clear();
        self.staged = updates;
        Some(transaction)
    }

    /// The transaction under way is on stable storage.
    ///
    /// # Panics
    /// When `ticket` is not its number.
    pub fn committed(&mut self, ticket: Ticket) {
        assert!(ticket.0 == self.issued && self.issued > self.durable, "{ticket:?} is not under way");
        self.durable = self.issued;
        for at in 0..self.geometry.slots() {
            if self.slots[at as usize].state == State::Committing {
                self.change(at, |slot| slot.state = State::Hot);
            }
        }
    }

    /// Takes what is staged for hot at once: for a log that is stored nowhere.
    pub fn commit_nowhere(&mut self) {
        if self.staged.is_empty() {
            return;
        }
        self.issued += 1;
        self.durable = self.issued;
        while let Some(at) = self.staged.pop() {
            self.change(at, |slot| slot.state = State::Hot);
        }
    }

    /// Whether what waited for `ticket` may go on.
    #[must_use]
    pub fn is_committed(&self, ticket: Ticket) -> bool {
        ticket.0 <= self.durable
    }

    /// Whether a transaction is due that [`ActivityLog::next_transaction`] will give.
    #[must_use]
    pub fn has_transaction(&self) -> bool {
        self.issued == self.durable && (!self.staged.is_empty() || self.retelling > 0)
    }

    /// Whether a checkpoint should begin, and none has: few extents can be evicted, it would make more of them so, and
    /// there were changes that needed one.
    #[must_use]
    pub fn wants_checkpoint(&self) -> bool {
        !self.checkpoint && self.missed && self.unconfirmed > 0 && self.evictable < self.slots.len() / 4
    }

    /// Whether something was written that is not accounted for without the log.
    #[must_use]
    pub fn has_unconfirmed(&self) -> bool {
        self.unconfirmed > 0
    }

    /// Begins a checkpoint of what was written so far; see the module's doc.
    ///
    /// # Panics
    /// When one is under way.
    pub fn begin_checkpoint(&mut self) {
        assert!(!std::mem::replace(&mut self.checkpoint, true), "one checkpoint at a time");
        self.missed = false;
        std::mem::swap(&mut self.open, &mut self.sealed);
        self.open.fill(0);
    }

    /// Everything written before the checkpoint began is accounted for without the log.
    ///
    /// # Panics
    /// When none is under way.
    pub fn end_checkpoint(&mut self) {
        assert!(std::mem::replace(&mut self.checkpoint, false), "no checkpoint is under way");
        self.sealed.fill(0);
        for at in 0..self.geometry.slots() {
            if self.slots[at as usize].unconfirmed {
                let mut left = false;
                self.mask(at, |_, open| left = open.iter().any(|word| *word != 0));
                self.change(at, |slot| slot.unconfirmed = left);
            }
        }
    }

    /// The checkpoint came to nothing: what it was about waits for the next. Does nothing where none is under way.
    pub fn abort_checkpoint(&mut self) {
        if std::mem::take(&mut self.checkpoint) {
            self.missed = true;
            for (open, sealed) in self.open.iter_mut().zip(&mut self.sealed) {
                *open |= std::mem::take(sealed);
            }
        }
    }

    /// Whether a checkpoint is under way.
    #[must_use]
    pub fn in_checkpoint(&self) -> bool {
        self.checkpoint
    }

    /// Every run of grains that was written and is not accounted for, cut at the disk's end. Changes still between
    /// `touch` and `written` are the caller's to add.
    pub fn for_each_unconfirmed(&self, mut tell: impl FnMut(ByteRange)) {
        let (size, grain_len) = (self.geometry.size(), self.geometry.grain_len());
        let grains = self.geometry.extent_len() / grain_len;
        for (at, slot) in self.slots.iter().enumerate().filter(|(_, slot)| slot.unconfirmed) {
            let words = at * self.mask_words..(at + 1) * self.mask_words;
            let (open, sealed) = (&self.open[words.clone()], &self.sealed[words]);
            let mut grain = 0;
            while grain < grains {
                let is_set = |grain: u64| {
                    let (word, mask) = (usize::try_from(grain / 64).expect("small"), 1 << (grain % 64));
                    (open[word] | sealed[word]) & mask != 0
                };
                let first = grain;
                while grain < grains && is_set(grain) {
                    grain += 1;
                }
                let start = slot.extent * self.geometry.extent_len() + first * grain_len;
                let end = (start + (grain - first) * grain_len).min(size);
                if end > start {
                    tell(ByteRange::new(start, end - start));
                }
                grain += u64::from(grain == first);
            }
        }
    }

    /// Lets go of every extent that can be evicted, on record as well: for a clean end, and after a recovery. The
    /// transactions due tell the whole table.
    pub fn retire_idle(&mut self) {
        for at in 0..self.geometry.slots() {
            let slot = self.slots[at as usize];
            if slot.state == State::Hot && slot.is_evictable() {
                if self.index.get(&slot.extent) == Some(&at) {
                    self.index.remove(&slot.extent);
                }
                self.change(at, |slot| slot.state = State::Empty);
            }
        }
        self.retelling = ring::cycle_len(self.geometry);
    }

    /// The extents that are hot or about to be.
    pub fn hot_extents(&self) -> impl Iterator<Item = ByteRange> + '_ {
        let named = self.slots.iter().filter(|slot| slot.state != State::Empty);
        named.map(|slot| extent_range(self.geometry, slot.extent))
    }

    /// Number of the last transaction on stable storage.
    #[must_use]
    pub fn durable(&self) -> Ticket {
        Ticket(self.durable)
    }

    /// Bytes of memory it holds, about.
    #[must_use]
    pub fn memory_len(&self) -> usize {
        self.slots.len() * size_of::<Slot>()
            + self.index.capacity() * (size_of::<(u64, u32)>() + 1)
            + (self.open.len() + self.sealed.len()) * 8
    }

    fn extents_of(&self, range: ByteRange) -> std::ops::Range<u64> {
        assert!(range.len > 0 && range.fits(self.geometry.size()), "{range} leaves the volume");
        let len = self.geometry.extent_len();
        range.start / len..(range.end() - 1) / len + 1
    }

    /// The grains of `extent`, counted from its start, that `range` touches: first and last.
    fn grains_in(&self, extent: u64, range: ByteRange) -> (usize, usize) {
        let start = extent * self.geometry.extent_len();
        let last = (range.end() - 1).min(start + self.geometry.extent_len() - 1);
        let grain = |at: u64| {
            usize::try_from((at - start) / self.geometry.grain_len()).expect("the geometry bounds it")
        };
        (grain(range.start.max(start)), grain(last))
    }

    /// Changes a slot and keeps the count of evictable ones.
    fn change(&mut self, at: u32, change: impl FnOnce(&mut Slot)) {
        let slot = &mut self.slots[at as usize];
        let before = slot.is_evictable();
        let unconfirmed = slot.unconfirmed;
        change(slot);
        match (unconfirmed, slot.unconfirmed) {
            (true, false) => self.unconfirmed -= 1,
            (false, true) => self.unconfirmed += 1,
            _ => {}
        }
        match (before, slot.is_evictable()) {
            (true, false) => self.evictable -= 1,
            (false, true) => self.evictable += 1,
            _ => {}
        }
    }

    fn mask(&mut self, at: u32, change: impl FnOnce(&mut [u64], &mut [u64])) {
        let words = at as usize * self.mask_words..(at as usize + 1) * self.mask_words;
        change(&mut self.sealed[words.clone()], &mut self.open[words]);
    }

    /// Moves a slot to the newest end.
    fn use_now(&mut self, at: u32) {
        if self.newest == at {
            return;
        }
        let Slot { newer, older, .. } = self.slots[at as usize];
        self.slots[newer as usize].older = older;
        if older == NONE {
            self.oldest = newer;
        } else {
            self.slots[older as usize].newer = newer;
        }
        self.slots[self.newest as usize].newer = at;
        self.slots[at as usize].older = self.newest;
        self.slots[at as usize].newer = NONE;
        self.newest = at;
    }
}

/// The bytes of an extent, cut at the disk's end.
#[must_use]
pub fn extent_range(geometry: Geometry, extent: u64) -> ByteRange {
    let start = extent * geometry.extent_len();
    ByteRange::new(start, geometry.extent_len().min(geometry.size().saturating_sub(start)))
}
