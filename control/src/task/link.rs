//! A volume's memory of its links: which one it uses, why not RDMA, and when to try RDMA again. Sans-IO: time comes in.
//!
//! With `link = "auto"` RDMA that failed is left alone for a pause, so that a standby's return costs a failed attempt
//! once and not each time, and so that a network which lets RDMA connect but not work does not keep the nodes from TCP.
//! Pauses double while nothing gets better. A volume that is set to `rdma` has no pauses: there is nothing else to use.

use super::messages::LinkStatus;
use crate::config::LinkKind;
use crate::link::{Kind, short_note};
use crate::role::Level;
use std::time::Duration;

/// Pause after the first failure: shorter than an operator takes to look, longer than a device's driver to come up.
pub(super) const PAUSE_MIN: Duration = Duration::from_secs(3);

/// Longest pause between two attempts: a cable that was plugged in again is in use within a minute.
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(60);

/// A session over RDMA that ends sooner counts as a failure of RDMA's: an attempt that connects and moves nothing ends
/// with the peer timeout, which is rarely longer.
pub(super) const SHORT: Duration = Duration::from_secs(5);

/// Short sessions in a row that make RDMA pause: one or two may be a peer that was killed as soon as it was up.
pub(super) const SHORT_MAX: u32 = 3;

/// The memory.
#[derive(Debug)]
pub(super) struct LinkKeeper {
    wanted: LinkKind,
    kind: Kind,
    note: Option<String>,
    /// RDMA is left alone until then.
    paused: Option<(Duration, String)>,
    pause: Duration,
    /// Since when a session goes on over RDMA.
    rdma_since: Option<Duration>,
    short: u32,
    /// The session is over TCP, and the peer would take RDMA if it could.
    upgradable: bool,
    next_probe: Duration,
    /// What the log last said.
    logged: Option<String>,
}

impl LinkKeeper {
    pub(super) fn new(wanted: LinkKind, rdma: Result<(), String>) -> Self {
        let kind = if wanted == LinkKind::Tcp || (wanted == LinkKind::Auto && rdma.is_err()) {
            Kind::Tcp
        } else {
            Kind::Rdma
        };
        let note = rdma.err().filter(|_| wanted != LinkKind::Tcp);
        Self {
            wanted,
            kind,
            note,
            paused: None,
            pause: PAUSE_MIN,
            rdma_since: None,
            short: 0,
            upgradable: false,
            next_probe: Duration::ZERO,
            logged: None,
        }
    }

    pub(super) fn status(&self) -> LinkStatus {
        LinkStatus { kind: self.kind, note: self.note.clone() }
    }

    /// What is new for the log: in a few words, `doctor` has the rest. Without a session nothing is carried, and what will be is
    /// not known for certain.
    pub(super) fn news(&mut self, in_session: bool) -> Option<(Level, String)> {
        let only_rdma = self.wanted == LinkKind::Rdma;
        if !only_rdma && !in_session {
            return None;
        }
        let link = self.kind.as_str();
        let (level, text) = match &self.note {
            Some(why) if only_rdma => (Level::Warn, format!("no link: {why}")),
            Some(why) => (Level::Info, format!("the link is {link}: {}", short_note(why))),
            None => (Level::Info, format!("the link is {link}")),
        };
        let is_new = self.logged.as_ref() != Some(&text);
        self.logged = Some(text.clone());
        is_new.then_some((level, text))
    }

    /// Why RDMA is not to be tried now, if so.
    pub(super) fn paused(&self, now: Duration) -> Option<&str> {
        let (until, why) = self.paused.as_ref()?;
        (now < *until).then_some(why.as_str())
    }

    /// RDMA did not come about, or not to last.
    pub(super) fn rdma_failed(&mut self, now: Duration, why: &str) {
        if self.wanted == LinkKind::Auto {
            self.paused = Some((now + self.pause, why.to_owned()));
            self.next_probe = now + self.pause;
            self.pause = (self.pause * 2).min(PAUSE_MAX);
        }
        self.tell(why);
    }

    /// A session began, or went on, over this kind of link; `peer_wants` RDMA when it can.
    pub(super) fn began(&mut self, now: Duration, kind: Kind, why: Option<String>, peer_wants: bool) {
        self.kind = kind;
        self.note = why;
        self.rdma_since = (kind == Kind::Rdma).then_some(now);
        self.upgradable = kind == Kind::Tcp && self.wanted == LinkKind::Auto && peer_wants;
        if kind == Kind::Tcp {
            self.next_probe = self.next_probe.max(now + PAUSE_MIN);
        }
    }

    /// The session ended. Gives why RDMA pauses now, where it does.
    pub(super) fn ended(&mut self, now: Duration, reason: &str) -> Option<String> {
        self.upgradable = false;
        let since = self.rdma_since.take()?;
        if now.saturating_sub(since) >= SHORT {
            self.short = 0;
            self.pause = PAUSE_MIN;
            return None;
        }
        self.short += 1;
        if self.short < SHORT_MAX || self.wanted != LinkKind::Auto {
            return None;
        }
        self.short = 0;
        let why = format!("RDMA connected and did not last, {SHORT_MAX} times, the last time: {reason}");
        self.rdma_failed(now, &why);
        Some(why)
    }

    /// Whether it is time to try to take the session on to RDMA; if so the next time is a pause later.
    pub(super) fn probe_due(&mut self, now: Duration) -> bool {
        let due = self.upgradable && now >= self.next_probe;
        if due {
            self.next_probe = now + self.pause;
            self.pause = (self.pause * 2).min(PAUSE_MAX);
        }
        due
    }

    /// Notes why there is no RDMA, or no link at all.
    pub(super) fn tell(&mut self, why: &str) {
        self.note = Some(why.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn before_any_session_the_kind_is_what_it_would_be() {
        let no = || Err("no device".to_owned());
        let status = |wanted, rdma| {
            let LinkStatus { kind, note } = LinkKeeper::new(wanted, rdma).status();
            (kind, note.is_some())
        };
        assert_eq!(status(LinkKind::Auto, Ok(())), (Kind::Rdma, false));
        assert_eq!(status(LinkKind::Auto, no()), (Kind::Tcp, true));
        assert_eq!(status(LinkKind::Rdma, no()), (Kind::Rdma, true));
        assert_eq!(status(LinkKind::Tcp, no()), (Kind::Tcp, false));
    }

    #[test]
    fn failures_pause_rdma_longer_and_longer_and_a_lasting_session_ends_that() {
        let mut keeper = LinkKeeper::new(LinkKind::Auto, Ok(()));
        let mut now = s(10);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            keeper.rdma_failed(now, "refused");
            let began = now;
            while keeper.paused(now).is_some() {
                now += s(1);
            }
            pauses.push((now - began).as_secs());
        }
        assert_eq!(pauses, [3, 6, 12, 24, 48, 60, 60]);
        keeper.began(now, Kind::Rdma, None, true);
        assert_eq!(keeper.status(), LinkStatus { kind: Kind::Rdma, note: None });
        assert_eq!(keeper.ended(now + SHORT, "killed"), None);
        keeper.rdma_failed(now, "refused");
        assert!(keeper.paused(now + s(2)).is_some() && keeper.paused(now + s(3)).is_none());
    }

    #[test]
    fn rdma_that_connects_and_never_lasts_gives_way_to_tcp() {
        let mut keeper = LinkKeeper::new(LinkKind::Auto, Ok(()));
        let mut only = LinkKeeper::new(LinkKind::Rdma, Ok(()));
        for round in 1..=SHORT_MAX {
            for keeper in [&mut keeper, &mut only] {
                keeper.began(s(0), Kind::Rdma, None, true);
            }
            let gave_way = keeper.ended(s(1), "nothing heard");
            assert_eq!(gave_way.is_some(), round == SHORT_MAX);
            assert_eq!(only.ended(s(1), "nothing heard"), None);
        }
        assert!(keeper.paused(s(2)).is_some_and(|why| why.contains("nothing heard")));
        assert_eq!(only.paused(s(2)), None, "there is nothing else to use");
        only.rdma_failed(s(2), "refused");
        assert_eq!(only.paused(s(2)), None, "there is nothing else to use");
    }

    #[test]
    fn a_session_over_tcp_is_probed_with_pauses_while_the_peer_would_have_rdma() {
        let mut keeper = LinkKeeper::new(LinkKind::Auto, Ok(()));
        keeper.began(s(0), Kind::Tcp, Some("no device".into()), true);
        let due: Vec<u64> = (0..120).filter(|&at| keeper.probe_due(s(at))).collect();
        assert_eq!(due, [3, 6, 12, 24, 48, 96]);
        keeper.tell("still none");
        assert_eq!(keeper.status(), LinkStatus { kind: Kind::Tcp, note: Some("still none".into()) });
        keeper.ended(s(200), "gone");
        assert!(!keeper.probe_due(s(500)), "there is no session");
        keeper.began(s(500), Kind::Tcp, Some("older".into()), false);
        assert!(!keeper.probe_due(s(900)), "the peer would not have it");
        keeper.began(s(900), Kind::Rdma, None, true);
        assert!(!keeper.probe_due(s(2000)), "it is RDMA already");
    }
}
