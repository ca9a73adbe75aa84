//! One volume's client: writes self-describing blocks to random places with several requests in flight, through NBD, and
//! keeps the ledger.
//!
//! A thread of its own, told what to do through [`Live`]. When its connection breaks it connects again, to wherever it
//! is told the volume is served, until it is let in.
//!
//! Invariants: a write counts as acknowledged only by its own reply; replies that were already on their way when the
//! connection broke still count. Survives the server's death at any instant; gives up after [`RECONNECT_MAX`].

use super::block::{BLOCK_LEN, BLOCK_LEN_U64, Random};
use super::ledger::Ledger;
use crate::nbd_client::{NbdClient, NbdError, NbdReceiver, NbdSender, NbdUri, NoReads, Options};
use hdrhistogram::Histogram;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Requests in flight: enough to keep the link busy on two cores, few enough that a latency is not all queue.
pub(super) const DEPTH: usize = 8;

/// How long a single request or connect may take; a takeover is far quicker.
pub(super) const REQUEST_MAX: Duration = Duration::from_secs(60);

/// How long the writer looks for a server that lets it in.
const RECONNECT_MAX: Duration = Duration::from_secs(90);

/// Between two attempts to connect: well below the takeover that is measured by it.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(2);

/// Cookie of the flush at the end; writes use their numbers, which start at 1.
const FLUSH_COOKIE: u64 = 0;

/// Longest latency the histogram tells apart, in microseconds.
const LATENCY_US_MAX: u64 = 60_000_000;

/// How the demo's pairs of NBD clients ask to be served.
pub(super) fn options() -> Options {
    Options { timeout: REQUEST_MAX, ..Options::default() }
}

/// What happens around the writer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub(super) enum Phase {
    /// Both nodes run.
    Mirrored,
    /// One was killed.
    Alone,
    /// It is back and catches up.
    CatchingUp,
}

const PHASES: usize = 3;

/// What the writer and its owner share while it runs.
#[derive(Debug)]
pub(super) struct Live {
    stop: AtomicBool,
    phase: AtomicUsize,
    acked: AtomicU64,
    target: Mutex<NbdUri>,
    failed: Mutex<Option<String>>,
}

impl Live {
    /// Writes acknowledged so far, over all phases.
    pub(super) fn acked(&self) -> u64 {
        self.acked.load(Ordering::Relaxed)
    }

    /// Files what follows under another phase.
    pub(super) fn enter(&self, phase: Phase) {
        self.phase.store(phase as usize, Ordering::Relaxed);
    }

    /// Where to connect from the next time on.
    pub(super) fn redirect(&self, target: NbdUri) {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = target;
    }

    /// Why the writer ended, where it was not asked to.
    pub(super) fn failed(&self) -> Option<String> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn target(&self) -> NbdUri {
        self.target.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Why a writer gave up.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriterError {
    /// A write or flush was answered with an error, or the connection broke where it should have held.
    #[error("writing to volume {volume}: {source}")]
    Request {
        /// Which volume.
        volume: String,
        /// The server's or the system's words.
        source: NbdError,
    },
    /// Nobody let it in.
    #[error("volume {volume} was not served again within {after:?}: {source}")]
    NotServed {
        /// Which volume.
        volume: String,
        /// How long it tried.
        after: Duration,
        /// The last refusal.
        source: NbdError,
    },
    /// The writer itself broke.
    #[error("the writer of volume {volume} panicked")]
    Panicked {
        /// Which volume.
        volume: String,
    },
}

/// What a writer leaves behind.
#[derive(Debug)]
pub(super) struct Written {
    /// What it wrote.
    pub ledger: Ledger,
    /// Latencies of acknowledged writes in microseconds, by [`Phase`].
    pub latency_us: [Histogram<u64>; PHASES],
    /// The longest time without any acknowledgement, by the [`Phase`] in which it ended.
    pub stall_max: [Duration; PHASES],
    /// The first acknowledgement after each new connection.
    pub resumed: Vec<Instant>,
    /// Writes in flight when the connection broke.
    pub unacked_at_break: usize,
}

impl Written {
    /// Nothing written yet.
    pub(super) fn new(ledger: Ledger) -> Self {
        let histogram = || {
            Histogram::new_with_bounds(1, LATENCY_US_MAX, 3)
                .expect("these bounds are valid by hdrhistogram's rules")
        };
        Self {
            ledger,
            latency_us: [histogram(), histogram(), histogram()],
            stall_max: [Duration::ZERO; PHASES],
            resumed: Vec::new(),
            unacked_at_break: 0,
        }
    }
}

/// A running writer.
#[derive(Debug)]
pub(super) struct Writer {
    live: Arc<Live>,
    volume: String,
    thread: JoinHandle<Result<Written, WriterError>>,
}

impl Writer {
    /// Starts writing. `breaks_max` is how many broken connections are part of the plan.
    pub(super) fn start(
        volume: &str,
        target: NbdUri,
        phase: Phase,
        breaks_max: usize,
        written: Written,
        seed: u64,
    ) -> Self {
        let live = Arc::new(Live {
            stop: AtomicBool::new(false),
            phase: AtomicUsize::new(phase as usize),
            acked: AtomicU64::new(written.ledger.acked_writes()),
            target: Mutex::new(target),
            failed: Mutex::new(None),
        });
        let work = Work {
            live: Arc::clone(&live),
            volume: volume.to_owned(),
            random: Random(seed),
            written,
            sent: HashMap::with_capacity(DEPTH),
            breaks_left: breaks_max,
            heard: None,
            resuming: false,
        };
        let failing = Arc::clone(&live);
        let thread = std::thread::spawn(move || {
            work.run().inspect_err(|error| {
                *failing.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
            })
        });
        Self { live, volume: volume.to_owned(), thread }
    }

    /// What is shared with it.
    pub(super) fn live(&self) -> &Live {
        &self.live
    }

    /// Asks it to finish what is in flight, to flush and to end.
    pub(super) fn ask_to_stop(&self) {
        self.live.stop.store(true, Ordering::Relaxed);
    }

    /// Whether it has ended, asked to or not.
    pub(super) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for its end and takes what it leaves. Blocks as long as its requests may take.
    ///
    /// # Errors
    /// [`WriterError`].
    pub(super) fn join(self) -> Result<Written, WriterError> {
        self.thread.join().unwrap_or(Err(WriterError::Panicked { volume: self.volume }))
    }
}

/// A write on its way.
#[derive(Debug)]
struct Sent {
    block: u64,
    at: Instant,
}

/// The thread's own side.
#[derive(Debug)]
struct Work {
    live: Arc<Live>,
    volume: String,
    random: Random,
    written: Written,
    /// By number, which is the cookie too.
    sent: HashMap<u64, Sent>,
    breaks_left: usize,
    heard: Option<Instant>,
    resuming: bool,
}

impl Work {
    fn run(mut self) -> Result<Written, WriterError> {
        while let Some(client) = self.connect()? {
            let (mut sender, mut receiver) = client.split();
            match self.pump(&mut sender, &mut receiver) {
                Ok(()) => break,
                Err(source @ NbdError::Io { .. }) if self.breaks_left > 0 && !source.is_timeout() => {
                    self.breaks_left -= 1;
                    // What was acknowledged before the end may still wait to be read.
                    while self.receive(&mut receiver).is_ok() {}
                    self.sent.clear();
                    self.written.unacked_at_break += self.written.ledger.give_up();
                    self.resuming = true;
                }
                Err(source) => return Err(WriterError::Request { volume: self.volume, source }),
            }
        }
        Ok(self.written)
    }

    /// Connects; `None` where it was asked to stop instead.
    fn connect(&self) -> Result<Option<NbdClient>, WriterError> {
        let started = Instant::now();
        loop {
            if self.stopping() {
                return Ok(None);
            }
            match NbdClient::connect(&self.live.target(), &options()) {
                Ok(client) => return Ok(Some(client)),
                Err(source) if started.elapsed() >= RECONNECT_MAX => {
                    let volume = self.volume.clone();
                    return Err(WriterError::NotServed { volume, after: RECONNECT_MAX, source });
                }
                Err(_) => std::thread::sleep(RECONNECT_INTERVAL),
            }
        }
    }

    fn stopping(&self) -> bool {
        self.live.stop.load(Ordering::Relaxed)
    }

    /// Writes until asked to stop, then flushes.
    fn pump(&mut self, sender: &mut NbdSender, receiver: &mut NbdReceiver) -> Result<(), NbdError> {
        let mut bytes = [0; BLOCK_LEN];
        loop {
            while !self.stopping() && self.sent.len() < DEPTH {
                let at = self.random.draw() % self.written.ledger.blocks() as u64;
                let Some(block) = self.written.ledger.begin(at) else { continue };
                block.encode(&mut bytes);
                self.sent.insert(block.number, Sent { block: at, at: Instant::now() });
                sender.send_write(block.number, at * BLOCK_LEN_U64, &bytes, false)?;
            }
            if self.sent.is_empty() {
                break;
            }
            self.receive(receiver)?;
        }
        sender.send_flush(FLUSH_COOKIE)?;
        receiver.receive(&mut NoReads)?.result?;
        sender.send_disconnect()
    }

    /// Takes one reply.
    fn receive(&mut self, receiver: &mut NbdReceiver) -> Result<(), NbdError> {
        let reply = receiver.receive(&mut NoReads)?;
        reply.result?;
        let Some(sent) = self.sent.remove(&reply.cookie) else {
            return Err(crate::nbd_client::Breach::Cookie { found: reply.cookie }.into());
        };
        let now = Instant::now();
        self.written.ledger.acknowledge(sent.block, reply.cookie);
        self.live.acked.fetch_add(1, Ordering::Relaxed);
        let phase = self.live.phase.load(Ordering::Relaxed);
        let latency_us = u64::try_from(now.duration_since(sent.at).as_micros()).unwrap_or(LATENCY_US_MAX);
        self.written.latency_us[phase].saturating_record(latency_us);
        if let Some(heard) = self.heard.replace(now) {
            let stall = &mut self.written.stall_max[phase];
            *stall = (*stall).max(now.duration_since(heard));
        }
        if std::mem::take(&mut self.resuming) {
            self.written.resumed.push(now);
        }
        Ok(())
    }
}
