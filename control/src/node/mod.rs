//! The daemon: starts the reactor, opens the disks, binds the addresses, and runs one task a volume.
//!
//! Control and datapath meet here. The reactor's thread moves data and knows no policy; each volume's task has its disk
//! opened ([`attach`]), then ([`volume`]) feeds its sans-IO controller with what happens and carries out what it decides;
//! [`peers`] turns connections from other nodes into conversations of those tasks. One disk that cannot be opened, or one
//! address that cannot be bound ([`addresses`]), keeps nothing else down. A controller that breaks its own invariants ends
//! the daemon: a restart is safe at any instant, serving on is not.

use crate::admin::{self, AdminBackend, AdminError, AdminServer};
use crate::compared::settings as settings_of;
use crate::config::{Config, ConfigError, Endpoint, Node};
use crate::descriptors::{self, Judged, Need};
use crate::kernel::{boot_id, random_source};
use crate::role::VolumeSettings;
use crate::secure::keyring::{KeyError, Keyring};
use crate::task::Event;
use addresses::Addresses;
use attach::Attachment;
use connection::Route;
use costandby_datapath::disk::superblock::DiskState;
use costandby_datapath::reactor::command::{Command, Event as ReactorEvent};
use costandby_datapath::reactor::{Reactor, ReactorConfig, ReactorHandle};
use costandby_datapath::transport::rdma::windows::{Machine, disk_memory};

use inbox::Input;
use registry::{Phase, Registry, Shared};
use status::Backend;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use volume::Surroundings;

mod addresses;
mod advice;
mod attach;
mod blocking;
mod connection;
mod conversation;
mod inbox;
mod listeners;
mod negotiate;
mod open;
mod peers;
mod rdma;
mod registry;
mod signals;
mod status;
mod strangers;
mod volume;
mod watch;

/// Threads for blocking calls of the daemon itself: sockets that are bound, RDMA that is looked for.
const BLOCKING_THREADS: usize = 64;

/// Threads for blocking calls of one volume at a time: its disk being opened, or its metadata stored while a store before
/// that hangs, and two RDMA connections in the making.
const BLOCKING_THREADS_A_VOLUME: usize = 4;

/// How often the key file is looked at: a key that is replaced step by step is in use before an operator has typed the next.
const KEY_LOOK: Duration = Duration::from_secs(1);

/// How long a shutdown may take before the daemon ends all the same: a flush of a slow disk and then some.
const SHUTDOWN_MAX: Duration = Duration::from_secs(40);

/// How long a start waits for the first try of the admin socket, whose directory may be on a file system that hangs. The disks
/// are locked against a second daemon all the same.
const ADMIN_BIND_MAX: Duration = Duration::from_secs(2);

/// Why a daemon could not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The configuration does not fit this node.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The pair's key cannot be used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// No volume has a disk here.
    #[error("no volume has a disk on node {node}: add `disk.{node} = …` to a volume in {file}")]
    NoVolumes {
        /// This node.
        node: String,
        /// The configuration.
        file: PathBuf,
    },
    /// The system gives fewer descriptors than the volumes need.
    #[error("{text}")]
    Descriptors {
        /// How many are needed, how many there are, what to do.
        text: String,
    },
    /// A daemon of this node runs already.
    #[error(transparent)]
    Admin(#[from] admin::AdminError),
    /// The system refuses something basic.
    #[error("cannot start: {doing}: {source}")]
    System {
        /// What.
        doing: &'static str,
        /// The system's word.
        source: io::Error,
    },
}

/// Runs a node's daemon until SIGTERM or SIGINT. Blocks.
///
/// # Errors
/// [`NodeError`], all before anything is served.
pub fn run(config: &Config, node: &str) -> Result<(), NodeError> {
    crate::logging::end_on_panic();
    signals::ignore_those_that_ask_for_nothing();
    config.check_supported(node)?;
    let this = config.node(node)?.clone();
    let connections_max = descriptors_for_clients(config, &this)?;
    let keys = Arc::new(Keyring::open(config.key.as_deref())?);
    let addresses = Arc::new(Addresses::default());
    // Two daemons of a node would be at each other's throat; anything else that is wrong with the socket can wait.
    let admin = match bind_admin(&this) {
        Some(Err(error @ AdminError::AlreadyRuns { .. })) => return Err(error.into()),
        Some(bound) => addresses.note(&admin_address(&this), bound.map_err(|error| error.to_string())),
        None => None,
    };
    if config.volumes_of(node).next().is_none() {
        return Err(NodeError::NoVolumes { node: node.into(), file: config.file.clone() });
    }
    if this.metrics.is_some() {
        tracing::warn!("`metrics` is set, but this release serves none");
    }
    warn_about_exposure(config, &this.nbd, this.listen);

    let system = |doing| move |source| NodeError::System { doing, source };
    let (event_sender, events) = crossbeam_channel::unbounded();
    let reactor_config =
        ReactorConfig { poll: this.poll, peer_timeout: config.peer_timeout, nbd_listeners: Vec::new() };
    let (reactor, handle) =
        Reactor::new(reactor_config, Vec::new(), event_sender).map_err(system("the reactor"))?;
    let reactor = reactor.with_connections_max(connections_max);
    let reactor_thread = std::thread::Builder::new()
        .name("reactor".into())
        .spawn(move || reactor.run())
        .map_err(system("the reactor's thread"))?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // A disk that hangs holds the threads that open it and store its metadata, and no other volume's.
        .max_blocking_threads(BLOCKING_THREADS + BLOCKING_THREADS_A_VOLUME * config.volumes_of(node).count())
        .build()
        .map_err(system("the control runtime"))?;
    let start = Start { config, node: &this, keys, reactor: handle.clone(), addresses };
    let served = runtime.block_on(start.serve(events, admin));
    handle.send(Command::Shutdown);
    // A reactor that panicked has ended the process already.
    let _ = reactor_thread.join();
    // What still waits for a disk then is safe to break off.
    runtime.shutdown_background();
    tracing::info!(node, "stopped");
    served
}

/// Has the system give all the descriptors it may, and gives how many NBD connections they are enough for.
fn descriptors_for_clients(config: &Config, node: &Node) -> Result<usize, NodeError> {
    let (limit, need) = (descriptors::raise_limit(), Need::here(config, node));
    let clients = match need.judge(limit) {
        Judged::TooFew => {
            return Err(NodeError::Descriptors { text: need.refusal(node.name.as_str(), limit) });
        }
        Judged::FewClients(clients) => {
            tracing::warn!(
                "of the {limit} descriptors that the system gives this process {clients} are left for NBD connections, and more \
                 are turned away: {}",
                need.remedy()
            );
            clients
        }
        Judged::Enough(clients) => {
            tracing::debug!(limit, clients, "descriptors needed: {}", need.sum());
            clients
        }
    };
    Ok(usize::try_from(clients).unwrap_or(usize::MAX))
}

fn warn_about_exposure(config: &Config, nbd: &[Endpoint], listen: std::net::SocketAddr) {
    let open_nbd = nbd.iter().any(|e| matches!(e, Endpoint::Tcp(address) if !address.ip().is_loopback()));
    if config.key.is_none() {
        let beyond =
            if open_nbd || !listen.ip().is_loopback() { "listening beyond loopback, and " } else { "" };
        tracing::warn!(
            "insecure = true and no key: {beyond}whoever reaches {listen} may overwrite the volumes, as a peer; `costandby \
             keygen` makes a key"
        );
    }
    if open_nbd {
        tracing::warn!(
            "insecure for NBD clients: beyond loopback they are neither authenticated nor encrypted, and whoever reaches the \
             addresses of `nbd` reads and writes the volumes"
        );
    }
}

/// The first try of the admin socket. `None`: the system does not answer, and what comes of this try does not count.
fn bind_admin(node: &Node) -> Option<Result<AdminServer, AdminError>> {
    let (sender, bound) = crossbeam_channel::bounded(1);
    let path = node.admin.clone();
    std::thread::spawn(move || {
        // Nobody waits any more: the server is dropped, and its socket removed.
        let _ = sender.send(AdminServer::bind(&path));
    });
    bound.recv_timeout(ADMIN_BIND_MAX).ok()
}

/// How a node's admin socket is called in messages.
fn admin_address(node: &Node) -> String {
    format!("unix:{}", node.admin.display())
}

/// What a daemon starts with.
struct Start<'a> {
    config: &'a Config,
    node: &'a Node,
    keys: Arc<Keyring>,
    reactor: ReactorHandle,
    addresses: Arc<Addresses>,
}

impl Start<'_> {
    async fn serve(
        self,
        events: crossbeam_channel::Receiver<ReactorEvent>,
        admin: Option<AdminServer>,
    ) -> Result<(), NodeError> {
        let system = |doing| move |source| NodeError::System { doing, source };
        let mut signals = signals::Signals::watch().map_err(system("signal handling"))?;
        let (registry, attachments) = self.volumes()?;
        forward_events(events, &registry).map_err(system("the event thread"))?;
        let tasks: Vec<_> =
            attachments.into_iter().map(|attachment| tokio::spawn(attachment.run())).collect();
        let keys = tokio::spawn(keep_fresh(Arc::clone(&self.keys)));
        let mut listening = listeners::Listening::start(self.node, &registry, &self.addresses);
        // Whoever asks for the status hears of every address that cannot be bound.
        listening.tried().await;
        let (stop_admin, admin_stopped) = oneshot::channel::<()>();
        let backend = Arc::new(Backend::new(Arc::clone(&registry), Arc::clone(&self.addresses)));
        let admin = tokio::spawn(serve_admin(
            self.node.clone(),
            admin,
            Arc::clone(&self.addresses),
            backend,
            admin_stopped,
        ));
        tracing::info!(node = self.node.name.as_str(), volumes = registry.volumes.len(), "up");
        signals.stop().await;
        tracing::info!("stopping: finishing what is under way");
        listening.stop_peers();
        keys.abort();
        for volume in &registry.volumes {
            let _ = volume.inbox.send(Input::Event(Event::Shutdown));
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
        drop(listening);
        Ok(())
    }

    /// The volumes, none of them open yet.
    fn volumes(&self) -> Result<(Arc<Registry>, Vec<Attachment>), NodeError> {
        let system = |doing| move |source| NodeError::System { doing, source };
        let node = &self.node.name;
        let boot = boot_id().map_err(system("/proc/sys/kernel/random/boot_id"))?;
        let configured: Vec<_> = self.config.volumes_of(node.as_str()).collect();
        let (machine, links, makers) = (Machine::here(), configured.len(), rdma::Makers::default());
        let mut shared = Vec::with_capacity(links);
        let mut parts = Vec::with_capacity(links);
        for (volume, disk) in configured {
            let peer = volume.peer_of(node.as_str()).expect("the configuration was checked").clone();
            let settings = VolumeSettings {
                volume: volume.name.as_str().to_owned(),
                node: node.as_str().to_owned(),
                peer: peer.as_str().to_owned(),
                configured_primary: volume.primary == *node,
                on_peer_loss: volume.on_peer_loss,
                ack: volume.ack,
            };
            let surroundings = Surroundings {
                route: Route::to(
                    peer.as_str(),
                    self.config.node(peer.as_str())?.listen,
                    node.as_str(),
                    Arc::clone(&self.keys),
                ),
                node: node.as_str().to_owned(),
                command_line: self.config.command_line(node.as_str()),
                local: self.node.listen.ip(),
                rdma: rdma::setup(disk_memory(self.node.rdma_memory, &machine, links, volume.size), &makers),
                settings: settings_of(volume, self.config.peer_timeout),
            };
            let random = random_source().map_err(system("/dev/urandom"))?;
            let (inbox, queue) = mpsc::unbounded_channel();
            let status = attach::unopened(DiskState::Inconsistent, None, None);
            let entry = Arc::new(Shared::new(volume.clone(), peer, status, Phase::Opening, inbox));
            shared.push(Arc::clone(&entry));
            parts.push((entry, disk.clone(), settings, random, queue, surroundings));
        }
        let registry =
            Arc::new(Registry::new(node.clone(), Arc::clone(&self.keys), self.reactor.clone(), shared));
        let attachments = parts.into_iter().map(|(shared, disk, settings, random, queue, surroundings)| {
            let registry = Arc::clone(&registry);
            Attachment { registry, shared, disk, settings, random, boot, queue, surroundings }
        });
        let attachments = attachments.collect();
        Ok((registry, attachments))
    }
}

/// Looks at the key file now and then. One that hangs holds this task's thread, and the keys stay as they are.
async fn keep_fresh(keys: Arc<Keyring>) {
    loop {
        tokio::time::sleep(KEY_LOOK).await;
        let keys = Arc::clone(&keys);
        tokio::task::spawn_blocking(move || keys.refresh()).await.expect("a panic has ended the process");
    }
}

/// Answers on the admin socket, as soon as there is one, until `stopped`.
async fn serve_admin(
    node: Node,
    mut bound: Option<AdminServer>,
    addresses: Arc<Addresses>,
    backend: Arc<Backend>,
    mut stopped: oneshot::Receiver<()>,
) {
    let address = admin_address(&node);
    loop {
        let server = match bound.take() {
            Some(server) => server,
            None => {
                let path = node.admin.clone();
                let bind = move || AdminServer::bind(&path).map_err(|error| error.to_string());
                tokio::select! {
                    server = addresses.insist(&address, bind) => server,
                    _ = &mut stopped => return,
                }
            }
        };
        let backend = Arc::clone(&backend) as Arc<dyn AdminBackend>;
        let (stop, until) = oneshot::channel::<()>();
        let mut serving = Box::pin(server.serve(backend, async move {
            let _ = until.await;
        }));
        let served = tokio::select! {
            served = &mut serving => served,
            _ = &mut stopped => {
                let _ = stop.send(());
                let _ = serving.await;
                return;
            }
        };
        // It is bound anew.
        let ended = served.err().map_or_else(|| "it ended".to_owned(), |error| error.to_string());
        addresses.note::<()>(&address, Err(ended));
    }
}

/// Carries the reactor's events to the volumes' tasks.
fn forward_events(
    events: crossbeam_channel::Receiver<ReactorEvent>,
    registry: &Arc<Registry>,
) -> io::Result<()> {
    let registry = Arc::clone(registry);
    std::thread::Builder::new().name("events".into()).spawn(move || {
        for event in events {
            let volume = match &event {
                ReactorEvent::LinkDown { volume, .. }
                | ReactorEvent::Settled { volume }
                | ReactorEvent::AskAlone { volume }
                | ReactorEvent::ResyncDone { volume }
                | ReactorEvent::Verified { volume, .. }
                | ReactorEvent::FoundDifferent { volume }
                | ReactorEvent::PeerMessage { volume, .. }
                | ReactorEvent::DiskFailing { volume, .. }
                | ReactorEvent::DiskFailed { volume, .. }
                | ReactorEvent::Quiesced { volume } => *volume,
                ReactorEvent::Stopped => return,
            };
            // A task that ended (shutdown) needs no more news.
            let _ = registry.inbox(volume).send(Input::Event(Event::Reactor(event)));
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests;
