//! Links that break in the middle of something that takes long: a handover, a copy, the end of a daemon.

use costandby_tests::pair::{ALPHA, BETA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::{Rng, seed, wait_for};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const BLOCK_LEN: usize = 4096;

/// How long the link of a copy is up each time, and then down.
const UP: Duration = Duration::from_millis(1300);
const DOWN: Duration = Duration::from_millis(700);

/// What the proxy adds for every 64 KiB: a copy goes at less than 32 MiB a second, and the link breaks several times in it.
const DELAY: Duration = Duration::from_millis(2);

fn pair(size_mib: u64, peer_timeout: &'static str) -> Pair {
    let mut settings = Settings::new(&[VolumeSettings::new("db", size_mib)]);
    settings.proxied = true;
    settings.peer_timeout = peer_timeout;
    Pair::start(settings)
}

/// Writes 4 KiB at a time at random in the first so many MiB, until told to stop or until the node does not serve any more; how many.
fn writer(pair: &Pair, node: usize, size_mib: u64, stop: &Arc<AtomicBool>) -> JoinHandle<u64> {
    let (mut client, stop) = (pair.client(node, "db"), Arc::clone(stop));
    let mut rng = Rng::new(seed());
    std::thread::spawn(move || {
        let mut written = 0;
        while !stop.load(Ordering::SeqCst) {
            let offset = rng.below((size_mib << 20) / BLOCK_LEN as u64) * BLOCK_LEN as u64;
            if client.write(offset, &rng.bytes(BLOCK_LEN), rng.below(64) == 0).is_err() {
                break;
            }
            written += 1;
            std::thread::sleep(Duration::from_micros(500));
        }
        written
    })
}

#[test]
fn a_handover_over_a_slow_link_that_is_reset_in_the_middle_is_granted() {
    let pair = pair(8, "3s");
    let mut rng = Rng::new(seed());
    let mut serving = ALPHA;
    for round in 0..8 {
        let stop = Arc::new(AtomicBool::new(false));
        let writer = writer(&pair, serving, 8, &stop);
        std::thread::sleep(Duration::from_millis(100));
        pair.proxy().delay(Duration::from_millis(100));
        let demoted = std::thread::scope(|scope| {
            let demoting = scope.spawn(|| pair.cli(serving, &["demote", "db"]));
            std::thread::sleep(Duration::from_millis(rng.below(300)));
            pair.proxy().cut();
            demoting.join().expect("it ran").ok().stdout
        });
        assert!(!demoted.contains("not known") && !demoted.contains("lacks"), "round {round}: {demoted}");
        serving = 1 - serving;
        pair.cli_ok(serving, &["promote", "db"]);
        pair.proxy().delay(Duration::ZERO);
        pair.wait_in_sync("db");
        stop.store(true, Ordering::SeqCst);
        writer.join().expect("a writer");
    }
    for node in [ALPHA, BETA] {
        let log = pair.log(node);
        assert!(!log.contains("copying to") && !log.contains("going on without"), "{}: {log}", NODES[node]);
    }
    pair.settle_and_compare("db");
}

/// A copy of everything while the link comes and goes, with or without clients.
fn copy_over_a_link_that_flaps(clients: bool, peer_timeout: &'static str) {
    let size_mib: u64 =
        std::env::var("COSTANDBY_FLAP_MIB").map_or(96, |mib| mib.parse().expect("a number of MiB"));
    let pair = pair(size_mib, peer_timeout);
    let (refuse, size) = (|on| pair.proxy().refuse(on), size_mib << 20);
    refuse(true);
    pair.proxy().cut();
    let mut client = pair.client(ALPHA, "db");
    let mut rng = Rng::new(seed());
    for at in (0..size).step_by(1 << 20) {
        client.write(at, &rng.bytes(1 << 20), false).expect("acknowledged alone");
    }
    pair.proxy().delay(DELAY);
    let stop = Arc::new(AtomicBool::new(false));
    let writer = clients.then(|| writer(&pair, ALPHA, 2, &stop));
    let (before, began) = (pair.proxy().carried(), Instant::now());
    let mut left = vec![size];
    while left.len() < 40 {
        refuse(false);
        std::thread::sleep(UP);
        if pair.status(ALPHA, "db").is_some_and(|status| status.in_sync()) {
            break;
        }
        refuse(true);
        pair.proxy().cut();
        std::thread::sleep(DOWN);
        left.push(pair.status(ALPHA, "db").expect("it answers").dirty_bytes);
    }
    let took = began.elapsed();
    refuse(false);
    stop.store(true, Ordering::SeqCst);
    let written = writer.map_or(0, |writer| writer.join().expect("a writer"));
    pair.wait_in_sync("db");
    let carried = pair.proxy().carried() - before;
    println!(
        "{size_mib} MiB over a link that broke {} times, in {took:?}: {carried} bytes sent, {:.3} of the size; {written} writes beside; \
         left: {:?} MiB",
        left.len() - 1,
        carried as f64 / size as f64,
        left.iter().map(|bytes| bytes >> 20).collect::<Vec<_>>()
    );
    assert!(left.len() > 3, "the link did not break often enough to show anything");
    // What the first time brought may stand in no flush yet.
    for (n, pair) in left.windows(2).enumerate().skip(1) {
        assert!(pair[1] < pair[0], "no progress in the {n}th time that the link was up: {left:?}");
    }
    // What clients write may have to be copied again each time that their node went on alone.
    let beside = written * 2 * BLOCK_LEN as u64 + left.len() as u64 * (2 << 20);
    assert!(carried < size * 12 / 10 + beside, "{carried} bytes for {size}");
    pair.proxy().delay(Duration::ZERO);
    pair.settle_and_compare("db");
}

#[test]
fn a_copy_makes_progress_each_time_the_link_is_up() {
    copy_over_a_link_that_flaps(false, "1s");
}

#[test]
fn a_copy_makes_progress_beside_clients_that_do_not_wait_for_the_link() {
    copy_over_a_link_that_flaps(true, "500ms");
}

#[test]
fn a_primary_whose_link_just_broke_ends_or_is_demoted_within_the_peers_time() {
    for ends in [true, false] {
        let mut pair = pair(8, "1s");
        let mut client = pair.client(ALPHA, "db");
        for block in 0..64 {
            client.write(block * (64 << 10), &[7; BLOCK_LEN], false).expect("mirrored");
        }
        pair.proxy().refuse(true);
        pair.proxy().cut();
        wait_for("alpha knows", LIMIT, || {
            pair.status(ALPHA, "db").filter(|alpha| alpha.connection == "connecting").map(drop)
        });
        let began = Instant::now();
        if ends {
            pair.stop(ALPHA);
        } else {
            let said = pair.cli_ok(ALPHA, &["demote", "db"]);
            assert!(said.contains("beta lacks what was written here"), "{said}");
        }
        let took = began.elapsed();
        assert!(took < Duration::from_secs(8), "{took:?}, where the peer's time is 1 s");
        pair.proxy().refuse(false);
        if ends {
            pair.up(ALPHA);
        }
        pair.wait_in_sync("db");
        if !ends {
            pair.promote(ALPHA, "db");
        }
        let mut found = vec![0; BLOCK_LEN];
        pair.client(ALPHA, "db").read(63 * (64 << 10), &mut found).expect("served");
        assert_eq!(found, [7; BLOCK_LEN]);
        pair.settle_and_compare("db");
    }
}
