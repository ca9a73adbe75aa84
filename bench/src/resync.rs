//! What catching up costs: bytes sent for bytes changed, its rate next to the bare link's, and what clients feel of it.
//!
//! Two daemons on loopback, as in [`crate::nbd`]; for the bytes a relay stands between them and counts what alpha sends.
//! Changed is what a writer touched while the nodes were apart, rounded up to the grain of the dirty bitmap. Clients are
//! one writer of 4 KiB at random places, in this process: only requests that began while the copy was under way count.
//!
//! Invariants: the copy of each case is complete before it is counted, and the two disks are compared at the end. Every
//! wait has a limit.

use crate::Outcome;
use crate::floor::{self, Load, Wait};
use crate::histogram::{Recorder, Summary};
use crate::nbd::Mirror;
use crate::relay::Relay;
use crate::report::{Against, Figure, Measure, Row};
use costandby_control::nbd_client::{NbdClient, NbdUri};
use serde_json::Value;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Begins the ids of what is measured here.
pub(crate) const ID: &str = "resync";

/// Bytes a bit of the dirty bitmap stands for, by default.
const GRAIN_LEN: u64 = 64 << 10;

/// Bytes of one write.
const WRITE_LEN: usize = 4096;

/// Longest wait for two disks to be equal.
const SYNC_LIMIT: Duration = Duration::from_secs(120);

/// Longest wait for a copy to begin.
const BEGIN_LIMIT: Duration = Duration::from_secs(2);

/// Between two looks at the daemon: well below the time of the shortest copy.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// Requests that must fall into copies before their 99th percentile means anything.
const SAMPLES_MIN: u64 = 1000;

/// Copies that a small disk may take to let them.
const COPIES_MAX: u32 = 40;

/// Parts of the volume that are dirtied, in percent, with ids and lines.
const SHARES: [(u64, &str, &str); 3] = [
    (1, "resync-bytes-1", "bytes sent ÷ bytes changed, 1% dirty"),
    (10, "resync-bytes-10", "bytes sent ÷ bytes changed, 10% dirty"),
    (50, "resync-bytes-50", "bytes sent ÷ bytes changed, 50% dirty"),
];

/// All that was measured.
pub(crate) struct Measured {
    pub(crate) rows: Vec<Row>,
    pub(crate) figures: Vec<Figure>,
}

/// Measures everything. Disks of `disk_len` bytes are made in `directory`.
pub(crate) fn measure(directory: &Path, disk_len: u64, time: Duration) -> Outcome<Measured> {
    let figures = bytes(&directory.join("resync-bytes"), disk_len)?;
    let rows = speed(&directory.join("resync-speed"), disk_len, time)?;
    Ok(Measured { rows, figures })
}

/// A pair and what is asked of it here.
struct Pair {
    mirror: Mirror,
    client: NbdClient,
    disk_len: u64,
}

impl Pair {
    fn new(mirror: Mirror, disk_len: u64) -> Outcome<Self> {
        let client = NbdClient::connect(&mirror.uri.parse::<NbdUri>()?, &Default::default())?;
        Ok(Self { mirror, client, disk_len })
    }

    fn status(&self) -> Outcome<Value> {
        self.mirror.status()
    }

    fn wait(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Outcome<()> {
        let start = Instant::now();
        loop {
            let status = self.status()?;
            if wanted(&status) {
                return Ok(());
            }
            if start.elapsed() > SYNC_LIMIT {
                return Err(format!("waited {SYNC_LIMIT:?} until {what}; last seen: {status}").into());
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    fn wait_in_sync(&self) -> Outcome<()> {
        self.wait("both disks are equal", in_sync)
    }

    /// Parts the nodes, has `write` change something, and joins them again. Flushes first: what no flush has covered yet
    /// may be missing on the standby's disk, and counts as changed.
    fn apart(&mut self, write: impl FnOnce(&mut NbdClient) -> Outcome<()>) -> Outcome<()> {
        self.client.flush()?;
        self.mirror.command(0, &["disconnect", "bench"])?;
        self.wait("the nodes are apart", |status| status["connection"] != "connected")?;
        write(&mut self.client)?;
        self.client.flush()?;
        self.mirror.command(0, &["connect", "bench"])
    }
}

fn in_sync(status: &Value) -> bool {
    status["connection"] == "connected"
        && status["disk_state"] == "UpToDate"
        && status["peer_state"] == "UpToDate"
        && status["dirty_bytes"] == 0
}

/// Bytes that alpha sends for what changed while beta was away.
fn bytes(directory: &Path, disk_len: u64) -> Outcome<Vec<Figure>> {
    let relay = Relay::start()?;
    let mirror = Mirror::start_over(directory, "adaptive", disk_len, &relay)?;
    let mut pair = Pair::new(mirror, disk_len)?;
    let grains = disk_len / GRAIN_LEN;
    let mut figures = Vec::new();
    for (percent, id, title) in SHARES {
        // Every hundredth, tenth or second grain, at places that differ from grain to grain.
        let step = 100 / percent;
        let chosen = (0..grains).filter(|grain| grain % step == 0);
        let before = relay.sent();
        let mut changed = 0;
        pair.apart(|client| {
            for grain in chosen {
                let at = grain * GRAIN_LEN + grain * 7 % 16 * WRITE_LEN as u64;
                client.write(at, &[u8::try_from(percent)?; WRITE_LEN], false)?;
                changed += GRAIN_LEN;
            }
            Ok(())
        })?;
        pair.wait_in_sync()?;
        let value = (relay.sent() - before) as f64 / changed as f64;
        figures.push(Figure { id, title, value, at_most: Some(1.05) });
    }
    pair.mirror.check()?;
    Ok(figures)
}

/// The rate of a copy of everything, and what a client feels of it.
fn speed(directory: &Path, disk_len: u64, time: Duration) -> Outcome<Vec<Row>> {
    let load =
        Load { address: Ipv4Addr::LOCALHOST.into(), wait: Wait::Busy, depth: 8, payload_len: 1 << 20, time };
    let mut pair = Pair::new(Mirror::start(directory, "adaptive", disk_len, false)?, disk_len)?;
    let link = floor::run(load)?;
    let alone = pair.copy_everything()?;
    let (before, during) = pair.felt(time)?;
    pair.wait_in_sync()?;
    pair.mirror.check()?;
    let row = |id, title, against, summary| Row { id, title, against, rounds: vec![summary] };
    let rate = Against { ids: vec!["resync-link"], measure: Measure::Rate, target: None };
    let p99 = Against { ids: vec!["resync-before"], measure: Measure::P99, target: Some(2.0) };
    Ok(vec![
        row("resync-link", "floor 1 MiB x8, busy, beside a resync", None, link),
        row("resync-all", "resync of everything, no clients", Some(rate), alone),
        row("resync-before", "costandby NBD 4 KiB x1, before a resync", None, before),
        row("resync-during", "costandby NBD 4 KiB x1, during a resync", Some(p99), during),
    ])
}

impl Pair {
    /// Has beta give up what it holds; returns once alpha has begun to copy everything.
    fn invalidate(&self) -> Outcome<()> {
        self.mirror.command(1, &["invalidate", "bench"])?;
        let start = Instant::now();
        // A copy that is over before the first look is missed, which only a tiny one can be.
        while self.status()?["peer_state"] == "UpToDate" && start.elapsed() < BEGIN_LIMIT {
            std::thread::sleep(LOOK_INTERVAL);
        }
        Ok(())
    }

    /// Has the whole disk copied, without clients.
    fn copy_everything(&mut self) -> Outcome<Summary> {
        self.invalidate()?;
        let start = Instant::now();
        self.wait_in_sync()?;
        let seconds = start.elapsed().as_secs_f64();
        Ok(Summary {
            requests: 1,
            p50_us: seconds * 1e6,
            p99_us: seconds * 1e6,
            iops: 1.0 / seconds,
            mb_s: self.disk_len as f64 / 1e6 / seconds,
        })
    }

    /// What one writer measures for a time without a copy, and then as long as enough of its writes fall into copies.
    fn felt(&mut self, time: Duration) -> Outcome<(Summary, Summary)> {
        let copying = Arc::new(AtomicBool::new(false));
        let stop = Arc::new(AtomicBool::new(false));
        let counted = Arc::new(AtomicU64::new(0));
        let client = NbdClient::connect(&self.mirror.uri.parse::<NbdUri>()?, &Default::default())?;
        let writer = {
            let (copying, stop, counted) = (copying.clone(), stop.clone(), counted.clone());
            let disk_len = self.disk_len;
            std::thread::spawn(move || keep_writing(client, disk_len, &copying, &stop, &counted))
        };
        std::thread::sleep(time);
        let copied = self.copy_under_load(&copying, &counted);
        stop.store(true, Ordering::SeqCst);
        let felt = writer.join().expect("the writer does not panic");
        copied?;
        felt
    }

    fn copy_under_load(&self, copying: &AtomicBool, counted: &AtomicU64) -> Outcome<()> {
        for _ in 0..COPIES_MAX {
            self.invalidate()?;
            copying.store(true, Ordering::SeqCst);
            let done = self.wait("both disks are equal", |status| {
                status["connection"] == "connected" && status["peer_state"] == "UpToDate"
            });
            copying.store(false, Ordering::SeqCst);
            done?;
            if counted.load(Ordering::SeqCst) >= SAMPLES_MIN {
                break;
            }
        }
        Ok(())
    }
}

/// Writes at random places; latencies of before and during copies.
fn keep_writing(
    mut client: NbdClient,
    disk_len: u64,
    copying: &AtomicBool,
    stop: &AtomicBool,
    counted: &AtomicU64,
) -> Outcome<(Summary, Summary)> {
    let mut recorders = [Recorder::new(WRITE_LEN), Recorder::new(WRITE_LEN)];
    let mut spent = [Duration::ZERO; 2];
    let (mut at, blocks) = (1_u64, disk_len / WRITE_LEN as u64);
    let mut began = false;
    while !stop.load(Ordering::SeqCst) {
        let during = copying.load(Ordering::SeqCst);
        began |= during;
        // A linear congruential generator's upper bits are random enough for places.
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let start = Instant::now();
        client.write((at >> 33) % blocks * WRITE_LEN as u64, &[7; WRITE_LEN], false)?;
        let took = start.elapsed();
        // Between two copies nothing counts: what was sent for the last one may still be under way.
        if during || !began {
            let which = usize::from(during);
            recorders[which].record(took);
            spent[which] += took;
            counted.fetch_add(u64::from(during), Ordering::SeqCst);
        }
    }
    let [before, during] = [0, 1].map(|which| {
        // Rates are over the time of the requests that count, not over that between copies.
        let summary = recorders[which].finish();
        let iops = summary.requests as f64 / spent[which].as_secs_f64().max(1e-9);
        Summary { iops, mb_s: iops * WRITE_LEN as f64 / 1e6, ..summary }
    });
    Ok((before, during))
}
