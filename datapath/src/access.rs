//! The standby side: decisions about frames that the peer posts, on a standby or the target of a resync. Sans-IO.
//! Called by `volume`.
//!
//! A frame is checked twice: [`Access::admit`] checks its header before a byte is touched,
//! [`Access::check_payload`] its checksum; only then are its bytes applied to the disk, whole, in seq order. So at
//! any instant the disk holds a prefix of the primary's write order. A change that blocks (trim) delays the changes
//! behind it.
//!
//! Acks are cumulative: the reactor sends at most one a turn. If the peer asked for a comparison and the bytes
//! differ, the difference is reported before the ack that covers it. So an ack without a report says that the bytes
//! are equal.

use crate::error::Violation;
use crate::limits::DIFFERS_QUEUED_MAX;
use crate::units::{ByteRange, Epoch, Seq};
use crate::wire::{Header, flags};
use std::collections::VecDeque;

/// The access side of one volume, within one session.
#[derive(Debug)]
pub struct Access {
    epoch: Epoch,
    size: u64,
    admitted: Seq,
    applied: Seq,
    durable: Seq,
    /// Start a flush as soon as this much is applied; what was asked for later waits in `flush_wanted`, so that a peer
    /// that keeps asking does not put off its first question.
    flush_due: Seq,
    flush_wanted: Seq,
    flush_running: Option<Seq>,
    acked: (Seq, Seq),
    /// Comparisons that found a difference, not told yet.
    differing: VecDeque<(Seq, ByteRange)>,
}

impl Access {
    /// For a session of `epoch` on a volume of `size` bytes.
    #[must_use]
    pub fn new(epoch: Epoch, size: u64) -> Self {
        Self {
            epoch,
            size,
            admitted: Seq::ZERO,
            applied: Seq::ZERO,
            durable: Seq::ZERO,
            flush_due: Seq::ZERO,
            flush_wanted: Seq::ZERO,
            flush_running: None,
            acked: (Seq::ZERO, Seq::ZERO),
            differing: VecDeque::new(),
        }
    }

    /// Checks the header of an arrived change. The caller applies changes in the order they are admitted.
    ///
    /// # Errors
    /// The peer is fenced, out of order or out of range: close the link; nothing was applied.
    pub fn admit(&mut self, header: &Header) -> Result<(), Violation> {
        self.check_epoch(header)?;
        let expected = self.admitted.next();
        if header.seq != expected {
            return Err(Violation::SeqOrder { found: header.seq, expected });
        }
        if !header.range.fits(self.size) {
            return Err(Violation::OutOfVolume { range: header.range, size: self.size });
        }
        self.admitted = expected;
        Ok(())
    }

    /// The link broke: what was admitted and not applied comes again if the session goes on. A flush under way ends as
    /// ever.
    pub fn part(&mut self) {
        self.admitted = self.applied;
        self.flush_due = self.durable;
        self.flush_wanted = self.durable;
        // The peer may have heard none of them, and takes the outcome of what it asked for as not told.
        self.acked = (Seq::ZERO, Seq::ZERO);
        self.differing.clear();
    }

    /// Of a session that is parted: a flush that began after the last change was applied has ended.
    pub fn settled(&mut self) {
        self.durable = self.applied;
    }

    /// The last change that is applied; all before it are as well.
    #[must_use]
    pub fn applied_upto(&self) -> Seq {
        self.applied
    }

    /// Compares the payload's checksum, computed over the bytes in our ring, with the announced one.
    ///
    /// # Errors
    /// [`Violation::PayloadChecksum`]: close the link; nothing was applied.
    pub fn check_payload(header: &Header, computed: u32) -> Result<(), Violation> {
        if header.payload_crc == computed {
            return Ok(());
        }
        Err(Violation::PayloadChecksum { seq: header.seq, announced: header.payload_crc, computed })
    }

    /// The change stands in our disk.
    ///
    /// # Panics
    /// When changes are applied out of order.
    pub fn applied(&mut self, header: &Header) {
        assert_eq!(header.seq, self.applied.next(), "changes are applied in order");
        self.applied = header.seq;
        if header.flags & flags::FUA != 0 {
            self.want_flush(header.seq);
        }
    }

    /// The comparison that is to be applied next found other bytes here.
    pub fn differs(&mut self, header: &Header) {
        self.differing.push_back((header.seq, header.range));
    }

    /// The difference to tell next.
    #[must_use]
    pub fn difference(&self) -> Option<(Seq, ByteRange)> {
        self.differing.front().copied()
    }

    /// It is told.
    pub fn difference_told(&mut self) {
        self.differing.pop_front();
    }

    /// Whether nothing more may be applied before some differences are told: a peer that asks and does not listen.
    #[must_use]
    pub fn is_held_up(&self) -> bool {
        self.differing.len() >= DIFFERS_QUEUED_MAX
    }

    /// The peer asks for everything up to `header.seq` on stable storage.
    ///
    /// # Errors
    /// A fenced peer, or one that asks for changes it has not sent.
    pub fn flush_asked(&mut self, header: &Header) -> Result<(), Violation> {
        self.check_epoch(header)?;
        if header.seq > self.admitted {
            return Err(Violation::SeqOrder { found: header.seq, expected: self.admitted });
        }
        self.want_flush(header.seq);
        Ok(())
    }

    /// The peer asks for bytes of our disk.
    ///
    /// # Errors
    /// A fenced peer, or a range outside of the volume.
    pub fn read_asked(&self, header: &Header) -> Result<(), Violation> {
        self.check_epoch(header)?;
        if header.range.fits(self.size) {
            return Ok(());
        }
        Err(Violation::OutOfVolume { range: header.range, size: self.size })
    }

    fn want_flush(&mut self, upto: Seq) {
        self.flush_wanted = self.flush_wanted.max(upto);
        if self.flush_due <= self.durable {
            self.flush_due = self.flush_wanted;
        }
    }

    /// Whether to start a flush of the disk now: one is wanted, none is under way, and what it must cover is applied.
    pub fn take_flush(&mut self) -> bool {
        let due =
            self.flush_running.is_none() && self.flush_due > self.durable && self.applied >= self.flush_due;
        if due {
            self.flush_running = Some(self.applied);
        }
        due
    }

    /// The flush succeeded.
    ///
    /// # Panics
    /// When none was under way.
    pub fn flushed(&mut self) {
        let covered = self.flush_running.take().expect("a flush was under way");
        self.durable = self.durable.max(covered);
        self.flush_due = self.flush_wanted;
    }

    /// The ack to send, if there is news: applied and durable, both cumulative.
    pub fn take_ack(&mut self) -> Option<(Seq, Seq)> {
        let now = (self.applied, self.durable);
        if now == self.acked || !self.differing.is_empty() {
            return None;
        }
        self.acked = now;
        Some(now)
    }

    /// The ack could not be sent: offer it again.
    pub fn untake_ack(&mut self) {
        self.acked = (Seq::ZERO, Seq::ZERO);
    }

    fn check_epoch(&self, header: &Header) -> Result<(), Violation> {
        if header.epoch == self.epoch {
            return Ok(());
        }
        Err(Violation::Epoch { found: header.epoch, ours: self.epoch })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Kind;

    fn change(seq: u64) -> Header {
        let mut header = Header::new(Kind::Write, Epoch(3));
        header.seq = Seq(seq);
        header.range = ByteRange::new(0, 512);
        header
    }

    #[test]
    fn order_epoch_and_bounds_are_checked_before_anything_is_applied() {
        let mut access = Access::new(Epoch(3), 4096);
        assert_eq!(
            access.admit(&change(2)),
            Err(Violation::SeqOrder { found: Seq(2), expected: Seq(1) }),
            "a gap"
        );
        let mut stale = change(1);
        stale.epoch = Epoch(2);
        assert_eq!(access.admit(&stale), Err(Violation::Epoch { found: Epoch(2), ours: Epoch(3) }));
        let mut beyond = change(1);
        beyond.range = ByteRange::new(4000, 512);
        assert!(matches!(access.admit(&beyond), Err(Violation::OutOfVolume { .. })));
        assert_eq!(access.admit(&change(1)), Ok(()));
        assert!(access.admit(&change(1)).is_err(), "a duplicate");
        assert!(Access::check_payload(&change(1), 7).is_err());
    }

    #[test]
    fn acks_coalesce_and_flushes_cover_what_was_asked() {
        let mut access = Access::new(Epoch(3), 4096);
        assert_eq!(access.take_ack(), None);
        for seq in 1..=3 {
            access.admit(&change(seq)).expect("in order");
        }
        let mut flush = Header::new(Kind::Flush, Epoch(3));
        flush.seq = Seq(2);
        access.flush_asked(&flush).expect("sent before");
        assert!(!access.take_flush(), "nothing applied yet");
        access.applied(&change(1));
        access.applied(&change(2));
        assert!(access.take_flush());
        access.applied(&change(3));
        assert_eq!(access.take_ack(), Some((Seq(3), Seq::ZERO)));
        access.flushed();
        assert_eq!(access.take_ack(), Some((Seq(3), Seq(2))));
        assert_eq!(access.take_ack(), None);
        flush.seq = Seq(4);
        assert!(access.flush_asked(&flush).is_err(), "of changes never sent");
        let mut fua = change(4);
        fua.flags = flags::FUA;
        access.admit(&fua).expect("in order");
        access.applied(&fua);
        assert!(access.take_flush(), "FUA flushes unasked");
    }

    #[test]
    fn no_ack_overtakes_a_difference() {
        let mut access = Access::new(Epoch(3), 1 << 20);
        for seq in 1..=DIFFERS_QUEUED_MAX as u64 {
            assert!(!access.is_held_up());
            let mut verify = change(seq);
            verify.kind = Kind::Verify;
            access.admit(&verify).expect("in order");
            access.differs(&verify);
            access.applied(&verify);
            assert_eq!(access.take_ack(), None, "it would say that they are equal");
        }
        assert!(access.is_held_up());
        for seq in 1..=DIFFERS_QUEUED_MAX as u64 {
            assert_eq!(access.difference(), Some((Seq(seq), ByteRange::new(0, 512))));
            assert_eq!(access.take_ack(), None);
            access.difference_told();
        }
        assert_eq!(access.take_ack(), Some((Seq(DIFFERS_QUEUED_MAX as u64), Seq::ZERO)));
    }

    #[test]
    fn a_fua_write_applied_later_does_not_swallow_a_flush_asked_for_before() {
        let mut access = Access::new(Epoch(3), 4096);
        let mut fua = change(1);
        fua.flags = flags::FUA;
        access.admit(&fua).expect("in order");
        access.admit(&change(2)).expect("in order");
        let mut flush = Header::new(Kind::Flush, Epoch(3));
        flush.seq = Seq(2);
        access.flush_asked(&flush).expect("sent before");
        access.applied(&fua);
        if access.take_flush() {
            access.flushed();
        }
        access.applied(&change(2));
        assert!(access.take_flush());
        access.flushed();
        assert_eq!(access.take_ack(), Some((Seq(2), Seq(2))));
        assert!(!access.take_flush(), "nothing is left");
    }

    #[test]
    fn a_peer_that_keeps_asking_still_gets_its_first_answer() {
        let mut access = Access::new(Epoch(3), 4096);
        for seq in 1..=20 {
            access.admit(&change(seq)).expect("in order");
        }
        let mut flush = Header::new(Kind::Flush, Epoch(3));
        let mut answered = 0;
        for seq in 1..=10 {
            // Always asked for ten changes ahead of what is applied.
            flush.seq = Seq(seq + 10);
            access.flush_asked(&flush).expect("sent before");
            access.applied(&change(seq));
        }
        for seq in 11..=20 {
            access.applied(&change(seq));
            if access.take_flush() {
                access.flushed();
                answered += 1;
            }
        }
        assert_eq!(
            (answered, access.take_ack()),
            (2, Some((Seq(20), Seq(20)))),
            "at 11, and all the rest at 20"
        );
    }
}
