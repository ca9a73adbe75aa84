//! The part of the controller that deals with verifications: when one may begin, and what follows from what it found.
//!
//! Only a serving node in sync with its peer verifies: its disk is what the peer's is held against. What differs and is not
//! repaired at once is marked in the dirty bitmap, so that the next handshake ends in a copy of it, from this node. Until
//! then the volume may not be handed over, for the other node would serve what differs.
//!
//! The node whose disk was found to differ knows it first and puts that on its own record at once: `Outdated`, which serves
//! only by force, whatever becomes of the other node. Until that one says that the marks are on its record
//! ([`code::DIFFERENCES_NOTED`]) everything counts as differing, so that a verification that ends with its node loses
//! nothing. A repair, or a later verification that finds no difference, ends it ([`code::DIFFERENCES_REPAIRED`]).

use super::{Action, Connection, Level, ReplyId, Role, VolumeController, VolumeSettings, code};
use costandby_datapath::disk::superblock::{COPYING_WHOLE, DiskState};
use costandby_datapath::units::ByteRange;
use costandby_datapath::units::Generation;
use costandby_datapath::volume::Verified;

/// The verification under way, or the last one of this daemon.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Verification {
    /// Counts them, from 1; 0 before the first.
    pub id: u64,
    /// Under way.
    pub running: bool,
    /// What differs is to be copied at once.
    pub repair: bool,
    /// What it found; empty while it is under way.
    pub outcome: Verified,
}

impl VolumeController {
    pub(super) fn on_verify(&mut self, id: ReplyId, repair: bool, actions: &mut Vec<Action>) {
        let VolumeSettings { node, peer, .. } = &self.settings;
        let refusal = if self.role != Role::Primary {
            Some(format!("{node} does not serve the volume: {} if {peer} does", self.there("verify")))
        } else if self.connection == Connection::SyncSource {
            Some(format!("{peer} is being copied to: {} first", self.here("wait-sync")))
        } else if self.connection != Connection::Connected || !self.in_session() {
            Some(format!("not connected to {peer}, so there is nothing to compare with"))
        } else if self.verification.running {
            Some(format!(
                "a verification is under way: `status` shows how far it is, {} ends it",
                self.here("verify --stop")
            ))
        } else {
            None
        };
        if let Some(text) = refusal {
            return self.reply(id, Err(text), actions);
        }
        let id_before = self.verification.id;
        self.verification =
            Verification { id: id_before + 1, running: true, repair, ..Verification::default() };
        actions.push(Action::Verify { repair });
        let text = format!("comparing with {}", self.settings.peer);
        self.reply(id, Ok(text), actions);
    }

    pub(super) fn on_stop_verify(&mut self, id: ReplyId, actions: &mut Vec<Action>) {
        let answer = if self.verification.running {
            actions.push(Action::StopVerify);
            Ok("the verification ends".to_owned())
        } else {
            Err("no verification is under way".to_owned())
        };
        self.reply(id, answer, actions);
    }

    pub(super) fn on_verified(&mut self, outcome: Verified, actions: &mut Vec<Action>) {
        let peer = self.settings.peer.clone();
        let Verified { findings, repaired, unfinished } = &outcome;
        let found = format!(
            "{} of {} bytes compared, {} in {} ranges differ from {peer}'s",
            findings.compared, self.superblock.size, findings.differing, findings.ranges
        );
        let differs = findings.differing > 0;
        let (level, text) = match unfinished {
            Some(why) => (Level::Warn, format!("verification unfinished ({why}): {found}")),
            None if differs && *repaired => (Level::Warn, format!("verified and repaired: {found}")),
            None if differs => (Level::Error, format!("verified: {found}")),
            None => (Level::Info, format!("verified: {found}")),
        };
        self.log(level, &text, actions);
        for range in &findings.listed {
            self.log(Level::Warn, &format!("bytes {} differ from {peer}'s", shown(*range)), actions);
        }
        let all_equal = unfinished.is_none() && !differs;
        if differs && !repaired {
            self.dirty = true;
            self.unrepaired = self.peer.is_some();
            // Its marks are on record where it came to its end.
            if unfinished.is_none() {
                self.tell_target(code::DIFFERENCES_NOTED, actions);
            }
        } else if *repaired {
            // A repair copies all that is marked.
            self.dirty = false;
            self.unrepaired = false;
            self.tell_target(code::DIFFERENCES_REPAIRED, actions);
        } else if all_equal {
            // What an earlier one found was written anew since.
            self.unrepaired = false;
            self.tell_target(code::DIFFERENCES_REPAIRED, actions);
        }
        self.verification.running = false;
        self.verification.outcome = outcome;
    }

    fn tell_target(&self, code: u64, actions: &mut Vec<Action>) {
        if self.in_session() && self.connection == Connection::Connected {
            actions.push(Action::SendPeer { code, arg: 0 });
        }
    }

    /// This node's bytes are not those of the peer, which serves: until that is repaired, they do not serve.
    pub(super) fn on_found_different(&mut self, actions: &mut Vec<Action>) {
        let peer_serves = self.peer.as_ref().is_some_and(|peer| peer.primary && !peer.diskless);
        let in_sync = self.in_session() && self.connection == Connection::Connected;
        if !(in_sync && peer_serves) || self.superblock.disk_state != DiskState::UpToDate {
            return;
        }
        self.superblock.disk_state = DiskState::Outdated;
        self.superblock.copying = COPYING_WHOLE;
        self.store(actions);
        let VolumeSettings { node, peer, .. } = &self.settings;
        let text = format!(
            "a verification found bytes that differ from {peer}'s: the disk of {node} is Outdated and is not promoted until \
             {}, or the next connection, has copied them",
            self.there("verify --repair")
        );
        self.log(Level::Error, &text, actions);
    }

    /// The peer has on record what differs here.
    pub(super) fn on_differences_noted(&mut self, actions: &mut Vec<Action>) {
        if self.found_different() && self.superblock.copying == COPYING_WHOLE {
            self.superblock.copying = Generation::ZERO;
            self.store(actions);
        }
    }

    /// The peer compared or copied everything that differed.
    pub(super) fn on_differences_repaired(&mut self, actions: &mut Vec<Action>) {
        if self.found_different() {
            self.superblock.disk_state = DiskState::UpToDate;
            self.superblock.copying = Generation::ZERO;
            self.store(actions);
            let text = format!("what differed from {}'s disk is repaired", self.settings.peer);
            self.log(Level::Info, &text, actions);
        }
    }

    fn found_different(&self) -> bool {
        self.connection == Connection::Connected && self.superblock.disk_state == DiskState::Outdated
    }

    /// Why the volume may not be handed over now, if that is because of a verification.
    pub(super) fn verification_forbids_demotion(&self) -> Option<String> {
        let peer = &self.settings.peer;
        if self.verification.running {
            return Some(format!(
                "a verification is under way: wait for its end, or {}",
                self.here("verify --stop")
            ));
        }
        self.unrepaired.then(|| {
            format!(
                "{peer}'s disk differs from this one: {} first (or disconnect and connect, which copies what differs)",
                self.here("verify --repair")
            )
        })
    }
}

fn shown(range: ByteRange) -> String {
    format!("{} to {}", range.start, range.end() - 1)
}
