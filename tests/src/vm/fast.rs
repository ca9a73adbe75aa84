//! What fits into one guest: the tests that want an RDMA device, NBD clients over an RDMA link, the demo, and a pair whose
//! device comes after its daemons.
//!
//! Everything is built on the host, where compiling is ten times as fast, and run in the guest from there. One boot
//! serves all steps; each has its own log, and is ended when that does not grow any more. A step whose copies are to go by RDMA has failed if the
//! device sent no packets, whatever its programs say, and so has a step of tests that ran none or left one out.

use super::guest::{Guest, Settings, WORK};
use super::{Built, DEVICE, Rig, Steps, TestProgram, VmError, io_error, last_lines, quoted};
use crate::patience::{Limits, Over};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

/// How long a guest may take for what it does at once: ending a step that it is told to end, powering off.
const AT_ONCE: Limits = Limits::silent(Duration::from_secs(60));

/// Packets that a step over the device sends at least; connections alone take fewer.
const PACKETS_MIN: u64 = 100;

/// How a test says that it was left out. None may be: the rig has all that a test can ask for.
const SKIPPED: &str = "SKIPPED: ";

/// Parts of datapath whose tests play the device, as they do on the host, and never look for one: only for the long run.
const DOUBLES: [&str; 5] = [
    "transport::rdma::tests::",
    "testing::fault::tests::",
    "transport::rdma::registration::cache::",
    "transport::rdma::placement::",
    "transport::rdma::private_data::",
];

/// Tests of ffi that need what only a step of their own gives them: the device for themselves, or a second guest.
const ELSEWHERE: [&str; 3] = ["a_removed_device", "a_port_without_a_wire", super::lost_host::TEST];

/// The interface that the guest's device is on.
const NETDEV: &str = "wire0";

/// Lines of a failed step's log that are printed.
const LOG_LINES: usize = 30;

/// A step's work.
#[derive(Clone, Debug)]
enum Work {
    /// Tests of a package whose names contain `filter`, but for [`ELSEWHERE`] and, unless the run is a long one,
    /// [`DOUBLES`]; of one test program only, or of all.
    Tests { package: &'static str, program: Option<&'static str>, filter: &'static str },
    /// The same for a test that takes the device away, and so wants a process of its own.
    Removal { package: &'static str, filter: &'static str },
    /// A shell command.
    Command(String),
}

/// One step.
#[derive(Clone, Debug)]
pub struct Step {
    /// Its name on the command line and in its log's name.
    pub id: &'static str,
    /// What its line says.
    pub title: &'static str,
    /// It is for the long run, unless it is asked for.
    pub long: bool,
    /// Its copies go by the link, so with RDMA the device must have sent packets.
    over_link: bool,
    work: Work,
}

/// All steps, in order, for copies by `link`.
#[must_use]
pub fn steps(rig: &Rig, link: &str) -> Vec<Step> {
    let tests = |package, program, filter| Work::Tests { package, program, filter };
    let removal = |filter| Work::Removal { package: "costandby-ffi", filter };
    let costandby = quoted(&rig.program("costandby").display().to_string());
    let device = format!(
        "ibv_devinfo -d {DEVICE} || exit\n\
         ib_write_lat -R -n 100 >/dev/null &\n\
         for _ in {{1..60}}; do\n\
         sleep 0.5; ib_write_lat -R -n 100 $COSTANDBY_RDMA_ADDRESS && exit\n\
         done\n\
         exit 1\n"
    );
    let modules =
        "/sbin/modprobe --verbose dm_flakey && /bin/busybox modprobe dm_log_writes && dmsetup targets";
    // The last try is the command's outcome: nothing tells when perftest's server is ready.
    let step = |id, title, over_link, work| Step { id, title, long: false, over_link, work };
    vec![
        step("device", "the device: perftest's ib_write_lat", true, Work::Command(device)),
        step("modules", "kernel modules, by kmod and by busybox", false, Work::Command(modules.to_owned())),
        step("ffi", "tests of ffi on the device", true, tests("costandby-ffi", None, "verbs")),
        step("removed", "the device is removed and comes back", false, removal(ELSEWHERE[0])),
        step("unplugged", "its port goes down and up", false, removal(ELSEWHERE[1])),
        step("datapath", "tests of datapath on the device", true, tests("costandby-datapath", None, "rdma")),
        Step {
            long: true,
            ..step(
                "control",
                "tests of control in the guest (its RDMA is a double)",
                false,
                tests("costandby-control", None, "rdma"),
            )
        },
        step("clients", "NBD clients", true, tests("costandby-tests", Some("real_clients"), "")),
        step(
            "devices",
            "block devices that fail",
            false,
            tests("costandby-tests", Some("device_faults"), ""),
        ),
        step("demo", "the demo", true, Work::Command(format!("{costandby} demo --link {link} --seconds 2"))),
        step("auto", "link = \"auto\" finds a device that comes later", false, Work::Command(auto(rig))),
    ]
}

/// Takes the guest's device away, has [`super::auto`] make another, and puts everything back.
fn auto(rig: &Rig) -> String {
    let own = quoted(&rig.program("costandby-vm").display().to_string());
    format!(
        "rdma link delete {DEVICE} || exit\n\
         {own} auto {NETDEV}; status=$?\n\
         rdma link delete rxe_{NETDEV}\n\
         rdma link add {DEVICE} type rxe netdev {NETDEV} && exit $status\n"
    )
}

/// The shell command of a step; `None` where there is no such test program.
fn command(step: &Step, programs: &[TestProgram], long: bool) -> Option<String> {
    let (package, program, filter) = match &step.work {
        Work::Command(command) => return Some(command.clone()),
        Work::Tests { package, program, filter } => (package, *program, filter),
        Work::Removal { package, filter } => (package, None, filter),
    };
    let wanted = |found: &&TestProgram| {
        found.package == *package && program.is_none_or(|program| found.name == program)
    };
    let mut commands = String::from("failed=0\n");
    let mut left_out = String::new();
    if matches!(step.work, Work::Removal { .. }) {
        let _ = writeln!(commands, "export COSTANDBY_RDMA_NETDEV={NETDEV}");
    } else {
        let doubles = if long { &[] } else { &DOUBLES[..] };
        left_out = ELSEWHERE.iter().chain(doubles).map(|test| format!(" --skip {test}")).collect();
    }
    let mut any = false;
    for found in programs.iter().filter(wanted) {
        any = true;
        let path = quoted(&found.path.display().to_string());
        let filter = if filter.is_empty() { String::new() } else { quoted(filter) };
        let _ = writeln!(commands, "{path} {filter}{left_out} --test-threads=1 --show-output || failed=1");
    }
    any.then(|| commands + "exit $failed\n")
}

/// What the guest does: each step with its log and its number of packets, told in lines that begin with `#`.
const RUN_STEPS: &str = r##"
counter=/sys/class/infiniband/rxe0/ports/1/hw_counters/sent_pkts
mkfifo /run/ended && exec 9<>/run/ended
echo "#ready"
while read -r id; do
    before=$(<$counter)
    echo "#begin $id"
    (
        setsid bash "/share/$id.sh" >"/share/$id.log" 2>&1 </dev/null &
        echo $! >/run/step
        wait $!
        echo $? >&9
    ) 2>/dev/null &
    # The host gives a step up by a file.
    until read -r -t 1 -u 9 status; do
        [ -e "/share/$id.stop" ] && kill -KILL -- "-$(</run/step)" 2>/dev/null
    done
    after=$(<$counter)
    # A device that was made anew counts from nothing.
    echo "#end $id $status $((after < before ? after : after - before))"
done </share/steps
"##;

/// Boots one guest and runs those of `steps` that `wanted` says, all of them whatever becomes of those before.
///
/// # Errors
/// When the guest, rather than a step, fails.
pub fn run(
    rig: &Rig,
    built: &Built,
    run: &Path,
    link: &str,
    long: bool,
    wanted: impl Fn(&Step) -> bool,
    report: &mut Steps,
) -> Result<(), VmError> {
    let guest_name = "fast";
    let share = run.join(guest_name).join("share");
    std::fs::create_dir_all(&share).map_err(io_error(format!("making {}", share.display())))?;
    let mut list = String::new();
    let mut chosen = Vec::new();
    for step in steps(rig, link).into_iter().filter(&wanted) {
        let script = command(&step, &built.tests, long)
            .ok_or_else(|| VmError::Failed(format!("there is no test program for the step {}", step.id)))?;
        let path = share.join(format!("{}.sh", step.id));
        std::fs::write(&path, script).map_err(io_error(format!("writing {}", path.display())))?;
        let _ = writeln!(list, "{}", step.id);
        chosen.push(step);
    }
    std::fs::write(share.join("steps"), list).map_err(io_error("writing the list of steps"))?;
    let mut settings = Settings::new(guest_name, RUN_STEPS);
    settings.environment.push(("COSTANDBY_TEST_LINK".to_owned(), link.to_owned()));
    let mut guest = report.run("one guest boots", || {
        let mut guest = Guest::boot(rig, run, &settings)?;
        guest.wait_line("#ready", AT_ONCE)?;
        Ok(guest)
    })?;
    for step in &chosen {
        report.begin(step.title);
        let log = share.join(format!("{}.log", step.id));
        let outcome = finish_step(&mut guest, step, &log).inspect_err(|_| report.failed(""))?;
        match judge(step, link, &outcome, &std::fs::read_to_string(&log).unwrap_or_default()) {
            Verdict::Passed(note) => report.passed(&note),
            Verdict::Failed(note) => {
                report.failed(&note);
                print!("{}", last_lines(&log, LOG_LINES));
            }
        }
    }
    guest.finish(AT_ONCE).map(drop)
}

/// How a step ended: what the guest says of it, and why it was given up, if it was.
#[derive(Debug)]
struct Outcome {
    said: String,
    given_up: Option<Over>,
}

/// Waits for a step's end, and ends it where its log stands still.
fn finish_step(guest: &mut Guest, step: &Step, log: &Path) -> Result<Outcome, VmError> {
    let end = format!("#end {}", step.id);
    match guest.wait_line_watching(&end, WORK, Some(log))? {
        Ok(said) => Ok(Outcome { said, given_up: None }),
        Err(over) => {
            let stop = guest.share().join(format!("{}.stop", step.id));
            std::fs::write(&stop, "").map_err(io_error(format!("writing {}", stop.display())))?;
            Ok(Outcome { said: guest.wait_line(&end, AT_ONCE)?, given_up: Some(over) })
        }
    }
}

/// What became of a step.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Verdict {
    Passed(String),
    Failed(String),
}

/// Judges a step by how it ended (its status and the packets sent) and by its log.
fn judge(step: &Step, link: &str, outcome: &Outcome, log: &str) -> Verdict {
    if let Some(over) = outcome.given_up {
        let last = log.lines().next_back().unwrap_or_default();
        return Verdict::Failed(format!("given up, for {over}; its log ends with {last:?}"));
    }
    let mut numbers = outcome.said.split_whitespace().map(str::parse::<u64>);
    let (Some(Ok(status)), Some(Ok(packets))) = (numbers.next(), numbers.next()) else {
        return Verdict::Failed(format!("the guest says {:?}", outcome.said));
    };
    if status != 0 {
        return Verdict::Failed(format!("ended with status {status}"));
    }
    let mut note = String::new();
    if !matches!(step.work, Work::Command(_)) {
        let skipped: Vec<_> =
            log.lines().filter_map(|line| line.split_once(SKIPPED)).map(|(_, why)| why.trim()).collect();
        if let [why, ..] = skipped[..] {
            let count = skipped.len();
            return Verdict::Failed(format!("{count} SKIPPED, where nothing may be missing: {why}"));
        }
        let passed = tests_passed(log);
        if passed == 0 {
            return Verdict::Failed("no test was run".to_owned());
        }
        let _ = write!(note, "{passed} tests, ");
    }
    let needs_packets = step.over_link && (link == "rdma" || step.id == "device");
    if needs_packets && packets < PACKETS_MIN {
        return Verdict::Failed(format!("only {packets} packets went over {DEVICE}"));
    }
    let _ = write!(note, "{packets} packets over {DEVICE}");
    Verdict::Passed(note)
}

/// Tests that passed, of all programs that wrote into `log`.
fn tests_passed(log: &str) -> u64 {
    let results = log.lines().filter_map(|line| line.strip_prefix("test result: ok. "));
    results.filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(work: Work) -> Step {
        Step { id: "x", title: "x", long: false, over_link: true, work }
    }

    fn judge(step: &Step, ended: &str, log: &str) -> Verdict {
        super::judge(step, "rdma", &Outcome { said: ended.to_owned(), given_up: None }, log)
    }

    #[test]
    fn what_needs_no_device_is_for_the_long_run() {
        let tests = step(Work::Tests { package: "p", program: None, filter: "rdma" });
        let program = TestProgram { package: "p".to_owned(), name: "n".to_owned(), path: "/n".into() };
        let command = |long| command(&tests, std::slice::from_ref(&program), long).expect("a program");
        assert!(command(false).contains("--skip transport::rdma::tests::"), "{}", command(false));
        assert!(!command(true).contains("transport::"), "{}", command(true));
        assert!(command(true).contains("--skip a_removed_device"), "{}", command(true));
    }

    #[test]
    fn a_step_without_packets_tests_or_success_has_failed() {
        let tests = step(Work::Tests { package: "p", program: None, filter: "" });
        let log = "test result: ok. 3 passed; 0 failed\ntest result: ok. 4 passed; 0 failed\n";
        let passed = Verdict::Passed("7 tests, 500 packets over rxe0".to_owned());
        assert_eq!(judge(&tests, "0 500", log), passed);
        let failed = |ended: &str, log: &str| matches!(judge(&tests, ended, log), Verdict::Failed(_));
        assert!(failed("1 500", log), "a status");
        let over = Over::Still(Duration::from_secs(9));
        let given_up =
            super::judge(&tests, "rdma", &Outcome { said: "137 500".to_owned(), given_up: Some(over) }, log);
        let why = "given up, for nothing has moved for 9 s; its log ends with \"test result: ok. 4 passed; 0 failed\"";
        assert_eq!(given_up, Verdict::Failed(why.to_owned()));
        assert!(failed("0 5", log), "too few packets");
        assert!(failed("0 500", "test result: ok. 0 passed; 0 failed\n"), "no test");
        for missing in ["no RDMA device", "a_disk_fails, because there is no device mapper", "whatever"] {
            let skipped = format!("SKIPPED: {missing}\n{log}");
            assert!(failed("0 500", &skipped), "a test was left out: {missing}");
        }
        assert!(failed("", log), "garbage");
        let removal = step(Work::Removal { package: "p", filter: "" });
        let log = "test result: ok. 1 passed; 0 failed\n";
        assert!(matches!(judge(&removal, "0 500", log), Verdict::Passed(_)));
        let left_out = judge(&removal, "0 500", &format!("SKIPPED: not set\n{log}"));
        assert!(matches!(left_out, Verdict::Failed(_)), "{left_out:?}");
    }
}
