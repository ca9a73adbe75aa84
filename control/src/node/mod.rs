//! The daemon: opens the disks, starts the reactor, and runs one controller task a volume.
//!
//! Control and datapath meet here. The reactor's thread moves data and knows no policy; each volume's task
//! ([`volume`]) feeds its sans-IO controller with what happens and carries out what it decides; [`peers`] turns
//! connections from other nodes into conversations of those tasks. A controller that breaks its own invariants ends the
//! daemon: a restart is safe at any instant, serving on is not.

use crate::admin::{self, AdminBackend, AdminServer, Answer, CommandError};
use crate::config::quantity::display_size;
use crate::config::{Config, ConfigError, Disk, Endpoint, NodeName, Volume};
use crate::kernel::{boot_id, random_number, random_source};
use crate::link::Kind;
use crate::progress::Progress;
use crate::role::{
    Connection, Found, Status as ControllerStatus, Verification, VolumeController, VolumeSettings,
};
use costandby_datapath::disk::image::{Backing, DiskError, DiskImage};
use costandby_datapath::disk::metadata::file::open_at;
use costandby_datapath::disk::metadata::medium::FileMedium;
use costandby_datapath::disk::metadata::{MetadataError, Report, SuperblockStore};
use costandby_datapath::disk::record::Record;
use costandby_datapath::disk::superblock::{Location, Superblock, SuperblockError};
use costandby_datapath::reactor::command::{Command, Event as ReactorEvent, VolumeCounters, VolumeSpec};
use costandby_datapath::reactor::{Reactor, ReactorConfig, ReactorHandle};
use costandby_datapath::transport::rdma::windows::{Machine, disk_memory};
use link::LinkStatus;
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use volume::{Input, Surroundings, VolumeTask};

mod link;
mod listeners;
mod negotiate;
mod peers;
mod rdma;
mod volume;

/// How long a shutdown may take before the daemon ends all the same: a flush of a slow disk and then some.
const SHUTDOWN_MAX: Duration = Duration::from_secs(40);

/// Why a daemon could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The configuration does not fit this node.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No volume has a disk here.
    #[error("no volume has a disk on node {node}: add `disk.{node} = …` to a volume in {file}")]
    NoVolumes {
        /// This node.
        node: String,
        /// The configuration.
        file: PathBuf,
    },
    /// A volume's metadata cannot be used.
    #[error("volume {volume}: {source}")]
    Metadata {
        /// Which.
        volume: String,
        /// Why.
        source: Box<MetadataError>,
    },
    /// A volume's disk cannot be used.
    #[error("volume {volume}: {source}")]
    Disk {
        /// Which.
        volume: String,
        /// Why.
        source: DiskError,
    },
    /// The admin socket cannot be had.
    #[error(transparent)]
    Admin(#[from] admin::AdminError),
    /// A socket cannot be had.
    #[error("cannot listen on {endpoint}: {source}")]
    Listen {
        /// Where.
        endpoint: String,
        /// The system's word.
        source: io::Error,
    },
    /// The system refuses something basic.
    #[error("cannot start: {doing}: {source}")]
    System {
        /// What.
        doing: &'static str,
        /// The system's word.
        source: io::Error,
    },
}

/// What other tasks see of a volume.
struct Shared {
    config: Volume,
    peer: NodeName,
    status: Mutex<ControllerStatus>,
    /// `None` until the task runs.
    link: Mutex<Option<LinkStatus>>,
    /// Of the copy under way.
    progress: Mutex<Progress>,
    inbox: mpsc::UnboundedSender<Input>,
}

/// What all tasks share.
struct Registry {
    node: NodeName,
    reactor: ReactorHandle,
    volumes: Vec<Arc<Shared>>,
}

/// Runs a node's daemon until SIGTERM or SIGINT. Blocks.
///
/// # Errors
/// [`NodeError`], all before anything is served.
pub fn run(config: &Config, node: &str) -> Result<(), NodeError> {
    end_on_panic();
    config.check_supported(node)?;
    let this = config.node(node)?.clone();
    let admin = AdminServer::bind(&this.admin)?;
    let (mut opened, mut records) = (Vec::new(), Vec::new());
    for (volume, disk) in config.volumes_of(node) {
        let (volume, record) = open_volume(volume, disk, node)?;
        opened.push(volume);
        records.push(record);
    }
    if opened.is_empty() {
        return Err(NodeError::NoVolumes { node: node.into(), file: config.file.clone() });
    }
    let mut nbd_listeners = Vec::new();
    for endpoint in &this.nbd {
        nbd_listeners.push(listeners::bind_nbd(endpoint)?);
    }
    let peer_listener = listeners::bind_peers(this.listen)?;
    if this.metrics.is_some() {
        tracing::warn!("`metrics` is set, but this release serves none");
    }
    warn_about_exposure(config, &this.nbd, this.listen);

    let system = |doing| move |source| NodeError::System { doing, source };
    let (event_sender, events) = crossbeam_channel::unbounded();
    let specs = opened
        .iter()
        .zip(records)
        .map(|(o, record)| VolumeSpec {
            name: o.config.name.as_str().to_owned(),
            disk: Arc::clone(&o.disk),
            ack: o.config.ack,
            on_peer_loss: o.config.on_peer_loss,
            checksum_first: o.config.checksum_first,
            record,
        })
        .collect();
    let reactor_config = ReactorConfig { poll: this.poll, peer_timeout: config.peer_timeout, nbd_listeners };
    let (reactor, handle) =
        Reactor::new(reactor_config, specs, event_sender).map_err(system("the reactor"))?;
    let reactor_thread = std::thread::Builder::new()
        .name("reactor".into())
        .spawn(move || reactor.run())
        .map_err(system("the reactor's thread"))?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(system("the control runtime"))?;
    let served =
        runtime.block_on(serve(config, &this.name, opened, handle.clone(), events, admin, peer_listener));
    handle.send(Command::Shutdown);
    // A reactor that panicked has ended the process already.
    let _ = reactor_thread.join();
    for endpoint in &this.nbd {
        if let Endpoint::Unix(path) = endpoint {
            // A socket that stays is replaced by the next start.
            let _ = std::fs::remove_file(path);
        }
    }
    tracing::info!(node, "stopped");
    served
}

struct OpenVolume {
    config: Volume,
    disk: Arc<DiskImage>,
    superblock: Superblock,
    /// The map of what may differ was not empty.
    dirty: bool,
    store: Option<SuperblockStore<FileMedium>>,
}

fn open_volume(volume: &Volume, disk: &Disk, node: &str) -> Result<(OpenVolume, Record), NodeError> {
    let name = volume.name.as_str();
    let config = volume.clone();
    let disk_error = |source| NodeError::Disk { volume: name.into(), source };
    let Disk::Path(path) = disk else {
        let disk = DiskImage::memory(name, volume.size).map_err(disk_error)?;
        let record = Record::in_memory(volume.size);
        let superblock = Superblock::fresh(name, node, volume.size, true);
        return Ok((OpenVolume { config, disk, superblock, dirty: false, store: None }, record));
    };
    let meta_error = |source| NodeError::Metadata { volume: name.into(), source: Box::new(source) };
    let disk = DiskImage::open(path, volume.size).map_err(disk_error)?;
    let location = metadata_location(path, &disk).map_err(|error| meta_error(error.into()))?;
    let area = random_number().map_err(|source| NodeError::System { doing: "/dev/urandom", source })?;
    let mut opened = open_at(&location, name, node, volume.size, area).map_err(meta_error)?;
    tell_report(name, &opened.report);
    // Before anything is served: what a crash left in the log must be in the map, on record.
    opened.recover().map_err(|error| meta_error(error.into()))?;
    let dirty = opened.dirty.dirty_bytes();
    if dirty > 0 {
        tracing::info!(volume = name, "{} may differ from the peer's disk", display_size(dirty));
    }
    let superblock = opened.superblock.clone();
    if !superblock.clean {
        // A daemon that was killed left writes in the system's cache alone. The peer has them, too, until it is
        // overwritten with this disk; from then on a loss of power here must not take them.
        tracing::info!(volume = name, "flushing what the daemon before this one left; it answers after that");
        disk.flush().map_err(disk_error)?;
    }
    let (record, store) = Record::of(opened);
    Ok((OpenVolume { config, disk, superblock, dirty: dirty > 0, store: Some(store) }, record))
}

/// What an operator may want to know of how metadata was found.
fn tell_report(volume: &str, report: &Report) {
    let Report { damaged_copy, upgraded, hot_extents, torn_transaction, activity_damage, dirty_damage } =
        report;
    if let Some((copy, error)) = damaged_copy {
        tracing::warn!(volume, copy, %error, "one copy of the metadata was damaged; the other serves");
    }
    if *upgraded {
        tracing::info!(volume, "the metadata is of format 2 now; earlier releases refuse it");
    }
    if *hot_extents > 0 || *torn_transaction {
        tracing::info!(
            volume,
            hot_extents,
            torn_transaction,
            "the daemon before this one ended while it served"
        );
    }
    if let Some(error) = activity_damage {
        tracing::error!(volume, %error, "the activity log is damaged: the whole disk counts as differing");
    }
    if dirty_damage.sectors > 0 {
        tracing::error!(
            volume,
            sectors = dirty_damage.sectors,
            "the dirty bitmap is damaged in places, which count as differing: check the medium"
        );
        for (range, fault) in &dirty_damage.first {
            tracing::error!(volume, "bytes {range}: {fault}");
        }
    }
}

/// Where a disk's metadata is: beside a file, at the end of a device.
fn metadata_location(path: &Path, disk: &DiskImage) -> Result<Location, SuperblockError> {
    if disk.backing() != Backing::BlockDevice {
        return Ok(Location::beside(path));
    }
    let io = |source| SuperblockError::Io { doing: "measuring", path: path.into(), source };
    let device = std::fs::File::open(path).map_err(io)?;
    let len = rustix::fs::seek(&device, rustix::fs::SeekFrom::End(0)).map_err(|e| io(e.into()))?;
    Location::at_end_of(path, len)
        .filter(|location| location.offset >= disk.size())
        .ok_or(SuperblockError::Truncated { path: path.into(), found: 0 })
}

fn warn_about_exposure(config: &Config, nbd: &[Endpoint], listen: std::net::SocketAddr) {
    let open_nbd = nbd.iter().any(|e| matches!(e, Endpoint::Tcp(address) if !address.ip().is_loopback()));
    if config.insecure && (open_nbd || !listen.ip().is_loopback()) {
        tracing::warn!(
            "insecure = true: listening beyond loopback, and whoever reaches these ports is trusted: peers and NBD \
             clients are not authenticated and nothing is encrypted"
        );
    }
}

/// A controller or reactor that breaks its own invariants must not serve on.
fn end_on_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        eprintln!(
            "costandby: internal error, the daemon ends (a restart is safe); please report the lines above"
        );
        std::process::abort();
    }));
}

async fn serve(
    config: &Config,
    node: &NodeName,
    opened: Vec<OpenVolume>,
    reactor: ReactorHandle,
    events: crossbeam_channel::Receiver<ReactorEvent>,
    admin: AdminServer,
    peer_listener: std::net::TcpListener,
) -> Result<(), NodeError> {
    let system = |doing| move |source| NodeError::System { doing, source };
    let (rdma_memory, machine, links) =
        (config.node(node.as_str())?.rdma_memory, Machine::here(), opened.len());
    let boot = boot_id().map_err(system("/proc/sys/kernel/random/boot_id"))?;
    let makers = rdma::Makers::default();
    let mut shared = Vec::new();
    let mut tasks = Vec::new();
    for (index, open) in opened.into_iter().enumerate() {
        let size = open.config.size;
        let peer = open.config.peer_of(node.as_str()).expect("the configuration was checked").clone();
        let settings = VolumeSettings {
            volume: open.config.name.as_str().to_owned(),
            node: node.as_str().to_owned(),
            peer: peer.as_str().to_owned(),
            configured_primary: open.config.primary == *node,
            on_peer_loss: open.config.on_peer_loss,
            ack: open.config.ack,
        };
        let controller = VolumeController::new(
            settings,
            Found { superblock: open.superblock, dirty: open.dirty, boot },
            random_source().map_err(system("/dev/urandom"))?,
        );
        let (inbox, queue) = mpsc::unbounded_channel();
        let entry = Arc::new(Shared {
            status: Mutex::new(controller.status()),
            link: Mutex::new(None),
            progress: Mutex::default(),
            config: open.config,
            peer: peer.clone(),
            inbox,
        });
        let surroundings = Surroundings {
            peer_address: config.node(peer.as_str())?.listen,
            node: node.as_str().to_owned(),
            local: config.node(node.as_str())?.listen.ip(),
            rdma: rdma::setup(disk_memory(rdma_memory, &machine, links, size), &makers),
        };
        tasks.push(VolumeTask::new(
            index,
            Arc::clone(&entry),
            controller,
            open.store,
            reactor.clone(),
            queue,
            surroundings,
        ));
        shared.push(entry);
    }
    let registry = Arc::new(Registry { node: node.clone(), reactor: reactor.clone(), volumes: shared });
    forward_events(events, &registry).map_err(system("the event thread"))?;
    let tasks: Vec<_> = tasks.into_iter().map(|task| tokio::spawn(task.run())).collect();
    let listener = tokio::net::TcpListener::from_std(peer_listener).map_err(system("the peer listener"))?;
    let acceptor = tokio::spawn(peers::accept(listener, Arc::clone(&registry)));

    let (stop_admin, admin_stopped) = oneshot::channel::<()>();
    let backend = Arc::new(Backend { registry: Arc::clone(&registry) });
    let admin = tokio::spawn(admin.serve(backend, async move {
        let _ = admin_stopped.await;
    }));
    tracing::info!(node = node.as_str(), volumes = registry.volumes.len(), "up");
    stop_signal().await.map_err(system("signal handling"))?;
    tracing::info!("stopping: finishing what is under way");
    acceptor.abort();
    for volume in &registry.volumes {
        let _ = volume.inbox.send(Input::Shutdown);
    }
    let all = async {
        for task in tasks {
            let _ = task.await;
        }
    };
    if tokio::time::timeout(SHUTDOWN_MAX, all).await.is_err() {
        tracing::warn!("gave up waiting: the next start treats this one as a crash, which is safe");
    }
    let _ = stop_admin.send(());
    let _ = admin.await;
    Ok(())
}

async fn stop_signal() -> io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Carries the reactor's events to the volumes' tasks.
fn forward_events(
    events: crossbeam_channel::Receiver<ReactorEvent>,
    registry: &Arc<Registry>,
) -> io::Result<()> {
    let inboxes: Vec<_> = registry.volumes.iter().map(|v| v.inbox.clone()).collect();
    std::thread::Builder::new().name("events".into()).spawn(move || {
        for event in events {
            let volume = match &event {
                ReactorEvent::LinkDown { volume, .. }
                | ReactorEvent::LinkSwitched { volume, .. }
                | ReactorEvent::SwitchFailed { volume, .. }
                | ReactorEvent::Settled { volume }
                | ReactorEvent::AskAlone { volume }
                | ReactorEvent::ResyncDone { volume }
                | ReactorEvent::Verified { volume, .. }
                | ReactorEvent::PeerMessage { volume, .. }
                | ReactorEvent::DiskFailing { volume, .. }
                | ReactorEvent::DiskFailed { volume, .. }
                | ReactorEvent::Quiesced { volume } => *volume,
                ReactorEvent::Stopped => return,
            };
            // A task that ended (shutdown) needs no more news.
            let _ = inboxes[volume].send(Input::Reactor(event));
        }
    })?;
    Ok(())
}

struct Backend {
    registry: Arc<Registry>,
}

impl AdminBackend for Backend {
    fn status(&self) -> Answer<'_, admin::Status> {
        let volumes = self.registry.volumes.iter().enumerate();
        let volumes = volumes.map(|(index, shared)| volume_status(&self.registry, index, shared)).collect();
        let status = admin::Status { node: self.registry.node.as_str().to_owned(), volumes };
        Box::pin(async move { status })
    }

    fn command(&self, volume: String, command: admin::Command) -> Answer<'_, Result<String, CommandError>> {
        Box::pin(async move {
            let node = || self.registry.node.as_str().to_owned();
            let found = self.registry.volumes.iter().find(|v| v.config.name.as_str() == volume);
            let Some(shared) = found else {
                return Err(CommandError::NoSuchVolume { node: node(), volume });
            };
            let (reply, answer) = oneshot::channel();
            let stopping = || CommandError::Refused(format!("node {} is stopping", node()));
            shared.inbox.send(Input::Admin { command, reply }).map_err(|_| stopping())?;
            answer.await.map_err(|_| stopping())?.map_err(CommandError::Refused)
        })
    }
}

fn volume_status(registry: &Registry, index: usize, shared: &Shared) -> admin::VolumeStatus {
    let status = shared.status.lock().expect("nobody panics with it").clone();
    let counters = registry.reactor.counters(index);
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
    admin::VolumeStatus {
        name: shared.config.name.as_str().to_owned(),
        role: status.role.as_str().to_owned(),
        disk_state: status.disk_state.as_str().to_owned(),
        peer_state: status.peer_state.map_or("Unknown", |s| s.as_str()).to_owned(),
        link: link.as_str().to_owned(),
        link_note,
        ack: shared.config.ack_str().to_owned(),
        epoch: status.epoch.0,
        generation: format!("{:016x}", status.generation.0),
        size: shared.config.size,
        dirty_bytes: counters.dirty_bytes.load(Ordering::Relaxed),
        resync_percent: percent.unwrap_or_else(|| percent_without_copy(status.connection)),
        resync_rate: progress.rate(),
        resync_eta_s: progress.eta_s(),
        connection: status.connection.as_str().to_owned(),
        peer: shared.peer.as_str().to_owned(),
        advice: status.advice,
        in_flight,
        verify: verify_status(&status.verification, counters),
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

/// A target does not count the copy's progress itself, and a source may not have begun.
fn percent_without_copy(connection: Connection) -> f64 {
    match connection {
        Connection::SyncTarget | Connection::SyncSource => 0.0,
        _ => 100.0,
    }
}

/// Answers owed to operators, by the id the controller knows them by.
type Replies = HashMap<u64, oneshot::Sender<Result<String, String>>>;

#[cfg(test)]
mod tests;
