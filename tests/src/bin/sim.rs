//! Runs the simulator: `sim SEED` replays one run and tells its story, `sim --soak` runs one seed after the other until
//! stopped or until a rule is broken, `sim --seeds A..B [--seconds N]` runs a range of them.

use costandby_tests::sim::{Options, Outcome, catch_panics, run};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Lines of a story that are printed: what a reader goes back over at first.
const LINES: usize = 120;

const USAGE: &str =
    "usage: sim SEED [--lines N] | sim --soak [--from SEED] | sim --seeds A..B [--seconds N] [--keep-going]";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).and_then(|text| text.parse::<u64>().ok())
    };
    catch_panics();
    let seconds = value("--seconds").map_or(Duration::MAX, Duration::from_secs);
    let keep_going = arguments.iter().any(|argument| argument == "--keep-going");
    match arguments.first().map(String::as_str) {
        Some("--soak") => {
            let since_1970 = || std::time::UNIX_EPOCH.elapsed().map_or(1, |since| since.as_secs());
            let from = value("--from").unwrap_or_else(since_1970);
            many(from..u64::MAX, seconds, keep_going)
        }
        Some("--seeds") => {
            let range = arguments
                .get(1)
                .and_then(|text| text.split_once(".."))
                .and_then(|(from, to)| Some(from.parse().ok()?..to.parse().ok()?));
            range.map_or_else(usage, |range| many(range, seconds, keep_going))
        }
        Some(seed) => seed.parse().map_or_else(
            |_| usage(),
            |seed| {
                let lines = value("--lines").and_then(|lines| usize::try_from(lines).ok()).unwrap_or(LINES);
                tell(seed, lines)
            },
        ),
        None => usage(),
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

fn tell(seed: u64, lines: usize) -> ExitCode {
    let outcome = run(seed, Options { told: true });
    let from = outcome.story.len().saturating_sub(lines);
    println!("seed {seed}: {}", outcome.config);
    for line in &outcome.story[from..] {
        println!("{line}");
    }
    verdict(&outcome)
}

fn verdict(outcome: &Outcome) -> ExitCode {
    match &outcome.violation {
        Some(violation) => {
            println!("seed {}: BROKEN RULE {}: {}", outcome.seed, violation.rule, violation.text);
            ExitCode::FAILURE
        }
        None => {
            println!("seed {}: every rule held ({} requests answered)", outcome.seed, outcome.answered);
            ExitCode::SUCCESS
        }
    }
}

fn many(seeds: std::ops::Range<u64>, limit: Duration, keep_going: bool) -> ExitCode {
    let began = Instant::now();
    let mut nanos = 0;
    let (mut runs, mut sessions, mut answered, mut failed, mut broken) = (0_u64, 0, 0, 0, 0_u64);
    let mut faults: BTreeMap<&str, u64> = BTreeMap::new();
    let mut rules: BTreeMap<&str, u64> = BTreeMap::new();
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in seeds {
        let outcome = run(seed, Options { told: false });
        runs += 1;
        nanos += outcome.nanos;
        sessions += outcome.sessions;
        answered += outcome.answered;
        failed += outcome.failed;
        for (fault, count) in &outcome.faults {
            *faults.entry(fault).or_default() += count;
        }
        for (rule, count) in &outcome.rules {
            *rules.entry(rule).or_default() += count;
        }
        for thing in &outcome.seen {
            *seen.entry(thing).or_default() += 1;
        }
        if let Some(violation) = &outcome.violation {
            broken += 1;
            println!("seed {seed}: BROKEN RULE {}: {}", violation.rule, violation.text);
            if !keep_going {
                println!("replay it with: make sim SEED={seed}");
                break;
            }
        }
        if began.elapsed() >= limit {
            break;
        }
    }
    let (hours, minutes) = (nanos as f64 / 3.6e12, began.elapsed().as_secs_f64() / 60.0);
    let faults_all: u64 = faults.values().sum();
    println!(
        "{runs} runs, {broken} with a broken rule, {sessions} session ends begun, {answered} requests answered, {failed} not"
    );
    println!("faults: {faults:?}\nrules applied: {rules:?}\nruns that saw: {seen:?}");
    println!(
        "{hours:.2} simulated hours in {minutes:.2} min: {:.1} simulated hours and {:.0} faults a minute",
        hours / minutes,
        faults_all as f64 / minutes
    );
    if broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
