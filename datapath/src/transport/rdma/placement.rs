//! The place of a change in the ring: the sender chooses it, the receiver checks it.
//!
//! Both ends count alike, so a place need not be agreed on: the immediate of a write says where the sender put it, and
//! the receiver takes it from no other place than the one that was due. A change stands behind the one before it; what
//! crosses the ring's end goes on at its beginning, so its sender writes it in two parts ([`PeerPlaces::part`]), and its
//! receiver, who has the ring mapped twice, reads one. When nothing stands in the ring any more, the sender starts
//! over at its beginning, so that a link with little in flight stays in the same few pages.
//!
//! Invariants: places are multiples of 64 and below the ring's length, so a header is never parted; no part ends beyond
//! the ring. A sender starts over only when everything it sent
//! was returned, and its receiver accepts the beginning only when it has told so. The receiver never accepts a place in a change that it still holds, whatever the peer says.
//!
//! Failures survived: numbers that name no place, or another; frames repeated or lost on the way.

use crate::error::Violation;
use crate::wire::HEADER_LEN;

/// Bytes that one step of an immediate stands for.
const GRAIN: u64 = HEADER_LEN as u64;

/// A position that goes round a ring.
#[derive(Debug)]
struct Cursor {
    ring_len: u64,
    place: u64,
}

impl Cursor {
    fn new(ring_len: usize) -> Self {
        assert!(ring_len.is_multiple_of(HEADER_LEN), "a ring is whole grains");
        let ring_len = ring_len as u64;
        assert!(u32::try_from(ring_len / GRAIN).is_ok(), "an immediate names each place of the ring");
        Self { ring_len, place: 0 }
    }

    fn advance(&mut self, frame_len: usize) {
        self.place = (self.place + frame_len as u64) % self.ring_len;
    }
}

/// The sender's choice.
#[derive(Debug)]
pub(super) struct PeerPlaces(Cursor);

impl PeerPlaces {
    pub(super) fn new(ring_len: usize) -> Self {
        Self(Cursor::new(ring_len))
    }

    /// Where the next change goes, if it goes now. `empty`: all that was sent was returned.
    pub(super) fn next(&self, empty: bool) -> u64 {
        if empty { 0 } else { self.0.place }
    }

    /// A change of `frame_len` bytes goes to `place`, which was the next.
    pub(super) fn begin(&mut self, place: u64, frame_len: usize) {
        self.0.place = place;
        self.0.advance(frame_len);
    }

    /// Where in the ring the rest of a change at `place` goes, of which `progress` bytes are out, and how many bytes there
    /// are from there to the ring's end.
    pub(super) fn part(&self, place: u64, progress: usize) -> (u64, usize) {
        let at = (place + progress as u64) % self.0.ring_len;
        (at, usize::try_from(self.0.ring_len - at).expect("64-bit"))
    }

    /// What the peer is told of a place.
    pub(super) fn immediate(place: u64) -> u32 {
        u32::try_from(place / GRAIN).expect("checked for the whole ring")
    }
}

/// The receiver's expectation.
#[derive(Debug)]
pub(super) struct OwnPlaces(Cursor);

impl OwnPlaces {
    pub(super) fn new(ring_len: usize) -> Self {
        Self(Cursor::new(ring_len))
    }

    /// The first byte of the change that `immediate` names, unless another place was due. `empty`: the peer was told
    /// that all it sent is released.
    pub(super) fn locate(&self, immediate: u32, empty: bool) -> Result<usize, Violation> {
        let (found, expected) = (u64::from(immediate) * GRAIN, self.0.place);
        if found == expected || (found == 0 && empty) {
            return Ok(usize::try_from(found).expect("64-bit"));
        }
        Err(Violation::Place { found, expected })
    }

    /// A change of `frame_len` bytes stands at `place`, which was located.
    pub(super) fn arrive(&mut self, place: usize, frame_len: usize) {
        self.0.place = place as u64;
        self.0.advance(frame_len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RING: usize = 1024;

    #[test]
    fn both_ends_agree_round_the_ring_and_after_it_was_empty() {
        let (mut peer, mut own) = (PeerPlaces::new(RING), OwnPlaces::new(RING));
        for (frame_len, empty, place) in
            [(960, true, 0), (128, false, 960), (64, false, 64), (64, true, 0), (192, false, 64)]
        {
            let chosen = peer.next(empty);
            assert_eq!((chosen, peer.next(empty)), (place, place), "nothing has gone out yet");
            peer.begin(chosen, frame_len);
            let located = own.locate(PeerPlaces::immediate(chosen), empty).expect("was due");
            assert_eq!(located as u64, place);
            own.arrive(located, frame_len);
        }
    }

    #[test]
    fn no_part_ends_beyond_the_ring() {
        let peer = PeerPlaces::new(RING);
        assert_eq!(peer.part(0, 0), (0, RING));
        assert_eq!(peer.part(960, 0), (960, 64), "room for a header");
        assert_eq!(peer.part(960, 64), (0, RING));
        assert_eq!(peer.part(896, 101), (997, 27));
        assert_eq!(peer.part(896, 128), (0, RING));
        assert_eq!(peer.part(896, 200), (72, RING - 72));
    }

    #[test]
    fn no_place_but_the_due_one_is_accepted() {
        let mut own = OwnPlaces::new(RING);
        own.arrive(0, 128);
        assert_eq!(own.locate(2, false), Ok(128));
        for immediate in [0, 1, 3, 16, u32::MAX] {
            let refused = Violation::Place { found: u64::from(immediate) * 64, expected: 128 };
            assert_eq!(own.locate(immediate, false), Err(refused));
        }
        assert_eq!(own.locate(0, true), Ok(0), "a sender may start over once nothing is held");
        assert!(own.locate(1, true).is_err());
    }
}
