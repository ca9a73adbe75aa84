//! NBD's constants, and the request: decodes it and checks whether it may be carried out.
//!
//! Stands between the socket and the disk: a [`Request`] is what the client sent, an [`Operation`] is what the disk may
//! be asked to do. Invariants: every range of an [`Operation`] is non-empty and lies inside the export, and a payload is
//! at most [`PAYLOAD_LEN_MAX`]. What a client may not do comes back as a [`Rejection`] with NBD's own error code and the
//! word on how the byte stream goes on. Only a wrong magic number cannot be answered: where the next request starts is
//! then unknown.

use crate::error::IoError;
use crate::limits::PAYLOAD_LEN_MAX;
use crate::units::ByteRange;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First eight bytes a server sends (`NBDMAGIC`).
pub const NBD_INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of a newstyle server, and first of every option (`IHAVEOPT`).
pub const NBD_OPTS_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First eight bytes of every reply to an option.
pub const NBD_REP_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First four bytes of every request.
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
/// First four bytes of a simple reply.
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First four bytes of a structured reply chunk.
pub const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flag: the server answers every option.
pub const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the server can leave out the 124 zero bytes after `NBD_OPT_EXPORT_NAME`.
pub const NBD_FLAG_NO_ZEROES: u16 = 1 << 1;
/// Client flag matching [`NBD_FLAG_FIXED_NEWSTYLE`].
pub const NBD_FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag matching [`NBD_FLAG_NO_ZEROES`].
pub const NBD_FLAG_C_NO_ZEROES: u32 = 1 << 1;

/// Transmission flag: always set.
pub const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: writes are refused.
pub const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: `NBD_CMD_FLUSH` is served.
pub const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: [`NBD_CMD_FLAG_FUA`] is honoured.
pub const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
/// Transmission flag: `NBD_CMD_TRIM` is served.
pub const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: `NBD_CMD_WRITE_ZEROES` is served.
pub const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: [`NBD_CMD_FLAG_DF`] is honoured.
pub const NBD_FLAG_SEND_DF: u16 = 1 << 7;
/// Transmission flag: a flush on one connection covers what was acknowledged on all.
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: `NBD_CMD_CACHE` is served.
pub const NBD_FLAG_SEND_CACHE: u16 = 1 << 10;

/// Option: open an export without a way to hear of errors.
pub const NBD_OPT_EXPORT_NAME: u32 = 1;
/// Option: end the session.
pub const NBD_OPT_ABORT: u32 = 2;
/// Option: name the exports.
pub const NBD_OPT_LIST: u32 = 3;
/// Option: go on under TLS.
pub const NBD_OPT_STARTTLS: u32 = 5;
/// Option: describe an export.
pub const NBD_OPT_INFO: u32 = 6;
/// Option: describe an export and open it.
pub const NBD_OPT_GO: u32 = 7;
/// Option: structured replies from here on.
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: name the metadata contexts of an export.
pub const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
/// Option: choose the metadata contexts for `NBD_CMD_BLOCK_STATUS`.
pub const NBD_OPT_SET_META_CONTEXT: u32 = 10;
/// Option: 64-bit lengths. Not served.
pub const NBD_OPT_EXTENDED_HEADERS: u32 = 11;

/// Option reply: done.
pub const NBD_REP_ACK: u32 = 1;
/// Option reply: one export of a list.
pub const NBD_REP_SERVER: u32 = 2;
/// Option reply: one fact about an export.
pub const NBD_REP_INFO: u32 = 3;
/// Option reply: one metadata context.
pub const NBD_REP_META_CONTEXT: u32 = 4;
/// Set in every option reply that is an error.
pub const NBD_REP_FLAG_ERROR: u32 = 1 << 31;
/// Option error: not known or not served here.
pub const NBD_REP_ERR_UNSUP: u32 = NBD_REP_FLAG_ERROR + 1;
/// Option error: understood, but refused.
pub const NBD_REP_ERR_POLICY: u32 = NBD_REP_FLAG_ERROR + 2;
/// Option error: malformed.
pub const NBD_REP_ERR_INVALID: u32 = NBD_REP_FLAG_ERROR + 3;
/// Option error: no such export.
pub const NBD_REP_ERR_UNKNOWN: u32 = NBD_REP_FLAG_ERROR + 6;
/// Option error: the server is going away.
pub const NBD_REP_ERR_SHUTDOWN: u32 = NBD_REP_FLAG_ERROR + 7;
/// Option error: too long.
pub const NBD_REP_ERR_TOO_BIG: u32 = NBD_REP_FLAG_ERROR + 9;

/// Fact about an export: size and transmission flags.
pub const NBD_INFO_EXPORT: u16 = 0;
/// Fact about an export: its canonical name.
pub const NBD_INFO_NAME: u16 = 1;
/// Fact about an export: a text for people.
pub const NBD_INFO_DESCRIPTION: u16 = 2;
/// Fact about an export: smallest, preferred and largest request.
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;

/// Command flag: reply only once the data is on stable storage.
pub const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag of write-zeroes: keep the range allocated.
pub const NBD_CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag of read: one content chunk only.
pub const NBD_CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag of block status: one extent only.
pub const NBD_CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Command flag of write-zeroes: fail rather than be slow. Not advertised here, so refused.
pub const NBD_CMD_FLAG_FAST_ZERO: u16 = 1 << 4;

/// Structured reply flag: the last chunk of this reply.
pub const NBD_REPLY_FLAG_DONE: u16 = 1 << 0;
/// Structured reply chunk without payload.
pub const NBD_REPLY_TYPE_NONE: u16 = 0;
/// Structured reply chunk: an offset and the bytes there.
pub const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Structured reply chunk: an offset and a length that reads as zeros.
pub const NBD_REPLY_TYPE_OFFSET_HOLE: u16 = 2;
/// Structured reply chunk: extents of one metadata context.
pub const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Set in every chunk type that is an error.
pub const NBD_REPLY_TYPE_FLAG_ERROR: u16 = 1 << 15;
/// Structured reply chunk: the request failed.
pub const NBD_REPLY_TYPE_ERROR: u16 = NBD_REPLY_TYPE_FLAG_ERROR + 1;
/// Structured reply chunk: the request failed at an offset.
pub const NBD_REPLY_TYPE_ERROR_OFFSET: u16 = NBD_REPLY_TYPE_FLAG_ERROR + 2;

/// Extent flag of `base:allocation`: nothing is allocated there.
pub const NBD_STATE_HOLE: u32 = 1 << 0;
/// Extent flag of `base:allocation`: it reads as zeros.
pub const NBD_STATE_ZERO: u32 = 1 << 1;

/// The one metadata context served.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The id under which replies carry [`BASE_ALLOCATION`]. Not 0, which `NBD_OPT_LIST_META_CONTEXT` must send.
pub const BASE_ALLOCATION_ID: u32 = 1;

/// Bytes of a string the protocol lets either side send.
pub const STRING_LEN_MAX: usize = 4096;

/// Bytes of a request on the wire, a write's payload not counted.
pub const REQUEST_LEN: usize = 28;

/// A refused write's payload up to this long is read and thrown away to stay in step with the client; a longer one
/// closes the connection after the error. Four times the largest legal payload tells a client that ignores the
/// advertised limit from one that would keep us reading for minutes.
pub const PAYLOAD_DRAIN_LEN_MAX: u32 = 4 * PAYLOAD_LEN_MAX;

/// NBD's error codes, the only ones a reply may carry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[repr(u32)]
pub enum NbdErrno {
    /// The export is read-only.
    #[error("operation not permitted (EPERM)")]
    Perm = 1,
    /// The disk or the mirror failed.
    #[error("input/output error (EIO)")]
    Io = 5,
    /// The server is out of memory.
    #[error("cannot allocate memory (ENOMEM)")]
    NoMem = 12,
    /// The request makes no sense.
    #[error("invalid argument (EINVAL)")]
    Inval = 22,
    /// A write past the end, or a full disk.
    #[error("no space left on device (ENOSPC)")]
    NoSpace = 28,
    /// Longer than a structured reply can carry.
    #[error("value too large (EOVERFLOW)")]
    Overflow = 75,
    /// Only for fast-zero.
    #[error("operation not supported (ENOTSUP)")]
    NotSup = 95,
    /// This node stops serving the export.
    #[error("server is shutting down (ESHUTDOWN)")]
    Shutdown = 108,
}

impl NbdErrno {
    /// The code on the wire.
    #[must_use]
    pub fn to_wire(self) -> u32 {
        self as u32
    }

    /// Reads a non-zero code; one that the protocol does not define counts as `EINVAL`, as the protocol asks of clients.
    #[must_use]
    pub fn from_wire(value: u32) -> Self {
        match value {
            1 => Self::Perm,
            5 => Self::Io,
            12 => Self::NoMem,
            28 => Self::NoSpace,
            75 => Self::Overflow,
            95 => Self::NotSup,
            108 => Self::Shutdown,
            _ => Self::Inval,
        }
    }
}

impl From<IoError> for NbdErrno {
    fn from(error: IoError) -> Self {
        match error {
            IoError::NotPrimary => Self::Shutdown,
            IoError::DiskFailed => Self::Io,
            IoError::Invalid => Self::Inval,
            IoError::NoSpace => Self::NoSpace,
        }
    }
}

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Command {
    /// `NBD_CMD_READ`
    Read = 0,
    /// `NBD_CMD_WRITE`
    Write = 1,
    /// `NBD_CMD_DISC`
    Disc = 2,
    /// `NBD_CMD_FLUSH`
    Flush = 3,
    /// `NBD_CMD_TRIM`
    Trim = 4,
    /// `NBD_CMD_CACHE`
    Cache = 5,
    /// `NBD_CMD_WRITE_ZEROES`
    WriteZeroes = 6,
    /// `NBD_CMD_BLOCK_STATUS`
    BlockStatus = 7,
}

impl Command {
    /// The command with this number, if there is one.
    #[must_use]
    pub fn from_wire(value: u16) -> Option<Self> {
        Some(match value {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disc,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            _ => return None,
        })
    }

    /// The number on the wire.
    #[must_use]
    pub fn to_wire(self) -> u16 {
        self as u16
    }

    /// Flags that may come with this command. FUA may come with any, as clients are known to set it on all.
    fn flags_allowed(self, negotiated: &Negotiated) -> u16 {
        NBD_CMD_FLAG_FUA
            | match self {
                Self::Read if negotiated.structured => NBD_CMD_FLAG_DF,
                Self::WriteZeroes => NBD_CMD_FLAG_NO_HOLE,
                Self::BlockStatus => NBD_CMD_FLAG_REQ_ONE,
                _ => 0,
            }
    }
}

/// A request's header as it stands on the wire.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RequestWire {
    magic: U32,
    flags: U16,
    command: U16,
    cookie: U64,
    offset: U64,
    len: U32,
}

const _: () = assert!(size_of::<RequestWire>() == REQUEST_LEN);

/// Bytes that should have been a request start with the wrong magic number. The connection must close: where the next
/// request starts cannot be known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "not a request: it starts with {found:#010x} instead of {NBD_REQUEST_MAGIC:#010x}; the client is out of step"
)]
pub struct BadRequestMagic {
    /// What stood there.
    pub found: u32,
}

/// What the handshake settled for one connection, which [`Request::check`] judges by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Negotiated {
    /// Bytes of the export.
    pub size: u64,
    /// Writes are refused with `EPERM`.
    pub read_only: bool,
    /// Reads are answered by structured replies.
    pub structured: bool,
    /// Block status may be asked for [`BASE_ALLOCATION`]. Implies `structured`.
    pub base_allocation: bool,
}

/// A request as sent; nothing in it is believed yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// Number of the command; may be one nobody knows.
    pub command: u16,
    /// Chosen by the client, returned in each reply.
    pub cookie: u64,
    /// First byte concerned.
    pub offset: u64,
    /// Bytes concerned; for a write, bytes of payload that follow.
    pub len: u32,
}

/// What the disk may be asked to do. Ranges are non-empty and inside the export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Send these bytes.
    Read {
        /// At most [`PAYLOAD_LEN_MAX`] long.
        range: ByteRange,
    },
    /// Take this many bytes of payload and put them there.
    Write {
        /// At most [`PAYLOAD_LEN_MAX`] long.
        range: ByteRange,
        /// Reply only when durable.
        fua: bool,
    },
    /// Finish what is open, reply to it, close. Has no reply of its own.
    Disconnect,
    /// Make everything acknowledged so far durable.
    Flush,
    /// The contents are not needed any more. May be up to 4 GiB long.
    Trim {
        /// What to release.
        range: ByteRange,
        /// Reply only when durable.
        fua: bool,
    },
    /// The client will read this soon. May be up to 4 GiB long.
    Cache {
        /// What to read ahead.
        range: ByteRange,
    },
    /// Make it read as zeros. May be up to 4 GiB long.
    WriteZeroes {
        /// What to zero.
        range: ByteRange,
        /// Reply only when durable.
        fua: bool,
        /// Keep it allocated.
        no_hole: bool,
    },
    /// Which parts are allocated?
    BlockStatus {
        /// The range of interest.
        range: ByteRange,
        /// Tell of one extent only.
        one: bool,
    },
}

/// A request that may be carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CheckedRequest {
    /// To be returned in each reply.
    pub cookie: u64,
    /// What to do.
    pub operation: Operation,
}

/// How the byte stream goes on after a refused request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AfterRejection {
    /// The next request follows.
    Continue,
    /// This many bytes of payload come first: read and discard them.
    Drain {
        /// Bytes to discard.
        len: u32,
    },
    /// The payload is too long to discard: send the error, then close.
    Close,
}

/// A request that is refused, with what to tell the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{reason}: {errno}")]
pub struct Rejection {
    /// The code of the reply.
    pub errno: NbdErrno,
    /// What was wrong, for the message of a structured reply and the log.
    pub reason: &'static str,
    /// How to stay in step with the client.
    pub after: AfterRejection,
}

impl Request {
    /// Reads a header from the wire.
    ///
    /// # Errors
    /// [`BadRequestMagic`], upon which the connection must close. Everything else is for [`Request::check`] to judge.
    pub fn decode(bytes: &[u8; REQUEST_LEN]) -> Result<Self, BadRequestMagic> {
        let wire: RequestWire = zerocopy::transmute!(*bytes);
        if wire.magic.get() != NBD_REQUEST_MAGIC {
            return Err(BadRequestMagic { found: wire.magic.get() });
        }
        Ok(Self {
            flags: wire.flags.get(),
            command: wire.command.get(),
            cookie: wire.cookie.get(),
            offset: wire.offset.get(),
            len: wire.len.get(),
        })
    }

    /// The header as a client sends it.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        zerocopy::transmute!(RequestWire {
            magic: NBD_REQUEST_MAGIC.into(),
            flags: self.flags.into(),
            command: self.command.into(),
            cookie: self.cookie.into(),
            offset: self.offset.into(),
            len: self.len.into(),
        })
    }

    /// Judges the request against what the handshake settled.
    ///
    /// Zero lengths are refused with `EINVAL`: the protocol leaves them open, and a mirror of nothing would only make
    /// empty ranges everyone behind has to expect.
    ///
    /// # Errors
    /// A [`Rejection`] with the code the protocol names for the case.
    pub fn check(&self, negotiated: &Negotiated) -> Result<CheckedRequest, Rejection> {
        match self.judge(negotiated) {
            Ok(operation) => Ok(CheckedRequest { cookie: self.cookie, operation }),
            Err((errno, reason)) => Err(Rejection { errno, reason, after: self.after_rejection() }),
        }
    }

    fn after_rejection(&self) -> AfterRejection {
        if self.command != Command::Write.to_wire() || self.len == 0 {
            AfterRejection::Continue
        } else if self.len <= PAYLOAD_DRAIN_LEN_MAX {
            AfterRejection::Drain { len: self.len }
        } else {
            AfterRejection::Close
        }
    }

    fn judge(&self, negotiated: &Negotiated) -> Result<Operation, (NbdErrno, &'static str)> {
        let Some(command) = Command::from_wire(self.command) else {
            return Err((NbdErrno::Inval, "unknown command"));
        };
        if command == Command::Disc {
            return Ok(Operation::Disconnect);
        }
        if self.flags & !command.flags_allowed(negotiated) != 0 {
            return Err((
                NbdErrno::Inval,
                "command flag that is unknown, not negotiated or not for this command",
            ));
        }
        let fua = self.flags & NBD_CMD_FLAG_FUA != 0;
        if command == Command::Flush {
            return if self.offset == 0 && self.len == 0 {
                Ok(Operation::Flush)
            } else {
                Err((NbdErrno::Inval, "flush with an offset or a length, which are reserved"))
            };
        }
        let range = self.judge_range(command, negotiated)?;
        Ok(match command {
            Command::Read => Operation::Read { range },
            Command::Write => Operation::Write { range, fua },
            Command::Trim => Operation::Trim { range, fua },
            Command::Cache => Operation::Cache { range },
            Command::WriteZeroes => {
                Operation::WriteZeroes { range, fua, no_hole: self.flags & NBD_CMD_FLAG_NO_HOLE != 0 }
            }
            Command::BlockStatus if negotiated.base_allocation => {
                Operation::BlockStatus { range, one: self.flags & NBD_CMD_FLAG_REQ_ONE != 0 }
            }
            Command::BlockStatus => {
                return Err((NbdErrno::Inval, "block status, but no metadata context was selected"));
            }
            Command::Disc | Command::Flush => unreachable!("answered above"),
        })
    }

    /// Range, size limits and permission of the commands that concern a range.
    fn judge_range(
        &self,
        command: Command,
        negotiated: &Negotiated,
    ) -> Result<ByteRange, (NbdErrno, &'static str)> {
        let changes = matches!(command, Command::Write | Command::Trim | Command::WriteZeroes);
        if changes && negotiated.read_only {
            return Err((NbdErrno::Perm, "the export is read-only"));
        }
        if self.len == 0 {
            return Err((NbdErrno::Inval, "request of zero length"));
        }
        let range = ByteRange::new(self.offset, u64::from(self.len));
        if !range.fits(negotiated.size) {
            return Err(match command {
                Command::Write | Command::WriteZeroes => {
                    (NbdErrno::NoSpace, "write past the end of the export")
                }
                _ => (NbdErrno::Inval, "request past the end of the export"),
            });
        }
        if self.len > PAYLOAD_LEN_MAX {
            match command {
                Command::Write => return Err((NbdErrno::Inval, "payload over the advertised maximum")),
                Command::Read if negotiated.structured => {
                    return Err((NbdErrno::Overflow, "read over the advertised maximum"));
                }
                Command::Read => return Err((NbdErrno::Inval, "read over the advertised maximum")),
                _ => {}
            }
        }
        Ok(range)
    }
}

#[cfg(test)]
mod tests;
