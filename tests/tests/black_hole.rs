//! A path that carries small packets and swallows large ones, as where the MTU of one hop is less than that of the ends and
//! nobody says so: sessions begin on it, and stand still at the first write. Two name spaces and a rule that drops; skipped,
//! aloud, where those cannot be made.

use costandby_tests::cable::Cable;
use costandby_tests::pair::{ALPHA, BETA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::{Rng, seed, wait_for};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const SIZE_MIB: u64 = 16;

/// Of 1500 that the cable carries.
const PACKET_LEN_MAX: u32 = 1400;

/// How long the path is ill: without a pause, dozens of sessions that stand still would fit.
const ILL: Duration = Duration::from_secs(32);

/// What the log says of it.
const SAID: &str = "small messages pass and large ones do not";

/// Writes, small ones and large ones, until told to stop: when each began, since when, and how long it took.
fn write(pair: &Pair, node: usize, stop: &Arc<AtomicBool>) -> JoinHandle<Vec<(Instant, Duration)>> {
    let (mut client, stop) = (pair.client(node, "db"), Arc::clone(stop));
    let mut rng = Rng::new(seed());
    std::thread::spawn(move || {
        let mut took = Vec::new();
        while !stop.load(Ordering::SeqCst) {
            let len = if rng.below(4) == 0 { 4096 } else { 512 };
            let data = rng.bytes(len);
            let offset = rng.below((SIZE_MIB << 20) / 4096) * 4096;
            let began = Instant::now();
            client.write(offset, &data, false).expect("a write is answered, with the peer or without");
            took.push((began, began.elapsed()));
            std::thread::sleep(Duration::from_millis(5));
        }
        took
    })
}

/// The path falls ill under load of `serving`'s clients and is well again. The dialer is alpha in any case.
fn fall_into_a_hole(serving: usize) {
    let Some(cable) = Cable::lay() else { return };
    let mut settings = Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]);
    settings.namespaces = Some(cable.namespaces());
    settings.peer_timeout = "300ms";
    let pair = Pair::start(settings);
    if serving == BETA {
        pair.hand_over("db", ALPHA);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let writer = write(&pair, serving, &stop);
    std::thread::sleep(Duration::from_secs(1));
    let (other, lost) = (NODES[1 - serving], |log: &str| log.matches("lost ").count());
    assert_eq!(lost(&pair.log(serving)), 0);
    if !cable.swallow_longer_than(PACKET_LEN_MAX) {
        stop.store(true, Ordering::SeqCst);
        writer.join().expect("a writer");
        return;
    }
    let ill = Instant::now();
    std::thread::sleep(ILL);
    let log = pair.log(serving);
    let sessions = lost(&log);
    assert!((3..=6).contains(&sessions), "{sessions} sessions with {other} in {ILL:?}: {log}");
    let said = [ALPHA, BETA].map(|node| pair.log(node).matches(SAID).count());
    assert_eq!(said, [1, 0], "once, by whoever dials");

    // The dialer pauses by now, for longer than this takes.
    cable.swallow_nothing();
    let mended = Instant::now();
    wait_for("an operator's connect ends the pause", LIMIT, || {
        pair.cli_ok(BETA, &["connect", "db"]);
        pair.cli_ok(ALPHA, &["connect", "db"]);
        pair.status(serving, "db").filter(|status| status.connection != "connecting").map(drop)
    });
    assert!(mended.elapsed() < Duration::from_secs(4), "{:?}", mended.elapsed());
    pair.wait_in_sync("db");
    stop.store(true, Ordering::SeqCst);
    let took = writer.join().expect("a writer");
    let held: Duration = took
        .iter()
        .filter(|(began, took)| *began > ill && *began < ill + ILL && *took > Duration::from_millis(500))
        .map(|(_, took)| *took)
        .sum();
    println!("{sessions} sessions in {ILL:?}; writes were held up for {held:?} of it");
    assert!(held < ILL * 7 / 10, "{held:?}");
    pair.settle_and_compare("db");
    assert_eq!(pair.log(ALPHA).matches(SAID).count(), 1);
}

#[test]
fn a_path_that_swallows_large_packets_is_tried_ever_more_rarely() {
    fall_into_a_hole(ALPHA);
}

#[test]
fn a_path_that_swallows_large_packets_is_tried_ever_more_rarely_where_the_dialer_is_the_standby() {
    fall_into_a_hole(BETA);
}
