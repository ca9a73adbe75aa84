//! The handshake: from a client's first byte to an opened export.
//!
//! A state machine over the byte stream (fixed newstyle negotiation). The connection sends what [`Handshake::start`]
//! wrote, feeds whatever it receives to [`Handshake::feed`] and sends what that wrote, until an export is opened or the
//! session ends. What exports there are, and whether this node serves them, is the [`ExportDirectory`]'s word.
//!
//! Invariants: the result depends on the bytes alone, not on how they were split; not one byte behind the option that
//! opens the export is consumed, so a client may send its first request along with it; memory is bounded by
//! [`NBD_OPTION_LEN_MAX`] in and one option's reply out. Survives any input: a malformed option gets an error reply and
//! leaves the session alive; only what makes the stream unreadable, or cannot be answered, is a [`HandshakeError`].

use super::export::{ExportDirectory, Opened};
use super::option::{self, Answer, MetaContexts};
use super::proto::{
    NBD_FLAG_C_FIXED_NEWSTYLE, NBD_FLAG_C_NO_ZEROES, NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_NO_ZEROES,
    NBD_INIT_MAGIC, NBD_OPT_EXPORT_NAME, NBD_OPTS_MAGIC,
};
use crate::limits::NBD_OPTION_LEN_MAX;

/// Bytes of an option's header: magic, number, length.
pub const OPTION_HEADER_LEN: usize = 16;

/// An option's data is skipped up to this length to answer it with an error; a longer one closes the connection. Sixteen
/// times the largest accepted option: no client has a use for it, and it passes in one socket buffer.
pub const OPTION_SKIP_LEN_MAX: u32 = 16 * NBD_OPTION_LEN_MAX;

/// Where the session stands after a [`Handshake::feed`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Go on: feed the rest of the input, then more of it. Send `out` before it grows: one call adds at most one
    /// option's reply.
    NeedMore,
    /// The export is open. Send `out`; the bytes not consumed are requests already.
    Transmission(Opened),
    /// The client took its leave. Send `out`, then close.
    Close,
}

/// What one [`Handshake::feed`] did.
#[derive(Clone, PartialEq, Eq, Debug)]
#[must_use]
pub struct Step {
    /// Bytes of the input that were used up; at least one unless the input was empty.
    pub consumed: usize,
    /// Where the session stands.
    pub outcome: Outcome,
}

/// Why the connection must close without another word.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The client set flags that were not offered, or is no NBD client.
    #[error(
        "client flags {flags:#010x} contain ones that were not offered: not an NBD client, or an incompatible one"
    )]
    ClientFlags {
        /// As sent.
        flags: u32,
    },
    /// An option does not start as one.
    #[error("not an option: it starts with {found:#018x}; the client is out of step")]
    OptionMagic {
        /// What stood there.
        found: u64,
    },
    /// An option is too long even to skip.
    #[error("option {option} announces {len} bytes of data, more than {OPTION_SKIP_LEN_MAX}")]
    OptionLen {
        /// Its number.
        option: u32,
        /// As announced.
        len: u32,
    },
    /// `NBD_OPT_EXPORT_NAME` asked for what cannot be had; that option has no error reply.
    #[error("export asked for by a client that cannot be told why not: {message}")]
    ExportName {
        /// What another client would have been told.
        message: String,
    },
}

/// Edges: `ClientFlags` → `Header` → (`Data` | `Skip`) → `Header` … → `Finished`.
#[derive(Debug)]
enum State {
    ClientFlags,
    Header,
    Data { option: u32, len: usize },
    Skip { option: u32, remaining: usize },
    Finished,
}

/// The server's side of one connection's handshake.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    /// The piece that is being collected: flags, a header or an option's data.
    piece: Vec<u8>,
    no_zeroes: bool,
    structured: bool,
    contexts: MetaContexts,
}

impl Handshake {
    /// Begins a session by writing the server's greeting to `out`.
    #[must_use]
    pub fn start(out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&NBD_INIT_MAGIC.to_be_bytes());
        out.extend_from_slice(&NBD_OPTS_MAGIC.to_be_bytes());
        out.extend_from_slice(&(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES).to_be_bytes());
        Self {
            state: State::ClientFlags,
            piece: Vec::new(),
            no_zeroes: false,
            structured: false,
            contexts: MetaContexts::default(),
        }
    }

    /// Takes bytes from the client and appends to `out` what to send back. Stops after each answered option, so call it
    /// again while input is left.
    ///
    /// # Errors
    /// [`HandshakeError`]: close the connection. `out` may hold earlier replies worth sending.
    ///
    /// # Panics
    /// When called after an outcome other than [`Outcome::NeedMore`], or after an error.
    pub fn feed(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
        directory: &dyn ExportDirectory,
    ) -> Result<Step, HandshakeError> {
        let mut consumed = 0;
        loop {
            let rest = &input[consumed..];
            let (used, outcome) = match self.advance(rest, out, directory) {
                Ok(progress) => progress,
                Err(error) => {
                    self.state = State::Finished;
                    return Err(error);
                }
            };
            consumed += used;
            match outcome {
                None if consumed < input.len() => {}
                None => return Ok(Step { consumed, outcome: Outcome::NeedMore }),
                Some(outcome) => {
                    if outcome != Outcome::NeedMore {
                        self.state = State::Finished;
                    }
                    return Ok(Step { consumed, outcome });
                }
            }
        }
    }

    /// Collects towards the current state's piece and, once it is whole, takes one edge. Returns the bytes used and, if
    /// an option was answered, the outcome.
    fn advance(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
        directory: &dyn ExportDirectory,
    ) -> Result<(usize, Option<Outcome>), HandshakeError> {
        match self.state {
            State::ClientFlags => {
                let (used, whole) = self.collect(input, 4);
                if whole {
                    self.client_flags()?;
                }
                Ok((used, None))
            }
            State::Header => {
                let (used, whole) = self.collect(input, OPTION_HEADER_LEN);
                let outcome = if whole { self.header(out, directory)? } else { None };
                Ok((used, outcome))
            }
            State::Data { option, len } => {
                let (used, whole) = self.collect(input, len);
                let outcome = if whole { Some(self.data(option, out, directory)?) } else { None };
                Ok((used, outcome))
            }
            State::Skip { option, remaining } => {
                let used = remaining.min(input.len());
                if used < remaining {
                    self.state = State::Skip { option, remaining: remaining - used };
                    return Ok((used, None));
                }
                self.state = State::Header;
                let answer = option::answer_oversized(option, out);
                Ok((used, Some(Self::conclude(answer)?)))
            }
            State::Finished => panic!("a handshake that ended is fed again"),
        }
    }

    /// Moves bytes to the piece until it is `len` long. Returns how many, and whether it is whole.
    fn collect(&mut self, input: &[u8], len: usize) -> (usize, bool) {
        let used = (len - self.piece.len()).min(input.len());
        self.piece.extend_from_slice(&input[..used]);
        (used, self.piece.len() == len)
    }

    fn client_flags(&mut self) -> Result<(), HandshakeError> {
        let flags = u32::from_be_bytes(self.piece[..4].try_into().expect("collected 4"));
        self.piece.clear();
        if flags & !(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES) != 0 {
            return Err(HandshakeError::ClientFlags { flags });
        }
        self.no_zeroes = flags & NBD_FLAG_C_NO_ZEROES != 0;
        self.state = State::Header;
        Ok(())
    }

    fn header(
        &mut self,
        out: &mut Vec<u8>,
        directory: &dyn ExportDirectory,
    ) -> Result<Option<Outcome>, HandshakeError> {
        let found = u64::from_be_bytes(self.piece[..8].try_into().expect("collected 16"));
        let option = u32::from_be_bytes(self.piece[8..12].try_into().expect("collected 16"));
        let len = u32::from_be_bytes(self.piece[12..16].try_into().expect("collected 16"));
        self.piece.clear();
        if found != NBD_OPTS_MAGIC {
            return Err(HandshakeError::OptionMagic { found });
        }
        if len > OPTION_SKIP_LEN_MAX || (len > NBD_OPTION_LEN_MAX && option == NBD_OPT_EXPORT_NAME) {
            return Err(HandshakeError::OptionLen { option, len });
        }
        let data_len = usize::try_from(len).expect("bounded above");
        if len > NBD_OPTION_LEN_MAX {
            self.state = State::Skip { option, remaining: data_len };
            return Ok(None);
        }
        self.state = State::Data { option, len: data_len };
        if data_len == 0 { self.data(option, out, directory).map(Some) } else { Ok(None) }
    }

    fn data(
        &mut self,
        option: u32,
        out: &mut Vec<u8>,
        directory: &dyn ExportDirectory,
    ) -> Result<Outcome, HandshakeError> {
        self.state = State::Header;
        let piece = std::mem::take(&mut self.piece);
        let mut session = option::Session {
            no_zeroes: self.no_zeroes,
            structured: &mut self.structured,
            contexts: &mut self.contexts,
            directory,
        };
        let answer = session.answer(option, &piece, out);
        Self::conclude(answer)
    }

    fn conclude(answer: Answer) -> Result<Outcome, HandshakeError> {
        match answer {
            Answer::Replied => Ok(Outcome::NeedMore),
            Answer::Opened(opened) => Ok(Outcome::Transmission(opened)),
            Answer::Leave => Ok(Outcome::Close),
            Answer::Unanswerable { message } => Err(HandshakeError::ExportName { message }),
        }
    }
}

#[cfg(test)]
mod tests;
