//! The memory that NBD clients make a node hold: payloads on their way to a disk, and replies on their way to a client.
//!
//! Connections ask here before they take a payload aside or copy a reply out of the mapping. What is given out is bounded
//! for each volume, so one client or many of them cost a known amount. Payloads get room in the order in which their
//! connections asked, so that a long payload is not passed by short ones for ever.
//!
//! Off the hot path: a payload that stands in its socket whole, and a reply that its socket takes whole, need no memory here.

use crate::limits::{
    PAYLOAD_OWN_LEN, PAYLOAD_SPARE_LEN_MAX, PAYLOADS_ASIDE_LEN_MAX, PAYLOADS_SPARE_MAX,
    REPLIES_COPIED_LEN_MAX,
};
use std::collections::VecDeque;

/// What the clients of one volume hold.
#[derive(Debug, Default)]
struct Held {
    payloads: usize,
    replies: usize,
    /// Serial numbers of the connections that wait for room for a payload, the first first.
    waiting: VecDeque<u32>,
}

/// The memory of all clients of a reactor.
#[derive(Debug, Default)]
pub struct ClientMemory {
    volumes: Vec<Held>,
    /// Buffers to use again: new memory costs a page fault for each page.
    spare: Vec<Vec<u8>>,
}

impl ClientMemory {
    fn held(&mut self, volume: usize) -> &mut Held {
        if volume >= self.volumes.len() {
            self.volumes.resize_with(volume + 1, Held::default);
        }
        &mut self.volumes[volume]
    }

    /// A buffer of at least `len` bytes for a payload that the connection `serial` receives. `None`: there is no room, and
    /// the connection is in the queue for some; it asks again.
    pub fn take_payload(&mut self, volume: usize, serial: u32, len: usize) -> Option<Vec<u8>> {
        if len > PAYLOAD_OWN_LEN {
            let held = self.held(volume);
            let first = held.waiting.front().is_none_or(|first| *first == serial);
            if !first || held.payloads + len > PAYLOADS_ASIDE_LEN_MAX {
                if !held.waiting.contains(&serial) {
                    held.waiting.push_back(serial);
                }
                return None;
            }
            held.waiting.pop_front();
            held.payloads += len;
        }
        let spare = self.spare.iter().position(|buffer| buffer.len() >= len);
        Some(spare.map_or_else(|| vec![0; len], |at| self.spare.swap_remove(at)))
    }

    /// Gives the buffer of a payload of `len` bytes back.
    pub fn give_payload(&mut self, volume: usize, len: usize, buffer: Vec<u8>) {
        if len > PAYLOAD_OWN_LEN {
            self.held(volume).payloads -= len;
            if buffer.len() <= PAYLOAD_SPARE_LEN_MAX && self.spare.len() < PAYLOADS_SPARE_MAX {
                self.spare.push(buffer);
            }
        }
    }

    /// The connection does not wait for room any more.
    pub fn give_up(&mut self, volume: usize, serial: u32) {
        self.held(volume).waiting.retain(|waits| *waits != serial);
    }

    /// Whether a connection of the volume waits for room for a payload.
    #[must_use]
    pub fn is_contended(&self, volume: usize) -> bool {
        self.volumes.get(volume).is_some_and(|held| !held.waiting.is_empty())
    }

    /// Whether `len` bytes of a reply may be copied; they are counted then.
    #[must_use]
    pub fn take_reply(&mut self, volume: usize, len: usize) -> bool {
        let held = self.held(volume);
        let room = held.replies + len <= REPLIES_COPIED_LEN_MAX;
        if room {
            held.replies += len;
        }
        room
    }

    /// So many copied bytes are gone.
    pub fn give_reply(&mut self, volume: usize, len: usize) {
        self.held(volume).replies -= len;
    }

    /// Bytes of payloads and of replies that the volume's clients hold.
    #[cfg(test)]
    pub(super) fn held_len(&self, volume: usize) -> (usize, usize) {
        self.volumes.get(volume).map_or((0, 0), |held| (held.payloads, held.replies))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn payloads_are_bounded_for_each_volume_and_get_room_in_the_order_of_their_asking() {
        let mut memory = ClientMemory::default();
        let first = memory.take_payload(0, 1, 32 * MIB).expect("room");
        let second = memory.take_payload(0, 2, 32 * MIB).expect("room");
        assert!(memory.take_payload(0, 3, 32 * MIB).is_none());
        assert!(memory.take_payload(0, 4, MIB).is_none(), "behind the third");
        assert!(memory.take_payload(1, 5, 32 * MIB).is_some(), "another volume");
        assert!(memory.take_payload(0, 6, PAYLOAD_OWN_LEN).is_some(), "every connection's own");
        assert!(memory.is_contended(0) && !memory.is_contended(1));
        memory.give_payload(0, 32 * MIB, first);
        assert!(memory.take_payload(0, 4, MIB).is_none(), "still behind the third");
        let third = memory.take_payload(0, 3, 32 * MIB).expect("its turn");
        memory.give_payload(0, 32 * MIB, second);
        let fourth = memory.take_payload(0, 4, MIB).expect("its turn");
        memory.give_payload(0, 32 * MIB, third);
        memory.give_payload(0, MIB, fourth);
        assert_eq!(memory.held_len(0), (0, 0));
        assert!(!memory.is_contended(0));
    }

    #[test]
    fn a_connection_that_gives_up_lets_those_behind_it_pass() {
        let mut memory = ClientMemory::default();
        let all = memory.take_payload(0, 1, PAYLOADS_ASIDE_LEN_MAX).expect("room");
        assert!(memory.take_payload(0, 2, 32 * MIB).is_none());
        assert!(memory.take_payload(0, 3, MIB).is_none());
        memory.give_payload(0, PAYLOADS_ASIDE_LEN_MAX, all);
        assert!(memory.take_payload(0, 3, MIB).is_none());
        memory.give_up(0, 2);
        assert!(memory.take_payload(0, 3, MIB).is_some());
    }

    #[test]
    fn copied_replies_are_bounded_for_each_volume() {
        let mut memory = ClientMemory::default();
        assert!(memory.take_reply(0, REPLIES_COPIED_LEN_MAX));
        assert!(!memory.take_reply(0, 1));
        assert!(memory.take_reply(1, 1));
        memory.give_reply(0, 1);
        assert!(memory.take_reply(0, 1));
    }

    #[test]
    fn few_buffers_are_kept_and_none_of_the_largest() {
        let mut memory = ClientMemory::default();
        for len in [PAYLOAD_SPARE_LEN_MAX, PAYLOAD_SPARE_LEN_MAX + 1] {
            let buffers: Vec<_> =
                (0..2 * PAYLOADS_SPARE_MAX).map(|n| memory.take_payload(n, 1, len).expect("room")).collect();
            for (n, buffer) in buffers.into_iter().enumerate() {
                memory.give_payload(n, len, buffer);
            }
            assert_eq!(memory.spare.len(), PAYLOADS_SPARE_MAX);
        }
        assert!(memory.spare.iter().all(|buffer| buffer.len() == PAYLOAD_SPARE_LEN_MAX));
    }
}
