//! The completion queue of one queue pair, both directions in one, and the descriptor to sleep on.
//!
//! One queue for both directions: it is polled in one go, and what it says is in the order in which it happened. It has
//! room for every work request that can be open, so it cannot overrun.

use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;

use super::context::Domain;
use super::error::VerbsError;
use super::sys;

/// Completions taken off the queue at a time: 1.5 KiB of stack, and more than arrive between two polls of a busy loop.
pub(super) const BATCH_LEN: usize = 32;

pub(super) struct CompletionQueue {
    raw: *mut sys::ibv_cq,
    channel: *mut sys::ibv_comp_channel,
    /// Keeps the context open; last to go.
    domain: Domain,
}

// SAFETY: the queue and its channel belong to one queue pair, which is used by one thread at a time (`&mut`).
unsafe impl Send for CompletionQueue {}

impl CompletionQueue {
    pub(super) fn new(domain: &Domain, len: u32) -> Result<Self, VerbsError> {
        let (context, verbs) = (domain.context().as_ptr(), domain.context().verbs());
        // SAFETY: the domain keeps the context open for as long as `Self` lives.
        let channel = unsafe { verbs.ibv_create_comp_channel(context) };
        if channel.is_null() {
            return Err(VerbsError::last("ibv_create_comp_channel"));
        }
        let mut queue = Self { raw: std::ptr::null_mut(), channel, domain: domain.clone() };
        let events = queue.events();
        let flags = rustix::fs::fcntl_getfl(events).map_err(|e| VerbsError::of("fcntl", e.into()))?;
        rustix::fs::fcntl_setfl(events, flags | rustix::fs::OFlags::NONBLOCK)
            .map_err(|e| VerbsError::of("fcntl", e.into()))?;
        let len = i32::try_from(len).unwrap_or(i32::MAX);
        // SAFETY: context and channel live as long as the queue. The device writes only memory of its own driver's.
        queue.raw = unsafe { verbs.ibv_create_cq(context, len, std::ptr::null_mut(), channel, 0) };
        if queue.raw.is_null() {
            return Err(VerbsError::last("ibv_create_cq"));
        }
        Ok(queue)
    }

    pub(super) fn as_ptr(&self) -> *mut sys::ibv_cq {
        self.raw
    }

    /// Readable when a notified completion is there.
    pub(super) fn events(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the channel's, open until `drop`.
        unsafe { BorrowedFd::borrow_raw((*self.channel).fd) }
    }

    /// Takes completions off the queue, at most as many as there is room for.
    pub(super) fn take<'a>(
        &mut self,
        room: &'a mut [MaybeUninit<sys::ibv_wc>],
    ) -> Result<&'a [sys::ibv_wc], VerbsError> {
        let len = i32::try_from(room.len()).unwrap_or(i32::MAX);
        // SAFETY: the call writes at most `len` entries of `room`. It is the basic queue's, which polls from memory
        // shared with the kernel or the device and reads nothing of ours.
        let found = unsafe { sys::ibv_poll_cq(self.raw, len, room.as_mut_ptr().cast()) };
        let found = usize::try_from(found).map_err(|_| VerbsError::last("ibv_poll_cq"))?;
        // SAFETY: the call wrote the first `found` entries.
        Ok(unsafe { std::slice::from_raw_parts(room.as_ptr().cast(), found.min(room.len())) })
    }

    /// Asks for an event with the next completion.
    pub(super) fn notify(&mut self) -> Result<(), VerbsError> {
        // SAFETY: the queue is alive.
        match unsafe { sys::ibv_req_notify_cq(self.raw, 0) } {
            0 => Ok(()),
            code => Err(VerbsError::code("ibv_req_notify_cq", code.abs())),
        }
    }

    /// Takes the event off the descriptor, if there is one.
    pub(super) fn take_event(&mut self) {
        let verbs = self.domain.context().verbs();
        let (mut queue, mut tag) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the descriptor does not block; the outputs are written on success only. One event is asked for at a
        // time and acknowledged here at once, so destroying the queue never waits for an acknowledgement.
        unsafe {
            if verbs.ibv_get_cq_event(self.channel, &raw mut queue, &raw mut tag) == 0 {
                verbs.ibv_ack_cq_events(queue, 1);
            }
        }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        let verbs = self.domain.context().verbs();
        // SAFETY: each made once and destroyed once, the queue before its channel; the queue pair that uses them is
        // destroyed before (`QueuePair` orders it). A call that fails (the queue pair was leaked) changes nothing.
        unsafe {
            if !self.raw.is_null() {
                verbs.ibv_destroy_cq(self.raw);
            }
            verbs.ibv_destroy_comp_channel(self.channel);
        }
    }
}
