//! The online verification in a volume: its steps beside clients' requests, and what follows from what it finds.
//!
//! Control asks for one while both disks are in sync ([`Volume::verify`]) and hears of its end exactly once
//! ([`Event::Verified`]). What differs is marked in the dirty bitmap. With `repair` the marked ranges are then copied over
//! the running session by the background copy, which clears them once they are durable on both nodes; without, the marks
//! stay, and the next session copies them.

use super::checkpoint::Quiesce;
use super::{Origin, Request, Volume};
use crate::disk::inflight::{Access, Admission};
use crate::disk::record::Round;
use crate::limits::{RESYNC_READ_AHEAD_LEN, VERIFY_LEN_MAX};
use crate::mirror::pipeline::Event as PipelineEvent;
use crate::mirror::throttle::Leave;
use crate::mirror::verify::{Findings, Verify};
use crate::reactor::command::Event;
use crate::units::ByteRange;
use crate::wire::{Kind, flags};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// What became of a verification.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Verified {
    /// What it compared, and what differed.
    pub findings: Findings,
    /// What differed is equal now, and durable on both nodes.
    pub repaired: bool,
    /// Why it did not come to its end, or could not begin.
    pub unfinished: Option<String>,
}

/// One that is under way.
#[derive(Debug)]
pub(super) struct Verifying {
    verify: Verify,
    repair: bool,
    serial: u64,
    /// All is compared, and what differs is being copied.
    repairing: bool,
    /// All is compared, and what differs is being put on record.
    marking: Option<Round>,
}

impl Volume {
    /// Compares the peer's disk with this one, whatever clients write meanwhile. [`Event::Verified`] follows.
    pub fn verify(&mut self, repair: bool) {
        let refusal = if self.verifying.is_some() {
            "a verification is under way already"
        } else if !self.source || self.link.is_none() {
            "there is no session in which this node is the source"
        } else if self.diskless.is_active() {
            "this node's disk failed"
        } else if self.resync.is_some() {
            "the peer's disk is being copied to"
        } else if self.quiesce != Quiesce::No {
            "the volume is being handed over"
        } else {
            self.verify_serial += 1;
            let grain = self.record.dirty.geometry().grain_len();
            self.verifying = Some(Verifying {
                verify: Verify::new(self.disk.size(), grain),
                repair,
                serial: self.verify_serial,
                repairing: false,
                marking: None,
            });
            return;
        };
        self.tell_verified(Verified { unfinished: Some(refusal.to_owned()), ..Verified::default() });
    }

    /// Lets a verification end early, with what it found so far.
    pub fn stop_verify(&mut self) {
        if let Some(Verifying { repairing: false, .. }) = &self.verifying {
            self.end_verify("it was stopped");
        }
    }

    /// Ends a verification before its end: it tells nothing about what it did not reach.
    pub(super) fn end_verify(&mut self, why: &str) {
        if let Some(Verifying { verify, .. }) = self.verifying.take() {
            self.throttle.all_ended();
            // Nobody waits for it: a clean end stores what is marked before it calls itself clean.
            let _ = self.record.ask_store();
            let findings = verify.findings().clone();
            self.tell_verified(Verified { findings, repaired: false, unfinished: Some(why.to_owned()) });
        }
    }

    fn tell_verified(&mut self, outcome: Verified) {
        // The last step's publication may have been before its end.
        self.publish_compared(&outcome.findings);
        self.events.push(Event::Verified { volume: self.index, outcome });
    }

    /// Whether a step of the verification `serial` still belongs to it.
    pub(super) fn verify_step_counts(&self, serial: u64) -> bool {
        self.verifying.as_ref().is_some_and(|verifying| verifying.serial == serial)
    }

    /// Begins what steps may begin.
    pub(super) fn step_verify(&mut self, now: Instant) {
        if self.copy_paused || self.parted.is_some() {
            return;
        }
        while let Some(Verifying { verify, serial, repairing: false, marking, .. }) = &mut self.verifying {
            if marking.is_some() {
                return self.tell_marked();
            }
            if verify.is_done() {
                return self.all_compared();
            }
            let serial = *serial;
            let len = match self.throttle.leave(now, self.clients_busy) {
                // Nothing but a frame goes over the link: a grain is no more than a few pages of a copy.
                Leave::Step(len) => len,
                Leave::Wait(at) => {
                    self.throttle_due = Some(at);
                    return;
                }
                Leave::Enough => return,
            };
            let Some(range) = verify.next(len.min(VERIFY_LEN_MAX)) else { return };
            verify.took(range);
            self.throttle.step_began(now, range.len);
            self.disk.read_ahead(ByteRange::new(range.end() + RESYNC_READ_AHEAD_LEN, range.len));
            let origin = Origin::Verify { serial };
            let token = self.add_request(Request::change_of(origin, Kind::Verify, range, flags::RESYNC));
            match self.inflight.request(token, range, Access::Change) {
                Admission::Granted => {
                    self.start(token);
                }
                Admission::Waits => {}
                Admission::Full => {
                    self.drop_request(token);
                    self.throttle.step_ended();
                    if let Some(verifying) = &mut self.verifying {
                        verifying.verify.untake(range);
                    }
                    return;
                }
            }
        }
    }

    /// The peer has looked at the step's range, at this point of the write order. What it found is `None` where a link broke
    /// before it was told.
    pub(super) fn step_compared(&mut self, serial: u64, range: ByteRange, equal: Option<bool>) {
        if !self.verify_step_counts(serial) {
            return;
        }
        self.throttle.step_ended();
        let Some(verifying) = &mut self.verifying else { return };
        let Some(equal) = equal else { return verifying.verify.untake(range) };
        if verifying.verify.compared(range, equal) {
            tracing::warn!(volume = %self.name, %range, "verification: the peer's bytes differ");
            self.mark_differing(range);
        }
    }

    /// Puts on record that the peer's `range` is not ours.
    fn mark_differing(&mut self, range: ByteRange) {
        self.record.mark(range);
    }

    /// Every step is done.
    fn all_compared(&mut self) {
        let Some(verifying) = &mut self.verifying else { return };
        // What an earlier one found may be equal by now, and is marked still.
        if verifying.repair && self.record.is_dirty() {
            verifying.repairing = true;
            let _ = self.record.ask_store();
            self.begin_copy(false);
            if let Some(resync) = &mut self.resync {
                // The peer has no marks of its own: it is in sync but for what was found here.
                let first = resync.told_all(&self.record.dirty, Vec::new());
                assert!(first, "a copy begins once");
                resync.kept();
            }
            return;
        }
        verifying.marking = Some(self.record.ask_store());
        // Its steps count as changes: until a flush the peer would seem to lag behind.
        let token = self.add_request(Request::flush(Origin::Nobody));
        self.pipeline_event(PipelineEvent::FlushBackground(token));
        self.tell_marked();
    }

    /// Tells the end of a verification without repair, once all that differs is on record.
    fn tell_marked(&mut self) {
        if let Some(Verifying { marking: Some(round), .. }) = &self.verifying
            && self.record.is_stored(*round)
        {
            self.finish_verify(false);
        }
    }

    fn finish_verify(&mut self, repaired: bool) {
        if let Some(Verifying { verify, .. }) = self.verifying.take() {
            self.tell_verified(Verified { findings: verify.findings().clone(), repaired, unfinished: None });
        }
    }

    /// Whether a verification's own copy is under way.
    pub(super) fn repairs(&self) -> bool {
        self.verifying.as_ref().is_some_and(|verifying| verifying.repairing)
    }

    /// A copy has ended, durable on both nodes. Returns whether it was a verification's own.
    pub(super) fn repair_done(&mut self) -> bool {
        let repairing = self.verifying.as_ref().is_some_and(|verifying| verifying.repairing);
        if repairing {
            self.end_copy();
            self.finish_verify(true);
        }
        repairing
    }

    pub(super) fn publish_verify(&self) {
        let c = &self.counters;
        c.verifying.store(self.verifying.is_some(), Ordering::Relaxed);
        if let Some(Verifying { verify, .. }) = &self.verifying {
            self.publish_compared(verify.findings());
        }
    }

    fn publish_compared(&self, findings: &Findings) {
        let percent = u128::from(findings.compared) * 10_000 / u128::from(self.disk.size());
        let percent = u64::try_from(percent).expect("10,000 at most");
        self.counters.verify_percent_x100.store(percent, Ordering::Relaxed);
        self.counters.verify_differing_bytes.store(findings.differing, Ordering::Relaxed);
    }
}
