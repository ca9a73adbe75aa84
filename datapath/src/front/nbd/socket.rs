//! Calls on a client's socket that move no payload: small reads, and the end.
//!
//! None of them blocks.

use super::end::ConnectionEnd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};
use std::os::fd::OwnedFd;

/// Reads, of 16 KiB, of what a client sent that is not served any more: what a socket's buffer holds as a rule.
const GOODBYE_READS_MAX: usize = 256;

/// Receives into `buffer`. 0 is "nothing there now", noted in `readable`.
pub(super) fn receive(
    socket: &OwnedFd,
    buffer: &mut [u8],
    readable: &mut bool,
) -> Result<usize, ConnectionEnd> {
    loop {
        match recv(socket, &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err(ConnectionEnd::Gone),
            Ok((_, n)) => return Ok(n),
            Err(Errno::AGAIN) => {
                *readable = false;
                return Ok(0);
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(ConnectionEnd::Io(e.into())),
        }
    }
}

/// Before a socket is closed. TCP takes back replies that are still on their way when a socket is closed with requests
/// unread in it: so those that are there are read, and the client sees the end of the stream behind the last reply.
pub(super) fn say_goodbye(socket: &OwnedFd) {
    // Errors: the client is gone, and needs neither.
    let _ = shutdown(socket, Shutdown::Write);
    let mut scrap = [0; 16 << 10];
    for _ in 0..GOODBYE_READS_MAX {
        match recv(socket, &mut scrap[..], RecvFlags::DONTWAIT) {
            Ok((_, n)) if n > 0 => {}
            _ => return,
        }
    }
}
