//! A small NBD client over blocking sockets, for the demo, the benches and the tests.
//!
//! Stands outside the daemon: it is what a user of a volume would be. [`NbdClient`] does one request at a time;
//! [`NbdClient::split`] gives the two halves for more, one to send with cookies of the caller's choice, one to receive in
//! whatever order the server answers. Invariants: a request that returned an error of kind [`NbdError::Errno`] left the
//! connection in step; after any other error the connection is of no more use. Survives a server that dies, stalls
//! (every call ends after the timeout) or answers nonsense.

mod connect;
mod receiver;
mod uri;

pub use receiver::{Extent, NbdReceiver, NoReads, ReadBuffers, ReadTarget, Reply, ReplyError};
pub use uri::{Endpoint, NbdUri, PORT_DEFAULT, UriProblem};

use connect::Stream;
use costandby_datapath::front::nbd::proto::{
    Command, NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE, NbdErrno, REQUEST_LEN, Request,
};
use std::io::{self, IoSlice, Write};
use std::time::Duration;

/// How to connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Ask for structured replies; without them errors have no text.
    pub structured: bool,
    /// Ask for `base:allocation`, which [`NbdClient::block_status`] needs. Implies asking for structured replies.
    pub base_allocation: bool,
    /// What a single send, receive or connect may take.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { structured: true, base_allocation: true, timeout: Duration::from_secs(10) }
    }
}

/// What the server said of the export and what was agreed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExportInfo {
    /// Bytes.
    pub size: u64,
    /// Transmission flags (`NBD_FLAG_*`).
    pub flags: u16,
    /// Largest payload the server takes.
    pub payload_len_max: u32,
    /// Replies are structured.
    pub structured: bool,
    /// The id under which block status replies carry `base:allocation`, if the server has it.
    pub base_allocation_id: Option<u32>,
}

/// How a server broke the protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Breach {
    /// A wrong magic number.
    #[error("{what} starts with {found:#x}")]
    Magic {
        /// What should have stood there.
        what: &'static str,
        /// What did.
        found: u64,
    },
    /// A reply to something else than was asked.
    #[error("reply to cookie {found:#x}, which nothing was asked under")]
    Cookie {
        /// As sent.
        found: u64,
    },
    /// A reply that makes no sense.
    #[error("{what}")]
    Nonsense {
        /// Which.
        what: &'static str,
    },
}

/// What can go wrong, by kind.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// Not an NBD address.
    #[error("{uri:?} is no NBD address: {problem}")]
    Uri {
        /// As given.
        uri: String,
        /// What is wrong with it.
        problem: UriProblem,
    },
    /// The server does not give out the export.
    #[error("the server refused: {message} (code {code:#010x})")]
    Refused {
        /// `NBD_REP_ERR_*`
        code: u32,
        /// The server's words; may be empty.
        message: String,
    },
    /// The connection failed, closed or took too long.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The server is no NBD server, or a broken one.
    #[error("the server broke the protocol: {0}")]
    Protocol(#[from] Breach),
    /// The server answered the request with an error. The connection lives on.
    #[error("request failed: {0}")]
    Errno(#[from] ReplyError),
}

impl NbdError {
    /// The server's error code, if it answered with one.
    #[must_use]
    pub fn errno(&self) -> Option<NbdErrno> {
        match self {
            Self::Errno(error) => Some(error.errno),
            _ => None,
        }
    }

    /// Whether the timeout of [`Options`] ran out.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        match self {
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
            }
            _ => false,
        }
    }
}

/// Names what was being done when an I/O error struck.
trait During<T> {
    fn during(self, what: &'static str) -> Result<T, NbdError>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: &'static str) -> Result<T, NbdError> {
        self.map_err(|source| NbdError::Io { what, source })
    }
}

/// The sending half. Cookies are the caller's; one must not be used again before its reply came.
#[derive(Debug)]
pub struct NbdSender {
    stream: Stream,
}

impl NbdSender {
    /// Sends any request, well-formed or not, and the payload behind it. Blocks until the kernel took it all.
    ///
    /// # Errors
    /// [`NbdError::Io`].
    pub fn send(&mut self, request: &Request, payload: &[u8]) -> Result<(), NbdError> {
        let header = request.encode();
        let mut sent = 0;
        while sent < REQUEST_LEN {
            let pieces = [IoSlice::new(&header[sent..]), IoSlice::new(payload)];
            match self.stream.write_vectored(&pieces) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero)).during("sending a request"),
                Ok(len) => sent += len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).during("sending a request"),
            }
        }
        self.stream.write_all(&payload[sent - REQUEST_LEN..]).during("sending a payload")
    }

    /// Sends bytes as they are, for tests of what a server makes of them.
    ///
    /// # Errors
    /// [`NbdError::Io`].
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<(), NbdError> {
        self.stream.write_all(bytes).during("sending bytes")
    }

    /// Asks for `len` bytes.
    ///
    /// # Errors
    /// [`NbdError::Io`].
    pub fn send_read(&mut self, cookie: u64, offset: u64, len: u32) -> Result<(), NbdError> {
        self.send(&request(Command::Read, 0, cookie, offset, len), &[])
    }

    /// Sends bytes to be written.
    ///
    /// # Errors
    /// [`NbdError::Io`].
    ///
    /// # Panics
    /// When `data` is 4 GiB or longer.
    pub fn send_write(&mut self, cookie: u64, offset: u64, data: &[u8], fua: bool) -> Result<(), NbdError> {
        let len = u32::try_from(data.len()).expect("a write's length fits 32 bits");
        self.send(&request(Command::Write, fua_flag(fua), cookie, offset, len), data)
    }

    /// Asks for everything acknowledged so far to be made durable.
    ///
    /// # Errors
    /// [`NbdError::Io`].
    pub fn send_flush(&mut self, cookie: u64) -> Result<(), NbdError> {
        self.send(&request(Command::Flush, 0, cookie, 0, 0), &[])
    }

    /// Says goodbye: the server finishes what is open and closes.
    ///
    /// # Errors
    /// [`NbdError::Io`].
    pub fn send_disconnect(&mut self) -> Result<(), NbdError> {
        self.send(&request(Command::Disc, 0, 0, 0, 0), &[])
    }

    /// Cuts the connection both ways without a word; a receive that waits ends with an error.
    pub fn cut(&self) {
        self.stream.cut();
    }
}

fn fua_flag(fua: bool) -> u16 {
    if fua { NBD_CMD_FLAG_FUA } else { 0 }
}

fn request(command: Command, flags: u16, cookie: u64, offset: u64, len: u32) -> Request {
    Request { flags, command: command.to_wire(), cookie, offset, len }
}

/// A connection to one export, one request at a time. Every call blocks until the reply.
#[derive(Debug)]
pub struct NbdClient {
    info: ExportInfo,
    sender: NbdSender,
    receiver: NbdReceiver,
    cookie: u64,
}

impl NbdClient {
    /// Connects and opens the export.
    ///
    /// # Errors
    /// [`NbdError::Io`], [`NbdError::Protocol`], or [`NbdError::Refused`] with the server's reason.
    pub fn connect(uri: &NbdUri, options: &Options) -> Result<Self, NbdError> {
        let (stream, info) = connect::open(uri, options)?;
        let receiver = NbdReceiver::new(stream.try_clone().during("duplicating the socket")?, info);
        Ok(Self { info, sender: NbdSender { stream }, receiver, cookie: 0 })
    }

    /// What the server said of the export.
    #[must_use]
    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// The halves, for many requests in flight.
    #[must_use]
    pub fn split(self) -> (NbdSender, NbdReceiver) {
        (self.sender, self.receiver)
    }

    /// Fills `data` from `offset` on, in as many requests as the server's largest payload makes of it.
    ///
    /// # Errors
    /// As sent by the server ([`NbdError::Errno`]); any other kind ends the connection.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<(), NbdError> {
        let mut offset = offset;
        for piece in data.chunks_mut(self.piece_len()) {
            let len = u32::try_from(piece.len()).expect("pieces are at most payload_len_max");
            let cookie = self.next_cookie();
            self.sender.send_read(cookie, offset, len)?;
            self.finish(cookie, &mut OneRead { cookie, target: ReadTarget { offset, bytes: piece } })?;
            offset += u64::from(len);
        }
        Ok(())
    }

    /// Writes `data` from `offset` on, in as many requests as the server's largest payload makes of it.
    ///
    /// # Errors
    /// As sent by the server ([`NbdError::Errno`]); any other kind ends the connection.
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<(), NbdError> {
        let mut offset = offset;
        for piece in data.chunks(self.piece_len()) {
            let cookie = self.next_cookie();
            self.sender.send_write(cookie, offset, piece, fua)?;
            self.finish(cookie, &mut NoReads)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Returns once everything written before is on stable storage.
    ///
    /// # Errors
    /// As sent by the server ([`NbdError::Errno`]); any other kind ends the connection.
    pub fn flush(&mut self) -> Result<(), NbdError> {
        self.bare(Command::Flush, 0, 0, 0).map(|_| ())
    }

    /// Tells the server that a range's contents are not needed.
    ///
    /// # Errors
    /// As sent by the server ([`NbdError::Errno`]); any other kind ends the connection.
    pub fn trim(&mut self, offset: u64, len: u32, fua: bool) -> Result<(), NbdError> {
        self.bare(Command::Trim, fua_flag(fua), offset, len).map(|_| ())
    }

    /// Zeroes a range; `no_hole` keeps it allocated.
    ///
    /// # Errors
    /// As sent by the server ([`NbdError::Errno`]); any other kind ends the connection.
    pub fn write_zeroes(&mut self, offset: u64, len: u32, fua: bool, no_hole: bool) -> Result<(), NbdError> {
        let flags = fua_flag(fua) | if no_hole { NBD_CMD_FLAG_NO_HOLE } else { 0 };
        self.bare(Command::WriteZeroes, flags, offset, len).map(|_| ())
    }

    /// Announces that a range will be read.
    ///
    /// # Errors
    /// As sent by the server ([`NbdError::Errno`]); any other kind ends the connection.
    pub fn cache(&mut self, offset: u64, len: u32) -> Result<(), NbdError> {
        self.bare(Command::Cache, 0, offset, len).map(|_| ())
    }

    /// Which parts of a range are allocated: consecutive extents from `offset` on, possibly ending short of the range or
    /// past it, as the protocol lets the server choose.
    ///
    /// # Errors
    /// As sent by the server ([`NbdError::Errno`]), `EINVAL` where `base:allocation` was not agreed; any other kind ends
    /// the connection.
    pub fn block_status(&mut self, offset: u64, len: u32) -> Result<Vec<Extent>, NbdError> {
        self.bare(Command::BlockStatus, 0, offset, len)
    }

    /// Sends any request, well-formed or not, and waits for its reply. The cookie is replaced by a fresh one. Not for
    /// reads that may succeed: there is nowhere to put the data.
    ///
    /// # Errors
    /// As sent by the server ([`NbdError::Errno`]); any other kind ends the connection.
    pub fn request(&mut self, request: &Request, payload: &[u8]) -> Result<Vec<Extent>, NbdError> {
        let cookie = self.next_cookie();
        self.sender.send(&Request { cookie, ..*request }, payload)?;
        self.finish(cookie, &mut NoReads)
    }

    /// Says goodbye and waits until the server closed.
    ///
    /// # Errors
    /// [`NbdError::Io`], or [`NbdError::Protocol`] if the server sends more.
    pub fn disconnect(mut self) -> Result<(), NbdError> {
        self.sender.send_disconnect()?;
        self.receiver.expect_end()
    }

    fn bare(&mut self, command: Command, flags: u16, offset: u64, len: u32) -> Result<Vec<Extent>, NbdError> {
        self.request(&request(command, flags, 0, offset, len), &[])
    }

    fn finish(&mut self, cookie: u64, reads: &mut dyn ReadBuffers) -> Result<Vec<Extent>, NbdError> {
        let reply = self.receiver.receive(reads)?;
        if reply.cookie != cookie {
            return Err(Breach::Cookie { found: reply.cookie }.into());
        }
        Ok(reply.result?)
    }

    fn next_cookie(&mut self) -> u64 {
        self.cookie += 1;
        self.cookie
    }

    fn piece_len(&self) -> usize {
        usize::try_from(self.info.payload_len_max).unwrap_or(usize::MAX).max(1)
    }
}

/// The one read in flight.
struct OneRead<'a> {
    cookie: u64,
    target: ReadTarget<'a>,
}

impl ReadBuffers for OneRead<'_> {
    fn target(&mut self, cookie: u64) -> Option<ReadTarget<'_>> {
        let target = ReadTarget { offset: self.target.offset, bytes: &mut *self.target.bytes };
        (cookie == self.cookie).then_some(target)
    }
}

#[cfg(test)]
mod tests;
