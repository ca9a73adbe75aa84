//! The receiving half: replies in whatever order and form the server sends them.
//!
//! Last step of a client's way. Invariants: bytes of a read go straight to the caller's buffer, and only inside what was
//! asked for; a structured reply is told once, when its last chunk came; memory is bounded by [`PARTIAL_REPLIES_MAX`].
//! Survives any bytes: what makes no sense is a [`Breach`], after which the connection is of no more use.

use super::connect::Stream;
use super::{Breach, During, ExportInfo, NbdError};
use costandby_datapath::front::nbd::proto::{
    NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_BLOCK_STATUS, NBD_REPLY_TYPE_FLAG_ERROR, NBD_REPLY_TYPE_NONE,
    NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_OFFSET_HOLE, NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC, NbdErrno, STRING_LEN_MAX,
};
use std::collections::HashMap;
use std::io::{BufReader, Read};

/// Replies of which some chunks have come: as many as any caller keeps requests in flight.
const PARTIAL_REPLIES_MAX: usize = 4096;

/// Bytes read ahead: many small replies a system call; larger data bypasses it.
const BUFFER_LEN: usize = 64 << 10;

/// Extents of one reply that are believed, the most the protocol asks servers to send.
const EXTENTS_MAX: u32 = 1 << 20;

/// Where a read's bytes belong.
#[derive(Debug)]
pub struct ReadTarget<'a> {
    /// The offset that was asked for.
    pub offset: u64,
    /// As long as was asked for.
    pub bytes: &'a mut [u8],
}

/// Who knows the buffers of the reads in flight.
pub trait ReadBuffers {
    /// The buffer of the read under this cookie, `None` if the cookie is no read.
    fn target(&mut self, cookie: u64) -> Option<ReadTarget<'_>>;
}

/// For callers with no read in flight.
#[derive(Clone, Copy, Debug)]
pub struct NoReads;

impl ReadBuffers for NoReads {
    fn target(&mut self, _cookie: u64) -> Option<ReadTarget<'_>> {
        None
    }
}

/// By cookie: the offset asked for and the buffer. Entries are the caller's to add and remove.
impl ReadBuffers for HashMap<u64, (u64, Vec<u8>)> {
    fn target(&mut self, cookie: u64) -> Option<ReadTarget<'_>> {
        self.get_mut(&cookie).map(|(offset, bytes)| ReadTarget { offset: *offset, bytes })
    }
}

/// Consecutive bytes of one allocation status.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Bytes.
    pub len: u32,
    /// `NBD_STATE_*`
    pub flags: u32,
}

/// The server's no to a request.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{errno}{}{message}", if message.is_empty() { "" } else { ": " })]
pub struct ReplyError {
    /// The code.
    pub errno: NbdErrno,
    /// The server's words; empty unless replies are structured.
    pub message: String,
}

/// A request's end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    /// Which request.
    pub cookie: u64,
    /// Success, with extents if it was a block status request, or the server's no.
    pub result: Result<Vec<Extent>, ReplyError>,
}

/// The chunks of one reply so far.
#[derive(Default, Debug)]
struct Partial {
    error: Option<ReplyError>,
    extents: Vec<Extent>,
    data_len: u64,
}

/// The receiving half.
#[derive(Debug)]
pub struct NbdReceiver {
    stream: BufReader<Stream>,
    info: ExportInfo,
    partial: HashMap<u64, Partial>,
}

impl NbdReceiver {
    pub(super) fn new(stream: Stream, info: ExportInfo) -> Self {
        Self { stream: BufReader::with_capacity(BUFFER_LEN, stream), info, partial: HashMap::new() }
    }

    /// Waits for the next request to end, whichever it is. A read's bytes are in its buffer then.
    ///
    /// # Errors
    /// [`NbdError::Io`] and [`NbdError::Protocol`]; a request's own failure is in the [`Reply`].
    pub fn receive(&mut self, reads: &mut dyn ReadBuffers) -> Result<Reply, NbdError> {
        loop {
            let magic = u32::from_be_bytes(self.take()?);
            match magic {
                NBD_SIMPLE_REPLY_MAGIC => return self.simple(reads),
                NBD_STRUCTURED_REPLY_MAGIC if self.info.structured => {
                    if let Some(reply) = self.chunk(reads)? {
                        return Ok(reply);
                    }
                }
                _ => return Err(Breach::Magic { what: "a reply", found: u64::from(magic) }.into()),
            }
        }
    }

    /// Waits for the server to close.
    pub(super) fn expect_end(&mut self) -> Result<(), NbdError> {
        match self.stream.read(&mut [0]).during("waiting for the server to close")? {
            0 => Ok(()),
            _ => Err(nonsense("a reply after the disconnect")),
        }
    }

    fn simple(&mut self, reads: &mut dyn ReadBuffers) -> Result<Reply, NbdError> {
        let code = u32::from_be_bytes(self.take()?);
        let cookie = u64::from_be_bytes(self.take()?);
        if code != 0 {
            let error = ReplyError { errno: NbdErrno::from_wire(code), message: String::new() };
            return Ok(Reply { cookie, result: Err(error) });
        }
        if let Some(target) = reads.target(cookie) {
            if self.info.structured {
                return Err(nonsense("a simple reply to a read where structured ones were agreed"));
            }
            self.stream.read_exact(target.bytes).during("reading data")?;
        }
        Ok(Reply { cookie, result: Ok(Vec::new()) })
    }

    /// Takes one chunk; returns the reply if it was the last.
    fn chunk(&mut self, reads: &mut dyn ReadBuffers) -> Result<Option<Reply>, NbdError> {
        let flags = u16::from_be_bytes(self.take()?);
        let kind = u16::from_be_bytes(self.take()?);
        let cookie = u64::from_be_bytes(self.take()?);
        let len = u32::from_be_bytes(self.take()?);
        let mut partial = self.partial.remove(&cookie).unwrap_or_default();
        match kind {
            NBD_REPLY_TYPE_NONE if len == 0 => {}
            NBD_REPLY_TYPE_OFFSET_DATA if len > 8 => {
                let data_len = u64::from(len) - 8;
                let place = self.place(reads, cookie, |_| Ok(data_len))?;
                self.stream.read_exact(place).during("reading data")?;
                partial.data_len += data_len;
            }
            NBD_REPLY_TYPE_OFFSET_HOLE if len == 12 => {
                let place = self.place(reads, cookie, |receiver| {
                    receiver.take().map(u32::from_be_bytes).map(u64::from)
                })?;
                place.fill(0);
                partial.data_len += place.len() as u64;
            }
            NBD_REPLY_TYPE_BLOCK_STATUS if len >= 12 && len % 8 == 4 => {
                partial.extents = self.extents((len - 4) / 8)?;
            }
            kind if kind & NBD_REPLY_TYPE_FLAG_ERROR != 0 => {
                let error = self.error(len)?;
                partial.error.get_or_insert(error);
            }
            _ => return Err(nonsense("a chunk of unknown type or wrong length")),
        }
        if flags & NBD_REPLY_FLAG_DONE == 0 {
            if self.partial.len() >= PARTIAL_REPLIES_MAX {
                return Err(nonsense("more unfinished replies than requests"));
            }
            self.partial.insert(cookie, partial);
            return Ok(None);
        }
        if let Some(error) = partial.error {
            return Ok(Some(Reply { cookie, result: Err(error) }));
        }
        let asked_len = reads.target(cookie).map_or(0, |target| target.bytes.len() as u64);
        if partial.data_len != asked_len {
            return Err(nonsense("a reply of success with less or more data than was asked for"));
        }
        Ok(Some(Reply { cookie, result: Ok(partial.extents) }))
    }

    /// Takes a chunk's offset, then its length from `len`, and finds the part of the caller's buffer they mean.
    fn place<'r>(
        &mut self,
        reads: &'r mut dyn ReadBuffers,
        cookie: u64,
        len: impl FnOnce(&mut Self) -> Result<u64, NbdError>,
    ) -> Result<&'r mut [u8], NbdError> {
        let offset = u64::from_be_bytes(self.take()?);
        let len = len(self)?;
        let Some(target) = reads.target(cookie) else {
            return Err(Breach::Cookie { found: cookie }.into());
        };
        let start = offset.checked_sub(target.offset).and_then(|start| usize::try_from(start).ok());
        let end = start.and_then(|start| start.checked_add(usize::try_from(len).ok()?));
        match (start, end) {
            (Some(start), Some(end)) if end <= target.bytes.len() => Ok(&mut target.bytes[start..end]),
            _ => Err(nonsense("data outside of what was asked for")),
        }
    }

    fn extents(&mut self, count: u32) -> Result<Vec<Extent>, NbdError> {
        let context = u32::from_be_bytes(self.take()?);
        if Some(context) != self.info.base_allocation_id || count > EXTENTS_MAX {
            return Err(nonsense("extents of another metadata context, or too many"));
        }
        let mut extents = Vec::new();
        for _ in 0..count {
            let len = u32::from_be_bytes(self.take()?);
            extents.push(Extent { len, flags: u32::from_be_bytes(self.take()?) });
        }
        Ok(extents)
    }

    fn error(&mut self, len: u32) -> Result<ReplyError, NbdError> {
        let Some(rest) = len.checked_sub(6).and_then(|rest| usize::try_from(rest).ok()) else {
            return Err(nonsense("an error chunk too short for its error"));
        };
        let code = u32::from_be_bytes(self.take()?);
        let message_len = usize::from(u16::from_be_bytes(self.take()?));
        // Behind the message at most an offset may stand.
        if code == 0 || message_len > STRING_LEN_MAX || message_len > rest || rest > STRING_LEN_MAX + 8 {
            return Err(nonsense("an error chunk without error, or with a text longer than itself"));
        }
        let mut text = vec![0; rest];
        self.stream.read_exact(&mut text).during("reading an error")?;
        let message = String::from_utf8_lossy(&text[..message_len]).into_owned();
        Ok(ReplyError { errno: NbdErrno::from_wire(code), message })
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], NbdError> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).during("reading a reply")?;
        Ok(bytes)
    }
}

fn nonsense(what: &'static str) -> NbdError {
    Breach::Nonsense { what }.into()
}
