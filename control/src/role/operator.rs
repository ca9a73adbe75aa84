//! The part of the controller that deals with its own node: operator's commands, time limits, a failing disk, the end.

use super::{
    Action, Command, Connection, Demotion, FROZEN_QUIESCE_TIMEOUT, GRANT_TIMEOUT, Level, Promotion,
    QUIESCE_TIMEOUT, ReplyId, Role, VolumeController, VolumeSettings, code,
};
use costandby_datapath::disk::superblock::{DiskState, Generations};
use costandby_datapath::units::{AckLevel, Generation};
use std::time::Duration;

impl VolumeController {
    pub(super) fn on_command(
        &mut self,
        now: Duration,
        id: ReplyId,
        command: Command,
        actions: &mut Vec<Action>,
    ) {
        if self.shutdown_deadline.is_some() {
            return self.reply(id, Err("the daemon is shutting down".to_owned()), actions);
        }
        match command {
            Command::Promote { .. } | Command::Connect { .. } if self.medium_failed => {
                // The datapath has given the disk up until the next start: a session over it would end as it begins.
                let text = self.refusal.clone().unwrap_or_else(|| "the disk failed".to_owned());
                self.reply(id, Err(text), actions);
            }
            Command::Disconnect | Command::Invalidate if self.stand_in().is_some() => {
                let text = self.stand_in().expect("just asked");
                self.reply(id, Err(text), actions);
            }
            Command::Promote { force } => self.on_promote(now, id, force, actions),
            Command::Demote => self.on_demote(now, id, actions),
            Command::Connect { discard_my_data: false } => self.on_connect(id, "connecting", actions),
            Command::Connect { discard_my_data: true } => self.on_discard(id, actions),
            Command::Invalidate => self.on_invalidate(id, actions),
            Command::Verify { repair } => self.on_verify(id, repair, actions),
            Command::StopVerify => self.on_stop_verify(id, actions),
            Command::Disconnect => {
                self.part(actions);
                let text = format!("disconnected from {} until {}", self.settings.peer, self.here("connect"));
                self.reply(id, Ok(text), actions);
            }
        }
    }

    fn on_connect(&mut self, id: ReplyId, text: &str, actions: &mut Vec<Action>) {
        let text = if self.connection == Connection::Standalone {
            self.refusal = None;
            self.obstacle = None;
            // A link that is still closing ends in `LinkDown`, which finds this state and dials.
            self.set_connection(Connection::Connecting);
            self.dial(actions);
            text.to_owned()
        } else {
            if self.connection == Connection::Connecting {
                // At once, however long the pause would be.
                self.dial(actions);
            }
            let peer = &self.settings.peer;
            let why = self.obstacle_text().map(|text| format!(": {text}"));
            let how = if self.in_session() { "connected" } else { "connecting" };
            format!("{how} to {peer} already{}", why.unwrap_or_default())
        };
        self.reply(id, Ok(text), actions);
    }

    /// Whether what the disk holds may be given up at an operator's word; if not, why.
    fn may_discard(&self) -> Result<(), String> {
        let VolumeSettings { node, peer, .. } = &self.settings;
        if self.role != Role::Standby {
            let demote = self.here("demote");
            return Err(format!("{node} serves the volume: {demote} first, if its data is the data to lose"));
        }
        if self.superblock.disk_state == DiskState::Failed {
            let create = self.here("create --force");
            return Err(format!(
                "the disk failed: stop the daemon, replace the disk, and {create} makes a new one of \
                 it, to be copied from {peer}; what only the failed disk held is lost with it"
            ));
        }
        Ok(())
    }

    /// On record before anything may be copied over it: from here on nobody reads from this disk.
    fn give_up_content(&mut self, actions: &mut Vec<Action>) {
        self.abandon_handshake(actions);
        let generation = self.superblock.generations.current.0;
        self.superblock.disk_state = DiskState::Inconsistent;
        // Nobody's bytes are among it yet: its own map says what it changed since it parted from the peer.
        self.superblock.copying = Generation::ZERO;
        self.superblock.primary = false;
        self.superblock.zeroed = false;
        self.undurable = false;
        self.recall = None;
        self.store(actions);
        let text = format!("an operator gave up this disk's data, generation {generation:016x}");
        self.log(Level::Warn, &text, actions);
    }

    /// Both went on without the other, and this node's side is the one to lose.
    fn on_discard(&mut self, id: ReplyId, actions: &mut Vec<Action>) {
        let peer = &self.settings.peer;
        let refusal = if self.peer.is_none() && !self.split_brain {
            // It may be the only good copy, or the copying refused for another reason all the same.
            Err(format!(
                "no split brain with {peer} was detected since this daemon started, so nothing is given up: \
                 {} and {} show how the two disks are related",
                self.here("connect"),
                self.there("connect")
            ))
        } else if self.peer.is_some() {
            Err(format!(
                "connected to {peer}: there is nothing to discard; {} copies anew",
                self.here("invalidate")
            ))
        } else {
            self.may_discard()
        };
        if refusal.is_err() {
            return self.reply(id, refusal.map(|()| String::new()), actions);
        }
        self.give_up_content(actions);
        if self.connection != Connection::Standalone {
            self.set_connection(Connection::Standalone);
        }
        let VolumeSettings { node, peer, .. } = &self.settings;
        let text = format!(
            "{node}'s data is given up; connecting to be copied from {peer} (if {peer} is parted: {})",
            self.there("connect")
        );
        self.on_connect(id, &text, actions);
    }

    fn on_invalidate(&mut self, id: ReplyId, actions: &mut Vec<Action>) {
        let name = &self.settings.peer;
        let refusal = match &self.peer {
            None => Err(format!(
                "not connected to {name}, so there is no source to copy from: {} first, or {}",
                self.here("connect"),
                self.here("connect --discard-my-data")
            )),
            Some(_) if !self.in_session() => Err(format!("the link to {name} is closing; try again")),
            Some(_) if self.connection == Connection::SyncTarget => {
                Err(format!("this disk is already being copied from {name}"))
            }
            Some(peer)
                if !peer.primary
                    && self.role == Role::Standby
                    && self.connection == Connection::Connected =>
            {
                // Two standbys might both be told so, and leave no copy at all.
                Err(format!("{name} does not serve: {} first", self.there("promote")))
            }
            Some(_) if self.connection != Connection::Connected => {
                Err(format!("{name} is being copied to from here: its disk is not complete yet"))
            }
            Some(_) => self.may_discard(),
        };
        if refusal.is_err() {
            return self.reply(id, refusal.map(|()| String::new()), actions);
        }
        if self.invalidating.is_some() {
            return self.reply(id, Err("the disk is already being given up".to_owned()), actions);
        }
        // The map is not this node's to mark before the session is over.
        self.invalidating = Some(id);
        actions.push(Action::CloseLink);
    }

    /// What `invalidate` asked for, once the session is over: the next one finds the record and copies everything.
    pub(super) fn invalidate_now(&mut self, actions: &mut Vec<Action>) {
        let Some(id) = self.invalidating.take() else { return };
        if let Err(text) = self.may_discard() {
            return self.reply(id, Err(text), actions);
        }
        self.mark_all(actions);
        self.give_up_content(actions);
        let text = format!("the disk is invalid; it will be copied from {}", self.settings.peer);
        self.reply(id, Ok(text), actions);
    }

    /// Closes whatever there is and stays apart.
    fn part(&mut self, actions: &mut Vec<Action>) {
        actions.push(Action::StopDialing);
        self.abandon_handshake(actions);
        if self.peer.is_some() {
            actions.push(Action::CloseLink);
        }
        if self.connection != Connection::Standalone {
            self.set_connection(Connection::Standalone);
        }
        self.obstacle = None;
        self.demotion_known(Some("the two are disconnected"), actions);
    }

    /// Whether this disk is on record as failed, and as one that went on from what the peer has, or was still copied to it.
    pub(super) fn failed_ahead(&self) -> bool {
        let superblock = &self.superblock;
        superblock.disk_state == DiskState::Failed
            && !superblock.is_fresh()
            && superblock.copying == Generation::ZERO
            && (!superblock.peer_has_current || superblock.generations.base != Generation::ZERO)
    }

    /// Why a disk that may not be served unasked is not, and what serving it all the same gives up.
    fn unusable_text(&self) -> String {
        let peer = &self.settings.peer;
        let state = self.shown_disk_state().as_str();
        if self.superblock.is_fresh() {
            return format!(
                "the disk is new and has never met {peer}'s: start the daemon of {peer}, and the two agree on what the volume \
                 holds. --force serves this disk as it is, and {peer} is copied from it: only if {peer}'s disk is new as well, or its \
                 data is lost for good"
            );
        }
        if self.failed_ahead() {
            return format!(
                "the disk is {state}, and MAY HOLD WRITES THAT {peer} LACKS. Save what can be read of it first. --force serves what \
                 its medium still gives, and {peer} is copied from it: only if {peer} was not promoted meanwhile. \
                 {} instead gives those writes up",
                self.there("promote")
            );
        }
        let holds = match self.shown_disk_state() {
            DiskState::Outdated if self.superblock.disk_state == DiskState::Outdated => {
                "in which a verification found bytes that differ from the peer's"
            }
            DiskState::Outdated => "what it had flushed before it lost power",
            DiskState::Failed => "what its medium still gives",
            _ => "a mixture of older and newer data",
        };
        format!(
            "the disk is {state}: let it sync from {peer}. --force serves what it holds, {holds}, and gives up what {peer} has: only \
             if {peer}'s data is lost for good"
        )
    }

    /// Where the data is, now that this node's disk failed: the first thing to know before anything is replaced.
    fn who_has_the_data(&self) -> String {
        let VolumeSettings { node, peer, ack, .. } = &self.settings;
        let superblock = &self.superblock;
        let mend = format!("Repair or replace the disk of {node}, then restart its daemon");
        let in_sync = self.connection == Connection::Connected && self.in_session() && !self.unrepaired;
        if in_sync || self.diskless.text().is_some() || superblock.disk_state == DiskState::Inconsistent {
            let last =
                if *ack == AckLevel::Async { " but for the last writes (ack = \"async\")" } else { "" };
            let serves = self.peer.as_ref().is_some_and(|peer| peer.primary);
            let takeover =
                if serves { String::new() } else { format!(", and {} serves it", self.there("promote")) };
            return format!("{peer} has the data{last}{takeover}. {mend}");
        }
        if superblock.is_fresh() && !superblock.zeroed {
            return format!(
                "it is new, and not known to be empty: if you brought data in on it, that is nowhere else. Save what can be read of \
                 it before anything else. {mend}"
            );
        }
        if superblock.is_fresh() {
            return format!("it never held data of this pair. {mend}");
        }
        let ahead = self.alone
            || self.undurable
            || self.unrepaired
            || self.connection == Connection::SyncSource
            || !superblock.peer_has_current
            || (*ack == AckLevel::Async && superblock.primary && !superblock.clean);
        if ahead {
            return format!(
                "IT MAY HOLD WRITES THAT {peer} LACKS. Save what can be read of it before anything else; if it can be made to \
                 work, restart the daemon of {node}, and {} serves it. {}, or {}, gives those writes up",
                self.here("promote --force"),
                self.there("promote"),
                self.here("create --force")
            );
        }
        format!("{peer} had the same data when the two parted, and has what it wrote since. {mend}")
    }

    fn on_promote(&mut self, now: Duration, id: ReplyId, force: bool, actions: &mut Vec<Action>) {
        match self.role {
            Role::Primary if force && self.status().frozen && self.pending.is_none() => {
                self.go_alone(actions);
                let text = format!("{} goes on without {}", self.settings.node, self.settings.peer);
                return self.reply(id, Ok(text), actions);
            }
            Role::Primary => {
                return self.reply(id, Ok(format!("{} is primary already", self.settings.node)), actions);
            }
            Role::Promoting | Role::Demoting => {
                return self.reply(id, Err("a change of role is under way; try again".to_owned()), actions);
            }
            Role::Standby => {}
        }
        let state = self.shown_disk_state().as_str();
        let peer_name = &self.settings.peer;
        let Some(peer) = &self.peer else {
            if !self.is_usable() && !force {
                return self.reply(id, Err(self.unusable_text()), actions);
            }
            return self.promote_alone(id, actions);
        };
        let refusal = if peer.primary {
            format!("the connected peer {peer_name} is primary: {} first", self.there("demote"))
        } else if !self.in_session() {
            format!("the link to {peer_name} is closing; try again")
        } else if self.connection == Connection::SyncSource {
            let (wait, part) = (self.here("wait-sync"), self.here("disconnect"));
            format!("{peer_name} is being copied to: {wait} first, or {part} to stop the copy")
        } else if !self.is_usable() {
            format!("the disk is {state}: {} first", self.here("wait-sync"))
        } else {
            return self.ask_for_promotion(now, Some(id), actions);
        };
        self.reply(id, Err(refusal), actions);
    }

    pub(super) fn ask_for_promotion(
        &mut self,
        now: Duration,
        id: Option<ReplyId>,
        actions: &mut Vec<Action>,
    ) {
        let epoch = self.superblock.epoch.next();
        self.promotion = Some(Promotion { id, epoch, deadline: now + GRANT_TIMEOUT });
        self.set_role(Role::Promoting);
        actions.push(Action::SendPeer { code: code::PROMOTE_REQUEST, arg: epoch.0 });
    }

    /// Without the peer: whatever it does meanwhile, its generation will not be this one.
    fn promote_alone(&mut self, id: ReplyId, actions: &mut Vec<Action>) {
        self.abandon_handshake(actions);
        self.recall = None;
        if !self.is_usable() {
            let text = format!("forced to serve a disk that is {}", self.shown_disk_state().as_str());
            self.log(Level::Warn, &text, actions);
        }
        if self.superblock.volume_id == [0; 16] {
            self.superblock.volume_id = self.proposed.volume_id;
        }
        if matches!(self.superblock.disk_state, DiskState::Inconsistent | DiskState::Failed) {
            // What such a disk holds is no continuation of any generation. Claiming one would let it overwrite a peer
            // that went on under the same generation while this disk was its target.
            self.superblock.generations = Generations::default();
        }
        self.advance_generation();
        let superblock = &mut self.superblock;
        superblock.epoch = superblock.epoch.next();
        superblock.disk_state = DiskState::UpToDate;
        superblock.zeroed = false;
        superblock.applying = false;
        superblock.copying = Generation::ZERO;
        superblock.primary = true;
        superblock.clean = false;
        let epoch = superblock.epoch;
        // The flush after the last session says nothing of what clients write from here on.
        self.settling = false;
        // Going on from what it holds is the operator's word for it.
        self.lost_power = false;
        self.dirty = true;
        self.store(actions);
        self.set_role(Role::Primary);
        self.alone = true;
        self.undurable = false;
        actions.push(Action::Serve { epoch });
        actions.push(Action::GoAlone);
        let text = format!("{} is primary, without {}", self.settings.node, self.settings.peer);
        self.reply(id, Ok(text), actions);
    }

    fn on_demote(&mut self, now: Duration, id: ReplyId, actions: &mut Vec<Action>) {
        match self.role {
            Role::Standby => {
                let superblock = &mut self.superblock;
                // One that crashed stays on record as what it was: its disk may hold what no other does.
                let settled = superblock.clean || superblock.disk_state == DiskState::Inconsistent;
                if settled && std::mem::take(&mut superblock.primary) {
                    self.resume_at = None;
                    self.abandon_handshake(actions);
                    self.store(actions);
                }
                self.reply(id, Ok(format!("{} is standby already", self.settings.node)), actions);
            }
            Role::Promoting | Role::Demoting => {
                self.reply(id, Err("a change of role is under way; try again".to_owned()), actions);
            }
            Role::Primary if self.overtaken && self.peer.is_none() => self.give_way(id, actions),
            Role::Primary => {
                if let Some(text) = self.verification_forbids_demotion() {
                    return self.reply(id, Err(text), actions);
                }
                if self.connection == Connection::SyncSource {
                    // Nobody could serve until the copy ends: neither its target nor, in the middle of sending it, this node.
                    let VolumeSettings { node, peer, .. } = &self.settings;
                    let text = format!(
                        "{peer} is being copied to and could not serve, so {node} goes on: {} first, or {} to stop the copy and \
                         demote then",
                        self.here("wait-sync"),
                        self.here("disconnect")
                    );
                    return self.reply(id, Err(text), actions);
                }
                // It agreed that this node serves; its end must not undo the demotion.
                self.abandon_handshake(actions);
                self.demotion = Some(Demotion { id, deadline: now + QUIESCE_TIMEOUT });
                self.set_role(Role::Demoting);
                actions.push(Action::Quiesce);
            }
        }
    }

    /// The peer went on without this node, and an operator wants its data: what waits here for the peer would wait for ever, so
    /// clients are told that it failed. The next handshake finds a standby, to be copied to.
    fn give_way(&mut self, id: ReplyId, actions: &mut Vec<Action>) {
        self.abandon_handshake(actions);
        actions.push(Action::StopServing);
        self.superblock.primary = false;
        self.store(actions);
        self.set_role(Role::Standby);
        self.alone = false;
        self.overtaken = false;
        let VolumeSettings { node, peer, .. } = &self.settings;
        let text = format!("{node} is standby, and is copied from {peer}");
        self.log(Level::Warn, &text, actions);
        self.reply(id, Ok(text), actions);
    }

    pub(super) fn on_quiesced(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.shutdown_deadline.is_some() {
            return self.wind_down(actions);
        }
        let Some(demotion) = self.demotion.take() else { return };
        // It agreed that this node serves; its end must not undo the demotion.
        self.abandon_handshake(actions);
        let may_return = self.recall.take().is_some_and(|recall| !recall.alone)
            && self.connection == Connection::Connecting
            && self.obstacle.is_none();
        actions.push(Action::StopServing);
        if std::mem::take(&mut self.undurable) {
            // Once it is no primary's disk any more, only its generation tells that it differs from the peer's.
            self.advance_generation();
        }
        self.superblock.primary = false;
        self.superblock.clean = true;
        self.store(actions);
        self.set_role(Role::Standby);
        let alone = std::mem::take(&mut self.alone);
        let in_session = self.in_session();
        if in_session || may_return {
            // A promotion there is refused until it is known there, and whoever asked wants just that next. Where the link broke
            // a moment ago the peer is told in the session that follows.
            if in_session {
                actions.push(Action::SendPeer { code: code::DEMOTED, arg: 0 });
            }
            self.demoted = Some(Demotion { id: demotion.id, deadline: now + GRANT_TIMEOUT });
            return;
        }
        let VolumeSettings { node, peer, .. } = &self.settings;
        let text = if alone {
            format!(
                "{node} is standby; {peer} lacks what was written here without it, and is copied to when it is back"
            )
        } else {
            format!("{node} is standby")
        };
        self.reply(demotion.id, Ok(text), actions);
    }

    /// The peer knows that this node was demoted, or will not come to know of it for the reason given.
    pub(super) fn demotion_known(&mut self, but: Option<&str>, actions: &mut Vec<Action>) {
        let Some(demotion) = self.demoted.take() else { return };
        let VolumeSettings { node, peer, .. } = &self.settings;
        let text = match but {
            None if self.connection == Connection::SyncSource => {
                format!("{node} is standby; {peer} knows, and can be promoted when it has been copied to")
            }
            None => format!("{node} is standby"),
            Some(why) => format!("{node} is standby; whether {peer} knows it is not known: {why}"),
        };
        self.reply(demotion.id, Ok(text), actions);
    }

    /// Whoever waits for a change that does not come about any more.
    fn take_waiting(&mut self) -> impl Iterator<Item = ReplyId> + use<> {
        let promotion = self.promotion.take().and_then(|promotion| promotion.id);
        let demotion = self.demotion.take().map(|demotion| demotion.id);
        [promotion, demotion, self.invalidating.take()].into_iter().flatten()
    }

    pub(super) fn on_disk_failed(&mut self, text: &str, actions: &mut Vec<Action>) {
        // Storing the state below may fail in turn and be reported again.
        if self.medium_failed && self.connection == Connection::Standalone {
            return;
        }
        let text = format!("the disk failed on {} ({text}): {}", self.settings.node, self.who_has_the_data());
        self.log(Level::Error, &text, actions);
        if matches!(self.role, Role::Primary | Role::Demoting) {
            actions.push(Action::StopServing);
        }
        self.demotion_known(Some("the disk failed"), actions);
        for id in self.take_waiting() {
            self.reply(id, Err("the disk failed".to_owned()), actions);
        }
        if self.role != Role::Standby {
            self.set_role(Role::Standby);
        }
        self.alone = false;
        self.recall = None;
        self.part(actions);
        self.refusal = Some(text);
        self.medium_failed = true;
        self.superblock.disk_state = DiskState::Failed;
        self.superblock.primary = false;
        self.store(actions);
    }

    pub(super) fn on_shutdown(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.shutdown_deadline.is_some() {
            return;
        }
        // Writes that wait for the peer are never answered now, nor is anything lost with them: their clients were told nothing.
        let patience = if self.holds_writes() { FROZEN_QUIESCE_TIMEOUT } else { QUIESCE_TIMEOUT };
        self.shutdown_deadline = Some(now + patience);
        self.demotion_known(Some("the daemon is shutting down"), actions);
        actions.push(Action::StopDialing);
        self.abandon_handshake(actions);
        for id in self.take_waiting() {
            self.reply(id, Err("the daemon is shutting down".to_owned()), actions);
        }
        match self.role {
            Role::Primary => actions.push(Action::Quiesce),
            Role::Demoting => {} // quiescing already
            Role::Promoting => {
                self.set_role(Role::Standby);
                self.wind_down(actions);
            }
            Role::Standby => self.wind_down(actions),
        }
    }

    /// Nothing is in flight, or the time for it is over: stop, and end the session.
    fn wind_down(&mut self, actions: &mut Vec<Action>) {
        if matches!(self.role, Role::Primary | Role::Demoting) {
            actions.push(Action::StopServing);
            self.set_role(Role::Standby);
        }
        if self.peer.is_some() {
            actions.push(Action::CloseLink);
        } else {
            self.rest(actions);
        }
    }

    /// The session is over and nothing is served.
    pub(super) fn rest(&mut self, actions: &mut Vec<Action>) {
        // A primary's flag from before this daemon keeps its own cleanness: nothing was resolved since.
        if !self.undurable && (!self.superblock.primary || self.served) {
            self.superblock.clean = true;
        }
        self.store(actions);
        actions.push(Action::ShutdownComplete);
    }

    pub(super) fn on_tick(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.promotion.as_ref().is_some_and(|promotion| now >= promotion.deadline) {
            let text =
                format!("{} did not answer in {} s; try again", self.settings.peer, GRANT_TIMEOUT.as_secs());
            self.end_promotion(&text, actions);
        }
        if self.demoted.as_ref().is_some_and(|demotion| now >= demotion.deadline) {
            let secs = GRANT_TIMEOUT.as_secs();
            let text = if self.in_session() {
                format!("it did not answer in {secs} s")
            } else {
                format!("the link broke, and there was no session within {secs} s")
            };
            self.demotion_known(Some(&text), actions);
        }
        self.resume_if_due(now, actions);
        if self.need_alone.is_some_and(|until| now >= until) {
            self.abandon_handshake(actions);
        }
        if let Some(demotion) = self.demotion.take_if(|demotion| now >= demotion.deadline) {
            self.set_role(Role::Primary);
            actions.push(Action::Serve { epoch: self.superblock.epoch });
            let super::VolumeSettings { node, peer, .. } = &self.settings;
            let wait = self.here("wait-sync");
            let what = if self.holds_writes() {
                format!(
                    "writes wait for {peer} to be in sync (on_peer_loss = \"freeze\"): have {peer} return and let a copy end \
                     ({wait})"
                )
            } else {
                format!("let a copy end first ({wait}), check for slow disks and a slow link")
            };
            let text = format!(
                "the requests in flight did not finish within {} s, so {node} is still primary: {what}, then try again",
                QUIESCE_TIMEOUT.as_secs()
            );
            self.reply(demotion.id, Err(text), actions);
        }
        if self.shutdown_deadline.is_some_and(|deadline| now >= deadline) {
            self.shutdown_deadline = Some(Duration::MAX);
            // Not quiesced: what is in flight stays unconfirmed, and the next start has to know.
            self.undurable |= matches!(self.role, Role::Primary | Role::Demoting);
            if self.peer.take().is_some() {
                actions.push(Action::CloseLink);
            }
            self.wind_down(actions);
        }
    }
}
