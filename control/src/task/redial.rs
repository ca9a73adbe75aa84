//! How soon a peer is dialled again after a session. Sans-IO.
//!
//! At once, as a rule: a link that broke while both daemons live costs what was on its way. A path on which sessions begin
//! and nothing of them gets through would hold up the clients' writes again and again, each time for as long as the peer's
//! silence is borne. So after some such sessions in a row the pause grows, and clients are served without the peer meanwhile.

use std::time::Duration;

/// Sessions in a row without a change that got through, after which the pause begins to grow: fewer may be chance.
const FUTILE_MAX: u32 = 2;

/// The first pause, far over `peer_timeout`, so that clients have more good time than bad.
const PAUSE_FIRST: Duration = Duration::from_secs(2);

/// The longest: what it may take until a path that was mended is used again.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// A session that lived so long says nothing about the path, even if nobody wrote: well over the longest silence borne.
const LIVED_WELL: Duration = Duration::from_secs(30);

/// What the sessions that ended lately were like.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Redial {
    futile: u32,
}

impl Redial {
    /// A session with `peer` ended that lived so long; `moved`: some change got through. The pause before the next dial, and
    /// what to say where it is not nothing.
    pub(super) fn session_ended(
        &mut self,
        lived: Duration,
        moved: bool,
        peer: &str,
    ) -> (Duration, Option<String>) {
        self.futile = if moved || lived >= LIVED_WELL { 0 } else { self.futile.saturating_add(1) };
        let Some(over) = self.futile.checked_sub(FUTILE_MAX + 1) else { return (Duration::ZERO, None) };
        let pause = PAUSE_FIRST.saturating_mul(2_u32.saturating_pow(over)).min(PAUSE_MAX);
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
            assert_eq!(redial.session_ended(Duration::from_millis(1300), true, "beta").0, Duration::ZERO);
            assert_eq!(redial.session_ended(Duration::from_millis(1300), false, "beta").0, Duration::ZERO);
        }
        let quiet = Duration::from_secs(31);
        assert!((0..100).all(|_| redial.session_ended(quiet, false, "beta").0 == Duration::ZERO));
    }

    #[test]
    fn sessions_that_come_to_nothing_grow_rarer_and_say_what_it_looks_like() {
        let mut redial = Redial::default();
        let mut end = || redial.session_ended(Duration::from_secs(5), false, "beta");
        let pauses: Vec<u64> = (0..9).map(|_| end().0.as_secs()).collect();
        assert_eq!(pauses, [0, 0, 2, 4, 8, 16, 32, 60, 60]);
        let text = end().1.expect("it is told");
        assert!(text.contains("no change got through") && text.contains("MTU"), "{text}");
        for _ in 0..10_000 {
            redial.session_ended(Duration::ZERO, false, "beta");
        }
        assert_eq!(redial.session_ended(Duration::ZERO, true, "beta").0, Duration::ZERO, "the path is well");
    }
}
