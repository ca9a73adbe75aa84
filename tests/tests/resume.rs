//! A link that breaks between two daemons that live: the session goes on, and costs what was on its way.

use costandby_tests::pair::{ALPHA, BETA, LIMIT, Pair, Settings, VolumeSettings};
use costandby_tests::{Rng, seed, wait_for};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const SIZE_MIB: u64 = 64;
const BLOCK_LEN: usize = 4096;
const CLIENTS: u64 = 4;
const RESETS: u32 = 200;

/// What a log says of a session that goes on.
const GOES_ON: &str = "the session goes on where its link broke";

fn pair() -> Pair {
    let mut settings = Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]);
    settings.proxied = true;
    Pair::start(settings)
}

/// Writes 4 KiB at a time at random until told to stop, and notes how long each write took.
fn writer(pair: &Pair, n: u64, seed: u64, stop: &Arc<AtomicBool>) -> JoinHandle<Vec<Duration>> {
    let (mut client, stop) = (pair.client(ALPHA, "db"), Arc::clone(stop));
    let mut rng = Rng::new(seed ^ n);
    std::thread::spawn(move || {
        let mut took = Vec::new();
        let share = (SIZE_MIB << 20) / BLOCK_LEN as u64 / CLIENTS;
        while !stop.load(Ordering::SeqCst) {
            let offset = ((n - 1) * share + rng.below(share)) * BLOCK_LEN as u64;
            let data = rng.bytes(BLOCK_LEN);
            let began = Instant::now();
            client.write(offset, &data, rng.below(64) == 0).expect("a write beside resets is answered");
            took.push(began.elapsed());
        }
        took
    })
}

#[test]
fn two_hundred_resets_under_load_cost_no_copy() {
    let pair = pair();
    let generation = pair.status(ALPHA, "db").expect("it answers").generation;
    let (stop, carried) = (Arc::new(AtomicBool::new(false)), pair.proxy().carried());
    let seed = seed();
    let writers: Vec<_> = (1..=CLIENTS).map(|n| writer(&pair, n, seed, &stop)).collect();
    let mut rng = Rng::new(seed);
    for reset in 0..RESETS {
        std::thread::sleep(Duration::from_millis(5 + rng.below(40)));
        pair.proxy().cut();
        if reset % 4 == 0 {
            let beta = pair.status(BETA, "db").expect("it answers");
            assert_eq!(beta.disk_state, "UpToDate", "after {reset} resets");
        }
    }
    stop.store(true, Ordering::SeqCst);
    let mut took: Vec<_> = writers.into_iter().flat_map(|w| w.join().expect("a writer")).collect();
    pair.wait_in_sync("db");
    took.sort_unstable();
    let at = |percent: usize| took[(took.len() - 1) * percent / 100];
    println!(
        "{} writes beside {RESETS} resets: p50 {:?}, p90 {:?}, p99 {:?}, longest {:?}",
        took.len(),
        at(50),
        at(90),
        at(99),
        at(100)
    );
    let written = took.len() as u64 * (BLOCK_LEN as u64 + 64);
    let carried = pair.proxy().carried() - carried;
    let on_its_way = u64::from(RESETS) * (64 << 10);
    assert!(carried < written * 11 / 10 + on_its_way, "{carried} bytes for {written} written");
    assert_eq!(pair.status(ALPHA, "db").expect("it answers").generation, generation, "nobody went alone");
    let logs = [pair.log(ALPHA), pair.log(BETA)];
    for log in &logs {
        assert!(log.matches(GOES_ON).count() > 50, "{log}");
        assert!(!log.contains("copying to") && !log.contains("being copied"), "{log}");
        assert!(!log.contains("going on without"), "{log}");
    }
    pair.settle_and_compare("db");
}

#[test]
fn a_standby_whose_link_just_broke_can_be_promoted_at_once() {
    let pair = pair();
    let mut client = pair.client(ALPHA, "db");
    client.write(0, &[7; BLOCK_LEN], false).expect("mirrored");
    pair.proxy().refuse(true);
    pair.proxy().cut();
    wait_for("beta knows", LIMIT, || {
        pair.status(BETA, "db").filter(|beta| beta.connection == "connecting").map(drop)
    });
    let began = Instant::now();
    pair.promote(BETA, "db");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let mut there = pair.client(BETA, "db");
    let mut found = vec![0; BLOCK_LEN];
    there.read(0, &mut found).expect("served");
    assert_eq!(found, [7; BLOCK_LEN]);
    there.write(0, &[8; BLOCK_LEN], false).expect("served");
    // The session of before is over for good. Alpha serves on until somebody says that it has lost its turn, and is then copied to.
    pair.proxy().refuse(false);
    pair.wait_status(ALPHA, "db", "told of beta", |alpha| {
        alpha
            .advice
            .as_deref()
            .is_some_and(|advice| advice.contains("beta went on without alpha, which serves"))
    });
    pair.cli_ok(ALPHA, &["demote", "db"]);
    pair.wait_in_sync("db");
    assert_eq!(pair.status(ALPHA, "db").expect("it answers").role, "standby");
    assert!(!pair.log(ALPHA).contains(GOES_ON));
    pair.settle_and_compare("db");
}

#[test]
fn both_nodes_say_what_an_overtaken_primary_is_and_its_data_can_be_kept() {
    let pair = pair();
    pair.client(ALPHA, "db").write(0, &[7; BLOCK_LEN], false).expect("mirrored");
    pair.proxy().refuse(true);
    pair.proxy().cut();
    wait_for("beta knows", LIMIT, || {
        pair.status(BETA, "db").filter(|beta| beta.connection == "connecting").map(drop)
    });
    pair.promote(BETA, "db");
    pair.client(BETA, "db").write(0, &[8; BLOCK_LEN], false).expect("served");
    pair.proxy().refuse(false);
    for node in [ALPHA, BETA] {
        let told = pair.wait_status(node, "db", "told", |status| {
            status
                .advice
                .as_deref()
                .is_some_and(|advice| advice.starts_with("split brain: beta went on without alpha"))
        });
        assert!(told.parted && told.role == "primary", "{told:?}");
        let advice = told.advice.expect("just seen");
        let config = pair.config(node);
        for command in ["alpha demote db", "beta demote db", "beta connect db --discard-my-data"] {
            let whole = format!("`costandby --config {} --node {command}`", config.display());
            assert!(advice.contains(&whole), "{advice}");
        }
    }
    // Several more dials.
    std::thread::sleep(Duration::from_secs(2));
    for node in [ALPHA, BETA] {
        let log = pair.log(node);
        let told = log.lines().filter(|line| line.contains("split brain")).count();
        assert_eq!(told, 1, "{log}");
    }
    let refused = pair.cli(BETA, &["connect", "db", "--discard-my-data"]);
    assert!(
        refused.stderr.contains("beta serves the volume") && refused.stderr.contains(" demote db` first"),
        "{}",
        refused.stderr
    );
    pair.cli_ok(BETA, &["demote", "db"]);
    pair.cli_ok(BETA, &["connect", "db", "--discard-my-data"]);
    pair.wait_in_sync("db");
    assert_eq!(pair.primary("db"), ALPHA);
    let mut found = vec![0; BLOCK_LEN];
    pair.client(ALPHA, "db").read(0, &mut found).expect("served");
    assert_eq!(found, [7; BLOCK_LEN]);
    pair.settle_and_compare("db");
}

#[test]
fn a_primary_that_went_alone_copies_what_it_wrote_since() {
    let mut pair = pair();
    let mut client = pair.client(ALPHA, "db");
    for block in 0..512 {
        client.write(block * (64 << 10), &[1; BLOCK_LEN], false).expect("mirrored");
    }
    pair.proxy().refuse(true);
    pair.proxy().cut();
    for block in 0..4 {
        client.write(block * (64 << 10), &[2; BLOCK_LEN], false).expect("acknowledged alone");
    }
    let carried = pair.proxy().carried();
    pair.proxy().refuse(false);
    pair.wait_in_sync("db");
    let copied = pair.proxy().carried() - carried;
    assert!(
        copied < 2 << 20,
        "{copied} bytes for four grains of 64 KiB; 32 MiB were written a moment before"
    );
    pair.settle_and_compare("db");
    // A daemon that was restarted remembers nothing: what no flush has confirmed counts as different.
    for block in 0..64 {
        client.write(block * (64 << 10), &[3; BLOCK_LEN], false).expect("mirrored");
    }
    pair.kill(BETA);
    client.write(0, &[4; BLOCK_LEN], false).expect("acknowledged alone");
    let carried = pair.proxy().carried();
    pair.up(BETA);
    pair.wait_in_sync("db");
    let copied = pair.proxy().carried() - carried;
    assert!(copied >= 64 << 10, "{copied} bytes");
    pair.settle_and_compare("db");
}
