//! The standby side of a session: changes of the peer that arrived, are applied, flushed and acknowledged.

use super::{ACCESS_FLUSH_BASE, Outgoing, SETTLE_FLUSH_BASE, Session};
use crate::access::Access;
use crate::error::Violation;
use crate::limits::READS_OWED_MAX;
use crate::transport::Slot;
use crate::units::Token;
use crate::volume::resync::Telling;
use crate::wire::Header;

impl Session {
    /// The peer's changes come to this node's disk of `size` bytes from now on. With `resync` the peer is told our marks first.
    pub(in crate::volume) fn be_target(&mut self, size: u64, resync: bool) {
        self.standby_serial += 1;
        self.standby = Some(Access::new(self.epoch, size));
        self.telling = resync.then_some(Telling::From(0));
    }

    /// A change arrived.
    pub(in crate::volume) fn admit(&mut self, slot: Slot) -> Result<(), Violation> {
        let Some(access) = &mut self.standby else {
            return Err(Violation::Role { what: "a change", role: "primary" });
        };
        access.admit(&slot.header)?;
        self.arrived.push_back(slot);
        Ok(())
    }

    /// The change to apply next, unless one before it is being applied or differences wait to be told.
    pub(in crate::volume) fn next_to_apply(&mut self) -> Option<Slot> {
        if self.applying.is_some() || self.standby.as_ref().is_some_and(Access::is_held_up) {
            return None;
        }
        self.arrived.pop_front()
    }

    /// A worker thread applies this one: nothing behind it is applied before.
    pub(in crate::volume) fn applies(&mut self, slot: Slot) {
        self.applying = Some(slot);
    }

    /// It has ended.
    pub(in crate::volume) fn take_applying(&mut self) -> Slot {
        self.applying.take().expect("a job was under way")
    }

    /// Drops changes that wait to be applied in a role that ends. Returns whether there are any, or one is being applied.
    pub(in crate::volume) fn drop_arrived(&mut self) -> bool {
        let any = self.standby.is_some() && (self.applying.is_some() || !self.arrived.is_empty());
        if any {
            self.arrived.clear();
        }
        any
    }

    /// A change stands on our disk. Returns whether it is one of a session.
    pub(in crate::volume) fn applied(&mut self, header: &Header) -> bool {
        let Some(access) = &mut self.standby else { return false };
        access.applied(header);
        self.moved = true;
        true
    }

    /// A worker thread applied a change after its link was gone.
    pub(in crate::volume) fn applied_without_link(&mut self, header: &Header) {
        if let Some(access) = self.parted_standby() {
            access.applied(header);
            access.part();
        }
    }

    /// The comparison that is applied next found other bytes here. Returns whether it is one of a session.
    pub(in crate::volume) fn found_different(&mut self, header: &Header) -> bool {
        let Some(access) = &mut self.standby else { return false };
        access.differs(header);
        true
    }

    /// The peer asks for stable storage.
    pub(in crate::volume) fn flush_asked(&mut self, header: &Header) -> Result<(), Violation> {
        match &mut self.standby {
            Some(access) => access.flush_asked(header),
            None => Err(Violation::Role { what: "a flush request", role: "primary" }),
        }
    }

    /// The token of the flush to start now, if one is due.
    pub(in crate::volume) fn take_flush(&mut self) -> Option<Token> {
        let due = self.standby.as_mut().is_some_and(Access::take_flush);
        due.then_some(Token(ACCESS_FLUSH_BASE + self.standby_serial))
    }

    /// It has ended well. One of a session before is known by its token.
    pub(in crate::volume) fn flushed(&mut self, token: Token) {
        let is_ours = token == Token(ACCESS_FLUSH_BASE + self.standby_serial);
        let parted = self.parted.as_mut().and_then(super::Parting::standby_mut);
        if let Some(access) = self.standby.as_mut().or(parted).filter(|_| is_ours) {
            access.flushed();
        }
    }

    /// The token of the flush after a target's session.
    pub(in crate::volume) fn begin_settling(&mut self) -> Token {
        self.settle_serial += 1;
        Token(SETTLE_FLUSH_BASE + self.settle_serial)
    }

    /// It has ended well. Returns whether control is to hear of it: no session came since.
    pub(in crate::volume) fn settled(&mut self, token: Token) -> bool {
        let counts = token == Token(SETTLE_FLUSH_BASE + self.settle_serial) && self.standby.is_none();
        if counts && let Some(access) = self.parted_standby() {
            access.settled();
        }
        counts
    }

    /// The peer has no disk, and asks ours.
    pub(in crate::volume) fn read_asked(&mut self, header: &Header) -> Result<(), Violation> {
        let Some(access) = &self.standby else {
            return Err(Violation::Role { what: "a read", role: "primary" });
        };
        access.read_asked(header)?;
        // Little else ever waits here on the side that answers.
        if self.outbox.len() >= READS_OWED_MAX {
            return Err(Violation::TooManyReads);
        }
        self.outbox.push_back(Outgoing::Reply { id: header.aux, range: header.range });
        Ok(())
    }

    /// The source says that our marks are on its record. Returns whether we forget them now; `None` where it may not say so.
    pub(in crate::volume) fn marks_kept(&mut self) -> Option<bool> {
        match self.telling.take() {
            Some(Telling::All) => Some(true),
            // It is said again where a link broke before it was known to have arrived.
            None if self.gone_on => Some(false),
            _ => None,
        }
    }

    fn parted_standby(&mut self) -> Option<&mut Access> {
        self.parted.as_mut().and_then(super::Parting::standby_mut)
    }
}
