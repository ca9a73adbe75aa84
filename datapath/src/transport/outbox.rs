//! The send queue of a link: frames posted and messages sent that are not wholly out yet, in one order.
//!
//! Posts are bounded by permits, messages by [`MESSAGES_QUEUED_MAX`], so a peer that does not read cannot grow it. Its
//! memory is allocated once, at the size it reaches in normal use, and kept.
//!
//! What is only worth its latest value coalesces while it waits at the tail: a newer ack replaces an ack or a sign of
//! life, and a sign of life adds nothing to anything that is going out anyway.

use super::{LinkEvent, NoCredit};
use crate::limits::{MESSAGES_QUEUED_MAX, WINDOW_LEN};
use crate::units::{Epoch, Token};
use crate::wire::{HEADER_LEN, Header, Kind};
use costandby_ffi::mapping::Span;
use std::collections::VecDeque;

/// One frame on its way out.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) header: Header,
    pub(crate) span: Option<Span>,
    /// `Some` for posts, `None` for messages.
    pub(crate) token: Option<Token>,
    /// The encoded header. Must not change once a byte of it is out.
    pub(crate) wire: [u8; HEADER_LEN],
}

/// See the file's head.
#[derive(Debug)]
pub(crate) struct Outbox {
    queue: VecDeque<Entry>,
    messages: usize,
    /// Bytes of the front frame that are out already.
    progress: usize,
    /// Newest epoch seen either way: what a sign of life of the transport's own carries.
    epoch: Epoch,
}

impl Outbox {
    pub(crate) fn new() -> Self {
        let queue = VecDeque::with_capacity(WINDOW_LEN + MESSAGES_QUEUED_MAX);
        Self { queue, messages: 0, progress: 0, epoch: Epoch::ZERO }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Queues a frame that has a permit.
    pub(crate) fn post(&mut self, header: Header, span: Option<Span>, token: Token) {
        self.saw(header.epoch);
        self.queue.push_back(Entry { header, span, token: Some(token), wire: [0; HEADER_LEN] });
    }

    /// Queues a message, or lets it coalesce.
    pub(crate) fn send(&mut self, header: Header) -> Result<(), NoCredit> {
        self.saw(header.epoch);
        let untouched = self.queue.len() > 1 || self.progress == 0;
        if let Some(tail) =
            self.queue.back_mut().filter(|tail| untouched && tail.header.epoch == header.epoch)
        {
            match (header.kind, tail.header.kind) {
                (Kind::KeepAlive, _) => return Ok(()),
                (Kind::Ack, Kind::Ack | Kind::KeepAlive) => {
                    tail.header = header;
                    return Ok(());
                }
                _ => {}
            }
        }
        if self.messages == MESSAGES_QUEUED_MAX {
            return Err(NoCredit);
        }
        self.messages += 1;
        self.queue.push_back(Entry { header, span: None, token: None, wire: [0; HEADER_LEN] });
        Ok(())
    }

    /// Queues the transport's own sign of life, which tells of released ring space.
    pub(crate) fn send_sign_of_life(&mut self) {
        // Refused only when messages are queued, and those carry the count just as well.
        let _ = self.send(self.sign_of_life());
    }

    /// The transport's own sign of life, for who sends it past the queue.
    pub(crate) fn sign_of_life(&self) -> Header {
        Header::new(Kind::KeepAlive, self.epoch)
    }

    /// Remembers an epoch the peer used.
    pub(crate) fn saw(&mut self, epoch: Epoch) {
        self.epoch = self.epoch.max(epoch);
    }

    /// Bytes of the front frame that are out already.
    pub(crate) fn progress(&self) -> usize {
        self.progress
    }

    /// What is left of the payload of a frame that has begun to go out in the middle of its payload.
    pub(crate) fn payload_rest(&self) -> Option<Span> {
        let done = self.progress.checked_sub(HEADER_LEN)?;
        let span = self.queue.front()?.span.as_ref()?;
        Some(span.sub(done.min(span.len()), span.len().saturating_sub(done)))
    }

    /// The frames in order, each with its header encoded to tell `ring_returned` as it is reached; one that has begun
    /// to go out keeps the header it has.
    pub(crate) fn encoded(&mut self, ring_returned: u64) -> impl Iterator<Item = &Entry> {
        let mut begun = self.progress > 0;
        self.queue.iter_mut().map(move |entry| {
            if !std::mem::take(&mut begun) {
                entry.header.ring_returned = ring_returned;
                entry.wire = entry.header.encode();
            }
            &*entry
        })
    }

    /// The front frame and how many bytes of it are out, for who sends one at a time; its header is encoded to tell
    /// these counts if none are.
    pub(crate) fn front(&mut self, ring_returned: u64, receives: u32) -> Option<(&Entry, usize)> {
        let entry = self.queue.front_mut()?;
        if self.progress == 0 {
            entry.header.ring_returned = ring_returned;
            entry.header.receives = receives;
            entry.wire = entry.header.encode();
        }
        Some((entry, self.progress))
    }

    /// Whether the frame at a place of the queue, from 0 on, is a post, if there is one.
    pub(crate) fn is_post(&self, place: usize) -> Option<bool> {
        self.queue.get(place).map(|entry| entry.token.is_some())
    }

    /// The disk a queued payload is read from, to be blamed when the system cannot read it.
    pub(crate) fn first_span(&self) -> Option<&Span> {
        self.queue.iter().find_map(|entry| entry.span.as_ref())
    }

    /// `bytes` more are out. Calls `done` for each frame that is now wholly out.
    pub(crate) fn advance(&mut self, bytes: usize, mut done: impl FnMut(&Entry)) {
        self.progress += bytes;
        while let Some(len) = self.queue.front().map(|entry| entry.header.frame_len()) {
            if self.progress < len {
                return;
            }
            self.progress -= len;
            if let Some(entry) = self.queue.pop_front() {
                self.messages -= usize::from(entry.token.is_none());
                done(&entry);
            }
        }
        assert!(self.progress == 0, "more bytes went out than were queued");
    }

    /// The link is going down: fails what never wholly left, in order, while `events` has room up to `limit`. Returns
    /// whether everything was told.
    pub(crate) fn fail(&mut self, events: &mut Vec<LinkEvent>, limit: usize) -> bool {
        while let Some(entry) = self.queue.front() {
            if let Some(token) = entry.token {
                if events.len() == limit {
                    return false;
                }
                events.push(LinkEvent::Failed(token));
            }
            self.queue.pop_front();
        }
        self.messages = 0;
        self.progress = 0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Seq;

    fn message(kind: Kind, seq: u64) -> Header {
        Header { seq: Seq(seq), ..Header::new(kind, Epoch(1)) }
    }

    fn queued(outbox: &Outbox) -> Vec<(Kind, u64)> {
        outbox.queue.iter().map(|entry| (entry.header.kind, entry.header.seq.0)).collect()
    }

    #[test]
    fn only_the_latest_ack_waits_and_nothing_is_overtaken() {
        let mut outbox = Outbox::new();
        for header in [
            message(Kind::KeepAlive, 0),
            message(Kind::Ack, 1),
            message(Kind::Ack, 2),
            message(Kind::KeepAlive, 0),
            message(Kind::Flush, 3),
            message(Kind::Ack, 4),
            message(Kind::Ack, 5),
        ] {
            outbox.send(header).unwrap();
        }
        assert_eq!(queued(&outbox), [(Kind::Ack, 2), (Kind::Flush, 3), (Kind::Ack, 5)]);
    }

    #[test]
    fn an_ack_that_began_to_go_out_is_left_alone() {
        let mut outbox = Outbox::new();
        outbox.send(message(Kind::Ack, 1)).unwrap();
        outbox.advance(1, |_| panic!("not out yet"));
        outbox.send(message(Kind::Ack, 2)).unwrap();
        assert_eq!(queued(&outbox), [(Kind::Ack, 1), (Kind::Ack, 2)]);
    }

    #[test]
    fn a_newer_epoch_is_not_folded_into_an_older_one() {
        let mut outbox = Outbox::new();
        outbox.send(message(Kind::Ack, 1)).unwrap();
        outbox.send(Header::new(Kind::KeepAlive, Epoch(2))).unwrap();
        assert_eq!(queued(&outbox).len(), 2);
    }

    #[test]
    fn a_header_that_began_to_go_out_keeps_its_bytes() {
        let mut outbox = Outbox::new();
        outbox.send(message(Kind::Flush, 1)).unwrap();
        outbox.send(message(Kind::Flush, 2)).unwrap();
        let first: Vec<_> = outbox.encoded(10).map(|entry| entry.wire).collect();
        outbox.advance(5, |_| ());
        let second: Vec<_> = outbox.encoded(20).map(|entry| entry.wire).collect();
        assert_eq!(first[0], second[0]);
        assert_ne!(first[1], second[1]);
    }

    #[test]
    fn messages_are_bounded() {
        let mut outbox = Outbox::new();
        let taken = (0..).take_while(|&seq| outbox.send(message(Kind::Flush, seq)).is_ok()).count();
        assert_eq!(taken, MESSAGES_QUEUED_MAX);
        outbox.advance(HEADER_LEN, |_| ());
        assert!(outbox.send(message(Kind::Flush, 0)).is_ok());
    }
}
