//! A session between two links: carries out what [`super::switch`] decides, for as long as both are open.
//!
//! Until both ends have said their last word on the old link, that one is the volume's `link`, read as ever, and the
//! new one is `other`: what comes over it is kept back. Then the two change places, what was kept back has its turn,
//! and the old one stays only until its last slot is released and the peer has said that nothing is on its way there.
//! Pipeline, access side, numbering and acks know nothing of it.
//!
//! Invariants: the order within a direction is kept; a slot goes back to the link it came from; a change of link that
//! is asked for ends in exactly one of `LinkSwitched`, `SwitchFailed` and `LinkDown`; when the session ends, both links
//! are closed before control hears of it.
//!
//! Failures survived: a new link that is dead or that the peer never comes to costs nothing but itself. Once the old
//! one is being left, the loss of either link is the loss of the session, like any lost link.

use super::Volume;
use super::switch::{Hearing, Loss, Side, Step, Steps};
use crate::error::Violation;
use crate::limits::{LINK_EVENTS_MAX, SWITCH_HELD_MAX, SWITCH_OFFER_S_MAX, SWITCH_STUCK_S_MAX};
use crate::reactor::command::Event;
use crate::transport::{DownReason, Link, LinkEvent, Slot};
use crate::wire::{Header, Kind};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A change of link under way.
pub(super) struct Switching {
    steps: Steps,
    /// The new link before the two change places, the old one afterwards.
    pub(super) other: Box<dyn Link>,
    /// They have changed places.
    swapped: bool,
    /// `other` has told its end, which is either kept back or of no consequence. Set for the old link a moment before
    /// the two change places when its end comes together with its last frame.
    other_down: bool,
    /// The session is ending, and both links with it.
    closed: bool,
    other_bytes: u64,
    /// What came over the new link too early, in order.
    held: VecDeque<LinkEvent>,
    /// Slots of the old link that are not released yet, once the two have changed places.
    old_slots: usize,
    /// When the last sign of life went out over both.
    kept: Instant,
    /// The peer's time runs from here.
    moved: Instant,
}

impl Switching {
    /// What the volume's `link` is.
    fn link_side(&self) -> Side {
        if self.swapped { Side::New } else { Side::Old }
    }

    fn other_side(&self) -> Side {
        if self.swapped { Side::Old } else { Side::New }
    }

    #[cfg(test)]
    pub(super) fn held_len(&self) -> usize {
        self.held.len()
    }

    /// Whether `other` is looked at besides the volume's `link`.
    fn reads_too(&self) -> bool {
        // With too much kept back it is looked at again once the two have changed places.
        let full = !self.swapped && self.held.len() >= SWITCH_HELD_MAX;
        !self.other_down && !self.closed && !full
    }

    /// The link that is to be looked at besides the volume's `link`.
    pub(super) fn read_too(&self) -> Option<&dyn Link> {
        if self.reads_too() { Some(&*self.other) } else { None }
    }

    /// The same, to act on.
    pub(super) fn read_too_mut(&mut self) -> Option<&mut Box<dyn Link>> {
        if self.reads_too() { Some(&mut self.other) } else { None }
    }

    /// The link that takes the session's frames.
    pub(super) fn speaks<'a>(&'a mut self, link: &'a mut Box<dyn Link>) -> &'a mut Box<dyn Link> {
        self.pick(self.steps.sends_on(), link)
    }

    fn pick<'a>(&'a mut self, side: Side, link: &'a mut Box<dyn Link>) -> &'a mut Box<dyn Link> {
        if side == self.link_side() { link } else { &mut self.other }
    }
}

impl Volume {
    /// Begins to change the live session's link to `new`, as [`crate::reactor::command::Command::SwitchLink`] says.
    pub fn switch_link(&mut self, mut new: Box<dyn Link>, serial: u64, now: Instant) {
        let refusal = match &self.link {
            None => Some("there is no session".to_owned()),
            Some(_) if self.link_distrusted => Some("the session is ending".to_owned()),
            Some(_) => self.switch.as_ref().map(|under_way| {
                format!("the change to link number {} is still under way", under_way.steps.serial())
            }),
        };
        if let Some(reason) = refusal {
            new.close(DownReason::Local("refused"));
            self.switch_failed(serial, reason);
            return;
        }
        tracing::debug!(volume = %self.name, link = new.name(), serial, "new link offered");
        self.switch = Some(Box::new(Switching {
            steps: Steps::new(serial),
            other: new,
            swapped: false,
            other_down: false,
            closed: false,
            other_bytes: 0,
            held: VecDeque::new(),
            old_slots: 0,
            kept: now,
            moved: now,
        }));
    }

    fn switch_failed(&mut self, serial: u64, reason: String) {
        tracing::info!(volume = %self.name, serial, %reason, "the session keeps its link");
        self.events.push(Event::SwitchFailed { volume: self.index, serial, reason });
    }

    /// Forgets the new link; the session goes on over the one it has.
    fn give_up_switch(&mut self, reason: String) {
        let mut switch = self.switch.take().expect("a change is under way");
        switch.other.close(DownReason::Local("the change to this link was given up"));
        self.switch_failed(switch.steps.serial(), reason);
    }

    /// The session ends, and with it its second link. Nothing that was kept back is believed any more.
    pub(super) fn close_switch(&mut self) {
        if let Some(switch) = &mut self.switch {
            switch.held.clear();
            switch.closed = true;
            switch.other.close(DownReason::Local("the session ended"));
        }
    }

    pub(super) fn switch_has_backlog(&self) -> bool {
        self.switch.as_ref().is_some_and(|switch| {
            (switch.swapped && !switch.held.is_empty()) || switch.read_too().is_some_and(Link::has_backlog)
        })
    }

    /// Gives a slot back to the link it came from.
    pub(super) fn release(&mut self, slot: Slot) {
        if let Some(switch) = &mut self.switch
            && switch.old_slots > 0
        {
            switch.old_slots -= 1;
            if !switch.other_down {
                switch.other.release(slot);
            }
        } else if let Some(link) = &mut self.link {
            link.release(slot);
        }
    }

    /// An event of the volume's `link` while it is one of two: passes on what is the session's.
    pub(super) fn in_turn(&mut self, event: LinkEvent) -> Result<Option<LinkEvent>, Violation> {
        let Some(switch) = &mut self.switch else { return Ok(Some(event)) };
        let side = switch.link_side();
        match &event {
            LinkEvent::Sent(_) | LinkEvent::Failed(_) => {}
            LinkEvent::Arrived(Slot { header, .. }) | LinkEvent::Message(header) => {
                let hearing = switch.steps.heard(side, header)?;
                if header.kind != Kind::KeepAlive && !switch.steps.can_give_up() {
                    switch.moved = self.last_heard;
                }
                match hearing {
                    Hearing::Live => return Ok(Some(event)),
                    Hearing::Taken => {}
                    Hearing::Hold => panic!("kept back twice: {:?}", switch.steps),
                }
            }
            LinkEvent::Down(_) => {
                if switch.steps.lost(side) != Loss::Nothing {
                    return Ok(Some(event));
                }
                // Its last frame came in this same poll: it is `other` in a moment.
                switch.other_down = true;
            }
        }
        Ok(None)
    }

    /// [`Volume::poll`] while there are two links.
    pub(super) fn poll_both(&mut self, now: Instant) -> bool {
        let held_first = self.switch.as_ref().is_some_and(|switch| switch.swapped && !switch.held.is_empty());
        let mut any = if held_first { self.take_held(now) } else { self.poll_link(now) };
        any |= self.change_over(now);
        any |= self.poll_other(now);
        any |= self.end_switch();
        any
    }

    /// The turn of what was kept back has come.
    fn take_held(&mut self, now: Instant) -> bool {
        self.last_heard = now;
        for _ in 0..LINK_EVENTS_MAX {
            let Some(event) = self.switch.as_mut().and_then(|switch| switch.held.pop_front()) else { break };
            if !self.link_distrusted || matches!(event, LinkEvent::Down(_)) {
                self.link_event(event);
            }
        }
        true
    }

    /// Lets the two links change places if both ends have left the old one.
    fn change_over(&mut self, now: Instant) -> bool {
        let Some(switch) = self.switch.as_mut().filter(|switch| !switch.swapped && switch.steps.crossed())
        else {
            return false;
        };
        let Some(link) = &mut self.link else { return false };
        std::mem::swap(link, &mut switch.other);
        // The peer's silence is measured on the new link from here.
        std::mem::swap(&mut self.heard_bytes, &mut switch.other_bytes);
        switch.swapped = true;
        switch.old_slots = self.arrived.len() + usize::from(self.access_job.is_some());
        switch.moved = now;
        true
    }

    fn poll_other(&mut self, now: Instant) -> bool {
        let Some(switch) = self.switch.as_mut().filter(|switch| switch.reads_too()) else { return false };
        let mut events = std::mem::take(&mut self.link_events);
        switch.other.poll(&mut events);
        let bytes = switch.other.received_bytes();
        let any = !events.is_empty() || bytes != switch.other_bytes;
        switch.other_bytes = bytes;
        for event in events.drain(..) {
            self.other_event(event, now);
        }
        self.link_events = events;
        any
    }

    fn other_event(&mut self, event: LinkEvent, now: Instant) {
        let Some(switch) = self.switch.as_mut().filter(|switch| !switch.closed) else { return };
        let side = switch.other_side();
        let outcome = match &event {
            LinkEvent::Sent(_) | LinkEvent::Failed(_) => return,
            LinkEvent::Arrived(Slot { header, .. }) | LinkEvent::Message(header) => {
                if header.kind == Kind::Switch {
                    // There it is: its next step gets the full time again.
                    switch.moved = now;
                }
                switch.steps.heard(side, header)
            }
            LinkEvent::Down(reason) => {
                switch.other_down = true;
                match switch.steps.lost(side) {
                    Loss::InTurn => Ok(Hearing::Hold),
                    Loss::Nothing | Loss::Session => Ok(Hearing::Taken),
                    Loss::Offer => {
                        let count = matches!(reason, DownReason::Protocol(_) | DownReason::Frame(_));
                        self.counters.violations.fetch_add(u64::from(count), Ordering::Relaxed);
                        let text = format!("the new link was lost: {reason}");
                        self.give_up_switch(text);
                        return;
                    }
                }
            }
        };
        match outcome {
            Ok(Hearing::Taken) => {}
            Ok(Hearing::Hold) => switch.held.push_back(event),
            Ok(Hearing::Live) => panic!("not the session's link: {:?}", switch.steps),
            Err(violation) if switch.steps.can_give_up() => {
                self.counters.violations.fetch_add(1, Ordering::Relaxed);
                self.give_up_switch(violation.to_string());
            }
            Err(violation) => self.distrust_link(violation),
        }
    }

    /// Says the steps that are due, as far as the links take them.
    pub(super) fn pump_switch(&mut self, now: Instant) {
        while let Some(switch) = &mut self.switch
            && let Some(link) = &mut self.link
            && let Some((side, step)) = switch.steps.due()
        {
            let frame = switch.steps.frame(step, self.epoch);
            if switch.pick(side, link).send(frame).is_err() {
                break;
            }
            switch.steps.said(step);
            if step == Step::Last {
                switch.moved = now;
            }
            self.change_over(now);
        }
        self.end_switch();
        if let Some(link) = &mut self.link {
            link.kick();
        }
        if let Some(switch) = &mut self.switch {
            switch.other.kick();
        }
    }

    /// Closes the old link once neither end needs it.
    fn end_switch(&mut self) -> bool {
        let over = |switch: &mut Box<Switching>| {
            switch.steps.complete() && switch.old_slots == 0 && switch.held.is_empty() && !switch.closed
        };
        let Some(mut switch) = self.switch.take_if(over) else { return false };
        switch.other.close(DownReason::Local("the session has another link now"));
        let name = self.link.as_ref().expect("a change of link ends with its session").name();
        let serial = switch.steps.serial();
        tracing::debug!(volume = %self.name, link = name, serial, "the session has a new link");
        self.events.push(Event::LinkSwitched { volume: self.index, serial, name });
        true
    }

    /// Signs of life over both links, and the end of patience. Returns when to call again at the latest.
    pub(super) fn time_switch(&mut self, now: Instant, interval: Duration) -> Option<Instant> {
        let applying = self.access_job.is_some() || !self.arrived.is_empty();
        let (switch, link) = (self.switch.as_mut()?, self.link.as_mut()?);
        if switch.closed {
            return None;
        }
        if applying && !switch.steps.can_give_up() {
            // What the peer is to answer may stand behind what we have not taken yet.
            switch.moved = now;
        }
        let patience_s = if switch.steps.can_give_up() { SWITCH_OFFER_S_MAX } else { SWITCH_STUCK_S_MAX };
        let ends = switch.moved + Duration::from_secs(patience_s);
        if now >= ends && switch.steps.can_give_up() {
            self.give_up_switch("the peer did not come to the new link in time".to_owned());
            return None;
        }
        if now >= ends && !switch.steps.complete() {
            self.close_link(DownReason::Local("the change to another link came to a standstill"));
            return Some(now);
        }
        if now.duration_since(switch.kept) >= interval {
            switch.kept = now;
            // The peer listens on the one or on the other, and cannot be asked which.
            for link in [link, &mut switch.other] {
                let _ = link.send(Header::new(Kind::KeepAlive, self.epoch));
                link.kick();
            }
        }
        Some(ends.max(now + interval).min(switch.kept + interval))
    }
}
