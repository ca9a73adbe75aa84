//! How a live session changes its link: what one end says, where it sends, and what it may believe. Sans-IO.
//!
//! Each direction is in order by itself, and stays so across the change: an end says its last word on the old link
//! behind everything it gave that link, and from then on uses the new one; the other end reads nothing of the new link
//! before that last word. Four steps, each a [`Kind::Switch`] frame with the change's serial in `aux` and the step in
//! `seq`:
//!
//! 1. *Offer*, the first frame on the new link: "I have it".
//! 2. *Accept*, on the new link, once the peer's *Offer* is here: "and I see that you have it". Nothing is at stake yet:
//!    until here an end can forget the new link, and the session goes on as if nothing had been. An offer alone would
//!    not do: it may have waited on the link for an end that was told late, while the one that made it lost patience.
//! 3. *Last*, the last frame on the old link, once the peer's *Accept* is here. There is no way back: from here the loss
//!    of either link is the loss of the session.
//! 4. *Done*, on the new link, once the peer's *Last* is here: "nothing of yours is on the old link any more". An end
//!    that has heard it may close the old link, and no earlier.
//!
//! Invariants, shown over every interleaving in `switch/tests.rs`: what is delivered is a prefix of what was sent,
//! nothing twice; two ends of a live session never end up on different links; no end closes the old link while anything
//! but signs of life is on its way to the peer there.
//!
//! Failures survived: an end that is never told, or told late; either link lost at any point; a peer that says steps
//! out of order, twice, or about another link.

use crate::error::Violation;
use crate::units::{Epoch, Seq};
use crate::wire::{Header, Kind};

/// Which of the two links.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Side {
    /// The one the session had.
    Old,
    /// The one it is to have.
    New,
}

/// A step, as `seq` of its frame says it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u64)]
pub(super) enum Step {
    Offer = 1,
    Accept = 2,
    Last = 3,
    Done = 4,
}

/// What to do with a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Hearing {
    /// It is the session's next.
    Live,
    /// It is the session's, but not yet: keep it, in order.
    Hold,
    /// It was for the change itself, or a mere sign of life.
    Taken,
}

/// What the loss of a link means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Loss {
    /// The change is off, the session goes on over the old link.
    Offer,
    /// It stands behind what is still to be read from the old link.
    InTurn,
    /// The session ends.
    Session,
    /// The link was done with.
    Nothing,
}

/// How far this end has come with what it says. It only moves down this list.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Said {
    Nothing,
    Offer,
    Accept,
    Last,
    Done,
}

/// One end's part in one change. See the file's head.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Steps {
    serial: u64,
    said: Said,
    offer_heard: bool,
    accept_heard: bool,
    last_heard: bool,
    done_heard: bool,
}

impl Steps {
    pub(super) fn new(serial: u64) -> Self {
        Self {
            serial,
            said: Said::Nothing,
            offer_heard: false,
            accept_heard: false,
            last_heard: false,
            done_heard: false,
        }
    }

    pub(super) fn serial(&self) -> u64 {
        self.serial
    }

    /// The step to say next, and on which link, before anything else that link is given.
    pub(super) fn due(&self) -> Option<(Side, Step)> {
        match self.said {
            Said::Nothing => Some((Side::New, Step::Offer)),
            Said::Offer if self.offer_heard => Some((Side::New, Step::Accept)),
            // A peer that said its Last has accepted as well, however slow the new link is to tell.
            Said::Accept if self.accept_heard || self.last_heard => Some((Side::Old, Step::Last)),
            Said::Last if self.last_heard => Some((Side::New, Step::Done)),
            Said::Offer | Said::Accept | Said::Last | Said::Done => None,
        }
    }

    /// The link took the step that was due.
    ///
    /// # Panics
    /// When it was not.
    pub(super) fn said(&mut self, step: Step) {
        assert!(self.due().is_some_and(|(_, due)| due == step), "{step:?} was not due: {self:?}");
        self.said = match step {
            Step::Offer => Said::Offer,
            Step::Accept => Said::Accept,
            Step::Last => Said::Last,
            Step::Done => Said::Done,
        };
    }

    /// The frame that says a step.
    pub(super) fn frame(&self, step: Step, epoch: Epoch) -> Header {
        let mut header = Header::new(Kind::Switch, epoch);
        (header.seq, header.aux) = (Seq(step as u64), self.serial);
        header
    }

    /// Where the session's frames go now.
    pub(super) fn sends_on(&self) -> Side {
        if self.said >= Said::Last { Side::New } else { Side::Old }
    }

    /// Both ends' *Last* are said: the new link is the session's in both directions, and is read.
    pub(super) fn crossed(&self) -> bool {
        self.said >= Said::Last && self.last_heard
    }

    /// This end has left nothing yet and read no farewell: it can forget the new link. A peer that has left already
    /// finds that out when its *Last* is refused.
    pub(super) fn can_give_up(&self) -> bool {
        self.said <= Said::Accept && !self.last_heard
    }

    /// The peer owes nothing any more. The old link may go once its last slot is released.
    pub(super) fn complete(&self) -> bool {
        self.said == Said::Done && self.done_heard
    }

    /// A frame is here.
    ///
    /// # Errors
    /// The peer breaks the order of steps.
    pub(super) fn heard(&mut self, side: Side, header: &Header) -> Result<Hearing, Violation> {
        if header.kind == Kind::KeepAlive {
            return Ok(Hearing::Taken);
        }
        let is = |step: Step| {
            header.kind == Kind::Switch && header.aux == self.serial && header.seq.0 == step as u64
        };
        match side {
            Side::Old if self.last_heard => Err(violation("a frame on the link the peer had left", header)),
            // It cannot have left before it heard that we are there.
            Side::Old if is(Step::Last) && self.said >= Said::Accept => {
                self.last_heard = true;
                Ok(Hearing::Taken)
            }
            Side::New if !self.offer_heard && is(Step::Offer) => {
                self.offer_heard = true;
                Ok(Hearing::Taken)
            }
            Side::New if !self.accept_heard && self.offer_heard && is(Step::Accept) => {
                self.accept_heard = true;
                Ok(Hearing::Taken)
            }
            Side::New if !self.accept_heard => {
                Err(violation("a new link that begins without its first steps", header))
            }
            // What was said over the new link before we read it is looked at when its turn comes.
            Side::New if !self.crossed() => Ok(Hearing::Hold),
            Side::New if is(Step::Done) && !self.done_heard => {
                self.done_heard = true;
                Ok(Hearing::Taken)
            }
            Side::Old | Side::New if header.kind == Kind::Switch => {
                Err(violation("a step out of order", header))
            }
            Side::Old | Side::New => Ok(Hearing::Live),
        }
    }

    /// A link has ended.
    pub(super) fn lost(&self, side: Side) -> Loss {
        match side {
            Side::New if self.can_give_up() => Loss::Offer,
            Side::New if !self.crossed() => Loss::InTurn,
            Side::Old if self.crossed() => Loss::Nothing,
            Side::New | Side::Old => Loss::Session,
        }
    }
}

/// A step while no change is under way.
pub(super) fn unexpected(header: &Header) -> Violation {
    violation("a step of a change that is not under way here", header)
}

fn violation(what: &'static str, header: &Header) -> Violation {
    let (serial, step) = if header.kind == Kind::Switch { (header.aux, header.seq.0) } else { (0, 0) };
    Violation::Switch { what, serial, step }
}

#[cfg(test)]
mod tests;
