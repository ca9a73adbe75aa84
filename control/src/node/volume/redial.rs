//! How soon a peer is dialled, or answered, again after a session or a handshake. Sans-IO.
//!
//! At once, as a rule: a link that broke while both daemons live costs what was on its way. A path on which sessions begin
//! and then stand still would hold up the clients' writes again and again, each time for as long as the peer's silence is
//! borne. So after some such sessions in a row the pause grows, and clients are served without the peer meanwhile.
//!
//! A session in which nobody wrote says nothing about the path. A source knows that itself; a target hears of it in the hello
//! that follows ([`Redial::told`]). An operator's `connect` begins anew, as does the start of the peer's daemon.
//!
//! A handshake that ends after this node's `ready` is alike: each one costs a store of the metadata. Both nodes count, for either
//! may be the one that dials: who is dialled
//! answers `busy` for a while.

use crate::generation::Recall;
use costandby_datapath::reactor::command::Parted;
use std::time::Duration;

/// What a session counts that stood still, and a handshake that came to nothing. A short session says little, as it may have been
/// cut before anything could get through.
const COUNT_ONE: u32 = 4;
const COUNT_SHORT: u32 = 1;

/// From how long on it is no short one: several times what a session takes from its beginning to its first change, and less than
/// a session in which nothing is heard lasts, with the default `peer_timeout`.
const LONG: Duration = Duration::from_millis(400);

/// The pause begins to grow with the second long one in a row, the third handshake, or the eighth short one. Fewer may be chance.
const COUNT_MAX: u32 = 2 * COUNT_ONE;

/// The first pause, far over `peer_timeout`, so that clients have more good time than bad.
const PAUSE_FIRST: Duration = Duration::from_secs(2);

/// The longest: what it may take until a path that was mended is used again.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// The longest after a handshake: what mends it is an operator's act on the peer, who waits for the outcome.
const HANDSHAKE_PAUSE_MAX: Duration = Duration::from_secs(8);

/// What clients have of good time for each bad one, where the peer dials.
const PEACE: u32 = 4;

/// The least time between two answers to a peer whose sessions come to nothing: a store of the metadata each.
const ANSWER_PAUSE_MIN: Duration = Duration::from_millis(50);

/// What became of the changes of a session that ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Moved {
    /// They got through until it ended.
    Yes,
    /// There were none: nobody wrote, and there was nothing to copy.
    Idle,
    /// None, or none any more, although there were some; or, as far as a target knows, there may have been some.
    No,
}

impl Moved {
    /// By what the datapath says at the end of a session. `diskless`: this node's reads go over the link.
    pub(super) fn of(moved: bool, parted: Option<&Parted>, diskless: bool) -> Self {
        let idle = |parted: &Parted| parted.source && parted.map_told && parted.numbered == parted.applied;
        match parted {
            _ if moved => Self::Yes,
            Some(parted) if !diskless && idle(parted) => Self::Idle,
            _ => Self::No,
        }
    }
}

/// What the sessions that ended lately were like.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Redial {
    /// In [`COUNT_SHORT`].
    futile: u32,
    /// What the last session counted.
    last: u32,
    /// The log has it.
    said: bool,
    /// Since when this node has been ready for a session that has not begun.
    ready: Option<Duration>,
    /// When the last futile session or handshake ended, and how long it had lasted.
    ended: Option<(Duration, Duration)>,
}

/// The pause after sessions in a row that came to nothing and count so much.
fn pause(futile: u32) -> Duration {
    let over = futile.checked_sub(COUNT_MAX).map(|over| over / COUNT_ONE);
    over.map_or(Duration::ZERO, |over| PAUSE_FIRST.saturating_mul(2_u32.saturating_pow(over)).min(PAUSE_MAX))
}

impl Redial {
    /// A handshake has come to this node's `ready`.
    pub(super) fn ready_said(&mut self, now: Duration) {
        self.handshake_ended(now);
        self.ready = Some(now);
    }

    /// The session that it was for has begun.
    pub(super) fn session_began(&mut self) {
        self.ready = None;
    }

    /// The handshake is over. Counts where this node had said that it is ready.
    pub(super) fn handshake_ended(&mut self, now: Duration) {
        if let Some(since) = self.ready.take() {
            self.futile = self.futile.saturating_add(COUNT_ONE);
            self.ended = Some((now, now.saturating_sub(since)));
        }
    }

    /// The peer was heard in the session that ended last: it held nobody up by saying nothing.
    pub(super) fn session_was_heard(&mut self) {
        if let Some((_, lasted)) = &mut self.ended {
            *lasted = Duration::ZERO;
        }
    }

    /// The pause before the next dial where the last handshake came to nothing.
    pub(super) fn after_handshake(&self) -> Duration {
        pause(self.futile.saturating_sub(COUNT_ONE)).min(HANDSHAKE_PAUSE_MAX)
    }

    /// Whether a hello of a peer that dials is answered now. After some futile sessions in a row clients are left in peace for
    /// several times as long as the last one held them up.
    pub(super) fn answers(&self, now: Duration) -> bool {
        let Some((ended, lasted)) = self.ended.filter(|_| self.futile > COUNT_MAX) else { return true };
        let rest = (PEACE * lasted).max(ANSWER_PAUSE_MIN).min(PAUSE_MAX / 2);
        now.saturating_sub(ended) >= rest
    }

    /// A session with `peer` ended that lived so long. The pause before the next dial, and what to say, once, where it begins to
    /// be more than nothing.
    pub(super) fn session_ended(
        &mut self,
        now: Duration,
        lived: Duration,
        moved: Moved,
        peer: &str,
    ) -> (Duration, Option<String>) {
        self.last = match moved {
            Moved::Yes | Moved::Idle => {
                *self = Self::default();
                return (Duration::ZERO, None);
            }
            Moved::No if lived >= LONG => COUNT_ONE,
            Moved::No => COUNT_SHORT,
        };
        self.futile = self.futile.saturating_add(self.last);
        self.ended = Some((now, lived));
        let pause = pause(self.futile);
        if pause.is_zero() || std::mem::replace(&mut self.said, true) {
            return (pause, None);
        }
        let text = format!(
            "sessions with {peer} begin and then stand still: small messages pass and large ones do not? Check the MTU of the path on \
             both nodes (`ip link`; `ping -M do -s 1472` to the other's address). {peer} is dialled ever more rarely until changes \
             get through, after {} s now and every {} s in the end; `connect` on both nodes has it dialled at once",
            pause.as_secs(),
            PAUSE_MAX.as_secs()
        );
        (pause, Some(text))
    }

    /// What the peer remembers of the session before, in its hello: a source says whether there were changes to get through.
    pub(super) fn told(&mut self, recall: Option<&Recall>) {
        let idle = |recall: &Recall| {
            recall.source && !recall.diskless && recall.map_told && recall.numbered == recall.applied
        };
        if recall.is_some_and(idle) {
            self.futile = self.futile.saturating_sub(std::mem::take(&mut self.last));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use costandby_datapath::units::{Epoch, Seq};

    const STILL: Duration = Duration::from_millis(1300);

    #[test]
    fn a_link_that_breaks_now_and_then_costs_no_pause() {
        let mut redial = Redial::default();
        for _ in 0..100 {
            assert_eq!(redial.session_ended(Duration::ZERO, STILL, Moved::Yes, "beta").0, Duration::ZERO);
            assert_eq!(redial.session_ended(Duration::ZERO, STILL, Moved::No, "beta").0, Duration::ZERO);
        }
        assert!((0..100).all(|_| redial.session_ended(Duration::ZERO, STILL, Moved::Idle, "beta").0 == Duration::ZERO));
    }

    /// How often a peer's hellos are answered in ten minutes, and for how long the clients wait in all, where each session or
    /// handshake comes to nothing after `lasts`.
    fn answered(lasts: Duration, session: bool) -> (u32, Duration) {
        let (mut redial, mut now, mut count) = (Redial::default(), Duration::ZERO, 0);
        while now < Duration::from_secs(600) {
            if redial.answers(now) {
                redial.ready_said(now);
                now += lasts;
                if session {
                    redial.session_began();
                    redial.session_ended(now, lasts, Moved::No, "beta");
                } else {
                    redial.handshake_ended(now);
                }
                count += 1;
            }
            now += Duration::from_millis(1);
        }
        (count, lasts * count)
    }

    #[test]
    fn a_peer_that_comes_to_nothing_costs_few_stores_and_little_of_the_clients_time() {
        for session in [true, false] {
            let (stores, _) = answered(Duration::from_millis(1), session);
            assert!(stores < 20 * 600 + 10, "{stores} stores in ten minutes");
            let (_, held) = answered(Duration::from_millis(500), session);
            assert!(held < Duration::from_secs(125), "{held:?} of ten minutes");
        }
        let mut redial = Redial::default();
        for second in 0..9 {
            redial.ready_said(Duration::from_secs(second));
        }
        assert_eq!(redial.after_handshake(), HANDSHAKE_PAUSE_MAX);
        redial.session_began();
        redial.session_ended(Duration::ZERO, LONG, Moved::Yes, "beta");
        assert!(redial.answers(Duration::ZERO) && redial.after_handshake().is_zero(), "a change got through");
    }

    #[test]
    fn a_peer_whose_link_breaks_a_few_times_is_answered_at_once() {
        let mut redial = Redial::default();
        for second in 0..100 {
            let now = Duration::from_secs(second);
            redial.ready_said(now);
            assert!(redial.answers(now), "it began anew");
            redial.session_began();
            redial.session_ended(now, Duration::from_millis(900), Moved::Yes, "beta");
            assert!(redial.answers(now));
        }
    }

    #[test]
    fn sessions_that_come_to_nothing_grow_rarer_and_say_once_what_it_looks_like() {
        let mut redial = Redial::default();
        let ends: Vec<_> =
            (0..8).map(|_| redial.session_ended(Duration::ZERO, STILL, Moved::No, "beta")).collect();
        let pauses: Vec<u64> = ends.iter().map(|(pause, _)| pause.as_secs()).collect();
        assert_eq!(pauses, [0, 2, 4, 8, 16, 32, 60, 60]);
        let said: Vec<_> = ends.into_iter().filter_map(|(_, text)| text).collect();
        assert!(said.len() == 1 && said[0].contains("stand still") && said[0].contains("MTU"), "{said:?}");
        for _ in 0..10_000 {
            redial.session_ended(Duration::ZERO, Duration::from_secs(50), Moved::No, "beta");
        }
        assert_eq!(
            redial.session_ended(Duration::ZERO, STILL, Moved::Yes, "beta").0,
            Duration::ZERO,
            "the path is well"
        );
        // Cut before anything could get through, or ended by something that is wrong with the sessions.
        let short = Duration::from_millis(10);
        let pauses: Vec<u64> = (0..13)
            .map(|_| redial.session_ended(Duration::ZERO, short, Moved::No, "beta").0.as_secs())
            .collect();
        assert_eq!(pauses, [0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 4, 4]);
    }

    #[test]
    fn a_session_in_which_nobody_wrote_says_nothing_of_the_path_on_either_node() {
        let end = |source, applied, numbered| Parted {
            source,
            epoch: Epoch(3),
            applied: Seq(applied),
            numbered: Seq(numbered),
            map_told: source,
        };
        assert_eq!(Moved::of(false, Some(&end(true, 7, 7)), false), Moved::Idle);
        assert_eq!(Moved::of(false, Some(&end(true, 7, 7)), true), Moved::No, "reads go over the link");
        assert_eq!(Moved::of(false, Some(&end(true, 7, 9)), false), Moved::No);
        assert_eq!(Moved::of(true, Some(&end(true, 7, 9)), false), Moved::Yes);
        assert_eq!(Moved::of(false, Some(&Parted { map_told: false, ..end(true, 7, 7) }), false), Moved::No);
        assert_eq!(Moved::of(false, None, false), Moved::No);
        // A target cannot know, and is told before its pause begins to grow.
        let recall = |numbered| Recall {
            session: [1, 2],
            epoch: 3,
            generation: 5,
            source: true,
            applied: 7,
            numbered,
            map_told: true,
            alone: true,
            diskless: false,
        };
        let mut redial = Redial::default();
        for _ in 0..20 {
            let moved = Moved::of(false, Some(&end(false, 7, 7)), false);
            assert_eq!(redial.session_ended(Duration::ZERO, STILL, moved, "beta").0, Duration::ZERO);
            redial.told(Some(&recall(7)));
        }
        for _ in 0..4 {
            redial.session_ended(Duration::ZERO, STILL, Moved::No, "beta");
            redial.told(Some(&recall(9)));
            redial.told(None);
        }
        assert_eq!(redial.session_ended(Duration::ZERO, STILL, Moved::No, "beta").0, Duration::from_secs(16));
    }
}
