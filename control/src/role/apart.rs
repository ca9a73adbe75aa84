//! The part of the controller that explains why there is no session although this node looks for its peer: in the
//! log when the reason appears, changes in kind and ends; in `status` while it holds. It decides nothing.
//!
//! Only one node of a pair dials. The other one hears of the same things by asking the dialer now and then whether it would
//! have a session ([`Event::NoContact`](super::Event::NoContact), [`Event::Contact`](super::Event::Contact)).
//!
//! Survives: a peer that says anything at all, at any length, every time it is dialled.

use super::{Action, Connection, Level, Role, VolumeController, VolumeSettings};
use crate::hello::{Refuse, RefuseCode};

/// Bytes of a peer's words that are shown: the longest of ours, a split brain's with both histories, and some more.
const WORDS_LEN_MAX: usize = 2000;

/// What stands between this node and a session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Obstacle {
    /// No connection to the peer's address comes about.
    Unreachable {
        /// In which way.
        reach: Reach,
        /// The same in words, with the address.
        text: String,
    },
    /// The peer will have no session.
    Refused(Refuse),
    /// A conversation ended before it came to a session.
    Failed {
        /// Why, for the operator.
        text: String,
    },
}

/// How a peer's address cannot be reached. Changes within one kind are no news for the log: a host that is off is
/// reported as silent by one attempt and as unknown to its network by the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// Its machine answers, and no daemon listens there.
    Refused,
    /// Nobody answers.
    Silent,
    /// This machine has no way there.
    NoRoute,
    /// Anything else.
    Other,
}

impl Obstacle {
    /// Whether it goes away only when an operator acts.
    fn is_lasting(&self) -> bool {
        let Self::Refused(refuse) = self else { return false };
        matches!(refuse.code, RefuseCode::Disconnected | RefuseCode::Disks | RefuseCode::Configuration)
    }

    fn is_news_after(&self, before: Option<&Self>) -> bool {
        match (before, self) {
            (Some(Self::Unreachable { reach: before, .. }), Self::Unreachable { reach, .. }) => {
                before != reach
            }
            (Some(before), now) => before != now,
            (None, _) => true,
        }
    }

    /// In words, about `peer`.
    fn text(&self, peer: &str) -> String {
        match self {
            Self::Unreachable { text, .. } => format!("{peer} cannot be reached: {text}"),
            Self::Refused(Refuse { code: RefuseCode::Busy, text }) => {
                format!("{peer} has no session now, and is asked again: {text}")
            }
            Self::Refused(Refuse { text, .. }) => format!("{peer} refuses a session: {text}"),
            Self::Failed { text } => format!("no session with {peer}: {text} (its log may say more)"),
        }
    }
}

/// A peer's words as they may be shown on a terminal and in a log: one line, and not without end.
fn shown(text: &str) -> String {
    let mut shown: String =
        text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    let end = (0..=WORDS_LEN_MAX.min(shown.len())).rev().find(|&end| shown.is_char_boundary(end));
    shown.truncate(end.unwrap_or(0));
    shown
}

impl VolumeController {
    /// Something stands between this node and a session.
    pub(super) fn on_obstacle(&mut self, obstacle: Obstacle, actions: &mut Vec<Action>) {
        if self.connection != Connection::Connecting || self.peer.is_some() {
            // An answer that comes too late: there is a session, or none is wanted.
            return;
        }
        let obstacle = match obstacle {
            Obstacle::Refused(Refuse { code, text }) => {
                Obstacle::Refused(Refuse { code, text: shown(&text) })
            }
            other => other,
        };
        if obstacle.is_news_after(self.obstacle.as_ref()) {
            let level = match &obstacle {
                Obstacle::Failed { .. } | Obstacle::Refused(Refuse { code: RefuseCode::Busy, .. }) => {
                    Level::Info
                }
                Obstacle::Unreachable { .. } | Obstacle::Refused(_) => Level::Warn,
            };
            self.log(level, &obstacle.text(&self.settings.peer), actions);
        }
        self.obstacle = Some(obstacle);
    }

    /// The peer's address can be reached; with `willing` the peer also says that it would have a session.
    pub(super) fn on_contact(&mut self, willing: bool, actions: &mut Vec<Action>) {
        let over = match &self.obstacle {
            Some(Obstacle::Unreachable { .. }) => "can be reached again",
            Some(_) if willing => "would have a session again",
            _ => return,
        };
        self.log(Level::Info, &format!("{} {over}", self.settings.peer), actions);
        self.obstacle = None;
    }

    /// Why there is no session, as far as this node knows, for an operator who asked for one.
    pub(super) fn obstacle_text(&self) -> Option<String> {
        Some(self.obstacle.as_ref()?.text(&self.settings.peer))
    }

    /// Whether there is no session, and none will be, until an operator acts.
    pub(super) fn is_parted(&self) -> bool {
        match self.connection {
            Connection::Standalone => true,
            Connection::Connecting => {
                self.refusal.is_some() || self.obstacle.as_ref().is_some_and(Obstacle::is_lasting)
            }
            _ => false,
        }
    }

    /// What a peer that asks is told while this node will have no session; `None` where it would.
    #[must_use]
    pub fn will_refuse(&self) -> Option<Refuse> {
        let VolumeSettings { node, peer, .. } = &self.settings;
        if self.connection != Connection::Standalone {
            return None;
        }
        let text = self.refusal.clone().unwrap_or_else(|| {
            format!("an operator disconnected {node}: {} looks for {peer} again", self.here("connect"))
        });
        Some(Refuse { code: RefuseCode::Disconnected, text })
    }

    /// What an operator may want to know while this node looks for its peer.
    pub(super) fn connecting_advice(&self, frozen: bool) -> String {
        let peer = &self.settings.peer;
        let why = self.obstacle.as_ref().map(|obstacle| obstacle.text(peer) + "; ").unwrap_or_default();
        let serves = matches!(self.role, Role::Primary | Role::Demoting);
        let state = if frozen {
            format!(
                "writes wait for {peer} to return; {} goes on without it: only if {peer} does not serve, or what one of the two \
                 writes is lost",
                self.here("promote --force")
            )
        } else if serves && !self.alone && self.recall.is_some() {
            format!(
                "the link to {peer} broke, and nothing was acknowledged without {peer} since: the session goes on when the link \
                 is back; a write waits for that for `peer_timeout` at most"
            )
        } else if serves {
            format!("serving without {peer}, which is brought up to date when it is back")
        } else if self.is_usable() {
            format!(
                "waiting for {peer}; {} serves without it: only if {peer} does not serve and did not go on alone, or what one of \
                 the two writes is lost",
                self.here("promote")
            )
        } else if self.may_lack_writes() {
            format!(
                "this machine lost power while it served: {peer} may have acknowledged writes that this disk lacks; waiting for \
                 it, to sync from it and serve again"
            )
        } else if self.superblock.is_fresh() {
            format!(
                "a new disk that has never met {peer}'s: start the daemon of {peer}, and the two agree on what the volume holds"
            )
        } else if self.failed_ahead() {
            format!(
                "this disk failed while {peer} did not have all of its data: IT MAY HOLD WRITES THAT {peer} LACKS. Save what can \
                 be read of it before anything else. {} serves what its medium still gives; {}, or {} with the daemon of this \
                 node stopped, gives those writes up",
                self.here("promote --force"),
                self.there("promote"),
                self.here("create --force")
            )
        } else {
            format!("waiting for {peer}, to sync from it")
        };
        why + &state
    }
}
