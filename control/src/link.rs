//! Which link two nodes take: RDMA, TCP, or none. Sans-IO: the choice is a function of what both said in their hellos.
//!
//! A node's [`Voice`] is what its configuration wants and what it can do at this moment. Each hello carries one
//! (`links`, `no_rdma`), both nodes put the same two voices into [`choose`] and get the same answer, so neither has to
//! be asked. RDMA is preferred wherever both have it. What a choice of RDMA still needs, a connection that comes about,
//! is the conversation's matter (`node::peers`).
//!
//! Survives any peer: unknown kinds of link are passed over, and a peer without a kind in common is refused in words
//! that say which side to change.

use crate::config::LinkKind;
use serde::{Deserialize, Serialize};

/// Bytes of a reason a peer may give: a sentence or two of ours; more is cut before it is sent and refused when read.
pub const REASON_LEN_MAX: usize = 500;

/// What carries a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// RDMA writes.
    Rdma,
    /// A TCP stream.
    Tcp,
}

impl Kind {
    /// As hellos and the configuration write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rdma => "rdma",
            Self::Tcp => "tcp",
        }
    }
}

/// What one node says about links.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Voice {
    /// Kinds it can carry on with at this moment and is configured to, best first.
    pub links: Vec<String>,
    /// Why RDMA is not among them although it is configured to.
    pub no_rdma: Option<String>,
}

impl Voice {
    /// The voice of a node that is configured for `wanted` and for which RDMA is possible, or not for a reason.
    #[must_use]
    pub fn new(wanted: LinkKind, rdma: Result<(), String>) -> Self {
        let mut voice = Self { links: Vec::new(), no_rdma: None };
        if wanted != LinkKind::Tcp {
            match rdma {
                Ok(()) => voice.links.push(Kind::Rdma.as_str().to_owned()),
                Err(why) => voice.no_rdma = Some(reason(&why)),
            }
        }
        if wanted != LinkKind::Rdma {
            voice.links.push(Kind::Tcp.as_str().to_owned());
        }
        voice
    }

    /// Whether `kind` is among the links.
    #[must_use]
    pub fn has(&self, kind: Kind) -> bool {
        self.links.iter().any(|link| link == kind.as_str())
    }

    /// Whether the speaker would take RDMA if it could: it speaks a release that knows of it, and is not set to TCP.
    #[must_use]
    pub fn wants_rdma(&self) -> bool {
        self.has(Kind::Rdma) || self.no_rdma.is_some()
    }

    /// RDMA turned out to be impossible after all.
    pub fn lose_rdma(&mut self, why: &str) {
        self.links.retain(|link| link != Kind::Rdma.as_str());
        self.no_rdma = Some(reason(why));
    }
}

/// A text as a reason that a peer takes: whole characters, no more than [`REASON_LEN_MAX`] bytes.
#[must_use]
pub fn reason(text: &str) -> String {
    let mut end = text.len().min(REASON_LEN_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

/// What a reason says first, without what to do about it: where the whole of it would be said again for each volume.
#[must_use]
pub fn gist(reason: &str) -> &str {
    let end = ["; ", ": ", " ("].iter().filter_map(|mark| reason.find(mark)).min().unwrap_or(reason.len());
    &reason[..end]
}

/// A note on why a link is not RDMA, in a few words where it is for want of RDMA: which nodes, and the [`gist`] of it. Any
/// other note, such as one on an attempt that failed, stays whole.
#[must_use]
pub fn short_note(note: &str) -> String {
    const NONE: &str = " has no RDMA: ";
    let Some((name, mut rest)) = note.split_once(NONE) else { return note.to_owned() };
    let mut lacking = Vec::new();
    let mut name = name.to_owned();
    loop {
        // The next node's name is the last word before the mark, behind the end of this one's reason.
        let next = rest.find(NONE).map(|at| rest[..at].rfind("; ").map_or((0, at), |from| (from + 2, at)));
        match next {
            Some((from, at)) => {
                lacking.push((name, gist(&rest[..from.saturating_sub(2)])));
                name = rest[from..at].to_owned();
                rest = &rest[at + NONE.len()..];
            }
            None => {
                lacking.push((name, gist(rest)));
                break;
            }
        }
    }
    let [(_, first), others @ ..] = &lacking[..] else { return note.to_owned() };
    if others.iter().all(|(_, reason)| reason == first) {
        let names: Vec<_> = lacking.iter().map(|(name, _)| name.as_str()).collect();
        return format!("no RDMA on {} ({first})", names.join(" and "));
    }
    let each: Vec<_> = lacking.iter().map(|(name, reason)| format!("{name} ({reason})")).collect();
    format!("no RDMA on {}", each.join(" and "))
}

/// What two voices come to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Choice {
    /// RDMA: both have it.
    Rdma,
    /// TCP.
    Tcp {
        /// Why not RDMA, where this node would have taken it.
        why: Option<String>,
    },
    /// No kind in common.
    Refused {
        /// Why, for both operators: it names the nodes.
        text: String,
    },
}

/// The link of a session between `me` and `them`, each with its name. The kind is the same on both sides.
#[must_use]
pub fn choose(me: (&str, &Voice), them: (&str, &Voice)) -> Choice {
    let common = |kind| me.1.has(kind) && them.1.has(kind);
    if common(Kind::Rdma) {
        return Choice::Rdma;
    }
    if common(Kind::Tcp) {
        let why = me.1.wants_rdma().then(|| without_rdma(me, them));
        return Choice::Tcp { why };
    }
    let one = if me.1.has(Kind::Tcp) { them } else { me };
    let text = if one.1.has(Kind::Tcp) {
        // Neither lacks TCP, so an unknown kind is all there could be in common.
        format!("{} and {} have no kind of link in common", me.0, them.0)
    } else {
        let why = without_rdma(me, them);
        format!("{} has link = \"rdma\" and nothing else, and {why}", one.0)
    };
    Choice::Refused { text }
}

/// Why two nodes that do not both have RDMA do not. This node's own reason first: it is the one that can be mended here.
fn without_rdma(me: (&str, &Voice), them: (&str, &Voice)) -> String {
    let lacking = [me, them].into_iter().filter(|(_, voice)| !voice.has(Kind::Rdma));
    let told: Vec<_> = lacking
        .map(|(name, voice)| match &voice.no_rdma {
            Some(why) => format!("{name} has no RDMA: {why}"),
            None => format!("{name} does not offer RDMA: it has link = \"tcp\", or is of an older release"),
        })
        .collect();
    told.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WANTED: [LinkKind; 3] = [LinkKind::Rdma, LinkKind::Tcp, LinkKind::Auto];

    fn voice(wanted: LinkKind, able: bool) -> Voice {
        Voice::new(wanted, if able { Ok(()) } else { Err("no device".to_owned()) })
    }

    /// Every combination of two configurations and two abilities, each seen from both sides.
    #[test]
    fn the_choice_follows_both_configurations_and_both_abilities() {
        use LinkKind::{Auto, Rdma, Tcp};
        let mut seen = 0;
        for (mine, theirs) in WANTED.into_iter().flat_map(|mine| WANTED.map(|theirs| (mine, theirs))) {
            for (me_able, they_able) in [(true, true), (true, false), (false, true), (false, false)] {
                let (me, them) = (voice(mine, me_able), voice(theirs, they_able));
                let here = choose(("alpha", &me), ("beta", &them));
                let there = choose(("beta", &them), ("alpha", &me));
                let expected = match (mine, theirs) {
                    (Tcp, Tcp) | (Tcp, Auto) | (Auto, Tcp) => "tcp",
                    (Tcp, Rdma) | (Rdma, Tcp) => "refused",
                    (Rdma, Rdma | Auto) | (Auto, Rdma) if me_able && they_able => "rdma",
                    (Rdma, _) | (_, Rdma) => "refused",
                    (Auto, Auto) if me_able && they_able => "rdma",
                    (Auto, Auto) => "tcp",
                };
                for choice in [&here, &there] {
                    let found = match choice {
                        Choice::Rdma => "rdma",
                        Choice::Tcp { .. } => "tcp",
                        Choice::Refused { .. } => "refused",
                    };
                    assert_eq!(found, expected, "{mine:?} {me_able} {theirs:?} {they_able}: {choice:?}");
                }
                if let Choice::Tcp { why } = here {
                    assert_eq!(why.is_some(), mine == Auto, "a node set to TCP misses nothing");
                }
                seen += 1;
            }
        }
        assert_eq!(seen, 36);
    }

    #[test]
    fn a_refusal_and_a_fallback_say_whom_to_look_at() {
        let text = |mine, me_able, theirs, they_able| {
            let (me, them) = (voice(mine, me_able), voice(theirs, they_able));
            match choose(("alpha", &me), ("beta", &them)) {
                Choice::Rdma => "rdma".to_owned(),
                Choice::Tcp { why } => why.expect("told"),
                Choice::Refused { text } => text,
            }
        };
        use LinkKind::{Auto, Rdma, Tcp};
        assert_eq!(text(Auto, false, Auto, true), "alpha has no RDMA: no device");
        assert_eq!(
            text(Auto, false, Auto, false),
            "alpha has no RDMA: no device; beta has no RDMA: no device"
        );
        assert_eq!(
            text(Auto, true, Tcp, true),
            "beta does not offer RDMA: it has link = \"tcp\", or is of an older release"
        );
        assert_eq!(
            text(Rdma, false, Auto, true),
            "alpha has link = \"rdma\" and nothing else, and alpha has no RDMA: no device"
        );
        assert_eq!(
            text(Tcp, true, Rdma, true),
            "beta has link = \"rdma\" and nothing else, and alpha does not offer RDMA: it has link = \"tcp\", or is of \
             an older release"
        );
    }

    #[test]
    fn an_older_release_and_a_later_one_get_tcp() {
        let old = Voice { links: vec!["tcp".into()], no_rdma: None };
        let later = Voice { links: vec!["cxl".into(), "tcp".into()], no_rdma: None };
        let me = voice(LinkKind::Auto, true);
        for them in [old, later] {
            assert!(matches!(choose(("a", &me), ("b", &them)), Choice::Tcp { why: Some(_) }));
        }
        let strange = Voice { links: vec!["cxl".into()], no_rdma: None };
        assert!(matches!(choose(("a", &me), ("b", &strange)), Choice::Refused { .. }));
    }

    #[test]
    fn a_note_for_want_of_rdma_is_short_and_any_other_is_whole() {
        let none = "no RDMA device; on any network card a software one will do: costandby soft-roce up NETDEV (that is: \
                    modprobe rdma_rxe && rdma link add rxe0 type rxe netdev NETDEV)";
        let library = "libibverbs.so.1 cannot be loaded: install the Debian packages libibverbs1 librdmacm1";
        let note = format!("alpha has no RDMA: {none}; beta has no RDMA: {none}");
        assert_eq!(short_note(&note), "no RDMA on alpha and beta (no RDMA device)");
        let note = format!("alpha has no RDMA: {library}; beta has no RDMA: {none}");
        let each = "no RDMA on alpha (libibverbs.so.1 cannot be loaded) and beta (no RDMA device)";
        assert_eq!(short_note(&note), each);
        assert_eq!(short_note(&format!("beta has no RDMA: {none}")), "no RDMA on beta (no RDMA device)");
        for whole in [
            "alpha could not connect by RDMA: time is up while waiting for the peer to accept",
            "beta does not offer RDMA: it has link = \"tcp\", or is of an older release",
            "",
        ] {
            assert_eq!(short_note(whole), whole);
        }
    }

    proptest! {
        #[test]
        fn any_note_can_be_shortened(parts in prop::collection::vec("( has no RDMA: |; |[a-z:é( ]{0,6})", 0..9)) {
            let _ = short_note(&parts.concat());
        }

        #[test]
        fn a_reason_is_cut_at_a_character(text in ".{0,700}") {
            let cut = reason(&text);
            prop_assert!(cut.len() <= REASON_LEN_MAX && text.starts_with(&cut));
            prop_assert!(cut.len() + 4 > REASON_LEN_MAX || cut == text);
        }
    }

    #[test]
    fn rdma_that_is_lost_after_all_is_not_offered() {
        let mut voice = voice(LinkKind::Auto, true);
        voice.lose_rdma("no port is up");
        assert_eq!(voice.links, ["tcp"]);
        assert_eq!(voice.no_rdma.as_deref(), Some("no port is up"));
        assert!(voice.wants_rdma());
    }
}
