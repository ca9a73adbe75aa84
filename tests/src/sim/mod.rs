//! The simulator: two nodes, their clients, an operator and bad luck, all from one seed, in virtual time.
//!
//! What runs is production code: a volume's task and its controller (`control::task`, `control::role`, with `generation` and
//! `hello`), the volume
//! itself (`datapath::volume` with session, pipeline, access, resync and range locks), the credits, ring and codec of a
//! link, and the metadata with its activity log and dirty map. Around it stand a virtual clock (`clock`), a wire (`network`, `streams`), media
//! that forget (`storage`, `metadata`), the driver of the task (`driver`), the turn of the reactor (`datapath`), repeated from
//! production in the same order, then clients, an operator who also makes trouble, and the rules (`checker`).
//!
//! A run is its seed: one thread, one generator of random numbers, no clock but its own. A run that breaks a rule is run
//! again to tell its story.
//!
//! Not simulated: NBD, ublk, RDMA's own failures, several volumes, sockets' partial reads, anything the reactor's sleeping
//! and waking could get wrong.

mod checker;
mod client;
mod clock;
mod coverage;
mod datapath;
mod driver;
mod metadata;
mod metadata_calls;
mod network;
mod new_disks;
mod operator;
mod storage;
mod story;
mod streams;
mod world;

pub use checker::Violation;
use clock::{MS, Nanos, S};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use world::World;

/// Virtual time with faults.
const TROUBLE: Nanos = 20 * S;

/// Virtual time after the last fault in which everything has to be in order again: several of the longest timeouts.
const CONVALESCENCE: Nanos = 150 * S;

/// Virtual time without a client after which nothing is on record as being written to.
const IDLE: Nanos = 40 * S;

/// Events of a run: ten times what the busiest sound one takes.
const STEPS_MAX: u64 = 5_000_000;

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Which.
    pub seed: u64,
    /// The rule that was broken, if one was.
    pub violation: Option<Violation>,
    /// What happened, the newest last. Empty unless asked for.
    pub story: Vec<String>,
    /// Checksum of everything that happened.
    pub sum: u64,
    /// What the seed decided about the whole run.
    pub config: String,
    /// Nanoseconds of virtual time.
    pub nanos: u64,
    /// Faults, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// How often each rule was applied.
    pub rules: BTreeMap<&'static str, u64>,
    /// Things that happened at all.
    pub seen: BTreeSet<&'static str>,
    /// Sessions begun, by either side.
    pub sessions: u64,
    /// Requests answered well.
    pub answered: u64,
    /// Requests that ended otherwise.
    pub failed: u64,
}

static LAST_PANIC: Mutex<String> = Mutex::new(String::new());
static RUNNING: AtomicBool = AtomicBool::new(false);

/// Keeps panics of the code under test for the story instead of printing them. For programs that do nothing else.
///
/// # Panics
/// Never.
pub fn catch_panics() {
    std::panic::set_hook(Box::new(|info| {
        if !RUNNING.load(Ordering::Relaxed) {
            eprintln!("{info}");
        }
        *network::lock(&LAST_PANIC) = info.to_string();
    }));
}

/// How to run.
#[derive(Clone, Copy, Default, Debug)]
pub struct Options {
    /// Keep the story.
    pub told: bool,
}

/// One run.
#[must_use]
pub fn run(seed: u64, options: Options) -> Outcome {
    let mut world = World::new(seed, options.told);
    RUNNING.store(true, Ordering::Relaxed);
    let ended = catch_unwind(AssertUnwindSafe(|| live(&mut world)));
    RUNNING.store(false, Ordering::Relaxed);
    let violation = match ended {
        Ok(Ok(())) => None,
        Ok(Err(violation)) => Some(violation),
        Err(_) => Some(Violation { rule: "panic", text: network::lock(&LAST_PANIC).clone() }),
    };
    let outcome = Outcome {
        seed,
        violation,
        story: world.story.last(usize::MAX),
        sum: world.story.sum(),
        config: format!("{:?}", world.config),
        nanos: world.now(),
        faults: std::mem::take(&mut world.faults),
        rules: std::mem::take(&mut world.checker.applied),
        seen: std::mem::take(&mut world.seen),
        sessions: world.sessions,
        answered: world.requests.answered,
        failed: world.requests.failed,
    };
    if matches!(&outcome.violation, Some(violation) if violation.rule == "panic") {
        // What panicked may panic again when it is dropped.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(world)));
    }
    outcome
}

/// Nobody asks for anything for longer than a log is kept in idleness: then a crash costs nothing.
fn idle(world: &mut World) -> Result<(), Violation> {
    let from = world.now();
    while world.now() < from + IDLE || !world.is_well() {
        world.step()?;
        if world.now() > from + 2 * IDLE {
            return Err(world.portrait());
        }
    }
    world.check_idle()
}

fn live(world: &mut World) -> Result<(), Violation> {
    let mut steps = 0;
    while world.now() < TROUBLE {
        world.step()?;
        steps += 1;
        if steps > STEPS_MAX {
            return Err(Violation { rule: "stuck", text: "something goes round and round".to_owned() });
        }
    }
    world.become_calm();
    let (deadline, mut look) = (world.now() + CONVALESCENCE, 0);
    while world.now() < deadline {
        world.step()?;
        steps += 1;
        if steps > STEPS_MAX {
            return Err(world.portrait());
        }
        if world.now() >= look {
            look = world.now() + 20 * MS;
            if world.is_well() {
                world.check_quiet()?;
                return if world.seed_says_idle() { idle(world) } else { Ok(()) };
            }
        }
    }
    Err(world.portrait())
}
