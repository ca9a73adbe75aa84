//! Small reads from a client's socket: headers and what is discarded. None of them blocks.

use super::end::ConnectionEnd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
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

/// Whether the client has ended its direction, and whether it is gone.
pub(super) fn ended(socket: &OwnedFd) -> Result<(bool, bool), ConnectionEnd> {
    let mut looked = [PollFd::new(socket, PollFlags::RDHUP)];
    loop {
        match poll(&mut looked, Some(&Timespec::default())) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(e) => return Err(ConnectionEnd::Io(e.into())),
        }
    }
    let told = looked[0].revents();
    let closed = told.intersects(PollFlags::HUP | PollFlags::ERR);
    Ok((closed || told.contains(PollFlags::RDHUP), closed))
}
