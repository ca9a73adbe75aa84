//! The bounded queue between whoever logs and the thread that writes.
//!
//! [`Queue::push`] is what logging costs its caller: a copy of the line and a `try_send`. The thread, [`Writer::run`], tries
//! each line once, so that a log that fails at once costs one failed write a line and no more.
//!
//! Invariants: `push` does not wait; lines keep their order; a line is written, counted as dropped, or queued; a note of how
//! many are missing stands where they are missing, before any later line.
//!
//! Survives: a writer that fails or blocks for good.

use super::line;
use super::settings::Format;
use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender};
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::ThreadId;
use std::time::{Duration, Instant};
use tracing_subscriber::fmt::MakeWriter;

/// Between two tries to say that lines are missing, where nothing else is logged meanwhile: often enough for a person who
/// made room on a file system, and one failed system call.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// What the thread is given.
enum Message {
    /// A line, and how many were dropped right before it for want of room.
    Line { dropped_before: u64, bytes: Vec<u8> },
    /// Say so when all before this was tried.
    Sync(Sender<()>),
}

/// What the callers and the thread both know.
#[derive(Debug, Default)]
struct Counters {
    /// Lines that were not queued or not written.
    dropped: AtomicU64,
    /// Those of them that found no room, and that no message has told the thread of.
    unqueued: AtomicU64,
    /// The thread knows of missing lines that the log says nothing of yet, for it cannot be written.
    untold: AtomicBool,
    /// Bytes in the queue.
    queued_len: AtomicUsize,
}

/// Where lines are put. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    sender: Sender<Message>,
    counters: Arc<Counters>,
    len_max: usize,
    format: Format,
    thread: ThreadId,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Line { .. } => "Line",
            Self::Sync(_) => "Sync",
        })
    }
}

impl Queue {
    /// Queues a line, or counts it as dropped. Does not wait.
    pub(super) fn push(&self, bytes: &[u8]) {
        let counters = &*self.counters;
        let dropped_before = counters.unqueued.swap(0, Ordering::Relaxed);
        let len = bytes.len();
        let room = counters.queued_len.fetch_add(len, Ordering::Relaxed).saturating_add(len) <= self.len_max;
        let message = || Message::Line { dropped_before, bytes: bytes.to_vec() };
        if !room || self.sender.try_send(message()).is_err() {
            counters.queued_len.fetch_sub(len, Ordering::Relaxed);
            counters.unqueued.fetch_add(dropped_before + 1, Ordering::Relaxed);
            counters.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Queues what must be told before the process ends, and waits until it was tried, `limit` at most.
    pub(super) fn send_last(&self, bytes: Vec<u8>, limit: Duration) {
        let deadline = Instant::now() + limit;
        let len = bytes.len();
        self.counters.queued_len.fetch_add(len, Ordering::Relaxed);
        let message =
            Message::Line { dropped_before: self.counters.unqueued.swap(0, Ordering::Relaxed), bytes };
        if self.sender.send_deadline(message, deadline).is_ok() {
            self.sync(deadline);
        }
    }

    fn sync(&self, deadline: Instant) {
        let (done, tried) = crossbeam_channel::bounded(1);
        match self.sender.send_deadline(Message::Sync(done), deadline) {
            Ok(()) => {
                let _ = tried.recv_deadline(deadline);
            }
            Err(SendTimeoutError::Timeout(_) | SendTimeoutError::Disconnected(_)) => {}
        }
    }

    pub(super) fn lines_dropped(&self) -> u64 {
        self.counters.dropped.load(Ordering::Relaxed)
    }

    /// Whether lines are missing that the log does not say are missing: it cannot be written now, or not fast enough.
    pub(super) fn is_dropping(&self) -> bool {
        self.counters.untold.load(Ordering::Relaxed) || self.counters.unqueued.load(Ordering::Relaxed) > 0
    }

    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// Whether the caller is the thread that writes.
    pub(super) fn is_own_thread(&self) -> bool {
        std::thread::current().id() == self.thread
    }
}

impl Write for &Queue {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> &'a Self {
        self
    }
}

/// A queue and its thread.
#[derive(Debug)]
pub(super) struct Log {
    queue: Queue,
}

impl Log {
    /// Starts the thread that writes to `output`. It ends with the last [`Queue`], or with the process.
    ///
    /// # Errors
    /// When the thread cannot be had.
    pub(super) fn start(
        output: impl Write + Send + 'static,
        format: Format,
        lines_max: usize,
        len_max: usize,
    ) -> io::Result<Self> {
        let (sender, messages) = crossbeam_channel::bounded(lines_max);
        let counters = Arc::new(Counters::default());
        let writer = Writer {
            messages,
            output,
            format,
            counters: Arc::clone(&counters),
            torn: false,
            missing: Missing::default(),
        };
        let thread =
            std::thread::Builder::new().name("log".into()).spawn(move || writer.run())?.thread().id();
        Ok(Self { queue: Queue { sender, counters, len_max, format, thread } })
    }

    pub(super) fn queue(&self) -> Queue {
        self.queue.clone()
    }

    /// Waits until all that is queued was tried, `limit` at most.
    pub(super) fn finish(&self, limit: Duration) {
        self.queue.sync(Instant::now() + limit);
    }
}

/// Lines whose loss was not said yet.
#[derive(Default)]
struct Missing {
    unqueued: u64,
    unwritten: u64,
    why: Option<io::Error>,
}

impl Missing {
    fn count(&self) -> u64 {
        self.unqueued + self.unwritten
    }

    fn why(&self) -> String {
        let slow = "it was read more slowly than it was written and the queue was full";
        let failed = self.why.as_ref().map(|error| format!("it could not be written: {error}"));
        match failed {
            Some(failed) if self.unqueued > 0 => {
                format!("{failed} ({} lines), and {slow} ({} lines)", self.unwritten, self.unqueued)
            }
            Some(failed) => failed,
            None => slow.to_owned(),
        }
    }
}

/// The thread.
struct Writer<W> {
    messages: Receiver<Message>,
    output: W,
    format: Format,
    counters: Arc<Counters>,
    /// A line was written in part: the next one begins on a line of its own.
    torn: bool,
    missing: Missing,
}

impl<W: Write> Writer<W> {
    fn run(mut self) {
        loop {
            let message = if self.missing.count() == 0 {
                self.messages.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                self.messages.recv_timeout(RETRY_INTERVAL)
            };
            match message {
                Ok(Message::Line { dropped_before, bytes }) => {
                    self.missing.unqueued += dropped_before;
                    self.line(&bytes);
                    self.counters.queued_len.fetch_sub(bytes.len(), Ordering::Relaxed);
                    if self.messages.is_empty() {
                        self.tell_missing();
                    }
                }
                Ok(Message::Sync(done)) => {
                    self.tell_missing();
                    // Whoever asked may have given up.
                    let _ = done.try_send(());
                }
                Err(RecvTimeoutError::Timeout) => self.tell_missing(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Tries a line once.
    fn line(&mut self, bytes: &[u8]) {
        let told = self.missing.count() == 0 || self.note();
        let written = told && self.write(bytes);
        if !written {
            self.missing.unwritten += 1;
            self.counters.dropped.fetch_add(1, Ordering::Relaxed);
        }
        self.counters.untold.store(self.missing.count() > 0, Ordering::Relaxed);
    }

    /// Says what is missing, where nothing is queued that would say it.
    fn tell_missing(&mut self) {
        self.missing.unqueued += self.counters.unqueued.swap(0, Ordering::Relaxed);
        if self.missing.count() > 0 {
            self.note();
        }
        self.counters.untold.store(self.missing.count() > 0, Ordering::Relaxed);
    }

    /// Whether the log now says what is missing.
    fn note(&mut self) -> bool {
        let text = line::dropped(self.format, self.missing.count(), &self.missing.why());
        let told = self.write(text.as_bytes());
        if told {
            self.missing = Missing::default();
        }
        told
    }

    fn write(&mut self, bytes: &[u8]) -> bool {
        let newline: &[u8] = if self.torn { b"\n" } else { b"" };
        let mut torn = self.torn;
        let result = write_counted(&mut self.output, &[newline, bytes].concat(), &mut torn);
        self.torn = torn;
        if let Err(error) = result {
            self.missing.why = Some(error);
            return false;
        }
        true
    }
}

/// Writes all of `bytes`; `torn` says afterwards whether the last line written is incomplete.
fn write_counted(output: &mut impl Write, mut bytes: &[u8], torn: &mut bool) -> io::Result<()> {
    while !bytes.is_empty() {
        match output.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                *torn = bytes[written - 1] != b'\n';
                bytes = &bytes[written..];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of `bytes`, as far as it goes.
pub(super) fn write_all(output: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    write_counted(output, bytes, &mut false)
}
