//! The daemon's log: formats a line where it is logged, queues it, and has a thread of its own write it to stderr.
//!
//! `costandby up` calls [`start`] once, before anything else. From then on every `tracing` event of this process becomes a
//! line of the [`queue`]; the only code that writes to stderr is that queue's thread, and the last words of a process that
//! [panics](end_on_panic) or cannot start ([`say_within`]), with a limit to their time.
//!
//! Invariants: whoever logs never waits for the log and never learns that it failed; the queue is bounded in lines and in
//! bytes; a line that could not be queued or written is counted ([`lines_dropped`]) and its loss is said in the log, in
//! place, as soon as the log can be written again; a panic waits for stderr for [`END_MAX`] at most, then the process ends.
//!
//! Survives: a stderr that is closed, full, or a pipe whose reader is gone, stuck or slow.
//!
//! Why not `tracing-appender`: its bounded, lossy writer does the same for a slow reader, but it counts no line that could
//! not be written and says nothing of lost ones; its guard *prints to stdout* when the reader is stuck at the end, which
//! panics where stdout is closed; and it brings `time` for its files by date. What is left of it is a thread around a
//! channel of `crossbeam-channel`, which is a dependency already.
//!
//! `tracing-subscriber` itself prints to stderr when its writer fails, and so panics where that fails as well. Ours never
//! fails, and its printing is switched off on top.

use queue::{Log, Queue};
use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, IsTerminal};
use std::panic::PanicHookInfo;
use std::sync::OnceLock;
use std::time::Duration;
use tracing_subscriber::Layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

mod line;
mod queue;
mod settings;
#[cfg(test)]
mod tests;

pub use settings::{Format, Settings, SettingsError};

/// Lines that wait for stderr. A node of 1,000 volumes logs three lines a volume when its peer comes or goes; a reader that is
/// only slow shall lose none of them.
const QUEUE_LINES_MAX: usize = 4096;

/// Bytes that wait for stderr: ten times what that many ordinary lines have. It binds only when lines are very long, as
/// what a peer says may be.
const QUEUE_LEN_MAX: usize = 4 << 20;

/// How long a daemon that stops waits for its log: what is queued is written in milliseconds if it can be written at all, and
/// whoever stops a daemon waits for this.
const FINISH_MAX: Duration = Duration::from_secs(1);

/// How long a process that panicked may live on to say so: its disks are not served meanwhile, and a restart is.
pub const END_MAX: Duration = Duration::from_secs(1);

/// The log of this process, once it has one.
static QUEUE: OnceLock<Queue> = OnceLock::new();

/// The log, until this is dropped: then what is queued is written, for [`FINISH_MAX`] at most.
#[derive(Debug)]
#[must_use = "dropping it ends the log"]
pub struct Guard(Log);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.finish(FINISH_MAX);
    }
}

/// Sends all events of this process to stderr from here on. Coloured where `colours` says so and the lines are text.
///
/// # Errors
/// When the thread cannot be had, or where the process logs already.
pub fn start(settings: Settings, colours: bool) -> io::Result<Guard> {
    let Settings { filter, format } = settings;
    let log = Log::start(Stderr, format, QUEUE_LINES_MAX, QUEUE_LEN_MAX)?;
    let queue = log.queue();
    let layer = tracing_subscriber::fmt::layer().with_writer(queue.clone()).log_internal_errors(false);
    let layer = match format {
        Format::Text => layer.with_ansi(colours).boxed(),
        Format::Json => layer.with_ansi(false).json().with_current_span(false).with_span_list(false).boxed(),
    };
    let subscriber = tracing_subscriber::registry().with(layer.with_filter(filter));
    subscriber.try_init().map_err(|error| io::Error::other(error.to_string()))?;
    // Only one caller gets past `try_init`.
    let _ = QUEUE.set(queue);
    Ok(Guard(log))
}

/// Lines of this process's log that could not be queued or written, since it began. 0 where it has none.
#[must_use]
pub fn lines_dropped() -> u64 {
    QUEUE.get().map_or(0, Queue::lines_dropped)
}

/// Whether lines of this process's log are missing and the log does not say so yet, for it cannot be written.
#[must_use]
pub fn is_dropping() -> bool {
    QUEUE.get().is_some_and(Queue::is_dropping)
}

/// Whether stderr is a terminal.
#[must_use]
pub fn is_terminal() -> bool {
    io::stderr().is_terminal()
}

/// Writes `text` to stderr, past the log; gives up after `limit`, when stderr is a pipe whose reader is stuck.
pub fn say_within(text: String, limit: Duration) {
    let (done, written) = crossbeam_channel::bounded(1);
    // A thread that cannot be had leaves nobody to wait for.
    let spawned = std::thread::Builder::new().name("last words".into()).spawn(move || {
        let _ = queue::write_all(&mut Stderr, text.as_bytes());
        let _ = done.send(());
    });
    if spawned.is_ok() {
        let _ = written.recv_timeout(limit);
    }
}

/// From here on a panic of any thread is told on stderr, if that can be done within [`END_MAX`], and ends the process: a
/// controller or reactor that breaks its own invariants must not serve on.
pub fn end_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        tell_panic(info);
        std::process::abort();
    }));
}

fn tell_panic(info: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("<unnamed>").to_owned();
    let payload = info.payload();
    let message = payload.downcast_ref::<&str>().copied();
    let message =
        message.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    let place = info.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
    // Captured where RUST_BACKTRACE asks for it.
    let backtrace = Backtrace::capture();
    let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| backtrace.to_string());
    // The log's own thread cannot wait for itself.
    let queue = QUEUE.get().filter(|queue| !queue.is_own_thread());
    let format = queue.map_or(Format::Text, Queue::format);
    let text = line::panic(format, &thread, &place, message, backtrace.as_deref());
    match queue {
        // Behind what is queued, so that the lines before it are there.
        Some(queue) => queue.send_last(text.into_bytes(), END_MAX),
        None => say_within(text, END_MAX),
    }
}

/// The descriptor, without std's buffer and lock: whoever held that lock while stuck would hold up all others, and std takes
/// a closed stderr for one that took everything. Rust opens /dev/null at the start for a descriptor 0 to 2 that is closed,
/// so this is never a disk or a socket.
struct Stderr;

impl io::Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        match rustix::io::write(&stderr, bytes) {
            // Others that share the descriptor may have set it to non-blocking. The one who waits is the log's thread.
            Err(rustix::io::Errno::AGAIN) => {
                let mut room = [rustix::event::PollFd::new(&stderr, rustix::event::PollFlags::OUT)];
                rustix::event::poll(&mut room, None)?;
                Err(io::ErrorKind::Interrupted.into())
            }
            written => Ok(written?),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
