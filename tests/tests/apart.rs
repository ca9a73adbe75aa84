//! What two nodes without a session say, to operators and in their logs: why the peer is not connected, which command was
//! given, and that nobody waits for what will not come.

use costandby_control::admin::VolumeStatus;
use costandby_tests::pair::{ALPHA, BETA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::process::Guarded;
use costandby_tests::wait_for;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

fn settings() -> Settings {
    Settings::new(&[VolumeSettings::new("db", 8)])
}

fn wait_advice(pair: &Pair, node: usize, volume: &str, words: &str) -> VolumeStatus {
    pair.wait_status(node, volume, words, |status| {
        status.advice.as_ref().is_some_and(|advice| advice.contains(words))
    })
}

/// Lines of a node's log with all of `words`.
fn count(pair: &Pair, node: usize, words: &[&str]) -> usize {
    pair.log(node).lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
}

/// The line on stderr of a `wait-sync` that does not wait.
fn parted(pair: &Pair, node: usize, volume: &str) -> String {
    let began = Instant::now();
    let ran = pair.cli(node, &["wait-sync", volume]);
    assert_eq!(ran.status.code(), Some(1), "{}{}", ran.stdout, ran.stderr);
    assert!(began.elapsed() < Duration::from_secs(10), "it took {:?}", began.elapsed());
    assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    ran.stderr
}

/// A node's configuration without a volume.
fn forget(pair: &Pair, node: usize, volume: &str) {
    let text = fs::read_to_string(pair.config(node)).expect("a configuration");
    let (before, after) = text.split_once(&format!("[volumes.{volume}]")).expect("it has the volume");
    assert!(!after.contains("\n["), "the last table");
    fs::write(pair.config(node), before).expect("a configuration");
}

#[test]
fn an_unreachable_peer_is_named_with_the_reason_on_both_nodes_and_logged_once() {
    let mut pair = Pair::create(settings());
    for (node, peer) in [(ALPHA, BETA), (BETA, ALPHA)] {
        pair.up(node);
        let address = pair.peer_address(peer).to_string();
        let reason = format!("{} cannot be reached: connection refused by {address}", NODES[peer]);
        let status = wait_advice(&pair, node, "db", &reason);
        assert!(!status.parted, "it may come back by itself");
        // Several more attempts.
        std::thread::sleep(Duration::from_secs(5));
        assert_eq!(count(&pair, node, &["cannot be reached", &address]), 1, "{}", pair.log(node));
        let ran = pair.cli(node, &["wait-sync", "db", "--timeout", "3s"]);
        assert!(ran.stderr.contains("after 3s") && ran.stderr.contains(&address), "{}", ran.stderr);
        pair.up(peer);
        pair.wait_in_sync("db");
        let advice = pair.status(node, "db").expect("a status").advice;
        assert_eq!(advice, None, "it is over");
        pair.kill(peer);
        pair.kill(node);
    }
    assert_eq!(count(&pair, ALPHA, &["beta can be reached again"]), 1, "{}", pair.log(ALPHA));
}

#[test]
fn a_peer_that_does_not_know_the_volume_is_said_to_on_either_node() {
    let volumes = [VolumeSettings::new("db", 8), VolumeSettings::new("web", 8)];
    let mut pair = Pair::create(Settings::new(&volumes));
    for (node, peer) in [(ALPHA, BETA), (BETA, ALPHA)] {
        let good = fs::read_to_string(pair.config(peer)).expect("a configuration");
        forget(&pair, peer, "web");
        pair.up(peer);
        pair.up(node);
        pair.wait_in_sync("db");
        let name = NODES[peer];
        let reason = format!("{name} refuses a session: node {name} has no volume web");
        let status = wait_advice(&pair, node, "web", &reason);
        assert!(status.parted);
        let said = parted(&pair, node, "web");
        assert!(said.contains(&reason), "{said}");
        std::thread::sleep(Duration::from_secs(4));
        assert_eq!(count(&pair, node, &[&reason]), 1, "{}", pair.log(node));
        assert_eq!(count(&pair, peer, &["refused a connection", "web"]), 1, "{}", pair.log(peer));
        fs::write(pair.config(peer), good).expect("a configuration");
        pair.stop(peer);
        pair.up(peer);
        pair.wait_in_sync("web");
        assert_eq!(pair.status(node, "web").expect("a status").advice, None, "it is over");
        pair.stop(node);
        pair.stop(peer);
        for node in NODES {
            // Each node's turn has a log of its own.
            fs::remove_file(pair.path(&format!("{node}.log"))).expect("a log");
        }
    }
}

#[test]
fn every_operators_command_leaves_a_line_on_its_node() {
    let pair = Pair::start(settings());
    let refused = pair.cli(BETA, &["promote", "db"]);
    assert!(!refused.status.success());
    pair.wait_log(BETA, &["asked for promote, which is refused", "alpha is primary", "volume=\"db\""]);
    pair.cli_ok(ALPHA, &["demote", "db"]);
    pair.wait_log(ALPHA, &["INFO", "asked for demote: volume db: alpha is standby"]);
    pair.cli_ok(BETA, &["promote", "db"]);
    pair.wait_log(BETA, &["INFO", "asked for promote: volume db: beta is primary"]);
    pair.cli_ok(BETA, &["disconnect", "db"]);
    pair.wait_log(BETA, &["asked for disconnect"]);
    pair.cli_ok(BETA, &["connect", "db"]);
    pair.wait_log(BETA, &["asked for connect"]);
    pair.wait_in_sync("db");
    assert_eq!(count(&pair, ALPHA, &["asked for"]), 1, "only its own: {}", pair.log(ALPHA));
}

#[test]
fn nobody_waits_for_a_pair_that_stays_apart() {
    let pair = Pair::start(settings());
    // By the node that dials, and by the one that is dialled.
    for node in [ALPHA, BETA] {
        pair.cli_ok(node, &["disconnect", "db"]);
        let said = parted(&pair, node, "db");
        assert!(said.contains("an operator disconnected") && said.contains(" connect db`"), "{said}");
        let peer = 1 - node;
        let reason = format!("{} refuses a session: an operator disconnected", NODES[node]);
        wait_advice(&pair, peer, "db", &reason);
        let said = parted(&pair, peer, "db");
        assert!(said.contains(&reason), "{said}");
        pair.cli_ok(node, &["connect", "db"]);
        pair.cli_ok(node, &["wait-sync", "db", "--timeout", "20s"]);
        pair.cli_ok(peer, &["wait-sync", "db", "--timeout", "20s"]);
    }
    pair.cli_ok(ALPHA, &["disconnect", "db"]);
    pair.wait_status(BETA, "db", "apart", |status| status.peer_state == "Unknown");
    pair.promote(BETA, "db");
    for node in [ALPHA, BETA] {
        pair.client(node, "db").write(2 << 20, &[7; 4096], true).expect("each goes on without the other");
    }
    pair.cli_ok(ALPHA, &["connect", "db"]);
    for node in [ALPHA, BETA] {
        wait_advice(&pair, node, "db", "split brain");
        let said = parted(&pair, node, "db");
        assert!(said.contains("split brain"), "{said}");
    }
}

#[test]
fn a_file_in_the_place_of_a_socket_is_named_and_left_alone() {
    let pair = Pair::create(settings());
    let socket = pair.nbd_socket(ALPHA);
    fs::write(&socket, "precious").expect("a file");
    let path = pair.path("up.log");
    let log = File::create(&path).expect("a log");
    let mut command = pair.command(ALPHA);
    let _daemon = Guarded::spawn(command.arg("up").stdout(log.try_clone().expect("a log")).stderr(log));
    let named = format!("unix:{}", socket.display());
    wait_for("the file is named", LIMIT, || {
        let log = fs::read_to_string(&path).expect("a log");
        log.lines()
            .any(|line| line.contains(&named) && line.contains("no socket: move it away"))
            .then_some(())
    });
    assert_eq!(fs::read(&socket).expect("the file"), b"precious");
}

#[test]
fn sockets_and_metadata_are_for_nobody_else() {
    let pair = Pair::start(settings());
    let mode = |path: &std::path::Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    for node in [ALPHA, BETA] {
        assert_eq!(mode(&pair.nbd_socket(node)) & 0o007, 0, "an NBD socket");
        assert_eq!(mode(&pair.path(&format!("{}.sock", NODES[node]))), 0o600, "an admin socket");
        assert_eq!(mode(&pair.metadata(node, "db")), 0o600, "metadata");
        assert_eq!(mode(&pair.disk(node, "db")), 0o600, "a disk");
    }
}
