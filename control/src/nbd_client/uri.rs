//! NBD addresses: `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`.
//!
//! First step of a client's way. Invariant: what is printed parses back to the same address. Survives any text.

use super::NbdError;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The port of `nbd://` addresses that name none (assigned by IANA).
pub const PORT_DEFAULT: u16 = 10809;

/// Where a server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Endpoint {
    /// A socket file.
    Unix(PathBuf),
    /// A host and a port.
    Tcp {
        /// Name or address; an IPv6 address stands without brackets.
        host: String,
        /// Port.
        port: u16,
    },
}

/// An export at an endpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdUri {
    /// Where.
    pub endpoint: Endpoint,
    /// Which; empty for the server's default.
    pub export: String,
}

/// What is wrong with an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum UriProblem {
    /// Neither of the two forms.
    #[error("it must start with nbd:// or nbd+unix://")]
    Scheme,
    /// `nbd+unix` without a path.
    #[error("nbd+unix:///EXPORT?socket=PATH needs its socket")]
    Socket,
    /// A host in `nbd+unix`, or none in `nbd`.
    #[error("nbd:// needs a host, nbd+unix:// has none")]
    Host,
    /// Not a number up to 65535.
    #[error("the port is not a number from 0 to 65535")]
    Port,
    /// A `%` without two hexadecimal digits, or bytes that are no UTF-8.
    #[error("a percent escape is broken")]
    Escape,
    /// Something behind `?` that is not known.
    #[error("only ?socket=PATH is known, and only for nbd+unix")]
    Query,
}

impl FromStr for NbdUri {
    type Err = NbdError;

    fn from_str(uri: &str) -> Result<Self, NbdError> {
        parse(uri).map_err(|problem| NbdError::Uri { uri: uri.to_owned(), problem })
    }
}

fn parse(uri: &str) -> Result<NbdUri, UriProblem> {
    let (unix, rest) = if let Some(rest) = uri.strip_prefix("nbd+unix://") {
        (true, rest)
    } else if let Some(rest) = uri.strip_prefix("nbd://") {
        (false, rest)
    } else {
        return Err(UriProblem::Scheme);
    };
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
    let export = unescape(export)?;
    let endpoint = match (unix, authority, query) {
        (true, "", Some(query)) => {
            let path = query.strip_prefix("socket=").filter(|path| !path.contains('&'));
            let path = unescape(path.ok_or(UriProblem::Query)?)?;
            if path.is_empty() {
                return Err(UriProblem::Socket);
            }
            Endpoint::Unix(path.into())
        }
        (true, "", None) => return Err(UriProblem::Socket),
        (true, ..) => return Err(UriProblem::Host),
        (false, _, Some(_)) => return Err(UriProblem::Query),
        (false, authority, None) => tcp(authority)?,
    };
    Ok(NbdUri { endpoint, export })
}

fn tcp(authority: &str) -> Result<Endpoint, UriProblem> {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or(UriProblem::Host)?;
        match rest.strip_prefix(':') {
            None if rest.is_empty() => (host, None),
            None => return Err(UriProblem::Port),
            port => (host, port),
        }
    } else {
        authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port)))
    };
    if host.is_empty() {
        return Err(UriProblem::Host);
    }
    let port = match port {
        Some(port) => port.parse().map_err(|_| UriProblem::Port)?,
        None => PORT_DEFAULT,
    };
    Ok(Endpoint::Tcp { host: host.to_owned(), port })
}

fn unescape(text: &str) -> Result<String, UriProblem> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, tail) = rest.split_at_checked(2).ok_or(UriProblem::Escape)?;
        let digit = |byte: u8| char::from(byte).to_digit(16).ok_or(UriProblem::Escape);
        let value = digit(digits[0])? * 16 + digit(digits[1])?;
        bytes.push(u8::try_from(value).expect("two hexadecimal digits"));
        rest = tail;
    }
    String::from_utf8(bytes).map_err(|_| UriProblem::Escape)
}

/// Prints text so that it stands in an address: everything that could mean something there is escaped.
struct Escaped<'a>(&'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            if byte.is_ascii_alphanumeric() || b"-._~/:".contains(byte) {
                write!(f, "{}", char::from(*byte))?;
            } else {
                write!(f, "%{byte:02X}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = Escaped(self.export.as_bytes());
        match &self.endpoint {
            Endpoint::Unix(path) => {
                let path = Escaped(path.as_os_str().as_encoded_bytes());
                write!(f, "nbd+unix:///{export}?socket={path}")
            }
            Endpoint::Tcp { host, port } if host.contains(':') => write!(f, "nbd://[{host}]:{port}/{export}"),
            Endpoint::Tcp { host, port } => write!(f, "nbd://{host}:{port}/{export}"),
        }
    }
}
