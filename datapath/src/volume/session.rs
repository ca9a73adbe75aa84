//! Sessions of a volume: begin and end one, apply what the peer posts, post what the pipeline decides, keep-alives.

use super::diskless::{Diskless, post_reply};
use super::parting::{LinkEnd, Parting};
use super::resync::{Telling, Told};
use super::{ACCESS_CHANGE, ACCESS_FLUSH_BASE, Outgoing, Request, SETTLE_FLUSH_BASE, Volume};
use crate::access::Access;
use crate::disk::digest::Digest;
use crate::disk::image::DiskImage;
use crate::disk::worker::{Job, JobKind};
use crate::error::Violation;
use crate::limits::{PEER_ANSWER_S_MAX, RESYNC_READ_AHEAD_LEN, STALLED_PEER_TIMEOUTS, TURN_MS_MAX};
use crate::mirror::pipeline::{Change, Event as PipelineEvent};
use crate::mirror::resync::Resync;
use crate::reactor::command::{Before, Direction, Event};
use crate::transport::{DownReason, Link, LinkEvent, Slot};
use crate::units::{ByteRange, Epoch, Seq, Token};
use crate::wire::{Header, Kind, flags};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Longest zeroing the access side does in place; see the same bound on the front ends' side.
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
        assert!(self.link.is_none() && self.down_deferred.is_none(), "one session at a time");
        tracing::debug!(volume = %self.name, link = link.name(), ?direction, %epoch, ?before, "session begins");
        let holds = self.settle_parting(before, direction, epoch);
        self.link = Some(link);
        self.link_distrusted = false;
        self.session_void = false;
        self.link_moved = false;
        self.gone_on = matches!(before, Before::GoesOn { .. });
        self.heard_bytes = 0;
        self.last_heard = now;
        self.last_sent = now;
        self.last_answer = now;
        self.last_kept = now;
        match before {
            Before::GoesOn { applied, map_told } if holds => self.go_on(applied, map_told, direction),
            Before::GoesOn { .. } => {
                self.target_refused = matches!(direction, Direction::Target { .. });
                self.end_session("this node had given up the session that should continue");
            }
            Before::Unknown | Before::Kept { .. } => self.direct(direction, epoch),
        }
    }

    /// The roles over the live session are now these.
    pub fn direct(&mut self, direction: Direction, epoch: Epoch) {
        let same = match direction {
            Direction::Source { .. } => self.source,
            Direction::Target { .. } => self.access.is_some(),
            Direction::Idle => false,
        };
        if same && epoch == self.epoch {
            // Numbering goes on: the peer was told of no change.
            return;
        }
        self.end_parting(true);
        if self.access.is_some() && (self.access_job.is_some() || !self.arrived.is_empty()) {
            // They belong to the role that ends and must not reach the disk under the new one.
            self.arrived.clear();
            self.end_session("the roles changed while changes were still being applied");
            return;
        }
        if matches!(direction, Direction::Target { .. }) && self.receiving > 0 {
            // Worker threads still trim or zero what clients asked for, and it must not fall upon the peer's changes.
            self.target_refused = true;
            self.end_session("trims or zeroing of the former role are still running");
            return;
        }
        self.epoch = epoch;
        if self.access.take().is_some() {
            // What the peer asked of our disk, it asked as what it is no more.
            self.outbox.retain(|outgoing| matches!(outgoing, Outgoing::Control { .. }));
        }
        self.telling = None;
        if self.source {
            self.source = false;
            self.end_copy();
            self.end_verify("the roles changed");
            self.end_source_record();
            // They are about a session that cannot go on.
            self.record.forget_doubts();
            // Numbers of the session that ends; what must go again comes again under new ones.
            self.outbox.retain(|outgoing| matches!(outgoing, Outgoing::Control { .. }));
            self.pipeline_event(PipelineEvent::SessionDown);
        } else if !matches!(direction, Direction::Source { .. }) {
            // A record of the peer's absence is void once the peer may serve.
            self.pipeline_event(PipelineEvent::SessionDown);
        }
        if self.link.is_none() {
            return;
        }
        if self.disk.is_failed() {
            // Nothing of it may be sent, and nothing that arrives be acknowledged; its end was told once already.
            self.end_session("the local disk failed");
            return;
        }
        match direction {
            Direction::Source { resync } => {
                self.source = true;
                // In sync, the map is empty but for what a verification found. Nobody clears a bit at its word alone.
                if resync {
                    self.begin_copy(self.checksum_first);
                }
                self.record.session_began();
                self.pipeline_event(PipelineEvent::SessionUp { in_sync: !resync });
            }
            Direction::Target { resync } => {
                self.session_serial += 1;
                self.access = Some(Access::new(epoch, self.disk.size()));
                self.begin_target_record();
                self.telling = resync.then_some(Telling::From(0));
            }
            Direction::Idle => {}
        }
    }

    /// Whether a session is up.
    #[must_use]
    pub fn has_link(&self) -> bool {
        self.link.is_some()
    }

    /// Whether the link holds something to tell that the poller will not announce.
    #[must_use]
    pub fn has_backlog(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.has_backlog())
    }

    /// Ends the session; [`Event::LinkDown`] follows.
    pub fn close_link(&mut self, reason: DownReason) {
        if let Some(link) = &mut self.link {
            link.close(reason);
        }
    }

    /// Queues a message to the peer's control.
    pub fn send_peer(&mut self, code: u64, arg: u64) {
        if self.link.is_some() {
            self.outbox.push_back(Outgoing::Control { code, arg });
        }
    }

    /// Takes what the link has. Returns whether there was anything.
    pub fn poll(&mut self, now: Instant) -> bool {
        let Some(link) = &mut self.link else { return false };
        let mut events = std::mem::take(&mut self.link_events);
        link.poll(&mut events);
        let heard = link.received_bytes();
        let mut any = !events.is_empty();
        if heard != self.heard_bytes {
            self.heard_bytes = heard;
            self.last_heard = now;
            any = true;
        }
        for event in events.drain(..) {
            // After a violation nothing more is believed; what the same poll brought along is dropped with it.
            if !self.link_distrusted || matches!(event, LinkEvent::Down(_)) {
                self.link_event(event);
            }
        }
        self.link_events = events;
        any
    }

    /// Keep-alives out, silence in: to be called often against `timeout`. Returns when to call again at the latest.
    pub fn keep_alive(&mut self, now: Instant, timeout: Duration) -> Option<Instant> {
        let epoch = self.epoch;
        let interval = timeout / 4;
        if self.link.is_none() {
            return self.time_parting(now, timeout);
        }
        let link = self.link.as_mut()?;
        if link.arm().is_some_and(|(_, interest)| !interest.readable) {
            // It is we who do not listen: our ring is full.
            self.last_heard = now;
        }
        if now.duration_since(self.last_kept) > timeout / 2 {
            // It is we who were held up, and sent nothing that a live host could have answered.
            self.last_heard = now;
        }
        self.last_kept = now;
        let silent = now.duration_since(self.last_heard);
        let host_answers = || link.host_silence().is_some_and(|host| host < timeout);
        // A peer of which nothing came since the handshake has not shown that its program runs at all.
        let unheard = self.heard_bytes == 0;
        let patience = if unheard { timeout + timeout / 2 } else { timeout * STALLED_PEER_TIMEOUTS };
        if silent >= patience || (silent >= timeout && !host_answers()) {
            let silent_ms = u64::try_from(silent.as_millis()).unwrap_or(u64::MAX);
            link.close(DownReason::Silent { silent_ms });
            return Some(now);
        }
        let awaits_map = self.telling.is_some() || self.resync.as_ref().is_some_and(Resync::awaits_map);
        if !self.pipeline.awaits_peer() && !self.diskless.is_fetching() && !awaits_map {
            self.last_answer = now;
            self.stalled_since = None;
        } else if now.duration_since(self.last_answer) >= Duration::from_secs(PEER_ANSWER_S_MAX) {
            link.close(DownReason::Unanswering);
            return Some(now);
        }
        // A little early, so that a node's links come to send theirs together and wake it once.
        if now.duration_since(self.last_sent) >= interval - interval / 8 {
            // Without credit there is unread traffic of ours in front of the peer: sign of life enough.
            let _ = link.send(Header::new(Kind::KeepAlive, epoch));
            link.kick();
            self.last_sent = now;
        }
        let patience_ends = self.last_heard + timeout;
        Some((self.last_sent + interval).min(if patience_ends > now {
            patience_ends
        } else {
            now + interval
        }))
    }

    /// Gives a slot back to the link.
    pub(super) fn release(&mut self, slot: Slot) {
        if let Some(link) = &mut self.link {
            link.release(slot);
        }
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
            self.distrust_link(violation);
        }
    }

    /// The peer broke the protocol: its frames end here.
    pub(super) fn distrust_link(&mut self, violation: Violation) {
        self.link_distrusted = true;
        self.close_link(DownReason::Protocol(violation));
    }

    fn message(&mut self, header: &Header) -> Result<(), Violation> {
        match header.kind {
            Kind::Ack if self.source && header.epoch == self.epoch => {
                let event = PipelineEvent::Ack { applied: header.seq, durable: Seq(header.aux) };
                let (before, wants_durable) = (self.pipeline.peer_word(), self.pipeline.awaits_durability());
                let outcome = self.pipeline.handle(event, &mut self.actions);
                let after = self.pipeline.peer_word();
                self.link_moved |= after > before;
                if after.1 > before.1 || (after.0 > before.0 && !wants_durable) {
                    self.last_answer = self.last_heard;
                }
                self.perform();
                outcome
            }
            Kind::Differs if self.source && header.epoch == self.epoch => self.differs(header),
            // A late one of before the roles changed.
            Kind::Ack | Kind::Differs | Kind::KeepAlive => Ok(()),
            Kind::Flush => match &mut self.access {
                Some(access) => access.flush_asked(header),
                None => Err(Violation::Role { what: "a flush request", role: "primary" }),
            },
            Kind::Control => {
                let (volume, code, arg) = (self.index, header.aux, header.seq.0);
                self.events.push(Event::PeerMessage { volume, code, arg });
                Ok(())
            }
            Kind::Dirty | Kind::DirtyEnd | Kind::DirtyKept => self.map_message(header),
            Kind::Read => self.read_asked(header),
            Kind::ReadReply | Kind::Write | Kind::WriteZeroes | Kind::Trim | Kind::Verify => {
                panic!("changes arrive in slots")
            }
        }
    }

    fn arrived(&mut self, slot: Slot) -> Result<(), Violation> {
        if slot.header.kind == Kind::ReadReply {
            return self.reply_arrived(slot);
        }
        let Some(access) = &mut self.access else {
            return Err(Violation::Role { what: "a change", role: "primary" });
        };
        access.admit(&slot.header)?;
        self.arrived.push_back(slot);
        self.apply_arrived()
    }

    /// Applies what arrived, in order, until it is all applied or one change must wait for the disk.
    fn apply_arrived(&mut self) -> Result<(), Violation> {
        while self.access_job.is_none() && !self.access.as_ref().is_some_and(Access::is_held_up) {
            let Some(slot) = self.arrived.pop_front() else { break };
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
                        && let Some(access) = &mut self.access
                    {
                        access.differs(&header);
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
                    self.access_job = Some(slot);
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
        if let Some(access) = &mut self.access {
            access.applied(&slot.header);
            self.link_moved = true;
            if slot.header.kind != Kind::Verify {
                self.pipeline.applied_as_standby();
                self.counters.changes_applied.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.release(slot);
    }

    pub(super) fn access_job_done(&mut self, failed: bool) {
        let slot = self.access_job.take().expect("a job was under way");
        if self.link.is_none() {
            // A flush after a takeover covers what the disk holds, and a session that goes on what it had applied.
            self.pipeline.applied_as_standby();
            if let Some(access) = self.parted.as_mut().and_then(Parting::access_mut)
                && !failed
            {
                access.applied(&slot.header);
                access.part();
            }
            self.report_link_end();
            return;
        }
        if failed {
            return;
        }
        self.change_applied(slot);
        if let Err(violation) = self.apply_arrived() {
            self.distrust_link(violation);
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
        let undurable = self.source && (self.pipeline.peer_lags_durably() || self.resync.is_some());
        self.link = None;
        self.arrived.clear();
        self.outbox.clear();
        let parts = self.may_part(reason);
        let was_target = self.access.is_some() | std::mem::take(&mut self.target_refused);
        let undurable = undurable || (self.session_void && !was_target);
        let moved = self.link_moved;
        let end =
            LinkEnd { reason: reason.to_string(), undurable, was_target, moved, heard: self.heard_bytes > 0 };
        if !parts {
            self.end_verify("the session ended");
        }
        if parts {
            self.part();
            self.down_deferred = Some(end);
            if self.access_job.is_none() {
                self.report_link_end();
            }
            return;
        }
        self.access = None;
        self.end_copy();
        self.telling = None;
        if self.source {
            self.end_source_record();
        }
        self.down_deferred = Some(end);
        if self.access_job.is_none() {
            self.report_link_end();
        }
        if self.diskless.is_active() {
            self.disk_lost("and the link to the peer, whose disk could have been used instead, is gone");
        }
        // After the report: control takes a wish to go alone for a mistake while it believes in the session, and the
        // pipeline wishes once.
        if std::mem::take(&mut self.source) {
            self.pipeline_event(PipelineEvent::SessionDown);
        }
    }

    /// The session is over and nothing is being applied any more. A target's disk is then brought to stable storage, so
    /// that control may note down that it is a clean prefix even after a loss of power; nobody waits for that.
    fn report_link_end(&mut self) {
        let end = self.down_deferred.take().expect("a session ended");
        if end.was_target && !self.disk.is_failed() {
            self.settle_serial += 1;
            let token = Token(SETTLE_FLUSH_BASE + self.settle_serial);
            self.workers.submit(Job { kind: JobKind::Flush, token });
        }
        self.tell_link_end(end);
    }

    pub(super) fn settled(&mut self, settle_serial: u64) {
        if settle_serial == self.settle_serial && self.access.is_none() {
            if let Some(access) = self.parted.as_mut().and_then(Parting::access_mut) {
                access.settled();
            }
            self.events.push(Event::Settled { volume: self.index });
        }
    }

    /// Sends what waits for credit, the ack that is due, and rings the link's doorbell.
    pub(super) fn pump_link(&mut self, now: Instant) {
        let outlives = self.may_outlive_disk();
        if let Some(access) = &mut self.access
            && access.take_flush()
        {
            let token = Token(ACCESS_FLUSH_BASE + self.session_serial);
            self.workers.submit(Job { kind: JobKind::Flush, token });
        }
        let Some(link) = self.link.as_mut() else {
            self.outbox.clear();
            return;
        };
        let (mut sent, mut replies_until) = (false, None);
        while let Some(outgoing) = self.outbox.front_mut() {
            let posted = match outgoing {
                Outgoing::Post(seq, change) => {
                    let at = usize::try_from(change.token.0).expect("a token is an index");
                    let request = self.requests[at].as_mut().expect("what is posted is a request");
                    let diskless = outlives.then_some(&mut self.diskless);
                    let background = change.flags & flags::RESYNC != 0;
                    let began = background.then(Instant::now);
                    let posted =
                        post(link.as_mut(), &self.disk, self.epoch, *seq, *change, request, diskless);
                    self.stalled += began.map_or(Duration::ZERO, |began| began.elapsed());
                    if posted && change.kind == Kind::Write {
                        self.counters.posted(change.range.len, background);
                    }
                    posted
                }
                Outgoing::Flush(seq) => {
                    let mut header = Header::new(Kind::Flush, self.epoch);
                    header.seq = *seq;
                    link.send(header).is_ok()
                }
                Outgoing::MarksKept => link.send(Header::new(Kind::DirtyKept, self.epoch)).is_ok(),
                Outgoing::Control { code, arg } => {
                    let mut header = Header::new(Kind::Control, self.epoch);
                    header.aux = *code;
                    header.seq = Seq(*arg);
                    link.send(header).is_ok()
                }
                Outgoing::Read { id, range } => {
                    let mut header = Header::new(Kind::Read, self.epoch);
                    (header.aux, header.range) = (*id, *range);
                    let sent = !self.diskless.is_asked_enough(*id) && link.send(header).is_ok();
                    if sent {
                        self.diskless.asked(*id);
                    }
                    sent
                }
                Outgoing::Reply { id, range } => {
                    // Pages that are not in memory yet hold up every volume.
                    let until = *replies_until
                        .get_or_insert_with(|| Instant::now() + Duration::from_millis(TURN_MS_MAX));
                    post_reply(link.as_mut(), &self.disk, self.epoch, *id, range, until)
                }
            };
            if !posted {
                break;
            }
            sent = true;
            self.outbox.pop_front();
        }
        if replies_until.is_some_and(|until| Instant::now() >= until) {
            self.throttle_due = Some(now);
        }
        let was_held_up = self.access.as_ref().is_some_and(Access::is_held_up);
        while let Some(access) = &mut self.access
            && let Some((seq, range)) = access.difference()
        {
            let mut header = Header::new(Kind::Differs, self.epoch);
            (header.seq, header.range) = (seq, range);
            if link.send(header).is_err() {
                break;
            }
            access.difference_told();
            sent = true;
        }
        if let Some(access) = &mut self.access
            && let Some((applied, durable)) = access.take_ack()
        {
            let mut header = Header::new(Kind::Ack, self.epoch);
            header.seq = applied;
            header.aux = durable.0;
            if link.send(header).is_err() {
                access.untake_ack();
            }
            sent = true;
        }
        if let Some(telling) = &mut self.telling {
            // Behind the ack, so that a long map does not take its place in the queue.
            let told = telling.go_on(&self.record.dirty, link.as_mut(), self.epoch);
            if told != Told::Nothing {
                (sent, self.last_answer) = (true, now);
            }
            if told == Told::Part {
                self.throttle_due = Some(now);
            }
        }
        link.kick();
        if sent {
            self.last_sent = now;
        }
        if was_held_up && let Err(violation) = self.apply_arrived() {
            self.distrust_link(violation);
        }
    }

    /// The peer holds other bytes than we in what a step of ours has it compare.
    fn differs(&mut self, header: &Header) -> Result<(), Violation> {
        let (seq, range) = (header.seq, header.range);
        let token = self.pipeline.comparison(seq, range).ok_or(Violation::Differs { seq, range })?;
        self.request_mut(token).differs = true;
        Ok(())
    }
}

/// Posts a change if the peer's ring has room for it. Where the volume outlives its disk (`diskless`), one whose bytes
/// turn out to be lost goes as void; else the link ends.
fn post(
    link: &mut dyn Link,
    disk: &DiskImage,
    epoch: Epoch,
    seq: Seq,
    change: Change,
    request: &mut Request,
    diskless: Option<&mut Diskless>,
) -> bool {
    let mut header = Header::new(change.kind, epoch);
    header.seq = seq;
    header.range = change.range;
    header.flags = change.flags;
    let Some(permit) = link.claim(header.payload_len()) else { return false };
    let mut span = (change.kind == Kind::Write).then(|| disk.span(change.range));
    if let Some(span) = &span {
        header.payload_crc = span.crc32c();
    }
    if change.kind == Kind::Verify {
        let digest = Digest::of_disk(disk, change.range);
        (header.aux, header.payload_crc) = (digest.hash, digest.crc);
    }
    if disk.is_failed() {
        // The sum may be of zeroes that stand in for a lost page; they must not reach the good disk.
        let sendable = diskless.is_some_and(|diskless| match &mut span {
            Some(span) if span.is_lost() => diskless.void(span, &mut header, request),
            _ => true,
        });
        if !sendable {
            // The link takes the permit with it.
            link.close(DownReason::Medium);
            return false;
        }
    }
    link.post(permit, header, span, Token(seq.0));
    true
}
