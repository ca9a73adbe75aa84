//! How soon the RDMA link is there, in a guest with a newer kernel, two processors and a network of 1500-byte packets: after
//! the daemons' start, after the link was cut, and after a daemon was killed. Then the demo.
//!
//! What a daemon has to do before its first RDMA connection takes longest in an emulated machine with Linux 6.12, and longer
//! than the handshake is given. So it has to be done before and once.
//!
//! The half that runs inside the guest ([`inside`]) measures; the times are held against [`LINK_MAX`], by which a guest
//! that is slower than usual is given more: what slows it down is the host, and that is measured beside.
//!
//! Invariants: a time is measured from before the daemon's process is started, or the cut made, until both daemons have
//! logged the session; the volume is written to over each link and its disks are equal in the end.

use super::guest::{Guest, Settings};
use super::{Rig, Steps, VmError, last_lines, quoted};
use crate::ledger::{Ledger, Writing};
use crate::pair::{ALPHA, BETA, NODES, Pair, Settings as PairSettings, VolumeSettings};
use crate::patience::Limits;
use crate::process::{Ran, run as run_program, system_command};
use crate::wait_for;
use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

/// How soon the link is there on a guest as fast as usual.
pub const LINK_MAX: Duration = Duration::from_secs(2);

/// How long `costandby doctor` takes there: a process starts, and looks for RDMA devices, as a daemon does.
const PROBE_USUAL: Duration = Duration::from_millis(300);

/// How often that is tried.
const PROBES: u32 = 4;

/// How long the wire is missing, once both daemons have noticed: longer than `peer_timeout`, and than their pauses between
/// two attempts.
const WIRE_DOWN: Duration = Duration::from_secs(2);

const NODES_OF_PAIR: [usize; 2] = [ALPHA, BETA];

const VOLUME: &str = "db";
const SIZE_MIB: u64 = 16;

/// How often each time is taken, until one is short enough: the host may have been busy with something else for a second.
const TRIES: usize = 3;

/// Between two writes.
const WRITE_PAUSE: Duration = Duration::from_millis(20);

/// Writes after each link that show that it works.
const WRITES: u64 = 20;

/// How long those may take, and anything else that happens at once.
const LIMIT: Duration = Duration::from_secs(30);

/// How long the guest may take to boot.
const BOOT_LIMIT: Limits = Limits::silent(Duration::from_secs(120));

/// How long the measurements may take, and then the demo.
const GUEST_LIMIT: Limits = Limits::silent(Duration::from_secs(180));

/// What a line of the half inside begins with, and the steps that they end, in order.
const STEPS: [(&str, &str); 6] = [
    ("#ready", "Linux 6.12: a guest boots, its network of 1500-byte packets"),
    ("#started", "Linux 6.12: the RDMA link is there after the daemons' start"),
    ("#again", "Linux 6.12: and again after its companion was cut"),
    ("#plugged", "Linux 6.12: and again after the device had no wire for a while"),
    ("#restarted", "Linux 6.12: and again after a daemon was killed"),
    ("#demo", "Linux 6.12: the demo"),
];

/// Runs it all. Logs are in `run`.
///
/// # Errors
/// What does not hold; the step it happened in is marked as failed.
pub fn run(rig: &Rig, run: &Path, steps: &mut Steps) -> Result<(), VmError> {
    let name = "first-link";
    let done = measure(rig, run, name, steps);
    if done.is_err() {
        steps.failed("");
        print!("{}", last_lines(&run.join(name).join("output"), 60));
    }
    done
}

fn measure(rig: &Rig, run: &Path, name: &str, steps: &mut Steps) -> Result<(), VmError> {
    let own = quoted(&rig.program("costandby-vm").display().to_string());
    let costandby = quoted(&rig.program("costandby").display().to_string());
    let command = format!(
        "echo '#ready' $(uname -r)\n\
         {own} first-link || exit\n\
         {costandby} demo --link rdma --seconds 2 || exit\n\
         echo '#demo'\n"
    );
    let mut settings = Settings::new(name, &command);
    settings.mtu = 1500;
    let mut guest = None;
    for (line, title) in STEPS {
        steps.begin(title);
        let (guest, limit) = match &mut guest {
            None => (guest.insert(Guest::boot(rig, run, &settings)?), BOOT_LIMIT),
            Some(guest) => (guest, GUEST_LIMIT),
        };
        let note = guest.wait_line(line, limit)?;
        steps.passed(&note);
    }
    match guest.expect("booted in the first step").finish(GUEST_LIMIT)? {
        0 => Ok(()),
        status => Err(VmError::Failed(format!("the guest ended with status {status}"))),
    }
}

/// The half inside the guest.
///
/// # Panics
/// When anything does not hold.
pub fn inside() {
    let address = std::env::var("COSTANDBY_RDMA_ADDRESS").ok().and_then(|text| text.parse().ok());
    let settings = PairSettings {
        link: "rdma",
        proxied: true,
        device_address: Some(address.expect("the address of the device")),
        ..PairSettings::new(&[VolumeSettings::new(VOLUME, SIZE_MIB)])
    };
    let mut pair = Pair::create(settings);
    let mut sessions = Sessions { seen: [0; 2], slower: slower(&pair) };
    let run_already = Cell::new(false);
    sessions.next(&mut pair, "#started", |pair| {
        if run_already.replace(true) {
            NODES_OF_PAIR.into_iter().for_each(|node| pair.kill(node));
        }
        pair.up(ALPHA);
        let began = Instant::now();
        pair.up(BETA);
        began
    });
    let writing = Ledger::new(SIZE_MIB << 20).write_slowly(&pair.uri(ALPHA, VOLUME), 1, WRITE_PAUSE);
    some_writes(&writing);

    // The connection beside the link ends, by which each node notices the end of the other.
    sessions.next(&mut pair, "#again", |pair| {
        some_writes(&writing);
        let began = Instant::now();
        pair.proxy().cut();
        began
    });
    some_writes(&writing);

    // The device has no wire for a while.
    sessions.next(&mut pair, "#plugged", |pair| {
        set_wire("down");
        for node in NODES_OF_PAIR {
            pair.wait_status(node, VOLUME, "without its peer", |status| status.connection != "connected");
        }
        std::thread::sleep(WIRE_DOWN);
        let began = Instant::now();
        set_wire("up");
        began
    });
    some_writes(&writing);

    sessions.next(&mut pair, "#restarted", |pair| {
        pair.kill(BETA);
        let began = Instant::now();
        pair.up(BETA);
        began
    });
    some_writes(&writing);

    let mut ledger = writing.finish_ok();
    ledger.check(&mut pair.client(ALPHA, VOLUME)).expect("every acknowledged write is there");
    pair.settle_and_compare(VOLUME);
    let status = pair.status(ALPHA, VOLUME).expect("a daemon answers");
    assert_eq!(status.link, "rdma", "{status:?}");
}

/// Sessions that both daemons have logged.
struct Sessions {
    seen: [usize; 2],
    /// How many times slower than usual the guest is.
    slower: f64,
}

impl Sessions {
    /// Has a session begin anew, waits for it, and holds the time since the instant that `begin` gives against what it may
    /// take.
    fn next(&mut self, pair: &mut Pair, line: &str, begin: impl Fn(&mut Pair) -> Instant) {
        let most = LINK_MAX.mul_f64(self.slower);
        let (mut notes, mut in_time) = (Vec::new(), false);
        while !in_time && notes.len() < TRIES {
            let began = begin(pair);
            let took = self.wait(pair, began);
            let status = pair.status(ALPHA, VOLUME).expect("a daemon answers");
            assert_eq!(status.link, "rdma", "{status:?}");
            notes.push(format!("{:.2} s", took.as_secs_f64()));
            in_time = took <= most;
        }
        let most_s = most.as_secs_f64();
        let note = format!(
            "{}, of {most_s:.2} s (a guest {:.1} × as slow as usual)",
            notes.join(", then "),
            self.slower
        );
        assert!(in_time, "{}: the link was there after {note}", &line[1..]);
        println!("{line} {note}");
    }

    /// How long both daemons took from `began` to their next session.
    fn wait(&mut self, pair: &Pair, began: Instant) -> Duration {
        for node in NODES_OF_PAIR {
            let what = format!("{} has a session", NODES[node]);
            self.seen[node] = wait_for(&what, LIMIT, || {
                let count = pair.log(node).lines().filter(|line| line.contains(": connected")).count();
                (count > self.seen[node]).then_some(count)
            });
        }
        began.elapsed()
    }
}

/// How many times slower than usual this guest is, 1 at least. To be asked while no daemon runs.
fn slower(pair: &Pair) -> f64 {
    // What it finds missing is not its matter here.
    let probe = || -> Ran { pair.cli(ALPHA, &["doctor"]) };
    // Once for the files that are read from the host for the first time: programs and the libraries' drivers.
    probe();
    let began = Instant::now();
    (0..PROBES).for_each(|_| drop(probe()));
    (began.elapsed() / PROBES).div_duration_f64(PROBE_USUAL).max(1.0)
}

/// Takes the other end of the device's interface down, or up again.
fn set_wire(to: &str) {
    run_program(system_command("ip").args(["link", "set", "wire1", to])).ok();
}

fn some_writes(writing: &Writing) {
    let wanted = writing.acked() + WRITES;
    wait_for("writes are acknowledged", LIMIT, || (writing.acked() >= wanted).then_some(()));
}
