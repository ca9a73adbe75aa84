//! Which sections of the disk are registered, which one next, and which one goes for it. Sans-IO.
//!
//! The disk is cut into sections of one power of two. A section that clients write to again and again is worth its
//! registration, which brings all its pages into memory, and on a sparse disk allocates their blocks; one that is passed
//! once is not. So each section has a *heat*: the writes of clients it saw, halved with every era. The second write makes
//! a section a candidate; once the limit is reached, it must also be clearly hotter than the one used least recently.
//!
//! Invariants:
//! - What is registered and being registered never passes the limit.
//! - Only sections that no unfinished work request names are given up, the least recently used by clients first.
//! - One registration is under way at a time; a section whose registration failed waits longer after each failure.
//! - To look a section up takes constant time, and allocates nothing.

use crate::limits::{RDMA_SECTION_LEN, RDMA_SECTION_LEN_MIN, RDMA_SECTIONS_MAX};
use std::io;
use std::ops::Range;

/// Writes of clients after which every section's heat is halved.
const ERA_LEN: u64 = 4096;

/// Writes of clients that a registration is put off for after a failure, the first time.
const PUT_OFF: u64 = 1024;

/// The same where pages of the section were being dropped: that is over soon.
const PUT_OFF_BUSY: u64 = 32;

/// Failures in a row after which a registration is put off no longer than before.
const PUT_OFF_DOUBLINGS: u8 = 16;

/// Writes of clients after which a limit that the system forced upon us is tried again, twice as high: a
/// second or so of a busy volume, for what stood in the way is often a link before this one that is being taken apart.
const LIMIT_TRIED_AFTER: u64 = 1 << 12;

/// The same at most, as each refusal that no success came between doubles it: memory that others hold for good is not
/// asked for all day.
const LIMIT_TRIED_AFTER_MAX: u64 = 1 << 17;

/// Heat that makes a section a candidate.
const CANDIDATE_HEAT: u16 = 2;

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// In `slots`, or [`NONE`].
    slot: u32,
    /// As of `era`.
    heat: u16,
    failures: u8,
    era: u64,
    /// Count of touches from which on it may be registered.
    not_before: u64,
}

/// A registered section. Linked by use.
#[derive(Debug)]
struct Slot<Region> {
    section: u32,
    /// `None` where the slot is free.
    region: Option<Region>,
    newer: u32,
    older: u32,
    /// Of the last work request that names it.
    last_id: u64,
}

/// The table of one disk.
#[derive(Debug)]
pub(super) struct Cache<Region> {
    disk_len: usize,
    shift: u32,
    entries: Vec<Entry>,
    slots: Vec<Slot<Region>>,
    free: Vec<u32>,
    newest: u32,
    oldest: u32,
    limit_configured: usize,
    limit: usize,
    /// Count of touches at which `limit` was forced down or tried again.
    limit_changed: u64,
    /// Touches from then to the next try. Doubled by each refusal, so half of the first one's before it.
    limit_tried_after: u64,
    /// Bytes that were registered when the system last refused more.
    limit_refused_at: usize,
    /// Bytes registered or being registered.
    registered: usize,
    pending: Option<u32>,
    touches: u64,
    /// Work request of the last touch: asking again for the same one is not another write.
    touched_by: u64,
    done: u64,
    evictions: u64,
    failures: u64,
}

impl<Region> Cache<Region> {
    /// For a disk of `disk_len` bytes, of which `limit` may be registered.
    pub(super) fn new(disk_len: usize, limit: usize) -> Self {
        let shift = section_shift(disk_len, limit);
        let sections = disk_len.div_ceil(1 << shift);
        let entry = Entry { slot: NONE, heat: 0, failures: 0, era: 0, not_before: 0 };
        Self {
            disk_len,
            shift,
            entries: vec![entry; sections],
            slots: Vec::new(),
            free: Vec::new(),
            newest: NONE,
            oldest: NONE,
            limit_configured: limit,
            limit,
            limit_changed: 0,
            limit_tried_after: LIMIT_TRIED_AFTER / 2,
            limit_refused_at: 0,
            registered: 0,
            pending: None,
            touches: 0,
            touched_by: 0,
            done: 0,
            evictions: 0,
            failures: 0,
        }
    }

    /// The section that byte `at` of the disk is in.
    pub(super) fn section_of(&self, at: usize) -> u32 {
        u32::try_from(at >> self.shift).expect("fewer than 2^32 sections")
    }

    /// The bytes of the disk that a section has.
    pub(super) fn bytes(&self, section: u32) -> Range<usize> {
        let start = (section as usize) << self.shift;
        start..(start + (1 << self.shift)).min(self.disk_len)
    }

    fn len(&self, section: u32) -> usize {
        self.bytes(section).len()
    }

    fn heat(&self, section: u32) -> u16 {
        let entry = &self.entries[section as usize];
        let eras = self.touches / ERA_LEN - entry.era;
        entry.heat >> eras.min(15)
    }

    /// A write from this section goes out with work request `id`, counted from 1. Returns its slot, if it is registered. Writes of
    /// clients also make it newer and hotter.
    pub(super) fn touch(&mut self, section: u32, by_client: bool, id: u64) -> Option<u32> {
        if by_client && self.touched_by != id {
            (self.touched_by, self.touches) = (id, self.touches + 1);
            let heat = self.heat(section).saturating_add(1);
            let entry = &mut self.entries[section as usize];
            (entry.heat, entry.era) = (heat, self.touches / ERA_LEN);
        }
        let slot = self.entries[section as usize].slot;
        if slot == NONE {
            return None;
        }
        self.slots[slot as usize].last_id = id;
        if by_client && self.newest != slot {
            self.unlink(slot);
            self.link_newest(slot);
        }
        Some(slot)
    }

    /// The registration in a slot that [`Cache::touch`] returned, and where on the disk it begins.
    pub(super) fn region(&self, slot: u32) -> (&Region, usize) {
        let slot = &self.slots[slot as usize];
        (slot.region.as_ref().expect("a section's slot is taken"), (slot.section as usize) << self.shift)
    }

    /// Whether the section is to be registered now. Then it is on record as being registered until
    /// [`Cache::registered`], and the registrations returned have to be ended before it is begun.
    pub(super) fn wants(&mut self, section: u32) -> Option<Vec<Region>> {
        let entry = &self.entries[section as usize];
        let heat = self.heat(section);
        if self.pending.is_some()
            || entry.slot != NONE
            || heat < CANDIDATE_HEAT
            || self.touches < entry.not_before
        {
            return None;
        }
        self.raise_limit();
        let len = self.len(section);
        if len > self.limit || !self.can_make_room(len, heat) {
            return None;
        }
        let mut ended = Vec::new();
        while self.registered + len > self.limit {
            ended.push(self.evict());
        }
        self.registered += len;
        self.pending = Some(section);
        Some(ended)
    }

    /// Tries more, some time after the system refused it.
    fn raise_limit(&mut self) {
        let due = self.touches - self.limit_changed >= self.limit_tried_after;
        if due && self.limit < self.limit_configured {
            let more = self.limit.max(1 << self.shift);
            self.limit = self.limit_configured.min(self.limit.saturating_add(more));
            self.limit_changed = self.touches;
        }
    }

    /// Whether enough of the oldest sections are idle, and colder by far than `heat`.
    fn can_make_room(&self, len: usize, heat: u16) -> bool {
        let mut room = self.limit - self.registered;
        let mut at = self.oldest;
        while room < len {
            let Some(slot) = self.slots.get(at as usize) else { return false };
            if slot.last_id > self.done || heat <= self.heat(slot.section).saturating_mul(2) {
                return false;
            }
            room += self.len(slot.section);
            at = slot.newer;
        }
        true
    }

    fn evict(&mut self) -> Region {
        let at = self.oldest;
        self.unlink(at);
        self.free.push(at);
        self.evictions += 1;
        let slot = &mut self.slots[at as usize];
        let section = slot.section;
        let region = slot.region.take().expect("a linked slot is taken");
        self.entries[section as usize].slot = NONE;
        self.registered -= self.len(section);
        region
    }

    /// What the registration that [`Cache::wants`] asked for came to.
    pub(super) fn registered(&mut self, result: io::Result<Region>) {
        let section = self.pending.take().expect("a registration was under way");
        match result {
            Ok(region) => self.insert(section, region),
            Err(error) => self.failed(section, error.kind()),
        }
    }

    fn insert(&mut self, section: u32, region: Region) {
        if self.registered > self.limit_refused_at {
            self.limit_tried_after = LIMIT_TRIED_AFTER / 2;
        }
        let slot = Slot { section, region: Some(region), newer: NONE, older: NONE, last_id: 0 };
        let at = if let Some(at) = self.free.pop() {
            self.slots[at as usize] = slot;
            at
        } else {
            self.slots.push(slot);
            u32::try_from(self.slots.len() - 1).expect("fewer than sections")
        };
        self.link_newest(at);
        let entry = &mut self.entries[section as usize];
        (entry.slot, entry.failures) = (at, 0);
    }

    fn failed(&mut self, section: u32, kind: io::ErrorKind) {
        self.registered -= self.len(section);
        self.failures += 1;
        let entry = &mut self.entries[section as usize];
        let wait = if kind == io::ErrorKind::WouldBlock {
            PUT_OFF_BUSY
        } else {
            entry.failures = (entry.failures + 1).min(PUT_OFF_DOUBLINGS);
            PUT_OFF << (entry.failures - 1)
        };
        entry.not_before = self.touches + wait;
        if kind == io::ErrorKind::OutOfMemory {
            self.limit_tried_after = (self.limit_tried_after * 2).min(LIMIT_TRIED_AFTER_MAX);
            self.limit_refused_at = self.registered;
            (self.limit, self.limit_changed) = (self.registered, self.touches);
        }
    }

    /// Work requests up to `id` name nothing any more.
    pub(super) fn done_up_to(&mut self, id: u64) {
        self.done = self.done.max(id);
    }

    /// All registrations, for them to be ended. The cache is of no use after.
    pub(super) fn take_all(&mut self) -> Vec<Region> {
        self.slots.iter_mut().filter_map(|slot| slot.region.take()).collect()
    }

    fn link_newest(&mut self, at: u32) {
        let before = std::mem::replace(&mut self.newest, at);
        let slot = &mut self.slots[at as usize];
        (slot.newer, slot.older) = (NONE, before);
        match self.slots.get_mut(before as usize) {
            Some(before) => before.newer = at,
            None => self.oldest = at,
        }
    }

    fn unlink(&mut self, at: u32) {
        let Slot { newer, older, .. } = self.slots[at as usize];
        match self.slots.get_mut(newer as usize) {
            Some(slot) => slot.older = older,
            None => self.newest = older,
        }
        match self.slots.get_mut(older as usize) {
            Some(slot) => slot.newer = newer,
            None => self.oldest = newer,
        }
    }

    /// Sections registered.
    pub(super) fn sections(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Bytes registered or being registered.
    pub(super) fn registered_bytes(&self) -> usize {
        self.registered
    }

    /// Bytes that may be registered now.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Sections given up for others.
    pub(super) fn evictions(&self) -> u64 {
        self.evictions
    }

    /// Registrations that failed.
    pub(super) fn failures(&self) -> u64 {
        self.failures
    }
}

/// Section length as a power of two: the usual one; less where that little may be registered that a few would be all
/// of it, more where the disk has too many.
fn section_shift(disk_len: usize, limit: usize) -> u32 {
    let mut shift = RDMA_SECTION_LEN.ilog2();
    while limit < disk_len && limit < 4 << shift && shift > RDMA_SECTION_LEN_MIN.ilog2() {
        shift -= 1;
    }
    while disk_len.div_ceil(1 << shift) > RDMA_SECTIONS_MAX {
        shift += 1;
    }
    shift
}

#[cfg(test)]
mod tests;
