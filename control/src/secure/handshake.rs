//! The handshake that proves the pair's key, and the sealed messages after it. Sans-IO: bytes in, bytes out; the
//! ephemeral keys' randomness is the crate `snow`'s.
//!
//! Every message of the handshake is `magic[8] version[1] kind[1] len[2]`, little-endian, then `len` bytes. Openings and
//! answers carry a message of Noise `NNpsk0` over Curve25519, ChaCha20-Poly1305 and BLAKE2s; the prologue is the opening's
//! first ten bytes, so a changed version or kind does not open. Their payloads name who speaks and to whom. A sealed
//! message is `len[2]`, then as many bytes of ciphertext, one message of the layer above.
//!
//! Invariants: an acceptor computes no Diffie-Hellman for whoever lacks the key; nothing here is longer than
//! [`HANDSHAKE_LEN_MAX`] or [`SEALED_LEN_MAX`]; an error of decryption ends the connection, for the counters of both ends
//! no longer agree.
//!
//! Survives: any bytes, other programs and other releases (told apart by name), openings recorded and sent again (the
//! answer is of no use to whoever has not drawn the ephemeral key), a node's own opening sent back to it.

use super::key::{HASH_LEN, Key, Keys, derive};
use costandby_datapath::limits;
use snow::{Builder, HandshakeState, TransportState};
use std::fmt;
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of every message of the handshake, the same as of a hello's envelope.
pub const MAGIC: [u8; 8] = *b"costandb";

/// Version of the handshake, of the sealed messages, and of what they mean.
pub const VERSION: u8 = 3;

/// The handshake as Noise names it.
const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";

/// What stands in for a key where there is none (`insecure = true`): the conversation is the same, and proves nothing.
const NO_KEY: [u8; 32] = [0; 32];

/// Bytes before a handshake message's body.
pub const HEADER_LEN: usize = 12;

/// Bytes of a node's name in a payload: what the configuration allows.
const NAME_LEN_MAX: usize = 64;

/// Bytes that sealing adds.
pub const TAG_LEN: usize = 16;

/// Longest body of a handshake message: an ephemeral key, two names with their lengths, a tag.
pub const HANDSHAKE_LEN_MAX: usize = 32 + 2 * (1 + NAME_LEN_MAX) + TAG_LEN;

/// Longest ciphertext of a sealed message: what Noise allows, and what its length has room for.
pub const SEALED_LEN_MAX: usize = 65_535;
const _: () = assert!(limits::HELLO_LEN_MAX as usize + 64 + TAG_LEN <= SEALED_LEN_MAX);

/// Bytes of a rejection's body. Longer than its one word, so that a release before this one, which reads 17 bytes before
/// it looks at the version, sees that the version is another.
const REJECTION_LEN: usize = 8;

const OPENING: u8 = 1;
const OPENING_WITHOUT_KEY: u8 = 2;
const ANSWER: u8 = 3;
const REJECTION: u8 = 4;

/// What every handshake message begins with.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: u8,
    kind: u8,
    len: U16,
}
const _: () = assert!(size_of::<Header>() == HEADER_LEN);

/// Why an acceptor will not go on. Said in the clear, to whoever asks: it is a hint for an operator and nothing else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rejection {
    /// The opening was sealed with another key.
    OtherKey,
    /// The dialer has no key, the acceptor has one.
    DialerHasNoKey,
    /// The dialer has a key, the acceptor has none.
    AcceptorHasNoKey,
    /// The key is right, and the acceptor is not the node that was meant.
    OtherNode,
    /// Another release.
    OtherVersion,
    /// A word of a later release.
    Unknown,
}

const REJECTIONS: [(u8, Rejection); 5] = [
    (1, Rejection::OtherKey),
    (2, Rejection::DialerHasNoKey),
    (3, Rejection::AcceptorHasNoKey),
    (4, Rejection::OtherNode),
    (5, Rejection::OtherVersion),
];

impl Rejection {
    fn from_code(code: u8) -> Self {
        REJECTIONS.iter().find(|(known, _)| *known == code).map_or(Self::Unknown, |(_, rejection)| *rejection)
    }

    /// The bytes that say so.
    fn encode(self) -> Vec<u8> {
        let code = REJECTIONS.iter().find(|(_, rejection)| *rejection == self).map_or(0, |(code, _)| *code);
        let mut body = [0; REJECTION_LEN];
        body[0] = code;
        message(REJECTION, &body)
    }
}

impl fmt::Display for Rejection {
    /// As the dialer's operator reads it, after the acceptor's name and "refuses a session: ".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OtherKey => {
                "its key is not this node's key: both nodes need the same one; copy the file that `key` names from one node \
                 to the other"
            }
            Self::DialerHasNoKey => {
                "it has a key and this node has none: set `key` here to a copy of its key file, or take `key` away on both \
                 nodes and set `insecure = true`"
            }
            Self::AcceptorHasNoKey => {
                "it has no key (`insecure = true`) and this node has one: set `key` there to a copy of this node's key file"
            }
            Self::OtherNode => {
                "the node at its address is another one of the pair's key: correct `listen` of the two nodes, or --node of \
                 their daemons"
            }
            Self::OtherVersion => "it is of another release: run the same release on both nodes",
            Self::Unknown => "it gives a reason that this release does not know: run the same release on both nodes",
        })
    }
}

/// What was wrong with what came over a connection. The connection is closed; nothing else is hurt.
#[derive(Debug, thiserror::Error)]
pub enum SecureError {
    /// Another program talks to this port, or ours to another's.
    #[error("it does not begin as costandby does, but as {} does: is the port another program's?", looks_like(*found))]
    Magic {
        /// The bytes where the mark belongs.
        found: [u8; 8],
    },
    /// Another release.
    #[error("it speaks version {found}, this program {VERSION}: run the same release on both nodes")]
    Version {
        /// As sent.
        found: u8,
    },
    /// Not the message that belongs there.
    #[error("a handshake message of kind {found} does not belong there: run the same release on both nodes")]
    Kind {
        /// As sent.
        found: u8,
    },
    /// A length that no message of its kind has.
    #[error("it announces a message of a length that cannot be")]
    Length {
        /// As sent.
        found: usize,
    },
    /// As acceptor: no proof of the key.
    #[error("it does not hold this node's key")]
    OtherKey,
    /// As acceptor with a key.
    #[error("it has no key (`insecure = true`), this node has one")]
    DialerHasNoKey,
    /// As acceptor without a key.
    #[error("it has a key, this node has none (`insecure = true`)")]
    AcceptorHasNoKey,
    /// As acceptor: sealed with the right key, and not for this node.
    #[error(
        "it holds the key, is {from:?} and looks for {to:?}, which this node is not: correct `listen` or --node"
    )]
    OtherNode {
        /// Who dials.
        from: String,
        /// Whom.
        to: String,
    },
    /// As dialer: the acceptor says no.
    #[error("{0}")]
    Rejected(Rejection),
    /// As dialer: an answer that the key does not open.
    #[error("its answer was not made with this node's key: is another program at its address?")]
    Unproved,
    /// As dialer: another node of the key answers.
    #[error(
        "node {found:?} answers at its address: correct `listen` of the two nodes, or --node of their daemons"
    )]
    Answered {
        /// Who.
        found: String,
    },
    /// Damaged, left out, doubled or made up on the way.
    #[error("a sealed message does not open: it was changed on the way")]
    Broken,
    /// The connection failed or ended in mid-message.
    #[error("the connection ended: {source}")]
    Io {
        /// The operating system's words.
        #[from]
        source: std::io::Error,
    },
}

/// What program a connection's first bytes look like.
fn looks_like(found: [u8; 8]) -> &'static str {
    const KNOWN: [(&[u8], &str); 11] = [
        (b"GET ", "HTTP"),
        (b"HEAD ", "HTTP"),
        (b"POST ", "HTTP"),
        (b"PUT ", "HTTP"),
        (b"OPTIONS ", "HTTP"),
        (b"PRI * HT", "HTTP"),
        (b"HTTP/", "HTTP"),
        (b"\x16\x03", "TLS"),
        (b"SSH-", "SSH"),
        (b"NBDMAGIC", "NBD"),
        (b"\0\0\0\x01IHA", "NBD"),
    ];
    KNOWN.iter().find(|(begin, _)| found.starts_with(begin)).map_or("another program", |(_, what)| *what)
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let len = U16::new(u16::try_from(body.len()).expect("bounded by its makers"));
    let header = Header { magic: MAGIC, version: VERSION, kind, len };
    [header.as_bytes(), body].concat()
}

/// Reads the beginning of a handshake message, and says how many bytes follow it.
///
/// # Errors
/// [`SecureError::Magic`], [`SecureError::Version`], [`SecureError::Length`].
pub fn body_len(header: &[u8; HEADER_LEN]) -> Result<usize, SecureError> {
    let Header { magic, version, kind, len } = Header::read_from_bytes(header).expect("as long as it is");
    if magic != MAGIC {
        return Err(SecureError::Magic { found: magic });
    }
    // A rejection is read whatever its sender's release: the word for another version is the same in all of them.
    if version != VERSION && kind != REJECTION {
        return Err(SecureError::Version { found: version });
    }
    let found = usize::from(len.get());
    if found == 0 || found > HANDSHAKE_LEN_MAX {
        return Err(SecureError::Length { found });
    }
    Ok(found)
}

/// The rejection that tells a stranger what [`body_len`] or [`accept`] found, where it is one that a peer of ours may be
/// told.
#[must_use]
pub fn rejection(error: &SecureError) -> Option<Vec<u8>> {
    let rejection = match error {
        SecureError::Version { .. } => Rejection::OtherVersion,
        SecureError::OtherKey => Rejection::OtherKey,
        SecureError::DialerHasNoKey => Rejection::DialerHasNoKey,
        SecureError::AcceptorHasNoKey => Rejection::AcceptorHasNoKey,
        SecureError::OtherNode { .. } => Rejection::OtherNode,
        _ => return None,
    };
    Some(rejection.encode())
}

fn prologue(kind: u8) -> [u8; 10] {
    let mut prologue = [0; 10];
    prologue[..8].copy_from_slice(&MAGIC);
    prologue[8..].copy_from_slice(&[VERSION, kind]);
    prologue
}

fn builder<'a>(key: &'a [u8; 32], prologue: &'a [u8; 10]) -> Builder<'a> {
    let builder = Builder::new(PATTERN.parse().expect("a pattern of Noise"));
    builder.psk(0, key).and_then(|builder| builder.prologue(prologue)).expect("each is set once")
}

/// The two names of a payload, each behind its length.
fn names(from: &str, to: &str) -> Vec<u8> {
    let mut payload = Vec::with_capacity(2 + from.len() + to.len());
    for name in [from, to] {
        payload.push(u8::try_from(name.len()).expect("the configuration bounds names"));
        payload.extend_from_slice(name.as_bytes());
    }
    payload
}

fn read_names(payload: &[u8]) -> Option<(String, String)> {
    let mut rest = payload;
    let mut next = || {
        let (&len, tail) = rest.split_first()?;
        let (name, tail) = tail.split_at_checked(len.into())?;
        rest = tail;
        let name = (name.len() <= NAME_LEN_MAX).then(|| String::from_utf8(name.to_vec()).ok())??;
        Some(name)
    };
    let both = (next()?, next()?);
    rest.is_empty().then_some(both)
}

/// A dialer that waits for its answer.
pub struct Opened {
    noise: HandshakeState,
    me: String,
    peer: String,
}

/// Begins a handshake with `peer`: the opening to be sent.
///
/// # Panics
/// When a name is longer than the configuration allows.
#[must_use]
pub fn open(keys: &Keys, me: &str, peer: &str) -> (Opened, Vec<u8>) {
    let (key, kind) = keys.first().map_or((&NO_KEY, OPENING_WITHOUT_KEY), |key| (key.bytes(), OPENING));
    let prologue = prologue(kind);
    let mut noise = builder(key, &prologue).build_initiator().expect("all that the pattern needs is there");
    let mut body = [0; HANDSHAKE_LEN_MAX];
    let len = noise.write_message(&names(me, peer), &mut body).expect("names are bounded");
    (Opened { noise, me: me.to_owned(), peer: peer.to_owned() }, message(kind, &body[..len]))
}

impl Opened {
    /// Takes the answer: a whole message, header and body.
    ///
    /// # Errors
    /// [`SecureError::Rejected`] by an acceptor's word; the others where the answer is none or not the peer's.
    ///
    /// # Panics
    /// When `answer` has no header that [`body_len`] took.
    pub fn finish(mut self, answer: &[u8]) -> Result<Sealed, SecureError> {
        let (header, body) = answer.split_first_chunk::<HEADER_LEN>().expect("its header was read");
        let Header { kind, version, .. } = Header::read_from_bytes(header).expect("as long as it is");
        match kind {
            REJECTION if version != VERSION => return Err(SecureError::Version { found: version }),
            REJECTION => {
                let code = body.first().copied().unwrap_or_default();
                return Err(SecureError::Rejected(Rejection::from_code(code)));
            }
            ANSWER => {}
            found => return Err(SecureError::Kind { found }),
        }
        let mut payload = [0; HANDSHAKE_LEN_MAX];
        let len = self.noise.read_message(body, &mut payload).map_err(|_| SecureError::Unproved)?;
        let (from, to) = read_names(&payload[..len]).ok_or(SecureError::Unproved)?;
        if from != self.peer || to != self.me {
            return Err(SecureError::Answered { found: from });
        }
        Ok(Sealed::new(self.noise, from))
    }
}

/// Takes an opening, a whole message with a header that [`body_len`] took, as node `me`: the answer to be sent, and what is
/// sealed from then on. Any of `keys` will do.
///
/// # Errors
/// Why not; [`rejection`] has what to say to the dialer.
///
/// # Panics
/// When `opening` has no header.
pub fn accept(keys: &Keys, me: &str, opening: &[u8]) -> Result<(Vec<u8>, Sealed), SecureError> {
    let (header, body) = opening.split_first_chunk::<HEADER_LEN>().expect("its header was read");
    let Header { kind, .. } = Header::read_from_bytes(header).expect("as long as it is");
    match (kind, keys.is_some()) {
        (OPENING, true) | (OPENING_WITHOUT_KEY, false) => {}
        (OPENING, false) => return Err(SecureError::AcceptorHasNoKey),
        (OPENING_WITHOUT_KEY, true) => return Err(SecureError::DialerHasNoKey),
        (found, _) => return Err(SecureError::Kind { found }),
    }
    let prologue = prologue(kind);
    let none = (!keys.is_some()).then_some(&NO_KEY);
    let mut payload = [0; HANDSHAKE_LEN_MAX];
    let opened = keys.all().map(Key::bytes).chain(none).find_map(|key| {
        let mut noise =
            builder(key, &prologue).build_responder().expect("all that the pattern needs is there");
        let len = noise.read_message(body, &mut payload).ok()?;
        Some((noise, len))
    });
    let (mut noise, len) = opened.ok_or(SecureError::OtherKey)?;
    let (from, to) = read_names(&payload[..len]).ok_or(SecureError::OtherKey)?;
    if to != me || from == me {
        return Err(SecureError::OtherNode { from, to });
    }
    let mut answer = [0; HANDSHAKE_LEN_MAX];
    // Fails for an ephemeral key that no honest peer draws.
    let len = noise.write_message(&names(me, &from), &mut answer).map_err(|_| SecureError::OtherKey)?;
    Ok((message(ANSWER, &answer[..len]), Sealed::new(noise, from)))
}

/// One end of a connection whose handshake is done.
pub struct Sealed {
    transport: TransportState,
    /// What both ends know of this handshake and nobody without the key does.
    hash: [u8; HASH_LEN],
    peer: String,
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealed(with {})", self.peer)
    }
}

impl Sealed {
    fn new(noise: HandshakeState, peer: String) -> Self {
        let hash = noise.get_handshake_hash().try_into().expect("BLAKE2s has 32 bytes");
        let transport = noise.into_transport_mode().expect("both messages were exchanged");
        Self { transport, hash, peer }
    }

    /// The node at the other end.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// A secret of this connection for another purpose, the same at both ends: with another label it is another one.
    #[must_use]
    pub fn secret(&self, label: &str) -> [u8; 16] {
        *derive(&self.hash, label.as_bytes()).first_chunk().expect("longer")
    }

    /// Seals a message, its length before it.
    ///
    /// # Panics
    /// When the message is longer than [`SEALED_LEN_MAX`] less [`TAG_LEN`]: the layer above bounds what it says.
    pub fn seal(&mut self, message: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 2 + message.len() + TAG_LEN];
        let len = self.transport.write_message(message, &mut bytes[2..]);
        let len = u16::try_from(len.expect("messages are bounded")).expect("at most 65535");
        bytes[..2].copy_from_slice(&len.to_le_bytes());
        bytes
    }

    /// Opens the next message; `sealed` is without its length.
    ///
    /// # Errors
    /// [`SecureError::Broken`].
    pub fn unseal(&mut self, sealed: &[u8]) -> Result<Vec<u8>, SecureError> {
        let mut message = vec![0; sealed.len()];
        let len = self.transport.read_message(sealed, &mut message).map_err(|_| SecureError::Broken)?;
        message.truncate(len);
        Ok(message)
    }
}

/// How many bytes of ciphertext follow.
///
/// # Errors
/// [`SecureError::Length`] for fewer than sealing adds.
pub fn sealed_len(len: [u8; 2]) -> Result<usize, SecureError> {
    let found = usize::from(u16::from_le_bytes(len));
    if found < TAG_LEN { Err(SecureError::Length { found }) } else { Ok(found) }
}

#[cfg(test)]
mod tests;
