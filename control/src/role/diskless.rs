//! The part of the controller for a primary whose disk fails and that goes on over the peer's disk.
//!
//! ```text
//! primary: disk fails, clients held ── DISK_FAILED ──▶ standby: a generation of its own, stored
//!          goes on over the peer's disk ◀── DISK_FAILED_NOTED ──
//! ```
//! Forbidden outcome: the failed disk comes back, whatever it says of itself, and is taken for as good as the peer's.
//! Its node answers clients only after the peer's record, whose generation descends from the failed disk's. And that
//! record keeps no base: a copy back is of everything, since nobody counts what changes meanwhile.
//!
//! A primary without a disk has nothing once the session ends. A link that broke is not its end: the session goes on over the
//! next one, if that comes before the clients have waited for as long as they would for any peer. Else it stops serving; the peer may be promoted. That is so
//! with both kinds of `on_peer_loss`: `freeze` waits for a peer to come back to a disk, and here is none.

use super::{Action, Connection, Level, Role, VolumeController, VolumeSettings, code};
use costandby_datapath::disk::superblock::DiskState;
use costandby_datapath::units::Generation;

/// How far the loss of the disk has come.
#[derive(Debug, Default)]
pub(super) enum Diskless {
    /// There is a disk, or it failed while it did not serve.
    #[default]
    No,
    /// The peer was asked.
    Asked(String),
    /// It stands in. Stays so to the daemon's end, also when the session is over: the metadata may be gone with the disk.
    Gone(String),
}

impl Diskless {
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Self::Gone(_))
    }

    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::No => None,
            Self::Asked(text) | Self::Gone(text) => Some(text),
        }
    }
}

impl VolumeController {
    pub(super) fn on_disk_failing(&mut self, text: String, actions: &mut Vec<Action>) {
        let serves = matches!(self.role, Role::Primary | Role::Demoting) && self.in_session();
        let in_sync = self.connection == Connection::Connected;
        // A peer that a verification found to differ is no stand-in.
        let usable = in_sync && !self.unrepaired;
        if !(serves && usable) || self.shutdown_deadline.is_some() || self.diskless.text().is_some() {
            return self.on_disk_failed(&text, actions);
        }
        let log = format!(
            "the disk failed ({text}): asking {} to let this node serve from its disk",
            self.settings.peer
        );
        self.log(Level::Error, &log, actions);
        self.diskless = Diskless::Asked(text);
        let arg = self.superblock.generations.current.0;
        actions.push(Action::SendPeer { code: code::DISK_FAILED, arg });
        // If this daemon died before the answer, the next one might read what a failed sync never brought to the medium,
        // and take it for what was acknowledged.
        self.superblock.disk_state = DiskState::Failed;
        self.superblock.primary = false;
        self.store(actions);
    }

    /// Everything that the peer sent before is applied here.
    pub(super) fn on_peer_disk_failed(&mut self, arg: u64, actions: &mut Vec<Action>) {
        let name = self.settings.peer.clone();
        let stands_by = self.role == Role::Standby && self.connection == Connection::Connected;
        let same = arg == self.superblock.generations.current.0;
        let usable = self.superblock.disk_state == DiskState::UpToDate && !self.medium_failed;
        let Some(peer) = self.peer.as_mut().filter(|peer| peer.primary && stands_by && same && usable) else {
            let text = format!(
                "{name} wants to serve from this disk, which is not a complete copy of its own: closing the link"
            );
            actions.push(Action::CloseLink);
            return self.log(Level::Error, &text, actions);
        };
        if !std::mem::replace(&mut peer.diskless, true) {
            self.advance_generation();
            self.superblock.generations.base = Generation::ZERO;
            self.store(actions);
        }
        let arg = self.superblock.generations.current.0;
        actions.push(Action::SendPeer { code: code::DISK_FAILED_NOTED, arg });
        let text =
            format!("the disk of {name} failed: it serves from this node's disk, which is the only copy");
        self.log(Level::Warn, &text, actions);
    }

    pub(super) fn on_disk_failed_noted(&mut self, actions: &mut Vec<Action>) {
        let Diskless::Asked(text) = &mut self.diskless else {
            let text = format!(
                "{} offers its disk in place of this node's and was not asked: closing the link",
                self.settings.peer
            );
            actions.push(Action::CloseLink);
            return self.log(Level::Error, &text, actions);
        };
        self.diskless = Diskless::Gone(std::mem::take(text));
        actions.push(Action::Detach);
        let log = format!("serving without a disk of its own, from the disk of {}", self.settings.peer);
        self.log(Level::Warn, &log, actions);
        self.superblock.disk_state = DiskState::Failed;
        self.superblock.primary = false;
        self.store(actions);
    }

    /// The session is over, and with it all that a volume without a disk has.
    pub(super) fn end_diskless(&mut self, actions: &mut Vec<Action>) {
        let text = self.diskless.text().filter(|_| !self.medium_failed).map(str::to_owned);
        if let Some(text) = text {
            self.on_disk_failed(&text, actions);
        }
    }

    /// Why the session must not be ended nor this disk given up, if one of the two nodes serves from the other's disk.
    pub(super) fn stand_in(&self) -> Option<String> {
        let VolumeSettings { node, peer: name, .. } = &self.settings;
        let peer = self.peer.as_ref().filter(|_| self.in_session())?;
        let (serves, stands_in) = if peer.diskless {
            (name, node)
        } else if self.diskless.text().is_some() {
            (node, name)
        } else {
            return None;
        };
        Some(format!(
            "the disk of {serves} failed, and {serves} serves from the one of {stands_in}, the only copy: {} \
             first, then {}",
            self.settings.commands().on(serves, "demote"),
            self.settings.commands().on(stands_in, "promote")
        ))
    }

    pub(super) fn diskless_advice(&self) -> Option<String> {
        let VolumeSettings { node, peer, .. } = &self.settings;
        let session = self.peer.as_ref().filter(|_| self.in_session())?;
        if session.diskless {
            return Some(format!(
                "the disk of {peer} failed: it serves from this node's disk, which is the only copy"
            ));
        }
        let text = self.diskless.text()?;
        Some(format!(
            "the disk failed ({text}); reads and writes go to the one of {peer}, the only copy: when it suits, {} \
             and {}; then stop the daemon of {node}, replace its disk, {}, and start the daemon: everything is copied back",
            self.here("demote"),
            self.there("promote"),
            self.here("create --force")
        ))
    }
}
