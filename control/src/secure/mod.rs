//! Peers that prove who they are: the layer below the hello.
//!
//! ```text
//! dialer ── opening ──▶ acceptor      Noise `NNpsk0`, message 1, sealed with the pair's key: who dials whom
//!        ◀── answer ──                message 2: who answers. Or a rejection, in the clear, and the end
//!        ══ sealed messages ══        hello and all that follows it, each way under a key of this connection alone
//! ```
//!
//! Called by `node::peers`, which says and hears the same messages (`hello`) as if this layer were not there. From the
//! first sealed message that opens, the acceptor knows that the dialer holds the key *and* lives now; before it nothing
//! about any volume is said, decided or changed.
//!
//! - [`key`]: the key and its text form; [`keyring`]: the file, read again when it changes;
//! - [`handshake`]: the two messages and the sealed ones, sans-IO;
//! - [`channel`]: the same over a TCP connection.
//!
//! What it guarantees: who speaks holds the pair's key, is the node that it says it is as far as holders of the key tell
//! each other apart, and is no echo of an earlier connection or of this node itself. Messages of the conversation are
//! secret and unchanged. It does not cover what follows the conversation on the connection: the data frames.

pub mod channel;
pub mod handshake;
pub mod key;
pub mod keyring;
