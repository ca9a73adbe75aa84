//! NBD clients of the reactor: accepts connections, assigns each to its volume, and ends it.
//!
//! Nothing here blocks.

use super::{KIND_CONNECTION, Reactor, key};
use crate::front::nbd::connection::Connection;
use crate::front::nbd::end::ConnectionEnd;
use crate::front::nbd::export::{Export, ExportDirectory, ListedExport, Lookup};
use crate::limits::{
    CLIENT_IDLE_S, CLIENT_KEEPALIVE_S, CLIENT_KEEPALIVE_STEP_S, CLIENT_KEEPALIVES, CLIENT_TIMEOUT_MS,
};
use crate::units::Token;
use crate::volume::Volume;
use rustix::event::epoll::{self, EventFlags};
use rustix::net::{SocketFlags, sockopt};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// Turns in which a client that has ended its direction may have what it sent taken before others are served: all the requests
/// that it may have open.
const ENDED_TURNS: usize = 4;

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
                        tracing::warn!(%error, "cannot accept NBD clients; trying again every second");
                    }
                    return;
                }
            };
            if std::mem::take(&mut self.accept_refused) {
                tracing::info!("NBD clients are accepted again");
            }
            if !self.has_place(now) {
                continue;
            }
            set_up(&socket);
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

    /// Whether one more NBD connection may be served, if need be in place of the one that has been idle for the longest. Who is
    /// turned away is told of once, and counted until there is a place.
    pub(super) fn has_place(&mut self, now: Instant) -> bool {
        let max = self.connections_max;
        if self.connections_len >= max {
            self.end_idle(now);
        }
        if self.connections_len + self.lingering.count() >= max {
            // Each holds a descriptor, as a client does.
            self.lingering.close_oldest();
        }
        if self.connections_len >= max {
            if self.turned_away == 0 {
                tracing::warn!(
                    "an NBD client was turned away: {max} are connected, and others are turned away until one leaves"
                );
            }
            self.turned_away += 1;
            return false;
        }
        if self.turned_away > 0 {
            tracing::info!(
                "NBD clients are accepted again; {} were turned away",
                std::mem::take(&mut self.turned_away)
            );
        }
        true
    }

    /// Closes the connection that has been idle for the longest, if that is long.
    fn end_idle(&mut self, now: Instant) {
        let idle = |connection: &Option<Connection>| connection.as_ref().and_then(|c| c.idle(now));
        let longest = (0..self.connections.len()).max_by_key(|index| idle(&self.connections[*index]));
        if let Some(index) = longest
            && idle(&self.connections[index]).is_some_and(|idle| idle >= Duration::from_secs(CLIENT_IDLE_S))
        {
            let text = "idle for long, and another client needs its place";
            self.end_connection(index, &ConnectionEnd::Protocol(text.into()), now);
        }
    }

    pub(super) fn serve_connections(&mut self, now: Instant) -> bool {
        let mut any = false;
        if self.connections_len == 0 {
            return false;
        }
        if self.client_ended {
            any |= self.serve_ended(now);
        }
        for index in 0..self.connections.len() {
            any |= self.serve_connection(index, now);
        }
        any
    }

    /// Before all others, takes what clients that have ended their direction had sent until then: nothing of it may be begun
    /// after what comes later.
    fn serve_ended(&mut self, now: Instant) -> bool {
        let mut any = false;
        self.client_ended = false;
        for index in 0..self.connections.len() {
            for _ in 0..ENDED_TURNS {
                if !self.connections[index].as_ref().is_some_and(Connection::is_half_closed) {
                    break;
                }
                self.client_ended = true;
                if !self.serve_connection(index, now) {
                    break;
                }
                any = true;
            }
        }
        any
    }

    fn serve_connection(&mut self, index: usize, now: Instant) -> bool {
        let Some(connection) = &mut self.connections[index] else { return false };
        if !connection.wants_service() {
            return false;
        }
        let changes = connection.changes();
        let served = match connection.volume() {
            Some(volume) => {
                if self.awake.wake(volume, now) {
                    self.volumes[volume].woke(now);
                }
                connection.service(&mut self.volumes[volume], &mut self.client_memory, now)
            }
            None => self.negotiate(index),
        };
        // Of two clients that have ended their direction nobody can tell which was first.
        let changed =
            (self.connections[index].as_ref()).is_some_and(|c| c.changes() != changes && !c.is_half_closed());
        if self.client_ended && changed {
            self.end_input_beside(index);
        }
        match served {
            Ok(busy) => busy,
            Err(end) => {
                self.end_connection(index, &end, now);
                true
            }
        }
    }

    /// A connection has taken a change: what others have not read of a client that may be gone comes too late.
    fn end_input_beside(&mut self, index: usize) {
        let volume = self.connections[index].as_ref().and_then(Connection::volume);
        for (other, connection) in self.connections.iter_mut().enumerate() {
            if let Some(connection) = connection
                && other != index
                && connection.volume() == volume
                && connection.is_half_closed()
            {
                connection.take_no_more(&mut self.client_memory);
            }
        }
    }

    /// Ends what a slow reader's reply keeps from a change. Where that takes more memory than readers may have, the one that has
    /// taken nothing for the longest time is closed.
    pub(super) fn unpin(&mut self, at: usize, token: Token) {
        let pins = |c: &Connection| c.volume() == Some(at) && c.pins(token);
        let Some(index) = self.connections.iter().position(|c| c.as_ref().is_some_and(pins)) else { return };
        while let Some(connection) = &mut self.connections[index] {
            if connection.unpin(token, &mut self.volumes[at], &mut self.client_memory) {
                return;
            }
            let own = connection.last_output();
            let copies = |c: &Connection| c.copy_stuck_since().filter(|_| c.volume() == Some(at));
            let others = self.connections.iter().map(|c| c.as_ref().and_then(copies)).enumerate();
            let slowest = others.filter_map(|(other, since)| Some((since?, other))).min();
            let slowest = slowest.filter(|(since, _)| *since <= own).map_or(index, |(_, other)| other);
            let text = "the client does not take its replies, which other clients wait for";
            self.end_connection(slowest, &ConnectionEnd::Protocol(text.into()), self.turned);
        }
    }

    /// Closes clients that take too long.
    pub(super) fn end_stalled(&mut self, now: Instant) -> bool {
        let mut any = false;
        for index in 0..self.connections.len() {
            let Some(connection) = &self.connections[index] else { continue };
            let contended = connection.volume().is_some_and(|volume| self.client_memory.is_contended(volume));
            if connection.is_stalled(now, contended) {
                let text = "the client stalled in the middle of a message";
                self.end_connection(index, &ConnectionEnd::Protocol(text.into()), now);
                any = true;
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
        if self.client_ended {
            self.wake(volume);
            // This may be the client of a connection that is half-closed.
            for (other, connection) in self.connections.iter_mut().enumerate() {
                if let Some(connection) = connection
                    && other != index
                    && connection.volume() == Some(volume)
                    && connection.is_half_closed()
                {
                    connection.leave(&mut self.volumes[volume], &mut self.client_memory);
                }
            }
        }
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
        if let Some(volume) = volume {
            self.wake(volume);
        }
        let socket = connection.close(volume.map(|at| &mut self.volumes[at]), &mut self.client_memory);
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
                connection.leave(&mut self.volumes[volume], &mut self.client_memory);
                // An error here ends it a line later anyway.
                let _ = connection.service(&mut self.volumes[volume], &mut self.client_memory, now);
                self.end_connection(index, &ConnectionEnd::Gone, now);
            }
        }
    }
}

/// Prepares a client's socket. On one that is not TCP there is nothing to set.
fn set_up(socket: &OwnedFd) {
    let _ = sockopt::set_tcp_nodelay(socket, true);
    let _ = sockopt::set_socket_keepalive(socket, true);
    let _ = sockopt::set_tcp_keepidle(socket, Duration::from_secs(CLIENT_KEEPALIVE_S));
    let _ = sockopt::set_tcp_keepintvl(socket, Duration::from_secs(CLIENT_KEEPALIVE_STEP_S));
    let _ = sockopt::set_tcp_keepcnt(socket, CLIENT_KEEPALIVES);
    let _ = sockopt::set_tcp_user_timeout(socket, CLIENT_TIMEOUT_MS);
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

#[cfg(test)]
mod tests;
