//! The activity log by itself: who gets in, who waits, who is evicted; and its ring under tears, losses and damage.

use super::*;
use crate::disk::metadata::sector::{BLOCK_LEN, SECTOR_LEN};
use crate::limits::ACTIVITY_RING_LEN;
use proptest::prelude::*;
use std::collections::BTreeSet;

const E: u64 = 4 << 20;
const G: u64 = 64 << 10;
const AREA: u64 = 99;
const SLOTS: u32 = 1024;

fn geometry() -> Geometry {
    Geometry::new(4096 * E - 1, G, E, SLOTS).expect("legal")
}

fn log() -> ActivityLog {
    ActivityLog::new(geometry(), AREA, 0)
}

fn at(extent: u64) -> ByteRange {
    ByteRange::new(extent * E + 3 * G, 4096)
}

fn commit(log: &mut ActivityLog) -> Transaction {
    let transaction = log.next_transaction().expect("due");
    log.committed(transaction.ticket);
    transaction
}

/// Touched, on record and written.
fn write(log: &mut ActivityLog, extent: u64) {
    match log.touch(at(extent)) {
        Touch::Hot => {}
        Touch::Wait(ticket) => {
            while !log.is_committed(ticket) {
                commit(log);
            }
        }
        other => panic!("{other:?}"),
    }
    log.written(at(extent));
}

fn checkpoint(log: &mut ActivityLog) {
    log.begin_checkpoint();
    log.end_checkpoint();
}

#[test]
fn a_cold_extent_waits_for_its_transaction_and_a_hot_one_does_not() {
    let mut log = log();
    assert_eq!(log.touch(at(5)), Touch::Wait(Ticket(1)));
    assert_eq!(log.touch(at(5)), Touch::Wait(Ticket(1)), "the same transaction");
    let first = log.next_transaction().expect("due");
    assert_eq!(log.touch(at(5)), Touch::Wait(Ticket(1)), "under way");
    assert_eq!(log.touch(at(6)), Touch::Wait(Ticket(2)), "too late for it");
    assert_eq!(log.touch(ByteRange::new(6 * E - 1, 2)), Touch::Wait(Ticket(2)), "the later of two");
    assert!(log.next_transaction().is_none(), "one at a time");
    assert!(!log.is_committed(Ticket(1)));
    log.committed(first.ticket);
    assert!(log.is_committed(Ticket(1)) && !log.is_committed(Ticket(2)));
    assert_eq!(log.touch(at(5)), Touch::Hot);
    commit(&mut log);
    assert_eq!(log.touch(ByteRange::new(5 * E, 2 * E)), Touch::Hot);
    assert!(!log.has_transaction());
}

#[test]
fn an_extent_is_evicted_only_when_nothing_rests_on_it() {
    let mut log = log();
    for extent in 0..u64::from(SLOTS) {
        write(&mut log, extent);
    }
    assert!(log.wants_checkpoint());
    assert_eq!(log.touch(at(2000)), Touch::Full, "all are unconfirmed");
    log.begin_checkpoint();
    write(&mut log, 0);
    assert_eq!(log.touch(at(1)), Touch::Hot);
    assert_eq!(log.touch(at(2000)), Touch::Full, "the checkpoint has not ended");
    log.end_checkpoint();
    let mut told = Vec::new();
    log.for_each_unconfirmed(|range| told.push(range.start / E));
    assert_eq!(told, [0], "written after the checkpoint began");
    assert_eq!(log.evictable, SLOTS as usize - 2, "neither that nor the one being changed");
    assert_eq!(log.touch(at(2)), Touch::Hot);
    log.untouch(at(2));
    assert_eq!(log.touch(at(2000)), Touch::Wait(Ticket(log.durable().0 + 1)));
    commit(&mut log);
    let hot: BTreeSet<u64> = log.hot_extents().map(|range| range.start / E).collect();
    assert!(hot.contains(&0), "written after the checkpoint began");
    assert!(hot.contains(&1), "a change of it is under way");
    assert!(hot.contains(&2) && !hot.contains(&3), "the one not used for longest went");
    assert_eq!(log.touch(at(3)), Touch::Wait(Ticket(log.durable().0 + 1)), "and is cold");
}

#[test]
fn an_aborted_checkpoint_proves_nothing() {
    let mut log = log();
    for extent in 0..u64::from(SLOTS) {
        write(&mut log, extent);
    }
    log.begin_checkpoint();
    log.abort_checkpoint();
    assert!(!log.in_checkpoint() && log.wants_checkpoint());
    assert_eq!(log.touch(at(2000)), Touch::Full);
    let mut told = 0;
    log.for_each_unconfirmed(|range| told += range.len);
    assert_eq!(told, u64::from(SLOTS) * G);
    checkpoint(&mut log);
    assert!(matches!(log.touch(at(2000)), Touch::Wait(_)));
}

#[test]
fn what_is_too_long_or_too_much_touches_nothing() {
    let mut log = log();
    let longest = geometry().touch_len_max();
    assert_eq!(log.touch(ByteRange::new(1, longest + 1)), Touch::TooLong);
    assert!(matches!(log.touch(ByteRange::new(E - 1, longest)), Touch::Wait(_)));
    assert_eq!(log.touch(ByteRange::new(2000 * E, 100 * E)), Touch::Full, "no room in the transaction");
    commit(&mut log);
    log.untouch(ByteRange::new(E - 1, longest));
    assert_eq!(log.evictable, SLOTS as usize, "the refused one pinned nothing");
    assert!(matches!(log.touch(ByteRange::new(2000 * E, 100 * E)), Touch::Wait(_)));
}

#[test]
fn unconfirmed_grains_are_told_exactly_and_cut_at_the_end() {
    let mut log = log();
    let end = geometry().size();
    for range in [ByteRange::new(2 * E - 1, 2), ByteRange::new(7 * E + G, 3 * G), ByteRange::new(end - 1, 1)]
    {
        assert!(matches!(log.touch(range), Touch::Wait(_)));
        commit(&mut log);
        log.written(range);
    }
    log.begin_checkpoint();
    write(&mut log, 7);
    let mut told = Vec::new();
    log.for_each_unconfirmed(|range| told.push(range));
    told.sort_by_key(|range| range.start);
    let last = end / G * G;
    assert_eq!(
        told,
        [
            ByteRange::new(2 * E - G, G),
            ByteRange::new(2 * E, G),
            ByteRange::new(7 * E + G, 3 * G),
            ByteRange::new(last, end - last)
        ]
    );
}

#[test]
#[should_panic(expected = "was not touched")]
fn writing_what_was_not_touched_is_a_bug() {
    log().written(at(1));
}

#[test]
#[should_panic(expected = "is not on record")]
fn writing_before_the_commit_is_a_bug() {
    let mut log = log();
    let _ = log.touch(at(1));
    log.written(at(1));
}

struct Ring(Vec<u8>);

impl Ring {
    fn new() -> Self {
        Self(vec![0; usize::try_from(ACTIVITY_RING_LEN).expect("small") * BLOCK_LEN])
    }

    fn store(&mut self, transaction: &Transaction, sectors: u32) {
        let at = usize::try_from(transaction.at).expect("small");
        for (part, sector) in transaction.block.chunks_exact(SECTOR_LEN).enumerate() {
            if sectors & (1 << part) != 0 {
                self.0[at + part * SECTOR_LEN..][..SECTOR_LEN].copy_from_slice(sector);
            }
        }
    }

    fn replay(&self, known: u64) -> ring::Replayed {
        ring::replay(geometry(), AREA, known, &self.0)
    }
}

fn hot(log: &ActivityLog) -> BTreeSet<u64> {
    log.hot_extents().map(|range| range.start / E).collect()
}

fn table(replayed: &ring::Replayed) -> BTreeSet<u64> {
    assert_eq!(replayed.damage, None);
    replayed.table.iter().flatten().copied().collect()
}

#[test]
fn retiring_empties_the_stored_table_in_one_cycle() {
    let mut log = log();
    let mut ring = Ring::new();
    for extent in 0..600 {
        let _ = log.touch(at(extent));
        ring.store(&commit(&mut log), 0xff);
        log.written(at(extent));
    }
    assert_eq!(table(&ring.replay(600)).len(), 600);
    checkpoint(&mut log);
    let _ = log.touch(at(7));
    log.retire_idle();
    let mut transactions = 0;
    while log.has_transaction() {
        ring.store(&commit(&mut log), 0xff);
        transactions += 1;
    }
    assert_eq!((transactions, ring::cycle_len(geometry())), (4, 4));
    assert_eq!(table(&ring.replay(604)), BTreeSet::from([7]), "in use, so it stays");
}

#[test]
fn two_torn_attempts_at_one_transaction_do_not_make_a_whole_one() {
    let mut ring = Ring::new();
    let attempt = |extent| {
        let mut log = log();
        let _ = log.touch(at(extent));
        log.next_transaction().expect("due")
    };
    ring.store(&attempt(1), 0x0f);
    ring.store(&attempt(2), 0xf0);
    let replayed = ring.replay(0);
    assert_eq!((replayed.last, replayed.torn, replayed.damage), (0, true, None));
}

#[test]
fn damage_to_an_old_transaction_changes_nothing_and_to_a_needed_one_everything() {
    let mut log = log();
    let mut ring = Ring::new();
    let mut places = Vec::new();
    for extent in 0..40 {
        let _ = log.touch(at(extent));
        let transaction = commit(&mut log);
        ring.store(&transaction, 0xff);
        places.push(usize::try_from(transaction.at).expect("small"));
    }
    for (age, place) in places.iter().rev().enumerate().take(32) {
        for sector in [0, 5] {
            let mut damaged = Ring(ring.0.clone());
            damaged.0[place + sector * SECTOR_LEN + 77] ^= 1;
            let found = damaged.replay(0);
            assert_eq!(found.damage.is_some(), age < 4, "{age} transactions ago: {:?}", found.damage);
        }
        let mut lost = Ring(ring.0.clone());
        lost.0[*place..place + BLOCK_LEN].fill(0);
        let found = lost.replay(40);
        assert_eq!(found.damage.is_some(), age < 4, "{age} transactions ago: {:?}", found.damage);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    /// Through random work, a crash at each transaction with any of its sectors stored: the replayed table is that before
    /// or that after, never less than what was let through; and the log goes on from there.
    #[test]
    fn any_tear_leaves_the_table_before_or_after(
        work in proptest::collection::vec((0..4000u64, 1..200u64, any::<bool>(), any::<u8>()), 1..80),
    ) {
        let mut log = log();
        let mut ring = Ring::new();
        for (extent, count, settle, sectors) in work {
            if settle || log.wants_checkpoint() {
                checkpoint(&mut log);
            }
            let before: BTreeSet<_> = table(&ring.replay(log.durable().0));
            let mut touched = Vec::new();
            for extent in extent..(extent + count).min(4000) {
                if matches!(log.touch(at(extent)), Touch::Hot | Touch::Wait(_)) {
                    touched.push(extent);
                }
            }
            if let Some(transaction) = log.next_transaction() {
                let mut torn = Ring(ring.0.clone());
                torn.store(&transaction, u32::from(sectors));
                let replayed = torn.replay(log.durable().0);
                let after = hot(&log);
                let found = table(&replayed);
                // The rest of it may be there from an earlier attempt at the very same.
                let rest = ring.replay(log.durable().0).torn;
                prop_assert!(found == before || (found == after && (sectors == 0xff || rest)));
                prop_assert!(rest || replayed.torn == (sectors != 0 && sectors != 0xff));
                if sectors != 0xff && sectors % 3 == 0 {
                    // Restarted from there, with what was hot still so.
                    log = ActivityLog::resume(geometry(), AREA, replayed.last, &replayed.table);
                    ring = torn;
                    prop_assert_eq!(hot(&log), found);
                    continue;
                }
                ring.store(&transaction, 0xff);
                log.committed(transaction.ticket);
            }
            prop_assert_eq!(table(&ring.replay(log.durable().0)), hot(&log));
            touched.iter().for_each(|&extent| log.written(at(extent)));
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        sectors in proptest::collection::vec((0..256usize, prop_oneof![any::<u64>(), Just(u64::MAX), 0..40u64], any::<u64>()), 0..40),
    ) {
        use crate::disk::metadata::sector::{PAYLOAD_LEN, Place, SectorKind};
        let mut ring = Ring::new();
        for (index, counter, fill) in sectors {
            let place = Place { kind: SectorKind::Activity, area: AREA, index: index as u64 };
            let mut payload = [0; PAYLOAD_LEN];
            payload.chunks_exact_mut(8).for_each(|bytes| bytes.copy_from_slice(&fill.to_le_bytes()));
            ring.0[index * SECTOR_LEN..][..SECTOR_LEN].copy_from_slice(&place.seal(counter, &payload));
        }
        let _ = ring.replay(0);
    }
}
