//! The receive side of a queue pair: an arena of small buffers that are posted, consumed and posted again.
//!
//! A message of the peer's lands in the next buffer; a write with an immediate consumes one without touching it.
//! Invariant: each buffer is posted at most once at a time, so the device writes none that is being read.

use super::context::Domain;
use super::error::VerbsError;
use super::region::Region;
use super::sys;
use super::{MESSAGE_BYTES, MESSAGE_LEN};
use crate::mapping::Mapping;

/// Marks the id of a receive, since a failed completion does not say its direction.
pub(super) const RECEIVE: u64 = 1 << 63;

pub(super) struct ReceiveQueue {
    arena: Region,
    requests: Box<[sys::ibv_recv_wr]>,
    pieces: Box<[sys::ibv_sge]>,
    /// Buffers consumed and not posted again, in order. Never longer than the arena has buffers.
    consumed: Vec<u32>,
}

// SAFETY: the raw pointers in `requests` point into `pieces` and `requests` themselves and are set anew for each post.
unsafe impl Send for ReceiveQueue {}

impl ReceiveQueue {
    /// An arena of `len` buffers, all waiting to be posted.
    pub(super) fn new(domain: &Domain, len: u32) -> Result<Self, VerbsError> {
        let memory =
            Mapping::anonymous(len as usize * MESSAGE_LEN).map_err(|e| VerbsError::of("memfd_create", e))?;
        let arena = Region::arena(domain, &memory.span(0, memory.len()))?;
        let none = std::ptr::null_mut();
        let request = sys::ibv_recv_wr { wr_id: 0, next: none, sg_list: std::ptr::null_mut(), num_sge: 1 };
        let piece = sys::ibv_sge { addr: 0, length: MESSAGE_BYTES, lkey: arena.local_key() };
        Ok(Self {
            arena,
            requests: vec![request; len as usize].into_boxed_slice(),
            pieces: vec![piece; len as usize].into_boxed_slice(),
            consumed: (0..len).collect(),
        })
    }

    pub(super) fn len(&self) -> usize {
        self.requests.len()
    }

    /// Never gives the arena back: the queue pair could not be destroyed.
    pub(super) fn leak(&self) {
        std::mem::forget(self.arena.clone());
    }

    /// The buffer `index` was consumed; false for one that does not exist or everything is consumed already.
    pub(super) fn consume(&mut self, index: u64) -> bool {
        let known = index < self.len() as u64 && self.consumed.len() < self.len();
        if known {
            self.consumed.push(u32::try_from(index).expect("below the arena's u32 length"));
        }
        known
    }

    /// The message in buffer `index`, which was consumed and not posted again.
    pub(super) fn message(&self, index: u64) -> [u8; MESSAGE_LEN] {
        let mut bytes = [0; MESSAGE_LEN];
        let at = usize::try_from(index).expect("checked by consume") * MESSAGE_LEN;
        self.arena.span().sub(at, MESSAGE_LEN).read_into(&mut bytes);
        bytes
    }

    /// Posts everything consumed again, in one call.
    pub(super) fn post(&mut self, queue_pair: *mut sys::ibv_qp) -> Result<(), VerbsError> {
        let count = self.consumed.len();
        if count == 0 {
            return Ok(());
        }
        let (requests, pieces) = (self.requests.as_mut_ptr(), self.pieces.as_mut_ptr());
        for (at, index) in self.consumed.drain(..).enumerate() {
            // SAFETY: `at < count <= len` of both; nothing else refers to them, and the device driver has copied what
            // an earlier call named.
            unsafe {
                (*pieces.add(at)).addr = self.arena.address() + u64::from(index) * MESSAGE_LEN as u64;
                let next = if at + 1 < count { requests.add(at + 1) } else { std::ptr::null_mut() };
                let sg_list = pieces.add(at);
                *requests.add(at) =
                    sys::ibv_recv_wr { wr_id: RECEIVE | u64::from(index), next, sg_list, num_sge: 1 };
            }
        }
        let mut bad = std::ptr::null_mut();
        // SAFETY: the list was just linked and ends; the driver copies it before the call returns. The device may write
        // the buffers named in it until the queue pair is destroyed, which is before the arena's region is dropped.
        match unsafe { sys::ibv_post_recv(queue_pair, requests, &raw mut bad) } {
            0 => Ok(()),
            code => Err(VerbsError::code("ibv_post_recv", code.abs())),
        }
    }
}
