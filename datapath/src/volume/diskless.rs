//! A primary whose disk failed: it goes on over the peer's disk, and clients see only a pause.
//!
//! ```text
//! Sound ─disk fails, peer in sync─▶ Failing ─peer has it on record─▶ Agreed ─nothing uses the old memory─▶ Gone
//!                                      └──────────── peer lost, or too late: the volume fails as it would alone ◀─┘
//! ```
//! While failing, requests are held: nothing new is granted, nothing completes. What was posted is acknowledged by the
//! peer, whose record of this disk being behind comes after it. Then memory takes the disk's place in the mapping, at the
//! same addresses, so that front ends and links go on as ever: a write's payload passes through it to the peer, a
//! read's comes from there and passes through it to the client. It is no cache: a range's bytes count only while its
//! request is under way, and are given back in time.
//!
//! Invariants:
//! - Nothing completes between the failure and the record, and nothing of what is lost is ever sent: a change whose bytes
//!   are gone takes its place in the order as void, and its client gets the error.
//! - A read's range is pinned from the question to the last byte of the reply to the client, so no change comes in between.
//! - Memory is given back only where no change and no reply stands.
//!
//! Failures survived: a page, a range or all of the disk lost at any moment. Lost with it: writes whose bytes were on
//! such a page and nowhere else; a link that breaks and is back within the peer's timeout, once the peer has it on record. Not
//! survived: the loss of the peer as well, which ends the service.

use super::Volume;
use super::checkpoint::Quiesce;
use super::interface::{Event, Notice, Origin};
use super::request_table::Request;
use crate::access::Access;
use crate::disk::record::{Admit, Record, Touched};
use crate::error::Violation;
use crate::limits::{
    DETACH_S_MAX, DISKLESS_MEMORY_LEN, DISKLESS_RANGES_MAX, FETCHES_MAX, PAYLOAD_LEN_MAX, RESYNC_CHUNK_LEN,
};
use crate::mirror::pipeline::Event as PipelineEvent;
use crate::transport::Slot;
use crate::units::{ByteRange, Token};
use crate::wire::{Header, flags};
use costandby_ffi::mapping::{Mapping, Span};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum State {
    /// The disk works, or the volume has ended with it.
    #[default]
    Sound,
    /// Held until the peer has it on record.
    Failing,
    /// It has; held until nothing uses the disk's memory any more.
    Agreed,
    /// Without a disk.
    Gone,
}

/// A read under way at the peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fetch {
    pub(super) id: u64,
    pub(super) token: Token,
    pub(super) range: ByteRange,
    pub(super) got: u64,
    /// The question is on its way: no answer comes before.
    pub(super) asked: bool,
}

/// How a volume stands to its own disk.
#[derive(Debug, Default)]
pub(super) struct Diskless {
    state: State,
    /// Since when requests are held.
    since: Option<Instant>,
    /// What goes in place of bytes that are lost.
    zeroes: Option<Arc<Mapping>>,
    pub(super) fetches: VecDeque<Fetch>,
    fetches_begun: u64,
    /// Where requests have left memory behind, oldest first; ranges may overlap.
    used: VecDeque<ByteRange>,
    used_len: u64,
}

impl Diskless {
    /// From the disk's failure on, unless the volume ended with it.
    pub(super) fn is_active(&self) -> bool {
        self.state != State::Sound
    }

    pub(super) fn is_fetching(&self) -> bool {
        !self.fetches.is_empty()
    }

    /// Whether the peer owes as many answers as it may when it is asked the question `id`.
    pub(super) fn is_asked_enough(&self, id: u64) -> bool {
        self.fetches.front().is_some_and(|oldest| id.saturating_sub(oldest.id) >= FETCHES_MAX as u64)
    }

    /// The question `id` is on its way.
    pub(super) fn asked(&mut self, id: u64) {
        let oldest = self.fetches.front().map_or(0, |oldest| oldest.id);
        let at = id.checked_sub(oldest).and_then(|at| usize::try_from(at).ok());
        if let Some(fetch) = at.and_then(|at| self.fetches.get_mut(at)) {
            fetch.asked = true;
        }
    }

    /// Makes a frame whose payload is lost one that changes nothing. False when that cannot be, because its client was
    /// told that it is done, or for want of memory.
    pub(super) fn void(&mut self, span: &mut Span, header: &mut Header, request: &mut Request) -> bool {
        if request.completed {
            return false;
        }
        if self.zeroes.is_none() {
            self.zeroes = Mapping::anonymous(PAYLOAD_LEN_MAX as usize).ok();
        }
        let Some(zeroes) = &self.zeroes else { return false };
        *span = zeroes.span(0, span.len());
        header.flags |= flags::VOID;
        header.payload_crc = span.crc32c();
        request.lost = true;
        true
    }
}

impl Volume {
    /// Whether the volume can go on if its disk fails now, or does already.
    pub(super) fn may_outlive_disk(&self) -> bool {
        match self.diskless.state {
            State::Failing | State::Agreed => true,
            State::Gone => false,
            State::Sound => {
                let serves = self.serving && self.quiesce == Quiesce::No && !self.disk_failure_told;
                let in_sync =
                    self.session.is_source() && !self.background.is_copying() && self.pipeline.peer_in_sync();
                serves && in_sync && self.session.is_trusted() && self.disk.is_detachable()
            }
        }
    }

    /// Of a disk that failed: whether the volume goes on. The first time everything is held and control hears of it.
    pub(super) fn outlives_disk(&mut self, error: &str) -> bool {
        if !self.may_outlive_disk() {
            return false;
        }
        if self.diskless.state == State::Sound {
            self.diskless.state = State::Failing;
            self.end_verify("the local disk failed");
            self.requests.hold();
            self.pipeline_event(PipelineEvent::LocalFailing);
            tracing::warn!(volume = %self.name, error, "the disk failed; requests wait until the peer has recorded that");
            self.events.push(Event::DiskFailing { volume: self.index, error: error.to_owned() });
        }
        true
    }

    /// For front ends that met a failed disk: whether the volume goes on without it. Then what they were about is not to
    /// fail.
    pub fn outlives_failure(&mut self) -> bool {
        self.outlives_disk("a page could not be read or written")
    }

    /// For front ends whose read met a failed disk: whether it is answered later. A [`Notice::Granted`] follows then.
    pub fn read_lost(&mut self, token: Token) -> bool {
        let waits = self.outlives_failure();
        if waits {
            self.put_back(token);
        }
        waits
    }

    /// The peer has it on record that this disk is behind.
    pub fn detach(&mut self) {
        if self.diskless.state == State::Failing {
            self.diskless.state = State::Agreed;
        }
    }

    /// Puts memory in the disk's place as soon as nothing uses it.
    pub(super) fn pump_detach(&mut self, now: Instant) {
        if !matches!(self.diskless.state, State::Failing | State::Agreed) {
            return;
        }
        let since = *self.diskless.since.get_or_insert(now);
        if now.duration_since(since) > Duration::from_secs(DETACH_S_MAX) {
            return self.disk_lost("and the peer did not record it in time");
        }
        // Replies under way are made of the disk's memory: what is left of them is copied out.
        for token in self.requests.pinned() {
            self.notices.push(Notice::Unpin { token });
        }
        let in_use = self.workers.are_busy()
            || !self.pipeline.all_released()
            || self.session.has_posts()
            || self.requests.pinned().next().is_some();
        if self.diskless.state == State::Agreed && !in_use {
            self.replace_disk();
        }
    }

    /// The sole user of the mapping is this thread now: no worker has a job, no link a frame, no front end a reply.
    fn replace_disk(&mut self) {
        // Whoever is putting a payload in place puts all of it there again.
        if let Err(error) = self.disk.detach(&[]) {
            return self.disk_lost(&error.to_string());
        }
        let locked: Vec<_> = self.requests.locked().collect();
        for (range, _) in locked {
            self.left_behind(range);
        }
        let Some(unparked) = self.replace_record() else {
            return self.disk_lost("more changes are under way than a log has room for");
        };
        tracing::warn!(volume = %self.name, "going on without a disk: the peer's disk is used instead");
        self.diskless.state = State::Gone;
        self.diskless.zeroes = None;
        self.pipeline_event(PipelineEvent::LocalGone);
        for (token, touched) in unparked {
            self.unpark(token, touched);
        }
        self.requests.resume();
    }

    /// What was on record about the disk went with it: a record that is stored nowhere, and holds up nothing, takes its
    /// place. Returns the changes that waited for the old one, or `None` if they do not fit.
    fn replace_record(&mut self) -> Option<Vec<(Token, Touched)>> {
        let mut record = Record::in_memory(self.disk.size());
        record.session_began();
        let let_through: Vec<_> = self.requests.locked().collect();
        for (range, token) in let_through {
            if self.requests.get(token).touched.is_some() {
                let Admit::Go(touched) = record.touch(token, range) else { return None };
                self.requests.get_mut(token).touched = Some(touched);
            }
        }
        let mut unparked = Vec::new();
        for token in self.record.parked() {
            if let Admit::Go(touched) = record.touch(token, self.requests.get(token).range) {
                unparked.push((token, touched));
            }
        }
        self.record.fail_marked_all("the disk failed");
        self.record = record;
        Some(unparked)
    }

    /// The service ends, or the peer's disk is out of reach too: there is nothing to go on with.
    pub(super) fn end_diskless(&mut self) {
        if self.diskless.is_active() {
            self.disk.fail();
            self.diskless.state = State::Sound;
            self.requests.resume();
        }
    }

    /// Whether reads are the peer's to answer.
    pub(super) fn reads_from_peer(&self) -> bool {
        self.diskless.state == State::Gone
    }

    pub(super) fn fetches_are_full(&self) -> bool {
        self.diskless.fetches.len() >= FETCHES_MAX
    }

    /// Asks the peer for a read's bytes, whose range is pinned.
    pub(super) fn fetch(&mut self, token: Token) {
        let range = self.requests.get(token).range;
        self.diskless.fetches_begun += 1;
        let id = self.diskless.fetches_begun;
        self.diskless.fetches.push_back(Fetch { id, token, range, got: 0, asked: false });
        self.session.queue_read(id, range);
    }

    /// The session goes on over another link: the questions that were under way, from where their answers have come to.
    pub(super) fn ask_again(&mut self) {
        for fetch in &mut self.diskless.fetches {
            fetch.asked = false;
            let range = ByteRange::new(fetch.range.start + fetch.got, fetch.range.len - fetch.got);
            self.session.queue_read(fetch.id, range);
        }
    }

    pub(super) fn is_fetching(&self, token: Token) -> bool {
        self.diskless.fetches.iter().any(|fetch| fetch.token == token)
    }

    /// Gives up every read under way at the peer.
    pub(super) fn cancel_fetches(&mut self, cancelled: &mut Vec<Token>) {
        let fetches = std::mem::take(&mut self.diskless.fetches);
        for fetch in fetches {
            self.requests.unpin(fetch.token);
            cancelled.push(fetch.token);
        }
    }

    /// The peer's answer to the oldest question, or part of it.
    pub(super) fn reply_arrived(&mut self, slot: Slot) -> Result<(), Violation> {
        let Slot { header, ref payload, .. } = slot;
        if !self.session.is_source_of(&header) {
            return Err(Violation::Role { what: "an answer to a read", role: "standby" });
        }
        let out_of_turn = Violation::Reply { id: header.aux, range: header.range };
        let Some(fetch) = self.diskless.fetches.front_mut() else { return Err(out_of_turn) };
        let due = ByteRange::new(fetch.range.start + fetch.got, fetch.range.len - fetch.got);
        let in_turn = fetch.asked
            && fetch.id == header.aux
            && header.range.start == due.start
            && header.range.len <= due.len;
        if !in_turn {
            return Err(out_of_turn);
        }
        Access::check_payload(&header, payload.crc32c())?;
        payload.copy_to(&self.disk.span(header.range));
        fetch.got += header.range.len;
        let token = (fetch.got == fetch.range.len).then_some(fetch.token);
        if !self.pipeline.awaits_durability() {
            // Else answers to reads would hide a flush that hangs.
            self.session.answered();
        }
        self.session.release(slot);
        if let Some(token) = token {
            self.diskless.fetches.pop_front();
            self.counters.reads_fetched.fetch_add(1, Ordering::Relaxed);
            match self.requests.get(token).origin {
                Origin::Nobody => self.read_done(token),
                origin => self.notices.push(Notice::Granted { origin, token }),
            }
        }
        Ok(())
    }

    /// A request is done with its range: where there is no disk, the memory it left there is to be given back.
    pub(super) fn passed_through(&mut self, range: ByteRange) {
        if self.reads_from_peer() && range.len > 0 {
            self.left_behind(range);
        }
    }

    fn left_behind(&mut self, range: ByteRange) {
        let diskless = &mut self.diskless;
        diskless.used_len += range.len;
        match diskless.used.back_mut() {
            // A client that goes through the disk leaves a few long ranges.
            Some(last) if last.end() == range.start && last.len + range.len <= 4 * RESYNC_CHUNK_LEN => {
                last.len += range.len;
            }
            _ => diskless.used.push_back(range),
        }
        for _ in 0..diskless.used.len() {
            let too_much = self.diskless.used_len > DISKLESS_MEMORY_LEN;
            if !too_much && self.diskless.used.len() <= DISKLESS_RANGES_MAX {
                return;
            }
            let Some(oldest) = self.diskless.used.pop_front() else { return };
            let page = self.disk.mapping().page_len() as u64;
            let start = oldest.start / page * page;
            let pages = ByteRange::new(start, oldest.end().next_multiple_of(page) - start);
            if self.requests.is_in_use(pages) {
                self.diskless.used.push_back(oldest);
            } else {
                self.diskless.used_len -= oldest.len;
                self.disk.give_back(oldest);
            }
        }
    }
}
