//! What the link brings to a volume, and what its end means: sessions begin, frames go to the part that they are for, changes of the peer
//! are applied.
//!
//! [`Session`](super::session::Session) holds the link and all that is known of the session; here what it says meets the disk, the pipeline,
//! the record and control.

use super::interface::{Before, Direction, Event};
use super::session::{LinkEnd, Sources};
use super::{ACCESS_CHANGE, Volume};
use crate::access::Access;
use crate::disk::digest::Digest;
use crate::disk::worker::{Job, JobKind};
use crate::error::Violation;
use crate::limits::RESYNC_READ_AHEAD_LEN;
use crate::mirror::pipeline::Event as PipelineEvent;
use crate::transport::{DownReason, Link, LinkEvent, Slot};
use crate::units::{ByteRange, Epoch, Seq, Token};
use crate::wire::{Header, Kind, flags};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Longest zeroing the standby side does in place; see the same bound on the front ends' side.
const ZERO_IN_PLACE_LEN_MAX: u64 = 64 << 10;

impl Volume {
    /// A session begins over `link`, of whose peer nothing is known.
    ///
    /// # Panics
    /// When the last one has not ended: control hands over one at a time.
    pub fn attach(&mut self, link: Box<dyn Link>, direction: Direction, epoch: Epoch, now: Instant) {
        self.attach_after(Before::Unknown, link, direction, epoch, now);
    }

    /// A session begins over `link`, or goes on: `before` says what both nodes still know of the one before.
    ///
    /// # Panics
    /// When the last one has not ended: control hands over one at a time.
    pub fn attach_after(
        &mut self,
        before: Before,
        link: Box<dyn Link>,
        direction: Direction,
        epoch: Epoch,
        now: Instant,
    ) {
        self.session.assert_over();
        tracing::debug!(volume = %self.name, link = link.name(), ?direction, %epoch, ?before, "session begins");
        let holds = self.settle_parting(before, direction, epoch);
        self.session.attach(link, matches!(before, Before::GoesOn { .. }), now);
        match before {
            Before::GoesOn { applied, map_told } if holds => self.go_on(applied, map_told, direction),
            Before::GoesOn { .. } => {
                if matches!(direction, Direction::Target { .. }) {
                    self.session.refuse_target();
                }
                self.session.end("this node had given up the session that should continue");
            }
            Before::Unknown | Before::Kept { .. } => self.direct(direction, epoch),
        }
    }

    /// The roles over the live session are now these.
    pub fn direct(&mut self, direction: Direction, epoch: Epoch) {
        if self.session.has_roles(direction, epoch) {
            // Numbering goes on: the peer was told of no change.
            return;
        }
        self.end_parting(true);
        if self.session.drop_arrived() {
            // They belong to the role that ends and must not reach the disk under the new one.
            self.session.end("the roles changed while changes were still being applied");
            return;
        }
        if matches!(direction, Direction::Target { .. }) && self.requests.is_making() {
            // Worker threads still trim or zero what clients asked for, and it must not fall upon the peer's changes.
            self.session.refuse_target();
            self.session.end("changes of the former role are still in progress");
            return;
        }
        if self.session.end_roles(epoch) {
            self.background.end_copy();
            self.end_verify("the roles changed");
            self.end_source_record();
            // They are about a session that cannot go on.
            self.record.forget_doubts();
            self.pipeline_event(PipelineEvent::SessionDown);
        } else if !matches!(direction, Direction::Source { .. }) {
            // A record of the peer's absence is void once the peer may serve.
            self.pipeline_event(PipelineEvent::SessionDown);
        }
        if !self.session.has_link() {
            return;
        }
        if self.disk.is_failed() {
            // Nothing of it may be sent, and nothing that arrives be acknowledged; its end was told once already.
            self.session.end("the local disk failed");
            return;
        }
        match direction {
            Direction::Source { resync } => {
                self.session.be_source();
                // In sync, the map is empty but for what a verification found. Nobody clears a bit at its word alone.
                if resync {
                    self.background.begin_copy(self.record.dirty());
                }
                self.record.session_began();
                self.pipeline_event(PipelineEvent::SessionUp { in_sync: !resync });
            }
            Direction::Target { resync } => {
                self.session.be_target(self.disk.size(), resync);
                self.begin_target_record();
            }
            Direction::Idle => {}
        }
    }

    /// Whether a session is up.
    #[must_use]
    pub fn has_link(&self) -> bool {
        self.session.has_link()
    }

    /// Whether the link holds something to tell that the poller will not announce.
    #[must_use]
    pub fn has_backlog(&self) -> bool {
        self.session.has_backlog()
    }

    /// Whether anything is under way that the link will answer soon: worth spinning for.
    #[must_use]
    pub fn expects_link(&self) -> bool {
        self.session.has_link()
            && (self.session.is_target() || self.pipeline.in_flight() > 0 || self.diskless.is_fetching())
    }

    /// Whether the link is to be looked at each turn, as that costs nothing.
    #[must_use]
    pub fn link_polls_for_free(&self) -> bool {
        self.session.polls_for_free()
    }

    /// Before the reactor sleeps on the link's descriptor. False when the link has something to tell already.
    pub fn prepare_sleep(&mut self) -> bool {
        self.session.prepare_sleep()
    }

    /// Ends the session; [`Event::LinkDown`] follows.
    pub fn close_link(&mut self, reason: DownReason) {
        self.session.close(reason);
    }

    /// Queues a message to the peer's control.
    pub fn send_peer(&mut self, code: u64, arg: u64) {
        self.session.queue_control(code, arg);
    }

    /// Takes what the link has. Returns whether there was anything.
    pub fn poll(&mut self, now: Instant) -> bool {
        let Some((mut events, any)) = self.session.poll(now) else { return false };
        for event in events.drain(..) {
            if self.session.believes(&event) {
                self.link_event(event);
            }
        }
        self.session.polled(events);
        any
    }

    /// Keep-alives out, silence in: to be called often against `timeout`. Returns when to call again at the latest.
    pub fn keep_alive(&mut self, now: Instant, timeout: Duration) -> Option<Instant> {
        if !self.session.has_link() {
            return self.time_parting(now, timeout);
        }
        let awaited =
            self.pipeline.awaits_peer() || self.diskless.is_fetching() || self.background.awaits_map();
        self.session.keep_alive(now, timeout, awaited)
    }

    fn link_event(&mut self, event: LinkEvent) {
        let outcome = match event {
            // Ranges unlock by the peer's word alone.
            LinkEvent::Sent(_) | LinkEvent::Failed(_) => Ok(()),
            LinkEvent::Arrived(slot) => self.arrived(slot),
            LinkEvent::Message(header) => self.message(&header),
            LinkEvent::Down(reason) => {
                self.link_down(&reason);
                Ok(())
            }
        };
        if let Err(violation) = outcome {
            self.session.distrust(violation);
        }
    }

    fn message(&mut self, header: &Header) -> Result<(), Violation> {
        match header.kind {
            Kind::Ack if self.session.is_source_of(header) => {
                let event = PipelineEvent::Ack { applied: header.seq, durable: Seq(header.aux) };
                let (before, wants_durable) = (self.pipeline.peer_word(), self.pipeline.awaits_durability());
                let outcome = self.pipeline.handle(event, &mut self.actions);
                self.session.acknowledged(before, self.pipeline.peer_word(), wants_durable);
                self.perform();
                outcome
            }
            Kind::Differs if self.session.is_source_of(header) => self.differs(header),
            // A late one of before the roles changed.
            Kind::Ack | Kind::Differs | Kind::KeepAlive => Ok(()),
            Kind::Flush => self.session.flush_asked(header),
            Kind::Control => {
                let (volume, code, arg) = (self.index, header.aux, header.seq.0);
                self.events.push(Event::PeerMessage { volume, code, arg });
                Ok(())
            }
            Kind::Dirty | Kind::DirtyEnd | Kind::DirtyKept => self.map_message(header),
            Kind::Read => {
                self.session.read_asked(header)?;
                self.disk.read_ahead(header.range);
                Ok(())
            }
            Kind::ReadReply | Kind::Write | Kind::WriteZeroes | Kind::Trim | Kind::Verify => {
                panic!("changes arrive in slots")
            }
        }
    }

    /// The peer holds other bytes than we in what a step of ours has it compare.
    fn differs(&mut self, header: &Header) -> Result<(), Violation> {
        let (seq, range) = (header.seq, header.range);
        let token = self.pipeline.comparison(seq, range).ok_or(Violation::Differs { seq, range })?;
        self.requests.get_mut(token).differs = true;
        Ok(())
    }

    fn arrived(&mut self, slot: Slot) -> Result<(), Violation> {
        if slot.header.kind == Kind::ReadReply {
            return self.reply_arrived(slot);
        }
        self.session.admit(slot)?;
        self.apply_arrived()
    }

    /// Applies what arrived, in order, until it is all applied or one change must wait for the disk.
    fn apply_arrived(&mut self) -> Result<(), Violation> {
        while let Some(slot) = self.session.next_to_apply() {
            let header = slot.header;
            match header.kind {
                _ if header.flags & flags::VOID != 0 => self.change_applied(slot),
                Kind::Write => {
                    Access::check_payload(&header, slot.payload.crc32c())?;
                    slot.payload.copy_to(&self.disk.span(header.range));
                    self.change_applied(slot);
                }
                Kind::WriteZeroes if header.range.len <= ZERO_IN_PLACE_LEN_MAX => {
                    self.disk.span(header.range).fill_zero();
                    self.change_applied(slot);
                }
                Kind::Verify => {
                    let ahead = ByteRange::new(header.range.end() + RESYNC_READ_AHEAD_LEN, header.range.len);
                    self.disk.read_ahead(ahead);
                    let announced = Digest { hash: header.aux, crc: header.payload_crc };
                    if Digest::of_disk(&self.disk, header.range) != announced
                        && self.session.found_different(&header)
                    {
                        self.events.push(Event::FoundDifferent { volume: self.index });
                    }
                    self.change_applied(slot);
                }
                _ => {
                    let kind = if header.kind == Kind::Trim {
                        JobKind::Punch(header.range)
                    } else {
                        JobKind::Zero(header.range)
                    };
                    self.workers.submit(Job { kind, token: ACCESS_CHANGE });
                    self.session.applies(slot);
                }
            }
        }
        Ok(())
    }

    fn change_applied(&mut self, slot: Slot) {
        if self.disk.is_failed() {
            // Never acknowledged; the volume notices the failure in this same turn and ends the session.
            return;
        }
        if self.session.applied(&slot.header) && slot.header.kind != Kind::Verify {
            self.pipeline.applied_as_standby();
            self.counters.changes_applied.fetch_add(1, Ordering::Relaxed);
        }
        self.session.release(slot);
    }

    pub(super) fn access_job_done(&mut self, failed: bool) {
        let slot = self.session.take_applying();
        if !self.session.has_link() {
            // A flush after a takeover covers what the disk holds, and a session that goes on what it had applied.
            self.pipeline.applied_as_standby();
            if !failed {
                self.session.applied_without_link(&slot.header);
            }
            self.report_link_end();
            return;
        }
        if failed {
            return;
        }
        self.change_applied(slot);
        if let Err(violation) = self.apply_arrived() {
            self.session.distrust(violation);
        }
    }

    fn link_down(&mut self, reason: &DownReason) {
        if matches!(reason, DownReason::Protocol(_) | DownReason::Frame(_)) {
            self.counters.violations.fetch_add(1, Ordering::Relaxed);
        }
        if matches!(reason, DownReason::Medium) {
            self.disk.fail();
        }
        // A copy that was not finished leaves the peer behind, whatever was durable.
        let behind = self.pipeline.peer_lags_durably() || self.background.is_copying();
        let parts = self.may_part(reason);
        self.session.link_gone(reason, self.session.is_source() && behind);
        if parts {
            self.part();
            self.report_link_end();
            return;
        }
        self.end_verify("the session ended");
        self.session.end_target();
        self.background.end_copy();
        if self.session.is_source() {
            self.end_source_record();
        }
        self.report_link_end();
        if self.diskless.is_active() {
            self.disk_lost("and the link to the peer, whose disk could have been used instead, is gone");
        }
        // After the report: control takes a wish to go alone for a mistake while it believes in the session, and the
        // pipeline wishes once.
        if self.session.end_source() {
            self.pipeline_event(PipelineEvent::SessionDown);
        }
    }

    /// Tells control of the end of a link, once nothing is being applied any more. A target's disk is then brought to stable
    /// storage, so that control may note down that it is a clean prefix even after a loss of power; nobody waits for that.
    fn report_link_end(&mut self) {
        let Some(end) = self.session.take_end() else { return };
        if end.was_target && !self.disk.is_failed() {
            let token = self.session.begin_settling();
            self.workers.submit(Job { kind: JobKind::Flush, token });
        }
        self.tell_link_end(end);
    }

    fn tell_link_end(&mut self, end: LinkEnd) {
        let parted = self.told_of_parting();
        self.events.push(Event::LinkDown {
            volume: self.index,
            reason: end.reason,
            undurable: end.undurable,
            dirty: self.record.is_dirty(),
            moved: end.moved,
            heard: end.heard,
            parted,
        });
    }

    /// The flush after a target's session has ended well.
    pub(super) fn settled(&mut self, token: Token) {
        if self.session.settled(token) {
            self.events.push(Event::Settled { volume: self.index });
        }
    }

    /// Sends what waits for credit, the ack that is due, and rings the link's doorbell.
    pub(super) fn pump_link(&mut self, now: Instant) {
        if let Some(token) = self.session.take_flush() {
            self.workers.submit(Job { kind: JobKind::Flush, token });
        }
        let outlives_disk = self.may_outlive_disk();
        let sources = Sources {
            disk: &self.disk,
            requests: &mut self.requests,
            diskless: &mut self.diskless,
            outlives_disk,
            background: &mut self.background,
            dirty: self.record.dirty(),
            counters: &self.counters,
        };
        let was_held_up = self.session.send(now, sources);
        if was_held_up && let Err(violation) = self.apply_arrived() {
            self.session.distrust(violation);
        }
    }
}
