//! The daemon's listening sockets: NBD clients' and peers'.

use super::addresses::Addresses;
use super::peers;
use super::registry::Registry;
use crate::admin::SocketFile;
use crate::config::{Endpoint, Node};
use costandby_datapath::reactor::command::Command;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use tokio::task::JoinHandle;

/// Connections the kernel holds until the reactor takes them: 16 connections of several clients at once.
const NBD_BACKLOG: i32 = 128;

/// The same for peers, which dial for all their volumes at once. The kernel cuts it to `net.core.somaxconn`.
const PEERS_BACKLOG: i32 = 4096;

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
}

impl Listening {
    /// Binds what can be bound, and keeps trying the rest.
    pub(super) fn start(node: &Node, registry: &Arc<Registry>, addresses: &Arc<Addresses>) -> Self {
        let files = Arc::new(Mutex::new(Vec::new()));
        let mut nbd = Vec::new();
        for endpoint in &node.nbd {
            let (registry, files) = (Arc::clone(registry), Arc::clone(&files));
            let hand_over = move |listener: NbdListener| {
                files.lock().expect("nobody panics with it").extend(listener.file);
                registry.reactor.send(Command::Listen { listener: listener.socket });
            };
            let address = endpoint.to_string();
            match addresses.attempt(&address, || bind_nbd(endpoint)) {
                Some(listener) => hand_over(listener),
                None => {
                    let (addresses, endpoint) = (Arc::clone(addresses), endpoint.clone());
                    nbd.push(tokio::spawn(async move {
                        hand_over(addresses.insist(&address, move || bind_nbd(&endpoint)).await);
                    }));
                }
            }
        }
        let (registry, addresses, listen) = (Arc::clone(registry), Arc::clone(addresses), node.listen);
        let address = format!("tcp:{listen}");
        let bound = addresses.attempt(&address, || bind_peers(listen));
        let peers = tokio::spawn(async move {
            let mut bound = bound;
            loop {
                let listener = match bound.take() {
                    Some(listener) => listener,
                    None => addresses.insist(&address, move || bind_peers(listen)).await,
                };
                match tokio::net::TcpListener::from_std(listener) {
                    Ok(listener) => return peers::accept(listener, registry).await,
                    Err(error) => {
                        addresses.attempt(&address, || Err::<(), _>(error.to_string()));
                    }
                }
            }
        });
        Self { files, nbd, peers }
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

/// Removes a socket that nobody answers on, which is what a killed daemon left behind.
fn remove_stale(path: &Path) -> Result<(), String> {
    use std::os::unix::fs::FileTypeExt;
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.to_string()),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err("there is a file that is no socket: move it away, or choose another path".to_owned());
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err("another program answers there: end it, or choose another path".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|error| format!("a socket that was left over: {error}"))
        }
        Err(error) => Err(format!("asking who answers there: {error}")),
    }
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
