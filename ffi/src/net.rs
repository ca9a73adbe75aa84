//! Socket calls that move bytes straight between a stream socket and a mapping.
//!
//! Front ends and the TCP transport receive payloads into the emulated disk and send them from it with these, so no
//! payload passes a buffer of ours. Neither call ever blocks or raises a signal.
//!
//! Invariants: the kernel is handed only live memory for exactly the length of the call; spans go in as raw
//! addresses. A page whose medium fails makes the call answer `EFAULT` where bytes before it were none, a short count
//! otherwise (the next call then says `EFAULT`); nothing is taken from the socket for the part that failed. Who sees
//! `EFAULT` marks the mapping with [`Mapping::poison`](crate::mapping::Mapping::poison) and drains the payload elsewhere.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::mapping::Span;

/// Pieces one call takes: room for 32 frames of header, payload and ack; 2 KiB of stack.
pub const PIECES_MAX: usize = 128;

/// What to send: bytes of our own, or bytes of a mapping.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'a> {
    /// Private memory.
    Bytes(&'a [u8]),
    /// Shared memory; what others write to it meanwhile may or may not be sent.
    Span(&'a Span),
}

impl Piece<'_> {
    /// Bytes of it.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Span(span) => span.len(),
        }
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Addresses for one gather or scatter call, no longer alive than the memory they name.
struct Vector<'a, const N: usize> {
    pieces: [libc::iovec; N],
    len: usize,
    memory: PhantomData<&'a mut [u8]>,
}

impl<const N: usize> Vector<'_, N> {
    fn new() -> Self {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Self { pieces: [empty; N], len: 0, memory: PhantomData }
    }

    fn push(&mut self, base: *mut u8, len: usize) {
        self.pieces[self.len] = libc::iovec { iov_base: base.cast(), iov_len: len };
        self.len += 1;
    }

    fn header(&mut self) -> libc::msghdr {
        // SAFETY: `msghdr` is a plain C struct for which all zeroes is a valid value: no address, no control data.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = self.pieces.as_mut_ptr();
        header.msg_iovlen = self.len as _;
        header
    }
}

/// Sends as much of `pieces`, in order, as the socket takes at once. Returns the bytes taken, which may end inside
/// any piece.
///
/// # Errors
/// `WouldBlock` when the socket takes nothing now; `BrokenPipe` and the like as sendmsg(2) says, without SIGPIPE; raw
/// `EFAULT` when the first bytes lie on a page whose medium failed.
///
/// # Panics
/// With more than [`PIECES_MAX`] pieces.
pub fn send_pieces(fd: BorrowedFd<'_>, pieces: &[Piece<'_>]) -> io::Result<usize> {
    assert!(pieces.len() <= PIECES_MAX, "{} pieces in one call", pieces.len());
    let mut vector = Vector::<PIECES_MAX>::new();
    for piece in pieces {
        match piece {
            Piece::Bytes(bytes) => vector.push(bytes.as_ptr().cast_mut(), bytes.len()),
            Piece::Span(span) => vector.push(span.as_ptr(), span.len()),
        }
    }
    let header = vector.header();
    retry(|| {
        // SAFETY: `header` names `vector`, which names memory that `pieces` borrows (slices) or keeps mapped (spans)
        // beyond this call. The kernel only reads it, and copies before it returns.
        unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) }
    })
}

/// Receives what the socket has, first into `span`, and what is over into `then`, which may be empty. Returns the bytes
/// received; `Ok(0)` is the end of the stream, unless there was no room at all.
///
/// # Errors
/// `WouldBlock` when there is nothing now; otherwise as recvmsg(2) says; raw `EFAULT` when the first bytes would go to a
/// page whose medium failed, and then they are still in the socket.
pub fn recv_pieces(fd: BorrowedFd<'_>, span: &Span, then: &mut [u8]) -> io::Result<usize> {
    if then.is_empty() {
        // One piece spares the kernel the import of a vector: this is the call a busy reactor makes all the time.
        return retry(|| {
            // SAFETY: `span` keeps its bytes mapped beyond this call and no reference to them exists. The kernel is
            // done with them when it returns.
            unsafe { libc::recv(fd.as_raw_fd(), span.as_ptr().cast(), span.len(), libc::MSG_DONTWAIT) }
        });
    }
    let mut vector = Vector::<2>::new();
    vector.push(span.as_ptr(), span.len());
    vector.push(then.as_mut_ptr(), then.len());
    let mut header = vector.header();
    retry(|| {
        // SAFETY: `header` names `vector`, which names memory that `span` keeps mapped (no reference to it exists) and
        // `then` borrows exclusively, both beyond this call. The kernel is done with it when it returns.
        unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) }
    })
}

/// Milliseconds since the other end's kernel last acknowledged anything on this TCP connection: whether the *host* is
/// there, even while the program on it is not getting to its socket. One system call.
///
/// # Errors
/// As getsockopt(2) says; `EOPNOTSUPP` on sockets that are not TCP.
pub fn ack_age_ms(fd: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: `tcp_info` is plain integers, for which all zeros is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).expect("a small struct");
    // SAFETY: `info` is `len` bytes of ours and the kernel writes at most that many during the call.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(info.tcpi_last_ack_recv) } else { Err(io::Error::last_os_error()) }
}

/// The call again while a signal interrupts it.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests;
