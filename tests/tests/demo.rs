//! `costandby demo` as a user runs it: the good case, a survivor whose disk is damaged on purpose, and an interrupt.
//!
//! Each run has a directory of its own and an end: the demo bounds its own waits, and a run that outlives [`RUN_MAX`] is
//! killed and fails the test.

#![forbid(unsafe_code)]

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A run takes some ten seconds; on a busy machine several times that.
const RUN_MAX: Duration = Duration::from_secs(240);

const PAUSE: Duration = Duration::from_millis(20);

struct Run {
    dir: tempfile::TempDir,
    child: Child,
}

impl Run {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let child = Command::new(costandby_tests::process::costandby_binary())
            .args(["demo", "--seconds", "1", "--json"])
            .env("TMPDIR", dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the demo starts");
        Self { dir, child }
    }

    /// Lets it run to its end, calling `meanwhile` with the demo's directory all the time.
    fn finish(mut self, mut meanwhile: impl FnMut(&Path)) -> (Output, tempfile::TempDir) {
        let started = Instant::now();
        while self.child.try_wait().expect("our child").is_none() {
            if started.elapsed() > RUN_MAX {
                self.child.kill().expect("our child");
                panic!("the demo did not end within {RUN_MAX:?}");
            }
            if let Some(dir) = self.demo_dir() {
                meanwhile(&dir);
            }
            std::thread::sleep(PAUSE);
        }
        (self.child.wait_with_output().expect("its output"), self.dir)
    }

    fn demo_dir(&self) -> Option<PathBuf> {
        entries(self.dir.path()).into_iter().next()
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).expect("readable").map(|entry| entry.expect("an entry").path()).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The one object on stdout.
fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}\n{}", text(&output.stdout), text(&output.stderr)))
}

/// Processes whose command line names `dir`.
fn processes_of(dir: &Path) -> Vec<String> {
    let name = dir.display().to_string();
    let processes = fs::read_dir("/proc").expect("a Linux machine").filter_map(Result::ok);
    let lines = processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.map(|line| text(&line)).filter(|line| line.contains(&name)).collect()
}

#[test]
fn a_killed_primary_loses_nothing_and_leaves_nothing() {
    let (output, dir) = Run::start().finish(|_| ());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report = report(&output);
    assert_eq!(report["link"], "tcp");
    assert_eq!(report["lost_writes"], 0);
    assert_eq!(report["torn_blocks"], 0);
    assert_eq!(report["identical"], true);
    for name in
        ["acked_writes", "takeover_ms", "write_p50_us", "write_p99_us", "unacked_at_kill", "resync_seconds"]
    {
        assert!(report[name].as_f64().is_some_and(|value| value > 0.0), "{name} in {report}");
    }
    assert_eq!(entries(dir.path()), Vec::<PathBuf>::new(), "the directory is removed");
}

#[test]
fn a_damaged_survivor_is_found_out() {
    let garbage = [0xa5; 1 << 20];
    let damage = |dir: &Path| {
        // Before it is made there is nothing to damage.
        if let Ok(disk) = File::options().write(true).open(dir.join("beta/one.img")) {
            disk.write_all_at(&garbage, 2 << 20).expect("written");
        }
    };
    let (output, dir) = Run::start().finish(damage);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stdout));
    let report = report(&output);
    assert!(report["torn_blocks"].as_u64().is_some_and(|count| count > 0), "{report}");
    let complaint = text(&output.stderr);
    let last = complaint.lines().last().unwrap_or_default();
    assert!(
        last.starts_with("costandby: demo: ") && last.contains("torn") && last.contains("one"),
        "{complaint}"
    );
    let kept = entries(dir.path());
    assert_eq!(kept.len(), 1, "the directory is kept");
    assert!(last.contains(&kept[0].display().to_string()), "{last}");
    assert!(kept[0].join("beta.log").exists());
}

#[test]
fn an_interrupt_ends_the_daemons_too() {
    let mut pid = None;
    let run = Run::start();
    pid.replace(Pid::from_child(&run.child));
    let (output, dir) = run.finish(|dir| {
        let both_up = dir.join("alpha.nbd").exists() && dir.join("beta.nbd").exists();
        if let Some(pid) = pid.take_if(|_| both_up) {
            kill_process(pid, Signal::INT).expect("the demo runs");
        }
    });
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("interrupted"), "{}", text(&output.stderr));
    assert_eq!(processes_of(dir.path()), Vec::<String>::new());
    assert_eq!(entries(dir.path()), Vec::<PathBuf>::new(), "an interrupted demo keeps nothing");
}
