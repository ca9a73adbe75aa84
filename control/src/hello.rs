//! What two controllers tell each other over a fresh connection before it becomes a volume's link. Each message is sealed:
//! both nodes have proved the pair's key before the first one ([`crate::secure`]).
//!
//! ```text
//! dialer ── Hello ──▶ acceptor        the acceptor answers the hello it read with its own
//!        ◀── Hello ──                 with an offer where both have RDMA: where to connect; the secret is the connection's
//!        ══ RDMA connect ══▶          only after an offer, as is the next message
//!        ── Link ──▶                  what came of it: RDMA, or TCP and why
//!        ── Ready ──▶                 each has decided (`generation::agree`) and stored what it agreed to
//!        ◀── Ready ──                 or either says Refuse, and the connection ends
//! ══ frames (`datapath::wire`) ══      here, or over RDMA with this connection as its companion
//! ```
//!
//! A session over TCP may be taken on to RDMA over a second connection, which the dialer begins with `Ask`:
//!
//! ```text
//! dialer ── Ask ──▶ acceptor          for RDMA
//!        ◀── Offer ──
//!        ══ RDMA connect ══▶
//!        ── Link ──▶
//!        ◀── Link ──                  the acceptor has the RDMA connection too; the dialer closes the session's link
//!        ── Hello ──▶                 and so on as above, over these connections: the session goes on
//! ```
//!
//! A node whose disk cannot be opened has no hello, and dials nobody: it refuses whoever begins with a `Hello`, or with the
//! `Ask` by which a peer that waits to be dialled asks why it is not.
//!
//! An envelope is `magic[8] version[1] len[4] crc32c[4]`, little-endian, then `len` bytes of JSON, which the CRC-32C
//! covers. Unknown keys are ignored, so a later release may add some. Decoding never panics, and never allocates more
//! than [`limits::HELLO_LEN_MAX`] at a peer's word.

use crate::compared::{Settings, is_bounded};
use crate::generation::{Agreement, Lineage, Recall, ServingRole, View};
use crate::link::{Kind, REASON_LEN_MAX, Voice};
use crate::secure::handshake::{self, SecureError};
use costandby_datapath::disk::superblock::{DiskState, Generations, NAME_LEN_MAX};
use costandby_datapath::limits::{self, GENERATION_HISTORY_LEN};
use costandby_datapath::units::{Epoch, Generation};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// First bytes of every envelope.
pub const MAGIC: [u8; 8] = handshake::MAGIC;

/// Version of the envelope and of what its messages mean.
pub const VERSION: u8 = handshake::VERSION;

/// How far a peer's epoch may be beyond this node's: a promotion a second for 136 years, where each adds one. What is further
/// is a lie or damage, and whoever adopted it would have no epochs left to go on with.
pub const EPOCH_STEP_MAX: u64 = 1 << 32;

/// Link kinds one hello may offer: three exist.
const LINKS_MAX: usize = 16;

/// Bytes before the JSON.
pub const ENVELOPE_LEN: usize = 17;

/// What a node says first.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Who speaks.
    pub node: String,
    /// The volume the connection is for.
    pub volume: String,
    /// Bytes of ring the speaker offers as receiver.
    pub ring_len: u64,
    /// Link kinds the speaker can carry on with, best first.
    pub links: Vec<String>,
    /// Random, another for each conversation. Both sides' together name a session.
    pub nonce: u64,
    /// Random, another for each start of the speaker's daemon. Only texts rest on it: what a node remembers of a session
    /// proves more.
    #[serde(default)]
    pub incarnation: u64,
    /// The acceptor's, where the dialer's links and its own have RDMA: the dialer connects there next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdma: Option<RdmaOffer>,
    /// Why RDMA is not among the links although the speaker is configured to take it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_rdma: Option<String>,
    /// What must agree in both nodes' configurations, as the speaker's has it.
    #[serde(default, skip_serializing_if = "Settings::is_empty")]
    pub settings: Settings,
    /// The speaker's disk.
    #[serde(with = "stored_view")]
    pub view: View,
}

impl Hello {
    /// What the speaker says about links.
    #[must_use]
    pub fn voice(&self) -> Voice {
        Voice { links: self.links.clone(), no_rdma: self.no_rdma.clone() }
    }

    /// Says this about links.
    pub fn set_voice(&mut self, voice: Voice) {
        self.links = voice.links;
        self.no_rdma = voice.no_rdma;
    }
}

/// Where a node takes one RDMA connection, and from whom.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RdmaOffer {
    /// Its listener. What the connection request has to carry follows from the handshake of the connection on which this
    /// was said.
    pub address: SocketAddr,
}

/// What became of an offer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Settled {
    /// What carries the session.
    pub kind: Kind,
    /// Why not RDMA.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A question about a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ask {
    /// Who speaks.
    pub node: String,
    /// The volume.
    pub volume: String,
    /// Asks for RDMA, to take the session over TCP on to. Otherwise, whether there would be a session.
    #[serde(default)]
    pub rdma: bool,
    /// The speaker's daemon was started, or an operator there said `connect`: a peer that pauses between two dials dials now.
    #[serde(default)]
    pub anew: bool,
}

/// A node has decided, stored what it agreed to, and is ready for the session.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ready {
    /// As the speaker sees it; the listener's must be its mirror image.
    pub agreement: Agreement,
    /// The volume's identity, with the generation both or the target will take.
    pub lineage: Lineage,
}

/// Why a node will not have a session.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefuseCode {
    /// Not now; dial again.
    Busy,
    /// An operator disconnected the volume here.
    Disconnected,
    /// The disks do not allow it: see the text.
    Disks,
    /// The configurations differ, or the volume is unknown here.
    Configuration,
    /// No kind of link that both can have: see the text.
    Link,
    /// A code of a later release.
    #[serde(other)]
    Other,
}

/// The end of a connection, with the reason.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Refuse {
    /// For the program.
    pub code: RefuseCode,
    /// For the operator of the other node.
    pub text: String,
}

/// What an envelope holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// The first message of both.
    Hello(Box<Hello>),
    /// What became of the acceptor's offer; from the dialer, and of one that was asked for from the acceptor as well.
    Link(Settled),
    /// The first message on a connection that does not begin with a hello.
    Ask(Ask),
    /// The answer to it.
    Offer(RdmaOffer),
    /// The last message before frames.
    Ready(Ready),
    /// The last message of all.
    Refuse(Refuse),
}

/// What was wrong with what a peer sent. The connection is closed; nothing else is hurt.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// Another program talks to this port, or ours to another's.
    #[error("peer's hello starts with {found:02x?}: is its port another program's?")]
    Magic {
        /// The bytes where the mark belongs.
        found: Vec<u8>,
    },
    /// Another release.
    #[error("peer speaks hello version {found}, this program {VERSION}: run the same release on both nodes")]
    Version {
        /// As sent.
        found: u8,
    },
    /// Over the bound.
    #[error("peer announces a hello of {found} bytes, the limit is {}", limits::HELLO_LEN_MAX)]
    Length {
        /// As sent.
        found: u32,
    },
    /// Damaged on the way.
    #[error("peer's hello has checksum {found:#010x}, computed {computed:#010x}: damaged in transit")]
    Checksum {
        /// As sent.
        found: u32,
        /// As computed.
        computed: u32,
    },
    /// Whole, but not what we understand.
    #[error("peer's hello is not understood ({source}): run the same release on both nodes")]
    Body {
        /// Where and why.
        source: serde_json::Error,
    },
    /// More than one message where one was sealed.
    #[error("peer's message has bytes behind it: run the same release on both nodes")]
    Tail,
    /// The connection failed, ended in mid-message, or carries what does not open.
    #[error(transparent)]
    Secure(#[from] SecureError),
}

impl From<std::io::Error> for HelloError {
    fn from(source: std::io::Error) -> Self {
        Self::Secure(source.into())
    }
}

/// The envelope around a message.
///
/// # Panics
/// When the message is longer than [`limits::HELLO_LEN_MAX`]: names are bounded by the configuration and texts by
/// [`Refuse`]'s makers, so that is a bug of ours.
#[must_use]
pub fn encode(message: &Message) -> Vec<u8> {
    let body = serde_json::to_vec(message).expect("plain structs with string keys always serialise");
    let len = u32::try_from(body.len()).ok().filter(|&len| len <= limits::HELLO_LEN_MAX);
    let len = len.expect("our own hello is far below its bound");
    let mut bytes = Vec::with_capacity(ENVELOPE_LEN + body.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.push(VERSION);
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

/// Reads a message from the start of `bytes`, and says how many bytes it took; `None`: more are needed.
///
/// # Errors
/// The first thing that is wrong, as early as the bytes at hand show it.
pub fn decode(bytes: &[u8]) -> Result<Option<(Message, usize)>, HelloError> {
    let mark = &bytes[..bytes.len().min(MAGIC.len())];
    if *mark != MAGIC[..mark.len()] {
        return Err(HelloError::Magic { found: mark.to_vec() });
    }
    if let Some(&found) = bytes.get(MAGIC.len())
        && found != VERSION
    {
        return Err(HelloError::Version { found });
    }
    let Some(envelope) = bytes.first_chunk::<ENVELOPE_LEN>() else { return Ok(None) };
    let (len, announced) = sizes(envelope)?;
    let Some(body) = bytes[ENVELOPE_LEN..].get(..len) else { return Ok(None) };
    let computed = crc32c::crc32c(body);
    if computed != announced {
        return Err(HelloError::Checksum { found: announced, computed });
    }
    let message =
        serde_json::from_slice(body).and_then(checked).map_err(|source| HelloError::Body { source })?;
    Ok(Some((message, ENVELOPE_LEN + len)))
}

/// Bounds what a peer may name: names come back in our refusals, which are bounded too.
fn checked(message: Message) -> Result<Message, serde_json::Error> {
    let long = |names: &[&String]| names.iter().any(|name| name.len() > NAME_LEN_MAX);
    let wordy = |why: &Option<String>| why.as_ref().is_some_and(|why| why.len() > REASON_LEN_MAX);
    let bad = match &message {
        Message::Hello(hello) => {
            let links: Vec<_> = hello.links.iter().collect();
            long(&[&hello.node, &hello.volume])
                || long(&links)
                || links.len() > LINKS_MAX
                || wordy(&hello.no_rdma)
                || !is_bounded(&hello.settings)
        }
        Message::Ask(ask) => long(&[&ask.node, &ask.volume]),
        Message::Link(settled) => wordy(&settled.why),
        Message::Offer(_) | Message::Ready(_) | Message::Refuse(_) => false,
    };
    if bad {
        return Err(serde::de::Error::custom(
            "a name, a reason, the list of links or the settings are too long",
        ));
    }
    Ok(message)
}

fn sizes(envelope: &[u8; ENVELOPE_LEN]) -> Result<(usize, u32), HelloError> {
    let word =
        |at: usize| u32::from_le_bytes([envelope[at], envelope[at + 1], envelope[at + 2], envelope[at + 3]]);
    let (len, crc) = (word(9), word(13));
    if len > limits::HELLO_LEN_MAX {
        return Err(HelloError::Length { found: len });
    }
    Ok((usize::try_from(len).expect("64-bit"), crc))
}

/// Reads what was sealed as one message.
///
/// # Errors
/// As [`decode`]; [`HelloError::Length`] and [`HelloError::Tail`] where it is not one message and nothing else.
pub fn decode_whole(bytes: &[u8]) -> Result<Message, HelloError> {
    match decode(bytes)? {
        Some((message, len)) if len == bytes.len() => Ok(message),
        Some(_) => Err(HelloError::Tail),
        None => Err(HelloError::Secure(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into())),
    }
}

/// [`View`] as JSON: plain numbers and DRBD's words.
mod stored_view {
    use super::{
        DiskState, Epoch, GENERATION_HISTORY_LEN, Generation, Generations, Lineage, Recall, ServingRole, View,
    };
    use costandby_datapath::disk::metadata::header::SESSIONS_MAX;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

    #[derive(Serialize, Deserialize)]
    struct Stored {
        volume_id: [u8; 16],
        size: u64,
        epoch: u64,
        current: u64,
        base: u64,
        history: Vec<u64>,
        disk_state: String,
        zeroed: bool,
        was_primary: bool,
        was_primary_unclean: bool,
        applying_unclean: bool,
        lost_power: bool,
        dirty: bool,
        copying: u64,
        sessions_offered: u64,
        sessions_begun: u64,
        role: ServingRole,
        configured_primary: bool,
        proposed: Lineage,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        recall: Option<Recall>,
    }

    pub(super) fn serialize<S: Serializer>(view: &View, serializer: S) -> Result<S::Ok, S::Error> {
        Stored {
            volume_id: view.volume_id,
            size: view.size,
            epoch: view.epoch.0,
            current: view.generations.current.0,
            base: view.generations.base.0,
            history: view.generations.history.iter().map(|generation| generation.0).collect(),
            disk_state: view.disk_state.as_str().to_owned(),
            zeroed: view.zeroed,
            was_primary: view.was_primary,
            was_primary_unclean: view.was_primary_unclean,
            applying_unclean: view.applying_unclean,
            lost_power: view.lost_power,
            dirty: view.dirty,
            copying: view.copying.0,
            sessions_offered: view.sessions_offered,
            sessions_begun: view.sessions_begun,
            role: view.role,
            configured_primary: view.configured_primary,
            proposed: view.proposed,
            recall: view.recall,
        }
        .serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<View, D::Error> {
        let stored = Stored::deserialize(deserializer)?;
        let states = [DiskState::UpToDate, DiskState::Inconsistent, DiskState::Outdated, DiskState::Failed];
        let disk_state = states
            .into_iter()
            .find(|state| state.as_str() == stored.disk_state)
            .ok_or_else(|| D::Error::custom(format!("unknown disk state {:?}", stored.disk_state)))?;
        if stored.proposed.generation == 0 || stored.proposed.volume_id == [0; 16] {
            return Err(D::Error::custom("the proposed lineage is empty"));
        }
        if stored.sessions_begun > stored.sessions_offered || stored.sessions_offered > SESSIONS_MAX {
            return Err(D::Error::custom("the number of the last session makes no sense"));
        }
        let mut history = [Generation::ZERO; GENERATION_HISTORY_LEN];
        for (to, from) in history.iter_mut().zip(stored.history) {
            *to = Generation(from);
        }
        Ok(View {
            volume_id: stored.volume_id,
            size: stored.size,
            epoch: Epoch(stored.epoch),
            generations: Generations {
                current: Generation(stored.current),
                base: Generation(stored.base),
                history,
            },
            disk_state,
            zeroed: stored.zeroed,
            was_primary: stored.was_primary,
            was_primary_unclean: stored.was_primary_unclean,
            applying_unclean: stored.applying_unclean,
            lost_power: stored.lost_power,
            dirty: stored.dirty,
            copying: Generation(stored.copying),
            sessions_offered: stored.sessions_offered,
            sessions_begun: stored.sessions_begun,
            role: stored.role,
            configured_primary: stored.configured_primary,
            proposed: stored.proposed,
            recall: stored.recall,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::{Scope, Side, Verdict, Why};
    use costandby_datapath::disk::metadata::header::SESSIONS_MAX;
    use proptest::prelude::*;

    fn any_message() -> impl Strategy<Value = Message> {
        let numbers =
            (any::<[u8; 16]>(), any::<u64>(), any::<u64>(), any::<u64>(), any::<[u64; 8]>(), any::<u64>());
        let lineage =
            (1u8.., 1u64..).prop_map(|(id, generation)| Lineage { volume_id: [id; 16], generation });
        let view = (numbers, lineage, any::<[bool; 8]>()).prop_map(|(numbers, proposed, bits)| View {
            volume_id: numbers.0,
            size: numbers.1,
            epoch: Epoch(numbers.2),
            generations: Generations {
                current: Generation(numbers.3),
                base: Generation(numbers.2),
                history: numbers.4.map(Generation),
            },
            disk_state: if bits[0] { DiskState::UpToDate } else { DiskState::Failed },
            zeroed: bits[1],
            was_primary: bits[2],
            was_primary_unclean: bits[3],
            applying_unclean: bits[4],
            lost_power: bits[6],
            dirty: bits[7],
            copying: Generation(numbers.5),
            sessions_offered: numbers.1 % SESSIONS_MAX,
            sessions_begun: numbers.1 % SESSIONS_MAX / 2,
            role: if bits[5] { ServingRole::Primary } else { ServingRole::Standby },
            configured_primary: bits[0],
            proposed,
            recall: bits[1].then_some(Recall {
                session: [numbers.1, numbers.3],
                epoch: numbers.2,
                generation: numbers.5,
                source: bits[2],
                applied: numbers.4[0],
                numbered: numbers.4[1],
                map_told: bits[3],
                alone: bits[4],
                diskless: bits[5],
            }),
        });
        let hello = (view, ".{0,40}", any::<u64>()).prop_map(|(view, node, nonce)| {
            let (volume, links) = ("db".to_owned(), vec!["tcp".to_owned()]);
            let rdma = (nonce % 2 == 0).then(|| offer(nonce));
            let no_rdma = (nonce % 3 == 0).then(|| "no device".to_owned());
            let ring_len = nonce / 2;
            let settings = [("ack".to_owned(), nonce.to_string())].into();
            let incarnation = nonce ^ 1;
            let hello =
                Hello { node, volume, ring_len, links, nonce, incarnation, rdma, no_rdma, settings, view };
            Message::Hello(Box::new(hello))
        });
        let ready = (any::<u64>(), any::<bool>()).prop_map(|(epoch, resync)| {
            let verdict = if resync {
                Verdict::Resync { source: Side::Mine, why: Why::TargetBehind, scope: Scope::Delta }
            } else {
                Verdict::InSync { adopt: None }
            };
            let goes_on = resync.then_some(epoch / 3);
            let agreement = Agreement { verdict, primary: Some(Side::Theirs), epoch, goes_on };
            Message::Ready(Ready { agreement, lineage: Lineage { volume_id: [1; 16], generation: epoch } })
        });
        let refuse = ".{0,200}".prop_map(|text| Message::Refuse(Refuse { code: RefuseCode::Disks, text }));
        let link = (any::<bool>(), proptest::option::of(".{0,40}")).prop_map(|(rdma, why)| {
            Message::Link(Settled { kind: if rdma { Kind::Rdma } else { Kind::Tcp }, why })
        });
        let ask = (".{0,20}", any::<(bool, bool)>())
            .prop_map(|(node, (rdma, anew))| Message::Ask(Ask { node, volume: "db".to_owned(), rdma, anew }));
        let offered = any::<u64>().prop_map(|seed| Message::Offer(offer(seed)));
        prop_oneof![hello, ready, refuse, link, ask, offered]
    }

    fn offer(seed: u64) -> RdmaOffer {
        let [port, ..] = seed.to_le_bytes();
        RdmaOffer { address: SocketAddr::from(([10, 9, 0, 1], port.into())) }
    }

    fn envelope(body: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.push(VERSION);
        bytes.extend_from_slice(&u32::try_from(body.len()).expect("short").to_le_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(body).to_le_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_and_no_more_is_taken(message in any_message(), tail in any::<[u8; 9]>()) {
            let mut bytes = encode(&message);
            let len = bytes.len();
            for cut in [0, 1, 8, 9, 16, 17, len - 1] {
                prop_assert!(decode(&bytes[..cut]).expect("a good start").is_none());
            }
            bytes.extend_from_slice(&tail);
            prop_assert_eq!(decode(&bytes).expect("good"), Some((message, len)));
        }

        #[test]
        fn a_flipped_bit_is_never_taken_for_a_message(message in any_message(), at in any::<proptest::sample::Index>()) {
            let mut bytes = encode(&message);
            let bit = at.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!matches!(decode(&bytes), Ok(Some(_))));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
            let _ = decode(&envelope(&bytes));
        }

        #[test]
        fn arbitrary_json_never_panics(text in "(\\{|\\}|\\[|\\]|\"hello\"|\"view\"|\"ready\"|:|,|[0-9]){0,40}") {
            let _ = decode(&envelope(text.as_bytes()));
        }
    }

    #[test]
    fn each_kind_of_bad_envelope_has_its_own_error() {
        let refuse = Message::Refuse(Refuse { code: RefuseCode::Busy, text: "later".to_owned() });
        let good = encode(&refuse);
        let with = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            decode(&bytes).expect_err("bad")
        };
        assert!(matches!(decode(b"GET / HTTP/1.1"), Err(HelloError::Magic { .. })));
        assert!(matches!(with(8, 1), HelloError::Version { found: 1 }));
        assert!(matches!(with(12, 1), HelloError::Length { .. }));
        assert!(matches!(with(20, b'?'), HelloError::Checksum { .. }));
        assert!(matches!(decode(&envelope(b"{\"howdy\":{}}")), Err(HelloError::Body { .. })));
    }

    proptest! {
        #[test]
        fn names_over_the_bound_are_refused(message in any_message(), excess in 0usize..3, links in 15usize..18) {
            if let Message::Hello(mut hello) = message {
                hello.volume = "v".repeat(NAME_LEN_MAX - 1 + excess);
                hello.links = vec!["tcp".to_owned(); links];
                let decoded = decode(&encode(&Message::Hello(hello)));
                prop_assert_eq!(decoded.is_ok(), excess < 2 && links <= LINKS_MAX);
            }
        }
    }

    #[test]
    fn offers_with_a_bad_address_and_long_reasons_are_refused() {
        let offer =
            |address: &str| decode(&envelope(format!(r#"{{"offer":{{"address":"{address}"}}}}"#).as_bytes()));
        assert!(matches!(offer("10.9.0.1:4000"), Ok(Some((Message::Offer(_), _)))));
        assert!(matches!(offer("10.9.0.1"), Err(HelloError::Body { .. })));
        let link =
            |len| decode(&encode(&Message::Link(Settled { kind: Kind::Tcp, why: Some("w".repeat(len)) })));
        assert!(link(REASON_LEN_MAX).is_ok());
        assert!(matches!(link(REASON_LEN_MAX + 1), Err(HelloError::Body { .. })));
        assert!(matches!(decode(&envelope(br#"{"link":{"kind":"smoke"}}"#)), Err(HelloError::Body { .. })));
    }

    #[test]
    fn keys_and_codes_of_a_later_release_are_ignored() {
        let body = br#"{"refuse":{"code":"too_tired","text":"no","colour":"blue"}}"#;
        let (message, _) = decode(&envelope(body)).expect("good").expect("whole");
        assert_eq!(message, Message::Refuse(Refuse { code: RefuseCode::Other, text: "no".to_owned() }));
    }

    #[test]
    fn what_was_sealed_is_one_message_and_nothing_else() {
        let refuse = Message::Refuse(Refuse { code: RefuseCode::Busy, text: "later".to_owned() });
        let bytes = encode(&refuse);
        assert_eq!(decode_whole(&bytes).expect("good"), refuse);
        assert!(matches!(decode_whole(&[bytes.as_slice(), b"x"].concat()), Err(HelloError::Tail)));
        assert!(decode_whole(&bytes[..bytes.len() - 1]).is_err());
    }
}
