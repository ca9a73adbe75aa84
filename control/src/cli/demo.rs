//! `costandby demo`: two daemons on loopback, a kill in mid-write, a takeover, and the proof that nothing was lost.
//!
//! Plays every part around the daemons: the operator ([`crate::cluster`]), two clients ([`writer`]) and the auditor
//! ([`ledger`], [`check`]). Volume `one` is served by alpha and volume `two` by beta, each the other's standby. Alpha is
//! killed while it writes, beta takes `one` over and goes on with `two`; everything acknowledged is read back from beta;
//! alpha returns, catches up under load, and both nodes' disks are compared.
//!
//! Invariants: the daemons are this very program, run as a user would; nothing is left behind but, after a failure, the
//! directory with the logs and disks; every wait has a limit; stdout carries the result only.
//!
//! Survives SIGINT, SIGTERM and SIGHUP at any instant (the daemons end with it).

mod block;
mod check;
mod ledger;
mod place;
mod progress;
mod report;
mod writer;

use super::{CliError, DemoArgs, print};
use crate::admin::Command as AdminCommand;
use crate::admin_client::ClientError;
use crate::cluster::{ClusterError, Pair, PairSpec, PairVolume, Side};
use crate::nbd_client::NbdError;
use block::{BLOCK_LEN_U64, Random};
use hdrhistogram::Histogram;
use ledger::Ledger;
use progress::Progress;
use report::{Report, VolumeReport};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use writer::{DEPTH, Phase, Writer, WriterError, Written};

/// The volumes, in order, and who serves them first.
const VOLUMES: [(&str, Side); 2] = [("one", Side::Alpha), ("two", Side::Beta)];

/// Bytes of a volume where there is room for four disks of it: thousands of blocks to go wrong, and yet copied, compared
/// and removed again within seconds on a file system that discards what is removed (four times as much took a minute).
const VOLUME_LEN: u64 = 64 << 20;

/// Bytes of a volume where there is not.
const VOLUME_LEN_SMALL: u64 = 16 << 20;

/// Room beyond the disks, for logs and metadata.
const ROOM_LEN: u64 = 64 << 20;

/// Between two looks at the writers.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Between two attempts to promote: well below the takeover that is measured by it.
const PROMOTE_INTERVAL: Duration = Duration::from_millis(2);

/// How long a takeover may take before the demo calls it failed.
const TAKEOVER_MAX: Duration = Duration::from_secs(60);

/// How long writing goes on at least after the takeover, and while the dead node catches up.
const WRITE_MIN: Duration = Duration::from_secs(1);

/// How long the first handshake may take: nothing is to be copied.
const FIRST_SYNC_MAX: Duration = Duration::from_secs(120);

/// How long catching up may take: a full copy of both volumes under load, on a slow machine.
const CATCH_UP_MAX: Duration = Duration::from_secs(300);

/// How long writing goes on at most while the dead node catches up: on a busy machine clients leave the copy little.
const CATCH_UP_WRITE_MAX: Duration = Duration::from_secs(5);

/// How long what is in flight may take once the writers have flushed.
const QUIET_MAX: Duration = Duration::from_secs(120);

/// Why there is no good result.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Writer(#[from] WriterError),
    #[error("reading volume {volume} back from {node}: {source}")]
    ReadBack { volume: &'static str, node: Side, source: NbdError },
    #[error("{doing} {path}: {source}")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{path} has {free} MiB free, the demo needs {needed}: free some, or set TMPDIR to another directory"
    )]
    NoRoom { path: PathBuf, free: u64, needed: u64 },
    #[error("{survivor} does not serve volume {volume} {after:?} after the kill; it last said: {last}")]
    NoTakeover { survivor: Side, volume: &'static str, after: Duration, last: String },
    #[error("the writer of volume {volume} ended before it was asked to: {why}")]
    WriterEnded { volume: &'static str, why: String },
    #[error("the writer of volume {volume} did not end within {after:?}")]
    WriterHangs { volume: &'static str, after: Duration },
    #[error("{node} should be {expected} of volume {volume} and is {found}")]
    Role { node: Side, volume: String, expected: &'static str, found: String },
    #[error("{0}")]
    Place(String),
    #[error("{0}")]
    Damage(String),
    #[error("interrupted; both daemons were ended")]
    Interrupted,
}

/// Runs the demonstration.
///
/// # Errors
/// [`CliError::Demo`] where anything was lost, torn or different, or could not be shown.
pub fn run(args: &DemoArgs) -> Result<(), CliError> {
    let io = |doing| move |source| CliError::Io { doing, source };
    // Its daemons would refuse to start.
    crate::logging::Settings::from_environment()?;
    let interrupt = Arc::new(AtomicBool::new(false));
    watch_signals(Arc::clone(&interrupt)).map_err(io("watching for signals"))?;
    let program = std::env::current_exe().map_err(io("finding this program's own file"))?;
    let dir =
        tempfile::Builder::new().prefix("costandby-demo-").tempdir().map_err(io("making a directory"))?;
    match demonstrate(args, program, dir.path(), interrupt) {
        Ok(()) => Ok(()),
        Err(Failure::Output(error)) => Err(error),
        Err(Failure::Demo(
            error @ (DemoError::Interrupted | DemoError::NoRoom { .. } | DemoError::Place(_)),
        )) => Err(CliError::Demo(error.to_string())),
        Err(Failure::Demo(error)) => {
            let kept = dir.keep();
            Err(CliError::Demo(format!("{error} (logs and disks are kept in {})", kept.display())))
        }
    }
}

/// A demo that failed, or one whose result nobody could be told.
enum Failure {
    Demo(DemoError),
    Output(CliError),
}

impl<E: Into<DemoError>> From<E> for Failure {
    fn from(error: E) -> Self {
        // An interrupt shows first wherever it is looked for.
        Self::Demo(match error.into() {
            DemoError::Cluster(ClusterError::Interrupted) => DemoError::Interrupted,
            error => error,
        })
    }
}

fn demonstrate(
    args: &DemoArgs,
    program: PathBuf,
    dir: &Path,
    interrupt: Arc<AtomicBool>,
) -> Result<(), Failure> {
    let place = place::find(args.link).map_err(DemoError::Place)?;
    let size = volume_len(dir)?;
    let volumes =
        VOLUMES.map(|(name, primary)| PairVolume { name: name.into(), size, primary, ack: "memory" });
    let spec = PairSpec {
        program,
        dir: dir.to_owned(),
        // Beyond loopback only where RDMA is nowhere else, and for as long as the demo runs.
        address: place.address,
        link: place.link,
        volumes: volumes.into(),
        interrupt: Arc::clone(&interrupt),
    };
    let mut progress = Progress::start();
    let on = if place.address.is_loopback() { "loopback".to_owned() } else { place.address.to_string() };
    progress.say(&format!("two nodes on {on}, two volumes of {} MiB, in {}", size >> 20, dir.display()));
    let demo = Demo { seconds: args.seconds, size, pair: Pair::create(spec)?, interrupt, progress };
    let report = demo.run()?;
    let text = if args.json {
        let json = serde_json::to_string(&report).map_err(|error| {
            Failure::Output(CliError::Io { doing: "writing the report", source: error.into() })
        })?;
        format!("{json}\n")
    } else {
        report.table()
    };
    print(&text).map_err(Failure::Output)?;
    report.failure().map_or(Ok(()), |text| Err(DemoError::Damage(text).into()))
}

struct Demo {
    seconds: u64,
    size: u64,
    pair: Pair,
    interrupt: Arc<AtomicBool>,
    progress: Progress,
}

type Writers = [Writer; 2];
type AllWritten = [Written; 2];

/// What the kill showed.
struct Takeover {
    killed: Instant,
    acked_before: u64,
}

impl Demo {
    fn run(mut self) -> Result<Report, DemoError> {
        for side in Side::BOTH {
            self.pair.start(side)?;
        }
        for side in Side::BOTH {
            self.pair.wait_in_sync(side, FIRST_SYNC_MAX, |_| ())?;
        }
        let link = self.link()?;
        self.progress.say(&format!("connected; the copies go by {link}"));
        let nonce = std::hash::RandomState::new().build_hasher().finish();
        let blocks = usize::try_from(self.size / BLOCK_LEN_U64).expect("a volume of the demo is small");
        let ledgers = [0, 1].map(|volume| Written::new(Ledger::new(nonce, volume, blocks)));
        let mut random = Random(nonce);

        self.progress
            .say(&format!("alpha serves one, beta serves two; writing to both for {} s", self.seconds));
        let writers = self.write(Phase::Mirrored, ledgers, &mut random);
        self.watch(&writers, Duration::from_secs(self.seconds), "both nodes up")?;
        let takeover = self.take_over(&writers)?;
        let rest = WRITE_MIN.max(Duration::from_secs(self.seconds) / 2);
        self.watch(&writers, rest, "beta alone")?;
        let mut written = self.finish(writers)?;
        let mut volumes = self.volume_reports();
        self.read_back(&mut written, &mut volumes)?;
        let resumed = written[0].resumed.first().copied();
        let takeover_ms = resumed.map_or(f64::INFINITY, |at| ms(at.duration_since(takeover.killed)));
        let unacked_at_kill = written[0].unacked_at_break;

        let (mut written, resync) = self.bring_back(written, &mut random)?;
        self.read_back(&mut written, &mut volumes)?;
        self.check_roles()?;
        self.compare(&mut volumes)?;
        self.progress.say("stopping both daemons");
        self.pair.stop(&Side::BOTH)?;
        self.compare(&mut volumes)?;
        self.progress.finish();

        for (volume, written) in volumes.iter_mut().zip(&written) {
            volume.acked_writes = written.ledger.acked_writes();
            volume.stall_ms = ms(written.stall_max[Phase::Alone as usize]);
        }
        let latency_us = merged_latency_us(&written, Phase::Mirrored);
        let resync_latency_us = merged_latency_us(&written, Phase::CatchingUp);
        Ok(Report {
            link,
            ack: "memory",
            seconds: self.seconds,
            acked_writes: volumes.iter().map(|volume| volume.acked_writes).sum(),
            lost_writes: volumes.iter().map(|volume| volume.lost_writes).sum(),
            torn_blocks: volumes.iter().map(|volume| volume.torn_blocks).sum(),
            takeover_ms,
            identical: volumes.iter().all(|volume| volume.differs_at.is_none()),
            write_p50_us: latency_us.value_at_quantile(0.5),
            write_p99_us: latency_us.value_at_quantile(0.99),
            writes_per_second: takeover.acked_before / self.seconds.max(1),
            requests_in_flight: DEPTH,
            unacked_at_kill,
            resync_seconds: (resync.as_secs_f64() * 1000.0).round() / 1000.0,
            resync_write_p50_us: resync_latency_us.value_at_quantile(0.5),
            resync_write_p99_us: resync_latency_us.value_at_quantile(0.99),
            volumes,
        })
    }

    /// What carries the copies.
    fn link(&self) -> Result<String, DemoError> {
        let volumes = self.pair.status(Side::Alpha)?.volumes;
        let mut links: Vec<_> = volumes.into_iter().map(|volume| volume.link).collect();
        links.dedup();
        Ok(links.join(" and "))
    }

    /// Starts a writer a volume, at who serves it in this phase.
    fn write(&self, phase: Phase, written: AllWritten, random: &mut Random) -> Writers {
        let mut volumes = VOLUMES.into_iter();
        written.map(|written| {
            let (name, first) = volumes.next().expect("as many volumes as ledgers");
            let (server, breaks_max) = match phase {
                Phase::Mirrored => (first, usize::from(first == Side::Alpha)),
                Phase::Alone | Phase::CatchingUp => (Side::Beta, 0),
            };
            Writer::start(name, self.pair.uri(server, name), phase, breaks_max, written, random.draw())
        })
    }

    /// Lets the writers write.
    fn watch(&mut self, writers: &Writers, time: Duration, what: &str) -> Result<(), DemoError> {
        let started = Instant::now();
        let acked_before = acked(writers);
        while started.elapsed() < time {
            self.look(writers)?;
            let elapsed = started.elapsed().as_secs_f64();
            let acked = acked(writers);
            #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
            let rate = (acked - acked_before) as f64 / elapsed;
            self.progress.show(format!("{what}: {acked} writes acknowledged, {rate:.0} a second"));
            std::thread::sleep(LOOK_INTERVAL.min(time.saturating_sub(started.elapsed())));
        }
        Ok(())
    }

    /// Kills alpha in mid-write and has beta serve its volume.
    fn take_over(&mut self, writers: &Writers) -> Result<Takeover, DemoError> {
        let (volume, survivor) = (VOLUMES[0].0, Side::Beta);
        let acked_before = acked(writers);
        let killed = Instant::now();
        self.pair.kill(Side::Alpha)?;
        for writer in writers {
            writer.live().enter(Phase::Alone);
        }
        writers[0].live().redirect(self.pair.uri(survivor, volume));
        loop {
            match self.pair.command(survivor, volume, AdminCommand::Promote { force: false }) {
                Ok(_) => break,
                // Refused as long as the daemon takes the dead peer for a living primary.
                Err(ClusterError::Client { source: ClientError::Refused { message }, .. }) => {
                    if killed.elapsed() >= TAKEOVER_MAX {
                        let after = TAKEOVER_MAX;
                        return Err(DemoError::NoTakeover { survivor, volume, after, last: message });
                    }
                }
                Err(error) => return Err(error.into()),
            }
            self.look(writers)?;
            std::thread::sleep(PROMOTE_INTERVAL);
        }
        let promoted_ms = ms(killed.elapsed());
        self.pair.wait_gone(Side::Alpha)?;
        self.progress.say(&format!(
            "killed alpha (SIGKILL) after {acked_before} writes; beta was promoted {promoted_ms:.1} ms later"
        ));
        Ok(Takeover { killed, acked_before })
    }

    /// An interrupt, or a writer that ended by itself, ends the demo.
    fn look(&self, writers: &Writers) -> Result<(), DemoError> {
        if self.interrupt.load(Ordering::Relaxed) {
            return Err(DemoError::Interrupted);
        }
        match writers.iter().zip(VOLUMES).find(|(writer, _)| writer.is_finished()) {
            Some((writer, (volume, _))) => {
                let why = writer.live().failed().unwrap_or_else(|| "it panicked".into());
                Err(DemoError::WriterEnded { volume, why })
            }
            None => Ok(()),
        }
    }

    /// Has the writers flush and end.
    fn finish(&self, writers: Writers) -> Result<AllWritten, DemoError> {
        writers.iter().for_each(Writer::ask_to_stop);
        let limit = writer::REQUEST_MAX * 2;
        let started = Instant::now();
        while let Some(at) = writers.iter().position(|writer| !writer.is_finished()) {
            if self.interrupt.load(Ordering::Relaxed) {
                return Err(DemoError::Interrupted);
            }
            if started.elapsed() >= limit {
                return Err(DemoError::WriterHangs { volume: VOLUMES[at].0, after: limit });
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        let [one, two] = writers;
        Ok([one.join()?, two.join()?])
    }

    /// Reads every block of both volumes back from the survivor.
    fn read_back(&mut self, written: &mut AllWritten, volumes: &mut [VolumeReport]) -> Result<(), DemoError> {
        let node = Side::Beta;
        let mut clean = true;
        for ((volume, _), (written, report)) in VOLUMES.into_iter().zip(written.iter_mut().zip(volumes)) {
            let progress = &mut self.progress;
            let seen = |share| progress.show_share(share, &format!("reading {volume} back from {node}"));
            let findings = check::read_back(&self.pair.uri(node, volume), &mut written.ledger, seen)
                .map_err(|source| DemoError::ReadBack { volume, node, source })?;
            clean &= findings.is_clean();
            report.take(findings);
        }
        let total: u64 = written.iter().map(|written| written.ledger.acked_writes()).sum();
        let verdict = if clean { "nothing lost, nothing torn" } else { "NOT all is there" };
        self.progress
            .say(&format!("read both volumes back from beta after {total} acknowledged writes: {verdict}"));
        Ok(())
    }

    /// Starts alpha again and writes on while it catches up. Returns once all is quiet.
    fn bring_back(
        &mut self,
        written: AllWritten,
        random: &mut Random,
    ) -> Result<(AllWritten, Duration), DemoError> {
        self.progress.say("alpha returns and catches up while writing goes on");
        let writers = self.write(Phase::CatchingUp, written, random);
        let started = Instant::now();
        self.pair.start(Side::Alpha)?;
        let progress = &mut self.progress;
        self.pair.wait_in_sync(Side::Beta, CATCH_UP_MAX, |status| {
            let percents = status.volumes.iter().map(|volume| {
                // Before the handshake nothing is to be copied as far as the daemon knows.
                if volume.peer_state == "Unknown" { 0.0 } else { volume.resync_percent }
            });
            let share = percents.sum::<f64>() / 100.0 / VOLUMES.len() as f64;
            progress.show_share(share, "alpha catches up");
            if started.elapsed() >= CATCH_UP_WRITE_MAX {
                writers.iter().for_each(Writer::ask_to_stop);
            }
        })?;
        let resync = started.elapsed();
        self.progress.say(&format!("alpha caught up in {:.1} s", resync.as_secs_f64()));
        self.watch(&writers, WRITE_MIN.saturating_sub(resync), "mirrored again")?;
        let written = self.finish(writers)?;
        for side in Side::BOTH {
            let quiet = |status: &crate::admin::Status| {
                status.volumes.iter().all(|volume| volume.in_sync() && volume.in_flight == 0)
            };
            self.pair.wait(side, "quiet and in sync", QUIET_MAX, quiet, |_| ())?;
        }
        Ok((written, resync))
    }

    /// The node that returned must not have taken anything back by itself.
    fn check_roles(&self) -> Result<(), DemoError> {
        for (node, expected) in [(Side::Alpha, "standby"), (Side::Beta, "primary")] {
            for volume in self.pair.status(node)?.volumes {
                if volume.role != expected {
                    let (volume, found) = (volume.name, volume.role);
                    return Err(DemoError::Role { node, volume, expected, found });
                }
            }
        }
        Ok(())
    }

    /// Compares both disks of each volume.
    fn compare(&mut self, volumes: &mut [VolumeReport]) -> Result<(), DemoError> {
        for ((volume, _), report) in VOLUMES.into_iter().zip(volumes.iter_mut()) {
            self.progress.show(format!("comparing the disks of {volume}"));
            let [left, right] = Side::BOTH.map(|side| self.pair.disk(side, volume));
            let found = check::first_difference(&left, &right).map_err(|source| DemoError::Io {
                doing: "comparing with its twin",
                path: left,
                source,
            })?;
            report.differs_at = report.differs_at.or(found);
        }
        let same = volumes.iter().all(|volume| volume.differs_at.is_none());
        self.progress.say(if same { "both nodes' disks are identical" } else { "the disks DIFFER" });
        Ok(())
    }

    fn volume_reports(&self) -> Vec<VolumeReport> {
        let report = |(name, first): (&str, Side)| VolumeReport {
            name: name.to_owned(),
            size: self.size,
            primary_before: first.as_str(),
            primary_after: Side::Beta.as_str(),
            acked_writes: 0,
            lost_writes: 0,
            torn_blocks: 0,
            stall_ms: 0.0,
            differs_at: None,
            first_finding: None,
        };
        VOLUMES.into_iter().map(report).collect()
    }
}

fn acked(writers: &Writers) -> u64 {
    writers.iter().map(|writer| writer.live().acked()).sum()
}

fn merged_latency_us(written: &AllWritten, phase: Phase) -> Histogram<u64> {
    let [one, two] = written;
    let mut merged = one.latency_us[phase as usize].clone();
    merged += &two.latency_us[phase as usize];
    merged
}

/// Milliseconds, to the microsecond.
fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// The largest volume that fits four times.
fn volume_len(dir: &Path) -> Result<u64, DemoError> {
    let stat = rustix::fs::statvfs(dir).map_err(|error| DemoError::Io {
        doing: "measuring the free space of",
        path: dir.to_owned(),
        source: error.into(),
    })?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let needed = |len: u64| len * 2 * VOLUMES.len() as u64 + ROOM_LEN;
    [VOLUME_LEN, VOLUME_LEN_SMALL].into_iter().find(|len| needed(*len) <= free).ok_or_else(|| {
        let path = dir.parent().unwrap_or(dir).to_owned();
        DemoError::NoRoom { path, free: free >> 20, needed: needed(VOLUME_LEN_SMALL) >> 20 }
    })
}

/// Sets `interrupt` at the first signal that asks this program to end. Watching begins before this returns.
fn watch_signals(interrupt: Arc<AtomicBool>) -> io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut int, mut term, mut hup) = {
        let _entered = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?)
    };
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = int.recv() => {}
                _ = term.recv() => {}
                _ = hup.recv() => {}
            }
        });
        interrupt.store(true, Ordering::Relaxed);
    })?;
    Ok(())
}
