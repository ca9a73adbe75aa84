//! Connections from other nodes: accepted, proved, and handed to the task of the volume that they are for.
//!
//! One TCP connection carries one volume. It begins with the proof of the pair's key, on both sides ([`crate::secure`]); its
//! first message says which volume it is for. From then on it belongs to that volume's task, which holds at most one
//! conversation at a time.
//!
//! Invariant: nothing that comes over a connection reaches a volume's task before it was opened with the key, under a
//! handshake that both ends took part in just now. What comes before costs a place among [`super::strangers`] for a bounded
//! time, and the log a line now and then.

use super::connection::{HANDSHAKE_MAX, listen, part, plain, timed};
use super::inbox::tell;
use super::registry::Registry;
use super::strangers::{Refusals, Strangers};
use crate::hello::{Ask, Hello, HelloError, Message, Refuse, RefuseCode};
use crate::role::Obstacle;
use crate::secure::channel::Channel;
use crate::secure::handshake::SecureError;
use crate::task::Event;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

/// Connections that have proved nothing, and what they were refused for.
struct Door {
    began: Instant,
    strangers: Mutex<Strangers<AbortHandle>>,
    refusals: Mutex<Refusals>,
}

impl Door {
    fn refused(&self, from: IpAddr, text: &str) {
        let (now, text) = (self.began.elapsed(), plain(text));
        let line = self.refusals.lock().expect("nobody panics with it").note(now, from, &text);
        if let Some(line) = line {
            tracing::warn!("{line}");
        }
    }
}

/// Accepts connections from peers until aborted.
pub(super) async fn accept(listener: TcpListener, registry: Arc<Registry>) {
    let began = Instant::now();
    let door = Arc::new(Door { began, strangers: Mutex::default(), refusals: Mutex::default() });
    let mut refused = false;
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                if std::mem::take(&mut refused) {
                    tracing::info!("peers' connections are accepted again");
                }
                let (registry, there) = (Arc::clone(&registry), Arc::clone(&door));
                // Locked until it is entered, so that a task cannot leave before.
                let mut strangers = door.strangers.lock().expect("nobody panics with it");
                let number = strangers.next();
                let task = tokio::spawn(async move {
                    meet(stream, from.ip(), &registry, &there, number).await;
                });
                let gone = strangers.enter(from.ip(), task.abort_handle());
                drop(strangers);
                if let Some((ip, task)) = gone {
                    task.abort();
                    door.refused(
                        ip,
                        "too many connections that prove nothing; the oldest gives way to a new one",
                    );
                }
            }
            Err(error) => {
                // Out of descriptors, most likely: give way instead of spinning, and say so once.
                if !std::mem::replace(&mut refused, true) {
                    tracing::warn!(%error, "cannot accept peers' connections, which is tried again until it can be done");
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// What a connection to our port begins with.
enum First {
    Hello(Box<Hello>),
    Ask(Ask),
}

/// Lets a connection in that proves the key, and hands it to the task of the volume it is for.
async fn meet(stream: TcpStream, from: IpAddr, registry: &Registry, door: &Door, number: u64) {
    let node = registry.node.as_str();
    let mut proved = None;
    let admitted = admit(stream, registry, &mut proved).await;
    door.strangers.lock().expect("nobody panics with it").leave(number);
    let (channel, message) = match admitted {
        Ok(admitted) => admitted,
        // A proof and nothing more: `doctor` on the other node compares the keys so.
        Err(HelloError::Secure(SecureError::Io { source }))
            if proved.is_some() && source.kind() == io::ErrorKind::UnexpectedEof =>
        {
            return;
        }
        Err(error) => {
            // What was unsealed came from a living holder of the key, and is worth a word in `status`.
            if let Some(proved) = proved.filter(|_| !matches!(error, HelloError::Secure(_))) {
                // For whichever volume that was.
                for shared in registry.volumes.iter().filter(|shared| shared.peer.as_str() == proved) {
                    let obstacle = Obstacle::Failed { text: plain(&error.to_string()) };
                    tell(&shared.inbox, Event::Probed(Err(obstacle)));
                }
            }
            return door.refused(from, &error.to_string());
        }
    };
    let (volume, from_node, first) = match message {
        Message::Hello(hello) => (hello.volume.clone(), hello.node.clone(), First::Hello(hello)),
        Message::Ask(ask) => (ask.volume.clone(), ask.node.clone(), First::Ask(ask)),
        _ => {
            return door.refused(
                from,
                "a peer began with something else than a hello: run the same release on both nodes",
            );
        }
    };
    let proved = channel.peer();
    let found = registry.volumes.iter().find(|v| v.config.name.as_str() == volume);
    let text = match found {
        _ if from_node != proved => format!("node {proved} speaks of itself as {from_node}"),
        Some(shared) if shared.peer.as_str() == from_node => {
            // A task that has ended drops the stream, which tells the peer enough.
            let event = match first {
                First::Hello(hello) => Event::Accepted { stream: channel, hello },
                First::Ask(ask) => Event::Asked { stream: channel, ask },
            };
            tell(&shared.inbox, event);
            return;
        }
        Some(shared) => format!(
            "volume {volume} is shared by {node} and {} here, not by {from_node}: use the same configuration on both \
             nodes",
            shared.peer
        ),
        None => format!("node {node} has no volume {volume}: use the same configuration on both nodes"),
    };
    door.refused(from, &text);
    part(channel, Refuse { code: RefuseCode::Configuration, text }).await;
}

/// The proof of the key, and the first message: only that shows that the dialer lives, and is no recording.
async fn admit(
    stream: TcpStream,
    registry: &Registry,
    proved: &mut Option<String>,
) -> Result<(Channel, Message), HelloError> {
    let keys = registry.keys.keys();
    let handshake = Channel::accept(stream, &keys, registry.node.as_str());
    let mut channel = timed(HANDSHAKE_MAX, async { Ok(handshake.await?) }).await?;
    *proved = Some(channel.peer().to_owned());
    let message = listen(&mut channel).await?;
    Ok((channel, message))
}
