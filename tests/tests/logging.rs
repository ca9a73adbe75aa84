//! The daemon's log is no condition of service: whatever becomes of stderr, both nodes live, clients are served, and what
//! could not be logged is counted and said. Which words set the log, and which signals a daemon outlives.
//!
//! Each test has a pair of real daemons. Alpha is the one whose stderr fails; beta, its standby, is killed, since a primary
//! that loses its standby says so in its log.

#![forbid(unsafe_code)]

use costandby_tests::pair::{ALPHA, BETA, LIMIT, Pair, Settings, VolumeSettings};
use costandby_tests::process::{Ran, costandby_binary, run};
use costandby_tests::wait_for;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A write that waits for a reader of the log that never reads hangs for good. One that is served takes milliseconds, with
/// all allowance for a busy machine.
const WRITE_P99_MAX: Duration = Duration::from_secs(1);

/// Going on alone takes `peer_timeout`, a second, and what a busy machine adds.
const FIRST_WRITE_ALONE_MAX: Duration = Duration::from_secs(10);

/// A daemon that stops gives its log a second.
const STOP_WITH_STUCK_LOG_MAX: Duration = Duration::from_secs(15);

fn created() -> Pair {
    Pair::create(Settings::new(&[VolumeSettings::new("db", 12)]))
}

/// Starts alpha with `stderr` and `environment`, and beta as ever, and waits until they are in sync.
fn up(pair: &mut Pair, stderr: impl Into<Stdio>, environment: &[(&str, &str)]) {
    let mut command = pair.command(ALPHA);
    command.arg("up").env("COSTANDBY_LOG", "info").envs(environment.iter().copied());
    pair.up_by(ALPHA, command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr));
    // The command holds the caller's end of a pipe.
    drop(command);
    pair.up(BETA);
    pair.wait_in_sync("db");
}

/// Kills the standby, writes on, and expects the primary to live and to stop well.
fn the_primary_outlives_its_standby(pair: &mut Pair) {
    pair.kill(BETA);
    let mut client = pair.client(ALPHA, "db");
    for block in 0..64 {
        client.write(block * 4096, &[7; 4096], false).expect("acknowledged by alpha alone");
    }
    client.flush().expect("a flush by alpha alone");
    pair.wait_status(ALPHA, "db", "alone", |status| status.dirty_bytes > 0);
    pair.assert_alive(ALPHA);
    let mut read = [0; 4096];
    client.read(63 * 4096, &mut read).expect("a read from alpha");
    assert_eq!(read, [7; 4096]);
}

fn lines_dropped(pair: &Pair, node: usize) -> u64 {
    let status: Value = serde_json::from_str(&pair.cli_ok(node, &["status", "--json"])).expect("JSON");
    status["log_lines_dropped"].as_u64().unwrap_or_else(|| panic!("no log_lines_dropped in {status}"))
}

fn signal(pair: &Pair, node: usize, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pair.pid(node)).expect("a pid")).expect("not zero");
    kill_process(pid, signal).expect("our own process");
}

#[test]
fn a_log_whose_reader_has_gone_ends_no_daemon() {
    let mut pair = created();
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    up(&mut pair, writer, &[]);
    // `up 2>&1 | head -1`
    let mut some = [0; 64];
    reader.read_exact(&mut some).expect("the daemon logs");
    drop(reader);
    the_primary_outlives_its_standby(&mut pair);
    assert!(
        lines_dropped(&pair, ALPHA) > 0,
        "alpha logged the loss of its standby, and nobody could read it"
    );
    pair.stop(ALPHA);
}

#[test]
fn a_full_device_under_the_log_ends_no_daemon() {
    let mut pair = created();
    up(&mut pair, File::options().write(true).open("/dev/full").expect("/dev/full"), &[]);
    the_primary_outlives_its_standby(&mut pair);
    assert!(lines_dropped(&pair, ALPHA) > 0);
    pair.stop(ALPHA);
}

/// A log under a limit to the size of files: the write that exceeds it raises SIGXFSZ.
#[test]
fn a_limit_to_the_size_of_files_ends_no_daemon() {
    const LIMIT_LEN: u64 = 1 << 30;
    let mut pair = created();
    let path = pair.path("limited.log");
    let log = File::options().append(true).create_new(true).open(&path).expect("a log");
    // Sparse: the daemon's own files are far below the limit.
    log.set_len(LIMIT_LEN - 100).expect("a sparse file");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -f \"$0\" && exec \"$@\"", &(LIMIT_LEN / 512).to_string()]);
    command.arg(costandby_binary()).arg("--config").arg(pair.config(ALPHA)).args(["--node", "alpha", "up"]);
    pair.up_by(ALPHA, command.env("COSTANDBY_LOG", "info").stdin(Stdio::null()).stderr(log));
    pair.up(BETA);
    pair.wait_in_sync("db");
    the_primary_outlives_its_standby(&mut pair);
    assert!(lines_dropped(&pair, ALPHA) > 0);
    assert!(fs::metadata(&path).expect("the log").len() <= LIMIT_LEN);
    pair.stop(ALPHA);
}

/// A pipe of one page that nobody reads.
fn small_pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).expect("a small pipe");
    (reader, writer)
}

/// Has alpha log lines, at level debug, until it has dropped some.
fn log_until_dropped(pair: &Pair) {
    let since = Instant::now();
    loop {
        for _ in 0..200 {
            // Opening and leaving a volume is a line each.
            drop(pair.client(ALPHA, "db"));
        }
        if lines_dropped(pair, ALPHA) > 0 {
            return;
        }
        assert!(since.elapsed() < LIMIT * 4, "no line was dropped in {:?}", since.elapsed());
    }
}

#[test]
fn a_log_reader_that_is_stuck_holds_nobody_up() {
    let mut pair = created();
    let (mut reader, writer) = small_pipe();
    let environment = [("COSTANDBY_LOG", "trace"), ("COSTANDBY_LOG_FORMAT", "json")];
    up(&mut pair, writer, &environment);
    log_until_dropped(&pair);
    pair.kill(BETA);
    let mut client = pair.client(ALPHA, "db");
    let since = Instant::now();
    client.write(0, &[9; 4096], false).expect("acknowledged by alpha alone");
    assert!(since.elapsed() < FIRST_WRITE_ALONE_MAX, "the first write took {:?}", since.elapsed());
    let mut took: Vec<Duration> = (0..1000)
        .map(|block| {
            let since = Instant::now();
            client.write(block % 256 * 4096, &[9; 4096], false).expect("a write");
            since.elapsed()
        })
        .collect();
    took.sort();
    println!("p50 {:?}, p99 {:?}, slowest {:?}", took[500], took[990], took[999]);
    assert!(took[990] < WRITE_P99_MAX, "p99 {:?}", took[990]);
    pair.assert_alive(ALPHA);

    // The reader comes back: what was queued comes first, then how much is missing, then what is logged from here on.
    let dropped = lines_dropped(&pair, ALPHA);
    let text = std::thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("the log is UTF-8");
        text
    });
    std::thread::sleep(Duration::from_millis(500));
    pair.stop(ALPHA);
    let text = text.join().expect("a reader");
    let lines = json_lines(&text);
    let told: Vec<&Value> = lines.iter().filter(|line| message(line).contains("dropped")).collect();
    let count: u64 =
        told.iter().map(|line| line["fields"]["lines_dropped"].as_u64().expect("a number")).sum();
    assert_eq!(count, dropped, "{told:?}");
    assert!(message(told[0]).contains("because"), "{told:?}");
    let at = |text: &str| lines.iter().position(|line| message(line).contains(text));
    assert!(at("up") < at("dropped") && at("dropped") < at("stopped"), "{:?}", lines.len());
}

#[test]
fn a_stuck_log_does_not_hold_up_the_end() {
    let mut pair = created();
    let (reader, writer) = small_pipe();
    up(&mut pair, writer, &[("COSTANDBY_LOG", "trace")]);
    log_until_dropped(&pair);
    let since = Instant::now();
    pair.stop(ALPHA);
    assert!(since.elapsed() < STOP_WITH_STUCK_LOG_MAX, "took {:?}", since.elapsed());
    drop(reader);
}

fn message(line: &Value) -> &str {
    line["fields"]["message"].as_str().unwrap_or_default()
}

/// Parses a log in JSON, every line of it.
fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| {
            let value: Value =
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line:?}"));
            let level = value["level"].as_str().unwrap_or_default();
            assert!(["ERROR", "WARN", "INFO", "DEBUG", "TRACE"].contains(&level), "{line}");
            for part in ["timestamp", "target"] {
                assert!(value[part].is_string(), "{line} has no {part}");
            }
            assert!(value["fields"]["message"].is_string(), "{line}");
            value
        })
        .collect()
}

#[test]
fn a_log_in_json_is_one_object_a_line() {
    let mut pair = created();
    let path = pair.path("alpha.json");
    let log = File::create(&path).expect("a log");
    up(&mut pair, log, &[("COSTANDBY_LOG", "trace"), ("COSTANDBY_LOG_FORMAT", "json")]);
    // Somebody who is no peer, with words that JSON must escape.
    let mut stranger = std::net::TcpStream::connect(pair.peer_address(ALPHA)).expect("the peers' port");
    stranger.write_all(b"\"\\\n\x1b[31m{}").expect("a stranger may speak");
    drop(stranger);
    the_primary_outlives_its_standby(&mut pair);
    pair.up(BETA);
    pair.wait_in_sync("db");
    pair.stop(ALPHA);
    let lines = json_lines(&fs::read_to_string(&path).expect("the log"));
    for wanted in ["up", "going on without beta", "stopped"] {
        assert!(lines.iter().any(|line| message(line).contains(wanted)), "no line with {wanted:?}");
    }
    let volumes = lines.iter().filter(|line| line["fields"]["volume"] == "db").count();
    assert!(volumes > 0, "fields are there by name");
}

/// `costandby up` with these two variables, which it refuses.
fn refused(pair: &Pair, variables: &[(&str, &str)]) -> Ran {
    let ran = run(pair.command(ALPHA).arg("up").envs(variables.iter().copied()));
    assert_eq!(ran.status.code(), Some(2), "{variables:?}: {}{}", ran.stdout, ran.stderr);
    assert_eq!(ran.stderr.lines().count(), 1, "{variables:?}: {}", ran.stderr);
    ran
}

#[test]
fn a_word_that_sets_no_log_is_refused_with_those_that_do() {
    let pair = created();
    for (word, suggested) in [
        ("warning", Some("warn")),
        ("inf", Some("info")),
        ("off", None),
        ("3", None),
        ("info,costandby_datapath=loud", None),
        ("costandby_datapth=debug", Some("costandby_datapath")),
        ("costandby_datapath", None),
    ] {
        let stderr = refused(&pair, &[("COSTANDBY_LOG", word)]).stderr;
        for valid in ["COSTANDBY_LOG", "error, warn, info, debug or trace", "costandby_datapath=debug"] {
            assert!(stderr.contains(valid), "{word:?}: {stderr}");
        }
        if let Some(suggested) = suggested {
            assert!(stderr.contains(&format!("did you mean `{suggested}`")), "{word:?}: {stderr}");
        }
    }
    // The demo's daemons would refuse it.
    let ran =
        run(Command::new(costandby_binary()).args(["demo", "--seconds", "1"]).env("COSTANDBY_LOG", "inf"));
    assert!(ran.status.code() == Some(2) && ran.stderr.contains("did you mean `info`"), "{}", ran.stderr);
    let stderr = refused(&pair, &[("COSTANDBY_LOG_FORMAT", "xml")]).stderr;
    assert!(stderr.contains("COSTANDBY_LOG_FORMAT") && stderr.contains("text or json"), "{stderr}");
}

/// Set to nothing is as not set; a level for one module leaves the others at info.
#[test]
fn no_accepted_word_silences_the_log() {
    let mut pair = created();
    for (value, debug) in [
        ("", false),
        ("INFO", false),
        ("costandby_datapath=debug", true),
        ("warn,costandby_control=info", false),
    ] {
        let log = pair.path("words.log");
        let file = File::create(&log).expect("a log");
        let mut command = pair.command(ALPHA);
        command.arg("up").env("COSTANDBY_LOG", value).env("COSTANDBY_LOG_FORMAT", "");
        pair.up_by(ALPHA, command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file));
        // A standby that waits for its peer refuses clients; opening a volume there is a line at debug, if any.
        drop(pair.connect(ALPHA, "db"));
        pair.stop(ALPHA);
        let text = fs::read_to_string(&log).expect("the log");
        assert!(text.contains("up") && text.contains("stopped"), "{value:?}: {text}");
        assert!(text.contains("INFO costandby_control"), "{value:?}: {text}");
        if !debug {
            assert!(!text.contains("DEBUG"), "{value:?}: {text}");
        }
    }
}

#[test]
fn descriptors_that_were_closed_at_the_start_go_to_no_disk_and_no_socket() {
    let mut pair = created();
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" <&- >&- 2>&-", "sh"]).arg(costandby_binary());
    command.arg("--config").arg(pair.config(ALPHA)).args(["--node", "alpha", "up"]);
    pair.up_by(ALPHA, &mut command);
    pair.up(BETA);
    pair.wait_in_sync("db");
    for descriptor in 0..3 {
        let link = format!("/proc/{}/fd/{descriptor}", pair.pid(ALPHA));
        let target = fs::read_link(&link).unwrap_or_else(|error| panic!("{link}: {error}"));
        assert_eq!(target.to_str(), Some("/dev/null"), "{link}");
    }
    the_primary_outlives_its_standby(&mut pair);
    pair.stop(ALPHA);
}

/// A mask of /proc/PID/status.
fn signals(pair: &Pair, node: usize, mask: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/status", pair.pid(node))).expect("a status");
    let line = text.lines().find_map(|line| line.strip_prefix(mask)).expect("a mask");
    u64::from_str_radix(line.trim(), 16).expect("hexadecimal")
}

#[test]
fn signals_that_ask_for_nothing_end_no_daemon() {
    let mut pair = created();
    pair.up(ALPHA);
    pair.up(BETA);
    pair.wait_in_sync("db");
    let mut client = pair.client(ALPHA, "db");
    let others = [
        Signal::HUP,
        Signal::USR1,
        Signal::USR2,
        Signal::PIPE,
        Signal::ALARM,
        Signal::VTALARM,
        Signal::PROF,
        Signal::IO,
        Signal::POWER,
        Signal::XCPU,
        Signal::XFSZ,
    ];
    for other in others {
        for node in [ALPHA, BETA] {
            signal(&pair, node, other);
        }
        client.write(0, &[3; 4096], true).unwrap_or_else(|error| panic!("{other:?}: {error}"));
    }
    pair.wait_log(ALPHA, &["SIGHUP", "reload"]);
    let kept = signals(&pair, ALPHA, "SigIgn:") | signals(&pair, ALPHA, "SigCgt:");
    // TTOU: written output of a background job would otherwise stop the daemon.
    for number in [1, 10, 12, 13, 14, 16, 22, 24, 25, 26, 27, 29, 30].into_iter().chain(34..=64) {
        assert!(kept & (1 << (number - 1)) != 0, "signal {number} has its default action: {kept:x}");
    }
    for node in [ALPHA, BETA] {
        pair.assert_alive(node);
    }
    pair.settle_and_compare("db");
    // Again and again while it stops: still a clean end.
    drop(client);
    for wave in 0..3 {
        for other in [Signal::TERM, Signal::INT, Signal::HUP] {
            if wave == 0 || fs::exists(format!("/proc/{}", pair.pid(ALPHA))).unwrap_or(false) {
                signal(&pair, ALPHA, other);
            }
        }
    }
    pair.stop(ALPHA);
    assert_eq!(pair.log(ALPHA).matches("stopping").count(), 1, "{}", pair.log(ALPHA));
    let text = pair.cli_ok(ALPHA, &["dump-metadata", "db", "--json"]);
    let metadata: Value = serde_json::from_str(&text).expect("JSON");
    let superblocks = metadata["volumes"][0]["superblocks"].as_array().expect("superblocks");
    let flags = superblocks.iter().map(|superblock| superblock["flags"].as_array().expect("flags"));
    assert!(flags.into_iter().all(|flags| flags.contains(&"clean".into())), "{text}");
}

/// `log-panic` sets the log up as a daemon does and panics.
fn panics(how: &str, stderr: impl Into<Stdio>) -> Duration {
    let since = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_log-panic"))
        .arg(how)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .expect("log-panic starts");
    let status = wait_for("log-panic ends", LIMIT, || child.try_wait().expect("a child can be asked"));
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(status.signal(), Some(6), "{how}: {status}: aborted");
    since.elapsed()
}

#[test]
fn a_panic_is_told_and_ends_the_process_whatever_stderr_is() {
    for (how, json) in [("logging", false), ("json", true), ("bare", false)] {
        let file = tempfile::NamedTempFile::new().expect("a file");
        panics(how, file.reopen().expect("a file"));
        let text = fs::read_to_string(file.path()).expect("text");
        for wanted in ["the cause of it", "log-panic.rs:", "worker", "internal error", "please report"] {
            assert!(text.contains(wanted), "{how}: {wanted:?} is not in {text}");
        }
        if json {
            json_lines(&text);
        }
        if how != "bare" {
            assert!(text.find("a line before") < text.find("the cause of it"), "in order: {text}");
            assert!(text.contains("a line before"), "{text}");
        }
    }
    for how in ["logging", "json", "bare"] {
        let (reader, mut writer) = small_pipe();
        writer.write_all(&[b'x'; 4096]).expect("fills the pipe");
        let took = panics(how, writer);
        assert!(took < Duration::from_secs(10), "{how}: a stuck reader: {took:?}");
        drop(reader);
        let (reader, writer) = small_pipe();
        drop(reader);
        panics(how, writer);
        panics(how, File::options().write(true).open("/dev/full").expect("/dev/full"));
        let (_kept, socket) = UnixStream::pair().expect("a socket pair");
        panics(how, OwnedFd::from(socket));
    }
}
