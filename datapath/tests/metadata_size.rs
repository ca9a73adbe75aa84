//! A volume of 16 TiB: its metadata opens in under a second and costs under 64 MiB of memory, and its file has all its blocks.
//! Alone in its process, because it looks at how much memory that has.

#![forbid(unsafe_code)]

use costandby_datapath::disk::activity_log::Touch;
use costandby_datapath::disk::metadata::layout::Geometry;
use costandby_datapath::disk::metadata::medium::FileMedium;
use costandby_datapath::disk::metadata::{create, open};
use costandby_datapath::disk::superblock::Superblock;
use costandby_datapath::units::ByteRange;

/// Resident memory of this process.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: u64 = statm.split(' ').nth(1).and_then(|n| n.parse().ok()).expect("a number");
    pages * 4096
}

#[test]
fn sixteen_tebibytes_open_at_once_and_cost_little() {
    use std::os::unix::fs::MetadataExt;
    let size = 16 << 40;
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("db.img.meta");
    let medium = FileMedium::create(&path, false).expect("made");
    let superblock = Superblock::fresh("db", "alpha", size, true);
    create(&medium, 0, &superblock, Geometry::for_volume(size).expect("usual"), 7, false).expect("made");
    drop(medium);
    let stored = std::fs::metadata(&path).expect("there");
    assert!(stored.len() > 34 << 20 && stored.blocks() * 512 >= stored.len(), "{} blocks", stored.blocks());

    let look = || {
        let before = resident_bytes();
        let began = std::time::Instant::now();
        let mut opened =
            open(FileMedium::open(&path).expect("locks"), 0, "db", "alpha", size).expect("opens");
        opened.recover().expect("recovers");
        let took = began.elapsed();
        let held = opened.dirty.memory_len() + opened.activity.memory_len();
        let grown = resident_bytes().saturating_sub(before);
        println!(
            "16 TiB, {} dirty: {} ms, structures {} KiB, resident +{} KiB",
            opened.dirty.dirty_bytes(),
            took.as_millis(),
            held >> 10,
            grown >> 10
        );
        assert!(took.as_millis() < 1000, "{took:?}");
        assert!(held < 64 << 20 && grown < 64 << 20, "{held} and {grown} bytes");
        opened
    };
    let mut opened = look();
    for extent in 0..1000 {
        assert_ne!(opened.activity.touch(ByteRange::new(extent * (16 << 30), 4096)), Touch::Full);
        while let Some(transaction) = opened.activity.next_transaction() {
            opened.area.commit(&transaction).expect("stored");
            opened.activity.committed(transaction.ticket);
        }
    }
    drop(opened);
    let mut opened = look();
    assert_eq!(opened.report.hot_extents, 1000);
    assert_eq!(opened.dirty.dirty_bytes(), 1000 * (4 << 20));
    let _ = opened.dirty.set_all();
    opened.area.store_unsaved(&mut opened.dirty).expect("stored");
    drop(opened);
    assert_eq!(look().dirty.dirty_bytes(), size, "the fullest there is");
}
