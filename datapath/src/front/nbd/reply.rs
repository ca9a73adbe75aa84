//! Encoders of the replies of the transmission phase, into fixed buffers, without allocation.
//!
//! Last step of a request's way: the reactor sends what these return, followed, for a read, by the bytes straight from
//! the mapping. Invariant: in a connection that negotiated structured replies a read is never answered by a simple
//! reply, not even in error. Replies without data are simple ones either way, which the protocol allows and which saves
//! four bytes and a branch in every client.

use super::proto::{
    BASE_ALLOCATION_ID, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_BLOCK_STATUS, NBD_REPLY_TYPE_ERROR,
    NBD_REPLY_TYPE_NONE, NBD_REPLY_TYPE_OFFSET_DATA, NBD_SIMPLE_REPLY_MAGIC, NBD_STRUCTURED_REPLY_MAGIC,
    NbdErrno,
};
use crate::units::ByteRange;

/// Bytes of a simple reply, payload not counted.
pub const SIMPLE_REPLY_LEN: usize = 16;

/// Bytes of a structured reply chunk's header.
pub const CHUNK_HEADER_LEN: usize = 20;

/// Bytes before the data of a structured read reply: the chunk's header and the offset.
pub const READ_HEADER_LEN_MAX: usize = CHUNK_HEADER_LEN + 8;

/// Bytes of message an error reply carries: one line for a person; longer text is cut.
pub const ERROR_MESSAGE_LEN_MAX: usize = 128;

/// Bytes of an error reply.
pub const ERROR_REPLY_LEN_MAX: usize = CHUNK_HEADER_LEN + 6 + ERROR_MESSAGE_LEN_MAX;

/// Extents one block status reply tells of. Clients ask again from where a reply ends, so this only sets how many a round
/// trip yields: 64 keep the reply within a kilobyte on the stack.
pub const EXTENTS_MAX: usize = 64;

/// Bytes of a block status reply.
pub const BLOCK_STATUS_LEN_MAX: usize = CHUNK_HEADER_LEN + 4 + 8 * EXTENTS_MAX;

/// Up to `N` encoded bytes.
#[derive(Clone, Copy, Debug)]
pub struct Encoded<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Encoded<N> {
    fn new() -> Self {
        Self { bytes: [0; N], len: 0 }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    /// What to send.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// A reply without data: success (`None`) or an error. Not for reads where replies are structured.
#[must_use]
pub fn simple_reply(cookie: u64, error: Option<NbdErrno>) -> [u8; SIMPLE_REPLY_LEN] {
    let mut bytes = [0; SIMPLE_REPLY_LEN];
    bytes[..4].copy_from_slice(&NBD_SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.map_or(0, NbdErrno::to_wire).to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// Header of a structured reply chunk with `payload_len` bytes to follow.
#[must_use]
pub fn chunk_header(flags: u16, kind: u16, cookie: u64, payload_len: u32) -> [u8; CHUNK_HEADER_LEN] {
    let mut bytes = [0; CHUNK_HEADER_LEN];
    bytes[..4].copy_from_slice(&NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&payload_len.to_be_bytes());
    bytes
}

/// Whether a structured read's data chunk is its last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finality {
    /// No error can turn up any more, or the connection closes if one does in mid-chunk.
    Done,
    /// [`done_chunk`] or [`error_reply`] follows the data.
    MoreFollows,
}

/// What stands before the data of a successful read of `range`: a simple reply, or a data chunk's header and offset.
/// `finality` says nothing where replies are simple.
///
/// # Panics
/// When the range is longer than a chunk can be: a checked request never is.
#[must_use]
pub fn read_header(
    cookie: u64,
    range: ByteRange,
    structured: bool,
    finality: Finality,
) -> Encoded<READ_HEADER_LEN_MAX> {
    let mut encoded = Encoded::new();
    if structured {
        let flags = if finality == Finality::Done { NBD_REPLY_FLAG_DONE } else { 0 };
        let payload_len = u32::try_from(range.len + 8).expect("a checked read fits one chunk");
        encoded.put(&chunk_header(flags, NBD_REPLY_TYPE_OFFSET_DATA, cookie, payload_len));
        encoded.put(&range.start.to_be_bytes());
    } else {
        encoded.put(&simple_reply(cookie, None));
    }
    encoded
}

/// The chunk that ends a structured reply in success.
#[must_use]
pub fn done_chunk(cookie: u64) -> [u8; CHUNK_HEADER_LEN] {
    chunk_header(NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, cookie, 0)
}

/// The reply to a request that failed; it ends the request. `message` reaches the client where replies are structured,
/// cut at a character's boundary to [`ERROR_MESSAGE_LEN_MAX`].
#[must_use]
pub fn error_reply(
    cookie: u64,
    errno: NbdErrno,
    message: &str,
    structured: bool,
) -> Encoded<ERROR_REPLY_LEN_MAX> {
    let mut encoded = Encoded::new();
    if structured {
        let message = truncate(message, ERROR_MESSAGE_LEN_MAX);
        let message_len = u16::try_from(message.len()).expect("cut to a length that fits");
        let payload_len = 6 + u32::from(message_len);
        encoded.put(&chunk_header(NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR, cookie, payload_len));
        encoded.put(&errno.to_wire().to_be_bytes());
        encoded.put(&message_len.to_be_bytes());
        encoded.put(message.as_bytes());
    } else {
        encoded.put(&simple_reply(cookie, Some(errno)));
    }
    encoded
}

/// The longest prefix of `text` within `len_max` bytes that ends between two characters.
pub(super) fn truncate(text: &str, len_max: usize) -> &str {
    if text.len() <= len_max {
        return text;
    }
    let end = (0..=len_max).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

/// A block status reply under construction: extents from the start of the requested range on.
#[derive(Clone, Debug)]
pub struct BlockStatus {
    extents: [(u32, u32); EXTENTS_MAX],
    count: usize,
    count_max: usize,
    remaining: u64,
}

impl BlockStatus {
    /// For a request of `range`; `one` if the client wants a single extent.
    #[must_use]
    pub fn new(range: ByteRange, one: bool) -> Self {
        Self {
            extents: [(0, 0); EXTENTS_MAX],
            count: 0,
            count_max: if one { 1 } else { EXTENTS_MAX },
            remaining: range.len,
        }
    }

    /// Appends the next `len` bytes with their `flags` ([`super::proto::NBD_STATE_HOLE`] and so on). What reaches past
    /// the request is cut, neighbours with the same flags merge, empty extents vanish. Returns whether more is wanted.
    pub fn push(&mut self, len: u64, flags: u32) -> bool {
        // The request's length is a u32, and so is every part of it.
        let len = u32::try_from(len.min(self.remaining)).unwrap_or(u32::MAX);
        if len > 0 {
            let last = self.count.checked_sub(1).map(|index| &mut self.extents[index]);
            match last {
                Some((last_len, last_flags)) if *last_flags == flags => *last_len += len,
                _ if self.count < self.count_max => {
                    self.extents[self.count] = (len, flags);
                    self.count += 1;
                }
                _ => {
                    self.remaining = 0;
                    return false;
                }
            }
            self.remaining -= u64::from(len);
        }
        self.remaining > 0
    }

    /// The reply.
    ///
    /// # Panics
    /// When no extent was pushed: the protocol has no reply for that.
    #[must_use]
    pub fn encode(&self, cookie: u64) -> Encoded<BLOCK_STATUS_LEN_MAX> {
        assert!(self.count > 0, "a block status reply tells of at least one extent");
        let payload_len = u32::try_from(4 + 8 * self.count).expect("at most EXTENTS_MAX extents");
        let mut encoded = Encoded::new();
        encoded.put(&chunk_header(NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_BLOCK_STATUS, cookie, payload_len));
        encoded.put(&BASE_ALLOCATION_ID.to_be_bytes());
        for (len, flags) in &self.extents[..self.count] {
            encoded.put(&len.to_be_bytes());
            encoded.put(&flags.to_be_bytes());
        }
        encoded
    }
}

#[cfg(test)]
mod tests;
