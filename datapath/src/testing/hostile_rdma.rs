//! A link against a peer that does anything at all with its queue pair, by a list of steps: for the fuzzer and tests.
//!
//! The steps say what the peer writes, where, with which immediate, which messages it sends and of what length; and what
//! our side does meanwhile. What must hold: nothing panics, the link ends at most once, and every token is reported
//! once and in order.

use crate::limits::RING_LEN_MIN;
use crate::testing::fake_rdma::{self, FakeEndpoint, Manner};
use crate::transport::rdma::RdmaLink;
use crate::transport::rdma::endpoint::{Completion, Endpoint, MESSAGE_LEN, Piece, Registrar};
use crate::transport::{Link, LinkEvent, Slot};
use crate::units::{ByteRange, Epoch, Seq, Token};
use crate::wire::{Header, Kind};
use costandby_ffi::mapping::Mapping;
use std::collections::VecDeque;

const KINDS: [Kind; 7] =
    [Kind::Write, Kind::WriteZeroes, Kind::Trim, Kind::Flush, Kind::Ack, Kind::KeepAlive, Kind::Control];

/// A header of the input's making, and the bytes it goes as: mostly as they should be.
fn header(step: &[u8; 8]) -> (Header, [u8; MESSAGE_LEN]) {
    let kinds = if step[0].is_multiple_of(8) { &KINDS[..3] } else { &KINDS[3..] };
    let kinds = if step[7] == 1 { &KINDS[..] } else { kinds };
    let mut header = Header::new(kinds[usize::from(step[1]) % kinds.len()], Epoch(step[2].into()));
    header.seq = Seq(step[3].into());
    header.range = ByteRange::new(0, u64::from(step[4]) * 33 + u64::from(step[7] != 2));
    header.ring_returned = if step[5] < 8 { u64::from(step[5]) * 64 } else { 0 };
    header.receives = if step[6] < 8 { step[6].into() } else { 0 };
    let mut bytes = header.encode();
    if step[7] == 3 {
        bytes[usize::from(step[6]) % MESSAGE_LEN] ^= step[5];
    }
    (header, bytes)
}

/// Plays an input. Returns how many frames and messages the link told of.
///
/// # Panics
/// When something does not hold that must.
pub fn play(data: &[u8]) -> u64 {
    let seed = data.first().filter(|first| **first % 2 == 1).map(|first| u64::from(*first));
    let manner = Manner { seed, send_len: 64, receives: 16, ..Manner::default() };
    let rings = [(); 2].map(|()| Mapping::ring(RING_LEN_MIN).expect("memory"));
    let [endpoint, mut peer] = fake_rdma::endpoints([&rings[0], &rings[1]], manner).expect("descriptors");
    let [ring, _theirs] = rings;
    let link = fake_rdma::link(endpoint, ring, RING_LEN_MIN).expect("link");
    let memory = Mapping::anonymous(RING_LEN_MIN).expect("memory").span(0, RING_LEN_MIN);
    let region = peer.registrar().register(&memory).expect("no limit");
    let mut owner = Owner {
        link,
        held: VecDeque::new(),
        events: Vec::new(),
        posted: 0,
        reported: 0,
        down: false,
        heard: 0,
    };
    let (mut open, mut due) = (0, 0_u64);
    for (id, step) in (1..).zip(data.get(1..).unwrap_or_default().as_chunks::<8>().0) {
        let room = open < manner.send_len;
        match step[0] % 8 {
            0 if room => {
                let (header, bytes) = header(step);
                memory.sub(0, MESSAGE_LEN).write_from(&bytes);
                let frame_len = header.frame_len() as u64;
                let (at, grain) = match step[7] {
                    4 => (u64::MAX - u64::from(step[6]), due / 64),
                    5 => (u64::from(step[6]) * 64, due / 64),
                    6 => (due, u64::from(step[6])),
                    7 => (due, u64::from(u32::MAX - u32::from(step[6]))),
                    _ => (due, due / 64),
                };
                due = (due + frame_len) % RING_LEN_MIN as u64;
                let piece = Piece { region: &region, offset: 0, len: MESSAGE_LEN };
                let immediate = u32::try_from(grain).expect("small or made so");
                peer.write(&[piece], at, Some(immediate), id, true);
                open += 1;
            }
            1..=3 if room => {
                let len = if step[7] == 8 { u32::from(step[6]) % 64 } else { 64 };
                peer.send_some(&header(step).1, len, id);
                open += 1;
            }
            4 => owner.post(),
            5 => owner.release(),
            6 if step[7] == 0 => peer.cut(),
            _ => {
                let _ = owner.link.prepare_sleep();
            }
        }
        // After its queue pair failed, or ours was cut, the peer only gets errors.
        let _ = peer.ring_doorbell();
        let mut completions = [Completion::Done { id: 0 }; 32];
        if let Ok(count) = peer.poll(&mut completions) {
            open -= completions[..count].iter().filter(|one| matches!(one, Completion::Done { .. })).count();
        }
        owner.poll();
    }
    owner.heard
}

/// Our side: what uses the link.
struct Owner {
    link: RdmaLink<FakeEndpoint>,
    held: VecDeque<Slot>,
    events: Vec<LinkEvent>,
    posted: u64,
    reported: u64,
    down: bool,
    heard: u64,
}

impl Owner {
    fn post(&mut self) {
        if let Some(permit) = self.link.claim(0) {
            let header = Header { range: ByteRange::new(0, 1), ..Header::new(Kind::Trim, Epoch(1)) };
            self.link.post(permit, header, None, Token(self.posted));
            self.posted += 1;
        }
        self.link.kick();
    }

    fn release(&mut self) {
        if let Some(slot) = self.held.pop_front() {
            self.link.release(slot);
        }
    }

    fn poll(&mut self) {
        self.link.poll(&mut self.events);
        for event in self.events.drain(..) {
            assert!(!self.down, "{event:?} after the end");
            match event {
                LinkEvent::Arrived(slot) => {
                    self.held.push_back(slot);
                    self.heard += 1;
                }
                LinkEvent::Sent(Token(token)) | LinkEvent::Failed(Token(token)) => {
                    assert_eq!(token, self.reported, "each token once, in order");
                    self.reported += 1;
                }
                LinkEvent::Message(_) => self.heard += 1,
                LinkEvent::Down(_) => {
                    assert_eq!(self.reported, self.posted, "all are told before the end");
                    self.down = true;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::conformance::Dice;

    #[test]
    fn a_peer_that_does_anything_panics_nobody() {
        let mut dice = Dice::new(1);
        let mut heard = 0;
        for _ in 0..600 {
            let len = 1 + 8 * dice.below(60);
            let data: Vec<u8> = (0..len).map(|_| dice.below(256).to_le_bytes()[0]).collect();
            heard += play(&data);
        }
        assert!(heard > 3000, "{heard}: most links should last a while");
    }
}
