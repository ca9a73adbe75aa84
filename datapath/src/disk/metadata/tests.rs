//! The metadata area on simulated and real media: damage in every part, foreign areas and other formats, and size.

use super::medium::FileMedium;
use super::*;
use crate::disk::activity_log::Touch;
use crate::limits::DIRTY_GRAIN_LEN;
use crate::testing::simulated_medium::{Dice, Simulated};
use crate::units::Epoch;
use proptest::prelude::*;

mod power;

const SIZE: u64 = 8 << 30;
const AREA: u64 = 0x5ca1_ab1e;

fn superblock() -> Superblock {
    Superblock::fresh("db", "alpha", SIZE, true)
}

fn geometry() -> Geometry {
    Geometry::for_volume(SIZE).expect("usual")
}

fn created() -> Simulated {
    let medium = Simulated::default();
    create(&medium, 0, &superblock(), geometry(), AREA, false).expect("made");
    medium
}

fn reopen(medium: &Simulated) -> Opened<Simulated> {
    open(medium.clone(), 0, "db", "alpha", SIZE).expect("opens")
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len)
}

/// Dirty from 1 GiB on for 1 MiB, and an extent hot at 4 GiB, on record.
fn used() -> Simulated {
    let medium = created();
    let mut opened = reopen(&medium);
    let _ = opened.dirty.set(range(1 << 30, 1 << 20));
    opened.area.store_unsaved(&mut opened.dirty).expect("stored");
    assert!(matches!(opened.activity.touch(range(4 << 30, 4096)), Touch::Wait(_)));
    let transaction = opened.activity.next_transaction().expect("due");
    opened.area.commit(&transaction).expect("stored");
    medium
}

fn dirty_of(opened: &Opened<Simulated>) -> Vec<ByteRange> {
    let mut runs = Vec::new();
    while let Some(run) = opened.dirty.next_dirty(runs.last().map_or(0, |r: &ByteRange| r.end()), SIZE) {
        runs.push(run);
        if run.end() == SIZE {
            break;
        }
    }
    runs
}

#[test]
fn what_was_stored_is_read_again() {
    let medium = used();
    let mut opened = reopen(&medium);
    assert_eq!(dirty_of(&opened), [range(1 << 30, 1 << 20), range(4 << 30, 4 << 20)]);
    assert_eq!(opened.report, Report { hot_extents: 1, ..Report::default() });
    opened.recover().expect("recovers");
    let opened = reopen(&medium);
    assert_eq!(opened.report, Report::default(), "the log is empty");
    assert_eq!(dirty_of(&opened), [range(1 << 30, 1 << 20), range(4 << 30, 4 << 20)]);
}

#[test]
fn superblocks_alternate_and_a_torn_store_leaves_the_state_before_it() {
    let medium = created();
    let mut later = superblock();
    let mut epochs = Vec::new();
    for steps in 0..=18 {
        let mut opened = reopen(&medium);
        let before = opened.superblock.epoch;
        later.epoch = Epoch(before.0 + 1);
        medium.cut_after(steps);
        let stored = opened.superblocks.store(&later);
        medium.restart(true, &mut Dice::new(steps + 3));
        let found = reopen(&medium).superblock.epoch;
        assert!(found == before || found == later.epoch, "{found}");
        if stored.is_ok() {
            assert_eq!(found, later.epoch);
        } else {
            let again = opened.superblocks.store(&later);
            assert!(matches!(again, Err(SuperblockError::FailedBefore { .. })), "{again:?}");
            let refused = opened.area.store_dirty(&[]);
            assert!(matches!(refused, Err(SuperblockError::FailedBefore { .. })), "the other half too");
        }
        epochs.push(stored.is_ok());
    }
    assert_eq!(epochs.iter().filter(|ok| **ok).count(), 1, "eight sectors and a sync, twice");
}

#[test]
fn after_a_failed_store_nothing_is_stored() {
    for first_half in [true, false] {
        let medium = created();
        let mut opened = reopen(&medium);
        let _ = opened.dirty.set(range(0, 1));
        medium.fail_sync(0, &mut Dice::new(1));
        let failed = if first_half {
            opened.superblocks.store(&superblock())
        } else {
            opened.area.store_unsaved(&mut opened.dirty)
        };
        assert!(matches!(failed, Err(SuperblockError::Io { .. })), "{failed:?}");
        let before = medium.cost();
        let error = opened.superblocks.store(&superblock()).expect_err("the medium is given up");
        assert!(error.to_string().contains("check the medium, then restart"), "{error}");
        assert!(opened.area.store_unsaved(&mut opened.dirty).is_err(), "and by the other half");
        assert!(opened.dirty.has_unsaved());
        assert_eq!(medium.cost(), before, "although it would take it");
    }
}

/// Marks that a failed sync left in the system's memory alone are read by the next daemon, which rests on them.
#[test]
fn marks_that_only_the_cache_holds_are_on_record_after_a_restart() {
    for seed in 0..30 {
        let (medium, mut dice) = (created(), Dice::new(seed * 977 + 5));
        let mut opened = reopen(&medium);
        let _ = opened.dirty.set_all();
        medium.fail_sync(0, &mut dice);
        opened.area.store_unsaved(&mut opened.dirty).expect_err("the medium fails");
        medium.restart(false, &mut dice);
        let mut opened = reopen(&medium);
        opened.recover().expect("the medium works again");
        assert_eq!(opened.dirty.set_all(), super::super::dirty_bitmap::Marked::Durable);
        medium.restart(true, &mut dice);
        assert_eq!(reopen(&medium).dirty.dirty_bytes(), SIZE, "seed {seed}");
    }
}

/// So is a transaction: one that is missing behind the next would make everything dirty.
#[test]
fn a_transaction_that_only_the_cache_holds_is_on_record_after_a_restart() {
    for steps in 0..80 {
        let (medium, mut dice) = (used(), Dice::new(steps * 977 + 5));
        let mut opened = reopen(&medium);
        assert!(matches!(opened.activity.touch(range(6 << 30, 4096)), Touch::Wait(_)));
        let transaction = opened.activity.next_transaction().expect("due");
        medium.fail_sync(0, &mut dice);
        opened.area.commit(&transaction).expect_err("the medium fails");
        medium.restart(false, &mut dice);
        let mut opened = reopen(&medium);
        assert_eq!(opened.report.hot_extents, 2);
        medium.cut_after(steps);
        let _ = opened.recover();
        medium.restart(true, &mut dice);
        let opened = reopen(&medium);
        assert_eq!(opened.report.activity_damage, None, "{steps}");
        let runs = [range(1 << 30, 1 << 20), range(4 << 30, 4 << 20), range(6 << 30, 4 << 20)];
        assert_eq!(dirty_of(&opened), runs, "{steps}");
    }
}

/// A superblock as well, whichever of a store's syncs failed and wherever the power goes in the start after it or in the
/// store after that: one copy is always whole, and what a start went by stays.
#[test]
fn a_superblock_that_only_the_cache_holds_is_on_record_after_a_restart() {
    for (steps, after) in (0..80).flat_map(|steps| [(steps, 0), (steps, 1)]) {
        let (medium, mut dice) = (used(), Dice::new(steps * 31 + after));
        let epoch = |epoch| Superblock { epoch: Epoch(epoch), ..superblock() };
        let mut opened = reopen(&medium);
        medium.fail_sync(after, &mut dice);
        opened.superblocks.store(&epoch(1)).expect_err("the medium fails");
        medium.restart(false, &mut dice);
        medium.cut_after(steps);
        let went_by = open(medium.clone(), 0, "db", "alpha", SIZE).map(|mut opened| {
            let found = opened.superblock.epoch;
            let stored = opened.recover().and_then(|()| opened.superblocks.store(&epoch(2)));
            (found, stored.is_ok())
        });
        medium.restart(true, &mut dice);
        let found = reopen(&medium).superblock.epoch.0;
        match went_by {
            Ok((_, true)) => assert_eq!(found, 2, "{steps} {after}"),
            Ok((Epoch(before), false)) => assert!(found == before || found == 2, "{steps} {after}: {found}"),
            Err(_) => assert!(found <= 1, "{steps} {after}: {found}"),
        }
    }
}

#[test]
fn a_copy_damaged_after_a_store_leaves_what_was_stored() {
    for copy in COPIES {
        let medium = created();
        let mut opened = reopen(&medium);
        let later = Superblock { epoch: Epoch(opened.superblock.epoch.0 + 1), ..superblock() };
        opened.superblocks.store(&later).expect("stored");
        medium.flip(copy + 60, 4);
        let opened = reopen(&medium);
        assert!(opened.report.damaged_copy.is_some());
        assert_eq!(opened.superblock.epoch, later.epoch, "not the state before it");
    }
}

#[test]
fn one_damaged_copy_is_reported_and_two_are_an_error_that_says_what_to_do() {
    let medium = used();
    medium.flip(COPIES[0] + 500, 1);
    let opened = reopen(&medium);
    assert!(matches!(opened.report.damaged_copy, Some((0, CopyError::Checksum { .. }))));
    medium.flip(COPIES[1], 0x80);
    let error = open(medium, 0, "db", "alpha", SIZE).expect_err("neither is good");
    let MetadataError::Superblock(SuperblockError::Unreadable { first, second, .. }) = &error else {
        panic!("{error}")
    };
    assert!(matches!(first, CopyError::Checksum { .. }), "{first}");
    assert!(matches!(second, CopyError::Magic { .. }), "{second}");
    assert!(error.to_string().contains("create --force VOLUME"), "{error}");
}

#[test]
fn a_damaged_part_of_the_bitmap_is_dirty_and_named() {
    let layout = Layout::new(geometry(), 0).expect("a file");
    for at in 0..SECTOR_LEN as u64 {
        let medium = used();
        // A sector stands for 3840 × 64 KiB; this one has no bit set and stands in the block that was stored.
        medium.flip(layout.dirty_at + 6 * SECTOR_LEN as u64 + at, 4);
        let opened = reopen(&medium);
        let len = SECTOR_BITS * DIRTY_GRAIN_LEN;
        assert_eq!(opened.report.dirty_damage.sectors, 1);
        assert_eq!(opened.report.dirty_damage.first, [(range(6 * len, len), SectorFault::Checksum)]);
        let runs = dirty_of(&opened);
        assert_eq!(runs, [range(1 << 30, 1 << 20), range(6 * len, len), range(4 << 30, 4 << 20)]);
    }
}

#[test]
fn a_misplaced_or_foreign_part_of_the_bitmap_is_dirty() {
    let layout = Layout::new(geometry(), 0).expect("a file");
    let medium = used();
    medium.copy(layout.dirty_at, layout.dirty_at + SECTOR_LEN as u64, SECTOR_LEN);
    let found = reopen(&medium).report.dirty_damage;
    assert_eq!((found.sectors, found.first[0].1), (1, SectorFault::Misplaced { index: 0 }));
    // The bitmap of an earlier life, or of another disk, under a new superblock.
    let medium = used();
    let shape = Shape { area: AREA + 1, ..shape_at(0, geometry(), layout, 0) };
    medium.write(0, &Header::encode(&superblock(), &shape, 90)).expect("simulated");
    let found = reopen(&medium);
    assert_eq!(found.report.dirty_damage.first[0].1, SectorFault::Foreign);
    assert_eq!(dirty_of(&found), [range(0, SIZE)], "and so is all, for the log is not its own either");
}

#[test]
fn a_damaged_log_makes_everything_dirty_and_is_replaced() {
    let layout = Layout::new(geometry(), 0).expect("a file");
    let first = layout.activity_at + BLOCK_LEN as u64;
    for at in (0..BLOCK_LEN as u64).step_by(37) {
        let medium = used();
        medium.flip(first + at, 0x10);
        let mut opened = reopen(&medium);
        assert!(opened.report.activity_damage.is_some(), "byte {at}");
        assert_eq!(opened.dirty.dirty_bytes(), SIZE);
        opened.recover().expect("recovers");
        let opened = reopen(&medium);
        assert_eq!((opened.report, opened.dirty.dirty_bytes()), (Report::default(), SIZE));
    }
}

#[test]
fn a_log_that_lost_what_was_stored_is_found() {
    let medium = used();
    let mut opened = reopen(&medium);
    opened.activity.begin_checkpoint();
    opened.activity.end_checkpoint();
    assert!(matches!(opened.activity.touch(range(0, 1)), Touch::Wait(_)));
    let transaction = opened.activity.next_transaction().expect("due");
    opened.area.commit(&transaction).expect("stored");
    opened.superblocks.store(&superblock()).expect("stored, and knows of two transactions");
    let layout = Layout::new(geometry(), 0).expect("a file");
    medium.write(layout.activity_at + 2 * BLOCK_LEN as u64, &[0; BLOCK_LEN]).expect("simulated");
    let opened = reopen(&medium);
    assert_eq!(opened.report.activity_damage, Some(ring::Damage::Behind { last: 1, known: 2 }));
    assert_eq!(opened.dirty.dirty_bytes(), SIZE);
}

#[test]
fn another_volumes_metadata_is_refused_and_a_cut_one_too() {
    let medium = used();
    for (volume, node, size, named) in [
        ("logs", "alpha", SIZE, "belongs to volume db, the configuration says logs"),
        ("db", "beta", SIZE, "belongs to node alpha, the configuration says beta"),
        ("db", "alpha", 1 << 30, "belongs to a volume of size 8589934592, the configuration says 1073741824"),
    ] {
        let error = open(medium.clone(), 0, volume, node, size).expect_err("foreign");
        assert!(matches!(error, MetadataError::Superblock(SuperblockError::Foreign { .. })), "{error}");
        assert!(error.to_string().contains(named), "{error}");
    }
    let end = Layout::new(geometry(), 0).expect("a file").end;
    medium.truncate(end - 1);
    let error = open(medium.clone(), 0, "db", "alpha", SIZE).expect_err("cut");
    assert!(
        matches!(error, MetadataError::Truncated { found, needed, .. } if (found, needed) == (end - 1, end)),
        "{error}"
    );
    medium.truncate(9000);
    let error = open(medium, 0, "db", "alpha", SIZE).expect_err("cut");
    assert!(matches!(error, MetadataError::Superblock(SuperblockError::Truncated { .. })), "{error}");
}

#[test]
fn another_format_in_either_copy_is_refused() {
    for (copy, format) in COPIES.into_iter().flat_map(|copy| [1, 3].map(|format| (copy, format))) {
        let medium = used();
        medium.write(copy, &superblock().encode_as(format, 1, &[])).expect("simulated");
        let error = open(medium, 0, "db", "alpha", SIZE).expect_err("another");
        let wanted = format!("format version {format}, this program reads version 2: run the release");
        assert!(error.to_string().contains(&wanted), "{error}");
    }
}

#[test]
fn metadata_is_not_made_over_other_metadata() {
    let medium = used();
    let again = |force| create(&medium, 0, &superblock(), geometry(), AREA + 9, force);
    let error = again(false).expect_err("there is one");
    assert!(matches!(error, MetadataError::Superblock(SuperblockError::Exists { .. })), "{error}");
    again(true).expect("by force");
    let opened = reopen(&medium);
    assert_eq!((opened.report, opened.dirty.dirty_bytes()), (Report::default(), 0), "nothing is left over");
}

#[test]
fn a_device_keeps_its_bitmap_in_front_where_it_is_large() {
    let size = 1 << 40;
    let geometry = Geometry::for_volume(size).expect("usual");
    let offset = size + (8 << 20);
    let medium = Simulated::with_len(offset + super::super::superblock::DEVICE_METADATA_LEN);
    let superblock = Superblock::fresh("db", "alpha", size, true);
    create(&medium, offset, &superblock, geometry, AREA, false).expect("made");
    let mut opened = open(medium.clone(), offset, "db", "alpha", size).expect("opens");
    let _ = opened.dirty.set_all();
    opened.area.store_unsaved(&mut opened.dirty).expect("stored");
    let mut volume = vec![0; 1 << 20];
    medium.read(size - (1 << 20), &mut volume).expect("simulated");
    assert!(volume.iter().all(|byte| *byte == 0), "the volume's own bytes are not touched");
    assert_eq!(open(medium, offset, "db", "alpha", size).expect("opens").dirty.dirty_bytes(), size);
    let full = Simulated::with_len(size + (1 << 20));
    let error = create(&full, size, &superblock, geometry, AREA, false).expect_err("no room");
    assert!(error.to_string().contains("the volume and its bitmap need"), "{error}");
}

#[test]
fn an_area_that_moved_is_refused() {
    let medium = used();
    let layout = Layout::new(geometry(), 0).expect("a file");
    let shape = Shape { dirty_at: -4096, ..shape_at(AREA, geometry(), layout, 0) };
    medium.write(0, &Header::encode(&superblock(), &shape, 90)).expect("simulated");
    let error = open(medium, 0, "db", "alpha", SIZE).expect_err("moved");
    assert!(matches!(error, MetadataError::Moved { .. }), "{error}");
}

#[test]
fn a_transaction_is_one_block_and_one_sync() {
    let medium = created();
    let mut opened = reopen(&medium);
    for extent in 0..100 {
        assert!(matches!(opened.activity.touch(range(extent << 22, 4096)), Touch::Wait(_)));
    }
    let before = medium.cost();
    let transaction = opened.activity.next_transaction().expect("due");
    opened.area.commit(&transaction).expect("stored");
    let after = medium.cost();
    assert_eq!((after.0 - before.0, after.1 - before.1), (4096, 1), "for a hundred extents");
}

#[test]
fn a_look_changes_nothing_and_says_it_all() {
    let medium = used();
    let before = medium.cost();
    let seen = inspect::inspect(&medium, 0, 8).expect("readable");
    assert_eq!(medium.cost(), before);
    let area = seen.area.expect("format 2").expect("whole");
    assert_eq!(area.hot_extents, [range(4 << 30, 4 << 20)]);
    assert_eq!((area.bitmap_dirty_bytes, area.dirty_bytes), (1 << 20, 5 << 20));
    assert_eq!(area.dirty_first, [range(1 << 30, 1 << 20), range(4 << 30, 4 << 20)]);
    assert_eq!((area.last_transaction, area.torn_transaction, area.activity_damage), (1, false, None));
    medium.flip(COPIES[0], 1);
    medium.flip(COPIES[1], 1);
    let seen = inspect::inspect(&medium, 0, 8).expect("readable");
    assert!(seen.newest.is_err() && seen.area.is_none());
}

#[test]
fn a_second_daemon_is_kept_out_and_a_look_is_not() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("db.img.meta");
    let error = FileMedium::open(&path).expect_err("missing");
    assert!(matches!(error, SuperblockError::Missing { .. }), "{error}");
    assert!(error.to_string().contains("costandby create"), "{error}");
    let medium = FileMedium::create(&path, false).expect("made");
    create(&medium, 0, &superblock(), geometry(), AREA, false).expect("made");
    assert!(matches!(FileMedium::open(&path), Err(SuperblockError::Locked { .. })));
    assert!(matches!(FileMedium::create(&path, false), Err(SuperblockError::Exists { .. })));
    assert!(matches!(FileMedium::create(&path, true), Err(SuperblockError::Locked { .. })));
    let (seen, in_use) = FileMedium::look(&path).expect("may look");
    assert!(in_use && inspect::inspect(&seen, 0, 1).expect("readable").newest.is_ok());
    assert!(seen.write(0, &[0]).is_err(), "and do nothing else");
    drop(medium);
    assert!(!FileMedium::look(&path).expect("may look").1);
    FileMedium::open(&path).expect("a look does not lock");
}

proptest! {
    #[test]
    fn arbitrary_shapes_never_panic(tail in proptest::collection::vec(any::<u8>(), 84), size in any::<u64>()) {
        let block = Superblock { size, ..superblock() }.encode_as(header::FORMAT, 1, &tail);
        if let Ok((header, sequence)) = Header::decode(&block) {
            let shape = header.shape;
            prop_assert_eq!(Header::encode(&header.superblock, &shape, sequence), block);
            let _ = shape.layout(std::path::Path::new("x"), 1 << 20);
        }
    }

    /// Whatever is done to the bytes behind the superblocks: it opens or says why not, nothing panics, and what was dirty
    /// is, unless the very bytes that said so were replaced by zeros.
    #[test]
    fn flipped_bits_never_hide_what_is_dirty(flips in proptest::collection::vec((any::<prop::sample::Index>(), 1..=255u8), 1..12)) {
        let medium = used();
        let layout = Layout::new(geometry(), 0).expect("a file");
        for (at, mask) in flips {
            let len = usize::try_from(layout.end - layout.activity_at).expect("small");
            medium.flip(layout.activity_at + at.index(len) as u64, mask);
        }
        let opened = reopen(&medium);
        for must in [range(1 << 30, 1 << 20), range(4 << 30, 4 << 20)] {
            let run = opened.dirty.next_dirty(must.start, must.len);
            prop_assert_eq!(run, Some(must));
        }
        prop_assert!(medium.sectors() > 0);
    }
}

#[test]
fn a_metadata_file_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("db.img.meta");
    let mode = || std::fs::metadata(&path).expect("there").permissions().mode() & 0o7777;
    let widen = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("ours");
    drop(FileMedium::create(&path, false).expect("made"));
    assert_eq!(mode(), 0o600, "when it is made");
    widen(0o644);
    drop(FileMedium::look(&path).expect("may look"));
    assert_eq!(mode(), 0o644, "a look changes nothing");
    drop(FileMedium::open(&path).expect("opens"));
    assert_eq!(mode(), 0o600, "an earlier release made it for all to read");
    widen(0o666);
    drop(FileMedium::create(&path, true).expect("made anew"));
    assert_eq!(mode(), 0o600, "when it is made anew");
}

#[test]
fn new_metadata_is_never_named_without_its_price_nor_an_old_copy_as_a_way_out() {
    let path = || std::path::PathBuf::from("/srv/db.img.meta");
    let bad = || CopyError::Length { found: 0 };
    let errors: [MetadataError; 7] = [
        SuperblockError::Absent { path: path(), device_len: 3, volume_len: 2 }.into(),
        SuperblockError::Missing { path: path() }.into(),
        SuperblockError::Exists { path: path() }.into(),
        SuperblockError::Truncated { path: path(), found: 3 }.into(),
        SuperblockError::Unreadable { path: path(), first: bad(), second: bad() }.into(),
        MetadataError::Truncated { path: path(), found: 3, needed: 4 },
        MetadataError::Moved { path: path() },
    ];
    for error in errors {
        let text = error.to_string();
        assert!(text.contains("costandby create --force VOLUME"), "{text}");
        assert!(text.contains("only if the peer has all of the data"), "{text}");
        assert!(!text.contains("restore"), "{text}");
    }
}
