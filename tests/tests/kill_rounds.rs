//! SIGKILL at random moments under a writer that knows what it wrote: nothing acknowledged is lost, nothing is torn, and
//! once the dead node is back both disks are equal.
//!
//! Kills in mid-resync have rounds of their own, with a wire slow enough to be met there; what the target's metadata says
//! after the kill tells whether one was. ext4 and fio as writers: `ext4.rs`, `fio_rounds.rs`.
//!
//! The seed is printed; `COSTANDBY_TEST_SEED` repeats a run as far as two processes and a scheduler can be repeated.

use costandby_control::admin::Command;
use costandby_tests::ledger::{Ledger, Writing};
use costandby_tests::pair::{ALPHA, BETA, LIMIT, NODES, Pair, Settings, VolumeSettings};
use costandby_tests::{Rng, seed, wait_for};
use std::time::{Duration, Instant};

/// Rounds, as promised: at least 20.
const ROUNDS: u64 = 24;

/// Rounds in which a resync is under way or has just ended.
const RESYNC_ROUNDS: u64 = 14;

/// How long the wire holds each piece back in those: a copy of all then takes a second or so.
const WIRE_DELAY: Duration = Duration::from_millis(5);

/// How long a survivor may need until it may be promoted: the news of the lost link, and one durable record.
const TAKEOVER_LIMIT: Duration = Duration::from_secs(5);

const SIZE_MIB: u64 = 12;

struct Rounds {
    pair: Pair,
    ledger: Ledger,
    rng: Rng,
    primary: usize,
}

impl Rounds {
    fn pause(&mut self, from_ms: u64, to_ms: u64) {
        let ms = from_ms + self.rng.below(to_ms - from_ms);
        std::thread::sleep(Duration::from_millis(ms));
    }

    fn check(&mut self, when: &str) {
        let mut client = self.pair.client(self.primary, "db");
        self.ledger.check(&mut client).unwrap_or_else(|lost| panic!("{when}: {lost}"));
    }

    fn kill_primary(&mut self) {
        let writing = self.ledger.clone().write(&self.pair.uri(self.primary, "db"), self.rng.next_u64());
        self.pause(50, 500);
        let (dead, survivor) = (self.primary, 1 - self.primary);
        self.pair.kill(dead);
        let killed = Instant::now();
        wait_for("the survivor may be promoted", TAKEOVER_LIMIT, || {
            self.pair.tell(survivor, "db", Command::Promote { force: false }).ok()
        });
        let took = killed.elapsed();
        let acked = writing.acked();
        let (ledger, error) = writing.finish();
        assert!(error.is_some(), "the writers noticed that the primary died");
        (self.ledger, self.primary) = (ledger, survivor);
        self.check("on the survivor");
        println!("  {acked} writes acknowledged, {} took over in {took:?}", NODES[survivor]);

        let writing = self.ledger.clone().write(&self.pair.uri(survivor, "db"), self.rng.next_u64());
        self.pause(0, 100);
        self.pair.up(dead);
        self.pair.wait_in_sync("db");
        self.ledger = writing.finish_ok();
    }

    fn kill_standby(&mut self) {
        let writing = self.ledger.clone().write(&self.pair.uri(self.primary, "db"), self.rng.next_u64());
        self.pause(50, 300);
        self.pair.kill(1 - self.primary);
        self.pause(50, 500);
        let before = writing.acked();
        wait_for("the primary goes on alone", TAKEOVER_LIMIT, || {
            (writing.acked() > before + 10).then_some(())
        });
        self.pair.up(1 - self.primary);
        self.pair.wait_in_sync("db");
        println!("  {} writes acknowledged, none refused", writing.acked());
        self.ledger = writing.finish_ok();
    }

    fn kill_both(&mut self) {
        let writing = self.ledger.clone().write(&self.pair.uri(self.primary, "db"), self.rng.next_u64());
        self.pause(50, 300);
        let first = usize::try_from(self.rng.below(2)).expect("0 or 1");
        self.pair.kill(first);
        // At once: whoever dies second must have had no time to go on without the other, or the first may not serve.
        self.pair.kill(1 - first);
        self.ledger = writing.finish().0;
        self.pair.up(first);
        self.pause(0, 300);
        self.pair.up(1 - first);
        self.pair.wait_in_sync("db");
        self.primary = self.pair.primary("db");
    }
}

#[test]
fn no_acknowledged_write_is_lost_in_24_kills() {
    let seed = seed();
    let mut settings = Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]);
    settings.peer_timeout = "2s";
    let pair = Pair::start(settings);
    let ledger = Ledger::new(SIZE_MIB << 20);
    let mut rounds = Rounds { pair, ledger, rng: Rng::new(seed), primary: ALPHA };
    let mut kinds = [0; 3];
    for round in 0..ROUNDS {
        // The first three rounds show each kind once, whatever the seed.
        let kind = if round < 3 {
            round
        } else {
            [0, 0, 0, 1, 1, 2][usize::try_from(rounds.rng.below(6)).expect("small")]
        };
        println!("round {round}: {}", ["primary", "standby", "both"][usize::try_from(kind).expect("small")]);
        kinds[usize::try_from(kind).expect("small")] += 1;
        match kind {
            0 => rounds.kill_primary(),
            1 => rounds.kill_standby(),
            _ => rounds.kill_both(),
        }
        rounds.check("after the return");
        rounds.pair.settle_and_compare("db");
        rounds.pair.assert_alive(ALPHA);
        rounds.pair.assert_alive(BETA);
    }
    println!("killed: primary {}, standby {}, both {}", kinds[0], kinds[1], kinds[2]);
}

/// What is killed in a round of [`kills_in_mid_resync_lose_nothing`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Victim {
    Source,
    Target,
    Both,
}

/// Whether a node's metadata says that a resync to it was cut short: its disk is a mixture.
fn was_cut_short(pair: &Pair, node: usize) -> bool {
    let said = pair.cli_ok(node, &["dump-metadata", "db", "--json"]);
    let found: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    let volume = &found["volumes"][0];
    let newest = usize::try_from(volume["newest"].as_u64().expect("a good copy")).expect("small");
    volume["superblocks"][newest]["disk_state"] == "Inconsistent"
}

impl Rounds {
    /// One node goes away, comes back after some writes, and then nodes die at a random moment of its catching up.
    /// Whether that moment was in mid-resync.
    fn kill_in_resync(&mut self, victim: Victim) -> bool {
        let (source, target) = (self.primary, 1 - self.primary);
        self.pair.proxy().delay(WIRE_DELAY);
        let writing = self.ledger.clone().write(&self.pair.uri(source, "db"), self.rng.next_u64());
        self.pause(0, 100);
        self.pair.kill(target);
        self.pause(50, 300);
        self.pair.up(target);
        // A third of the kills falls into the handshake, before anything is copied.
        if self.rng.below(3) != 0 {
            self.pair.wait_status(target, "db", "being copied to, or done", |status| {
                status.connection == "sync-target" || status.in_sync()
            });
        }
        self.pause(0, 250);
        if victim != Victim::Source {
            self.pair.kill(target);
        }
        if victim != Victim::Target {
            self.pair.kill(source);
        }
        let hit = was_cut_short(&self.pair, target);
        // A copy makes way for clients, and over a slow wire beside busy ones it takes its time: longer than a test has.
        self.pair.proxy().delay(Duration::ZERO);
        if victim == Victim::Source && hit {
            let told = self.pair.tell(target, "db", Command::Promote { force: false });
            assert!(told.is_err(), "half a copy was promoted");
        }
        if victim == Victim::Target {
            self.pair.up(target);
            self.pair.wait_in_sync("db");
            self.ledger = writing.finish_ok();
        } else {
            self.ledger = writing.finish().0;
            let mut order = [source, target];
            if self.rng.below(2) == 0 {
                order.reverse();
            }
            for node in order.into_iter().filter(|&node| victim == Victim::Both || node == source) {
                self.pair.up(node);
            }
            self.pair.wait_in_sync("db");
        }
        assert_eq!(self.pair.primary("db"), source, "nobody was promoted");
        hit
    }
}

#[test]
fn kills_in_mid_resync_lose_nothing() {
    let seed = seed();
    let mut settings = Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]);
    settings.proxied = true;
    settings.peer_timeout = "2s";
    let pair = Pair::start(settings);
    let ledger = Ledger::new(SIZE_MIB << 20);
    let mut rounds = Rounds { pair, ledger, rng: Rng::new(seed), primary: ALPHA };
    let mut hits = 0;
    for round in 0..RESYNC_ROUNDS {
        let victim =
            [Victim::Target, Victim::Source, Victim::Both][usize::try_from(round % 3).expect("small")];
        let hit = rounds.kill_in_resync(victim);
        hits += u64::from(hit);
        println!(
            "round {round}: killed {victim:?} {}",
            if hit { "in mid-resync" } else { "before or after" }
        );
        rounds.check("after the return");
        rounds.pair.settle_and_compare("db");
        if round % 4 == 3 {
            rounds.pair.hand_over("db", rounds.primary);
            rounds.primary = 1 - rounds.primary;
            rounds.pair.wait_in_sync("db");
        }
    }
    println!("{hits} of {RESYNC_ROUNDS} kills hit a resync");
    assert!(hits >= RESYNC_ROUNDS / 4, "a copy was met in only {hits} of {RESYNC_ROUNDS} rounds");
}

/// A pair with writers at work whose wire has just come to a standstill: the writers' last writes are in the primary's
/// disk, are not in the standby's, and must not be acknowledged.
fn stand_still() -> (Pair, Writing) {
    let mut settings = Settings::new(&[VolumeSettings::new("db", SIZE_MIB)]);
    settings.proxied = true;
    settings.peer_timeout = "20s";
    let pair = Pair::start(settings);
    let writing = Ledger::new(SIZE_MIB << 20).write(&pair.uri(ALPHA, "db"), 9);
    wait_for("a start", LIMIT, || (writing.acked() > 100).then_some(()));
    pair.proxy().stall(true);
    pair.wait_status(ALPHA, "db", "writes on their way", |status| status.in_flight > 0);
    // Long enough for hundreds of writes, if they were acknowledged without the peer.
    std::thread::sleep(Duration::from_millis(500));
    (pair, writing)
}

#[test]
fn what_the_standby_has_not_got_is_not_acknowledged() {
    let (mut pair, writing) = stand_still();
    let before = writing.acked();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(writing.acked(), before, "writes acknowledged without the standby");
    pair.kill(ALPHA);
    pair.proxy().cut();
    let (mut ledger, error) = writing.finish();
    assert!(error.is_some(), "the writers noticed that the primary died");
    wait_for("the survivor may be promoted", TAKEOVER_LIMIT, || {
        pair.tell(BETA, "db", Command::Promote { force: false }).ok()
    });
    ledger.check(&mut pair.client(BETA, "db")).unwrap_or_else(|lost| panic!("on the survivor: {lost}"));
    pair.proxy().stall(false);
    pair.up(ALPHA);
    pair.wait_in_sync("db");
    pair.settle_and_compare("db");
}

#[test]
fn what_was_on_its_way_when_both_died_is_on_both_or_on_neither() {
    let (mut pair, writing) = stand_still();
    pair.kill(ALPHA);
    pair.kill(BETA);
    pair.proxy().cut();
    pair.proxy().stall(false);
    let (mut ledger, _) = writing.finish();
    pair.up(BETA);
    pair.up(ALPHA);
    pair.wait_in_sync("db");
    let primary = pair.primary("db");
    ledger.check(&mut pair.client(primary, "db")).unwrap_or_else(|lost| panic!("{lost}"));
    pair.settle_and_compare("db");
}
