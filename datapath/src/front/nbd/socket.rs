//! Small reads from a client's socket: headers and what is discarded. None of them blocks.

use super::end::ConnectionEnd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use std::os::fd::OwnedFd;

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
