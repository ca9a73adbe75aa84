//! What a daemon's tasks share: each volume's state as others see it, and which volume of the reactor it is.

use super::link::LinkStatus;
use super::volume::Input;
use crate::config::{NodeName, Volume};
use crate::link::reason;
use crate::progress::Progress;
use crate::role::Status as ControllerStatus;
use crate::secure::keyring::Keyring;
use costandby_datapath::reactor::ReactorHandle;
use costandby_datapath::reactor::command::VolumeSpec;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long what the peer said of itself is shown: it is said again every few seconds for as long as it holds.
const PEER_WORD_MAX: Duration = Duration::from_secs(15);

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
    /// Why the peer has no session with us, in its words, and when it last said so.
    pub(super) peer_word: Mutex<Option<(String, Instant)>>,
    pub(super) inbox: mpsc::UnboundedSender<Input>,
}

impl Shared {
    pub(super) fn new(
        config: Volume,
        peer: NodeName,
        status: ControllerStatus,
        phase: Phase,
        inbox: mpsc::UnboundedSender<Input>,
    ) -> Self {
        Self {
            config,
            peer,
            status: Mutex::new(status),
            phase: Mutex::new(phase),
            link: Mutex::new(None),
            progress: Mutex::default(),
            peer_word: Mutex::new(None),
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

    /// The peer refused a session for a reason that an operator should know. Whether it is news.
    pub(super) fn peer_said(&self, text: &str) -> bool {
        let (text, now) = (reason(text), Instant::now());
        let before = self.peer_word.lock().expect("nobody panics with it").replace((text.clone(), now));
        before.is_none_or(|(before, _)| before != text)
    }

    /// There is a session: whatever it said before is over.
    pub(super) fn peer_agreed(&self) {
        *self.peer_word.lock().expect("nobody panics with it") = None;
    }

    /// Why the peer has no session with us, in its words.
    pub(super) fn peer_says(&self) -> Option<String> {
        let word = self.peer_word.lock().expect("nobody panics with it").clone();
        word.filter(|(_, at)| at.elapsed() < PEER_WORD_MAX).map(|(text, _)| text)
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
    inboxes: Mutex<Vec<mpsc::UnboundedSender<Input>>>,
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

    /// Who hears of the reactor's volume of this index.
    pub(super) fn inbox(&self, index: usize) -> mpsc::UnboundedSender<Input> {
        self.inboxes.lock().expect("nobody panics with it")[index].clone()
    }
}
