//! The disk of a primary fails under its clients: the peer's takes its place, and they see no more than a pause. Then
//! everything that can follow: the planned move, the peer's loss, a restart, and the way back with a new disk.

use costandby_control::admin::{Command, VolumeStatus};
use costandby_datapath::front::nbd::proto::NbdErrno;
use costandby_tests::ledger::{Ledger, Writing};
use costandby_tests::pair::{ALPHA, BETA, LIMIT, Pair, Settings, VolumeSettings};
use costandby_tests::wait_for;

const SIZE_MIB: u64 = 16;

fn start(ack: &'static str) -> Pair {
    let mut db = VolumeSettings::new("db", SIZE_MIB);
    db.ack = ack;
    Pair::start(Settings::new(&[db, VolumeSettings::new("web", SIZE_MIB)]))
}

fn resize(pair: &Pair, mib: u64) {
    let file = std::fs::File::options().write(true).open(pair.disk(ALPHA, "db")).expect("a disk");
    file.set_len(mib << 20).expect("a disk can be cut short and grow");
}

fn wait_diskless(pair: &Pair) {
    let status = pair.wait_status(ALPHA, "db", "diskless", |status| status.disk_state == "Diskless");
    assert_eq!((status.role.as_str(), status.peer_state.as_str()), ("primary", "UpToDate"));
    assert!(status.advice.is_some_and(|advice| advice.contains(" demote db`")), "what to do");
    let there = pair.wait_status(BETA, "db", "standing in", |status| status.peer_state == "Diskless");
    assert_eq!((there.role.as_str(), there.disk_state.as_str()), ("standby", "UpToDate"));
}

/// A pair whose primary lost its disk while nothing was under way on the lost pages.
fn without_disk(ack: &'static str) -> Pair {
    let pair = start(ack);
    let mut client = pair.client(ALPHA, "db");
    client.write(8 << 20, &[0x55; 1 << 20], false).expect("a write before");
    resize(&pair, 1);
    let mut found = vec![0; 2 << 20];
    client.read(8 << 20, &mut found).expect("what was written is read from the peer");
    assert!(found[..1 << 20] == [0x55; 1 << 20] && found[1 << 20..].iter().all(|byte| *byte == 0));
    wait_diskless(&pair);
    client.write_zeroes(8 << 20, 1 << 20, false, false).expect("as new");
    pair
}

fn some_more(writing: &Writing) {
    let before = writing.acked();
    wait_for("the writers go on", LIMIT, || (writing.acked() > before + 100).then_some(()));
}

/// Beta serves, and holds what the ledger says.
fn check_on_beta(pair: &Pair, ledger: &mut Ledger) {
    ledger.check(&mut pair.client(BETA, "db")).unwrap_or_else(|lost| panic!("on beta: {lost}"));
}

#[test]
fn clients_of_a_primary_that_loses_its_disk_read_and_write_on() {
    for ack in ["memory", "durable"] {
        let pair = without_disk(ack);
        let mut client = pair.client(ALPHA, "db");
        client.write(8 << 20, &[0x55; 1 << 20], false).expect("a write");
        client.write((9 << 20) + 512, &[0x66; 70_000], true).expect("a write beyond the file's end");
        client.write_zeroes(8 << 20, 4096, false, false).expect("zeroes");
        client.trim(12 << 20, 1 << 20, false).expect("a trim");
        client.flush().expect("a flush");
        let mut found = vec![0; 3 << 20];
        client.read(7 << 20, &mut found).expect("a read across all of it");
        let mut expected = vec![0; 3 << 20];
        expected[(1 << 20) + 4096..2 << 20].fill(0x55);
        expected[(2 << 20) + 512..(2 << 20) + 512 + 70_000].fill(0x66);
        assert!(found == expected, "{ack}");
        let mut web = pair.client(ALPHA, "web");
        web.write(0, &[1; 4096], true).expect("the other volume does not notice");
    }
}

#[test]
fn writers_under_way_go_on_and_the_volume_moves_to_the_disk_and_back() {
    let mut pair = without_disk("memory");
    let writing = Ledger::new(SIZE_MIB << 20).write(&pair.uri(ALPHA, "db"), 11);
    some_more(&writing);
    let mut ledger = writing.finish_ok();
    ledger.check(&mut pair.client(ALPHA, "db")).unwrap_or_else(|lost| panic!("through alpha: {lost}"));

    for (node, command) in
        [(ALPHA, Command::Disconnect), (BETA, Command::Disconnect), (BETA, Command::Invalidate)]
    {
        let error = pair.tell(node, "db", command).expect_err("the only copy is kept");
        assert!(error.to_string().contains("demote"), "{error}");
    }
    pair.tell(ALPHA, "db", Command::Demote).expect("demoted");
    pair.wait_status(BETA, "db", "apart", |status| status.peer_state == "Unknown");
    pair.promote(BETA, "db");
    check_on_beta(&pair, &mut ledger);

    pair.stop(ALPHA);
    resize(&pair, SIZE_MIB);
    pair.cli_ok(ALPHA, &["create", "db", "--force"]);
    pair.up(ALPHA);
    pair.wait_in_sync("db");
    pair.compare("db");
    check_on_beta(&pair, &mut ledger);
}

#[test]
fn a_disk_that_fails_under_load_costs_no_acknowledged_write() {
    let pair = start("memory");
    let writing = Ledger::new(SIZE_MIB << 20).write(&pair.uri(ALPHA, "db"), 12);
    some_more(&writing);
    resize(&pair, 1);
    pair.wait_status(ALPHA, "db", "without its disk", |status| status.disk_state != "UpToDate");
    let (ledger, error) = {
        if pair.status(ALPHA, "db").expect("a status").disk_state == "Diskless" {
            std::thread::sleep(std::time::Duration::from_millis(300));
        }
        writing.finish()
    };
    // Only a payload that stood on a lost page and nowhere else.
    assert!(error.as_ref().is_none_or(|error| error.errno() == Some(NbdErrno::Io)), "{error:?}");
    wait_diskless(&pair);
    let writing = ledger.write(&pair.uri(ALPHA, "db"), 13);
    some_more(&writing);
    let mut ledger = writing.finish_ok();
    ledger.check(&mut pair.client(ALPHA, "db")).unwrap_or_else(|lost| panic!("through alpha: {lost}"));
    pair.tell(ALPHA, "db", Command::Demote).expect("demoted");
    pair.wait_status(BETA, "db", "apart", |status| status.peer_state == "Unknown");
    pair.promote(BETA, "db");
    check_on_beta(&pair, &mut ledger);
}

#[test]
fn a_primary_without_a_disk_that_is_killed_comes_back_as_what_is_behind() {
    let mut pair = without_disk("memory");
    let writing = Ledger::new(SIZE_MIB << 20).write(&pair.uri(ALPHA, "db"), 14);
    some_more(&writing);
    pair.kill(ALPHA);
    let (mut ledger, _) = writing.finish();
    // The disk works again, and holds what it held before all of that.
    resize(&pair, SIZE_MIB);
    pair.up(ALPHA);
    let status = pair.wait_status(ALPHA, "db", "copied to", VolumeStatus::in_sync);
    assert_eq!(status.role, "standby", "it serves only what it has");
    pair.promote(BETA, "db");
    pair.settle_and_compare("db");
    check_on_beta(&pair, &mut ledger);
}

#[test]
fn without_disk_and_peer_clients_get_errors_and_the_peer_takes_over() {
    let mut pair = without_disk("memory");
    let writing = Ledger::new(SIZE_MIB << 20).write(&pair.uri(ALPHA, "db"), 15);
    some_more(&writing);
    pair.kill(BETA);
    let status = pair.wait_status(ALPHA, "db", "failed", |status| status.disk_state == "Failed");
    assert_eq!(status.role, "standby");
    pair.assert_alive(ALPHA);
    let (mut ledger, error) = writing.finish();
    assert!(error.is_some(), "there was nothing left to serve from");
    pair.up(BETA);
    // Killed while it applied: whether its last write is whole is for an operator to say, as with any such standby.
    let command = Command::Promote { force: true };
    wait_for("beta serves", LIMIT, || pair.tell(BETA, "db", command).ok());
    check_on_beta(&pair, &mut ledger);
    pair.client(ALPHA, "web").write(0, &[1; 4096], true).expect("the other volume is served");
}
