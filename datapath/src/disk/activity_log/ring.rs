//! The stored form of the activity log: a ring of transactions, and how they are replayed after a crash.
//!
//! Transaction number `n` is the block at place `n` modulo [`ACTIVITY_RING_LEN`]. It holds up to [`UPDATES_MAX`] slots that
//! changed, and as context the slots of one chunk of the table, chunk `n` modulo the number of chunks. So the last
//! [`cycle_len`] transactions together name every slot, and replaying them in order gives the table as of the last.
//!
//! ```text
//! each of the eight sectors:  header (sector.rs; counter = n) │ crc of all entries │ 0 │ 59 entries
//! an entry:                   slot << 48 | extent   (extent all ones: the slot is empty; all ones: no entry)
//! ```
//!
//! **What a crash leaves.** The transaction under way is whole, or torn, or lost; nothing it names was written to, so
//! the table before it is right as well. A torn one is a mixture of sectors that are each whole: of two transactions, or of
//! two attempts at the same one, which the checksum over all entries tells apart.
//!
//! **What damage leaves.** A sector that does not check is no tear. If it may belong to the newest transaction, or one of
//! the last cycle is missing, the table is not known, and the answer is [`Damage`]: everything is dirty. Damage in older
//! transactions changes nothing.

use crate::disk::metadata::layout::{CONTEXT_LEN, ENTRIES, ENTRIES_PER_SECTOR, Geometry, UPDATES_MAX};
use crate::disk::metadata::sector::{
    BLOCK_LEN, PAYLOAD_LEN, Place, SECTOR_LEN, SECTORS_PER_BLOCK, Sector, SectorFault, SectorKind,
};
use crate::limits::ACTIVITY_RING_LEN;

/// One past the highest number that a transaction, or any other counter of stores, can have come to.
pub(crate) const NUMBER_END: u64 = 1 << 62;

const NO_ENTRY: u64 = u64::MAX;
const NO_EXTENT: u64 = (1 << 48) - 1;

/// How many transactions in a row tell the whole table.
#[must_use]
pub fn cycle_len(geometry: Geometry) -> u64 {
    u64::from(geometry.slots().div_ceil(CONTEXT_LEN))
}

/// A transaction to be stored.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Transaction {
    /// Its number.
    pub ticket: super::Ticket,
    /// Byte of the activity log where it belongs.
    pub at: u64,
    /// The block.
    pub block: Box<[u8; BLOCK_LEN]>,
}

fn place_of(number: u64) -> u64 {
    number % ACTIVITY_RING_LEN
}

fn chunk(geometry: Geometry, number: u64) -> std::ops::Range<u32> {
    let chunk = u32::try_from(number % cycle_len(geometry)).expect("few chunks");
    chunk * CONTEXT_LEN..((chunk + 1) * CONTEXT_LEN).min(geometry.slots())
}

/// The transaction `number` that tells of `updates` and its chunk; `extent` is the table.
pub(super) fn encode(
    geometry: Geometry,
    area: u64,
    number: u64,
    updates: &[u32],
    extent: impl Fn(u32) -> Option<u64>,
) -> Transaction {
    assert!(updates.len() <= UPDATES_MAX, "a transaction tells of {UPDATES_MAX} changes at most");
    let entry = |slot| u64::from(slot) << 48 | extent(slot).unwrap_or(NO_EXTENT);
    let mut entries = [NO_ENTRY; ENTRIES];
    for (place, slot) in entries.iter_mut().zip(updates.iter().copied().chain(chunk(geometry, number))) {
        *place = entry(slot);
    }
    seal(area, number, &entries)
}

fn seal(area: u64, number: u64, entries: &[u64; ENTRIES]) -> Transaction {
    let crc = entries.iter().fold(0, |crc, entry| crc32c::crc32c_append(crc, &entry.to_le_bytes()));
    let mut block = Box::new([0; BLOCK_LEN]);
    let sectors = block.chunks_exact_mut(SECTOR_LEN).zip(entries.chunks_exact(ENTRIES_PER_SECTOR));
    for (part, (sector, entries)) in (0..).zip(sectors) {
        let mut payload = [0; PAYLOAD_LEN];
        payload[..4].copy_from_slice(&crc.to_le_bytes());
        for (bytes, entry) in payload[8..].chunks_exact_mut(8).zip(entries) {
            bytes.copy_from_slice(&entry.to_le_bytes());
        }
        sector.copy_from_slice(&sector_place(area, place_of(number), part).seal(number, &payload));
    }
    Transaction { ticket: super::Ticket(number), at: place_of(number) * BLOCK_LEN as u64, block }
}

fn sector_place(area: u64, block: u64, part: u64) -> Place {
    Place { kind: SectorKind::Activity, area, index: block * SECTORS_PER_BLOCK as u64 + part }
}

/// A whole ring that tells of an empty table, after number `before`: what a damaged one is replaced by.
#[must_use]
pub fn blank_ring(area: u64, before: u64) -> Vec<Transaction> {
    (1..=ACTIVITY_RING_LEN).map(|n| seal(area, before + n, &[NO_ENTRY; ENTRIES])).collect()
}

/// Why the stored table is not known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Damage {
    /// The newest transaction may be one that cannot be read.
    #[error("the newest transaction may be the damaged one at place {place}: {fault}")]
    Newest {
        /// Its block in the ring.
        place: u64,
        /// What is wrong with a sector of it.
        fault: SectorFault,
    },
    /// A transaction is missing that the table is made of.
    #[error("transaction {number} is missing, the last is {last}")]
    Missing {
        /// Its number.
        number: u64,
        /// Number of the last whole one.
        last: u64,
    },
    /// The ring is older than the superblock knows it to be.
    #[error("the last transaction is {last}, although {known} was stored")]
    Behind {
        /// Number of the last whole one.
        last: u64,
        /// Number of one that was on stable storage.
        known: u64,
    },
}

/// What the ring says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Replayed {
    /// The extent of each slot; empty where the table is not known.
    pub table: Vec<Option<u64>>,
    /// Number of the last whole transaction; where there is damage, no number in the ring is higher.
    pub last: u64,
    /// The transaction after the last was torn by a crash.
    pub torn: bool,
    /// Why the table is not known, if it is not: everything is dirty then.
    pub damage: Option<Damage>,
}

enum Found {
    Blank,
    Whole { number: u64, entries: Box<[u64; ENTRIES]> },
    Torn,
    Bad { number: Option<u64>, fault: SectorFault },
}

/// Replays a ring of which transaction `known` was on stable storage once.
///
/// # Panics
/// When `bytes` is not a ring long.
#[must_use]
pub fn replay(geometry: Geometry, area: u64, known: u64, bytes: &[u8]) -> Replayed {
    assert_eq!(bytes.len() as u64, ACTIVITY_RING_LEN * BLOCK_LEN as u64, "a whole ring");
    let mut highest = known;
    let ring: Vec<Found> = (0..)
        .zip(bytes.chunks_exact(BLOCK_LEN))
        .map(|(place, block)| read_block(geometry, area, place, block, &mut highest))
        .collect();
    let whole = |number: u64| match &ring[usize::try_from(place_of(number)).expect("small")] {
        Found::Whole { number: found, entries } if *found == number => Some(entries),
        _ => None,
    };
    let last = ring.iter().map(|found| if let Found::Whole { number, .. } = found { *number } else { 0 });
    let last = last.max().unwrap_or(0);
    let damaged = |damage| Replayed { table: Vec::new(), last: highest, torn: false, damage: Some(damage) };
    for (place, found) in (0..).zip(&ring) {
        let Found::Bad { number, fault } = *found else { continue };
        // Without a whole sector it may be anything that belongs there.
        if number.unwrap_or(last + 1) > last && (number.is_some() || place == place_of(last + 1)) {
            return damaged(Damage::Newest { place, fault });
        }
    }
    if last < known {
        return damaged(Damage::Behind { last, known });
    }
    let mut table = vec![None; geometry.slots() as usize];
    for number in last.saturating_sub(cycle_len(geometry) - 1).max(1)..=last {
        let Some(entries) = whole(number) else {
            return damaged(Damage::Missing { number, last });
        };
        for entry in entries.iter().filter(|entry| **entry != NO_ENTRY) {
            let (slot, extent) = (entry >> 48, entry & NO_EXTENT);
            table[usize::try_from(slot).expect("16 bits")] = (extent != NO_EXTENT).then_some(extent);
        }
    }
    let next = usize::try_from(place_of(last + 1)).expect("small");
    Replayed { table, last, torn: matches!(ring[next], Found::Torn), damage: None }
}

fn read_block(geometry: Geometry, area: u64, place: u64, block: &[u8], highest: &mut u64) -> Found {
    let mut entries = Box::new([NO_ENTRY; ENTRIES]);
    let (mut first, mut fault, mut same) = (None, None, true);
    let parts = block.chunks_exact(SECTOR_LEN).zip(entries.chunks_exact_mut(ENTRIES_PER_SECTOR));
    for (part, (sector, entries)) in (0..).zip(parts) {
        let seen = match sector_place(area, place, part).read(sector) {
            Sector::Bad(bad) => {
                fault.get_or_insert(bad);
                continue;
            }
            Sector::Blank => None,
            Sector::Good { counter: NUMBER_END.., .. } => {
                fault.get_or_insert(SectorFault::Content);
                continue;
            }
            Sector::Good { counter, payload } => {
                *highest = counter.max(*highest);
                for (entry, bytes) in entries.iter_mut().zip(payload[8..].chunks_exact(8)) {
                    *entry = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
                }
                Some((counter, u32::from_le_bytes(payload[..4].try_into().expect("four bytes"))))
            }
        };
        same &= *first.get_or_insert(seen) == seen;
    }
    let crc = || entries.iter().fold(0, |crc, entry| crc32c::crc32c_append(crc, &entry.to_le_bytes()));
    match (first, fault) {
        _ if !same => Found::Torn,
        (Some(Some((number, _))), Some(fault)) => Found::Bad { number: Some(number), fault },
        (_, Some(fault)) => Found::Bad { number: None, fault },
        (Some(Some((_, announced))), None) if announced != crc() => Found::Torn,
        (Some(Some((number, _))), None) => {
            let fits = |entry: u64| {
                let (slot, extent) = (entry >> 48, entry & NO_EXTENT);
                slot < u64::from(geometry.slots()) && (extent < geometry.extents() || extent == NO_EXTENT)
            };
            if place_of(number) == place && entries.iter().all(|&entry| entry == NO_ENTRY || fits(entry)) {
                Found::Whole { number, entries }
            } else {
                Found::Bad { number: Some(number), fault: SectorFault::Content }
            }
        }
        _ => Found::Blank,
    }
}
