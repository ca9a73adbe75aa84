//! The daemon's listening sockets: NBD clients' and peers'.

use super::NodeError;
use crate::config::Endpoint;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Connections the kernel holds until the reactor takes them: 16 connections of several clients at once.
const BACKLOG: i32 = 128;

/// Binds an endpoint for NBD clients, non-blocking.
pub(super) fn bind_nbd(endpoint: &Endpoint) -> Result<OwnedFd, NodeError> {
    let bound = match endpoint {
        Endpoint::Unix(path) => bind_unix(path),
        Endpoint::Tcp(address) => bind_tcp(*address),
    };
    bound.map_err(|source| NodeError::Listen { endpoint: endpoint.to_string(), source })
}

/// Binds the address for peers, non-blocking.
pub(super) fn bind_peers(address: SocketAddr) -> Result<TcpListener, NodeError> {
    let bound = bind_tcp(address).map(TcpListener::from);
    bound.map_err(|source| NodeError::Listen { endpoint: format!("tcp:{address}"), source })
}

fn bind_unix(path: &Path) -> io::Result<OwnedFd> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    // A socket nobody answers on is what a killed daemon left behind.
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        use std::os::unix::fs::FileTypeExt;
        if !metadata.file_type().is_socket() {
            return Err(io::Error::other(
                "there is a file that is no socket: move it away, or choose another path",
            ));
        }
        if UnixStream::connect(path).is_err() {
            std::fs::remove_file(path)?;
        }
    }
    let socket = stream_socket(AddressFamily::UNIX)?;
    // Before the bind, so that there is no instant with a wider one: never for all users, and for the daemon's group only where
    // its umask says so. Whoever may open it reads and writes the volumes.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn bind_tcp(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = stream_socket(family)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn stream_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
}
