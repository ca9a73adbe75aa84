//! A standby whose program is held up while its host answers: waited for, so that a slow disk costs no copy of the whole
//! volume, but not for ever.

use costandby_tests::pair::{ALPHA, BETA, Pair, Settings, VolumeSettings};
use rustix::process::{Pid, Signal, kill_process};
use std::time::{Duration, Instant};

/// `peer_timeout`, and what is added to it for a machine that is busy with other things.
const PEER_TIMEOUT: Duration = Duration::from_millis(300);
const SLACK: Duration = Duration::from_secs(20);

fn pair() -> Pair {
    let mut settings = Settings::new(&[VolumeSettings::new("db", 12)]);
    settings.peer_timeout = "300ms";
    let pair = Pair::start(settings);
    // A peer that has answered nothing in a session yet is given less time.
    pair.client(ALPHA, "db").write(8192, &[1; 4096], false).expect("a write on both");
    pair
}

fn signal(pair: &Pair, node: usize, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pair.pid(node)).expect("a pid")).expect("not zero");
    kill_process(pid, signal).expect("our own process");
}

#[test]
fn a_standby_held_up_for_a_while_is_not_given_up() {
    let pair = pair();
    let before = pair.status(ALPHA, "db").expect("a status").generation;
    signal(&pair, BETA, Signal::STOP);
    std::thread::sleep(PEER_TIMEOUT * 4);
    let while_held = pair.status(ALPHA, "db").expect("a status");
    signal(&pair, BETA, Signal::CONT);
    assert_eq!(while_held.connection, "connected", "four timeouts long");
    let mut client = pair.client(ALPHA, "db");
    client.write(4096, &[7; 4096], true).expect("a durable write on both");
    let after = pair.status(ALPHA, "db").expect("a status");
    assert_eq!(
        (after.connection.as_str(), after.generation),
        ("connected", before),
        "the same session, no copy"
    );
    pair.settle_and_compare("db");
}

#[test]
fn a_standby_held_up_for_good_is_given_up() {
    let pair = pair();
    signal(&pair, BETA, Signal::STOP);
    let since = Instant::now();
    let mut client = pair.client(ALPHA, "db");
    client.write(0, &[9; 4096], false).expect("acknowledged alone, in the end");
    let waited = since.elapsed();
    assert!(waited > PEER_TIMEOUT * 4, "given up after {waited:?}");
    assert!(waited < PEER_TIMEOUT * 10 + SLACK, "waited {waited:?}");
    signal(&pair, BETA, Signal::CONT);
    pair.wait_in_sync("db");
    pair.settle_and_compare("db");
}
