//! What `doctor` says of the pair's key: whether a daemon would take the file, and whether the peers that run now hold the same
//! key, found by the handshake that daemons begin with and nothing after it.

use super::Check;
use crate::config::{Config, Node};
use crate::secure::channel::Channel;
use crate::secure::handshake::{Rejection, SecureError};
use crate::secure::key::{Key, Keys};
use crate::secure::keyring;
use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpStream;

/// How long a peer may take for connection and handshake: what a daemon gives it.
const COMPARE_MAX: Duration = Duration::from_secs(4);

const WHAT: &str = "key";

/// The checks for `node`.
pub(super) fn checks(config: &Config, node: &Node) -> Vec<Check> {
    let Some(path) = &config.key else {
        // Without either the daemon does not start; with `insecure` there is a line on that.
        return match config.check_supported(node.name.as_str()) {
            Err(error) if !config.insecure => vec![Check::fail(WHAT, error.to_string())],
            _ => Vec::new(),
        };
    };
    let keys = match keyring::read(path) {
        Ok(keys) => keys,
        Err(error) => return vec![Check::fail(WHAT, error.to_string())],
    };
    let shown: Vec<_> = keys.all().map(Key::fingerprint).collect();
    let text = format!("{}, for its owner alone, fingerprint {}", path.display(), shown.join(" and "));
    let mut checks = vec![Check::ok(WHAT, text)];
    if keys.second().is_some() {
        let text = "two keys are accepted: end the rotation with `costandby keygen --rotate use`, then `--rotate end`, and a copy \
                    to the other node after each";
        checks.push(Check::warn(WHAT, text));
    }
    let peers: BTreeSet<_> = config
        .volumes_of(node.name.as_str())
        .filter_map(|(volume, _)| volume.peer_of(node.name.as_str()))
        .filter_map(|peer| config.node(peer.as_str()).ok())
        .map(|peer| (peer.name.as_str(), peer.listen))
        .collect();
    checks.extend(peers.into_iter().map(|(peer, address)| compare(&keys, node.name.as_str(), peer, address)));
    checks
}

fn compare(keys: &Keys, node: &str, peer: &str, address: SocketAddr) -> Check {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let late = || Err(SecureError::from(io::Error::from(io::ErrorKind::TimedOut)));
    let dialled = runtime.map_err(SecureError::from).and_then(|runtime| {
        runtime.block_on(async {
            let shake = async {
                let stream = TcpStream::connect(address).await?;
                Channel::dial(stream, keys, node, peer).await
            };
            tokio::time::timeout(COMPARE_MAX, shake).await.unwrap_or_else(|_| late())
        })
    });
    match dialled {
        Ok(_) => Check::ok(WHAT, format!("{peer} at {address} holds it too")),
        Err(SecureError::Io { source }) => Check::warn(
            WHAT,
            format!(
                "not compared with {peer}, which does not answer at {address} ({source}): run this again when its daemon is up"
            ),
        ),
        Err(SecureError::Rejected(rejection @ Rejection::OtherKey)) => {
            Check::fail(WHAT, format!("{peer} at {address} holds another key: {rejection}"))
        }
        Err(error) => Check::fail(WHAT, format!("{peer} at {address}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use crate::secure::key::KEY_LEN;

    fn keys(byte: u8) -> Keys {
        Keys::one(Key::from_bytes([byte; KEY_LEN]))
    }

    /// What doctor on alpha, with key 1, says of beta with these keys.
    fn compared_with(theirs: &Keys) -> Check {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("bound");
        let address = listener.local_addr().expect("bound");
        let theirs = theirs.clone();
        let peer = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                listener.set_nonblocking(true).expect("a mode");
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                let (stream, _) = listener.accept().await.expect("accepted");
                let _ = Channel::accept(stream, &theirs, "beta").await;
            });
        });
        let check = compare(&keys(1), "alpha", "beta", address);
        peer.join().expect("no panic");
        check
    }

    #[test]
    fn the_peers_key_is_compared_by_a_handshake() {
        assert_eq!(compared_with(&keys(1)).verdict, Verdict::Ok);
        let two = Keys::two(Key::from_bytes([2; KEY_LEN]), Key::from_bytes([1; KEY_LEN]));
        assert_eq!(compared_with(&two).verdict, Verdict::Ok);
        let other = compared_with(&keys(2));
        assert!(other.verdict == Verdict::Fail && other.text.contains("holds another key"), "{}", other.text);
        let none = compared_with(&Keys::none());
        assert!(none.verdict == Verdict::Fail && none.text.contains("it has no key"), "{}", none.text);
        let closed = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("bound");
        let address = closed.local_addr().expect("bound");
        drop(closed);
        let absent = compare(&keys(1), "alpha", "beta", address);
        assert!(
            absent.verdict == Verdict::Warn && absent.text.contains("not compared with beta"),
            "{}",
            absent.text
        );
    }
}
