//! Why there is no RDMA connection.

use crate::transport::rdma::private_data::PrivateDataError;
use costandby_ffi::verbs::VerbsError;
use std::io;
use std::net::SocketAddr;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// RDMA does not work here, or not to there.
    #[error(transparent)]
    Verbs(#[from] VerbsError),
    /// The peer accepted, and is not what it should be.
    #[error("{peer} accepted the RDMA connection, but: {source}")]
    Introduction {
        /// Who.
        peer: SocketAddr,
        /// What was wrong.
        source: PrivateDataError,
    },
    /// The peer accepted without showing the secret.
    #[error("{peer} accepted the RDMA connection without the secret agreed with it: is it another node?")]
    Secret {
        /// Who.
        peer: SocketAddr,
    },
    /// No peer came, or none with the secret.
    #[error("the peer did not connect by RDMA in time{}", Refused(*refused))]
    NobodyCame {
        /// Connections turned away meanwhile.
        refused: u32,
    },
    /// Too many came without it.
    #[error("gave up listening for the peer{}", Refused(*refused))]
    TooManyStrangers {
        /// Connections turned away.
        refused: u32,
    },
    /// There is no memory for a ring.
    #[error("no memory for a ring of {len} bytes: {source}")]
    Ring {
        /// Bytes of it.
        len: usize,
        /// What the system said.
        source: io::Error,
    },
    /// The ring is another link's still.
    #[error("the volume's ring is still in use by the link before this one")]
    RingInUse,
    /// Whoever wanted it does not any more.
    #[error("it is not wanted any more")]
    GivenUp,
}

/// The end of a sentence.
struct Refused(u32);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, "; {count} other connections were turned away, which did not show its secret"),
        }
    }
}
