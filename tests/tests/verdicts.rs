//! What two real daemons make of their disks when they meet: whose data is kept where one disk is empty, where both may hold
//! data, and where a node found its own disk to differ.

use costandby_tests::pair::{ALPHA, BETA, Pair, Settings, VolumeSettings};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const SIZE_MIB: u64 = 8;
const MIB: u64 = 1 << 20;

fn put(disk: &Path, at: u64, data: &[u8]) {
    let file = File::options().write(true).open(disk).expect("a disk");
    file.write_all_at(data, at).expect("written");
    file.sync_all().expect("flushed");
}

fn get(disk: &Path, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(disk).expect("a disk").read_exact_at(&mut bytes, at).expect("read");
    bytes
}

/// The byte that a node's own data consists of.
fn mark(node: usize) -> u8 {
    if node == ALPHA { 1 } else { 2 }
}

/// A pair whose `primary` is beta, nothing started, with bytes of their own on the disks of `nodes`, taken over by force.
fn with_data_on(nodes: &[usize]) -> Pair {
    let mut db = VolumeSettings::new("db", SIZE_MIB);
    db.primary = BETA;
    let pair = Pair::create(Settings::new(&[db]));
    for &node in nodes {
        put(&pair.disk(node, "db"), MIB, &[mark(node); 4096]);
        let said = pair.cli(node, &["create", "db"]).stderr;
        assert!(said.contains("is already there"), "{said}");
        pair.cli_ok(node, &["create", "db", "--force"]);
    }
    pair
}

#[test]
fn a_disk_with_data_is_not_overwritten_by_an_empty_one_whoever_is_to_be_primary() {
    let mut pair = with_data_on(&[ALPHA]);
    pair.up(ALPHA);
    pair.up(BETA);
    pair.wait_in_sync("db");
    assert_eq!(pair.primary("db"), ALPHA, "the one with the data serves first");
    pair.wait_log(ALPHA, &["alpha's is copied and alpha serves first, although `primary`"]);
    let mut bytes = [0; 4096];
    pair.client(ALPHA, "db").read(MIB, &mut bytes).expect("read");
    assert_eq!(bytes, [1; 4096]);
    pair.settle_and_compare("db");
    assert_eq!(get(&pair.disk(BETA, "db"), MIB, 4096), [1; 4096]);
}

#[test]
fn of_two_disks_with_data_an_operator_chooses_one() {
    let mut pair = with_data_on(&[ALPHA, BETA]);
    pair.up(ALPHA);
    pair.up(BETA);
    for node in [ALPHA, BETA] {
        let told = pair.wait_status(node, "db", "told", |status| {
            status.advice.as_ref().is_some_and(|advice| advice.contains("each may hold data"))
        });
        let advice = told.advice.expect("just seen");
        assert!(advice.contains(" promote db --force` or `costandby "), "{advice}");
        assert!(advice.contains("the other one's disk is then overwritten"), "{advice}");
        assert_eq!(get(&pair.disk(node, "db"), MIB, 4096), [mark(node); 4096], "nothing was changed");
    }
    pair.cli_ok(ALPHA, &["promote", "db", "--force"]);
    pair.wait_in_sync("db");
    pair.settle_and_compare("db");
    assert_eq!(get(&pair.disk(BETA, "db"), MIB, 4096), [1; 4096]);
}

#[test]
fn a_standby_that_found_itself_to_differ_is_not_promoted_and_not_copied_from() {
    let mut pair = Pair::start(Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]));
    pair.client(ALPHA, "db").write(5 * MIB, &[3; 70_000], true).expect("a write");
    put(&pair.disk(BETA, "db"), 5 * MIB + 99, &[4]);
    assert_eq!(pair.cli(ALPHA, &["verify", "db"]).status.code(), Some(1), "it differs");
    pair.wait_status(BETA, "db", "Outdated", |status| status.disk_state == "Outdated");
    pair.wait_status(ALPHA, "db", "told", |status| status.peer_state == "Outdated");
    // Neither its own restart nor the other node's death makes it a good one.
    pair.kill(ALPHA);
    pair.kill(BETA);
    pair.up(BETA);
    let said = pair.cli(BETA, &["promote", "db"]).stderr;
    assert!(said.contains("the disk is Outdated") && said.contains("--force"), "{said}");
    pair.up(ALPHA);
    pair.cli_ok(ALPHA, &["wait-sync", "db"]);
    assert_eq!(get(&pair.disk(BETA, "db"), 5 * MIB, 70_000), [3; 70_000], "it is copied to");
    assert_eq!(get(&pair.disk(ALPHA, "db"), 5 * MIB, 70_000), [3; 70_000]);
    pair.wait_status(BETA, "db", "UpToDate", |status| status.disk_state == "UpToDate");
}

#[test]
fn a_repair_in_the_same_session_makes_a_standby_good_again() {
    let pair = Pair::start(Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]));
    pair.client(ALPHA, "db").write(5 * MIB, &[3; 70_000], true).expect("a write");
    put(&pair.disk(BETA, "db"), 5 * MIB + 99, &[4]);
    assert_eq!(pair.cli(ALPHA, &["verify", "db"]).status.code(), Some(1), "it differs");
    pair.wait_status(BETA, "db", "Outdated", |status| status.disk_state == "Outdated");
    pair.cli_ok(ALPHA, &["verify", "db", "--repair"]);
    pair.wait_status(BETA, "db", "UpToDate", |status| status.disk_state == "UpToDate");
    pair.hand_over("db", ALPHA);
    assert_eq!(pair.primary("db"), BETA);
}

#[test]
fn settings_that_differ_are_named_on_both_nodes_and_stop_nothing() {
    let mut settings = Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]);
    settings.peer_timeout = "2s";
    let mut pair = Pair::create(settings);
    let text = std::fs::read_to_string(pair.config(BETA)).expect("there");
    let other =
        text.replace("peer_timeout = \"2s\"", "peer_timeout = \"3s\"").replace("\"memory\"", "\"durable\"");
    assert_ne!(text, other);
    std::fs::write(pair.config(BETA), other).expect("written");
    pair.up(ALPHA);
    pair.up(BETA);
    pair.wait_in_sync("db");
    for (node, first, second) in [(ALPHA, "2000ms", "3000ms"), (BETA, "3000ms", "2000ms")] {
        let status = pair.status(node, "db").expect("answers");
        let said = status.warnings.join("\n");
        assert!(said.contains("`peer_timeout` is ") && said.contains("`ack` is "), "{said}");
        assert!(said.find(first).expect("named") < said.find(second).expect("named"), "{said}");
    }
    // Made alike, and seen to be.
    pair.stop(BETA);
    std::fs::write(pair.config(BETA), text).expect("written");
    pair.up(BETA);
    pair.wait_in_sync("db");
    for node in [ALPHA, BETA] {
        assert_eq!(pair.status(node, "db").expect("answers").warnings, Vec::<String>::new());
    }
}

#[test]
fn a_disk_put_back_to_an_earlier_time_is_found_out_and_copied_to() {
    let mut pair = Pair::start(Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]));
    pair.client(ALPHA, "db").write(MIB, &[1; 4096], true).expect("a write");
    pair.stop(BETA);
    let files = [pair.disk(BETA, "db"), pair.metadata(BETA, "db")];
    let snapshots = files.each_ref().map(|file| std::fs::read(file).expect("read"));
    pair.up(BETA);
    pair.wait_in_sync("db");
    pair.client(ALPHA, "db").write(MIB, &[2; 4096], true).expect("a write");
    pair.stop(BETA);
    for (file, snapshot) in files.iter().zip(&snapshots) {
        put(file, 0, snapshot);
    }
    pair.up(BETA);
    pair.wait_log(
        ALPHA,
        &["copying to beta everything: the target's disk and metadata are older than its last session"],
    );
    pair.wait_in_sync("db");
    pair.settle_and_compare("db");
    assert_eq!(get(&files[0], MIB, 4096), [2; 4096]);
}
