//! Roles and what operators do with them, at two running daemons: refusals, handovers, freezing, going on alone, split
//! brain, and what the command line says of it all.

use costandby_control::admin::Command;
use costandby_control::nbd_client::NbdError;
use costandby_datapath::disk::metadata::file::open_at;
use costandby_datapath::disk::superblock::{Location, Superblock};
use costandby_tests::ledger::Ledger;
use costandby_tests::pair::{ALPHA, BETA, Pair, Settings, VolumeSettings};
use costandby_tests::{Rng, scaled};
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const SIZE_MIB: u64 = 8;

fn settings() -> Settings {
    Settings::new(&[VolumeSettings::new("db", SIZE_MIB)])
}

/// The one line a failed command writes to stderr.
fn refusal(pair: &Pair, node: usize, args: &[&str]) -> String {
    let ran = pair.cli(node, args);
    assert_eq!(ran.status.code(), Some(1), "{args:?}: {}{}", ran.stdout, ran.stderr);
    let lines: Vec<_> = ran.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{args:?} writes one line: {lines:?}");
    assert!(lines[0].starts_with("costandby: "), "{lines:?}");
    lines[0].to_owned()
}

#[test]
fn promotion_is_refused_while_the_connected_peer_is_primary() {
    let pair = Pair::start(settings());
    let said = refusal(&pair, BETA, &["promote", "db"]);
    assert!(said.contains("alpha is primary") && said.contains("demote"), "{said}");
    let said = refusal(&pair, BETA, &["promote", "db", "--force"]);
    assert!(said.contains("demote"), "force does not help against a living primary: {said}");
    assert_eq!(pair.primary("db"), ALPHA);
    pair.client(ALPHA, "db").write(0, b"still served", false).expect("a write");
    pair.settle_and_compare("db");
}

#[test]
fn a_handover_under_an_open_client_loses_nothing() {
    let pair = Pair::start(settings());
    let mut ledger = Ledger::new(SIZE_MIB << 20);
    let mut from = ALPHA;
    for round in 0..4 {
        let writing = ledger.write(&pair.uri(from, "db"), round);
        std::thread::sleep(Duration::from_millis(200));
        assert!(writing.acked() > 0, "the client was at work");
        pair.cli_ok(from, &["demote", "db"]);
        pair.cli_ok(1 - from, &["promote", "db"]);
        let (after, error) = writing.finish();
        assert!(error.is_some(), "the old primary's clients are told");
        ledger = after;
        let refused = pair.connect(from, "db").expect_err("the new standby serves nobody");
        assert!(matches!(refused, NbdError::Refused { .. }), "{refused}");
        from = 1 - from;
        assert_eq!(pair.primary("db"), from);
        ledger.check(&mut pair.client(from, "db")).unwrap_or_else(|lost| panic!("round {round}: {lost}"));
        pair.settle_and_compare("db");
    }
    let epoch = pair.status(ALPHA, "db").expect("a status").epoch;
    assert!(epoch >= 5, "each promotion raised the epoch: {epoch}");
}

#[test]
fn freeze_holds_writes_until_the_peer_is_back() {
    let mut settings = settings();
    settings.volumes[0].on_peer_loss = "freeze";
    let mut pair = Pair::start(settings);
    let mut client = pair.client(ALPHA, "db");
    client.write(0, &[1; 4096], false).expect("a write");
    pair.kill(BETA);

    let (done, outcome) = mpsc::channel();
    let writer = std::thread::spawn(move || {
        let result = client.write(4096, &[2; 4096], false);
        done.send(result.map_err(|error| error.to_string())).expect("the test listens");
        client
    });
    pair.wait_status(ALPHA, "db", "frozen", |status| status.frozen);
    let early = outcome.recv_timeout(Duration::from_secs(2));
    assert!(early.is_err(), "a write was answered without the peer: {early:?}");

    pair.up(BETA);
    outcome.recv_timeout(Duration::from_secs(8)).expect("an answer").expect("a write that was held");
    pair.wait_in_sync("db");
    let mut client = writer.join().expect("a writer");
    let mut found = [0; 8192];
    client.read(0, &mut found).expect("a read");
    assert!(found[..4096] == [1; 4096] && found[4096..] == [2; 4096]);
    pair.settle_and_compare("db");
}

/// A primary that freezes, with a write that waits, and what its client is told.
fn frozen() -> (Pair, JoinHandle<Result<(), NbdError>>) {
    let mut settings = settings();
    settings.volumes[0].on_peer_loss = "freeze";
    let mut pair = Pair::start(settings);
    let mut client = pair.client(ALPHA, "db");
    client.write(0, &[1; 8192], false).expect("a write");
    pair.kill(BETA);
    let writer = std::thread::spawn(move || client.write(4096, &[2; 4096], false));
    pair.wait_status(ALPHA, "db", "frozen", |status| status.frozen && status.in_flight == 1);
    (pair, writer)
}

#[test]
fn a_frozen_primary_answers_reads_but_those_of_a_write_that_waits() {
    let (mut pair, writer) = frozen();
    let mut found = [0; 4096];
    let mut elsewhere = pair.client(ALPHA, "db");
    elsewhere.read(0, &mut found).expect("a read beside the write");
    assert_eq!(found, [1; 4096]);
    let (done, outcome) = mpsc::channel();
    let mut reader = pair.client(ALPHA, "db");
    let reading = std::thread::spawn(move || {
        let result = reader.read(4096, &mut found).map(|()| found);
        done.send(result.map_err(|error| error.to_string())).expect("the test listens");
    });
    let early = outcome.recv_timeout(Duration::from_secs(2));
    assert!(early.is_err(), "it would show what may be lost, or what was overwritten: {early:?}");
    elsewhere.read(0, &mut [0; 4096]).expect("reads elsewhere go on");
    pair.up(BETA);
    let read = outcome.recv_timeout(scaled(Duration::from_secs(8))).expect("an answer").expect("a read");
    assert_eq!(read, [2; 4096]);
    reading.join().expect("a reader");
    writer.join().expect("a writer").expect("a write that was held");
    pair.wait_in_sync("db");
    pair.settle_and_compare("db");
}

#[test]
fn a_frozen_primary_ends_soon_and_answers_no_write_that_waits() {
    let (mut pair, writer) = frozen();
    let began = Instant::now();
    pair.stop(ALPHA);
    assert!(began.elapsed() < scaled(Duration::from_secs(5)), "it took {:?}", began.elapsed());
    let told = writer.join().expect("a writer").expect_err("only a node that is down has the write");
    assert_eq!(told.errno(), None, "closed, not answered: {told}");
    pair.up(ALPHA);
    pair.up(BETA);
    pair.wait_in_sync("db");
    pair.settle_and_compare("db");
}

#[test]
fn continue_counts_what_the_peer_lacks() {
    let mut pair = Pair::start(settings());
    let mut client = pair.client(ALPHA, "db");
    pair.kill(BETA);
    let data = Rng::new(1).bytes(1 << 20);
    for at in [0, 3 << 20, 6 << 20] {
        client.write(at, &data, false).expect("a write without the peer");
    }
    let status = pair.wait_status(ALPHA, "db", "going on alone", |status| status.dirty_bytes >= 3 << 20);
    assert_eq!((status.role.as_str(), status.peer_state.as_str()), ("primary", "Unknown"));
    assert!(status.dirty_bytes <= SIZE_MIB << 20, "{} bytes dirty", status.dirty_bytes);
    let same = ((SIZE_MIB << 20) - status.dirty_bytes) as f64 * 100.0 / (SIZE_MIB << 20) as f64;
    assert!((status.resync_percent - same).abs() < 0.02, "{}% in sync, not {same}%", status.resync_percent);
    pair.up(BETA);
    pair.wait_in_sync("db");
    pair.wait_status(ALPHA, "db", "nothing dirty", |status| status.dirty_bytes == 0);
    pair.settle_and_compare("db");
}

#[test]
fn disconnect_stays_until_connect() {
    let pair = Pair::start(settings());
    pair.cli_ok(BETA, &["disconnect", "db"]);
    pair.wait_status(BETA, "db", "standalone", |status| status.connection == "standalone");
    pair.client(ALPHA, "db").write(1 << 20, &[9; 70_000], false).expect("a write without the peer");
    std::thread::sleep(Duration::from_secs(1));
    let status = pair.status(BETA, "db").expect("a status");
    assert_eq!((status.connection.as_str(), status.peer_state.as_str()), ("standalone", "Unknown"));
    pair.cli_ok(BETA, &["connect", "db"]);
    pair.wait_in_sync("db");
    pair.settle_and_compare("db");
}

#[test]
fn status_has_the_keys_that_scripts_rely_on() {
    let pair = Pair::start(settings());
    let text = pair.cli_ok(ALPHA, &["status", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&text).expect("status --json is JSON");
    assert_eq!(json["node"], "alpha");
    let volume = &json["volumes"][0];
    for (key, value) in [
        ("name", serde_json::json!("db")),
        ("role", serde_json::json!("primary")),
        ("disk_state", serde_json::json!("UpToDate")),
        ("peer_state", serde_json::json!("UpToDate")),
        ("link", serde_json::json!("tcp")),
        ("ack", serde_json::json!("memory")),
        ("size", serde_json::json!(SIZE_MIB << 20)),
        ("dirty_bytes", serde_json::json!(0)),
        ("resync_percent", serde_json::json!(100.0)),
    ] {
        assert_eq!(volume[key], value, "{key}");
    }
    assert!(volume["epoch"].as_u64().is_some_and(|epoch| epoch >= 1), "{text}");
    assert!(volume["generation"].as_str().is_some_and(|generation| !generation.is_empty()), "{text}");
    let table = pair.cli_ok(BETA, &["status"]);
    assert!(table.contains("db") && table.contains("standby") && table.contains("alpha"), "{table}");
}

#[test]
fn wait_sync_waits_no_longer_than_it_is_told() {
    let mut pair = Pair::start(settings());
    assert!(pair.cli_ok(ALPHA, &["wait-sync", "db", "--timeout", "10s"]).contains("in sync"));
    pair.kill(BETA);
    pair.wait_status(ALPHA, "db", "apart", |status| status.peer_state == "Unknown");
    let started = Instant::now();
    let said = refusal(&pair, ALPHA, &["wait-sync", "db", "--timeout", "1s"]);
    let took = started.elapsed();
    assert!(said.contains("Unknown"), "it says where it stood: {said}");
    println!("a timeout of 1 s took {took:?}");
    assert!((Duration::from_secs(1)..scaled(Duration::from_secs(20))).contains(&took), "it took {took:?}");
}

#[test]
fn a_primary_killed_with_its_standby_resumes_by_itself() {
    let mut pair = Pair::start(settings());
    let data = Rng::new(2).bytes(2 << 20);
    pair.client(ALPHA, "db").write(1 << 20, &data, true).expect("a durable write");
    pair.kill(ALPHA);
    pair.kill(BETA);
    pair.up(BETA);
    pair.up(ALPHA);
    pair.wait_in_sync("db");
    assert_eq!(pair.primary("db"), ALPHA);
    let mut found = vec![0; data.len()];
    pair.client(ALPHA, "db").read(1 << 20, &mut found).expect("a read");
    assert!(found == data, "the durable write is there");
    pair.settle_and_compare("db");
}

/// What `node`'s machine would leave of its metadata if it lost power: another boot finds it.
fn lose_power(pair: &Pair, node: usize) {
    let location = Location { path: pair.metadata(node, "db"), offset: 0 };
    let name = ["alpha", "beta"][node];
    let mut opened = open_at(&location, "db", name, SIZE_MIB << 20).expect("the metadata it left");
    let found = Superblock { boot: [9; 16], ..opened.superblock.clone() };
    opened.superblocks.store(&found).expect("stored");
}

#[test]
fn a_primary_that_lost_power_takes_from_its_standby_what_it_lacks_and_serves_again() {
    let mut pair = Pair::start(settings());
    let mut client = pair.client(ALPHA, "db");
    client.write(0, &[1; 1 << 20], true).expect("a durable write");
    client.write(4 << 20, &[2; 1 << 16], false).expect("a write that is in two memories");
    pair.kill(ALPHA);
    lose_power(&pair, ALPHA);
    let disk = std::fs::OpenOptions::new().write(true).open(pair.disk(ALPHA, "db")).expect("alpha's disk");
    disk.write_all_at(&[0; 1 << 16], 4 << 20).expect("it had not been flushed");
    drop(disk);

    pair.up(ALPHA);
    pair.wait_log(ALPHA, &["being copied from beta what differs", "lost power"]);
    pair.wait_in_sync("db");
    pair.wait_status(ALPHA, "db", "serving again", |status| status.role == "primary");
    let mut found = vec![0; 1 << 16];
    pair.client(ALPHA, "db").read(4 << 20, &mut found).expect("a read");
    assert!(found == vec![2; 1 << 16], "an acknowledged write is lost");
    pair.settle_and_compare("db");
}

#[test]
fn a_primary_that_lost_power_with_its_standby_away_serves_only_by_force() {
    let mut pair = Pair::start(settings());
    pair.client(ALPHA, "db").write(0, &[1; 1 << 20], false).expect("a write");
    pair.kill(ALPHA);
    pair.kill(BETA);
    lose_power(&pair, ALPHA);
    pair.up(ALPHA);
    let status = pair.wait_status(ALPHA, "db", "up", |_| true);
    assert_eq!(status.disk_state, "Outdated");
    assert!(status.advice.is_some_and(|advice| advice.contains("lost power")));
    let said = refusal(&pair, ALPHA, &["promote", "db"]);
    assert!(said.contains("Outdated") && said.contains("--force"), "{said}");
    pair.cli_ok(ALPHA, &["promote", "db", "--force"]);
    pair.client(ALPHA, "db").write(0, &[2; 4096], false).expect("it serves what it has");
    pair.up(BETA);
    pair.wait_in_sync("db");
    assert_eq!(pair.primary("db"), ALPHA);
    pair.settle_and_compare("db");
}

#[test]
fn a_clean_restart_of_both_needs_no_copy() {
    let mut pair = Pair::start(settings());
    pair.client(ALPHA, "db").write(0, &[3; 1 << 20], false).expect("a write");
    let generation = |pair: &Pair| pair.status(ALPHA, "db").expect("a status").generation;
    let before = generation(&pair);
    pair.stop(ALPHA);
    pair.stop(BETA);
    pair.compare("db");
    pair.up(ALPHA);
    pair.up(BETA);
    pair.wait_in_sync("db");
    assert_eq!(pair.primary("db"), ALPHA);
    assert_eq!(generation(&pair), before, "the same lineage");
    assert!(!pair.log(ALPHA).contains("copying to"), "{}", pair.log(ALPHA));
    pair.settle_and_compare("db");
}

#[test]
fn split_brain_is_found_and_neither_disk_touched() {
    let pair = Pair::start(settings());
    pair.client(ALPHA, "db").write(0, &[4; 1 << 20], true).expect("a common past");
    pair.cli_ok(ALPHA, &["disconnect", "db"]);
    pair.wait_status(BETA, "db", "apart", |status| status.peer_state == "Unknown");
    pair.promote(BETA, "db");
    for (node, byte) in [(ALPHA, 5), (BETA, 6)] {
        pair.client(node, "db").write(2 << 20, &[byte; 4096], true).expect("each goes on without the other");
    }
    let disks = || [ALPHA, BETA].map(|node| std::fs::read(pair.disk(node, "db")).expect("a disk"));
    let before = disks();

    pair.tell(ALPHA, "db", Command::Connect { discard_my_data: false }).expect("a connect");
    for node in [ALPHA, BETA] {
        let status = pair.wait_status(node, "db", "split brain", |status| {
            status.advice.as_ref().is_some_and(|advice| advice.contains("split brain"))
        });
        assert_eq!(status.connection, "standalone");
        assert_eq!(status.role, "primary", "each still serves its own clients");
        pair.wait_log(node, &["split brain"]);
    }
    std::thread::sleep(Duration::from_secs(1));
    assert!(disks() == before, "a disk was changed");
    for (node, byte) in [(ALPHA, 5), (BETA, 6)] {
        let mut found = [0; 4096];
        pair.client(node, "db").read(2 << 20, &mut found).expect("a read");
        assert_eq!(found, [byte; 4096]);
    }

    // The operator decides for alpha's side.
    let refused = pair.cli(BETA, &["connect", "db", "--discard-my-data"]);
    assert!(!refused.status.success(), "it serves");
    pair.cli_ok(BETA, &["demote", "db"]);
    pair.cli_ok(BETA, &["connect", "db", "--discard-my-data"]);
    pair.cli_ok(ALPHA, &["connect", "db"]);
    pair.wait_in_sync("db");
    assert_eq!(pair.primary("db"), ALPHA);
    pair.settle_and_compare("db");
    let mut found = [0; 4096];
    pair.client(ALPHA, "db").read(2 << 20, &mut found).expect("a read");
    assert_eq!(found, [5; 4096], "the side that was kept");
}

#[test]
fn an_invalidated_standby_is_copied_whole() {
    let pair = Pair::start(settings());
    pair.client(ALPHA, "db").write(0, &[7; 1 << 20], true).expect("a write");
    assert!(!pair.cli(ALPHA, &["invalidate", "db"]).status.success(), "it serves");
    pair.cli_ok(BETA, &["invalidate", "db"]);
    pair.wait_log(ALPHA, &["copying to"]);
    pair.wait_in_sync("db");
    pair.settle_and_compare("db");
}

#[test]
fn a_half_copied_standby_is_not_promoted() {
    let mut settings = settings();
    settings.proxied = true;
    let mut pair = Pair::start(settings);
    pair.kill(BETA);
    let data = Rng::new(3).bytes(8 << 20);
    pair.client(ALPHA, "db").write(0, &data, true).expect("a write without the peer");
    // 8 MiB in pieces of at most 64 KiB take more than two seconds now.
    pair.proxy().delay(Duration::from_millis(20));
    pair.up(BETA);
    pair.wait_status(BETA, "db", "being copied to", |status| status.connection == "sync-target");
    pair.kill(ALPHA);
    let status = pair.wait_status(BETA, "db", "apart", |status| status.peer_state == "Unknown");
    assert_eq!(status.disk_state, "Inconsistent", "the copy was cut short");
    let said = refusal(&pair, BETA, &["promote", "db"]);
    assert!(said.contains("Inconsistent") && said.contains("--force"), "{said}");
    assert!(pair.connect(BETA, "db").is_err(), "half a copy is not served");

    pair.proxy().delay(Duration::ZERO);
    pair.up(ALPHA);
    pair.wait_in_sync("db");
    assert_eq!(pair.primary("db"), ALPHA);
    pair.settle_and_compare("db");
}
