//! Ring credit: how many bytes of the own ring and of the peer's ring are in use.
//!
//! Every transport keeps two accounts. [`PeerRing`] is the sender's view of the peer's ring: what [`super::Link::claim`]
//! takes and the peer's `ring_returned` gives back. [`OwnRing`] is the receiver's: what arrived, what was released, what
//! the peer was told. Both count **changes only** ([`Kind::is_change`](crate::wire::Kind::is_change)), each with its
//! whole frame (header, payload, padding), in bytes since the link came up. Frames without a seq take no permit;
//! [`RING_SLACK`] is set aside for them.
//!
//! Invariants: returned ≤ sent ≤ claimed, claimed − returned ≤ capacity, told ≤ released ≤ arrived. Numbers of the peer
//! that would break them are refused by name; misuse from our own side panics.
//!
//! Where each frame and message also takes one of the receives its receiver posted (RDMA), [`PeerReceives`] and
//! [`OwnReceives`] keep the same two accounts of those, counted one by one. A few are reserved for signs of life that
//! tell, so that two ends that have each used up the other's can always get out of it.
//!
//! A release is told when a quarter of the ring is released but untold, so a sender that waits for room for a frame of
//! at most [`frame_len_max`] bytes is always woken in the end, even if nothing else flows back.

use super::Permit;
use crate::error::Violation;
use crate::limits::{POSTS_OPEN_MAX, RDMA_RECEIVES_MIN, RDMA_RECEIVES_RESERVED, RING_LEN_MIN, RING_SLACK};
use crate::wire::frame_len;

/// Bytes of a ring of `ring_len` that changes may take.
fn capacity(ring_len: usize) -> u64 {
    assert!(ring_len >= RING_LEN_MIN, "a ring has at least {RING_LEN_MIN} bytes");
    (ring_len - RING_SLACK) as u64
}

/// Largest frame that never waits for good in a ring of `ring_len` bytes: what is left when a quarter of the ring is
/// released but untold. 0 for a ring that is too small for any.
#[must_use]
pub const fn frame_len_max(ring_len: usize) -> usize {
    if ring_len < RING_LEN_MIN { 0 } else { ring_len - RING_SLACK - ring_len / 4 }
}

/// Whether a ring of `ring_len` bytes takes frames with `payload_len` bytes of payload. The hello checks a peer's
/// announced ring with it before a link is made.
#[must_use]
pub const fn ring_takes(ring_len: usize, payload_len: usize) -> bool {
    frame_len(payload_len) <= frame_len_max(ring_len)
}

/// The sender's account of the peer's ring.
#[derive(Debug)]
pub(crate) struct PeerRing {
    capacity: u64,
    frame_len_max: usize,
    claimed: u64,
    sent: u64,
    returned: u64,
    /// Frames claimed and not yet reported as sent or failed.
    open: usize,
}

impl PeerRing {
    pub(crate) fn new(ring_len: usize) -> Self {
        let (capacity, frame_len_max) = (capacity(ring_len), frame_len_max(ring_len));
        Self { capacity, frame_len_max, claimed: 0, sent: 0, returned: 0, open: 0 }
    }

    /// Takes room for a frame, if there is.
    pub(crate) fn claim(&mut self, payload_len: usize) -> Option<Permit> {
        let frame_len = frame_len(payload_len);
        assert!(
            frame_len <= self.frame_len_max,
            "a frame of {frame_len} bytes never fits the peer's ring: the hello must refuse such a ring"
        );
        if self.open == POSTS_OPEN_MAX || self.claimed - self.returned + frame_len as u64 > self.capacity {
            return None;
        }
        self.claimed += frame_len as u64;
        self.open += 1;
        Some(Permit { frame_len })
    }

    /// All bytes of a claimed frame are out.
    pub(crate) fn sent(&mut self, frame_len: usize) {
        self.sent += frame_len as u64;
        assert!(self.sent <= self.claimed, "a frame went out without a permit");
    }

    /// Whether nothing that is out is still in the ring: the next frame may stand anywhere.
    pub(crate) fn is_empty(&self) -> bool {
        self.returned == self.sent
    }

    /// A claimed frame was reported as sent or failed.
    pub(crate) fn reported(&mut self) {
        self.open -= 1;
    }

    /// Takes in the peer's count. Only frames that are wholly out can have been released by it.
    pub(crate) fn returned(&mut self, found: u64) -> Result<(), Violation> {
        if found < self.returned || found > self.sent {
            return Err(Violation::RingReturned { found, sent: self.sent, before: self.returned });
        }
        self.returned = found;
        Ok(())
    }
}

/// The sender's account of the receives its peer keeps posted.
#[derive(Debug)]
pub(crate) struct PeerReceives {
    /// What posts and messages may use.
    usable: u64,
    /// Permits whose frames are not out. They are only counted, so that permits are bounded: what goes out first uses
    /// what there is, or a message in front of claimed posts could wait for ever.
    claimed: u64,
    /// Used by what is out.
    used: u64,
    returned: u64,
}

impl PeerReceives {
    /// The peer keeps `depth` posted.
    pub(crate) fn new(depth: u32) -> Self {
        assert!(
            depth >= RDMA_RECEIVES_MIN,
            "{depth} receives, the handshake must refuse under {RDMA_RECEIVES_MIN}"
        );
        Self { usable: u64::from(depth - RDMA_RECEIVES_RESERVED), claimed: 0, used: 0, returned: 0 }
    }

    fn outstanding(&self) -> u64 {
        self.used - self.returned
    }

    /// Whether one more permit has a receive to come.
    pub(crate) fn may_claim(&self) -> bool {
        self.outstanding() + self.claimed < self.usable
    }

    /// A permit was given.
    pub(crate) fn claim(&mut self) {
        self.claimed += 1;
    }

    /// Whether a post or a message may go out.
    pub(crate) fn has_room(&self) -> bool {
        self.outstanding() < self.usable
    }

    /// Whether two may go out, one behind the other.
    pub(crate) fn has_room_for_two(&self) -> bool {
        self.outstanding() + 1 < self.usable
    }

    /// Whether one of the reserved is left for a sign of life that tells.
    pub(crate) fn has_reserve(&self) -> bool {
        self.outstanding() < self.usable + u64::from(RDMA_RECEIVES_RESERVED)
    }

    /// A post is out, for which a permit was given.
    pub(crate) fn posted(&mut self) {
        self.claimed = self.claimed.checked_sub(1).expect("a frame went out without a permit");
        self.sent();
    }

    /// A message or a sign of life is out.
    pub(crate) fn sent(&mut self) {
        assert!(self.has_reserve(), "a receive was used that the peer does not have");
        self.used += 1;
    }

    /// Takes in the peer's count, which goes round.
    pub(crate) fn returned(&mut self, found: u32) -> Result<(), Violation> {
        let [b0, b1, b2, b3, ..] = self.returned.to_le_bytes();
        let more = u64::from(found.wrapping_sub(u32::from_le_bytes([b0, b1, b2, b3])));
        if more > self.used - self.returned {
            return Err(Violation::ReceivesReturned { found, used: self.used, before: self.returned });
        }
        self.returned += more;
        Ok(())
    }
}

/// Refuses a count of receives where none are posted.
pub(crate) fn no_receives(found: u32) -> Result<(), Violation> {
    if found == 0 { Ok(()) } else { Err(Violation::ReceivesReturned { found, used: 0, before: 0 }) }
}

/// The receiver's account of its own receives, each of which is posted again before it counts as consumed.
#[derive(Debug)]
pub(crate) struct OwnReceives {
    told_late: u32,
    consumed: u32,
    told: u32,
}

impl OwnReceives {
    pub(crate) fn new(depth: u32) -> Self {
        Self { told_late: depth / 4, consumed: 0, told: 0 }
    }

    /// One was used by the peer and is posted again.
    pub(crate) fn consume(&mut self) {
        self.consumed = self.consumed.wrapping_add(1);
    }

    /// What the next header out says.
    pub(crate) fn to_tell(&self) -> u32 {
        self.consumed
    }

    /// A header with the newest count is out.
    pub(crate) fn told(&mut self, count: u32) {
        self.told = count;
    }

    /// Whether the peer has to be told now, whatever else is going out.
    pub(crate) fn must_tell(&self) -> bool {
        self.consumed.wrapping_sub(self.told) > self.told_late
    }
}

/// The receiver's account of its own ring.
#[derive(Debug)]
pub(crate) struct OwnRing {
    capacity: u64,
    told_late: u64,
    arrived: u64,
    released: u64,
    told: u64,
}

impl OwnRing {
    pub(crate) fn new(ring_len: usize) -> Self {
        let (capacity, told_late) = (capacity(ring_len), (ring_len / 4) as u64);
        Self { capacity, told_late, arrived: 0, released: 0, told: 0 }
    }

    /// The header of a change is here. Refuses a frame the peer had no permit for; it may know of fewer releases than
    /// we do, never of more.
    pub(crate) fn admit(&self, frame_len: usize) -> Result<(), Violation> {
        if self.arrived - self.released + frame_len as u64 > self.capacity {
            return Err(Violation::RingOverrun { frame_len });
        }
        Ok(())
    }

    /// The whole of an admitted change is here. Returns the position its slot remembers, to be released in order.
    pub(crate) fn arrive(&mut self, frame_len: usize) -> u64 {
        self.arrived += frame_len as u64;
        self.arrived
    }

    /// Whether changes are held that were not released.
    pub(crate) fn holds_any(&self) -> bool {
        self.released < self.arrived
    }

    /// Whether the peer may know that nothing is held: then its next frame may stand anywhere.
    pub(crate) fn is_told_empty(&self) -> bool {
        self.told == self.arrived
    }

    /// The user gives back the frame for which [`OwnRing::arrive`] gave `position`.
    pub(crate) fn release(&mut self, frame_len: usize, position: u64) {
        self.released += frame_len as u64;
        assert!(self.released == position, "slots are released in order of arrival, each to its own link");
    }

    /// What the next header out says.
    pub(crate) fn to_tell(&self) -> u64 {
        self.released
    }

    /// A header with this count is out.
    pub(crate) fn told(&mut self, count: u64) {
        self.told = self.told.max(count);
    }

    /// Whether the peer has to be told now, whatever else is going out.
    pub(crate) fn must_tell(&self) -> bool {
        self.released - self.told > self.told_late
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{PAYLOAD_LEN_MAX, RING_LEN};

    #[test]
    fn the_normal_ring_takes_the_largest_payload() {
        assert!(ring_takes(usize::try_from(RING_LEN).unwrap(), PAYLOAD_LEN_MAX as usize));
        assert!(!ring_takes(PAYLOAD_LEN_MAX as usize, PAYLOAD_LEN_MAX as usize));
        assert!(!ring_takes(RING_LEN_MIN - 1, 0));
    }

    #[test]
    fn the_largest_frame_fits_while_a_quarter_is_untold() {
        let mut peer = PeerRing::new(RING_LEN_MIN);
        let quarter = RING_LEN_MIN / 4 - 64;
        let permit = peer.claim(quarter).expect("empty ring");
        assert_eq!(permit.frame_len, quarter + 64);
        assert!(peer.claim(frame_len_max(RING_LEN_MIN) - 64).is_some());
        assert!(peer.claim(0).is_none(), "and then it is full to the byte");
    }

    #[test]
    fn header_only_frames_are_bounded_by_count() {
        let mut peer = PeerRing::new(usize::try_from(RING_LEN).unwrap());
        let permits: Vec<_> = std::iter::from_fn(|| peer.claim(0)).take(POSTS_OPEN_MAX + 1).collect();
        assert_eq!(permits.len(), POSTS_OPEN_MAX);
        peer.reported();
        assert!(peer.claim(0).is_some());
    }

    #[test]
    fn a_peer_may_not_return_what_is_not_out_nor_take_back() {
        let mut peer = PeerRing::new(RING_LEN_MIN);
        let _two = (peer.claim(0), peer.claim(0));
        peer.sent(64);
        assert_eq!(peer.returned(128), Err(Violation::RingReturned { found: 128, sent: 64, before: 0 }));
        assert_eq!(peer.returned(64), Ok(()));
        assert_eq!(peer.returned(0), Err(Violation::RingReturned { found: 0, sent: 64, before: 64 }));
    }

    #[test]
    fn a_peer_may_not_post_past_the_capacity() {
        let mut own = OwnRing::new(RING_LEN_MIN);
        let room = RING_LEN_MIN - RING_SLACK;
        assert_eq!(own.admit(room + 64), Err(Violation::RingOverrun { frame_len: room + 64 }));
        assert_eq!(own.admit(room), Ok(()));
        let position = own.arrive(room);
        assert_eq!(own.admit(64), Err(Violation::RingOverrun { frame_len: 64 }));
        own.release(room, position);
        assert_eq!(own.admit(64), Ok(()));
    }

    #[test]
    fn a_release_is_told_once_past_a_quarter() {
        let mut own = OwnRing::new(RING_LEN_MIN);
        let quarter = RING_LEN_MIN / 4;
        let position = own.arrive(quarter);
        own.release(quarter, position);
        assert!(!own.must_tell());
        let position = own.arrive(64);
        own.release(64, position);
        assert!(own.must_tell());
        own.told(own.to_tell());
        assert!(!own.must_tell());
    }

    #[test]
    fn receives_are_used_up_to_the_reserve_and_by_signs_of_life_up_to_the_last() {
        let mut peer = PeerReceives::new(64);
        let usable = 64 - RDMA_RECEIVES_RESERVED;
        for _ in 0..usable {
            assert!(peer.has_room());
            peer.sent();
        }
        assert!(!peer.has_room() && !peer.may_claim());
        for _ in 0..RDMA_RECEIVES_RESERVED {
            assert!(peer.has_reserve());
            peer.sent();
        }
        assert!(!peer.has_reserve());
        assert_eq!(peer.returned(usable), Ok(()));
        assert!(peer.has_room());
    }

    #[test]
    fn permits_never_take_a_receive_from_a_message_in_front_of_them() {
        let mut peer = PeerReceives::new(RDMA_RECEIVES_MIN);
        let permits = (0..100).take_while(|_| peer.may_claim().then(|| peer.claim()).is_some()).count();
        assert_eq!(u32::try_from(permits), Ok(RDMA_RECEIVES_MIN - RDMA_RECEIVES_RESERVED));
        assert!(peer.has_room());
        peer.sent();
        peer.posted();
        assert!(!peer.may_claim());
        assert_eq!(peer.returned(2), Ok(()));
        assert!(peer.may_claim());
    }

    #[test]
    fn receives_that_were_never_used_are_refused_also_where_the_count_goes_round() {
        let mut peer = PeerReceives::new(64);
        let start = u64::from(u32::MAX) - 1;
        (peer.used, peer.returned) = (start, start);
        (0..4).for_each(|_| peer.sent());
        let refused = |found| Err(Violation::ReceivesReturned { found, used: start + 4, before: start });
        assert_eq!(peer.returned(3), refused(3));
        assert_eq!(peer.returned(u32::MAX - 2), refused(u32::MAX - 2));
        assert_eq!(peer.returned(u32::MAX), Ok(()));
        assert_eq!(peer.returned(2), Ok(()));
        assert_eq!(peer.returned, peer.used);
    }

    #[test]
    fn consumed_receives_are_told_once_past_a_quarter() {
        let mut own = OwnReceives::new(64);
        (own.consumed, own.told) = (u32::MAX - 3, u32::MAX - 3);
        (0..16).for_each(|_| own.consume());
        assert!(!own.must_tell());
        own.consume();
        assert!(own.must_tell());
        own.told(own.to_tell());
        assert!(!own.must_tell());
    }

    #[test]
    #[should_panic(expected = "in order of arrival")]
    fn slots_released_out_of_order_panic() {
        let mut own = OwnRing::new(RING_LEN_MIN);
        let _first = own.arrive(64);
        let second = own.arrive(64);
        own.release(64, second);
    }
}
