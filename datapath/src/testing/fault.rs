//! A link that fails on purpose: cut, damaged or held up, its frames lost or doubled at chosen points, and otherwise the
//! link it wraps.
//!
//! Tests and the simulator put it between a reactor and any transport. What goes wrong is a [`Plan`], so a failing run
//! is repeated by its numbers. Nothing here decides by the clock or by chance that has no seed.
//!
//! Invariants: the laws of [`transport`](crate::transport) still hold of the wrapped link, but for what is planned: a damaged payload, which
//! only the checksum that the access side computes can find, and a frame lost or doubled, which only its seq tells. A
//! token is reported once and in order all the same. A cut is told as the peer's, never as ours.

use super::conformance::Dice;
use crate::transport::{DownReason, Interest, Link, LinkEvent, NoCredit, Permit, Slot};
use crate::units::Token;
use crate::wire::Header;
use costandby_ffi::mapping::Span;
use std::collections::VecDeque;
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
    /// What happened is told late and in handfuls, by dice of this seed.
    pub delay: Option<u64>,
    /// The so-manyth frame posted or sent here never leaves, and is reported as if it had.
    pub lose_frame: Option<u64>,
    /// The so-manyth frame posted or sent here leaves twice, if there is room for it.
    pub double_frame: Option<u64>,
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
    dice: Dice,
    /// What the link told and we did not yet.
    late: VecDeque<LinkEvent>,
    /// The token posted last.
    last_post: Option<Token>,
    /// The token reported last.
    reported: Option<Token>,
    /// A post that never left, and the one before it.
    lost: Option<(Option<Token>, Token)>,
    /// A post that left twice and was not reported yet.
    doubled: Option<Token>,
}

impl<L: Link> FaultLink<L> {
    /// Wraps `inner`.
    #[must_use]
    pub fn new(inner: L, plan: Plan) -> Self {
        Self {
            inner,
            plan,
            arrivals: 0,
            frames: 0,
            writes: 0,
            polls: 0,
            cut: false,
            dice: Dice::new(plan.delay.unwrap_or(0)),
            late: VecDeque::new(),
            last_post: None,
            reported: None,
            lost: None,
            doubled: None,
        }
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

    /// Reports a lost post behind the one before it, in the same way, and a doubled one once.
    fn report_planned(&mut self, events: &mut Vec<LinkEvent>, first: usize) {
        let mut at = first;
        while at < events.len() {
            let (token, sent) = match &events[at] {
                LinkEvent::Sent(token) => (*token, true),
                LinkEvent::Failed(token) => (*token, false),
                _ => {
                    at += 1;
                    continue;
                }
            };
            if self.reported == Some(token) && self.doubled.take_if(|doubled| *doubled == token).is_some() {
                events.remove(at);
                continue;
            }
            self.reported = Some(token);
            at += 1;
            if let Some((_, lost)) = self.lost.take_if(|(before, _)| *before == Some(token)) {
                events.insert(at, if sent { LinkEvent::Sent(lost) } else { LinkEvent::Failed(lost) });
                self.reported = Some(lost);
                at += 1;
            }
        }
        // Nothing was outstanding in front of it.
        if let Some((_, lost)) = self.lost.take_if(|(before, _)| before.is_none()) {
            events.insert(first, LinkEvent::Sent(lost));
            self.reported = Some(lost);
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
        let before = self.last_post.replace(token);
        if self.plan.lose_frame == Some(self.frames + 1) {
            self.lost = Some((before.filter(|before| self.reported != Some(*before)), token));
            return self.count_frame();
        }
        let twice = self.plan.double_frame == Some(self.frames + 1);
        let second = twice.then(|| self.inner.claim(header.payload_len())).flatten();
        self.inner.post(permit, header, span.clone(), token);
        if let Some(permit) = second {
            self.doubled = Some(token);
            self.inner.post(permit, header, span, token);
        }
        self.count_frame();
    }

    fn send(&mut self, message: Header) -> Result<(), NoCredit> {
        if self.plan.lose_frame != Some(self.frames + 1) {
            self.inner.send(message)?;
        }
        if self.plan.double_frame == Some(self.frames + 1) {
            // Without credit for a second one there is none.
            let _ = self.inner.send(message);
        }
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
        if self.late.is_empty() {
            self.inner.poll(events);
            self.look_at(events, first);
            self.report_planned(events, first);
        }
        if self.plan.delay.is_some() {
            self.late.extend(events.drain(first..));
            if !self.late.is_empty() {
                let handful = 1 + self.dice.below(self.late.len());
                events.extend(self.late.drain(..handful));
            }
        }
        events.len() > first
    }

    fn has_backlog(&self) -> bool {
        // A poll that was skipped may have left anything behind, or nothing: a reactor then spins a few turns.
        let lost_first = self.lost.is_some_and(|(before, _)| before.is_none());
        self.polls > 0 || !self.late.is_empty() || lost_first || self.inner.has_backlog()
    }

    fn prepare_sleep(&mut self) -> bool {
        // What a skipped poll left behind would not wake anybody.
        self.polls == 0 && self.late.is_empty() && self.inner.prepare_sleep()
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
        self.late.retain(|event| !matches!(event, LinkEvent::Arrived(_) | LinkEvent::Message(_)));
        self.inner.close(reason);
    }

    fn name(&self) -> &'static str {
        self.inner.name()
    }
}

#[cfg(test)]
pub(crate) mod tests;
