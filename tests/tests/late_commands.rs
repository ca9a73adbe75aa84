//! Commands that come too early or too late: a handover over a slow link, a demotion in mid-copy, and commands whose caller
//! gave up before a daemon that stood still could begin.

use costandby_tests::pair::{ALPHA, BETA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::process::{run, system_command};
use costandby_tests::wait_for;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

fn settings() -> Settings {
    let mut settings = Settings::new(&[VolumeSettings::new("db", 8)]);
    settings.peer_timeout = "3s";
    settings
}

fn signal(pair: &Pair, node: usize, signal: &str) {
    let _ = run(system_command("kill").args([signal, &pair.pid(node).to_string()])).ok();
}

fn post(pair: &Pair, node: usize, command: &str, header: &str) -> UnixStream {
    let mut stream = UnixStream::connect(pair.path(&format!("{}.sock", NODES[node]))).expect("connects");
    let request = format!(
        "POST /v1/volumes/db/{command} HTTP/1.1\r\nhost: costandby\r\nconnection: close\r\n{header}content-length: 0\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).expect("sent");
    stream
}

#[test]
fn a_promotion_right_after_a_demotion_is_granted_over_a_slow_link() {
    let mut settings = settings();
    settings.proxied = true;
    let pair = Pair::start(settings);
    pair.proxy().delay(Duration::from_millis(100));
    let mut serving = ALPHA;
    for _ in 0..4 {
        pair.cli_ok(serving, &["demote", "db"]);
        serving = 1 - serving;
        pair.cli_ok(serving, &["promote", "db"]);
    }
    pair.proxy().delay(Duration::ZERO);
    pair.settle_and_compare("db");
}

#[test]
fn a_command_whose_caller_is_gone_is_not_carried_out() {
    let mut pair = Pair::start(settings());
    // Beta stands still while its operator asks for a promotion, waits, and gives up.
    pair.kill(ALPHA);
    pair.wait_status(BETA, "db", "alone", |status| status.connection == "connecting");
    signal(&pair, BETA, "-STOP");
    let caller = post(&pair, BETA, "promote", "");
    std::thread::sleep(Duration::from_millis(200));
    drop(caller);
    signal(&pair, BETA, "-CONT");
    pair.wait_log(BETA, &["asked for promote, which is refused: volume db: not carried out", "hung up"]);
    assert_eq!(pair.status(BETA, "db").expect("answers").role, "standby");

    let mut late = post(&pair, BETA, "promote", "costandby-deadline: 1\r\n");
    let mut answer = String::new();
    late.read_to_string(&mut answer).expect("an answer");
    assert!(answer.contains("409") && answer.contains("its deadline had passed"), "{answer}");
    assert_eq!(pair.status(BETA, "db").expect("answers").role, "standby");
    pair.cli_ok(BETA, &["promote", "db"]);
}

#[test]
fn a_primary_in_mid_copy_is_not_demoted() {
    let mut settings = Settings::new(&[VolumeSettings::new("db", 256)]);
    settings.proxied = true;
    let mut pair = Pair::start(settings);
    pair.kill(BETA);
    let mut client = pair.client(ALPHA, "db");
    let data = vec![9; 1 << 20];
    for at in 0..200 {
        client.write(at << 20, &data, false).expect("written");
    }
    // A copy of 200 MiB takes longer than a command over a link this slow.
    pair.proxy().delay(Duration::from_millis(30));
    pair.up(BETA);
    wait_for("a copy", LIMIT, || {
        pair.status(ALPHA, "db").filter(|status| status.connection == "sync-source")
    });
    let said = pair.cli(ALPHA, &["demote", "db"]).stderr;
    assert!(said.contains("beta is being copied to") && said.contains("wait-sync db"), "{said}");
    client.write(0, &data, true).expect("it still serves");
    pair.proxy().delay(Duration::ZERO);
    pair.cli_ok(ALPHA, &["wait-sync", "db"]);
    pair.hand_over("db", ALPHA);
}
