//! The daemon's listening sockets: NBD clients' and peers'.

use super::addresses::Addresses;
use super::peers;
use super::registry::Registry;
use crate::config::{Endpoint, Node};
use crate::socket_file::{self, InTheWay, SocketFile};
use costandby_datapath::reactor::command::Command;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Connections the kernel holds until the reactor takes them: 16 connections of several clients at once.
const NBD_BACKLOG: i32 = 128;

/// The same for peers, which dial for all their volumes at once. The kernel cuts it to `net.core.somaxconn`.
const PEERS_BACKLOG: i32 = 4096;

/// How long the admin API, and the line that says that the daemon is up, wait for the first try of each address: a bind takes
/// microseconds, but for a directory on a file system that hangs.
const FIRST_TRIES_MAX: Duration = Duration::from_secs(1);

/// A socket for NBD clients.
struct NbdListener {
    socket: OwnedFd,
    /// Of a unix socket, to be removed at the end.
    file: Option<SocketFile>,
}

/// The sockets a daemon listens on, and those it still tries for. Dropping this removes the NBD clients' unix sockets; the
/// reactor has the sockets themselves.
pub(super) struct Listening {
    files: Arc<Mutex<Vec<SocketFile>>>,
    nbd: Vec<JoinHandle<()>>,
    peers: JoinHandle<()>,
    /// Ends when each address was tried once.
    tried: mpsc::Receiver<Infallible>,
}

impl Listening {
    /// Binds what can be bound, and keeps trying the rest: each address in a task of its own, so that none waits for another.
    pub(super) fn start(node: &Node, registry: &Arc<Registry>, addresses: &Arc<Addresses>) -> Self {
        let files = Arc::new(Mutex::new(Vec::new()));
        let (trying, tried) = mpsc::channel(1);
        let listen = |endpoint: &Endpoint| {
            let (registry, files) = (Arc::clone(registry), Arc::clone(&files));
            let (addresses, endpoint, trying) = (Arc::clone(addresses), endpoint.clone(), trying.clone());
            tokio::spawn(async move {
                let address = endpoint.to_string();
                let bind = move || bind_nbd(&endpoint);
                let bound = addresses.attempt(&address, bind.clone()).await;
                let bound_at_once = bound.is_some();
                let hand_over = |listener: NbdListener| {
                    files.lock().expect("nobody panics with it").extend(listener.file);
                    registry.reactor.send(Command::Listen { listener: listener.socket });
                };
                bound.map(hand_over);
                drop(trying);
                if !bound_at_once {
                    hand_over(addresses.insist(&address, bind).await);
                }
            })
        };
        let nbd = node.nbd.iter().map(listen).collect();
        let (registry, addresses, listen) = (Arc::clone(registry), Arc::clone(addresses), node.listen);
        let peers = tokio::spawn(async move {
            let address = format!("tcp:{listen}");
            let mut bound = addresses.attempt(&address, move || bind_peers(listen)).await;
            drop(trying);
            loop {
                let listener = match bound.take() {
                    Some(listener) => listener,
                    None => addresses.insist(&address, move || bind_peers(listen)).await,
                };
                match tokio::net::TcpListener::from_std(listener) {
                    Ok(listener) => return peers::accept(listener, registry).await,
                    Err(error) => {
                        addresses.note::<()>(&address, Err(error.to_string()));
                    }
                }
            }
        });
        Self { files, nbd, peers, tried }
    }

    /// Waits until each address was tried once, but not for one that takes long.
    pub(super) async fn tried(&mut self) {
        // Nothing is ever sent: it ends with the last sender.
        let _ = tokio::time::timeout(FIRST_TRIES_MAX, self.tried.recv()).await;
    }

    /// Takes no more connections from peers.
    pub(super) fn stop_peers(&self) {
        self.peers.abort();
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.peers.abort();
        for task in &self.nbd {
            task.abort();
        }
        self.files.lock().expect("nobody panics with it").clear();
    }
}

/// Binds an endpoint for NBD clients, non-blocking.
fn bind_nbd(endpoint: &Endpoint) -> Result<NbdListener, String> {
    match endpoint {
        Endpoint::Unix(path) => bind_unix(path),
        Endpoint::Tcp(address) => {
            let socket =
                bind_tcp(*address, NBD_BACKLOG, Present::Later).map_err(|error| explain_tcp(&error))?;
            Ok(NbdListener { socket, file: None })
        }
    }
}

/// Binds the address for peers, non-blocking.
fn bind_peers(address: SocketAddr) -> Result<TcpListener, String> {
    bind_tcp(address, PEERS_BACKLOG, Present::Now).map(TcpListener::from).map_err(|error| explain_tcp(&error))
}

fn explain_tcp(error: &io::Error) -> String {
    let remedy = match error.kind() {
        io::ErrorKind::AddrInUse => "another program listens there, and `ss -ltnp` says which",
        io::ErrorKind::AddrNotAvailable => {
            "no interface of this machine has that address; `ip address` shows what they have"
        }
        io::ErrorKind::PermissionDenied => {
            "ports below 1024 are for root, and for programs with CAP_NET_BIND_SERVICE"
        }
        _ => return error.to_string(),
    };
    format!("{error}: {remedy}")
}

fn bind_unix(path: &Path) -> Result<NbdListener, String> {
    let io = |error: io::Error| match error.kind() {
        io::ErrorKind::PermissionDenied => {
            let user = rustix::process::geteuid().as_raw();
            format!("{error}: let user {user} make files in its directory, or choose another path")
        }
        _ => error.to_string(),
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(io)?;
    }
    remove_stale(path)?;
    let bind = || {
        let socket = stream_socket(AddressFamily::UNIX)?;
        // Before the bind, so that there is no instant with a wider one: never for all users, and for the daemon's group only
        // where its umask says so. Whoever may open it reads and writes the volumes.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, NBD_BACKLOG)?;
        Ok(socket)
    };
    let socket = bind().map_err(io)?;
    Ok(NbdListener { socket, file: Some(SocketFile::at(path)) })
}

/// Removes what a killed daemon left behind.
fn remove_stale(path: &Path) -> Result<(), String> {
    socket_file::remove_stale(path).map_err(|found| match found {
        InTheWay::NotASocket => {
            "there is a file that is no socket: move it away, or choose another path".to_owned()
        }
        InTheWay::Answers => "another program answers there: end it, or choose another path".to_owned(),
        InTheWay::Stuck => {
            "another program holds that socket and takes no connections: `ss -xlp` says which; end it, \
                            or choose another path"
                .to_owned()
        }
        InTheWay::Io { doing, source } => format!("{doing} that path: {source}"),
    })
}

/// Whether an interface has to have the address already.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Present {
    Now,
    /// It may come later, and go and come again: an address that moves between the nodes with the service.
    Later,
}

fn bind_tcp(address: SocketAddr, backlog: i32, present: Present) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = stream_socket(family)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if present == Present::Later {
        // `IP_FREEBIND`. Where the system refuses it, `bind` says what is missing.
        let _ = match address {
            SocketAddr::V4(_) => sockopt::set_ip_freebind(&socket, true),
            SocketAddr::V6(_) => sockopt::set_ipv6_freebind(&socket, true),
        };
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, backlog)?;
    Ok(socket)
}

fn stream_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_for_clients_need_not_be_here_yet() {
        // Of the blocks for documentation: no interface has them.
        for address in ["198.51.100.7:10809", "[2001:db8::7]:10809"] {
            let address: SocketAddr = address.parse().expect("an address");
            bind_tcp(address, 1, Present::Later).unwrap_or_else(|error| panic!("{address}: {error}"));
            let error = bind_tcp(address, 1, Present::Now).expect_err("no interface has it");
            assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable, "{address}");
        }
    }
}
