//! What a daemon's tasks share: each volume's state as others see it, and which volume of the reactor it is.

use super::inbox::Inbox;
use crate::config::{Disk, NodeName, Volume};
use crate::progress::Progress;
use crate::role::Status as ControllerStatus;
use crate::secure::keyring::Keyring;
use crate::task::LinkStatus;
use costandby_datapath::reactor::ReactorHandle;
use costandby_datapath::reactor::command::VolumeSpec;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// Where a volume's disk is on its way into service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    /// Being opened.
    Opening,
    /// It could not be opened; an operator may have it tried again.
    Failed,
    /// Open, with this index in the reactor.
    Open(usize),
}

/// What other tasks see of a volume.
pub(super) struct Shared {
    pub(super) config: Volume,
    pub(super) peer: NodeName,
    pub(super) status: Mutex<ControllerStatus>,
    pub(super) phase: Mutex<Phase>,
    /// `None` until the task runs.
    pub(super) link: Mutex<Option<LinkStatus>>,
    /// Of the copy under way.
    pub(super) progress: Mutex<Progress>,
    /// What an operator should know beside the advice, by who found it.
    warnings: Mutex<BTreeMap<Source, Vec<String>>>,
    pub(super) inbox: Inbox,
}

/// Who finds something that `status` warns of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Source {
    /// The look at the disk's files.
    Files,
    /// Calls on the disk that do not return.
    Calls,
    /// The same of the peer's disk, as the peer says.
    PeersCalls,
    /// The comparison of the two nodes' configurations.
    Configuration,
}

impl Shared {
    pub(super) fn new(
        config: Volume,
        peer: NodeName,
        status: ControllerStatus,
        phase: Phase,
        inbox: Inbox,
    ) -> Self {
        Self {
            config,
            peer,
            status: Mutex::new(status),
            phase: Mutex::new(phase),
            link: Mutex::new(None),
            progress: Mutex::default(),
            warnings: Mutex::default(),
            inbox,
        }
    }

    pub(super) fn phase(&self) -> Phase {
        *self.phase.lock().expect("nobody panics with it")
    }

    pub(super) fn enter(&self, phase: Phase, status: ControllerStatus) {
        *self.status.lock().expect("nobody panics with it") = status;
        *self.phase.lock().expect("nobody panics with it") = phase;
    }

    /// Shows `texts` in `status` from now on, instead of what `source` said before. Whether that is news.
    pub(super) fn warn(&self, source: Source, texts: &[String]) -> bool {
        let mut warnings = self.warnings.lock().expect("nobody panics with it");
        let before =
            if texts.is_empty() { warnings.remove(&source) } else { warnings.insert(source, texts.to_vec()) };
        before.unwrap_or_default() != texts
    }

    /// Everything that is warned of now.
    pub(super) fn warnings(&self) -> Vec<String> {
        self.warnings.lock().expect("nobody panics with it").values().flatten().cloned().collect()
    }
}

/// What all tasks share.
pub(super) struct Registry {
    pub(super) node: NodeName,
    /// The pair's.
    pub(super) keys: Arc<Keyring>,
    pub(super) reactor: ReactorHandle,
    /// By name.
    pub(super) volumes: Vec<Arc<Shared>>,
    /// Who hears of the reactor's volumes, by their index.
    inboxes: Mutex<Vec<Inbox>>,
}

impl Registry {
    pub(super) fn new(
        node: NodeName,
        keys: Arc<Keyring>,
        reactor: ReactorHandle,
        volumes: Vec<Arc<Shared>>,
    ) -> Self {
        Self { node, keys, reactor, volumes, inboxes: Mutex::default() }
    }

    /// Hands an open volume to the reactor, and gives its index there.
    pub(super) fn admit(&self, shared: &Shared, spec: VolumeSpec) -> usize {
        // Locked over both, so that the first event of the volume finds its inbox.
        let mut inboxes = self.inboxes.lock().expect("nobody panics with it");
        let index = self.reactor.add_volume(spec);
        assert_eq!(index, inboxes.len(), "volumes come to the reactor here only");
        inboxes.push(shared.inbox.clone());
        index
    }

    /// The disks of this node's volumes but `volume`, by their volumes' names.
    pub(super) fn other_disks(&self, volume: &str) -> Vec<(String, PathBuf)> {
        let others = self.volumes.iter().filter(|shared| shared.config.name.as_str() != volume);
        let disks = others.filter_map(|shared| match shared.config.disks.get(&self.node)? {
            Disk::Path(path) => Some((shared.config.name.as_str().to_owned(), path.clone())),
            Disk::Memory => None,
        });
        disks.collect()
    }

    /// Who hears of the reactor's volume of this index.
    pub(super) fn inbox(&self, index: usize) -> Inbox {
        self.inboxes.lock().expect("nobody panics with it")[index].clone()
    }
}
