//! The part of the controller that deals with the peer: hello, session, resync, going alone, messages.

use super::explain::{explain, overtaken};
use super::{
    Action, Connection, GRANT_TIMEOUT, Level, Obstacle, Peer, Pending, Role, SessionSide, VolumeController,
    VolumeSettings, code, lineage_of,
};
use crate::generation::{Agreement, Recall, Scope, Side, Verdict, View, Why, agree, knows};
use crate::hello::{EPOCH_STEP_MAX, Hello, Ready, RefuseCode};
use costandby_datapath::disk::metadata::header::SESSIONS_MAX;
use costandby_datapath::disk::superblock::{COPYING_WHOLE, DiskState, Generations};
use costandby_datapath::reactor::command::{Before, Parted};
use costandby_datapath::units::{Epoch, Generation, OnPeerLoss, Seq};
use std::time::Duration;

impl VolumeController {
    pub(super) fn on_hello(&mut self, hello: &Hello, actions: &mut Vec<Action>) {
        let settings = &self.settings;
        if hello.volume != settings.volume || hello.node != settings.peer {
            let text = format!(
                "expected {} about volume {}, got {} about volume {}: the configurations differ",
                settings.peer, settings.volume, hello.node, hello.volume
            );
            return self.refuse_by_name(RefuseCode::Configuration, text, actions);
        }
        if let Some(refuse) = self.will_refuse() {
            return actions.push(Action::Refuse(refuse));
        }
        if self.peer.is_some() {
            // The peer has left the session that we still believe in.
            actions.push(Action::CloseLink);
            return self.refuse(RefuseCode::Busy, "still closing the link before this one", actions);
        }
        if self.pending.take().is_some() {
            // Refusing it ends the connection, and with it the handshake that waited for `Ready` there.
            self.refuse(RefuseCode::Busy, "a second hello in one handshake", actions);
            return self.handshake_over(actions);
        }
        let mine = self.view();
        let settled = self.connection == Connection::Connecting && self.role != Role::Promoting;
        if !settled || self.shutdown_deadline.is_some() || self.offered.as_ref() != Some(&mine) {
            return self.refuse(RefuseCode::Busy, "in the middle of a change", actions);
        }
        let theirs = hello.view.epoch.0;
        if theirs > mine.epoch.0 && !self.is_next_epoch(theirs) {
            let text = format!(
                "{} claims epoch {theirs}, this node has {}: there cannot have been so many promotions; the peer's metadata is \
                 damaged, or another program uses its name. Nothing was changed; {} shows what it has",
                settings.peer,
                mine.epoch.0,
                self.there("dump-metadata")
            );
            return self.refuse_by_name(RefuseCode::Disks, text, actions);
        }
        self.overtaken = false;
        let agreement = agree(&mine, &hello.view);
        if self.role == Role::Demoting
            && (agreement.goes_on.is_none() || agreement.primary != Some(Side::Mine))
        {
            // What is in flight ends in the session that it began in, or without the peer.
            return self.refuse(RefuseCode::Busy, "in the middle of a demotion", actions);
        }
        match agreement.verdict {
            Verdict::Resync { source, .. } if agreement.overwrites_a_primary(&mine, &hello.view) => {
                let text = overtaken(source, &mine, &hello.view, settings);
                self.overtaken = source == Side::Theirs;
                self.split_brain = source == Side::Mine;
                self.refuse_by_name(RefuseCode::Disks, text, actions);
            }
            Verdict::InSync { .. } | Verdict::Resync { .. } => {
                let lineage = lineage_of(&agreement, &mine, &hello.view);
                let mut session = [self.nonce, hello.nonce];
                if settings.peer < settings.node {
                    session.reverse();
                }
                let incarnation = hello.incarnation;
                let ready = Ready { agreement, lineage };
                self.accept(Pending { ready, peer: hello.view, session, incarnation }, actions);
            }
            Verdict::NoUsableDisk | Verdict::TwoWithData | Verdict::SizeDiffers => {
                let text = explain(agreement.verdict, &mine, &hello.view, settings);
                self.refuse_by_name(RefuseCode::Disks, text, actions);
            }
            Verdict::SplitBrain | Verdict::Unrelated => {
                let text = explain(agreement.verdict, &mine, &hello.view, settings);
                self.split_brain = agreement.verdict == Verdict::SplitBrain;
                self.refuse(RefuseCode::Disks, &text, actions);
                self.log(Level::Error, &text, actions);
                actions.push(Action::StopDialing);
                self.refusal = Some(text);
                self.set_connection(Connection::Standalone);
            }
        }
    }

    /// Refuses a session, says why in the log once and in `status` for as long as it holds, and goes on looking for the peer:
    /// when the reason is gone there is a session.
    fn refuse_by_name(&mut self, code: RefuseCode, text: String, actions: &mut Vec<Action>) {
        self.refuse(code, &text, actions);
        if self.refusal.as_ref() != Some(&text) {
            self.log(Level::Error, &text, actions);
            self.refusal = Some(text);
        }
    }

    /// Whether an epoch is beyond this node's and no further than promotions may have come.
    fn is_next_epoch(&self, epoch: u64) -> bool {
        let ours = self.superblock.epoch.0;
        epoch > ours && epoch - ours <= EPOCH_STEP_MAX
    }

    /// Puts on record what the agreement asks of this disk, then says so.
    fn accept(&mut self, pending: Pending, actions: &mut Vec<Action>) {
        let Ready { agreement, lineage } = pending.ready;
        self.split_brain = false;
        let resumes = self.resumes_after(&agreement, &pending.peer);
        let before = self.superblock.clone();
        let superblock = &mut self.superblock;
        superblock.epoch = Epoch(agreement.epoch);
        if agreement.goes_on.is_none() {
            // On record before `ready`, so that no session begins at the peer that this node does not know of. One that
            // goes on keeps its number: both daemons have held their disks since, so neither disk is of an earlier time.
            let last = superblock.sessions_offered.max(pending.peer.sessions_offered);
            superblock.sessions_offered = last.saturating_add(1).min(SESSIONS_MAX);
        }
        match agreement.verdict {
            Verdict::InSync { adopt: Some(_) }
            | Verdict::Resync { source: Side::Mine, why: Why::BothFresh, .. } => {
                superblock.volume_id = lineage.volume_id;
                superblock.generations =
                    Generations { current: Generation(lineage.generation), ..Generations::default() };
                superblock.zeroed = false;
            }
            Verdict::Resync { source: Side::Theirs, scope, .. } => {
                self.undurable = false;
                superblock.volume_id = lineage.volume_id;
                superblock.disk_state = DiskState::Inconsistent;
                superblock.zeroed = false;
                if scope == Scope::Full {
                    // From whom is stored once the source says that it has all of it on record.
                    superblock.copying = COPYING_WHOLE;
                }
            }
            _ => {}
        }
        // Before the first session a `primary` that is still `clean` only says who is to begin.
        // One that serves from its peer's disk is on record as behind, and stays so.
        let with_disk = !self.diskless.is_gone();
        superblock.primary = (agreement.primary == Some(Side::Mine) || resumes) && with_disk;
        superblock.clean |= superblock.primary && !before.primary;
        let serves = matches!(self.role, Role::Primary | Role::Demoting);
        let kept = !serves || agreement.primary == Some(Side::Mine);
        assert!(kept, "a node that serves was to stop by a handshake: {agreement:?}");
        let full =
            matches!(agreement.verdict, Verdict::Resync { source: Side::Mine, scope: Scope::Full, .. });
        if full {
            self.mark_all(actions);
        }
        if self.superblock != before {
            self.store(actions);
        }
        self.refusal = None;
        actions.push(Action::SendReady(pending.ready));
        self.set_connection(Connection::Handshaking);
        self.pending = Some(pending);
    }

    /// Whether this node, which was primary when it lost power, will be again once it has been copied to. Not where
    /// somebody took over, which shows in the generation.
    fn resumes_after(&self, agreement: &Agreement, peer: &View) -> bool {
        let Verdict::Resync { source: Side::Theirs, why, .. } = agreement.verdict else { return false };
        let superblock = &self.superblock;
        superblock.primary
            && self.role == Role::Standby
            && agreement.primary.is_none()
            && peer.generations.current == superblock.generations.current
            && (why == Why::TargetLostPower || superblock.disk_state == DiskState::Inconsistent)
    }

    /// Has everything on record as differing, unless it is.
    pub(super) fn mark_all(&mut self, actions: &mut Vec<Action>) {
        self.dirty = true;
        self.recall = None;
        if !std::mem::replace(&mut self.all_marked, true) {
            actions.push(Action::MarkAll);
        }
    }

    pub(super) fn on_ready(&mut self, theirs: Ready, actions: &mut Vec<Action>) {
        let Some(pending) = self.pending.take() else {
            return self.log(Level::Info, "a Ready message for a handshake that is over", actions);
        };
        let Ready { agreement, lineage } = pending.ready;
        if theirs.agreement != agreement.mirrored() || theirs.lineage != lineage {
            actions.push(Action::CloseLink);
            self.handshake_over(actions);
            let text = "the peer decided otherwise: do both nodes run the same release?".to_owned();
            return self.on_obstacle(Obstacle::Failed { text }, actions);
        }
        let serve = agreement.primary == Some(Side::Mine);
        let peer_serves = agreement.primary == Some(Side::Theirs);
        let before = self.before(&agreement, &pending.peer);
        let goes_on = agreement.goes_on.is_some();
        let link_changes = std::mem::take(&mut self.link_changes);
        let diskless = goes_on && self.recall.is_some_and(|recall| recall.diskless);
        let restarted = self.peer_incarnation.is_some_and(|known| known != pending.incarnation);
        self.peer_incarnation = Some(pending.incarnation);
        self.recall = None;
        let session = self.session.filter(|_| goes_on).map_or(pending.session, |(session, _)| session);
        self.session = Some((session, Generation(lineage.generation)));
        let stored = self.superblock.clone();
        let superblock = &mut self.superblock;
        self.settling = false;
        self.all_marked = false;
        superblock.clean = false;
        superblock.applying = peer_serves;
        if !goes_on {
            superblock.sessions_begun = superblock.sessions_offered;
        }
        let (connection, resync) = match agreement.verdict {
            Verdict::Resync { source: Side::Mine, .. } => (Connection::SyncSource, true),
            Verdict::Resync { .. } => {
                // The source is ready: all that may differ is on its record, or on ours until it is on its.
                superblock.copying = Generation(lineage.generation);
                (Connection::SyncTarget, false)
            }
            // The record says which disk is behind, and that goes on.
            _ if diskless => (Connection::Connected, false),
            _ => {
                superblock.generations.base = Generation::ZERO;
                superblock.peer_has_current = true;
                self.dirty = false;
                (Connection::Connected, false)
            }
        };
        if connection != Connection::SyncTarget {
            // What this disk holds is what the volume holds from here on.
            self.lost_power = false;
        }
        if goes_on && connection == Connection::Connected {
            self.undurable = false;
        }
        if !goes_on || self.superblock != stored {
            self.store(actions);
        }
        self.set_connection(connection);
        let begins = serve && self.role == Role::Standby;
        if begins {
            self.set_role(Role::Primary);
        }
        self.obstacle = None;
        self.peer =
            Some(Peer { view: pending.peer, primary: peer_serves, diskless: diskless && peer_serves });
        self.alone = false;
        self.need_alone = None;
        let side = if serve || resync {
            SessionSide::Source { resync }
        } else {
            SessionSide::Target { resync: connection == Connection::SyncTarget }
        };
        // A node that is being demoted still finishes what was asked before, and admits nothing new.
        let admits = serve && self.role != Role::Demoting;
        actions.push(Action::StartSession { side, before, serve: admits, epoch: Epoch(agreement.epoch) });
        if self.demoted.is_some() {
            // Whether the word was heard that was sent over the link before is not known.
            actions.push(Action::SendPeer { code: code::DEMOTED, arg: 0 });
        }
        let text = match agreement.verdict {
            _ if goes_on => {
                format!("connected to {} again: the session goes on where its link broke", self.settings.peer)
            }
            Verdict::Resync { why, scope, .. } => {
                let direction = if resync { "copying to" } else { "being copied from" };
                let what = match scope {
                    Scope::Full => "everything",
                    Scope::Delta => "what differs",
                };
                let daemon = if restarted { "; its daemon was restarted" } else { "" };
                format!("connected, {direction} {} {what}: {}{daemon}", self.settings.peer, why.as_str())
            }
            _ => format!("connected to {}, in sync", self.settings.peer),
        };
        let first = agreement.primary == Some(Side::Mine);
        if matches!(agreement.verdict, Verdict::Resync { why: Why::BothFresh, .. })
            && first != self.settings.configured_primary
        {
            let VolumeSettings { node, peer, .. } = &self.settings;
            let (data, empty) = if first { (node, peer) } else { (peer, node) };
            let text = format!(
                "the new disk of {data} may hold data and that of {empty} is empty, so {data}'s is copied and {data} serves first, \
                 although `primary` in the configuration names {empty}"
            );
            self.log(Level::Warn, &text, actions);
        }
        if goes_on && link_changes {
            return;
        }
        let role = if begins { format!("; {} is primary", self.settings.node) } else { String::new() };
        self.log(Level::Info, &(text + &role), actions);
    }

    /// What the two nodes still know of the session before the one that begins.
    fn before(&self, agreement: &Agreement, peer: &View) -> Before {
        let mine = self.view();
        if let Some(applied) = agreement.goes_on {
            let map_told = [mine.recall, peer.recall].into_iter().flatten().any(|recall| recall.map_told);
            return Before::GoesOn { applied: Seq(applied), map_told };
        }
        let copies = matches!(agreement.verdict, Verdict::Resync { source: Side::Mine, .. });
        match peer.recall.filter(|_| copies && knows(&mine, peer)) {
            Some(theirs) => Before::Kept { applied: Seq(theirs.applied) },
            None => Before::Unknown,
        }
    }

    pub(super) fn on_session_failed(&mut self, obstacle: Obstacle, actions: &mut Vec<Action>) {
        if self.pending.take().is_some() {
            self.handshake_over(actions);
        }
        self.on_obstacle(obstacle, actions);
    }

    /// Closes a connection that waits for the peer's `Ready`.
    pub(super) fn abandon_handshake(&mut self, actions: &mut Vec<Action>) {
        if self.pending.take().is_some() {
            actions.push(Action::CloseLink);
            self.handshake_over(actions);
        }
    }

    fn handshake_over(&mut self, actions: &mut Vec<Action>) {
        self.set_connection(Connection::Connecting);
        if let Some(until) = self.need_alone.take() {
            self.on_need_alone(until, actions);
        }
    }

    pub(super) fn on_link_down(
        &mut self,
        reason: &str,
        undurable: bool,
        dirty: bool,
        parted: Option<Parted>,
        actions: &mut Vec<Action>,
    ) {
        let Some(peer) = self.peer.take() else {
            self.dirty |= dirty;
            return;
        };
        // What a verification found must not be copied over this disk: the peer is behind, and on record as that.
        let unrepaired = std::mem::take(&mut self.unrepaired);
        let undurable = undurable || unrepaired;
        let asked = self.diskless.text().is_some() && !self.diskless.is_gone();
        // Without a disk there is nothing to end in order with.
        let ends = self.shutdown_deadline.is_some() || self.connection == Connection::Standalone;
        let out_of_order = unrepaired || asked || (ends && self.diskless.is_gone());
        let diskless = peer.diskless || self.diskless.is_gone();
        self.recall = parted.filter(|_| !out_of_order).and_then(|parted| self.recall_of(&parted, diskless));
        self.dirty = dirty;
        self.resume_at = None;
        let text = format!("the link to {} broke while it was asked; try again", self.settings.peer);
        self.end_promotion(&text, actions);
        if !self.link_changes {
            self.log(Level::Warn, &format!("lost {}: {reason}", self.settings.peer), actions);
        }
        if self.recall.is_none() {
            self.end_diskless(actions);
        }
        self.settling = self.superblock.applying;
        let serves = matches!(self.role, Role::Primary | Role::Demoting);
        // The datapath says when clients have waited long enough for a peer that may be back in a moment.
        let waits = self.recall.is_some() && self.connection != Connection::Standalone;
        if serves && undurable && !self.diskless.is_gone() {
            match self.settings.on_peer_loss {
                OnPeerLoss::Continue if !waits => self.go_alone(actions),
                _ => self.undurable = true,
            }
        }
        self.invalidate_now(actions);
        if self.shutdown_deadline.is_some() {
            if !serves && !self.settling {
                self.undurable |= undurable && self.superblock.primary;
                self.rest(actions);
            }
            return;
        }
        match self.connection {
            // An operator disconnected, or has said `connect` again since; that one dials already.
            Connection::Standalone | Connection::Connecting => {}
            // The peer is dialled as before the session, when whoever does that finds it time.
            _ => self.set_connection(Connection::Connecting),
        }
    }

    fn recall_of(&self, parted: &Parted, diskless: bool) -> Option<Recall> {
        let (session, generation) = self.session?;
        let Parted { source, epoch, applied, numbered, map_told } = *parted;
        Some(Recall {
            session,
            epoch: epoch.0,
            generation: generation.0,
            source,
            applied: applied.0,
            numbered: numbered.0,
            map_told,
            alone: false,
            diskless,
        })
    }

    pub(super) fn on_settled(&mut self, actions: &mut Vec<Action>) {
        if !std::mem::take(&mut self.settling) || self.peer.is_some() {
            return;
        }
        if std::mem::take(&mut self.superblock.applying) {
            self.store(actions);
        }
        if self.shutdown_deadline.is_some() {
            self.rest(actions);
        }
    }

    pub(super) fn on_need_alone(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if self.peer.is_some() || !matches!(self.role, Role::Primary | Role::Demoting) {
            return;
        }
        match self.settings.on_peer_loss {
            // The peer may be about to start a session on the strength of our hello, or says nothing more: clients wait for half
            // as long again as for any silence of a peer, and then the handshake is given up.
            OnPeerLoss::Continue if self.pending.is_some() => {
                self.need_alone.get_or_insert(now + self.settings.peer_timeout / 2);
            }
            OnPeerLoss::Continue => self.go_alone(actions),
            OnPeerLoss::Freeze => {
                let text = format!("writes wait for {} (on_peer_loss = \"freeze\")", self.settings.peer);
                self.log(Level::Warn, &text, actions);
            }
        }
    }

    pub(super) fn go_alone(&mut self, actions: &mut Vec<Action>) {
        if self.superblock.peer_has_current {
            self.advance_generation();
            self.store(actions);
        }
        self.undurable = false;
        self.dirty = true;
        if let Some(recall) = &mut self.recall {
            recall.alone = true;
        }
        if !std::mem::replace(&mut self.alone, true) {
            self.log(Level::Warn, &format!("going on without {}", self.settings.peer), actions);
        }
        actions.push(Action::GoAlone);
    }

    pub(super) fn on_resync_done(&mut self, actions: &mut Vec<Action>) {
        if !self.in_session() || self.connection != Connection::SyncSource {
            return;
        }
        self.superblock.peer_has_current = true;
        self.store(actions);
        let arg = self.superblock.generations.current.0;
        actions.push(Action::SendPeer { code: code::RESYNC_FINISH, arg });
    }

    pub(super) fn on_peer_message(&mut self, now: Duration, code: u64, arg: u64, actions: &mut Vec<Action>) {
        if !self.in_session() {
            return;
        }
        match code {
            code::PROMOTE_REQUEST => self.on_promote_request(arg, actions),
            code::PROMOTE_GRANT => self.on_promote_grant(now, arg, actions),
            code::PROMOTE_DENY => self.on_promote_deny(now, arg, actions),
            code::DEMOTED => self.on_peer_demoted(actions),
            code::DEMOTED_NOTED => self.demotion_known(None, actions),
            code::RESYNC_FINISH => self.on_resync_finish(now, arg, actions),
            code::RESYNC_FINISHED => self.on_resync_finished(arg, actions),
            code::DISK_FAILED => self.on_peer_disk_failed(arg, actions),
            code::DISK_FAILED_NOTED => self.on_disk_failed_noted(actions),
            code::DIFFERENCES_NOTED => self.on_differences_noted(actions),
            code::DIFFERENCES_REPAIRED => self.on_differences_repaired(actions),
            // For `status` only: whoever carries out our actions has read it.
            code::RESYNC_PROGRESS | code::DISK_HANGS => {}
            _ => {
                self.log(
                    Level::Warn,
                    &format!("{} sent unknown message {code}", self.settings.peer),
                    actions,
                );
            }
        }
    }

    fn on_promote_request(&mut self, arg: u64, actions: &mut Vec<Action>) {
        let free = match self.role {
            Role::Standby => true,
            // Both ask: the smaller name wins.
            Role::Promoting => self.settings.peer < self.settings.node,
            Role::Primary | Role::Demoting => false,
        };
        let newer = self.is_next_epoch(arg);
        // Never in the middle of a copy: frames of the epoch before are on their way.
        let sound = self.connection == Connection::Connected;
        if !(free && newer && sound) || self.shutdown_deadline.is_some() {
            let arg = self.superblock.epoch.0;
            actions.push(Action::SendPeer { code: code::PROMOTE_DENY, arg });
            return;
        }
        let text = format!("{} is being promoted at this moment", self.settings.peer);
        self.end_promotion(&text, actions);
        self.resume_at = None;
        self.superblock.epoch = Epoch(arg);
        self.superblock.primary = false;
        self.superblock.clean = false;
        self.superblock.applying = true;
        self.store(actions);
        actions.push(Action::AdoptEpoch(Epoch(arg)));
        actions.push(Action::SendPeer { code: code::PROMOTE_GRANT, arg });
        self.set_peer_primary(true);
        self.log(Level::Info, &format!("{} becomes primary", self.settings.peer), actions);
    }

    fn on_promote_grant(&mut self, now: Duration, arg: u64, actions: &mut Vec<Action>) {
        // A node that stood still meanwhile: whoever asked has been told that it failed, or is gone.
        let late = self.promotion.as_ref().is_some_and(|promotion| now >= promotion.deadline);
        if late {
            self.end_promotion(&format!("{} consented too late; try again", self.settings.peer), actions);
        }
        let due = self.promotion.take_if(|promotion| promotion.epoch.0 == arg);
        let Some(promotion) = due else {
            // An answer that came too late: the peer expects us to serve, which we do not.
            self.raise_epoch(arg, actions);
            if self.role == Role::Standby && !self.superblock.applying {
                actions.push(Action::SendPeer { code: code::DEMOTED, arg: 0 });
            }
            return;
        };
        self.superblock.epoch = promotion.epoch;
        self.superblock.primary = true;
        self.superblock.clean = false;
        self.superblock.applying = false;
        self.store(actions);
        self.set_role(Role::Primary);
        self.set_peer_primary(false);
        self.resume_at = None;
        actions.push(Action::Serve { epoch: promotion.epoch });
        let text = format!("{} is primary", self.settings.node);
        match promotion.id {
            Some(id) => self.reply(id, Ok(text), actions),
            None => self.log(Level::Info, &format!("{text} again"), actions),
        }
    }

    fn on_promote_deny(&mut self, now: Duration, arg: u64, actions: &mut Vec<Action>) {
        self.raise_epoch(arg, actions);
        let text = format!("{} did not consent; try again, or demote it there first", self.settings.peer);
        self.end_promotion(&text, actions);
        self.resume_at = self.resume_at.map(|_| now + GRANT_TIMEOUT);
    }

    /// The promotion that was asked for, if any, does not come about.
    pub(super) fn end_promotion(&mut self, text: &str, actions: &mut Vec<Action>) {
        let Some(promotion) = self.promotion.take() else { return };
        self.set_role(Role::Standby);
        match promotion.id {
            Some(id) => self.reply(id, Err(text.to_owned()), actions),
            None => self.log(Level::Warn, &format!("not primary again yet: {text}"), actions),
        }
    }

    /// Asks for promotion, as the primary that this node was before it lost power, when it is time for that.
    pub(super) fn resume_if_due(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let peer_serves = self.peer.as_ref().is_some_and(|peer| peer.primary);
        let may = self.superblock.primary
            && self.role == Role::Standby
            && self.connection == Connection::Connected
            && self.in_session()
            && !peer_serves
            && self.shutdown_deadline.is_none();
        if self.resume_at.is_none_or(|at| now < at) || !may {
            return;
        }
        self.resume_at = Some(now + GRANT_TIMEOUT);
        self.ask_for_promotion(now, None, actions);
    }

    fn raise_epoch(&mut self, arg: u64, actions: &mut Vec<Action>) {
        // A serving primary's epoch is its own promotion's; no answer to an earlier question changes it.
        // A copy that this node sends goes on under the epoch it began with; the next handshake agrees on a newer one.
        let may = self.role != Role::Primary && self.connection != Connection::SyncSource;
        if may && self.is_next_epoch(arg) {
            self.superblock.epoch = Epoch(arg);
            self.store(actions);
            actions.push(Action::AdoptEpoch(Epoch(arg)));
        }
    }

    fn on_peer_demoted(&mut self, actions: &mut Vec<Action>) {
        self.set_peer_primary(false);
        if std::mem::take(&mut self.superblock.applying) {
            self.store(actions);
        }
        actions.push(Action::SendPeer { code: code::DEMOTED_NOTED, arg: 0 });
        self.log(Level::Info, &format!("{} is not primary any more", self.settings.peer), actions);
    }

    fn set_peer_primary(&mut self, primary: bool) {
        if let Some(peer) = &mut self.peer {
            peer.primary = primary;
        }
    }

    fn on_resync_finish(&mut self, now: Duration, arg: u64, actions: &mut Vec<Action>) {
        let Some(peer) = self.peer.as_ref().filter(|_| self.connection == Connection::SyncTarget && arg != 0)
        else {
            let text = format!("{} ended a resync that never began: closing the link", self.settings.peer);
            actions.push(Action::CloseLink);
            return self.log(Level::Error, &text, actions);
        };
        let history = peer.view.generations.history;
        self.superblock.generations =
            Generations { current: Generation(arg), base: Generation::ZERO, history };
        self.superblock.disk_state = DiskState::UpToDate;
        self.superblock.peer_has_current = true;
        self.superblock.copying = Generation::ZERO;
        // A primary to be: nothing is in flight until it serves, and a handshake before that lets it resume.
        self.superblock.clean |= self.superblock.primary;
        self.dirty = false;
        self.lost_power = false;
        self.store(actions);
        self.set_connection(Connection::Connected);
        actions.push(Action::SendPeer { code: code::RESYNC_FINISHED, arg });
        self.log(Level::Info, &format!("up to date with {}", self.settings.peer), actions);
        self.resume_at = self.superblock.primary.then_some(now);
        self.resume_if_due(now, actions);
    }

    fn on_resync_finished(&mut self, arg: u64, actions: &mut Vec<Action>) {
        let due = self.connection == Connection::SyncSource && self.superblock.peer_has_current;
        if !due || arg != self.superblock.generations.current.0 {
            let text = format!("{} finished a resync that never began: closing the link", self.settings.peer);
            actions.push(Action::CloseLink);
            return self.log(Level::Error, &text, actions);
        }
        self.superblock.generations.base = Generation::ZERO;
        self.undurable = false;
        self.dirty = false;
        self.store(actions);
        self.set_connection(Connection::Connected);
        if matches!(self.role, Role::Standby | Role::Promoting) {
            // A node that only copied was the session's source until now.
            actions.push(Action::StopServing);
        }
        self.log(Level::Info, &format!("{} is up to date", self.settings.peer), actions);
    }
}
