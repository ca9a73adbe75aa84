//! The steps of the online verification.

use super::{Background, Step};
use crate::disk::dirty_bitmap::DirtyBitmap;
use crate::disk::image::DiskImage;
use crate::disk::record::Round;
use crate::limits::{RESYNC_READ_AHEAD_LEN, VERIFY_LEN_MAX};
use crate::mirror::verify::{Findings, Verify};
use crate::units::ByteRange;
use crate::volume::interface::Origin;
use crate::wire::Kind;
use std::time::Instant;

/// One that is under way.
#[derive(Debug)]
pub(super) struct Verifying {
    verify: Verify,
    repair: bool,
    /// All is compared, and what differs is being copied.
    repairing: bool,
    /// All is compared, and what differs is being put on record.
    marking: Option<Round>,
}

impl Verifying {
    pub(super) fn findings(&self) -> &Findings {
        self.verify.findings()
    }

    pub(super) fn untake(&mut self, range: ByteRange) {
        self.verify.untake(range);
    }
}

/// How far a verification is that begins no more steps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::volume) enum Compared {
    /// All is compared.
    All {
        /// What differs is to be copied.
        repair: bool,
    },
    /// It ends once this is stored.
    Marking(Round),
}

impl Background {
    /// Begins a verification of a disk of `size` bytes.
    pub(in crate::volume) fn begin_verify(&mut self, size: u64, grain_len: u64, repair: bool) {
        self.verify_serial += 1;
        let verify = Verify::new(size, grain_len);
        self.verifying = Some(Verifying { verify, repair, repairing: false, marking: None });
    }

    /// Whether one is under way, its own copy included.
    pub(in crate::volume) fn is_verifying(&self) -> bool {
        self.verifying.is_some()
    }

    /// Whether a verification's own copy is under way.
    pub(in crate::volume) fn repairs(&self) -> bool {
        self.verifying.as_ref().is_some_and(|verifying| verifying.repairing)
    }

    /// Ends a verification before its end, with what it has found.
    pub(in crate::volume) fn cut_verify(&mut self) -> Option<Findings> {
        let verifying = self.verifying.take()?;
        self.throttle.all_ended();
        Some(verifying.verify.findings().clone())
    }

    /// Ends a verification at its end.
    pub(in crate::volume) fn finish_verify(&mut self) -> Option<Findings> {
        self.verifying.take().map(|verifying| verifying.verify.findings().clone())
    }

    /// Whether a step of the verification `serial` still belongs to it.
    pub(in crate::volume) fn verify_step_counts(&self, serial: u64) -> bool {
        self.verifying.is_some() && serial == self.verify_serial
    }

    /// The next step of the verification, if one may begin.
    pub(in crate::volume) fn next_verify_step(&mut self, now: Instant, disk: &DiskImage) -> Option<Step> {
        let verifying = self.verifying.as_ref()?;
        let is_over = verifying.repairing || verifying.marking.is_some() || verifying.verify.is_done();
        if self.paused || is_over {
            return None;
        }
        // Nothing but a frame goes over the link: a grain is no more than a few pages of a copy.
        let len = self.leave(now, self.clients_busy)?;
        let verify = &mut self.verifying.as_mut()?.verify;
        let range = verify.next(len.min(VERIFY_LEN_MAX))?;
        verify.took(range);
        self.throttle.step_began(now, range.len);
        disk.read_ahead(ByteRange::new(range.end() + RESYNC_READ_AHEAD_LEN, range.len));
        let origin = Origin::Verify { serial: self.verify_serial };
        Some(Step { origin, kind: Kind::Verify, range, differs: false })
    }

    /// How far a verification is that has compared all.
    pub(in crate::volume) fn compared(&self) -> Option<Compared> {
        let verifying = self.verifying.as_ref().filter(|verifying| !self.paused && !verifying.repairing)?;
        match verifying.marking {
            Some(round) => Some(Compared::Marking(round)),
            None if verifying.verify.is_done() => Some(Compared::All { repair: verifying.repair }),
            None => None,
        }
    }

    /// All is compared, and what differs is being stored as marks.
    pub(in crate::volume) fn marks(&mut self, round: Round) {
        if let Some(verifying) = &mut self.verifying {
            verifying.marking = Some(round);
        }
    }

    /// All is compared, and what differs is being copied.
    pub(in crate::volume) fn repair(&mut self, dirty: &DirtyBitmap) {
        if let Some(verifying) = &mut self.verifying {
            verifying.repairing = true;
            self.begin_repair(dirty);
        }
    }

    /// The peer has looked at the step's range, at this point of the write order. Returns whether its bytes are others.
    pub(in crate::volume) fn step_compared(
        &mut self,
        serial: u64,
        range: ByteRange,
        equal: Option<bool>,
    ) -> bool {
        if !self.verify_step_counts(serial) {
            return false;
        }
        self.throttle.step_ended();
        match (&mut self.verifying, equal) {
            (Some(verifying), Some(equal)) => verifying.verify.compared(range, equal),
            (Some(verifying), None) => {
                // A link broke before the outcome was told.
                verifying.verify.untake(range);
                false
            }
            (None, _) => false,
        }
    }
}
