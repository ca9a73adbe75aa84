//! What goes out over a session's link: queued frames as far as the link has credit, the ack that is due, a target's marks.

use super::{Outgoing, Session};
use crate::access::Access;
use crate::disk::digest::Digest;
use crate::disk::dirty_bitmap::DirtyBitmap;
use crate::disk::image::DiskImage;
use crate::limits::{READ_REPLY_LEN_MAX, TURN_MS_MAX};
use crate::mirror::pipeline::Change;
use crate::transport::{DownReason, Link};
use crate::units::{ByteRange, Epoch, Seq, Token};
use crate::volume::background::Background;
use crate::volume::diskless::Diskless;
use crate::volume::interface::VolumeCounters;
use crate::volume::request_table::{Request, RequestTable};
use crate::volume::resync::Told;
use crate::wire::{Header, Kind, flags};
use std::time::{Duration, Instant};

/// What frames are made of.
pub(in crate::volume) struct Sources<'a> {
    /// Payloads.
    pub(in crate::volume) disk: &'a DiskImage,
    /// Whose they are.
    pub(in crate::volume) requests: &'a mut RequestTable,
    /// The volume's own disk, and its questions to the peer's.
    pub(in crate::volume) diskless: &'a mut Diskless,
    /// The volume can go on if its disk fails.
    pub(in crate::volume) outlives_disk: bool,
    /// Hears how long steps took.
    pub(in crate::volume) background: &'a mut Background,
    /// What a target tells.
    pub(in crate::volume) dirty: &'a DirtyBitmap,
    /// Payload counts.
    pub(in crate::volume) counters: &'a VolumeCounters,
}

impl Session {
    /// Queues a change to be posted.
    pub(in crate::volume) fn queue_post(&mut self, seq: Seq, change: Change) {
        self.outbox.push_back(Outgoing::Post(seq, change));
    }

    /// Queues the question to make everything up to `seq` durable.
    pub(in crate::volume) fn queue_flush(&mut self, seq: Seq) {
        self.outbox.push_back(Outgoing::Flush(seq));
    }

    /// Queues a message to the peer's control.
    pub(in crate::volume) fn queue_control(&mut self, code: u64, arg: u64) {
        if self.link.is_some() {
            self.outbox.push_back(Outgoing::Control { code, arg });
        }
    }

    /// Queues a question to the peer's disk.
    pub(in crate::volume) fn queue_read(&mut self, id: u64, range: ByteRange) {
        self.outbox.push_back(Outgoing::Read { id, range });
    }

    /// Queues the word that the target's marks are on our record.
    pub(in crate::volume) fn queue_marks_kept(&mut self) {
        self.outbox.push_back(Outgoing::MarksKept);
    }

    /// Drops what is queued but for messages between the controls.
    pub(in crate::volume) fn keep_control_only(&mut self) {
        self.outbox.retain(|outgoing| matches!(outgoing, Outgoing::Control { .. }));
    }

    /// Whether a change waits to be posted.
    pub(in crate::volume) fn has_posts(&self) -> bool {
        self.outbox.iter().any(|outgoing| matches!(outgoing, Outgoing::Post(..)))
    }

    /// Sends what waits for credit, the ack that is due, and rings the link's doorbell. Returns whether changes that arrived were held
    /// up by differences that were not told.
    pub(in crate::volume) fn send(&mut self, now: Instant, mut sources: Sources<'_>) -> bool {
        if self.link.is_none() {
            self.outbox.clear();
            return false;
        }
        let mut sent = self.send_queued(now, &mut sources);
        let was_held_up = self.standby.as_ref().is_some_and(Access::is_held_up);
        let Some(link) = self.link.as_mut() else { return false };
        if let Some(access) = &mut self.standby {
            sent |= send_answers(access, link.as_mut(), self.epoch);
        }
        if let Some(telling) = &mut self.telling {
            // Behind the ack, so that a long map does not take its place in the queue.
            let told = telling.go_on(sources.dirty, link.as_mut(), self.epoch);
            if told != Told::Nothing {
                (sent, self.last_answer) = (true, now);
            }
            if told == Told::Part {
                sources.background.is_due(now);
            }
        }
        link.kick();
        if sent {
            self.last_sent = now;
        }
        was_held_up
    }

    fn send_queued(&mut self, now: Instant, sources: &mut Sources<'_>) -> bool {
        let Some(link) = self.link.as_mut() else { return false };
        let (mut sent, mut replies_until) = (false, None);
        while let Some(outgoing) = self.outbox.front_mut() {
            let posted = match outgoing {
                Outgoing::Post(seq, change) => post_change(link.as_mut(), sources, self.epoch, *seq, *change),
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
                    let sent = !sources.diskless.is_asked_enough(*id) && link.send(header).is_ok();
                    if sent {
                        sources.diskless.asked(*id);
                    }
                    sent
                }
                Outgoing::Reply { id, range } => {
                    // Pages that are not in memory yet hold up every volume.
                    let until = *replies_until
                        .get_or_insert_with(|| Instant::now() + Duration::from_millis(TURN_MS_MAX));
                    post_reply(link.as_mut(), sources.disk, self.epoch, *id, range, until)
                }
            };
            if !posted {
                break;
            }
            sent = true;
            self.outbox.pop_front();
        }
        if replies_until.is_some_and(|until| Instant::now() >= until) {
            sources.background.is_due(now);
        }
        sent
    }
}

/// Sends the differences that were found, and the ack behind them. Returns whether anything was sent.
fn send_answers(access: &mut Access, link: &mut dyn Link, epoch: Epoch) -> bool {
    let mut sent = false;
    while let Some((seq, range)) = access.difference() {
        let mut header = Header::new(Kind::Differs, epoch);
        (header.seq, header.range) = (seq, range);
        if link.send(header).is_err() {
            break;
        }
        access.difference_told();
        sent = true;
    }
    if let Some((applied, durable)) = access.take_ack() {
        let mut header = Header::new(Kind::Ack, epoch);
        header.seq = applied;
        header.aux = durable.0;
        if link.send(header).is_err() {
            access.untake_ack();
        }
        sent = true;
    }
    sent
}

fn post_change(
    link: &mut dyn Link,
    sources: &mut Sources<'_>,
    epoch: Epoch,
    seq: Seq,
    change: Change,
) -> bool {
    let request = sources.requests.get_mut(change.token);
    let diskless = sources.outlives_disk.then_some(&mut *sources.diskless);
    let background = change.flags & flags::RESYNC != 0;
    let began = background.then(Instant::now);
    let posted = post(link, sources.disk, epoch, seq, change, request, diskless);
    if let Some(began) = began {
        sources.background.stalled(began.elapsed());
    }
    if posted && change.kind == Kind::Write {
        sources.counters.posted(change.range.len, background);
    }
    posted
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

/// Posts an answer as far as the peer's ring has room for it and `until` has not come, and takes that off `left`. Returns
/// whether all of it is out.
fn post_reply(
    link: &mut dyn Link,
    disk: &DiskImage,
    epoch: Epoch,
    id: u64,
    left: &mut ByteRange,
    until: Instant,
) -> bool {
    while left.len > 0 {
        if Instant::now() >= until {
            return false;
        }
        // Nothing is registered for it: a disk that is read from elsewhere is not read there twice.
        let mut header = Header { flags: flags::RESYNC, ..Header::new(Kind::ReadReply, epoch) };
        header.range = ByteRange::new(left.start, left.len.min(READ_REPLY_LEN_MAX));
        header.aux = id;
        let Some(permit) = link.claim(header.payload_len()) else { return false };
        let span = disk.span(header.range);
        header.payload_crc = span.crc32c();
        if disk.is_failed() {
            link.close(DownReason::Medium);
            return false;
        }
        link.post(permit, header, Some(span), Token(u64::MAX));
        *left = ByteRange::new(header.range.end(), left.len - header.range.len);
    }
    true
}
