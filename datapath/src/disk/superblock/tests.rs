//! Superblock copies on real files: alternation, damage, torn stores, locks, foreign and newer metadata.

use super::*;
use proptest::prelude::*;

fn any_superblock() -> impl Strategy<Value = Superblock> {
    let states = prop_oneof![
        Just(DiskState::UpToDate),
        Just(DiskState::Inconsistent),
        Just(DiskState::Outdated),
        Just(DiskState::Failed)
    ];
    let numbers =
        (any::<[u8; 16]>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<[u64; 8]>());
    ("[a-zé]{1,60}", "[a-z]{1,255}", numbers, states, any::<[bool; 5]>()).prop_map(
        |(volume, node, (volume_id, size, epoch, current, base, history), disk_state, bits)| Superblock {
            volume_id,
            volume,
            node,
            size,
            epoch: Epoch(epoch),
            generations: Generations {
                current: Generation(current),
                base: Generation(base),
                history: history.map(Generation),
            },
            disk_state,
            zeroed: bits[0],
            primary: bits[1],
            clean: bits[2],
            applying: bits[3],
            peer_has_current: bits[4],
            copying: Generation::ZERO,
            boot: [0; 16],
        },
    )
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(superblock in any_superblock(), sequence in any::<u64>()) {
        prop_assert_eq!(Superblock::decode(&superblock.encode(sequence)), Ok((superblock, sequence)));
    }

    #[test]
    fn any_flipped_bit_is_refused(superblock in any_superblock(), bit in 0..SUPERBLOCK_LEN * 8) {
        let mut bytes = superblock.encode(7);
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Superblock::decode(&bytes).is_err());
    }

    #[test]
    fn arbitrary_fields_never_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), SUPERBLOCK_LEN),
        version in any::<bool>(),
    ) {
        bytes[..8].copy_from_slice(&MAGIC);
        if version {
            bytes[8..16].copy_from_slice(&[1, 0, 0, 0, 3, 0, 0, 0]);
        }
        let crc = crc32c::crc32c(&bytes[..CHECKED_LEN]);
        bytes[CHECKED_LEN..].copy_from_slice(&crc.to_le_bytes());
        let _ = Superblock::decode(&bytes);
    }
}

fn created() -> (tempfile::TempDir, Location, Superblock) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let location = Location::beside(&dir.path().join("db.img"));
    let superblock = Superblock::fresh("db", "alpha", 1 << 30, true);
    MetaStore::create(&location, &superblock, false).expect("created");
    (dir, location, superblock)
}

fn flip(location: &Location, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(&location.path).expect("opens");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("reads");
    file.write_all_at(&[!byte[0]], at).expect("writes");
}

#[test]
fn a_store_is_what_the_next_open_reads_and_the_copies_take_turns() {
    let (_dir, location, mut superblock) = created();
    for epoch in 1..6 {
        let mut opened = MetaStore::open(&location).expect("opens");
        assert_eq!(opened.superblock, superblock);
        let before = opened.store.newest;
        superblock.epoch = Epoch(epoch);
        opened.store.store(&superblock).expect("stores");
        assert_ne!(opened.store.newest, before);
    }
    assert_eq!(MetaStore::open(&location).expect("opens").superblock.epoch, Epoch(5));
}

#[test]
fn a_torn_store_leaves_the_state_before_it() {
    let (_dir, location, superblock) = created();
    let mut opened = MetaStore::open(&location).expect("opens");
    let mut later = superblock.clone();
    later.epoch = Epoch(9);
    opened.store.store(&later).expect("stores");
    let torn = COPIES[opened.store.newest] + 500;
    let copy = opened.store.newest;
    drop(opened);
    flip(&location, torn);
    let opened = MetaStore::open(&location).expect("opens");
    assert_eq!(opened.superblock, superblock);
    let (damaged, error) = opened.damaged.expect("damage is reported");
    assert_eq!(damaged, copy);
    assert!(matches!(error, CopyError::Checksum { .. }), "{error}");
}

#[test]
fn two_damaged_copies_are_an_error_that_says_what_to_do() {
    let (_dir, location, _) = created();
    flip(&location, 100);
    flip(&location, 4096);
    let error = MetaStore::open(&location).expect_err("unreadable");
    assert!(matches!(
        error,
        SuperblockError::Unreadable {
            first: CopyError::Checksum { .. },
            second: CopyError::Magic { .. },
            ..
        }
    ));
    assert!(error.to_string().contains("create --force"), "{error}");
}

#[test]
fn a_second_daemon_is_kept_out() {
    let (_dir, location, superblock) = created();
    let first = MetaStore::open(&location).expect("opens");
    assert!(matches!(MetaStore::open(&location), Err(SuperblockError::Locked { .. })));
    assert!(matches!(MetaStore::create(&location, &superblock, true), Err(SuperblockError::Locked { .. })));
    drop(first);
    MetaStore::open(&location).expect("opens once the first is gone");
}

#[test]
fn missing_truncated_and_existing_metadata_are_told_apart() {
    let (_dir, location, superblock) = created();
    assert!(matches!(MetaStore::create(&location, &superblock, false), Err(SuperblockError::Exists { .. })));
    MetaStore::create(&location, &superblock, true).expect("force starts over");
    OpenOptions::new().write(true).open(&location.path).expect("opens").set_len(5000).expect("cut");
    assert!(matches!(MetaStore::open(&location), Err(SuperblockError::Truncated { found: 5000, .. })));
    std::fs::remove_file(&location.path).expect("removed");
    let error = MetaStore::open(&location).expect_err("missing");
    assert!(matches!(error, SuperblockError::Missing { .. }));
    assert!(error.to_string().contains("costandby create"));
}

#[test]
fn metadata_of_another_volume_node_or_size_is_refused() {
    let (_dir, location, _) = created();
    let what = |volume, node, size| match MetaStore::open_for(&location, volume, node, size) {
        Err(SuperblockError::Foreign { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(what("logs", "alpha", 1 << 30), "volume");
    assert_eq!(what("db", "beta", 1 << 30), "node");
    assert_eq!(what("db", "alpha", 1 << 31), "a volume of size");
    MetaStore::open_for(&location, "db", "alpha", 1 << 30).expect("its own is accepted");
}

#[test]
fn a_newer_format_in_either_copy_is_never_rolled_back() {
    for copy in COPIES {
        let (_dir, location, superblock) = created();
        let mut newer = superblock.encode(99);
        newer[8..12].copy_from_slice(&2u32.to_le_bytes());
        let crc = crc32c::crc32c(&newer[..CHECKED_LEN]);
        newer[CHECKED_LEN..].copy_from_slice(&crc.to_le_bytes());
        let file = OpenOptions::new().write(true).open(&location.path).expect("opens");
        file.write_all_at(&newer, copy).expect("writes");
        drop(file);
        assert!(matches!(MetaStore::open(&location), Err(SuperblockError::Newer { found: 2, .. })));
    }
}

#[test]
fn after_a_failed_store_nothing_is_stored() {
    let (_dir, location, superblock) = created();
    let mut opened = MetaStore::open(&location).expect("opens");
    opened.store.file = File::open(&location.path).expect("opens for reading only, so that writing fails");
    assert!(matches!(opened.store.store(&superblock), Err(SuperblockError::Io { .. })));
    opened.store.file = OpenOptions::new().write(true).open(&location.path).expect("opens");
    assert!(matches!(opened.store.store(&superblock), Err(SuperblockError::FailedBefore { .. })));
}

#[test]
fn a_device_keeps_its_metadata_in_its_last_mebibyte() {
    let at = |len| Location::at_end_of(Path::new("/dev/x"), len).map(|location| location.offset);
    assert_eq!(at((5 << 20) + 512), Some(4 << 20));
    assert_eq!(at(1000), None);
}

#[test]
fn a_new_generation_remembers_what_the_peer_has() {
    let mut generations = Generations::default();
    generations.advance(Generation(1), true);
    assert_eq!(generations, Generations { current: Generation(1), ..Default::default() });
    generations.advance(Generation(2), true);
    generations.advance(Generation(3), false);
    assert_eq!((generations.current, generations.base), (Generation(3), Generation(1)));
    assert_eq!(generations.history[..3], [Generation(2), Generation(1), Generation::ZERO]);
    for next in 4..30 {
        generations.advance(Generation(next), false);
    }
    assert_eq!(generations.history[7], Generation(21));
    assert!(generations.descends_from(Generation(1)) && generations.descends_from(Generation(28)));
    assert!(!generations.descends_from(Generation(29)) && !generations.descends_from(Generation::ZERO));
}
