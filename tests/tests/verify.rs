//! Verification of two running daemons' disks: bytes that something else changed on the standby are found under load,
//! marked, and repaired.

use costandby_control::admin::VerifyStatus;
use costandby_tests::ledger::Ledger;
use costandby_tests::pair::{ALPHA, BETA, Pair, Settings, VolumeSettings};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

const SIZE_MIB: u64 = 24;
/// Clients write below, the test changes bytes above.
const CLIENTS_MIB: u64 = 4;
const GRAIN: u64 = 64 << 10;

fn settings() -> Settings {
    Settings::new(&[VolumeSettings::new("db", SIZE_MIB)])
}

/// Changes bytes on a node's disk behind its daemon's back.
fn flip(pair: &Pair, node: usize, at: u64) {
    let disk = File::options().read(true).write(true).open(pair.disk(node, "db")).expect("a disk");
    let mut byte = [0];
    disk.read_exact_at(&mut byte, at).expect("a byte");
    disk.write_all_at(&[byte[0] ^ 0x40], at).expect("a byte");
}

fn verify(pair: &Pair, args: &[&str]) -> (Option<i32>, String, String) {
    let ran = pair.cli(ALPHA, &[&["verify", "db"], args].concat());
    (ran.status.code(), ran.stdout, ran.stderr)
}

fn found(pair: &Pair) -> VerifyStatus {
    pair.status(ALPHA, "db").expect("a status").verify.expect("a verification")
}

#[test]
fn what_changed_on_the_standby_is_found_and_repaired_under_load() {
    let pair = Pair::start(settings());
    let before = pair.client(ALPHA, "db");
    let writing = Ledger::new(CLIENTS_MIB << 20).write(&pair.uri(ALPHA, "db"), 1);
    let (status, out, err) = verify(&pair, &[]);
    assert_eq!((status, out.trim()), (Some(0), "volume db: both disks hold the same"), "{err}");

    let at = [10 << 20, (10 << 20) + GRAIN + 7, (24 << 20) - 1];
    for at in at {
        flip(&pair, BETA, at);
    }
    let (status, out, err) = verify(&pair, &[]);
    assert_eq!(status, Some(1), "{out}{err}");
    assert_eq!(err.lines().count(), 1, "{err}");
    assert!(err.contains("192 KiB in 2 ranges") && err.contains("--repair"), "{err}");
    let expected = [[10 << 20, 2 * GRAIN], [(24 << 20) - GRAIN, GRAIN]];
    assert_eq!(found(&pair).ranges, expected);
    assert!(out.contains("differs: bytes 10485760 to 10616831"), "{out}");
    let marked = pair.status(ALPHA, "db").expect("a status");
    assert!(marked.dirty_bytes >= 3 * GRAIN, "{} bytes marked", marked.dirty_bytes);
    assert!(marked.advice.expect("advice").contains("--repair"));
    pair.wait_log(ALPHA, &["bytes 10485760 to 10616831 differ"]);
    let ran = pair.cli(ALPHA, &["demote", "db"]);
    assert!(ran.stderr.contains("--repair"), "the standby would serve what differs: {}", ran.stderr);

    let (status, out, err) = verify(&pair, &["--repair"]);
    assert_eq!(status, Some(0), "{out}{err}");
    assert!(out.contains("192 KiB in 2 ranges differed, and were copied"), "{out}");
    let (status, out, _) = verify(&pair, &["--json"]);
    assert_eq!(status, Some(0));
    let told: VerifyStatus = serde_json::from_str(&out).expect("JSON");
    assert!(
        told.id == 4
            && !told.running
            && told.differing_bytes == 0
            && told.unfinished.is_none()
            && told.percent >= 100.0,
        "{told:?}"
    );
    assert!(writing.acked() > 0, "the client was at work");
    let mut ledger = writing.finish_ok();
    drop(before);
    ledger.check(&mut pair.client(ALPHA, "db")).unwrap_or_else(|lost| panic!("{lost}"));
    pair.settle_and_compare("db");
}

#[test]
fn what_is_not_repaired_is_copied_by_the_next_session() {
    let pair = Pair::start(settings());
    pair.client(ALPHA, "db").write(5 << 20, &[3; 70_000], true).expect("a write");
    flip(&pair, BETA, 5 << 20);
    let (status, out, err) = verify(&pair, &[]);
    assert_eq!(status, Some(1), "{out}{err}");
    pair.cli_ok(ALPHA, &["disconnect", "db"]);
    pair.wait_status(ALPHA, "db", "apart", |status| status.connection == "standalone");
    pair.cli_ok(ALPHA, &["connect", "db"]);
    pair.wait_in_sync("db");
    pair.settle_and_compare("db");
}

#[test]
fn verification_is_refused_where_it_would_mean_nothing() {
    let mut pair = Pair::start(settings());
    let ran = pair.cli(BETA, &["verify", "db"]);
    assert_eq!(ran.status.code(), Some(1));
    assert!(ran.stderr.contains("beta does not serve"), "{}", ran.stderr);
    let ran = pair.cli(ALPHA, &["verify", "db", "--stop"]);
    assert!(ran.stderr.contains("no verification"), "{}", ran.stderr);
    pair.kill(BETA);
    pair.wait_status(ALPHA, "db", "alone", |status| status.connection == "connecting");
    let (status, _, err) = verify(&pair, &[]);
    assert_eq!(status, Some(1));
    assert!(err.contains("not connected to beta"), "{err}");
}

#[test]
fn a_copy_that_compares_first_ends_with_equal_disks() {
    let mut settings = settings();
    settings.volumes[0].checksum_first = true;
    let mut pair = Pair::start(settings);
    let writing = Ledger::new(CLIENTS_MIB << 20).write(&pair.uri(ALPHA, "db"), 3);
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(300));
        pair.kill(BETA);
        std::thread::sleep(Duration::from_millis(300));
        pair.up(BETA);
        pair.wait_in_sync("db");
    }
    let mut ledger = writing.finish_ok();
    ledger.check(&mut pair.client(ALPHA, "db")).unwrap_or_else(|lost| panic!("{lost}"));
    pair.cli_ok(ALPHA, &["verify", "db", "--repair"]);
    pair.settle_and_compare("db");
}
