//! NBD clients of the reactor: who is let in, whom each is handed to, and how a connection ends.
//!
//! Nothing here blocks.

use super::{KIND_CONNECTION, Reactor, key};
use crate::front::nbd::connection::Connection;
use crate::front::nbd::end::ConnectionEnd;
use crate::front::nbd::handshake::{Export, ExportDirectory, ListedExport, Lookup};
use crate::volume::Volume;
use rustix::event::epoll::{self, EventFlags};
use rustix::net::SocketFlags;
use std::collections::HashMap;
use std::time::{Duration, Instant};

impl Reactor {
    pub(super) fn accept(&mut self, listener: usize, now: Instant) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        loop {
            let socket = match rustix::net::accept_with(&self.listeners[listener], flags) {
                Ok(socket) => socket,
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
                Err(error) => {
                    // Looked at again once a second ([`Reactor::keep_time`]), so said once.
                    if !std::mem::replace(&mut self.accept_refused, true) {
                        tracing::warn!(%error, "cannot accept NBD clients, which is tried again every second");
                    }
                    return;
                }
            };
            if std::mem::take(&mut self.accept_refused) {
                tracing::info!("NBD clients are accepted again");
            }
            if !self.has_place() {
                continue;
            }
            // Not a TCP socket: then there is nothing to set. A client whose host is gone is noticed in about two minutes.
            let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
            let _ = rustix::net::sockopt::set_socket_keepalive(&socket, true);
            let _ = rustix::net::sockopt::set_tcp_keepidle(&socket, Duration::from_secs(60));
            let _ = rustix::net::sockopt::set_tcp_keepintvl(&socket, Duration::from_secs(15));
            let _ = rustix::net::sockopt::set_tcp_keepcnt(&socket, 4);
            let index = self.connections.iter().position(Option::is_none).unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            let edges = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            if let Err(error) = epoll::add(&self.poller, &socket, key(KIND_CONNECTION, index), edges) {
                tracing::warn!(%error, "cannot watch an NBD client");
                continue;
            }
            self.connection_serial = self.connection_serial.wrapping_add(1);
            let number = u32::try_from(index).expect("bounded by CONNECTIONS_MAX");
            self.connections[index] = Some(Connection::new(socket, number, self.connection_serial, now));
            self.connections_len += 1;
        }
    }

    /// Whether one more NBD connection may be served. Who is turned away is told of once, and counted until there is a place.
    pub(super) fn has_place(&mut self) -> bool {
        let max = self.connections_max;
        if self.connections_len + self.lingering.count() >= max {
            // Each holds a descriptor, as a client does.
            self.lingering.close_oldest();
        }
        if self.connections_len >= max {
            if self.turned_away == 0 {
                tracing::warn!(
                    "an NBD client was turned away, as others are until one leaves: {max} are connected"
                );
            }
            self.turned_away += 1;
            return false;
        }
        if self.turned_away > 0 {
            tracing::info!(
                "NBD clients are let in again: {} were turned away",
                std::mem::take(&mut self.turned_away)
            );
        }
        true
    }

    pub(super) fn serve_connections(&mut self, now: Instant) -> bool {
        let mut any = false;
        if self.connections_len == 0 {
            return false;
        }
        for index in 0..self.connections.len() {
            let Some(connection) = &mut self.connections[index] else { continue };
            if !connection.wants_service() {
                continue;
            }
            let served = match connection.volume() {
                Some(volume) => {
                    if self.awake.wake(volume, now) {
                        self.volumes[volume].woke(now);
                    }
                    connection.service(&mut self.volumes[volume], now)
                }
                None => self.negotiate(index),
            };
            match served {
                Ok(busy) => any |= busy,
                Err(end) => {
                    self.end_connection(index, &end, now);
                    any = true;
                }
            }
        }
        any
    }

    pub(super) fn negotiate(&mut self, index: usize) -> Result<bool, ConnectionEnd> {
        let connection = self.connections[index].as_mut().expect("the caller looked");
        let directory = Directory { volumes: &self.volumes, absent: &self.absent };
        let Some((name, negotiated)) = connection.negotiate(&directory)? else { return Ok(false) };
        let volume = self.volumes.iter().position(|v| v.name() == name).expect("the directory knew it");
        tracing::debug!(volume = %name, "NBD client opened");
        connection.open(volume, negotiated);
        Ok(true)
    }

    pub(super) fn end_connection(&mut self, index: usize, end: &ConnectionEnd, now: Instant) {
        let Some(connection) = self.connections[index].take() else { return };
        self.connections_len -= 1;
        match end {
            ConnectionEnd::Gone | ConnectionEnd::Io(_) => tracing::debug!(%end, "NBD client"),
            ConnectionEnd::Protocol(_) => tracing::info!(%end, "NBD client disconnected"),
        }
        let volume = connection.volume();
        let socket = connection.close(volume.map(|volume| self.wake(volume)));
        // Its index may name another connection from here on.
        let _ = epoll::delete(&self.poller, &socket);
        self.lingering.add(socket, now);
        self.next_deadline = now;
    }

    /// Sends what the volume's clients are still owed, then closes them.
    pub(super) fn end_clients(&mut self, volume: usize, now: Instant) {
        for index in 0..self.connections.len() {
            let Some(connection) = &mut self.connections[index] else { continue };
            if connection.volume() == Some(volume) {
                // First, so that nothing that stands in the socket is taken. The caller has woken the volume.
                connection.leave(&mut self.volumes[volume]);
                // An error here ends it a line later anyway.
                let _ = connection.service(&mut self.volumes[volume], now);
                self.end_connection(index, &ConnectionEnd::Gone, now);
            }
        }
    }
}

/// What NBD clients see of the volumes.
struct Directory<'a> {
    volumes: &'a [Volume],
    absent: &'a HashMap<String, String>,
}

impl ExportDirectory for Directory<'_> {
    fn lookup(&self, name: &str) -> Lookup {
        let Some(volume) = self.volumes.iter().find(|v| v.name() == name) else {
            let absent = self.absent.get(name).cloned();
            return absent.map_or(Lookup::Unknown, |message| Lookup::Refused { message });
        };
        match volume.refusal() {
            Some(message) => Lookup::Refused { message: message.to_owned() },
            None => Lookup::Found(Export {
                size: volume.disk().size(),
                read_only: false,
                description: format!("costandby volume {name}"),
            }),
        }
    }

    fn list(&self) -> Vec<ListedExport> {
        let served = self.volumes.iter().filter(|v| v.refusal().is_none());
        served.map(|v| ListedExport { name: v.name().to_owned(), description: String::new() }).collect()
    }
}
