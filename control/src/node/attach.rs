//! A volume's way into service: its disk is opened beside all others', then the reactor and a task of its own have it. A disk
//! that cannot be opened keeps its own volume down and no other: the volume is `Failed`, says why to whoever asks, and an
//! operator's `connect` has it tried again.
//!
//! Invariants: nothing of a volume is served, promised or changed before its disk is open; who asks meanwhile, operator,
//! client or peer, gets an answer.
//!
//! Survives: a disk that takes for ever to open (only its own volume waits), a daemon that is told to end meanwhile (opening
//! is safe to break off), tries without end.

use super::advice::Case;
use super::blocking::blocking;
use super::connection::part;
use super::inbox::{Input, Reply};
use super::open::{self, OpenError, OpenVolume};
use super::registry::{Phase, Registry, Shared};
use super::volume::{Surroundings, VolumeTask};
use super::watch::{Link, Watch};
use crate::admin;
use crate::config::Disk;
use crate::hello::{Refuse, RefuseCode};
use crate::link::reason;
use crate::role::{self, Connection, Found, Random, Role, Verification, VolumeController, VolumeSettings};
use crate::task::Event;
use costandby_datapath::disk::superblock::{DiskState, Location, Superblock};
use costandby_datapath::reactor::command::{Command, VolumeSpec};
use costandby_datapath::units::{Epoch, Generation};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// How long an operator's command waits for a disk that is being opened: most take milliseconds.
const COMMAND_WAIT_MAX: Duration = Duration::from_secs(5);

/// A volume that is not in service yet.
pub(super) struct Attachment {
    pub(super) registry: Arc<Registry>,
    pub(super) shared: Arc<Shared>,
    pub(super) disk: Disk,
    pub(super) settings: VolumeSettings,
    pub(super) random: Random,
    /// The kernel's boot.
    pub(super) boot: [u8; 16],
    pub(super) queue: mpsc::UnboundedReceiver<Input>,
    pub(super) surroundings: Surroundings,
}

/// How a try ended.
enum Tried {
    Open(Box<OpenVolume>),
    Failed(Box<Failure>),
    /// The daemon is to end.
    Stopped,
}

/// Why a volume is not in service.
struct Failure {
    /// For this node's operator.
    advice: String,
    /// What is wrong, for others.
    problem: String,
    /// What its metadata says, where that can be read.
    found: Option<Superblock>,
    /// The disk lost writes, and that is not on record.
    distrusted: bool,
}

/// What a volume without an open disk shows.
pub(super) fn unopened(
    disk_state: DiskState,
    advice: Option<String>,
    found: Option<&Superblock>,
) -> role::Status {
    role::Status {
        role: Role::Standby,
        disk_state,
        peer_state: None,
        peer_primary: None,
        connection: Connection::Standalone,
        epoch: found.map_or(Epoch::ZERO, |found| found.epoch),
        generation: found.map_or(Generation::ZERO, |found| found.generations.current),
        alone: false,
        frozen: false,
        verification: Verification::default(),
        parted: disk_state == DiskState::Failed,
        advice,
    }
}

impl Attachment {
    /// Runs until the volume is at rest after [`Input::Shutdown`].
    pub(super) async fn run(mut self) {
        let mut distrusted = false;
        let mut asked: Option<Reply> = None;
        loop {
            match self.open(distrusted).await {
                Tried::Stopped => return,
                Tried::Open(opened) => {
                    if let Some(reply) = asked.take() {
                        let text = format!(
                            "volume {}: its disk is open again; looking for {}",
                            self.settings.volume, self.settings.peer
                        );
                        // An operator who hung up does not need the answer.
                        let _ = reply.send(Ok(text));
                    }
                    return self.serve(*opened).await;
                }
                Tried::Failed(failure) => {
                    distrusted |= failure.distrusted;
                    self.publish(&failure);
                    if let Some(reply) = asked.take() {
                        let _ = reply.send(Err(self.refusal(&failure)));
                    }
                    asked = match self.wait_for_connect(&failure).await {
                        Some(reply) => Some(reply),
                        None => return,
                    };
                }
            }
        }
    }

    /// One try, with answers to whoever asks meanwhile.
    async fn open(&mut self, distrusted: bool) -> Tried {
        let (volume, node) = (self.settings.volume.clone(), self.settings.node.clone());
        let mut advice = format!("{node} is opening its disk of volume {volume}");
        let late = self.late();
        self.shared.enter(Phase::Opening, unopened(DiskState::Inconsistent, Some(advice.clone()), None));
        self.turn_clients_away(&format!("{advice}: try again in a moment"));
        let (config, disk) = (self.shared.config.clone(), self.disk.clone());
        let (peer, command_line) = (self.settings.peer.clone(), self.surroundings.command_line.clone());
        let others = self.registry.other_disks(config.name.as_str());
        let opening = blocking(move || {
            open::open_volume(&config, &disk, &node, distrusted, &others).map_err(|error| {
                let found = open::look(&config, &disk, &node);
                let (volume, size) = (config.name.as_str(), config.size);
                let case = Case {
                    volume,
                    size,
                    peer: &peer,
                    command_line: &command_line,
                    disk: &disk,
                    error: &error,
                    found: found.as_ref(),
                };
                let distrusted = matches!(error, OpenError::Unflushed { on_record: false, .. });
                Box::new(Failure { advice: case.text(), problem: case.problem(), distrusted, found })
            })
        });
        tokio::pin!(opening);
        let began = Instant::now();
        let mut waiting: Vec<Input> = Vec::new();
        let mut is_late = false;
        loop {
            tokio::select! {
                opened = &mut opening => {
                    for input in waiting {
                        // Whoever has the volume next answers them.
                        let _ = self.shared.inbox.send(input);
                    }
                    return match opened {
                        Ok(opened) => Tried::Open(Box::new(opened)),
                        Err(failure) => Tried::Failed(failure),
                    };
                }
                input = self.queue.recv() => match input {
                    None | Some(Input::Event(Event::Shutdown)) => return Tried::Stopped,
                    Some(input @ Input::Admin { .. }) if began.elapsed() < COMMAND_WAIT_MAX => {
                        waiting.push(input);
                    }
                    Some(input) => self.decline(input, RefuseCode::Busy, &advice, &format!("volume {volume}: {advice}: try again later")),
                },
                () = tokio::time::sleep_until(began + COMMAND_WAIT_MAX), if !is_late => {
                    is_late = true;
                    tracing::warn!(volume, "{late}");
                    advice.clone_from(&late);
                    self.shared.enter(Phase::Opening, unopened(DiskState::Inconsistent, Some(late.clone()), None));
                    for input in waiting.drain(..) {
                        self.decline(input, RefuseCode::Busy, &advice, &format!("volume {volume}: {advice}: try again later"));
                    }
                }
            }
        }
    }

    /// What is waited for, where opening takes longer than it should.
    fn late(&self) -> String {
        let VolumeSettings { node, volume, .. } = &self.settings;
        let place = match &self.disk {
            Disk::Path(path) if path.starts_with("/dev") => path.display().to_string(),
            Disk::Path(path) => format!("{} or {}", path.display(), Location::beside(path).path.display()),
            Disk::Memory => "memory".to_owned(),
        };
        format!(
            "{node} is opening its disk of volume {volume} for more than {} s: {place} does not answer, or is being flushed \
             after a daemon that was killed; look into the kernel's log, and at its file system",
            COMMAND_WAIT_MAX.as_secs()
        )
    }

    fn publish(&self, failure: &Failure) {
        let Failure { advice, found, .. } = failure;
        let volume = self.settings.volume.as_str();
        tracing::error!(volume, "Failed: {advice}");
        let status = unopened(DiskState::Failed, Some(advice.clone()), found.as_ref());
        self.shared.enter(Phase::Failed, status);
        self.turn_clients_away(&format!("volume {volume} cannot be served here: {}", failure.problem));
    }

    /// The answer to every command but the one that has it tried again.
    fn refusal(&self, failure: &Failure) -> String {
        format!("volume {}: {}", self.settings.volume, failure.advice)
    }

    /// Answers everybody with the reason, until an operator has the disk tried again. `None`: the daemon is to end.
    async fn wait_for_connect(&mut self, failure: &Failure) -> Option<Reply> {
        let VolumeSettings { node, volume, .. } = &self.settings;
        let problem = reason(&format!("{node} cannot use its disk of volume {volume}: {}", failure.problem));
        let refusal = self.refusal(failure);
        loop {
            match self.queue.recv().await {
                None | Some(Input::Event(Event::Shutdown)) => return None,
                Some(Input::Admin {
                    command: admin::Command::Connect { discard_my_data: false },
                    asked,
                    reply,
                }) if asked.void().is_none() => {
                    return Some(reply);
                }
                // The peer dials, or asks why it is not dialled.
                Some(input) => self.decline(input, RefuseCode::Disks, &problem, &refusal),
            }
        }
    }

    /// Answers what came for a volume that is not in service.
    fn decline(&self, input: Input, code: RefuseCode, to_peer: &str, to_operator: &str) {
        match input {
            Input::Admin { reply, .. } => {
                let _ = reply.send(Err(to_operator.to_owned()));
            }
            Input::Event(Event::Accepted { stream, .. } | Event::Asked { stream, .. }) => {
                tokio::spawn(part(stream, Refuse { code, text: to_peer.to_owned() }));
            }
            // Of sessions and conversations, which there are none of.
            Input::Event(_) => {}
        }
    }

    fn turn_clients_away(&self, text: &str) {
        let (name, text) = (self.settings.volume.clone(), text.to_owned());
        self.registry.reactor.send(Command::Absent { name, text });
    }

    /// The volume's life in service.
    async fn serve(self, opened: OpenVolume) {
        let Self { registry, shared, disk: disk_config, settings, random, boot, queue, surroundings } = self;
        let OpenVolume { disk, superblock, dirty, store, record } = opened;
        let (config, image) = (&shared.config, Arc::downgrade(&disk));
        let spec = VolumeSpec {
            name: config.name.as_str().to_owned(),
            disk,
            ack: config.ack,
            on_peer_loss: config.on_peer_loss,
            checksum_first: config.checksum_first,
            record,
        };
        let controller = VolumeController::new(settings, Found { superblock, dirty, boot }, random);
        let index = registry.admit(&shared, spec);
        shared.enter(Phase::Open(index), controller.status());
        let reactor = registry.reactor.clone();
        if let Disk::Path(path) = &disk_config {
            let watch = Watch::new(config.name.as_str(), &surroundings.node, shared.peer.as_str(), path);
            let link = Link { reactor: reactor.clone(), index };
            tokio::spawn(watch.run(Arc::downgrade(&shared), image, link));
        }
        VolumeTask::new(index, shared, controller, store, reactor, queue, surroundings).run().await;
    }
}
