//! The four calls that no library exports: in C they are inline functions of the header, which call the device's driver
//! through the pointers in its context.
//!
//! They are a write's way, and nothing stands between the caller and the driver: no table, lock or allocation.

use std::ffi::c_int;

use super::structures::*;

/// Takes at most `len` completions off the queue into `room` and returns how many, or a negative number.
///
/// # Safety
/// `queue` is alive and polled by nobody else; `room` has `len` entries.
#[inline]
pub(in crate::verbs) unsafe fn ibv_poll_cq(queue: *mut ibv_cq, len: c_int, room: *mut ibv_wc) -> c_int {
    // SAFETY: a living queue's context is open, and an open context has all its pointers: the library sets each to the
    // driver's function, or to one that only fails, before it hands the context out, and nobody changes them. What the
    // function asks for is upheld by the caller.
    unsafe { ((*(*queue).context).ops.poll_cq)(queue, len, room) }
}

/// Asks for an event with the next completion, or with the next that the peer marked; 0 or an error number.
///
/// # Safety
/// `queue` is alive.
#[inline]
pub(in crate::verbs) unsafe fn ibv_req_notify_cq(queue: *mut ibv_cq, only_marked: c_int) -> c_int {
    // SAFETY: as in `ibv_poll_cq`.
    unsafe { ((*(*queue).context).ops.req_notify_cq)(queue, only_marked) }
}

/// Posts a list of requests to send; 0 or an error number, and then `bad` points at the first that was not posted.
///
/// # Safety
/// `queue_pair` is alive and posted to by nobody else. The list ends with a null, and what it names lives through the
/// call; the memory that its pieces name, until the requests are complete or the queue pair is destroyed.
#[inline]
pub(in crate::verbs) unsafe fn ibv_post_send(
    queue_pair: *mut ibv_qp,
    requests: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: as in `ibv_poll_cq`, with the queue pair's context.
    unsafe { ((*(*queue_pair).context).ops.post_send)(queue_pair, requests, bad) }
}

/// Posts a list of buffers to receive into; returns as `ibv_post_send`.
///
/// # Safety
/// As `ibv_post_send`.
#[inline]
pub(in crate::verbs) unsafe fn ibv_post_recv(
    queue_pair: *mut ibv_qp,
    requests: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: as in `ibv_poll_cq`, with the queue pair's context.
    unsafe { ((*(*queue_pair).context).ops.post_recv)(queue_pair, requests, bad) }
}
