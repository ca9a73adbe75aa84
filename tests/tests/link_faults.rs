//! A hostile wire between the nodes: cut in mid-frame, held up, corrupted, slow. Whatever it does, the standby holds no
//! torn write, the primary goes on in bounded memory, and once the wire is well again both disks become equal.

use costandby_tests::ledger::Ledger;
use costandby_tests::pair::{ALPHA, BETA, LIMIT, Pair, Settings, VolumeSettings};
use costandby_tests::{Rng, seed, wait_for};
use std::time::Duration;

const SIZE_MIB: u64 = 12;

/// What a primary may take on top while its peer does not read. A queue that grew with the writes would hold hundreds of
/// MiB by the end of the test.
const EXTRA_MEMORY_MAX: u64 = 24 << 20;

fn pair() -> Pair {
    let mut settings = Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]);
    settings.proxied = true;
    Pair::start(settings)
}

fn check(pair: &Pair, ledger: &mut Ledger) {
    ledger.check(&mut pair.client(ALPHA, "db")).unwrap_or_else(|lost| panic!("on the primary: {lost}"));
}

/// Looks at the standby's disk while nothing reaches it.
fn assert_nothing_torn(pair: &Pair, ledger: &Ledger) {
    let disk = std::fs::read(pair.disk(BETA, "db")).expect("a disk");
    ledger.check_whole(&disk).unwrap_or_else(|torn| panic!("on the standby: {torn}"));
}

#[test]
fn a_connection_cut_in_mid_frame_leaves_no_torn_write() {
    let pair = pair();
    let mut rng = Rng::new(seed());
    let mut ledger = Ledger::new(SIZE_MIB << 20);
    for round in 0..6 {
        let writing = ledger.write(&pair.uri(ALPHA, "db"), rng.next_u64());
        std::thread::sleep(Duration::from_millis(50 + rng.below(100)));
        pair.proxy().refuse(true);
        // An odd number of bytes, and far smaller than a frame with 16 blocks: nearly always inside of one.
        pair.proxy().cut_after(u32::try_from(1 + rng.below(300_000)).expect("small"));
        wait_for("the cut is made", LIMIT, || pair.proxy().is_done().then_some(()));
        for node in [ALPHA, BETA] {
            pair.wait_status(node, "db", "apart", |status| status.connection == "connecting");
        }
        let before = writing.acked();
        wait_for("the primary goes on alone", LIMIT, || (writing.acked() > before + 20).then_some(()));
        if round % 2 == 0 {
            pair.proxy().refuse(false);
            pair.wait_in_sync("db");
            ledger = writing.finish_ok();
        } else {
            ledger = writing.finish_ok();
            assert_nothing_torn(&pair, &ledger);
            pair.proxy().refuse(false);
            pair.wait_in_sync("db");
        }
        check(&pair, &mut ledger);
        pair.settle_and_compare("db");
    }
}

#[test]
fn a_corrupted_byte_is_found_and_nothing_of_it_applied() {
    let pair = pair();
    let mut rng = Rng::new(seed());
    let mut ledger = Ledger::new(SIZE_MIB << 20);
    for round in 1..=6 {
        let writing = ledger.write(&pair.uri(ALPHA, "db"), rng.next_u64());
        pair.proxy().refuse(true);
        pair.proxy().corrupt_after(u32::try_from(1 + rng.below(300_000)).expect("small"));
        wait_for("a bit is turned", LIMIT, || pair.proxy().is_done().then_some(()));
        pair.wait_status(BETA, "db", "apart", |status| status.connection == "connecting");
        pair.wait_status(ALPHA, "db", "apart", |status| status.connection == "connecting");
        ledger = writing.finish_ok();
        assert_nothing_torn(&pair, &ledger);
        let found = pair.log(BETA).lines().filter(|line| line.contains("checksum")).count();
        assert_eq!(found, round, "lines in beta's log that name a checksum");
        pair.proxy().refuse(false);
        pair.wait_in_sync("db");
        check(&pair, &mut ledger);
        pair.settle_and_compare("db");
    }
}

#[test]
fn a_peer_that_stops_reading_neither_stops_the_primary_nor_fills_its_memory() {
    let pair = pair();
    let mut ledger = Ledger::new(SIZE_MIB << 20);
    let writing = ledger.write(&pair.uri(ALPHA, "db"), 7);
    wait_for("a warm start", LIMIT, || (writing.acked() > 200).then_some(()));
    let memory = pair.own_memory(ALPHA);

    pair.proxy().stall(true);
    pair.wait_status(ALPHA, "db", "apart", |status| status.peer_state == "Unknown");
    pair.wait_log(ALPHA, &["lost beta"]);
    let before = writing.acked();
    wait_for("the primary goes on alone", LIMIT, || (writing.acked() > before + 2000).then_some(()));
    let grown = pair.own_memory(ALPHA).saturating_sub(memory);
    assert!(grown < EXTRA_MEMORY_MAX, "the primary grew by {grown} bytes");

    pair.proxy().stall(false);
    pair.wait_in_sync("db");
    ledger = writing.finish_ok();
    check(&pair, &mut ledger);
    pair.settle_and_compare("db");
}

#[test]
fn a_slow_wire_only_makes_writes_slow() {
    let pair = pair();
    pair.proxy().delay(Duration::from_millis(3));
    let mut ledger = Ledger::new(SIZE_MIB << 20);
    let writing = ledger.write(&pair.uri(ALPHA, "db"), 8);
    std::thread::sleep(Duration::from_secs(2));
    assert!(writing.acked() > 50, "only {} writes got through", writing.acked());
    ledger = writing.finish_ok();
    check(&pair, &mut ledger);
    pair.settle_and_compare("db");
    assert!(!pair.log(ALPHA).contains("lost beta"), "a slow peer was taken for a dead one");
}
