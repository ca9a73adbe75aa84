//! What the controller tells an operator about its volume.

use super::{Connection, Role, Verification, VolumeController};
use costandby_datapath::disk::superblock::DiskState;
use costandby_datapath::units::{Epoch, Generation, OnPeerLoss};

/// A volume as its controller sees it; the datapath's counters are added by the node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Status {
    /// Who serves, as far as this node goes.
    pub role: Role,
    /// What the local disk may be used for. A fresh disk shows as `Inconsistent`: nobody said yet that its content counts.
    pub disk_state: DiskState,
    /// The peer's disk, `None` while there is no session.
    pub peer_state: Option<DiskState>,
    /// Whether the connected peer serves, `None` while there is no session.
    pub peer_primary: Option<bool>,
    /// How this node stands to its peer.
    pub connection: Connection,
    /// The highest fencing number agreed to.
    pub epoch: Epoch,
    /// The data's generation.
    pub generation: Generation,
    /// Serving without the peer, on record.
    pub alone: bool,
    /// Serving, without the peer, and not allowed to acknowledge writes.
    pub frozen: bool,
    /// The verification under way, or the last one.
    pub verification: Verification,
    /// There is no session, and none will be until an operator acts.
    pub parted: bool,
    /// What an operator may want to know or type.
    pub advice: Option<String>,
}

impl Role {
    /// As `status` prints it: what matters outside is whether the node serves.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Standby | Self::Promoting => "standby",
            Self::Primary | Self::Demoting => "primary",
        }
    }
}

impl Connection {
    /// As `status` prints it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Standalone => "standalone",
            Self::Connecting => "connecting",
            Self::Handshaking => "handshaking",
            Self::Connected => "connected",
            Self::SyncSource => "sync-source",
            Self::SyncTarget => "sync-target",
        }
    }
}

impl VolumeController {
    /// The volume now.
    #[must_use]
    pub fn status(&self) -> Status {
        let frozen = self.role == Role::Primary && !self.in_session() && self.holds_writes();
        let session = self.peer.as_ref().filter(|_| self.in_session());
        Status {
            role: self.role,
            disk_state: self.shown_disk_state(),
            peer_state: session.map(|peer| match self.connection {
                _ if peer.diskless => DiskState::Diskless,
                Connection::SyncSource => DiskState::Inconsistent,
                _ if self.unrepaired => DiskState::Outdated,
                _ => DiskState::UpToDate,
            }),
            peer_primary: session.map(|peer| peer.primary),
            connection: self.connection,
            epoch: self.superblock.epoch,
            generation: self.superblock.generations.current,
            alone: self.alone,
            frozen,
            verification: self.verification.clone(),
            parted: self.is_parted(),
            advice: self.advice(frozen),
        }
    }

    /// Whether a write that comes to this node as primary waits until the peer is in sync.
    pub(super) fn holds_writes(&self) -> bool {
        let in_sync = self.connection == Connection::Connected && self.peer.is_some();
        !in_sync && !self.alone && self.settings.on_peer_loss == OnPeerLoss::Freeze
    }

    pub(super) fn shown_disk_state(&self) -> DiskState {
        match self.superblock.disk_state {
            _ if self.diskless.is_gone() && (self.in_session() || self.recall.is_some()) => {
                DiskState::Diskless
            }
            DiskState::UpToDate if self.may_lack_writes() => DiskState::Outdated,
            DiskState::UpToDate if !self.is_usable() => DiskState::Inconsistent,
            state => state,
        }
    }

    pub(super) fn in_session(&self) -> bool {
        let connected = matches!(
            self.connection,
            Connection::Connected | Connection::SyncSource | Connection::SyncTarget
        );
        connected && self.peer.is_some()
    }

    fn advice(&self, frozen: bool) -> Option<String> {
        if let Some(refusal) = &self.refusal {
            return Some(refusal.clone());
        }
        if let Some(advice) = self.diskless_advice() {
            return Some(advice);
        }
        let peer = &self.settings.peer;
        let serves = matches!(self.role, Role::Primary | Role::Demoting);
        Some(match self.connection {
            Connection::Standalone => {
                let meanwhile = if serves { format!("serving without {peer}; ") } else { String::new() };
                format!(
                    "{meanwhile}an operator disconnected this node from {peer}; {} looks for it again",
                    self.here("connect")
                )
            }
            Connection::Connecting => self.connecting_advice(frozen),
            Connection::Connected if self.unrepaired => {
                format!(
                    "{peer}'s disk differs from this one: {} copies what differs now, disconnect and connect does as well",
                    self.here("verify --repair")
                )
            }
            Connection::SyncTarget if self.superblock.primary => {
                format!(
                    "this node lost power while it served; it serves again once it is up to date with {peer}"
                )
            }
            Connection::Connected if !serves && self.peer.as_ref().is_some_and(|peer| !peer.primary) => {
                format!(
                    "no node serves: on the one that should, {} or {}",
                    self.here("promote"),
                    self.there("promote")
                )
            }
            _ => return None,
        })
    }
}
