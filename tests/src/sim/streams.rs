//! Connections between the nodes before they become links: dialling, and the messages of the hello.
//!
//! Stands in the place of `control/src/node/connection.rs`. Messages are really encoded and decoded. A connection that both ends turn
//! into a link carries a [`Wire`] from its beginning, so that frames of the end that is quicker wait for the other.

use super::checker::NAMES;
use super::clock::{Nanos, S};
use super::driver::Input;
use super::network::{SharedWire, SimLink, Wire, lock};
use super::world::{Event, World};
use costandby_control::hello::{self, Message};
use std::collections::VecDeque;
use std::io;

/// As in `connection.rs`.
const MESSAGE_MAX: Nanos = 5 * S;
const DIAL_MAX: Nanos = S;

/// Names a connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct StreamId(pub(super) u64);

/// Bytes of a message, or the end of the connection.
pub(super) type Said = Option<Vec<u8>>;

pub(super) struct Stream {
    wire: SharedWire,
    /// This end has become a link.
    taken: [bool; 2],
    closed: [bool; 2],
    /// The serial of the conversation that waits for a message.
    listening: [Option<u64>; 2],
    arrived: [VecDeque<Said>; 2],
    last_due: [Nanos; 2],
    /// Behind a blocked path, with the end they go to.
    held: Vec<(usize, Said)>,
    /// The end that did not dial, until it has read the first message.
    meets: Option<usize>,
}

impl World {
    pub(super) fn dial(&mut self, at: usize) {
        let peer = 1 - at;
        let due = lock(&self.ether).transit(peer);
        let back = lock(&self.ether).transit(at);
        let life = self.nodes[at].life;
        let reachable = due != Nanos::MAX && back != Nanos::MAX;
        let (due, id) = if reachable && self.nodes[peer].process.is_some() {
            let id = StreamId(self.streams_made);
            self.streams_made += 1;
            let wire = Wire::new(&self.ether, self.config.ring_len);
            self.wires.push(std::sync::Arc::clone(&wire));
            let stream = Stream {
                wire,
                taken: [false; 2],
                closed: [false; 2],
                listening: [None; 2],
                arrived: [VecDeque::new(), VecDeque::new()],
                last_due: [0; 2],
                held: Vec::new(),
                meets: Some(peer),
            };
            self.streams.insert(id, stream);
            (due.max(back), Some(id))
        } else {
            (if reachable { due } else { self.now() + DIAL_MAX }, None)
        };
        self.agenda.at(due, Event::Dialled { at, life, stream: id });
    }

    /// Sends a message.
    pub(super) fn say(&mut self, at: usize, id: StreamId, message: &Message) {
        self.transmit(1 - at, id, Some(hello::encode(message)));
    }

    fn transmit(&mut self, to: usize, id: StreamId, said: Said) {
        let due = lock(&self.ether).transit(to);
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if due == Nanos::MAX || !stream.held.is_empty() {
            stream.held.push((to, said));
            return;
        }
        let due = due.max(stream.last_due[to]);
        stream.last_due[to] = due;
        self.agenda.at(due, Event::Spoken { stream: id, to, said });
    }

    /// Sends what waited for a path that carries again.
    pub(super) fn retransmit(&mut self) {
        let ids: Vec<StreamId> = self.streams.keys().copied().collect();
        for id in ids {
            let held = self.streams.get_mut(&id).map(|stream| std::mem::take(&mut stream.held));
            for (to, said) in held.unwrap_or_default() {
                self.transmit(to, id, said);
            }
        }
    }

    /// Says `ours` and listens for the answer.
    pub(super) fn converse(&mut self, at: usize, serial: u64, id: StreamId, ours: &Message) {
        self.say(at, id, ours);
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.arrived[at].is_empty() {
            stream.listening[at] = Some(serial);
            self.agenda.at(self.now() + MESSAGE_MAX, Event::Patience { stream: id, at, serial });
        } else {
            let said = stream.arrived[at].pop_front().expect("not empty");
            self.hear(at, serial, id, said);
        }
    }

    fn hear(&mut self, at: usize, serial: u64, id: StreamId, said: Said) {
        let heard = match said.map(|bytes| hello::decode(&bytes)) {
            Some(Ok(Some((message, _)))) => Ok(message),
            Some(Ok(None)) | None => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Some(Err(error)) => Err(error),
        };
        self.heard(at, serial, id, heard);
    }

    /// A message has arrived at end `to`.
    pub(super) fn spoken(&mut self, id: StreamId, to: usize, said: Said) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.closed[to] || stream.taken[to] || self.nodes[to].process.is_none() {
            if stream.meets == Some(to) {
                self.close_stream(to, id);
            }
            return;
        }
        if stream.meets == Some(to) {
            stream.meets = None;
            let message = said.and_then(|bytes| hello::decode(&bytes).ok().flatten());
            if let Some((Message::Hello(hello), _)) = message {
                self.post_input(to, Input::Accepted { stream: id, hello });
            } else {
                self.close_stream(to, id);
            }
        } else if let Some(serial) = stream.listening[to].take() {
            self.hear(to, serial, id, said);
        } else {
            stream.arrived[to].push_back(said);
        }
    }

    /// The time for an answer is over.
    pub(super) fn patience_ends(&mut self, id: StreamId, at: usize, serial: u64) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.listening[at] == Some(serial) {
            stream.listening[at] = None;
            self.heard(at, serial, id, Err(io::Error::from(io::ErrorKind::TimedOut).into()));
        }
    }

    pub(super) fn close_stream(&mut self, at: usize, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.taken[at] || std::mem::replace(&mut stream.closed[at], true) {
            return;
        }
        stream.listening[at] = None;
        let wire = std::sync::Arc::clone(&stream.wire);
        drop(SimLink::new(wire, at));
        self.transmit(1 - at, id, None);
        self.forget_stream(id);
        self.deliver_wakes();
    }

    /// This end becomes a link. Says whether both are now.
    pub(super) fn take_wire(&mut self, at: usize, id: StreamId) -> (SharedWire, bool) {
        let stream = self.streams.get_mut(&id).unwrap_or_else(|| panic!("{} holds {id:?}", NAMES[at]));
        stream.taken[at] = true;
        let (wire, both) = (std::sync::Arc::clone(&stream.wire), stream.taken == [true; 2]);
        self.forget_stream(id);
        (wire, both)
    }

    /// The network resets every connection that is not a link yet.
    pub(super) fn reset_streams(&mut self) {
        let ids: Vec<StreamId> = self.streams.keys().copied().collect();
        for id in ids {
            for to in 0..2 {
                self.transmit(to, id, None);
            }
        }
    }

    fn forget_stream(&mut self, id: StreamId) {
        let done = |stream: &Stream| (0..2).all(|at| stream.taken[at] || stream.closed[at]);
        if self.streams.get(&id).is_some_and(|stream| done(stream) && stream.held.is_empty()) {
            self.streams.remove(&id);
        }
    }

    /// The process at `at` ended: so do its connections.
    pub(super) fn end_streams(&mut self, at: usize) {
        let ids: Vec<StreamId> = self.streams.keys().copied().collect();
        for id in ids {
            self.close_stream(at, id);
        }
    }
}
