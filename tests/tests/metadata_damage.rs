//! Flipped bits in the metadata beside a disk (`docs/METADATA.md`), and metadata that is not this disk's: each is told of
//! in the daemon's log or refused with what to do, and none ends in wrong data.
//!
//! A single flipped bit costs at most more copying.

use costandby_control::admin::Command;
use costandby_tests::ledger::Ledger;
use costandby_tests::pair::{ALPHA, BETA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::{Rng, seed, wait_for};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

const SIZE_MIB: u64 = 12;

/// Bytes of a superblock copy, of which each begins at a multiple.
const COPY_LEN: u64 = 4096;

/// What a superblock copy uses of them, all formats: the rest is zeros, but under the checksum too.
const COPY_USED: u64 = 695;

fn settings() -> Settings {
    let mut settings = Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]);
    settings.peer_timeout = "2s";
    settings
}

/// What `dump-metadata` says of the volume.
fn dump(pair: &Pair, node: usize) -> Value {
    let said = pair.cli_ok(node, &["dump-metadata", "db", "--json"]);
    let found: Value = serde_json::from_str(&said).expect("JSON");
    found["volumes"][0].clone()
}

fn newest(dump: &Value) -> u64 {
    dump["newest"].as_u64().expect("a good copy")
}

/// Turns one bit of a node's metadata.
fn flip(pair: &Pair, node: usize, byte: u64, bit: u64) {
    let file = File::options().read(true).write(true).open(pair.metadata(node, "db")).expect("metadata");
    let mut found = [0];
    file.read_exact_at(&mut found, byte).expect("a byte of the metadata");
    file.write_all_at(&[found[0] ^ 1 << bit], byte).expect("a byte of the metadata");
}

/// Writes for a moment, kills the nodes of `order` in turn, and returns what was acknowledged.
fn killed_under_load(pair: &mut Pair, ledger: Ledger, rng: &mut Rng, order: &[usize]) -> Ledger {
    let writing = ledger.write(&pair.uri(ALPHA, "db"), rng.next_u64());
    wait_for("a start", LIMIT, || (writing.acked() > 50).then_some(()));
    std::thread::sleep(Duration::from_millis(rng.below(200)));
    for &node in order {
        pair.kill(node);
        std::thread::sleep(Duration::from_millis(50));
    }
    writing.finish().0
}

/// Starts both nodes; everything acknowledged must be there, on both disks.
fn assert_recovers(pair: &mut Pair, ledger: &mut Ledger, down: &[usize]) {
    for &node in down {
        pair.up(node);
    }
    pair.wait_in_sync("db");
    let primary = pair.primary("db");
    ledger.check(&mut pair.client(primary, "db")).unwrap_or_else(|lost| panic!("{lost}"));
    pair.settle_and_compare("db");
}

/// Starts a node whose volume cannot be opened: it says why.
fn failed_up(pair: &mut Pair, node: usize, words: &[&str]) {
    pair.up(node);
    let status = pair.wait_status(node, "db", "failed", |status| status.disk_state == "Failed");
    let advice = status.advice.expect("advice");
    for word in words {
        assert!(advice.contains(word), "{word:?} is not in {advice}");
    }
}

#[test]
fn a_flipped_bit_in_a_superblock_copy_is_told_of_and_costs_nothing() {
    let mut rng = Rng::new(seed());
    let mut pair = Pair::start(settings());
    let mut ledger = Ledger::new(SIZE_MIB << 20);
    for round in 0..8 {
        // Who stops in the middle of everything: the primary, the standby, or first one and then the other.
        let order: &[usize] = [&[ALPHA] as &[_], &[BETA], &[ALPHA, BETA], &[BETA, ALPHA]][round % 4];
        let damaged = order[usize::try_from(rng.below(order.len() as u64)).expect("small")];
        let copy = u64::try_from(round / 4).expect("small") ^ newest(&dump(&pair, damaged));
        ledger = killed_under_load(&mut pair, ledger, &mut rng, order);
        let byte = copy * COPY_LEN + rng.below(COPY_USED);
        flip(&pair, damaged, byte, rng.below(8));
        println!("round {round}: killed {order:?}, byte {byte} of {} turned", NODES[damaged]);
        let found = dump(&pair, damaged);
        let text = found["superblocks"][usize::try_from(copy).expect("small")]["error"].as_str();
        assert!(text.is_some(), "dump-metadata says what is wrong: {found}");
        let before = pair.log(damaged).matches("damaged").count();
        assert_recovers(&mut pair, &mut ledger, order);
        let log = pair.log(damaged);
        assert!(log.matches("damaged").count() > before, "the log tells of it: {log}");
        if pair.primary("db") != ALPHA {
            pair.hand_over("db", BETA);
            pair.wait_in_sync("db");
        }
    }
}

#[test]
fn half_a_copy_is_not_taken_for_a_whole_one_by_a_flipped_bit() {
    let mut settings = settings();
    settings.proxied = true;
    let mut pair = Pair::start(settings);
    // Stopped well, so that what its metadata said before the copy began is: complete.
    pair.stop(BETA);
    let data = Rng::new(3).bytes(8 << 20);
    pair.client(ALPHA, "db").write(0, &data, true).expect("a write without the peer");
    pair.proxy().delay(Duration::from_millis(20));
    pair.up(BETA);
    pair.wait_status(BETA, "db", "being copied to", |status| status.connection == "sync-target");
    pair.kill(ALPHA);
    pair.kill(BETA);
    let found = dump(&pair, BETA);
    assert_eq!(
        found["superblocks"][usize::try_from(newest(&found)).expect("small")]["disk_state"],
        "Inconsistent"
    );
    flip(&pair, BETA, newest(&found) * COPY_LEN + 100, 3);
    pair.up(BETA);
    let told = pair.tell(BETA, "db", Command::Promote { force: false });
    assert!(told.is_err(), "half a copy is promoted, for the copy of its metadata that says so is damaged");
    assert!(pair.connect(BETA, "db").is_err(), "half a copy is not served");
    pair.proxy().delay(Duration::ZERO);
    pair.up(ALPHA);
    pair.wait_in_sync("db");
    pair.settle_and_compare("db");
}

#[test]
fn writes_of_a_lone_primary_are_not_discarded_by_a_flipped_bit() {
    let mut pair = Pair::start(settings());
    pair.client(ALPHA, "db").write(0, &[1; 4096], true).expect("a write to both");
    pair.stop(BETA);
    let client = pair.client(ALPHA, "db").write(0, &[2; 4096], true);
    client.expect("a write without the peer");
    pair.kill(ALPHA);
    // The copy that records that the primary went on alone.
    flip(&pair, ALPHA, newest(&dump(&pair, ALPHA)) * COPY_LEN + 60, 2);
    pair.up(BETA);
    wait_for("beta may be promoted", LIMIT, || pair.tell(BETA, "db", Command::Promote { force: false }).ok());
    pair.client(BETA, "db").write(8192, &[3; 4096], true).expect("a write on the other side");
    pair.up(ALPHA);
    // Both went on without the other. Whatever is made of it, what only alpha holds is not written over unasked.
    pair.wait_log(ALPHA, &["db", "beta"]);
    std::thread::sleep(Duration::from_secs(2));
    let disk = std::fs::read(pair.disk(ALPHA, "db")).expect("a disk");
    assert!(disk[..4096] == [2; 4096], "what alpha acknowledged alone is gone without a word");
}

#[test]
fn with_both_superblock_copies_damaged_a_disk_starts_anew_from_its_peer() {
    let mut rng = Rng::new(seed());
    for damaged in [ALPHA, BETA] {
        let mut pair = Pair::start(settings());
        let mut ledger = Ledger::new(SIZE_MIB << 20);
        ledger = killed_under_load(&mut pair, ledger, &mut rng, &[damaged]);
        for copy in 0..2 {
            flip(&pair, damaged, copy * COPY_LEN + rng.below(COPY_USED), rng.below(8));
        }
        let path = pair.metadata(damaged, "db").display().to_string();
        failed_up(
            &mut pair,
            damaged,
            &["db", &path, "unreadable", "copy 0", "copy 1", "create db --force` gives up"],
        );
        if damaged == ALPHA {
            wait_for("the survivor may be promoted", LIMIT, || {
                pair.tell(BETA, "db", Command::Promote { force: false }).ok()
            });
        }
        // What the message says to do.
        let _ = pair.cli_ok(damaged, &["create", "db", "--force"]);
        let _ = pair.cli_ok(damaged, &["connect", "db"]);
        assert_recovers(&mut pair, &mut ledger, &[]);
        assert_eq!(pair.primary("db"), 1 - damaged, "the survivor's data was kept");
    }
}

#[test]
fn a_disk_of_another_pair_is_not_mixed_in() {
    let (mut pair, mut other) = (Pair::start(settings()), Pair::start(settings()));
    for (pair, byte) in [(&pair, 1_u8), (&other, 2)] {
        pair.client(ALPHA, "db").write(0, &vec![byte; 1 << 20], true).expect("a write");
        pair.settle_and_compare("db");
    }
    pair.stop(BETA);
    other.stop(BETA);
    let files = |pair: &Pair| [pair.disk(BETA, "db"), pair.metadata(BETA, "db")];
    for (from, to) in files(&other).iter().zip(files(&pair)) {
        std::fs::copy(from, to).expect("a copy");
    }
    pair.up(BETA);
    let line = pair.wait_log(BETA, &["db", "no common past"]);
    println!("{line}");
    let mut found = vec![0; 1 << 20];
    pair.client(ALPHA, "db").read(0, &mut found).expect("a read");
    assert!(found.iter().all(|&byte| byte == 1), "the primary's data is its own");
    let disk = std::fs::read(pair.disk(BETA, "db")).expect("a disk");
    assert!(disk[..1 << 20].iter().all(|&byte| byte == 2), "the stranger's disk is as it was");
    assert!(!pair.status(BETA, "db").expect("a status").in_sync());
}

#[test]
fn a_flipped_bit_in_the_bitmap_is_told_of_and_only_copies_more() {
    let mut rng = Rng::new(seed());
    let mut pair = Pair::start(settings());
    let mut ledger = Ledger::new(SIZE_MIB << 20);
    for round in 0..4 {
        pair.kill(BETA);
        ledger = killed_under_load(&mut pair, ledger, &mut rng, &[ALPHA]);
        // The volume's bits are in the first of the map's sectors.
        let at = dump(&pair, ALPHA)["area"]["bitmap_at"].as_u64().expect("a bitmap");
        let byte = at + rng.below(512);
        flip(&pair, ALPHA, byte, rng.below(8));
        let found = dump(&pair, ALPHA);
        println!("round {round}: byte {byte} turned; {}", found["area"]["bitmap_damage"]);
        assert_eq!(found["area"]["bitmap_damaged_sectors"], 1, "dump-metadata counts it");
        let before = pair.log(ALPHA).matches("damage").count();
        assert_recovers(&mut pair, &mut ledger, &[ALPHA, BETA]);
        let log = pair.log(ALPHA);
        assert!(log.matches("damage").count() > before, "the log tells of it: {log}");
        assert_eq!(pair.primary("db"), ALPHA);
    }
}

#[test]
fn a_flipped_bit_in_the_activity_log_is_told_of_and_only_copies_more() {
    let mut rng = Rng::new(seed());
    let mut pair = Pair::start(settings());
    let mut ledger = Ledger::new(SIZE_MIB << 20);
    for round in 0..4 {
        ledger = killed_under_load(&mut pair, ledger, &mut rng, &[[ALPHA, BETA], [BETA, ALPHA]][round % 2]);
        let found = dump(&pair, ALPHA);
        let area = &found["area"];
        let at = area["activity_log_at"].as_u64().expect("a log");
        let last = area["last_transaction"].as_u64().expect("a transaction");
        assert_ne!(last, 0, "writes to cold extents are in the log: {found}");
        // 32 transactions of 4096 bytes: the last one.
        let byte = at + last % 32 * 4096 + rng.below(4096);
        flip(&pair, ALPHA, byte, rng.below(8));
        let found = dump(&pair, ALPHA);
        println!(
            "round {round}: byte {byte} of transaction {last} turned; {}",
            found["area"]["activity_log_damage"]
        );
        assert!(found["area"]["activity_log_damage"].is_string(), "dump-metadata tells of it: {found}");
        let before = pair.log(ALPHA).matches("damage").count();
        assert_recovers(&mut pair, &mut ledger, &[ALPHA, BETA]);
        let log = pair.log(ALPHA);
        assert!(log.matches("damage").count() > before, "the log tells of it: {log}");
        if pair.primary("db") != ALPHA {
            pair.hand_over("db", BETA);
            pair.wait_in_sync("db");
        }
    }
}
