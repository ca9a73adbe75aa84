//! Runs the simulator (`tests/src/sim`): a fixed set of seeds as far as the time goes, every seed that ever broke a rule,
//! and one seed twice.
//!
//! A broken rule is reported with the command that replays it and the end of its story.

#![forbid(unsafe_code)]

use costandby_tests::sim::{Options, Outcome, catch_panics, run};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Where the fixed set begins, and how many there are at most.
const FIRST: u64 = 1_000_000;
const SEEDS: u64 = 2_000;

/// How many are run however long they take: in so many each thing that the simulator is for happens.
const SEEDS_MIN: u64 = 20;

/// Wall-clock time for them; `COSTANDBY_SIM_SECONDS` sets another. `make test-long` looks for new ones.
const SECONDS: u64 = 40;

/// Lines of a failed run's story that are shown.
const LINES: usize = 60;

fn hold(seed: u64) -> Outcome {
    let outcome = run(seed, Options::default());
    let Some(violation) = &outcome.violation else { return outcome };
    let told = run(seed, Options { told: true });
    let from = told.story.len().saturating_sub(LINES);
    panic!(
        "seed {seed} broke the rule `{}`: {}\n{}\n{}\nreplay it with: make sim SEED={seed}",
        violation.rule,
        violation.text,
        outcome.config,
        told.story[from..].join("\n")
    );
}

#[test]
fn every_rule_holds_for_a_fixed_set_of_seeds() {
    catch_panics();
    let limit =
        std::env::var("COSTANDBY_SIM_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SECONDS);
    let began = Instant::now();
    let (mut runs, mut nanos, mut faults, mut seen) = (0, 0, 0, BTreeSet::new());
    for seed in FIRST..FIRST + SEEDS {
        let outcome = hold(seed);
        runs += 1;
        nanos += outcome.nanos;
        faults += outcome.faults.values().sum::<u64>();
        seen.extend(outcome.seen);
        if runs >= SEEDS_MIN && began.elapsed() > Duration::from_secs(limit) {
            break;
        }
    }
    println!("{runs} seeds, {:.2} simulated hours, {faults} faults; seen: {seen:?}", nanos as f64 / 3.6e12);
    // A simulator in which nothing happens finds nothing.
    let needed =
        ["a copy began", "a copy ended", "a quiet moment", "a session in sync", "a split brain was resolved"];
    assert!(needed.iter().all(|thing| seen.contains(thing)), "only {seen:?} in {runs} runs");
}

#[test]
fn every_seed_that_ever_broke_a_rule_holds() {
    catch_panics();
    let list = include_str!("../src/sim/seeds.txt");
    let seeds = list.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
    for line in seeds {
        let seed = line.split_whitespace().next().and_then(|text| text.parse().ok());
        hold(seed.unwrap_or_else(|| panic!("a line of seeds.txt without a seed: {line}")));
    }
}

#[test]
fn a_seed_is_a_run() {
    catch_panics();
    for seed in [1, 2, 3] {
        let (first, second) = (run(seed, Options::default()), run(seed, Options { told: true }));
        assert_eq!(
            (first.sum, first.nanos, first.answered),
            (second.sum, second.nanos, second.answered),
            "seed {seed}"
        );
    }
}
