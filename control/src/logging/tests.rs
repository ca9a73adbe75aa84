//! The queue with writers that fail, tear lines and block; the words that set a log.

use super::line;
use super::queue::Log;
use super::*;
use serde_json::Value;
use std::ffi::OsStr;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;
use tracing::Level;

/// Long enough for a busy machine, short enough for a test that fails.
const LIMIT: Duration = Duration::from_secs(20);

/// What a [`Scripted`] writer does next, in order; then it takes everything.
#[derive(Clone, Copy)]
enum Act {
    Fail(io::ErrorKind),
    /// Takes this many bytes of one write.
    Take(usize),
}

#[derive(Default)]
struct State {
    acts: Vec<Act>,
    blocked: bool,
    /// A write is waiting.
    waits: bool,
    written: Vec<u8>,
}

/// A writer whose other end is in a test's hand.
#[derive(Clone, Default)]
struct Scripted(Arc<(Mutex<State>, Condvar)>);

impl Scripted {
    fn with(acts: &[Act]) -> Self {
        let scripted = Self::default();
        scripted.0.0.lock().unwrap().acts = acts.iter().rev().copied().collect();
        scripted
    }

    fn block(&self, blocked: bool) {
        self.0.0.lock().unwrap().blocked = blocked;
        self.0.1.notify_all();
    }

    fn wait_until_a_write_waits(&self) {
        let state = self.0.0.lock().unwrap();
        let (state, _) = self.0.1.wait_timeout_while(state, LIMIT, |state| !state.waits).unwrap();
        assert!(state.waits, "no write within {LIMIT:?}");
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.0.lock().unwrap().written.clone()).unwrap()
    }
}

impl Write for Scripted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.0.lock().unwrap();
        state.waits = true;
        self.0.1.notify_all();
        let mut state = self.0.1.wait_while(state, |state| state.blocked).unwrap();
        state.waits = false;
        let len = match state.acts.pop() {
            Some(Act::Fail(kind)) => return Err(kind.into()),
            Some(Act::Take(len)) => len,
            None => bytes.len(),
        };
        state.written.extend_from_slice(&bytes[..len]);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn log(output: &Scripted, format: Format, lines_max: usize, len_max: usize) -> Log {
    Log::start(output.clone(), format, lines_max, len_max).expect("a thread")
}

/// Without the time at the start of lines the log makes itself.
fn lines(output: &Scripted) -> Vec<String> {
    output
        .text()
        .lines()
        .map(|line| line.split_once("  WARN").map_or(line, |(_, rest)| rest).to_owned())
        .collect()
}

#[test]
fn a_write_that_fails_costs_its_line_and_the_next_one_says_so() {
    let full = Act::Fail(io::ErrorKind::StorageFull);
    // The line, the note before the second line, the note before the third.
    let output = Scripted::with(&[full, full]);
    let log = log(&output, Format::Text, 16, 1 << 20);
    for line in ["a\n", "b\n", "c\n"] {
        log.queue().push(line.as_bytes());
    }
    log.finish(LIMIT);
    let lines = lines(&output);
    assert_eq!(log.queue().lines_dropped(), 2, "{lines:?}");
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(
        lines[0].contains("2 lines of this log were dropped, because it could not be written: "),
        "{lines:?}"
    );
    assert_eq!(lines[1], "c");
}

#[test]
fn a_line_that_was_torn_does_not_spoil_the_next() {
    let output = Scripted::with(&[Act::Take(2), Act::Fail(io::ErrorKind::StorageFull)]);
    let log = log(&output, Format::Text, 16, 1 << 20);
    log.queue().push(b"abcd\n");
    log.queue().push(b"efgh\n");
    log.finish(LIMIT);
    let lines = lines(&output);
    assert_eq!((lines[0].as_str(), lines.last().map(String::as_str)), ("ab", Some("efgh")), "{lines:?}");
    assert!(lines[1].contains("1 line of this log was dropped"), "{lines:?}");
    let output = Scripted::with(&[Act::Take(2), Act::Fail(io::ErrorKind::Interrupted), Act::Take(1)]);
    let log = self::log(&output, Format::Text, 16, 1 << 20);
    log.queue().push(b"abcd\n");
    log.finish(LIMIT);
    assert_eq!(output.text(), "abcd\n", "written in pieces, interrupted");
}

#[test]
fn a_full_queue_drops_and_says_so_where_the_lines_are_missing() {
    let output = Scripted::default();
    output.block(true);
    let log = log(&output, Format::Json, 4, 1 << 20);
    let queue = log.queue();
    let push = |number: usize| queue.push(format!("{{\"number\":{number}}}\n").as_bytes());
    push(0);
    output.wait_until_a_write_waits();
    let since = Instant::now();
    // Four find room, six do not.
    (1..11).for_each(push);
    assert!(since.elapsed() < Duration::from_secs(1), "logging waited: {:?}", since.elapsed());
    assert_eq!(queue.lines_dropped(), 6);
    assert!(queue.is_dropping());
    output.block(false);
    log.finish(LIMIT);
    assert!(!queue.is_dropping(), "all is told");
    push(11);
    log.finish(LIMIT);
    let text = output.text();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let numbers: Vec<_> = lines.iter().map(|line| line["number"].as_u64()).collect();
    let expected: Vec<_> = [0, 1, 2, 3, 4].map(Some).into_iter().chain([None, Some(11)]).collect();
    assert_eq!(numbers, expected, "{text}");
    let note = &lines[5];
    assert_eq!(note["fields"]["lines_dropped"], 6, "{note}");
    assert_eq!(note["level"], "WARN");
    assert!(
        note["fields"]["message"].as_str().unwrap().contains("because it was read more slowly"),
        "{note}"
    );
    assert!(note["timestamp"].as_str().unwrap().contains('T') && note["target"].is_string(), "{note}");
}

#[test]
fn the_queue_is_bounded_in_bytes_too() {
    let output = Scripted::default();
    output.block(true);
    let log = log(&output, Format::Text, 1000, 100);
    let queue = log.queue();
    queue.push(&[b'x'; 60]);
    output.wait_until_a_write_waits();
    queue.push(&[b'y'; 60]);
    queue.push(&[b'z'; 30]);
    queue.push(&[b'w'; 101]);
    assert_eq!(queue.lines_dropped(), 2, "60 more and 101 exceed 100");
    output.block(false);
    log.finish(LIMIT);
    queue.push(&[b'v'; 60]);
    log.finish(LIMIT);
    assert_eq!(queue.lines_dropped(), 2, "what was written makes room");
}

#[test]
fn a_writer_that_is_stuck_is_not_waited_for() {
    let output = Scripted::default();
    output.block(true);
    let log = log(&output, Format::Text, 4, 1 << 20);
    for _ in 0..10 {
        log.queue().push(b"x\n");
    }
    let since = Instant::now();
    log.finish(Duration::from_millis(200));
    log.queue().send_last(b"the end\n".to_vec(), Duration::from_millis(200));
    assert!(since.elapsed() < Duration::from_secs(5), "took {:?}", since.elapsed());
    output.block(false);
}

#[test]
fn a_log_that_can_be_written_again_says_what_is_missing_at_its_end() {
    let output = Scripted::with(&[Act::Fail(io::ErrorKind::StorageFull)]);
    let log = log(&output, Format::Text, 16, 1 << 20);
    log.queue().push(b"lost\n");
    // Nothing else is logged.
    log.finish(LIMIT);
    assert!(output.text().contains("1 line of this log was dropped"), "{}", output.text());
}

#[test]
fn a_panic_in_json_is_one_line() {
    let text = line::panic(Format::Json, "reactor", "a.rs:1:2", "left\nright", Some("0: main"));
    let value: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(text.lines().count(), 1);
    assert_eq!((&value["level"], &value["fields"]["thread"]), (&"ERROR".into(), &"reactor".into()));
}

/// Whether `filter` lets an event of `target` and `level` pass.
fn passes(filter: &str, target: &str, level: Level) -> bool {
    let settings = Settings::parse(OsStr::new(filter), OsStr::new("")).expect("valid");
    settings.filter.would_enable(target, &level)
}

#[test]
fn words_that_set_the_log() {
    for (filter, most) in [
        ("", Level::INFO),
        ("  ", Level::INFO),
        (",", Level::INFO),
        ("error", Level::ERROR),
        ("warn", Level::WARN),
        ("Info", Level::INFO),
        ("DEBUG", Level::DEBUG),
        ("trace", Level::TRACE),
    ] {
        for level in [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE] {
            assert_eq!(passes(filter, "costandby_control::node", level), level <= most, "{filter:?} {level}");
        }
    }
    let one = "costandby_datapath::reactor=debug";
    assert!(passes(one, "costandby_datapath::reactor", Level::DEBUG));
    assert!(!passes(one, "costandby_datapath::volume", Level::DEBUG));
    assert!(passes(one, "costandby_control", Level::INFO), "the others stay at info");
    let quiet = "warn, costandby_datapath = debug";
    assert!(Settings::parse(OsStr::new(quiet), OsStr::new("")).is_err(), "no blanks around =");
    let quiet = "warn, costandby_datapath=debug";
    assert!(!passes(quiet, "costandby_control", Level::INFO));
    assert!(passes(quiet, "costandby_datapath", Level::DEBUG));
}

#[test]
fn words_that_are_refused() {
    use std::os::unix::ffi::OsStrExt;
    let error = |filter: &OsStr, format: &str| {
        Settings::parse(filter, OsStr::new(format)).expect_err("refused").to_string()
    };
    for (filter, meant) in [
        ("warning", "`warn`"),
        ("err", "`error`"),
        ("inf", "`info`"),
        ("ifno", "`info`"),
        ("tarce", "`trace`"),
    ] {
        let text = error(OsStr::new(filter), "");
        assert!(text.contains(&format!("(did you mean {meant}?); valid are")), "{filter}: {text}");
    }
    for filter in ["off", "costandby_control=none"] {
        let text = error(OsStr::new(filter), "");
        assert!(text.contains("`error` is the quietest"), "{filter}: {text}");
    }
    for filter in [
        "off",
        "none",
        "x",
        "info;debug",
        "=debug",
        "hyper=debug",
        "costandby_control=",
        "costandby_control",
        "2",
    ] {
        let text = error(OsStr::new(filter), "");
        assert!(
            text.contains("error, warn, info, debug or trace") && !text.contains('\n'),
            "{filter}: {text}"
        );
    }
    error(OsStr::from_bytes(b"\xff"), "");
    assert!(error(OsStr::new(""), "yaml").contains("text or json"));
}
