//! What a command does when nobody takes what it prints: a closed pipe is no error and changes no exit status, a full
//! device is an error of one line. Never a panic.

#![forbid(unsafe_code)]

use costandby_tests::pair::{ALPHA, BETA, LIMIT, Pair, Settings, VolumeSettings};
use costandby_tests::wait_for;
use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};

/// Commands that only look, with the exit status of each when its output is read.
const LOOKS: [&[&str]; 14] = [
    &["status"],
    &["status", "--json"],
    &["dump-metadata"],
    &["dump-metadata", "--json"],
    &["wait-sync", "db"],
    &["verify", "db"],
    &["verify", "db", "--json"],
    &["--help"],
    &["help", "promote"],
    &["promote", "--help"],
    &["--version"],
    &["-V"],
    &["completions", "bash"],
    &["doctor"],
];

/// Exit status and stderr of a command whose standard output is `stdout`.
fn outcome(command: &mut Command, stdout: impl Into<Stdio>) -> (Option<i32>, String) {
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let mut child =
        command.stdin(Stdio::null()).stdout(stdout).stderr(writer).spawn().expect("costandby starts");
    // The command holds the other ends of both pipes.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let status = wait_for("the command ends", LIMIT * 2, || child.try_wait().expect("a child can be asked"));
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("UTF-8");
    assert!(!text.contains("panicked"), "{command:?}: {text}");
    (status.code(), text)
}

fn full() -> File {
    File::options().write(true).open("/dev/full").expect("/dev/full")
}

/// A pipe whose reader is gone.
fn gone() -> std::io::PipeWriter {
    std::io::pipe().expect("a pipe").1
}

fn with<'a>(pair: &Pair, node: usize, args: impl IntoIterator<Item = &'a &'a str>) -> Command {
    let mut command = pair.command(node);
    command.args(args);
    command
}

/// A full device: status 1 and one line that says so.
fn assert_told_full(command: &mut Command) {
    let (status, text) = outcome(command, full());
    assert_eq!(status, Some(1), "{command:?}: {text}");
    let told = text.starts_with("costandby: ") && text.contains("No space left on device");
    assert!(told && text.lines().count() == 1, "{command:?}: {text:?}");
}

#[test]
fn nobody_reads_what_a_command_prints() {
    let pair = Pair::start(Settings::new(&[VolumeSettings::new("db", 12)]));
    for args in LOOKS {
        let read = outcome(&mut with(&pair, ALPHA, args), Stdio::null());
        let closed = outcome(&mut with(&pair, ALPHA, args), gone());
        assert_eq!(closed, read, "{args:?}: a closed pipe changes nothing");
        assert_told_full(&mut with(&pair, ALPHA, args));
        // Both closed from the start: they are /dev/null then, and nothing else happens.
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec \"$@\" >&- 2>&-", "sh"]).arg(costandby_tests::process::costandby_binary());
        shell.arg("--config").arg(pair.config(ALPHA)).args(["--node", "alpha"]).args(args);
        assert_eq!(outcome(&mut shell, Stdio::null()).0, read.0, "{args:?}: descriptors closed");
    }
}

/// What was asked for is done although its answer could not be printed, and the line says so.
#[test]
fn a_command_is_carried_out_although_its_answer_cannot_be_printed() {
    let pair = Pair::start(Settings::new(&[VolumeSettings::new("db", 12)]));
    for (args, carried_out) in [(["disconnect", "db"], "disconnected"), (["connect", "db"], "connected")] {
        let (status, text) = outcome(&mut with(&pair, BETA, &args), full());
        assert_eq!(status, Some(1), "{args:?}: {text}");
        assert!(text.contains("was carried out") && text.lines().count() == 1, "{args:?}: {text:?}");
        pair.wait_status(BETA, "db", carried_out, |status| {
            (status.connection == "connected") == (carried_out == "connected")
        });
    }
}

#[test]
fn disks_are_made_although_that_cannot_be_printed() {
    let pair = Pair::create(Settings::new(&[VolumeSettings::new("db", 4), VolumeSettings::new("web", 4)]));
    for (name, node) in [("db", ALPHA), ("web", BETA)] {
        for suffix in ["", ".meta"] {
            let disk = pair.disk(node, name);
            std::fs::remove_file(format!("{}{suffix}", disk.display())).expect("a disk of ours");
        }
    }
    // One volume of each node is left, which `create` refuses to make again.
    let (status, text) = outcome(&mut with(&pair, ALPHA, &["create", "db"]), gone());
    assert_eq!((status, text.as_str()), (Some(0), ""));
    assert!(pair.disk(ALPHA, "db").exists());
    let (status, text) = outcome(&mut with(&pair, BETA, &["create", "web"]), full());
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("the disks were made") && text.lines().count() == 1, "{text:?}");
    assert!(pair.disk(BETA, "web").exists());
}

/// A difference that nobody reads of is a failure all the same: `costandby verify db | true` with `pipefail`.
#[test]
fn a_closed_pipe_hides_no_failure() {
    let pair = Pair::create(Settings::new(&[VolumeSettings::new("db", 4)]));
    std::fs::write(pair.metadata(ALPHA, "db"), vec![0xa5; 64 << 10]).expect("metadata to damage");
    let args = ["dump-metadata", "db"];
    let read = outcome(&mut with(&pair, ALPHA, &args), Stdio::null());
    assert_eq!(read.0, Some(1), "damaged metadata: {}", read.1);
    assert_eq!(outcome(&mut with(&pair, ALPHA, &args), gone()), read);
}

#[test]
fn nobody_reads_what_the_demo_prints() {
    let dir = tempfile::tempdir().expect("a directory");
    let demo = || {
        let mut command = Command::new(costandby_tests::process::costandby_binary());
        command.args(["demo", "--seconds", "1", "--link", "tcp"]).env("TMPDIR", dir.path());
        command
    };
    let (status, text) = outcome(&mut demo(), gone());
    assert_eq!(status, Some(0), "{text}");
    let (status, text) = outcome(&mut demo(), full());
    assert_eq!(status, Some(1), "{text}");
    let last = text.lines().last().unwrap_or_default();
    assert!(last.contains("No space left on device"), "{text}");
}
