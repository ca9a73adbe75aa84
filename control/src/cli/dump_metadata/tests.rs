//! What `dump-metadata` prints of good, old, damaged, foreign and missing metadata, and that it changes nothing.

use super::*;
use costandby_datapath::disk::activity_log::Touch;
use costandby_datapath::disk::metadata::layout::Geometry;
use costandby_datapath::disk::metadata::medium::Medium;
use costandby_datapath::disk::metadata::{create, open};
use std::path::PathBuf;

const SIZE: u64 = 1 << 30;

struct Bench {
    directory: tempfile::TempDir,
    config: Config,
    node: Name,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let at = directory.path().display();
        let text = format!(
            r#"
            nodes.alpha = {{ listen = "127.0.0.1:7790", admin = "{at}/alpha.sock" }}
            nodes.beta = {{ listen = "127.0.0.1:7791", admin = "{at}/beta.sock" }}
            volumes.db = {{ size = {SIZE}, primary = "alpha", disk.alpha = "{at}/a.img", disk.beta = "{at}/b.img" }}
            volumes.scratch = {{ size = 4096, primary = "alpha", disk.alpha = "memory:", disk.beta = "{at}/s.img" }}
            "#
        );
        let file = directory.path().join("c.toml");
        std::fs::write(&file, text).expect("written");
        let config = Config::load(&file).expect("loads");
        let node = config.node("alpha").expect("there").name.clone();
        Self { directory, config, node }
    }

    fn meta(&self) -> PathBuf {
        self.directory.path().join("a.img.meta")
    }

    /// A bit dirty, one extent hot, on record.
    fn made(&self) {
        let medium = FileMedium::create(&self.meta(), false).expect("made");
        let superblock = Superblock::fresh("db", "alpha", SIZE, true);
        let geometry = Geometry::for_volume(SIZE).expect("usual");
        create(&medium, 0, &superblock, geometry, 0xfeed, false).expect("made");
        let mut opened = open(medium, 0, "db", "alpha", SIZE).expect("opens");
        let _ = opened.dirty.set(ByteRange::new(0, 4096));
        opened.area.store_unsaved(&mut opened.dirty).expect("stored");
        assert!(matches!(opened.activity.touch(ByteRange::new(8 << 20, 1)), Touch::Wait(_)));
        opened.area.commit(&opened.activity.next_transaction().expect("due")).expect("stored");
    }

    fn look(&self) -> Look {
        let volume = self.config.volume("db").expect("there");
        look(&self.node, &volume.name, volume.size, &volume.disks[&self.node])
    }

    fn flip(&self, at: u64) {
        let medium = FileMedium::open(&self.meta()).expect("opens");
        let mut byte = [0];
        medium.read(at, &mut byte).expect("reads");
        medium.write(at, &[!byte[0]]).expect("writes");
    }

    fn run(&self, json: bool) -> Result<(), CliError> {
        run(&self.config, &self.node, None, json)
    }
}

#[test]
fn it_prints_superblocks_log_and_bitmap_and_changes_nothing() {
    let bench = Bench::new();
    bench.made();
    let before = std::fs::read(bench.meta()).expect("there");
    let text = render(&bench.look());
    for expected in [
        "superblock 0  good, format 2, sequence 1\n",
        "superblock 1  good, format 2, sequence 2, the newest\n",
        "volume        db (id 00000000000000000000000000000000)\n",
        "size          1 GiB (1073741824 bytes)\n",
        "disk state    UpToDate\n",
        "flags         clean, zeroed\n",
        "bitmap        64 KiB a bit, 1 blocks from byte 196608, 64 KiB marked\n",
        "activity log  4 MiB an extent, 1 of 1024 hot, last transaction 1\n                bytes 8388608+4194304\n",
        "bytes 0+65536\n",
    ] {
        assert!(text.contains(expected), "{expected:?} is not in\n{text}");
    }
    let value = to_json(&bench.look());
    assert_eq!(value["area"]["hot_extents"][0]["start"], 8 << 20);
    assert_eq!(value["area"]["dirty_bytes"], (4 << 20) + (64 << 10));
    assert_eq!((&value["newest"], &value["refused"]), (&json!(1), &Value::Null));
    assert_eq!(value["superblocks"][1]["sequence"], 2);
    bench.run(false).expect("good");
    bench.run(true).expect("good");
    assert_eq!(std::fs::read(bench.meta()).expect("there"), before);
}

#[test]
fn damage_is_named_with_what_is_made_of_it() {
    let bench = Bench::new();
    bench.made();
    bench.flip(100);
    bench.flip(196_608 + 600);
    bench.flip(65_536 + 4096 + 40);
    let text = render(&bench.look());
    assert!(text.contains("superblock 0  not good: checksum is"), "{text}");
    assert!(text.contains("bitmap: 1 sectors"), "{text}");
    assert!(text.contains("bytes 251658240+251658240: damaged (checksum)"), "{text}");
    assert!(text.contains("activity log: the newest transaction may be the damaged one"), "{text}");
    assert!(text.contains("dirty         1 GiB at the next start"), "{text}");
    bench.run(true).expect("the daemon would start, and copy everything");
    bench.flip(4096 + 100);
    let error = bench.run(false).expect_err("no superblock is good").to_string();
    assert!(error.starts_with("volume db: ") && error.contains("unreadable"), "{error}");
    assert!(to_json(&bench.look())["refused"].as_str().is_some_and(|text| text.contains("unreadable")));
}

#[test]
fn what_a_daemon_would_refuse_ends_with_the_reason() {
    let bench = Bench::new();
    let error = bench.run(true).expect_err("there is none").to_string();
    assert!(error.contains("no metadata at") && error.contains("costandby create"), "{error}");
    let medium = FileMedium::create(&bench.meta(), false).expect("made");
    let geometry = Geometry::for_volume(SIZE).expect("usual");
    create(&medium, 0, &Superblock::fresh("logs", "alpha", SIZE, true), geometry, 3, false).expect("made");
    drop(medium);
    let error = bench.run(false).expect_err("foreign").to_string();
    assert!(error.contains("metadata of volume logs on node alpha"), "{error}");
    std::fs::OpenOptions::new().write(true).open(bench.meta()).expect("opens").set_len(70_000).expect("cut");
    let error = bench.run(false).expect_err("cut").to_string();
    assert!(error.contains("truncated: 70000 bytes instead of 200704"), "{error}");
}

#[test]
fn a_daemons_lock_is_noticed_and_left_alone() {
    let bench = Bench::new();
    bench.made();
    assert!(!bench.look().in_use);
    let daemon = FileMedium::open(&bench.meta()).expect("opens");
    let look = bench.look();
    assert!(look.in_use && render(&look).contains("in use        by a daemon"));
    drop(daemon);
    FileMedium::open(&bench.meta()).expect("not locked by looking");
}
