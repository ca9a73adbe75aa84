//! How soon a peer is dialled, or answered, again after a session or a handshake. Sans-IO.
//!
//! At once, as a rule: a link that broke while both daemons live costs what was on its way. A path on which sessions begin
//! and nothing of them gets through would hold up the clients' writes again and again, each time for as long as the peer's
//! silence is borne. So after some such sessions in a row the pause grows, and clients are served without the peer meanwhile.
//! A handshake that ends after this node's `ready` is alike: each one costs a store of the metadata. Both nodes count, for either
//! may be the one that dials: who is dialled
//! answers `busy` for a while.

use std::time::Duration;

/// Sessions in a row without a change that got through, after which the pause begins to grow: fewer may be chance.
const FUTILE_MAX: u32 = 2;

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

/// A session that lived so long says nothing about the path, even if nobody wrote: well over the longest silence borne.
const LIVED_WELL: Duration = Duration::from_secs(30);

/// What the sessions that ended lately were like.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Redial {
    futile: u32,
    /// Since when this node has been ready for a session that has not begun.
    ready: Option<Duration>,
    /// When the last futile session or handshake ended, and how long it had lasted.
    ended: Option<(Duration, Duration)>,
}

/// The pause after so many sessions in a row that came to nothing.
fn pause(futile: u32) -> Duration {
    let over = futile.checked_sub(FUTILE_MAX + 1);
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
            self.futile = self.futile.saturating_add(1);
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
        pause(self.futile).min(HANDSHAKE_PAUSE_MAX)
    }

    /// Whether a hello of a peer that dials is answered now. After some futile sessions in a row clients are left in peace for
    /// several times as long as the last one held them up.
    pub(super) fn answers(&self, now: Duration) -> bool {
        let Some((ended, lasted)) = self.ended.filter(|_| self.futile > FUTILE_MAX) else { return true };
        let rest = (PEACE * lasted).max(ANSWER_PAUSE_MIN).min(PAUSE_MAX / 2);
        now.saturating_sub(ended) >= rest
    }

    /// A session with `peer` ended that lived so long; `moved`: some change got through. The pause before the next dial, and
    /// what to say where it is not nothing.
    pub(super) fn session_ended(
        &mut self,
        now: Duration,
        lived: Duration,
        moved: bool,
        peer: &str,
    ) -> (Duration, Option<String>) {
        self.futile = if moved || lived >= LIVED_WELL { 0 } else { self.futile.saturating_add(1) };
        self.ended = Some((now, lived));
        let pause = pause(self.futile);
        if pause.is_zero() {
            return (pause, None);
        }
        let text = format!(
            "{} sessions in a row with {peer} began and ended, and no change got through: small messages pass and large ones do \
             not? Check the MTU of the path on both nodes (`ip link`; `ping -M do -s 1472 {peer}` from either). The next \
             attempt follows in {} s",
            self.futile,
            pause.as_secs()
        );
        (pause, Some(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_breaks_now_and_then_costs_no_pause() {
        let mut redial = Redial::default();
        for _ in 0..100 {
            assert_eq!(
                redial.session_ended(Duration::ZERO, Duration::from_millis(1300), true, "beta").0,
                Duration::ZERO
            );
            assert_eq!(
                redial.session_ended(Duration::ZERO, Duration::from_millis(1300), false, "beta").0,
                Duration::ZERO
            );
        }
        let quiet = Duration::from_secs(31);
        assert!(
            (0..100).all(|_| redial.session_ended(Duration::ZERO, quiet, false, "beta").0 == Duration::ZERO)
        );
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
                    redial.session_ended(now, lasts, false, "beta");
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
        redial.session_ended(Duration::ZERO, Duration::from_secs(1), true, "beta");
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
            redial.session_ended(now, Duration::from_millis(900), true, "beta");
            assert!(redial.answers(now));
        }
    }

    #[test]
    fn sessions_that_come_to_nothing_grow_rarer_and_say_what_it_looks_like() {
        let mut redial = Redial::default();
        let mut end = || redial.session_ended(Duration::ZERO, Duration::from_secs(5), false, "beta");
        let pauses: Vec<u64> = (0..9).map(|_| end().0.as_secs()).collect();
        assert_eq!(pauses, [0, 0, 2, 4, 8, 16, 32, 60, 60]);
        let text = end().1.expect("it is told");
        assert!(text.contains("no change got through") && text.contains("MTU"), "{text}");
        for _ in 0..10_000 {
            redial.session_ended(Duration::ZERO, Duration::ZERO, false, "beta");
        }
        assert_eq!(
            redial.session_ended(Duration::ZERO, Duration::ZERO, true, "beta").0,
            Duration::ZERO,
            "the path is well"
        );
    }
}
