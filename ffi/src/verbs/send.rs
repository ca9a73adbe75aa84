//! The send side of a queue pair: requests gathered into one list a doorbell, and the regions they read from.
//!
//! Invariants: requests are numbered in order and complete in order; a region is held from the moment a request names
//! it until that request is known to be complete. Everything is allocated once, for `len` open requests.

use std::collections::VecDeque;

use super::error::VerbsError;
use super::region::Region;
use super::sys;
use super::{MESSAGE_BYTES, MESSAGE_LEN, PIECES_MAX};

/// Some bytes of a region.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// Where.
    pub region: &'a Region,
    /// First byte, from the region's beginning.
    pub offset: usize,
    /// How many.
    pub len: usize,
}

/// Where a write goes: an address of the peer's, and its key. What stands there is the peer's business.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// As the peer named it.
    pub address: u64,
    /// As the peer gave it.
    pub key: u32,
}

/// Requests handed to the device in one call: enough that a doorbell's price is shared, few enough to stay in cache.
const BATCH_LEN: usize = 64;

/// A request that is not known to be complete.
struct Open {
    id: u64,
    _regions: [Option<Region>; PIECES_MAX],
}

pub(super) struct SendQueue {
    len: usize,
    requests: Box<[sys::ibv_send_wr]>,
    pieces: Box<[[sys::ibv_sge; PIECES_MAX]]>,
    messages: Box<[[u8; MESSAGE_LEN]]>,
    /// How many of the above are filled and not posted.
    queued: usize,
    open: VecDeque<Open>,
    /// Number of the first open request.
    first_open: u64,
}

impl SendQueue {
    pub(super) fn new(len: u32) -> Self {
        let len = len as usize;
        // SAFETY: a plain C structure for which zeroes are valid; it is filled before it is posted.
        let request = || unsafe { std::mem::zeroed::<sys::ibv_send_wr>() };
        let piece = sys::ibv_sge { addr: 0, length: 0, lkey: 0 };
        Self {
            len,
            requests: (0..BATCH_LEN).map(|_| request()).collect(),
            pieces: vec![[piece; PIECES_MAX]; BATCH_LEN].into_boxed_slice(),
            messages: vec![[0; MESSAGE_LEN]; BATCH_LEN].into_boxed_slice(),
            queued: 0,
            open: VecDeque::with_capacity(len),
            first_open: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn open(&self) -> usize {
        self.open.len()
    }

    pub(super) fn write(
        &mut self,
        pieces: &[Piece<'_>],
        target: Target,
        immediate: Option<u32>,
        id: u64,
        signalled: bool,
    ) {
        assert!(
            pieces.len() <= PIECES_MAX,
            "{} pieces in one write, {PIECES_MAX} are the most",
            pieces.len()
        );
        let mut regions = [const { None }; PIECES_MAX];
        for (at, piece) in pieces.iter().enumerate() {
            let region_len = piece.region.span().len();
            let inside = piece.offset.checked_add(piece.len).is_some_and(|end| end <= region_len);
            assert!(inside, "bytes {}+{} of a region of {region_len}", piece.offset, piece.len);
            self.pieces[self.queued][at] = sys::ibv_sge {
                addr: piece.region.address() + piece.offset as u64,
                length: u32::try_from(piece.len).expect("a piece of at most 4 GiB"),
                lkey: piece.region.local_key(),
            };
            regions[at] = Some(piece.region.clone());
        }
        let opcode = immediate.map_or(sys::IBV_WR_RDMA_WRITE, |_| sys::IBV_WR_RDMA_WRITE_WITH_IMM);
        let request = &mut self.requests[self.queued];
        request.imm_data = immediate.unwrap_or(0).to_be();
        request.remote_addr = target.address;
        request.rkey = target.key;
        self.push(opcode, pieces.len(), Open { id, _regions: regions }, signalled, false);
    }

    pub(super) fn message(&mut self, bytes: &[u8; MESSAGE_LEN], id: u64, signalled: bool) {
        self.messages[self.queued] = *bytes;
        self.pieces[self.queued][0] = sys::ibv_sge { addr: 0, length: MESSAGE_BYTES, lkey: 0 };
        let nothing = Open { id, _regions: [const { None }; PIECES_MAX] };
        self.push(sys::IBV_WR_SEND, 1, nothing, signalled, true);
    }

    /// Makes the message queued last one of a length that ours never are.
    #[cfg(test)]
    pub(super) fn shorten_last(&mut self, len: u32) {
        self.pieces[self.queued - 1][0].length = len;
    }

    fn push(&mut self, opcode: u32, pieces: usize, open: Open, signalled: bool, inline: bool) {
        assert!(self.open.len() < self.len, "more than {} work requests open", self.len);
        let number = self.first_open + self.open.len() as u64;
        self.open.push_back(open);
        let request = &mut self.requests[self.queued];
        request.wr_id = number;
        request.opcode = opcode;
        request.num_sge = i32::try_from(pieces).expect("PIECES_MAX is small");
        let signalled = if signalled { sys::IBV_SEND_SIGNALED } else { 0 };
        request.send_flags = signalled | if inline { sys::IBV_SEND_INLINE } else { 0 };
        self.queued += 1;
    }

    pub(super) fn batch_is_full(&self) -> bool {
        self.queued == BATCH_LEN
    }

    /// Drops what was queued: for a queue pair that has failed. The regions stay held as if it had been posted.
    pub(super) fn forget_batch(&mut self) {
        self.queued = 0;
    }

    /// Hands the batch to the device, if there is one.
    pub(super) fn post(&mut self, queue_pair: *mut sys::ibv_qp) -> Result<(), VerbsError> {
        let count = std::mem::take(&mut self.queued);
        if count == 0 {
            return Ok(());
        }
        let requests = self.requests.as_mut_ptr();
        let pieces = self.pieces.as_mut_ptr();
        let messages = self.messages.as_ptr();
        for at in 0..count {
            // SAFETY: `at < BATCH_LEN`, the length of all three; nothing else refers to them.
            unsafe {
                let request = &mut *requests.add(at);
                request.sg_list = pieces.add(at).cast();
                request.next = if at + 1 < count { requests.add(at + 1) } else { std::ptr::null_mut() };
                if request.send_flags & sys::IBV_SEND_INLINE != 0 {
                    (*request.sg_list).addr = messages.add(at).addr() as u64;
                }
            }
        }
        let mut bad = std::ptr::null_mut();
        // SAFETY: the list was just linked and ends; the driver copies it, and the inline bytes, before the call
        // returns. The device may read the pieces until the request is complete or the queue pair destroyed: `open`
        // holds their regions until then.
        match unsafe { sys::ibv_post_send(queue_pair, requests, &raw mut bad) } {
            0 => Ok(()),
            code => Err(VerbsError::code("ibv_post_send", code.abs())),
        }
    }

    /// The request of this number is complete, and all before it. Returns its id; `None` if no such request is open.
    pub(super) fn done(&mut self, number: u64) -> Option<u64> {
        let behind = usize::try_from(number.checked_sub(self.first_open)?).ok()?;
        let id = self.open.get(behind)?.id;
        self.open.drain(..=behind);
        self.first_open = number + 1;
        Some(id)
    }

    /// Lets go of every region: the queue pair is destroyed.
    pub(super) fn release(&mut self) {
        self.first_open += self.open.len() as u64;
        self.open.clear();
        self.queued = 0;
    }

    /// Never lets go of the regions: the queue pair could not be destroyed.
    pub(super) fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.open));
        self.queued = 0;
    }
}
