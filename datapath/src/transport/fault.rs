//! A link that fails on purpose: cut, damaged or held up at chosen points, and otherwise the link it wraps.
//!
//! Tests and the simulator put it between a reactor and any transport. What goes wrong is a [`Plan`], so a failing run
//! is repeated by its numbers. Nothing here decides by chance or by the clock.
//!
//! Invariants: the laws of [`super`] still hold of the wrapped link (a damaged payload aside, which only the checksum
//! that the access side computes can find); a cut is told as the peer's, never as ours.

use super::{DownReason, Interest, Link, LinkEvent, NoCredit, Permit, Slot};
use crate::units::Token;
use crate::wire::Header;
use costandby_ffi::mapping::Span;
use std::os::fd::BorrowedFd;

/// What goes wrong. Counts start at 1; `None` is never.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// The link is cut once this many frames arrived here (changes and messages). The last of them is still told.
    pub cut_after_arrivals: Option<u64>,
    /// The link is cut once this many frames were posted or sent here, before the last of them is kicked.
    pub cut_after_frames: Option<u64>,
    /// The first byte of the payload of the so-manyth arriving write is flipped.
    pub damage_write: Option<u64>,
    /// Of each so many polls only the last one looks: the peer seems slow, and its frames come in heaps.
    pub poll_every: Option<u32>,
}

/// A link with a [`Plan`]. See the file's head.
#[derive(Debug)]
pub struct FaultLink<L> {
    inner: L,
    plan: Plan,
    arrivals: u64,
    frames: u64,
    writes: u64,
    polls: u32,
    cut: bool,
}

impl<L: Link> FaultLink<L> {
    /// Wraps `inner`.
    #[must_use]
    pub fn new(inner: L, plan: Plan) -> Self {
        Self { inner, plan, arrivals: 0, frames: 0, writes: 0, polls: 0, cut: false }
    }

    fn cut(&mut self) {
        if !self.cut {
            self.cut = true;
            self.inner.close(DownReason::Closed);
        }
    }

    fn count_frame(&mut self) {
        self.frames += 1;
        if self.plan.cut_after_frames == Some(self.frames) {
            self.cut();
        }
    }

    /// Takes note of what arrived from `first` on, and keeps from the reactor what comes after the cut.
    fn look_at(&mut self, events: &mut Vec<LinkEvent>, first: usize) {
        let mut at = first;
        while at < events.len() {
            if !matches!(events[at], LinkEvent::Arrived(_) | LinkEvent::Message(_)) {
                at += 1;
                continue;
            }
            if self.cut {
                events.remove(at);
                continue;
            }
            if let LinkEvent::Arrived(slot) = &events[at] {
                self.damage(slot);
            }
            self.arrivals += 1;
            if self.plan.cut_after_arrivals == Some(self.arrivals) {
                self.cut();
            }
            at += 1;
        }
    }

    fn damage(&mut self, slot: &Slot) {
        if slot.payload.is_empty() {
            return;
        }
        self.writes += 1;
        if self.plan.damage_write == Some(self.writes) {
            let mut byte = [0];
            slot.payload.sub(0, 1).read_into(&mut byte);
            slot.payload.sub(0, 1).write_from(&[!byte[0]]);
        }
    }
}

impl<L: Link> Link for FaultLink<L> {
    fn claim(&mut self, payload_len: usize) -> Option<Permit> {
        self.inner.claim(payload_len)
    }

    fn post(&mut self, permit: Permit, header: Header, span: Option<Span>, token: Token) {
        self.inner.post(permit, header, span, token);
        self.count_frame();
    }

    fn send(&mut self, message: Header) -> Result<(), NoCredit> {
        self.inner.send(message)?;
        self.count_frame();
        Ok(())
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn poll(&mut self, events: &mut Vec<LinkEvent>) -> bool {
        self.polls += 1;
        if self.polls < self.plan.poll_every.unwrap_or(1) {
            return false;
        }
        self.polls = 0;
        let first = events.len();
        self.inner.poll(events);
        self.look_at(events, first);
        events.len() > first
    }

    fn has_backlog(&self) -> bool {
        // A poll that was skipped may have left anything behind, or nothing: a reactor then spins a few turns.
        self.polls > 0 || self.inner.has_backlog()
    }

    fn prepare_sleep(&mut self) -> bool {
        // What a skipped poll left behind would not wake anybody.
        self.polls == 0 && self.inner.prepare_sleep()
    }

    fn polls_for_free(&self) -> bool {
        self.inner.polls_for_free()
    }

    fn received_bytes(&self) -> u64 {
        self.inner.received_bytes()
    }

    fn host_silence(&self) -> Option<std::time::Duration> {
        self.inner.host_silence()
    }

    fn release(&mut self, slot: Slot) {
        self.inner.release(slot);
    }

    fn arm(&mut self) -> Option<(BorrowedFd<'_>, Interest)> {
        self.inner.arm()
    }

    fn close(&mut self, reason: DownReason) {
        self.inner.close(reason);
    }

    fn name(&self) -> &'static str {
        self.inner.name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::RING_LEN_MIN;
    use crate::transport::laws::{End, Ends, Source, plain, until};
    use crate::transport::loopback;
    use crate::wire::Kind;

    fn both(ring_len: usize, plan: Plan) -> Ends {
        let (here, there) = loopback::pair(ring_len).expect("ring memory");
        (Box::new(FaultLink::new(here, plan)), Box::new(FaultLink::new(there, plan)))
    }

    mod without_a_plan {
        crate::link_laws!(|ring_len| super::both(ring_len, super::Plan::default()));
    }

    mod in_heaps {
        crate::link_laws! {
            |ring_len| super::both(ring_len, super::Plan { poll_every: Some(3), ..Default::default() }) =>
                frames_and_messages_keep_one_order,
                claim_waits_for_release,
                closing_here_fails_each_token_once,
                nothing_is_delivered_after_closing_here,
        }
    }

    fn ends(plan: Plan) -> (End, End) {
        let (here, there) = loopback::pair(RING_LEN_MIN).expect("ring memory");
        (End::new(Box::new(here)), End::new(Box::new(FaultLink::new(there, plan))))
    }

    fn until_down(source: &Source, end: &mut End) -> String {
        until("down", || {
            end.turn(source);
            end.down.is_some()
        });
        format!("{:?}", end.down)
    }

    #[test]
    fn a_cut_after_arrivals_lets_exactly_those_through() {
        let source = Source::new(64);
        let (mut here, mut there) = ends(Plan { cut_after_arrivals: Some(3), ..Plan::default() });
        (1..=8).for_each(|seq| assert!(here.post_plain(seq)));
        here.turn(&source);
        assert_eq!(until_down(&source, &mut there), "Some(Closed)");
        assert_eq!(there.heard, [(Kind::Trim, 1), (Kind::Trim, 2), (Kind::Trim, 3)]);
        assert_eq!(until_down(&source, &mut here), "Some(Closed)");
        here.assert_each_token_once();
    }

    #[test]
    fn a_cut_after_frames_fails_what_was_not_kicked() {
        let source = Source::new(64);
        let (mut here, mut there) = ends(Plan { cut_after_frames: Some(2), ..Plan::default() });
        assert!(there.post_plain(1));
        there.turn(&source);
        assert!(there.post_plain(2));
        assert_eq!(until_down(&source, &mut there), "Some(Closed)");
        assert_eq!((there.sent.as_slice(), there.failed.as_slice()), ([0].as_slice(), [1].as_slice()));
        assert_eq!(until_down(&source, &mut here), "Some(Closed)");
        assert_eq!(here.heard, [(Kind::Trim, 1)]);
    }

    #[test]
    fn damage_is_for_the_checksum_to_find() {
        let source = Source::new(4096);
        let (here, there) = loopback::pair(RING_LEN_MIN).expect("ring memory");
        let (mut here, mut there) =
            (here, FaultLink::new(there, Plan { damage_write: Some(2), ..Plan::default() }));
        for seq in 1..=3 {
            let (header, span) = source.write(seq, 0, 4096);
            let permit = here.claim(4096).expect("room");
            here.post(permit, header, Some(span), Token(seq));
        }
        assert!(here.send(plain(Kind::Flush, 3)).is_ok());
        here.kick();
        let mut events = Vec::new();
        there.poll(&mut events);
        let whole: Vec<bool> = events
            .iter()
            .filter_map(|event| match event {
                LinkEvent::Arrived(slot) => Some(slot.payload.crc32c() == slot.header.payload_crc),
                _ => None,
            })
            .collect();
        assert_eq!(whole, [true, false, true]);
    }
}
