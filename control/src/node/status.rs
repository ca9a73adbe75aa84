//! What the admin API asks of a daemon: its volumes' status, and commands for them.

use super::addresses::Addresses;
use super::inbox::Input;
use super::{Phase, Registry, Shared};
use crate::admin::{self, AdminBackend, Answer, CommandError};
use crate::link::Kind;
use crate::progress::percent_in_sync;
use crate::role::{Connection, Status as ControllerStatus, Verification};
use costandby_datapath::disk::superblock::DiskState;
use costandby_datapath::reactor::command::VolumeCounters;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// How long after its start a daemon keeps a question for its status waiting for disks that are still being opened: most
/// are open within milliseconds, and who has just started it would rather hear of their real state.
const OPENING_MAX: Duration = Duration::from_secs(2);

/// How often such a question looks again.
const OPENING_LOOK: Duration = Duration::from_millis(5);

/// The daemon, as the admin API sees it.
pub(super) struct Backend {
    registry: Arc<Registry>,
    addresses: Arc<Addresses>,
    began: Instant,
}

impl Backend {
    pub(super) fn new(registry: Arc<Registry>, addresses: Arc<Addresses>) -> Self {
        Self { registry, addresses, began: Instant::now() }
    }

    async fn wait_for_opening(&self) {
        let opening = || self.registry.volumes.iter().any(|shared| shared.phase() == Phase::Opening);
        while self.began.elapsed() < OPENING_MAX && opening() {
            tokio::time::sleep(OPENING_LOOK).await;
        }
    }
}

impl AdminBackend for Backend {
    fn status(&self) -> Answer<'_, admin::Status> {
        Box::pin(async move {
            self.wait_for_opening().await;
            let volumes = self.registry.volumes.iter();
            admin::Status {
                node: self.registry.node.as_str().to_owned(),
                volumes: volumes.map(|shared| volume_status(&self.registry, shared)).collect(),
                not_listening: self.addresses.not_listening(),
                log_lines_dropped: crate::logging::lines_dropped(),
                log_dropping: crate::logging::is_dropping(),
            }
        })
    }

    fn command(
        &self,
        volume: String,
        command: admin::Command,
        asked: admin::Asked,
    ) -> Answer<'_, Result<String, CommandError>> {
        Box::pin(async move {
            let node = || self.registry.node.as_str().to_owned();
            let found = self.registry.volumes.iter().find(|v| v.config.name.as_str() == volume);
            let Some(shared) = found else {
                return Err(CommandError::NoSuchVolume { node: node(), volume });
            };
            let (reply, answer) = oneshot::channel();
            let stopping = || CommandError::Refused(format!("node {} is stopping", node()));
            shared.inbox.send(Input::Admin { command, asked, reply }).map_err(|_| stopping())?;
            answer.await.map_err(|_| stopping())?.map_err(CommandError::Refused)
        })
    }
}

pub(super) fn volume_status(registry: &Registry, shared: &Shared) -> admin::VolumeStatus {
    let status = shared.status.lock().expect("nobody panics with it").clone();
    let phase = shared.phase();
    let counters = match phase {
        Phase::Open(index) => registry.reactor.counters(index),
        Phase::Opening | Phase::Failed => Arc::default(),
    };
    let resyncing = counters.resyncing.load(Ordering::Relaxed);
    let progress = shared.progress.lock().expect("nobody panics with it").clone();
    let copied_x100 = match status.connection {
        Connection::SyncSource if resyncing => Some(counters.resync_percent_x100.load(Ordering::Relaxed)),
        Connection::SyncTarget => progress.percent_x100(),
        _ => None,
    };
    #[expect(clippy::cast_precision_loss, reason = "at most 10000")]
    let percent = copied_x100.map(|percent| percent as f64 / 100.0);
    let link = shared.link.lock().expect("nobody panics with it").clone();
    let (link, link_note) = link.map_or((Kind::Tcp, None), |link| (link.kind, link.note));
    let in_flight = counters.in_flight.load(Ordering::Relaxed);
    let dirty_bytes = counters.dirty_bytes.load(Ordering::Relaxed);
    let disk_state = if phase == Phase::Opening { admin::ATTACHING } else { status.disk_state.as_str() };
    admin::VolumeStatus {
        name: shared.config.name.as_str().to_owned(),
        role: status.role.as_str().to_owned(),
        disk_state: disk_state.to_owned(),
        peer_state: status.peer_state.map_or("Unknown", |s| s.as_str()).to_owned(),
        link: link.as_str().to_owned(),
        link_note,
        ack: shared.config.ack_str().to_owned(),
        epoch: status.epoch.0,
        generation: format!("{:016x}", status.generation.0),
        size: shared.config.size,
        dirty_bytes,
        resync_percent: percent
            .unwrap_or_else(|| percent_without_copy(&status, shared.config.size, dirty_bytes)),
        resync_rate: progress.rate(),
        resync_eta_s: progress.eta_s(),
        connection: status.connection.as_str().to_owned(),
        peer: shared.peer.as_str().to_owned(),
        parted: status.parted,
        advice: status.advice,
        warnings: shared.warnings(),
        in_flight,
        verify: verify_status(&status.verification, &counters),
        frozen: status.frozen || counters.frozen.load(Ordering::Relaxed),
        violations: counters.violations.load(Ordering::Relaxed),
    }
}

/// The daemon's last verification, if there was any.
fn verify_status(verification: &Verification, counters: &VolumeCounters) -> Option<admin::VerifyStatus> {
    let Verification { id, running, repair, outcome } = verification;
    #[expect(clippy::cast_precision_loss, reason = "at most 10000")]
    let percent = counters.verify_percent_x100.load(Ordering::Relaxed) as f64 / 100.0;
    let found = counters.verify_differing_bytes.load(Ordering::Relaxed);
    (*id > 0).then(|| admin::VerifyStatus {
        id: *id,
        running: *running,
        repair: *repair,
        percent,
        differing_bytes: if *running { found } else { outcome.findings.differing },
        differing_ranges: outcome.findings.ranges,
        ranges: outcome.findings.listed.iter().map(|range| [range.start, range.len]).collect(),
        repaired: outcome.repaired,
        unfinished: outcome.unfinished.clone(),
    })
}

/// How much is in sync while no copy counts: a target does not count it itself, and a source may not have begun.
fn percent_without_copy(status: &ControllerStatus, size: u64, dirty_bytes: u64) -> f64 {
    let current = |state: DiskState| state == DiskState::UpToDate;
    let whole = current(status.disk_state) && status.peer_state.is_none_or(current);
    match status.connection {
        Connection::SyncTarget | Connection::SyncSource => 0.0,
        _ if !whole => 0.0,
        _ => percent_in_sync(size, dirty_bytes),
    }
}
