//! Connecting: the socket, and the client's side of the handshake.
//!
//! Second step of a client's way, between the address and the first request. Invariant: every read of the server's words
//! is bounded, in bytes and in time. Survives a server that refuses, stalls or is no NBD server.

use super::uri::{Endpoint, NbdUri};
use super::{Breach, During, ExportInfo, NbdError, Options};
use costandby_datapath::front::nbd::proto::{
    BASE_ALLOCATION, NBD_FLAG_C_FIXED_NEWSTYLE, NBD_FLAG_C_NO_ZEROES, NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_NO_ZEROES, NBD_INFO_BLOCK_SIZE, NBD_INFO_EXPORT, NBD_INIT_MAGIC, NBD_OPT_ABORT, NBD_OPT_GO,
    NBD_OPT_SET_META_CONTEXT, NBD_OPT_STRUCTURED_REPLY, NBD_OPTS_MAGIC, NBD_REP_ACK, NBD_REP_ERR_UNSUP,
    NBD_REP_FLAG_ERROR, NBD_REP_INFO, NBD_REP_MAGIC, NBD_REP_META_CONTEXT,
};
use costandby_datapath::limits::PAYLOAD_LEN_MAX;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;

/// Bytes of one option reply that is believed: the longest legitimate one is a text of 4096 bytes.
const REPLY_LEN_MAX: u32 = 16 << 10;

/// Replies to one option that are read before the server counts as broken: no option sent here has more than a few.
const REPLIES_MAX: usize = 64;

/// A connected socket of either family.
#[derive(Debug)]
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn connect(endpoint: &Endpoint, options: &Options) -> io::Result<Self> {
        let timeout = Some(options.timeout);
        match endpoint {
            Endpoint::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)?;
                Ok(Self::Unix(stream))
            }
            Endpoint::Tcp { host, port } => {
                let mut result = Err(io::Error::new(io::ErrorKind::NotFound, "the host name has no address"));
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    result = TcpStream::connect_timeout(&address, options.timeout);
                    if result.is_ok() {
                        break;
                    }
                }
                let stream = result?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)?;
                Ok(Self::Tcp(stream))
            }
        }
    }

    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
        })
    }

    pub(super) fn cut(&self) {
        // An error means that the connection is gone already.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Read for Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(bytes),
            Self::Tcp(stream) => stream.read(bytes),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write_vectored(pieces),
            Self::Tcp(stream) => stream.write_vectored(pieces),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Connects to the export and leaves the stream at its first request.
pub(super) fn open(uri: &NbdUri, options: &Options) -> Result<(Stream, ExportInfo), NbdError> {
    let mut stream = Stream::connect(&uri.endpoint, options).during("connecting")?;
    greet(&mut stream)?;
    let structured = (options.structured || options.base_allocation)
        && match ask(&mut stream, NBD_OPT_STRUCTURED_REPLY, &[]) {
            Ok(_) => true,
            Err(NbdError::Refused { code: NBD_REP_ERR_UNSUP, .. }) => false,
            Err(error) => return Err(error),
        };
    let base_allocation_id =
        if structured && options.base_allocation { select_context(&mut stream, &uri.export)? } else { None };
    let mut info =
        ExportInfo { size: 0, flags: 0, payload_len_max: PAYLOAD_LEN_MAX, structured, base_allocation_id };
    match go(&mut stream, &uri.export, &mut info) {
        Err(refused @ NbdError::Refused { .. }) => {
            // A courtesy: what counts is the refusal, whether or not the server still hears us.
            let _ = send_option(&mut stream, NBD_OPT_ABORT, &[]);
            Err(refused)
        }
        Err(error) => Err(error),
        Ok(()) => Ok((stream, info)),
    }
}

fn greet(stream: &mut Stream) -> Result<(), NbdError> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).during("reading the greeting")?;
    for (what, at, expected) in
        [("the greeting", 0, NBD_INIT_MAGIC), ("the second half of the greeting", 8, NBD_OPTS_MAGIC)]
    {
        let found = u64::from_be_bytes(greeting[at..at + 8].try_into().expect("8 of 18 bytes"));
        if found != expected {
            return Err(Breach::Magic { what, found }.into());
        }
    }
    let offered = u16::from_be_bytes([greeting[16], greeting[17]]);
    if offered & NBD_FLAG_FIXED_NEWSTYLE == 0 {
        return Err(Breach::Nonsense { what: "no fixed newstyle negotiation: the server is too old" }.into());
    }
    let mut flags = NBD_FLAG_C_FIXED_NEWSTYLE;
    if offered & NBD_FLAG_NO_ZEROES != 0 {
        flags |= NBD_FLAG_C_NO_ZEROES;
    }
    stream.write_all(&flags.to_be_bytes()).during("sending the client flags")
}

fn select_context(stream: &mut Stream, export: &str) -> Result<Option<u32>, NbdError> {
    let mut data = string(export);
    data.extend(1_u32.to_be_bytes());
    data.extend(string(BASE_ALLOCATION));
    let replies = match ask(stream, NBD_OPT_SET_META_CONTEXT, &data) {
        Ok(replies) => replies,
        // If the export is to blame, opening it says so again.
        Err(NbdError::Refused { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let context = replies.iter().find(|(kind, _)| *kind == NBD_REP_META_CONTEXT);
    let Some((_, data)) = context else { return Ok(None) };
    match data.split_at_checked(4) {
        Some((id, name)) if name == BASE_ALLOCATION.as_bytes() => {
            Ok(Some(u32::from_be_bytes(id.try_into().expect("split at 4"))))
        }
        _ => Err(Breach::Nonsense { what: "a metadata context that was not asked for" }.into()),
    }
}

fn go(stream: &mut Stream, export: &str, info: &mut ExportInfo) -> Result<(), NbdError> {
    let mut data = string(export);
    data.extend(1_u16.to_be_bytes());
    data.extend(NBD_INFO_BLOCK_SIZE.to_be_bytes());
    let mut told = false;
    for (kind, data) in ask(stream, NBD_OPT_GO, &data)? {
        let Some((what, fact)) = data.split_at_checked(2).filter(|_| kind == NBD_REP_INFO) else { continue };
        match (u16::from_be_bytes([what[0], what[1]]), fact.len()) {
            (NBD_INFO_EXPORT, 10) => {
                info.size = u64::from_be_bytes(fact[..8].try_into().expect("8 of 10 bytes"));
                info.flags = u16::from_be_bytes([fact[8], fact[9]]);
                told = true;
            }
            (NBD_INFO_BLOCK_SIZE, 12) => {
                let len_max = u32::from_be_bytes(fact[8..].try_into().expect("4 of 12 bytes"));
                info.payload_len_max = len_max.min(PAYLOAD_LEN_MAX);
            }
            (NBD_INFO_EXPORT | NBD_INFO_BLOCK_SIZE, _) => {
                return Err(Breach::Nonsense { what: "a fact about the export of the wrong length" }.into());
            }
            _ => {}
        }
    }
    if told { Ok(()) } else { Err(Breach::Nonsense { what: "an export opened without its size" }.into()) }
}

fn string(text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len()).expect("names and contexts are short");
    [&len.to_be_bytes(), text.as_bytes()].concat()
}

fn send_option(stream: &mut Stream, option: u32, data: &[u8]) -> Result<(), NbdError> {
    let len = u32::try_from(data.len()).expect("options sent here are short");
    let bytes = [&NBD_OPTS_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes(), data].concat();
    stream.write_all(&bytes).during("sending an option")
}

/// Sends an option and returns the replies before the acknowledgement: type and data.
fn ask(stream: &mut Stream, option: u32, data: &[u8]) -> Result<Vec<(u32, Vec<u8>)>, NbdError> {
    send_option(stream, option, data)?;
    let mut replies = Vec::new();
    while replies.len() < REPLIES_MAX {
        let mut header = [0; 20];
        stream.read_exact(&mut header).during("reading an option's reply")?;
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("4 of 20 bytes"));
        let found = u64::from_be_bytes(header[..8].try_into().expect("8 of 20 bytes"));
        if found != NBD_REP_MAGIC {
            return Err(Breach::Magic { what: "an option's reply", found }.into());
        }
        let (kind, len) = (word(12), word(16));
        if word(8) != option || len > REPLY_LEN_MAX {
            return Err(
                Breach::Nonsense { what: "a reply to another option, or one of absurd length" }.into()
            );
        }
        let mut data = vec![0; usize::try_from(len).expect("bounded above")];
        stream.read_exact(&mut data).during("reading an option's reply")?;
        if kind == NBD_REP_ACK {
            return Ok(replies);
        }
        if kind & NBD_REP_FLAG_ERROR != 0 {
            let message = String::from_utf8_lossy(&data).into_owned();
            return Err(NbdError::Refused { code: kind, message });
        }
        replies.push((kind, data));
    }
    Err(Breach::Nonsense { what: "replies to an option without end" }.into())
}
